"""Rendering of sources in the frames of a stack."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core import geometry, psf
from pulmo_jax.methods.paco.batching import map_in_batches

FRAMES_AT_ONCE = 16


@jax.jit
def subtract(
    deviations: Float[Array, "T H W"],
    usable: Bool[Array, "H W"],
    stamp: Float[Array, "S S"],
    angles_deg: Float[Array, "T"],
    centre: Float[Array, "2"],
    places: Float[Array, "N 2"],
    fluxes: Float[Array, "N"],
    count: int | Int[Array, ""] | None = None,
) -> Float[Array, "T H W"]:
    """Subtract sources from the frames, then the temporal mean from the remainder.

    Args:
        deviations: Frames minus their temporal mean.
        usable: Usable pixels; the others stay 0.
        stamp: PSF stamp.
        angles_deg: Angle of each frame, degrees.
        centre: Centre of rotation (y, x), px.
        places: Positions (y, x) in the derotated map, px.
        fluxes: Fluxes, in units of the deviations. Sources with non-finite values are ignored.
        count: Number of leading sources that are subtracted; all by default.

    Returns:
        The frames without the sources.
    """
    sound = jnp.isfinite(places).all(-1) & jnp.isfinite(fluxes)
    places, fluxes = jnp.where(sound[:, None], places, 0), jnp.where(sound, fluxes, 0)
    number = len(fluxes) if count is None else count
    shape = usable.shape[0], usable.shape[1]

    def subtract_from(frame_and_angle: tuple[Array, Array]) -> Array:
        frame, angle = frame_and_angle
        position = jnp.stack(geometry.frame_position(places[:, 0], places[:, 1], angle, centre), -1)

        def add(i: Array, total: Array) -> Array:
            return total + fluxes[i] * draw(stamp, position[i], shape)

        sources = jnp.asarray(jax.lax.fori_loop(0, number, add, jnp.zeros_like(frame)))
        return frame - jnp.where(usable, sources, 0)

    with jax.default_matmul_precision("highest"):
        frames = map_in_batches(subtract_from, (deviations, angles_deg), min(FRAMES_AT_ONCE, len(deviations)))
    left = jnp.asarray(frames)
    return jnp.where(usable, left - left.mean(0), 0)


def draw(stamp: Float[Array, "S S"], position: Float[Array, "2"], shape: tuple[int, int]) -> Float[Array, "H W"]:
    """Render a source of flux 1 in an empty frame, clipped at its edges.

    Args:
        stamp: PSF stamp.
        position: Position (y, x) of the source, px.
        shape: Height and width of the frame, px.

    Returns:
        The frame.
    """
    side = len(stamp)
    pixel, shift = geometry.nearest(position, max(shape))
    corner = pixel - side // 2 + side  # in a frame padded by one stamp side on all edges
    inside = (corner >= 0) & (corner <= jnp.array(shape) + side)
    corner = jnp.where(inside, corner, 0)
    wide = jnp.zeros((shape[0] + 2 * side, shape[1] + 2 * side), stamp.dtype)
    source = jnp.where(inside.all(), psf.shift(stamp, shift), 0)
    wide = jnp.asarray(jax.lax.dynamic_update_slice(wide, source, (corner[0], corner[1])))
    return wide[side : side + shape[0], side : side + shape[1]]
