"""Orbits that several epochs allow: samples of the posterior around a detected track."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import qmc

from pulmo_jax.core.kepler import Orbit, Shape, orbit_through
from pulmo_jax.inference.ensemble import Chain, independent_samples, stretch_moves
from pulmo_jax.methods.paco.epochs import Epochs, Flux, Star, criterion, look_up, sample
from pulmo_jax.methods.paco.orbit_search import track

WALKERS, BURN_IN, KEPT, THIN = 96, 2000, 6000, 100
DRAWS = 2**15  # orbits drawn from the prior; their likelihood selects the first positions of the walkers
SCATTER = np.array([0.3, 0.3, 0.02, 0.02, 0.05, 0.05])  # of those: px, px, eccentricity, cos i, radians, radians


class OrbitSamples(NamedTuple):
    """Equally likely orbits.

    Attributes:
        starts: Offset (north, east) from the star at the reference date, arcsec.
        orbits: The orbits through them.
        sky: Offset (north, east) at each epoch, arcsec.
        criterion: Criterion along each orbit.
        independent: Number of independent samples that they are worth.
        accepted: Share of accepted moves.
    """

    starts: Float[np.ndarray, "S 2"]
    orbits: Orbit
    sky: Float[np.ndarray, "S E 2"]
    criterion: Float[np.ndarray, "S"]
    independent: float
    accepted: float


def draw_shapes(n: int, star: Star | None, seed: int) -> Shape:
    """Draws shapes of orbits evenly from the prior (a Halton sequence).

    Eccentricity is uniform within the star's limits; cos i, omega and the mean anomaly are uniform. omega covers half a
    turn, because the other half looks the same on the sky.

    Args:
        n: Number of shapes.
        star: The star; None for circular orbits.
        seed: Seed of the sequence.

    Returns:
        The shapes, n of each parameter, in JAX's default precision.
    """
    share = qmc.Halton(4, rng=np.random.default_rng(seed)).random(n)
    low, high = (0.0, 0.0) if star is None else star.eccentricity
    columns = (low + (high - low) * share[:, 0], 2 * share[:, 1] - 1, np.pi * share[:, 2], 2 * np.pi * share[:, 3])
    return Shape(*(jnp.asarray(column) for column in columns))


def sample_orbits(
    epochs: Epochs,
    start: Float[np.ndarray, "2"],
    shape: Shape,
    star: Star,
    flux: Flux,
    fwhm_px: float,
    seed: int,
) -> OrbitSamples:
    """Samples the posterior around one track, by stretch moves that start from likely draws of the prior.

    The likelihood is exp(criterion / 2), with the flux (of every epoch, if it is free) at its most likely value. The
    prior is uniform in the logarithm of the semi-major axis and in the node, within the star's limits, and in
    eccentricity, cos i, omega and mean anomaly. Only tracks within one FWHM of the given one at the reference date
    count.

    Args:
        epochs: The maps.
        start: Offset (north, east) of the track at the reference date, arcsec.
        shape: Shape of its orbit.
        star: The star.
        flux: Whether the flux is free at every epoch, or constant.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        seed: Seed of the samples.

    Returns:
        The samples.
    """
    best = np.array([*start / float(epochs.scale[0]), *(float(part) for part in shape)])
    walkers = first_places(epochs, best, star, flux, fwhm_px, seed)
    chain = run(epochs, jnp.asarray(best), jnp.asarray(walkers), jax.random.key(seed), star, flux, fwhm_px)
    places, accepted = jax.device_get((chain.samples[BURN_IN:], chain.accepted))
    thinned = jnp.asarray(places[::THIN].reshape(-1, places.shape[-1]))
    starts, orbits, sky, values = jax.device_get(along(epochs, thinned, star, flux))
    return OrbitSamples(starts, orbits, sky, values, independent_samples(places), float(accepted))


@partial(jax.jit, static_argnames=("star", "flux", "fwhm_px"))
def run(
    epochs: Epochs,
    best: Float[Array, "6"],
    walkers: Float[Array, "W 6"],
    key: Array,
    star: Star,
    flux: Flux,
    fwhm_px: float,
) -> Chain:
    """Chain of BURN_IN + KEPT steps of all walkers."""
    density = partial(log_posterior, epochs, best, star, flux, fwhm_px)
    return stretch_moves(density, walkers, BURN_IN + KEPT, key)


@partial(jax.jit, static_argnames=("star", "flux"))
def along(
    epochs: Epochs, samples: Float[Array, "S 6"], star: Star, flux: Flux
) -> tuple[Float[Array, "S 2"], Orbit, Float[Array, "S E 2"], Float[Array, "S"]]:
    """Starts, orbits, positions on the sky at the dates, and criterion of each sample."""
    starts, shapes = unpack(epochs, samples)
    sky = jax.vmap(lambda start, shape: track(start, shape, epochs.days, star)[0])(starts, shapes)
    orbits = orbit_through(shapes, starts[:, 0], starts[:, 1], star.parallax_mas)
    return starts, orbits, sky, jax.vmap(lambda at: criterion(sample(epochs, at), flux))(sky)


def unpack(epochs: Epochs, place: Float[Array, "*batch 6"]) -> tuple[Float[Array, "*batch 2"], Shape]:
    """Start, arcsec, and shape from pixels of the first epoch, eccentricity, cos i, omega and mean anomaly."""
    return place[..., :2] * epochs.scale[0], Shape(*jnp.moveaxis(place[..., 2:], -1, 0))


def log_posterior(
    epochs: Epochs, best: Float[Array, "6"], star: Star, flux: Flux, fwhm_px: float, place: Float[Array, "6"]
) -> Float[Array, ""]:
    """Logarithm of the posterior density, up to a constant.

    Positions at the reference date are uniform in log separation: 1 / separation^2 per area.
    """
    start, shape = unpack(epochs, place)
    low, high = star.eccentricity
    turned = abs(place[4:] - best[4:]) <= jnp.array([jnp.pi / 2, jnp.pi])
    sky, allowed = track(start, shape, epochs.days, star)
    allowed &= (shape.eccentricity >= low) & (shape.eccentricity <= high) & (abs(shape.cos_inclination) <= 1)
    allowed &= turned.all() & (((place[:2] - best[:2]) ** 2).sum() <= fwhm_px**2)
    value = criterion(sample(epochs, sky), flux) / 2 - jnp.log((place[:2] ** 2).sum())
    return jnp.where(allowed, value, -jnp.inf)


def first_places(
    epochs: Epochs, best: Float[np.ndarray, "6"], star: Star, flux: Flux, fwhm_px: float, seed: int
) -> Float[np.ndarray, "W 6"]:
    """Draws of the prior weighted by their likelihood, moved a little so that no two are equal."""
    rng = np.random.default_rng(seed)
    draws = np.concatenate([best[None], prior_draws(best, star, fwhm_px, rng, seed)])
    values = np.asarray(coarse_criterion(epochs, jnp.asarray(draws), star, flux))
    weights = np.exp((values - values.max()) / 2)
    walkers = np.empty((0, 6))
    scatter = SCATTER.copy()
    while len(walkers) < WALKERS:
        chosen = draws[rng.choice(len(draws), 4 * WALKERS, p=weights / weights.sum())]
        chosen = chosen + scatter * rng.standard_normal(chosen.shape)
        density = np.asarray(densities(epochs, jnp.asarray(best), jnp.asarray(chosen), star, flux, fwhm_px))
        walkers = np.concatenate([walkers, chosen[np.isfinite(density)]])
        scatter /= 2
    return walkers[:WALKERS]


def prior_draws(
    best: Float[np.ndarray, "6"], star: Star, fwhm_px: float, rng: np.random.Generator, seed: int
) -> Float[np.ndarray, "N 6"]:
    """DRAWS shapes of the prior through positions within half a FWHM of the best; angles within half a period of it."""
    shapes = np.stack(jax.device_get(draw_shapes(DRAWS, star, seed + 1)), -1)
    around = fwhm_px * np.sqrt(rng.random((DRAWS, 1))) / 2
    angle = 2 * np.pi * rng.random(DRAWS)
    draws = np.concatenate([best[:2] + around * np.stack([np.cos(angle), np.sin(angle)], -1), shapes], -1)
    half = np.array([np.pi / 2, np.pi])
    draws[:, 4:] = best[4:] + np.mod(draws[:, 4:] - best[4:] + half, 2 * half) - half
    return draws


@partial(jax.jit, static_argnames=("star", "flux", "fwhm_px"))
def densities(
    epochs: Epochs, best: Float[Array, "6"], places: Float[Array, "N 6"], star: Star, flux: Flux, fwhm_px: float
) -> Float[Array, "N"]:
    """`log_posterior` of many orbits."""
    return jax.vmap(partial(log_posterior, epochs, best, star, flux, fwhm_px))(places)


@partial(jax.jit, static_argnames=("star", "flux"))
def coarse_criterion(epochs: Epochs, places: Float[Array, "N 6"], star: Star, flux: Flux) -> Float[Array, "N"]:
    """Criterion of many orbits on the finer grid; 0 where the semi-major axis is beyond the star's limits."""
    starts, shapes = unpack(epochs, places)
    sky, allowed = jax.vmap(lambda start, shape: track(start, shape, epochs.days, star))(starts, shapes)
    return jnp.where(allowed, criterion(look_up(epochs, sky), flux), 0)
