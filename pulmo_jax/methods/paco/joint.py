"""Fits of sources in all channels of an observation, in its units, and the programs that compute them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.rendering import subtract
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.methods.paco.source_fit import Fit, Sky, best_fit, information
from pulmo_jax.methods.paco.stack import Patch, Stack, prepare
from pulmo_jax.methods.paco.tracks import distinct_pixels

Prepared = tuple[tuple[Stack, ...], tuple[Patch, ...]]  # arrays and static settings of every channel

CAPACITY = 32  # sources per call of the program
NEAR_DISTINCT = 40  # patches along the track of a source near the star; sources beyond have a program of their own
REACH_PX = 3.6  # largest distance between a start and the patches of the fit; each coordinate moves by up to 2.5 px


class SourceFit(NamedTuple):
    """Position of a source on the sky and its flux in every channel.

    Attributes:
        place: Position (y, x) on the sky grid, px.
        place_covariance: Covariance of the position under independent noise between channels, px^2; NaN if no channel
            constrains the position.
        flux: Unbiased flux in each channel, in units of its PSF.
        flux_std: Standard deviation of the flux from the likelihood, in the same units.
        each: Fit of each channel, in the pixels and flux units of that channel.
    """

    place: Float[np.ndarray, "2"]
    place_covariance: Float[np.ndarray, "2 2"]
    flux: Float[np.ndarray, "L"]
    flux_std: Float[np.ndarray, "L"]
    each: tuple[Fit, ...]


class Injected(NamedTuple):
    """Sources that are added to the frames.

    Attributes:
        places: Positions (y, x) on the sky grid, px.
        fluxes: Fluxes in each channel, in units of its PSF.
    """

    places: Float[np.ndarray, "N 2"]
    fluxes: Float[np.ndarray, "N L"]


def fit_source(channels: Channels, settings: Settings, start: Float[np.ndarray, "2"]) -> SourceFit:
    """Fit one source jointly in all channels (see `fit_sources`)."""
    return fit_sources(channels, settings, start[None])[0]


def fit_sources(
    channels: Channels, settings: Settings, starts: Float[np.ndarray, "N 2"], injected: Injected | None = None
) -> list[SourceFit]:
    """Fit sources of any flux, each by itself and jointly in all channels, in one program (see `best_fit`).

    Args:
        channels: The observation.
        settings: Settings of the noise model.
        starts: Initial positions (y, x) on the sky grid, px.
        injected: Source that is added to the frames before each fit; none by default.

    Returns:
        Position and fluxes of each source.
    """
    separation = np.linalg.norm(starts - np.array(channels.centre), axis=-1)
    near = np.array([is_near(channels, far) for far in separation], bool)
    injected = injected or Injected(np.zeros_like(starts), np.zeros((len(starts), len(channels.each))))
    fits: dict[int, SourceFit] = {}
    for group in (np.flatnonzero(near), np.flatnonzero(~near)):
        if len(group):
            given = Injected(injected.places[group], injected.fluxes[group])
            prepared = prepare_channels(channels, settings, bool(near[group[0]]))
            found = fit_group(channels, prepared, starts[group], given)
            fits |= dict(zip(group.tolist(), found, strict=True))
    return [fits[number] for number in range(len(starts))]


def fit_group(
    channels: Channels, prepared: Prepared, starts: Float[np.ndarray, "N 2"], injected: Injected
) -> list[SourceFit]:
    """Fit sources with one set of static settings (see `fit_sources`)."""
    stacks, patches = prepared
    dtype = stacks[0].deviations.dtype
    centres = [observation.centre for observation in channels.each]
    sky = Sky(*(jnp.asarray(values, dtype) for values in (channels.centre, centres, channels.scales)))
    units = np.array([observation.unit for observation in channels.each])
    fits: list[SourceFit] = []
    for first in range(0, len(starts), CAPACITY):
        part = slice(first, first + CAPACITY)
        missing = CAPACITY - len(starts[part])
        arrays = (starts[part], injected.places[part], injected.fluxes[part] / units)
        padded = (jnp.asarray(np.pad(values, ((0, missing), (0, 0))), dtype) for values in arrays)
        found = jax.device_get(fit_batch(stacks, patches, sky, *padded, jnp.asarray(CAPACITY - missing)))
        fits += [as_source(channels, jax.tree.map(lambda leaf, i=i: leaf[i], found)) for i in range(CAPACITY - missing)]
    return fits


@partial(jax.jit, static_argnames=("patches",))
def fit_batch(
    stacks: Sequence[Stack],
    patches: tuple[Patch, ...],
    sky: Sky,
    starts: Float[Array, "N 2"],
    places: Float[Array, "N 2"],
    fluxes: Float[Array, "N L"],
    count: Int[Array, ""],
) -> Fit:
    """Fit the first `count` of N sources; the shapes do not depend on their number, so that it is compiled once.

    Args:
        stacks: Arrays of each channel.
        patches: Static settings of each channel.
        sky: Transformation between the sky grid and the channels.
        starts: Initial positions (y, x) on the sky grid, px.
        places: Positions of sources that are added before each fit, px.
        fluxes: Their flux in each channel, in units of its deviations; 0 for none.
        count: Number of sources.

    Returns:
        The fit of every source and channel.
    """

    def fit_one(i: Array) -> Fit:
        at, pairs = sky.in_channels(places[i]), zip(stacks, patches, strict=True)
        seen = [with_source(stack, patch, at[k], fluxes[i, k]) for k, (stack, patch) in enumerate(pairs)]
        return best_fit(seen, patches, sky, starts[i])

    def add(i: Array, fits: Fit) -> Fit:
        return jax.tree.map(lambda all_, one: all_.at[i].set(one), fits, fit_one(i))

    with jax.default_matmul_precision("highest"):
        n, n_channels, dtype = len(starts), len(stacks), starts.dtype
        values = jnp.zeros((n, n_channels), dtype)
        empty = Fit(
            values, values, values, jnp.zeros((n, n_channels, 3, 3), dtype), values, values, values,
            jnp.zeros((n, n_channels), jnp.int32),
        )  # fmt: skip
        return jax.lax.fori_loop(0, count, add, empty)


def with_source(stack: Stack, patch: Patch, place: Float[Array, "2"], flux: Float[Array, ""]) -> Stack:
    """Add a source at `place` (y, x; px) to the frames of a channel, if its flux is not 0."""

    def added() -> Array:
        frames = stack.deviations.reshape(-1, *patch.shape)
        usable = stack.usable.reshape(patch.shape)
        return subtract(frames, usable, stack.stamp, stack.angles_deg, stack.centre, place[None], -flux[None]).reshape(
            stack.deviations.shape
        )

    return stack._replace(deviations=jax.lax.cond(flux != 0, added, lambda: stack.deviations))


def as_source(channels: Channels, fit: Fit) -> SourceFit:
    """Convert the fit of every channel, on the host, to a position on the sky and fluxes in units of the PSF."""
    weights = np.asarray(information(jnp.asarray(fit.covariance), jnp.asarray(channels.scales))).sum(0)
    place = channels.on_sky(0, np.array([fit.y[0], fit.x[0]], float))
    known = np.isfinite(weights).all() and np.linalg.det(weights) > 0
    covariance = np.linalg.inv(weights) if known else np.full((2, 2), np.nan)
    units = np.array([observation.unit for observation in channels.each])
    flux_std = units * np.sqrt(fit.covariance[:, 2, 2].astype(float))
    each = tuple(jax.tree.map(lambda values, k=k: values[k], fit) for k in range(len(units)))
    return SourceFit(place, covariance, units * fit.flux.astype(float), flux_std, each)


def prepare_channels(channels: Channels, settings: Settings, near: bool = False) -> Prepared:
    """Prepare every channel for computations along tracks (see `stack.prepare`).

    Args:
        channels: The observation.
        settings: Settings of the noise model.
        near: Whether all positions are near the star (see `is_near`), or anywhere in the field.

    Returns:
        Arrays and static settings of each channel.
    """
    reach_y, reach_x = (max(c, n - 1 - c) for c, n in zip(channels.centre, channels.shape, strict=True))
    corner = float(np.hypot(reach_y, reach_x))
    stacks, patches = zip(*(prepare(observation, settings) for observation in channels.each), strict=True)
    n_distinct = NEAR_DISTINCT if near else most_distinct(channels, corner)
    return stacks, tuple(patch._replace(n_distinct=n_distinct) for patch in patches)


def is_near(channels: Channels, separation_px: float) -> bool:
    """Whether a track at a separation on the sky (px) passes so few patches that the program for these serves it."""
    return most_distinct(channels, separation_px + REACH_PX) <= NEAR_DISTINCT


def most_distinct(channels: Channels, separation_px: float) -> int:
    """Bound the number of different patches along a track at a separation on the sky (px), in any channel."""
    pairs = zip(channels.each, channels.scales, strict=True)
    return max(distinct_pixels(one.angles_deg, separation_px * float(scale)) for one, scale in pairs)
