"""Noise and signal along the track of a source: patches that the source passes, and their likelihood terms.

The noise is learnt from the stack plus a multiple of the source. The same functions therefore inject a source (to
measure throughput), remove one (F18, Algorithm 3) and fit its position (`source_fit`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core import covariance, geometry, likelihood, patches, psf, robust
from pulmo_jax.methods.paco.batching import map_channels, map_in_batches, map_sources, patches_at_once
from pulmo_jax.methods.paco.stack import Patch, Stack, prepare

__all__ = [
    "Noise", "Patch", "Stack", "Trail", "distinct_pixels", "inject", "inject_channels", "learn", "own_patches",
    "passing_source", "positions", "prepare", "template", "terms", "trail_of",
]  # fmt: skip


DISTINCT_STEP = 8


class Trail(NamedTuple):
    """Patches along a track.

    Attributes:
        pixel: Pixel (row, column) nearest to the track in each frame; an arbitrary valid one if no patch fits there.
        usable: Whether a patch can be centred on the track in that frame.
        distinct: The D different ones among these pixels, padded by repetition; close to the star the track stays on
            a pixel for many frames, and their patch is learnt once.
        visit: Index of each frame's pixel among the distinct ones.
    """

    pixel: Int[Array, "T 2"]
    usable: Bool[Array, "T"]
    distinct: Int[Array, "D 2"]
    visit: Int[Array, "T"]


class Noise(NamedTuple):
    """Noise in the patch that the track passes in each frame.

    Attributes:
        mean: Temporal mean of the patch.
        lower: Cholesky factor of the covariance C; in robust mode that of s_t^2 C.
    """

    mean: Float[Array, "T P"]
    lower: Float[Array, "T P P"]


def positions(stack: Stack, place: Float[Array, "2"]) -> Float[Array, "T 2"]:
    """Compute the position (y, x) in each frame of a source at `place` in the derotated map, px."""
    return jnp.stack(geometry.frame_position(place[0], place[1], stack.angles_deg, stack.centre), axis=-1)


def trail_of(stack: Stack, place: Float[Array, "2"], patch: Patch) -> Trail:
    """Find the patches along the track of a source at `place` (y, x) in the derotated map, px."""
    pixel, _ = geometry.nearest(positions(stack, place), patch.extent_px)
    inside = ((pixel >= 0) & (pixel < jnp.array(patch.shape))).all(-1)
    pixel = jnp.where(inside[:, None], pixel, 0)
    usable = inside & stack.whole[pixel[:, 0] * patch.shape[1] + pixel[:, 1]]
    # Frames without a patch use an arbitrary valid one, and are masked by `usable`.
    instead = jnp.stack(jnp.divmod(jnp.argmax(stack.whole), patch.shape[1])).astype(jnp.int32)
    pixel = jnp.where(usable[:, None], pixel, instead)
    distinct, index = without_repetition(pixel[:, 0] * patch.shape[1] + pixel[:, 1], patch.n_distinct)
    return Trail(pixel, usable, jnp.stack(jnp.divmod(distinct, patch.shape[1]), -1), index)


def without_repetition(values: Int[Array, "T"], most: int) -> tuple[Int[Array, "D"], Int[Array, "T"]]:
    """Find the different ones among integers, in the order of their first occurrence.

    Args:
        values: T integers.
        most: Upper bound on the number of different ones.

    Returns:
        min(most, T) values, padded with the first one, and the index of each integer among them. Were there more
        different ones, the index of the others would be invalid, which `learn` turns into NaN.
    """
    first = jnp.argmax(values[:, None] == values, axis=1)
    is_first = first == jnp.arange(len(values))
    rank = jnp.cumsum(is_first) - 1
    n = min(most, len(values))
    distinct = jnp.full(n, values[0]).at[jnp.where(is_first, rank, n)].set(values, mode="drop")
    return distinct, rank[first]


def distinct_pixels(angles_deg: Float[np.ndarray, "T"], separation_px: float) -> int:
    """Bound the number of different pixels that are nearest to a track.

    Along a part of the arc on which a coordinate is monotone, the track crosses at most one more boundary between
    pixels than the coordinate changes in px. An arc of up to 180 degrees has at most two such parts per coordinate.

    Args:
        angles_deg: Angle of each frame, degrees.
        separation_px: Distance of the source from the centre of rotation, px.

    Returns:
        The bound, at most T; a multiple of DISTINCT_STEP below it, because each value is compiled once.
    """
    arc = np.deg2rad(geometry.rotation_deg(angles_deg))
    crossed = np.sqrt(2) * separation_px * arc + 4 * np.ceil(arc / np.pi) + 1
    return int(min(len(angles_deg), DISTINCT_STEP * np.ceil(crossed / DISTINCT_STEP)))  # an infinite bound is T


def learn(stack: Stack, trail: Trail, place: Float[Array, "2"], flux: Float[Array, ""], patch: Patch) -> Noise:
    """Learn the noise along a trail from the stack plus `flux` times a source at `place`.

    Args:
        stack: Arrays of the observation.
        trail: Patches whose noise is learnt.
        place: Position (y, x) of the source in the derotated map, px.
        flux: Flux of the source, in units of the deviations.
        patch: Static settings.

    Returns:
        Mean and Cholesky factor for each frame's patch.
    """
    flat = patches.flat_offsets(np.array(patch.offsets), patch.shape[1])
    shrinkage = covariance.shrinkage_factor(patch.shrinkage, patch.rho)
    source_at = passing_source(stack, place, patch)

    def learn_patch(centre: Array) -> tuple[Array, Array, Array]:
        location = centre[0] * patch.shape[1] + centre[1]
        usable = stack.usable[location + flat]
        samples = patches.extract(stack.deviations, location, flat) + flux * jnp.where(usable, source_at(centre), 0)
        if patch.weights_error is not None:
            fit = robust.scale_mixture(samples, stack.n[location], shrinkage, patch.weights_error)
            return fit.statistics.mean, fit.statistics.factor.lower, fit.weights
        mean = samples.mean(0)
        s = covariance.sample_covariance(samples - mean)
        rho = shrinkage(s, samples - mean, stack.n[location])
        lower = covariance.factorise(covariance.shrink(s, rho), jnp.diag(s) > 0).lower
        return mean, lower, jnp.ones((), lower.dtype)

    n_distinct = len(trail.distinct)
    found = map_in_batches(learn_patch, trail.distinct, min(n_distinct, patches_at_once(stack.deviations, patch)))
    mean, lower = (part.at[trail.visit].get(mode="fill", fill_value=jnp.nan) for part in found[:2])
    if patch.weights_error is not None:
        lower /= jnp.sqrt(found[2][trail.visit, jnp.arange(len(trail.visit))])[:, None, None]
    return Noise(mean, lower)


def passing_source(
    stack: Stack, place: Float[Array, "2"], patch: Patch
) -> Callable[[Int[Array, "2"]], Float[Array, "T P"]]:
    """Return a function of a pixel: the source of flux 1 on the patch centred there, in every frame.

    Args:
        stack: Arrays of the observation.
        place: Position (y, x) of the source in the derotated map, px.
        patch: Static settings.

    Returns:
        The function.
    """
    offsets = np.array(patch.offsets)
    pixel, shift = geometry.nearest(positions(stack, place), patch.extent_px)
    stamps, corner = psf.shift(stack.stamp, shift), pixel - len(stack.stamp) // 2

    def source_at(centre: Array) -> Array:
        y, x = (centre + offsets).T
        return psf.render(stamps, corner, y[:, None], x[:, None]).T

    return source_at


def own_patches(stack: Stack, trail: Trail, patch: Patch) -> tuple[Float[Array, "T P"], Bool[Array, "T P"]]:
    """Extract the deviations of each frame on its patch of the trail, and the mask of usable pixels."""
    flat = patches.flat_offsets(np.array(patch.offsets), patch.shape[1])
    index = (trail.pixel[:, 0] * patch.shape[1] + trail.pixel[:, 1])[:, None] + flat
    return jnp.take_along_axis(stack.deviations, index, axis=1), stack.usable[index] & trail.usable[:, None]


def template(stack: Stack, trail: Trail, place: Float[Array, "2"], patch: Patch) -> Float[Array, "T P"]:
    """Sample the PSF of a source at `place` (y, x; px) on each frame's patch; differentiable in the position."""
    offsets = np.array(patch.offsets)
    reach = np.arange(offsets.min(), offsets.max() + 1)
    grid = psf.sample(stack.stamp, reach, positions(stack, place) - trail.pixel)
    return grid[:, offsets[:, 0] - reach[0], offsets[:, 1] - reach[0]]


