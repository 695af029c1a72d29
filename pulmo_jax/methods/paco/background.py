"""Noise model of every patch: covariance estimation, shrinkage and factorisation, and the resulting matched filters."""

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
    """Static settings of the maps; each distinct value is compiled once.

    Attributes:
        mode: Exact, fast or robust.
        shrinkage: Estimator of the shrinkage factor.
        rho: The shrinkage factor if it is fixed, otherwise None.
        degree: Degree of the PSF's expansion in its shift.
        offsets: Footprint of a patch (dy, dx), px.
        shape: Height and width of the frames, px.
        chunk: Number of locations per batch.
        n_devices: Number of devices.
        weights_error: Relative tolerance of the frame weights in robust mode.
    """

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
        """Footprint in flat indices of a frame."""
        return patches.flat_offsets(np.array(self.offsets), self.shape[1])


class Background(NamedTuple):
    """Noise of a stack.

    Attributes:
        products: Temporal means of products of deviations at L lags, from which every patch covariance is gathered; in
            robust mode L = 0, because frame weights differ between patches.
        n: Number of independent frames at every pixel.
    """

    products: Float[Array, "L pixels"]
    n: Float[Array, "pixels"]


class Template(NamedTuple):
    """PSF on a patch, expanded in its sub-pixel shift (see `core.psf.ShiftExpansion`).

    Attributes:
        terms: Coefficients of the J terms.
        product: Expansion of the products of two terms.
        neglected: Maximum truncation error of each pixel over all shifts.
    """

    terms: Float[Array, "J P"]
    product: Float[Array, "Q J J"]
    neglected: Float[Array, "P"]


class Filters(NamedTuple):
    """Matched filters at N locations.

    Attributes:
        weights: Filters C^-1 H.
        gram: Gram matrices H' C^-1 H.
        state: rho; whether C was singular; an upper bound on the squared C^-1 norm of the truncation error of the PSF;
            and whether the iteration failed to converge.
    """

    weights: Float[Array, "N P J"]
    gram: Float[Array, "N J J"]
    state: Float[Array, "N 4"]


class Frames(NamedTuple):
    """Frames at N locations in robust mode.

    Attributes:
        deviations: Deviation of each frame from the mean.
        weights: Weight s_t^-2 of each frame.
    """

    deviations: Float[Array, "T N P"]
    weights: Float[Array, "T N"]


@partial(jax.jit, static_argnames=("offsets", "effective"))
def learn(deviations: Float[Array, "T H W"], offsets: Offsets, effective: bool = False) -> Background:
    """Learn the noise of a stack.

    Args:
        deviations: Frames minus their temporal mean.
        offsets: Footprint of a patch (dy, dx), px; () for no products.
        effective: Whether n is the effective number of temporally correlated frames instead of T.

    Returns:
        The noise.
    """
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
    """Compute matched filters: gather, shrink and factorise the covariance of each location, and solve.

    Args:
        locations: Flat indices of the locations.
        deviations: Deviations on the patch of each location.
        background: Noise of the stack.
        template: Expansion of the PSF.
        program: Static settings.

    Returns:
        The filters.
    """
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
    """Compute the matched filters of one location.

    Args:
        template: Expansion of the PSF.
        variance: Variance of each pixel; 0 for excluded pixels.
        rho: Shrinkage factor.
        factor: Cholesky factor of the covariance.

    Returns:
        The filters.
    """
    usable = variance > 0
    weights, gram = likelihood.matched_filter(jnp.where(usable, template.terms, 0), factor.lower)
    rho = jnp.where(factor.singular, 1, rho)
    # C >= rho diag(S), so this bounds the C^-1 norm of the truncation error from above.
    neglected = jnp.where(usable, template.neglected**2 / jnp.where(usable, variance, 1), 0).sum()
    neglected = jnp.where(neglected > 0, neglected / rho, 0)
    state = jnp.stack([rho, factor.singular.astype(rho.dtype), neglected, jnp.zeros_like(rho)])
    return Filters(weights, gram, jax.lax.stop_gradient(state))  # a diagnostic, without a derivative where rho is 0


def robust_filters_at(
    deviations: Float[Array, "T N P"], n: Float[Array, "N"], template: Template, program: Program
) -> tuple[Filters, Frames]:
    """Compute matched filters of N locations with a weight per frame and location (robust mode).

    Args:
        deviations: Deviations on the patch of each location.
        n: Number of independent frames at each location under equal weights.
        template: Expansion of the PSF.
        program: Static settings.

    Returns:
        The filters, and the deviations and weights of the frames.
    """
    shrinkage = covariance.shrinkage_factor(program.shrinkage, program.rho)

    def of_location(deviations: Array, n: Array) -> tuple[Filters, Frames]:
        fit = robust.scale_mixture(deviations, n, shrinkage, program.weights_error)
        statistics = fit.statistics
        filters = filters_of(template, statistics.variance, statistics.rho, statistics.factor)
        state = filters.state.at[3].set(~fit.converged)
        return filters._replace(state=state), Frames(statistics.deviations, fit.weights)

    return jax.vmap(of_location, in_axes=(1, 0), out_axes=(0, 1))(deviations, n)
