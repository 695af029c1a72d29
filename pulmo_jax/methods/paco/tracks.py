"""Noise and signal along the track of a source: patches that the source passes, and their likelihood terms.

The noise is learnt from the stack plus a multiple of the source. The same functions therefore inject a source (to
measure throughput), remove one (F18, Algorithm 3) and fit its position (`source_fit`).
"""

from collections.abc import Sequence
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
    "Noise", "Patch", "Stack", "Trail", "inject", "inject_channels", "learn", "own_patches", "positions", "prepare",
    "template", "terms", "trail_of",
]  # fmt: skip


class Trail(NamedTuple):
    """Patches along a track.

    Attributes:
        pixel: Pixel (row, column) nearest to the track in each frame; an arbitrary valid one if no patch fits there.
        usable: Whether a patch can be centred on the track in that frame.
    """

    pixel: Int[Array, "T 2"]
    usable: Bool[Array, "T"]


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
    return Trail(jnp.where(usable[:, None], pixel, instead), usable)


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
    offsets = np.array(patch.offsets)
    flat = patches.flat_offsets(offsets, patch.shape[1])
    shrinkage = covariance.shrinkage_factor(patch.shrinkage, patch.rho)
    pixel, shift = geometry.nearest(positions(stack, place), patch.extent_px)
    stamps, corner = psf.shift(stack.stamp, shift), pixel - len(stack.stamp) // 2

    def learn_patch(frame_and_centre: tuple[Array, Array]) -> Noise:
        frame, centre = frame_and_centre
        y, x = (centre + offsets).T
        location = centre[0] * patch.shape[1] + centre[1]
        usable = stack.usable[location + flat]
        source = psf.render(stamps, corner, y[:, None], x[:, None]).T  # (T, P)
        samples = patches.extract(stack.deviations, location, flat) + flux * jnp.where(usable, source, 0)
        if patch.weights_error is not None:
            fit = robust.scale_mixture(samples, stack.n[location], shrinkage, patch.weights_error)
            return Noise(fit.statistics.mean, fit.statistics.factor.lower / jnp.sqrt(fit.weights[frame]))
        mean = samples.mean(0)
        s = covariance.sample_covariance(samples - mean)
        rho = shrinkage(s, samples - mean, stack.n[location])
        return Noise(mean, covariance.factorise(covariance.shrink(s, rho), jnp.diag(s) > 0).lower)

    n_frames = len(trail.pixel)
    return map_in_batches(
        learn_patch, (jnp.arange(n_frames), trail.pixel), min(n_frames, patches_at_once(stack.deviations, patch))
    )


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
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute likelihood terms a and b of a source at `place` (F18 eq. 14), with a source there added to the data.

    Equal fluxes simulate an injection; (-flux, 0) is one iteration of Algorithm 3.

    Args:
        stack: Arrays of the observation.
        place: Position (y, x) in the derotated map, px.
        learnt_flux: Flux added to the frames from which the noise is learnt, in units of the deviations.
        seen_flux: Flux added to the frames in which the source is detected, in the same units.
        patch: Static settings.

    Returns:
        a and b, summed over the frames; 0 if no frame has a patch.
    """
    trail = trail_of(stack, place, patch)
    noise = learn(stack, trail, place, learnt_flux, patch)
    data, usable = own_patches(stack, trail, patch)
    h = jnp.where(usable, template(stack, trail, place, patch), 0)
    a, b = jax.vmap(likelihood.terms)(h, data + seen_flux * h - noise.mean, noise.lower)
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
        return inject_all(stack, patch, places, fluxes)


@partial(jax.jit, static_argnames=("patches_",))
def inject_channels(
    stacks: Sequence[Stack],
    patches_: tuple[Patch, ...],
    places: Float[Array, "L N 2"],
    fluxes: Float[Array, "L N"],
) -> tuple[Float[Array, "L N"], Float[Array, "L N"]]:
    """Run `inject` in every channel, in one program.

    Args:
        stacks: Arrays of each of the L channels.
        patches_: Static settings of each channel.
        places: Positions (y, x) in each channel's derotated map, px.
        fluxes: Fluxes, in units of each channel's deviations.

    Returns:
        a and b of each source in each channel.
    """
    with jax.default_matmul_precision("highest"):
        found = map_channels(inject_all, stacks, patches_, places, fluxes)
    a, b = zip(*found, strict=True)
    return jnp.stack(a), jnp.stack(b)


def inject_all(
    stack: Stack, patch: Patch, places: Float[Array, "N 2"], fluxes: Float[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Uncompiled body of `inject`, for use in larger programs."""

    def inject_one(patch: Patch, place: Array, flux: Array) -> tuple[Array, Array]:
        return terms(stack, place, flux, flux, patch)

    return map_sources(inject_one, stack.deviations, patch, places, fluxes)