def terms(
    stack: Stack,
    place: Float[Array, "2"],
    learnt_flux: Float[Array, ""],
    seen_flux: Float[Array, ""],
    patch: Patch,
    at: Float[Array, "2"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute likelihood terms a and b (F18 eq. 14) with a source added to the data.

    Equal fluxes simulate an injection; (-flux, 0) is one iteration of Algorithm 3.

    Args:
        stack: Arrays of the observation.
        place: Position (y, x) of the source in the derotated map, px.
        learnt_flux: Flux added to the frames from which the noise is learnt, in units of the deviations.
        seen_flux: Flux added to the frames in which the source is detected, in the same units.
        patch: Static settings.
        at: Position (y, x) of the terms, px; that of the source by default.

    Returns:
        a and b, summed over the frames; 0 if no frame has a patch.
    """
    at = place if at is None else at
    trail = trail_of(stack, at, patch)
    noise = learn(stack, trail, place, learnt_flux, patch)
    data, usable = own_patches(stack, trail, patch)
    source = jnp.where(usable, template(stack, trail, place, patch), 0)
    h = jnp.where(usable, template(stack, trail, at, patch), 0)
    a, b = jax.vmap(likelihood.terms)(h, data + seen_flux * source - noise.mean, noise.lower)
    return jnp.where(trail.usable, a, 0).sum(), jnp.where(trail.usable, b, 0).sum()


@partial(jax.jit, static_argnames=("patch",))
def inject(
    stack: Stack, places: Float[Array, "N 2"], fluxes: Float[Array, "N"], patch: Patch
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Compute the likelihood terms of N sources, each injected separately, at their own positions.

    Args:
        stack: Arrays of the observation.
        places: Positions (y, x) in the derotated map, px.
        fluxes: Fluxes, in units of the deviations.
        patch: Static settings.

    Returns:
        a and b of each source; 0 if no frame has a patch.
    """
    with jax.default_matmul_precision("highest"):
        return inject_all(stack, patch, places, fluxes, places)


@partial(jax.jit, static_argnames=("patches_",))
def inject_channels(
    stacks: Sequence[Stack],
    patches_: tuple[Patch, ...],
    places: Float[Array, "L N 2"],
    fluxes: Float[Array, "L N"],
    at: Float[Array, "L N 2"],
) -> tuple[Float[Array, "L N"], Float[Array, "L N"]]:
    """Compute the likelihood terms near N sources, each injected separately, in every channel, in one program.

    Args:
        stacks: Arrays of each of the L channels.
        patches_: Static settings of each channel.
        places: Positions (y, x) of the sources in each channel's derotated map, px.
        fluxes: Fluxes, in units of each channel's deviations.
        at: Position (y, x) of the terms of each source, within the PSF's stamp, px.

    Returns:
        a and b of each source in each channel.
    """
    with jax.default_matmul_precision("highest"):
        found = map_channels(inject_all, stacks, patches_, places, fluxes, at)
    a, b = zip(*found, strict=True)
    return jnp.stack(a), jnp.stack(b)


def inject_all(
    stack: Stack, patch: Patch, places: Float[Array, "N 2"], fluxes: Float[Array, "N"], at: Float[Array, "N 2"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Uncompiled body of `inject`, for use in larger programs."""

    def inject_one(patch: Patch, place: Array, flux: Array, at: Array) -> tuple[Array, Array]:
        return terms(stack, place, flux, flux, patch, at)

    return map_sources(inject_one, stack.deviations, patch, places, fluxes, at)
