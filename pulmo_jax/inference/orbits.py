"""Orbits that several epochs allow: samples of the posterior about a track that was found."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.stats import qmc

from pulmo_jax.core.kepler import Orbit, Shape, orbit_through
from pulmo_jax.inference.ensemble import Chain, independent_samples, stretch_moves
from pulmo_jax.methods.paco.epochs import Epochs, Flux, Star, criterion, look_up, sample, track

WALKERS, BURN_IN, KEPT, THIN = 96, 2000, 6000, 100
DRAWS = 2**15  # orbits from the prior, by whose likelihood the walkers' first places are chosen
SCATTER = np.array([0.3, 0.3, 0.02, 0.02, 0.05, 0.05])  # of those: px, px, eccentricity, cos i, radians


class OrbitSamples(NamedTuple):
    """Equally likely orbits: starts (S, 2) north and east at the reference date, arcsec; the orbits through them; where
    they stand at each date; their criterion. independent: how many they are worth; accepted: share of the moves."""

    starts: Float[np.ndarray, "S 2"]
    orbits: Orbit
    sky: Float[np.ndarray, "S E 2"]
    criterion: Float[np.ndarray, "S"]
    independent: float
    accepted: float


def draw_shapes(n: int, star: Star | None, seed: int) -> Shape:
    """n shapes, evenly spread (Halton) over the prior: eccentricity uniform in its range, cos i, omega and the mean
    anomaly uniform. omega in half a turn, because the other half looks the same."""
    share = qmc.Halton(4, rng=np.random.default_rng(seed)).random(n)
    low, high = (0.0, 0.0) if star is None else star.eccentricity
    columns = (low + (high - low) * share[:, 0], 2 * share[:, 1] - 1, np.pi * share[:, 2], 2 * np.pi * share[:, 3])
    return Shape(*(jnp.asarray(column) for column in columns))


def sample_orbits(
    epochs: Epochs, start: Float[Array, "2"], shape: Shape, star: Star, flux: Flux, fwhm_px: float, seed: int
) -> OrbitSamples:
    """The posterior about one track, by stretch moves from draws of the prior that the likelihood favours.

    Likelihood: exp(criterion / 2), the flux (of every epoch, if it is free) at its most likely value. Prior: uniform in
    the logarithm of the semi-major axis and in the node within the star's limits, in eccentricity, cos i, omega and
    mean anomaly. Only tracks within one FWHM of the given one at the reference date.
    """
    best = np.array([*np.asarray(start) / float(epochs.scale[0]), *(float(part) for part in shape)])
    walkers = first_places(epochs, best, star, flux, fwhm_px, seed)
    chain = run(epochs, jnp.asarray(best), jnp.asarray(walkers), jax.random.key(seed), star, flux, fwhm_px)
    places = np.asarray(chain.samples)[BURN_IN:]
    independent = independent_samples(places)
    flat = jnp.asarray(places[::THIN].reshape(-1, places.shape[-1]))
    starts, shapes = unpack(epochs, flat)
    sky, values = along(epochs, starts, shapes, star, flux)
    orbits = orbit_through(shapes, starts[:, 0], starts[:, 1], star.parallax_mas)
    return OrbitSamples(
        np.asarray(starts), jax.tree.map(np.asarray, orbits), np.asarray(sky), np.asarray(values), independent,
        float(chain.accepted),
    )  # fmt: skip


@partial(jax.jit, static_argnames=("star", "flux", "fwhm_px"))
def run(
    epochs: Epochs, best: Array, walkers: Float[Array, "W 6"], key: Array, star: Star, flux: Flux, fwhm_px: float
) -> Chain:
    density = partial(log_posterior, epochs, best, star, flux, fwhm_px)
    return stretch_moves(density, walkers, BURN_IN + KEPT, key)


@partial(jax.jit, static_argnames=("star", "flux"))
def along(epochs: Epochs, starts: Array, shapes: Shape, star: Star, flux: Flux) -> tuple[Array, Array]:
    """Where each track is at the dates, and its criterion."""
    sky = jax.vmap(lambda s, h: track(s, h, epochs.days, star)[0])(starts, shapes)
    return sky, jax.vmap(lambda s: criterion(sample(epochs, s), flux))(sky)


def unpack(epochs: Epochs, place: Float[Array, "*batch 6"]) -> tuple[Float[Array, "*batch 2"], Shape]:
    """From pixels of the first epoch, eccentricity, cos i, omega, mean anomaly."""
    return place[..., :2] * epochs.scale[0], Shape(*jnp.moveaxis(place[..., 2:], -1, 0))


def log_posterior(
    epochs: Epochs, best: Array, star: Star, flux: Flux, fwhm_px: float, place: Float[Array, "6"]
) -> Float[Array, ""]:
    """Up to a constant. Places at the reference date are uniform in log separation: 1 / separation^2 in area."""
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
    """Draws of the prior, taken with their likelihood as weight, moved a little so that no two are alike."""
    rng = np.random.default_rng(seed)
    shapes = np.stack(draw_shapes(DRAWS, star, seed + 1), -1)
    around = fwhm_px * np.sqrt(rng.random((DRAWS, 1))) / 2
    angle = 2 * np.pi * rng.random(DRAWS)
    draws = np.concatenate([best[:2] + around * np.stack([np.cos(angle), np.sin(angle)], -1), shapes], -1)
    draws[:, 4:] = (
        best[4:] + np.mod(draws[:, 4:] - best[4:] + [np.pi / 2, np.pi], [np.pi, 2 * np.pi]) - [np.pi / 2, np.pi]
    )
    draws = np.concatenate([best[None], draws])
    values = np.asarray(coarse_criterion(epochs, jnp.asarray(draws), star, flux))
    weights = np.exp((values - values.max()) / 2)
    walkers = np.empty((0, 6))
    scatter = SCATTER.copy()
    while len(walkers) < WALKERS:
        chosen = draws[rng.choice(len(draws), 4 * WALKERS, p=weights / weights.sum())]
        chosen = chosen + scatter * rng.standard_normal(chosen.shape)
        density = densities(epochs, jnp.asarray(best), jnp.asarray(chosen), star, flux, fwhm_px)
        walkers = np.concatenate([walkers, chosen[np.isfinite(density)]])
        scatter /= 2
    return walkers[:WALKERS]


@partial(jax.jit, static_argnames=("star", "flux", "fwhm_px"))
def densities(
    epochs: Epochs, best: Array, places: Float[Array, "N 6"], star: Star, flux: Flux, fwhm_px: float
) -> Float[Array, "N"]:
    return jax.vmap(partial(log_posterior, epochs, best, star, flux, fwhm_px))(places)


@partial(jax.jit, static_argnames=("star", "flux"))
def coarse_criterion(epochs: Epochs, places: Float[Array, "N 6"], star: Star, flux: Flux) -> Float[Array, "N"]:
    starts, shapes = unpack(epochs, places)
    sky, allowed = jax.vmap(lambda s, h: track(s, h, epochs.days, star))(starts, shapes)
    return jnp.where(allowed, criterion(look_up(epochs, sky), flux), 0)
