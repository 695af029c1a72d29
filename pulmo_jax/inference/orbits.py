"""Posterior sampling of the orbits that are consistent with several epochs, around a detected track."""

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
DRAWS = 2**15  # prior draws, from which the initial walkers are selected by likelihood
SCATTER = np.array(
    [0.3, 0.3, 0.02, 0.02, 0.05, 0.05]
)  # standard deviation of the offsets: px, px, eccentricity, cos i, radians, radians


class OrbitSamples(NamedTuple):
    """Samples of the posterior, of equal weight.

    Attributes:
        starts: Offset (north, east) from the star at the reference date, arcsec.
        orbits: Orbit through each offset.
        sky: Offset (north, east) at each epoch, arcsec.
        criterion: Criterion along each orbit.
        independent: Effective number of independent samples of the whole chain.
        accepted: Fraction of accepted moves.
    """

    starts: Float[np.ndarray, "S 2"]
    orbits: Orbit
    sky: Float[np.ndarray, "S E 2"]
    criterion: Float[np.ndarray, "S"]
    independent: float
    accepted: float


def draw_shapes(n: int, star: Star | None, seed: int) -> Shape:
    """Draw orbit shapes from the prior by a Halton sequence.

    Eccentricity is uniform within the star's limits; cos i, omega and the mean anomaly are uniform. omega covers half a
    turn, because the other half gives the same projected orbits.

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
    """Sample the posterior around one track by stretch moves, starting from likely draws of the prior.

    The likelihood is exp(criterion / 2), with the flux (of every epoch, if it is free) at its maximum-likelihood value.
    The prior is uniform in the logarithm of the semi-major axis and in the node, within the star's limits, and in
    eccentricity, cos i, omega and mean anomaly. The density is zero for tracks more than one FWHM from the given track
    at the reference date.

    Args:
        epochs: Maps of all epochs.
        start: Offset (north, east) of the track at the reference date, arcsec.
        shape: Shape of its orbit.
        star: The star.
        flux: Whether the flux is free at every epoch, or constant.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        seed: Random seed.

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
    """Run the chain of BURN_IN + KEPT steps.

    Args:
        epochs: Maps of all epochs.
        best: Coordinates of the detected track (see `unpack`).
        walkers: Initial coordinates of the walkers.
        key: Random key.
        star: The star.
        flux: Whether the flux is free at every epoch, or constant.
        fwhm_px: FWHM of the PSF in the first epoch, px.

    Returns:
        The chain.
    """
    density = partial(log_posterior, epochs, best, star, flux, fwhm_px)
    return stretch_moves(density, walkers, BURN_IN + KEPT, key)


@partial(jax.jit, static_argnames=("star", "flux"))
def along(
    epochs: Epochs, samples: Float[Array, "S 6"], star: Star, flux: Flux
) -> tuple[Float[Array, "S 2"], Orbit, Float[Array, "S E 2"], Float[Array, "S"]]:
    """Offsets at the reference date (arcsec), orbits, offsets at each epoch (arcsec), and criterion of each sample."""
    starts, shapes = unpack(epochs, samples)
    sky = jax.vmap(lambda start, shape: track(start, shape, epochs.days, star)[0])(starts, shapes)
    orbits = orbit_through(shapes, starts[:, 0], starts[:, 1], star.parallax_mas)
    return starts, orbits, sky, jax.vmap(lambda at: criterion(sample(epochs, at), flux))(sky)


def unpack(epochs: Epochs, place: Float[Array, "*batch 6"]) -> tuple[Float[Array, "*batch 2"], Shape]:
    """Convert sampling coordinates to the offset at the reference date and the shape of the orbit.

    Args:
        epochs: Maps of all epochs.
        place: Offset (north, east) in pixels of the first epoch, eccentricity, cos i, omega and mean anomaly (radians).

    Returns:
        Offset in arcsec, and shape.
    """
    return place[..., :2] * epochs.scale[0], Shape(*jnp.moveaxis(place[..., 2:], -1, 0))


def log_posterior(
    epochs: Epochs, best: Float[Array, "6"], star: Star, flux: Flux, fwhm_px: float, place: Float[Array, "6"]
) -> Float[Array, ""]:
    """Logarithm of the posterior density, up to a constant.

    The prior of the position at the reference date is uniform in log separation: 1 / separation^2 per area.

    Args:
        epochs: Maps of all epochs.
        best: Coordinates of the detected track (see `unpack`), about which the density is restricted.
        star: The star.
        flux: Whether the flux is free at every epoch, or constant.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        place: Coordinates of the orbit.

    Returns:
        Log-density; minus infinity where the prior is zero.
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
    """Initial coordinates of the walkers: prior draws weighted by likelihood, with small random offsets."""
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
    """Draw DRAWS orbits from the prior through positions near the detected track.

    Args:
        best: Coordinates of the detected track (see `unpack`).
        star: The star.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        rng: Random generator of the positions.
        seed: Seed of the shapes.

    Returns:
        Coordinates within half a FWHM of the track; angles within half a period of it.
    """
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
    """Criterion of many orbits by look-up on the finer grid; 0 if the semi-major axis is outside the star's limits."""
    starts, shapes = unpack(epochs, places)
    sky, allowed = jax.vmap(lambda start, shape: track(start, shape, epochs.days, star))(starts, shapes)
    return jnp.where(allowed, criterion(look_up(epochs, sky), flux), 0)
