"""Least squares for a source that is far brighter than the noise: where it may be, and initial values of `source_fit`.

A bright source dominates the covariance of the patches that it crosses. Algorithm 3 of F18 removes it from there, but
converges slowly from a flux of 0. A fit without any covariance has large errors, which do not depend on the flux.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pulmo_jax.core import geometry
from pulmo_jax.core.shape_model import inverse_2x2
from pulmo_jax.methods.paco.stack import Patch, Stack
from pulmo_jax.methods.paco.tracks import own_patches, passing_source, template, trail_of

STEPS = 8
LARGEST_STEP_PX = 0.5
REACH_PX = 2.5  # largest change of a coordinate
RIDGE = 1e-6


def least_squares(stack: Stack, patch: Patch, start: Float[Array, "2"]) -> tuple[Float[Array, "2"], Float[Array, ""]]:
    """Fit position and flux of a source to the frames minus their mean, with equal weight for every pixel.

    Args:
        stack: Arrays of the observation.
        patch: Static settings.
        start: Initial position (y, x) in the derotated map, px.

    Returns:
        Position (y, x), px, and flux in units of the deviations, by Gauss-Newton iteration.
    """
    trail = trail_of(stack, start, patch)
    data, usable = own_patches(stack, trail, patch)

    def flux_of(h: Array) -> Array:
        return (h * data).sum() / (h * h).sum()

    def model(place: Array) -> Array:
        at = passing_source(stack, place, patch)
        mean = jnp.asarray(jax.lax.map(lambda centre: at(centre).mean(0), trail.distinct))
        return jnp.where(
            usable, template(stack, trail, place, patch) - mean.at[trail.visit].get(mode="fill", fill_value=jnp.nan), 0
        )

    def step(_: Array | int, place: Array) -> Array:
        h, slopes = model(place), jax.jacfwd(model)(place)
        flux = flux_of(h)
        slopes -= h[..., None] * jnp.einsum("tp,tpi->i", h, slopes) / (h * h).sum()  # the flux is fitted too
        normal = jnp.einsum("tpi,tpj->ij", slopes, slopes)
        normal += RIDGE * jnp.trace(normal) * jnp.eye(2, dtype=normal.dtype)
        gradient = jnp.einsum("tpi,tp->i", slopes, data - flux * h) / flux
        moved = jnp.clip(jnp.nan_to_num(inverse_2x2(normal) @ gradient), -LARGEST_STEP_PX, LARGEST_STEP_PX)
        return jnp.clip(place + moved, start - REACH_PX, start + REACH_PX)

    place = jax.lax.fori_loop(0, STEPS, step, start)
    return place, flux_of(model(place))


@partial(jax.jit, static_argnames=("patch",))
def least_squares_map(stack: Stack, patch: Patch) -> Float[Array, "H W"]:
    """Sum the frames, correlated with the PSF, along the tracks of all pixels: a bright source raises it by its flux.

    Args:
        stack: Arrays of the observation.
        patch: Static settings.

    Returns:
        The sum at every pixel of the derotated map, in squared units of the PSF times the deviations.
    """
    height, width = patch.shape
    side = len(stack.stamp)
    padded = height + side, width + side
    response = jnp.conj(jnp.fft.rfft2(stack.stamp, padded))
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")

    def add(total: Array, frame_and_angle: tuple[Array, Array]) -> tuple[Array, None]:
        frame, angle = frame_and_angle
        frame = jnp.pad(frame.reshape(height, width), ((side // 2, 0), (side // 2, 0)))
        correlated = jnp.fft.irfft2(jnp.fft.rfft2(frame, padded) * response, padded)[:height, :width]
        at = geometry.frame_position(y, x, angle, stack.centre)
        return total + jax.scipy.ndimage.map_coordinates(correlated, at, order=1, cval=0.0), None

    start = jnp.zeros((height, width), stack.deviations.dtype)
    return jax.lax.scan(add, start, (stack.deviations, stack.angles_deg))[0]
