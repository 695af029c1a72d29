"""Posterior of position and flux of a source, sampled by the No-U-Turn Sampler of BlackJAX.

For constant covariances the log-likelihood is flux B(p) - flux^2 J(p) / 2 with two smooth functions of the position p.
Both are interpolated by Chebyshev polynomials, so that a step of the sampler does not depend on the number of frames.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import chebyshev

from pulmo_jax.core.psf import chebyshev_up_to
from pulmo_jax.host.extras import find_package
from pulmo_jax.methods.paco.channels import Channels, as_channels
from pulmo_jax.methods.paco.observation import Observation
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.methods.paco.source_likelihood import Source, TrackNoise, flux_terms, learn_noise
from pulmo_jax.methods.paco.stack import Patch, Stack, prepare

CHAINS, DRAWS, WARMUP = 4, 500, 300
PRIOR_FWHM = 0.5  # half-width of the prior of the position, in FWHM
PRIOR_STD = 10.0  # the same for bright sources, in standard deviations of the likelihood
NODES = 16  # Chebyshev nodes per axis


class NoMaximumError(ValueError):
    """The likelihood has no maximum near the position and flux given."""


@dataclass(frozen=True, eq=False)
class Posterior:
    """Samples of the position and the flux of a source.

    Attributes:
        samples: y, x (px of the derotated map) and flux (units of the PSF).
        r_hat: Rank-normalised split R-hat of each parameter (Vehtari et al. 2021); above 1.01 the chains disagree.
        ess: Effective number of independent samples of each parameter (bulk, Vehtari et al. 2021).
        divergences: Number of divergent transitions.
        widening: Factor by which the errors of the likelihood are multiplied.
    """

    samples: Float[np.ndarray, "chains draws 3"] = field(repr=False)
    r_hat: Float[np.ndarray, "3"]
    ess: Float[np.ndarray, "3"]
    divergences: int
    widening: float

    @property
    def flat(self) -> Float[np.ndarray, "samples 3"]:
        """All samples of all chains."""
        return self.samples.reshape(-1, 3)

    @property
    def mean(self) -> Float[np.ndarray, "3"]:
        """Mean of (y, x, flux)."""
        return self.flat.mean(0)

    @property
    def std(self) -> Float[np.ndarray, "3"]:
        """Standard deviation of (y, x, flux)."""
        return self.flat.std(0, ddof=1)

    @property
    def covariance(self) -> Float[np.ndarray, "3 3"]:
        """Covariance of (y, x, flux)."""
        return np.cov(self.flat.T)

    def interval(self, level: float) -> Float[np.ndarray, "2 3"]:
        """Central credible interval of (y, x, flux) with probability `level`."""
        return np.quantile(self.flat, [(1 - level) / 2, (1 + level) / 2], axis=0)


class View(NamedTuple):
    """A channel as the sampler uses it.

    Attributes:
        stack: Arrays of the channel.
        noise: Covariances along the track.
        centre: Centre of rotation (y, x) on the sky grid, px.
        scale: Magnification of the channel relative to the sky grid.
        gain: Flux in units of the channel's deviations of a source of flux 1.
    """

    stack: Stack
    noise: TrackNoise
    centre: Float[Array, "2"]
    scale: Float[Array, ""]
    gain: Float[Array, ""]


def sample_posterior(
    observation: Observation | Channels,
    y: float,
    x: float,
    flux: float,
    *,
    flux_std: float | None = None,
    spectrum: Float[np.ndarray, "L"] | None = None,
    seed: int = 0,
    chains: int = CHAINS,
    draws: int = DRAWS,
    warmup: int = WARMUP,
    settings: Settings = Settings(),  # noqa: B008
) -> Posterior:
    """Sample the posterior of position and flux of a source, with all others removed.

    The likelihood is `log_likelihood` with the covariances learnt without the source given, summed over channels. The
    priors are flat: the flux over all numbers, y and x within half a FWHM of the position given, or within ten of their
    standard deviations if that is less. Chains start at random places around it, in coordinates in which the
    likelihood's curvature there is 1.

    Args:
        observation: The stack.
        y: Row of the fitted source in the derotated map, px.
        x: Column, px.
        flux: Fitted, unbiased flux, in units of the PSF; with several channels, that of a spectrum of 1.
        flux_std: Standard deviation of the flux known from elsewhere, such as the empirical error of detections.csv;
            the log-likelihood is divided by the square of its ratio to the likelihood's own. 1 by default.
        spectrum: Flux in each channel of a source of flux 1; flat by default.
        seed: Seed of the sampler; equal seeds give equal samples.
        chains: Number of chains, at least 2.
        draws: Number of samples of each chain.
        warmup: Number of steps in which each chain adapts, which are discarded.
        settings: Settings of the noise model.

    Returns:
        The samples with diagnostics.

    Raises:
        InputError: If BlackJAX is not installed.
        NoMaximumError: If the likelihood has no maximum near the position given.

    Reference:
        Hoffman and Gelman 2014, JMLR 15:1593 (NUTS); Cabezas et al. 2024, arXiv:2402.10797 (BlackJAX).
    """
    find_package("blackjax", "posterior", "sample_posterior")
    channels = as_channels(observation)
    shares = np.ones(len(channels.each)) if spectrum is None else np.asarray(spectrum, float)
    views, patches = zip(
        *(
            view_channel(channels, number, (y, x, flux), float(shares[number]), settings)
            for number in range(len(shares))
        ),
        strict=True,
    )
    dtype = views[0].stack.deviations.dtype
    start = jnp.asarray([y, x, flux], dtype)
    covariance = inverse(-np.asarray(curvature(views, start, patches), float))
    if covariance is None:
        raise NoMaximumError(f"the likelihood has no maximum near (y, x) = ({y:.2f}, {x:.2f}) with flux {flux:.4g}")
    widening = 1.0 if flux_std is None else float(flux_std / np.sqrt(covariance[2, 2]))
    reach = np.minimum(PRIOR_FWHM * channels.fwhm_px, PRIOR_STD * widening * np.sqrt(np.diag(covariance)[:2]))
    surface = interpolate(views, start, jnp.asarray(reach, dtype), patches)
    factor = jnp.asarray(np.linalg.cholesky(covariance) * widening, dtype)
    found = run_chains(
        jax.random.key(seed), surface, start, factor, jnp.asarray(widening, dtype),
        chains=chains, draws=draws, warmup=warmup,
    )  # fmt: skip
    samples, r_hat, ess, divergent = jax.device_get(found)
    return Posterior(samples.astype(float), r_hat.astype(float), ess.astype(float), int(divergent.sum()), widening)


def inverse(information: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N N"] | None:
    """Invert an information matrix whose parameters have different units; None if it is not positive definite."""
    diagonal = np.diag(information)
    if not (diagonal > 0).all():
        return None
    unit = 1 / np.sqrt(diagonal)
    scaled = information * unit[:, None] * unit
    return np.linalg.inv(scaled) * unit[:, None] * unit if (np.linalg.eigvalsh(scaled) > 0).all() else None


def view_channel(
    channels: Channels, number: int, source: tuple[float, float, float], share: float, settings: Settings
) -> tuple[View, Patch]:
    """Learn the noise of a channel without the source (y, x, flux), and collect its arrays."""
    each, dtype = channels.each[number], channels.each[number].deviations.dtype
    stack, patch = prepare(each, settings)
    centre, scale = jnp.asarray(channels.centre, dtype), jnp.asarray(channels.scales[number], dtype)
    gain = jnp.asarray(share / each.unit, dtype)
    place = jnp.asarray(channels.in_channel(number, np.array(source[:2], float)), dtype)
    noise = learn_once(stack, place, source[2] * gain, patch)
    return View(stack, noise, centre, scale, gain), patch


@partial(jax.jit, static_argnames=("patch",))
def learn_once(stack: Stack, place: Float[Array, "2"], flux: Float[Array, ""], patch: Patch) -> TrackNoise:
    """Compiled `learn_noise`."""
    with jax.default_matmul_precision("highest"):
        return learn_noise(stack, Source(place, flux), patch)


class Surface(NamedTuple):
    """Chebyshev interpolants of B and J on a rectangle of positions.

    Attributes:
        coefficients: Coefficients of T_i(u_y) T_j(u_x) in B and in J; u is the offset from the middle over the reach.
        reach: Half-widths of the rectangle along y and x, px.
    """

    coefficients: Float[Array, "2 N N"]
    reach: Float[Array, "2"]

    def log_likelihood(self, u: Float[Array, "2"], flux: Float[Array, ""]) -> Float[Array, ""]:
        """Log-likelihood relative to no source, at the offset `u` in units of the reach."""
        along = [jnp.stack(chebyshev_up_to(part, self.coefficients.shape[1] - 1)) for part in u]
        linear, quadratic = jnp.einsum("fij,i,j->f", self.coefficients, *along)
        return flux * linear - flux**2 * quadratic / 2


def sum_terms(place: Float[Array, "2"], views: tuple[View, ...], patches: tuple[Patch, ...]) -> Float[Array, "2"]:
    """B and J of a source of flux 1 at `place` on the sky grid, summed over the channels."""
    total = jnp.zeros(2, place.dtype)
    for view, patch in zip(views, patches, strict=True):
        at = view.stack.centre + (place - view.centre) * view.scale
        linear, quadratic = flux_terms(view.stack, at, view.noise, patch)
        total += jnp.stack([linear * view.gain, quadratic * view.gain**2])
    return total


@partial(jax.jit, static_argnames=("patches",))
def curvature(views: tuple[View, ...], start: Float[Array, "3"], patches: tuple[Patch, ...]) -> Float[Array, "3 3"]:
    """Hessian of the log-likelihood with respect to (y, x, flux)."""

    def log_likelihood(parameters: Array) -> Array:
        linear, quadratic = sum_terms(parameters[:2], views, patches)
        return parameters[2] * linear - parameters[2] ** 2 * quadratic / 2

    with jax.default_matmul_precision("highest"):
        return jax.hessian(log_likelihood)(start)


@partial(jax.jit, static_argnames=("patches",))
def interpolate(
    views: tuple[View, ...], start: Float[Array, "3"], reach: Float[Array, "2"], patches: tuple[Patch, ...]
) -> Surface:
    """Interpolate B and J around a position.

    Args:
        views: The channels.
        start: (y, x, flux); the position is the middle of the rectangle.
        reach: Half-widths of the rectangle, px.
        patches: Static settings of the channels.

    Returns:
        The interpolants.
    """
    nodes = chebyshev.chebpts1(NODES)
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    with jax.default_matmul_precision("highest"):
        places = start[:2] + jnp.asarray(grid, reach.dtype) * reach
        values = jax.lax.map(lambda place: sum_terms(place, views, patches), places).reshape(NODES, NODES, 2)
        weights = chebyshev.chebvander(nodes, NODES - 1) * 2 / NODES
        weights[:, 0] /= 2
        along = jnp.asarray(weights, reach.dtype)
        return Surface(jnp.einsum("ai,bj,abf->fij", along, along, values), reach)


def within_prior(
    z: Float[Array, "3"], start: Float[Array, "3"], factor: Float[Array, "3 3"], reach: Float[Array, "2"]
) -> tuple[Float[Array, "2"], Float[Array, ""], Float[Array, ""]]:
    """Map unbounded, whitened coordinates to a position within the prior and a flux.

    Args:
        z: Whitened coordinates.
        start: (y, x, flux) at z = 0.
        factor: Factor of the covariance of the parameters.
        reach: Half-widths of the prior of the position, px.

    Returns:
        Offset from the start in units of the reach, within -1 and 1; flux; and the log-Jacobian up to a constant.
    """
    step = factor @ z
    v = step[:2] / reach
    log_jacobian = -2 * (abs(v) + jax.nn.softplus(-2 * abs(v))).sum()  # log(1 - tanh^2), without log 4
    return jnp.tanh(v), start[2] + step[2], log_jacobian


@partial(jax.jit, static_argnames=("chains", "draws", "warmup"))
def run_chains(
    key: Array,
    surface: Surface,
    start: Float[Array, "3"],
    factor: Float[Array, "3 3"],
    widening: Float[Array, ""],
    chains: int,
    draws: int,
    warmup: int,
) -> tuple[Array, Array, Array, Array]:
    """Adapt and run all chains.

    Args:
        key: Random key.
        surface: Log-likelihood around the start.
        start: (y, x, flux) around which the chains start.
        factor: Factor of the covariance of the parameters, widened.
        widening: Factor of the errors.
        chains: Number of chains.
        draws: Number of samples of each chain.
        warmup: Number of steps of adaptation.

    Returns:
        Samples (chains, draws, 3), R-hat, effective sample sizes, and whether each transition diverged.
    """
    import blackjax
    from blackjax import diagnostics

    def log_posterior(z: Array) -> Array:
        u, flux, log_jacobian = within_prior(z, start, factor, surface.reach)
        peak = surface.log_likelihood(jnp.zeros_like(u), start[2])
        return (surface.log_likelihood(u, flux) - peak) / widening**2 + log_jacobian

    def parameters(z: Array) -> Array:
        u, flux, _ = within_prior(z, start, factor, surface.reach)
        return jnp.append(start[:2] + u * surface.reach, flux)

    def run_chain(key: Array) -> tuple[Array, Array]:
        where, adapting, sampling = jax.random.split(key, 3)
        adaptation: Any = blackjax.window_adaptation(blackjax.nuts, log_posterior)
        (state, tuned), _ = adaptation.run(adapting, jax.random.normal(where, (3,), start.dtype), num_steps=warmup)
        step = blackjax.nuts(log_posterior, **tuned).step

        def draw(state: Any, key: Array) -> tuple[Any, tuple[Array, Array]]:
            state, info = cast(tuple[Any, Any], step(key, state))
            return state, (parameters(state.position), info.is_divergent)

        return jax.lax.scan(draw, state, jax.random.split(sampling, draws))[1]

    with jax.default_matmul_precision("highest"):
        samples, divergent = jax.vmap(run_chain)(jax.random.split(key, chains))
    centred = (samples - start) / jnp.diag(factor)  # single precision resolves the ranks
    return samples, diagnostics.rhat(centred), diagnostics.ess_bulk(centred), divergent
