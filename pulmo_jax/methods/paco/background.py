"""The noise around every location: learnt from the stack, shrunk, factorised, and turned into matched filters."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pulmo_jax.core import covariance, likelihood, patches, robust
from pulmo_jax.methods.paco.settings import Mode, ShrinkageName

Offsets = tuple[tuple[int, int], ...]


class Program(NamedTuple):
    """What the computation is compiled for: a chunk of locations at a time, of patches with these offsets."""

    mode: Mode
    shrinkage: ShrinkageName
    rho: float | None
    degree: int
    offsets: Offsets
    shape: tuple[int, int]
    chunk: int
    n_devices: int
    weights_error: float = 1e-3

    @property
    def flat_offsets(self) -> Int[np.ndarray, "P"]:
        return patches.flat_offsets(np.array(self.offsets), self.shape[1])


class Background(NamedTuple):
    """What is known of the noise: products of deviations a lag apart, which hold every patch's covariance, and how
    many independent frames they rest on, at every pixel. In robust mode L = 0: each patch weighs frames by itself."""

    products: Float[Array, "L pixels"]
    n: Float[Array, "pixels"]


class Template(NamedTuple):
    """The PSF on a patch as J terms of an expansion in its shift, and what that neglects (see `ShiftExpansion`)."""

    terms: Float[Array, "J P"]
    product: Float[Array, "Q J J"]
    neglected: Float[Array, "P"]


class Filters(NamedTuple):
    """Of N locations: the filters C^-1 H, their Gram matrices, and the state of C: rho, whether it was singular, at
    most which C^-1 norm squared the neglected part of the PSF has, and whether its iteration did not settle."""

    weights: Float[Array, "N P J"]
    gram: Float[Array, "N J J"]
    state: Float[Array, "N 4"]


class Frames(NamedTuple):
    """Of N locations: each frame's deviation from the mean there, and its weight s_t^-2."""

    deviations: Float[Array, "T N P"]
    weights: Float[Array, "T N"]


@partial(jax.jit, static_argnames=("offsets", "effective"))
def learn(deviations: Float[Array, "T H W"], offsets: Offsets, effective: bool = False) -> Background:
    """effective: count correlated frames as what they are worth. offsets: of a patch; () for no products."""
    n_frames, n_pixels = len(deviations), deviations[0].size
    products = jnp.zeros((0, n_pixels), deviations.dtype)
    if offsets:
        lag = patches.pixel_lags(np.array(offsets)).lag
        products = covariance.lagged_products(deviations, lag).reshape(-1, n_pixels)
    flat = deviations.reshape(n_frames, n_pixels)
    n = covariance.effective_frames(flat) if effective else jnp.full(n_pixels, n_frames, deviations.dtype)
    return Background(products, n)


def filters_at(
    locations: Int[Array, "N"],
    deviations: Float[Array, "T N P"],
    background: Background,
    template: Template,
    program: Program,
) -> Filters:
    """Gather the covariance of each location, shrink and factorise it, and solve for its filters."""
    shrinkage = covariance.shrinkage_factor(program.shrinkage, program.rho)
    lags = patches.pixel_lags(np.array(program.offsets))
    s = patches.gather_pairs(background.products, locations, lags, program.flat_offsets)

    def of_location(s: Array, deviations: Array, n: Array) -> Filters:
        variance = jnp.diag(s)
        rho = shrinkage(s, deviations, n)
        factor = covariance.factorise(covariance.shrink(s, rho), variance > 0)
        return filters_of(template, variance, rho, factor)

    return jax.vmap(of_location, in_axes=(0, 1, 0))(s, deviations, background.n[locations])


def filters_of(
    template: Template, variance: Float[Array, "P"], rho: Float[Array, ""], factor: covariance.Factor
) -> Filters:
    """Those of one location."""
    usable = variance > 0
    weights, gram = likelihood.matched_filter(jnp.where(usable, template.terms, 0), factor.lower)
    rho = jnp.where(factor.singular, 1, rho)
    # C is at least rho diag(S), so this is at least the C^-1 norm of what the expansion neglects of the PSF.
    neglected = jnp.where(usable, template.neglected**2 / jnp.where(usable, variance, 1), 0).sum()
    neglected = jnp.where(neglected > 0, neglected / rho, 0)
    return Filters(weights, gram, jnp.stack([rho, factor.singular.astype(rho.dtype), neglected, jnp.zeros_like(rho)]))


def robust_filters_at(
    deviations: Float[Array, "T N P"], n: Float[Array, "N"], template: Template, program: Program
) -> tuple[Filters, Frames]:
    """The same where frames are not equally good; n: number of independent ones, were they so."""
    shrinkage = covariance.shrinkage_factor(program.shrinkage, program.rho)

    def of_location(deviations: Array, n: Array) -> tuple[Filters, Frames]:
        fit = robust.scale_mixture(deviations, n, shrinkage, program.weights_error)
        of = fit.statistics
        filters = filters_of(template, of.variance, of.rho, of.factor)
        state = filters.state.at[3].set(~fit.converged)
        return filters._replace(state=state), Frames(of.deviations, fit.weights)

    return jax.vmap(of_location, in_axes=(1, 0), out_axes=(0, 1))(deviations, n)
