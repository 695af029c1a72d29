"""Geometry of a rotating image stack: where a source of the derotated map lies in each frame.

A source at angle theta = atan2(y - cy, x - cx) of the derotated map lies at theta - angle in a frame, at the same
distance from the centre. Coordinates are (y, x) in pixels from 0.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

FULL_TURN = 360.0
TIE_PX = 1e-9  # smallest tolerance of a tie, px: what positions in float64 are safely known to
TIE_ROUNDINGS = 8  # bound on the rounding error of `frame_position`, in roundings of the largest coordinate


def frame_position(
    y: Num[Array, "..."],
    x: Num[Array, "..."],
    angle_deg: Float[Array, "..."],
    centre: Float[Array, "2"],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Rotates positions of the derotated map into a frame; arguments are broadcast against each other.

    Args:
        y: Rows in the derotated map, px.
        x: Columns in the derotated map, px.
        angle_deg: Angle of the frame, degrees.
        centre: Centre of rotation (y, x), px.

    Returns:
        Rows and columns in the frame, px.
    """
    angle = jnp.deg2rad(angle_deg)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    dy, dx = y - centre[0], x - centre[1]
    return centre[0] + dy * cos - dx * sin, centre[1] + dx * cos + dy * sin


def tie_tolerance_px(dtype: DTypeLike, extent_px: float) -> float:
    """Distance from a tie within which a position counts as tied, px.

    A position that lies midway between two pixels on paper is computed with an error that depends on the precision, on
    the compiler and on the device. The tolerance exceeds that error, so that all of them take the same pixel: it is
    `TIE_ROUNDINGS` roundings of the largest coordinate, 1e-4 px for 100 px in float32. The bound: an angle of up to
    180 degrees in `frame_position` carries a relative error of 3 roundings, sine, cosine, products and sums another 3.

    Args:
        dtype: Floating-point type of the position.
        extent_px: Largest coordinate of the frame, px. The error scales with it, not with the position itself.

    Returns:
        The tolerance, at least `TIE_PX`.
    """
    return max(TIE_PX, TIE_ROUNDINGS * float(jnp.finfo(dtype).eps) * extent_px)


def nearest(position: Float[Array, "*shape"], extent_px: float) -> tuple[Int[Array, "*shape"], Float[Array, "*shape"]]:
    """Rounds coordinates to pixels; ties go up, in every precision (see `tie_tolerance_px`).

    Args:
        position: Coordinates along one axis, px.
        extent_px: Largest coordinate of the frame, px.

    Returns:
        The nearest pixels, and the offset of each position from its pixel, in [-0.5, 0.5) up to the tolerance.
    """
    pixel = jnp.floor(position + 0.5 + tie_tolerance_px(position.dtype, extent_px))
    return pixel.astype(jnp.int32), position - pixel


def rotation_deg(angles_deg: Float[np.ndarray, "T"]) -> float:
    """Length of the shortest arc that contains all angles, degrees; angles may wrap at a full turn.

    Example:
        >>> rotation_deg(np.array([350.0, 0.0, 30.0]))
        40.0
    """
    angles = np.sort(np.mod(angles_deg, FULL_TURN))
    gaps = np.diff(np.append(angles, angles[0] + FULL_TURN))
    return float(FULL_TURN - gaps.max())


class Ring(NamedTuple):
    """Pixels at similar distances from the centre of rotation, and the patch centres that their tracks pass.

    Attributes:
        pixels: Flat indices of M pixels; the last one is repeated as padding.
        locations: Flat indices of N patch centres; repeated from the first on as padding.
    """

    pixels: Int[np.ndarray, "*rings M"]
    locations: Int[np.ndarray, "*rings N"]


def rings(whole: Bool[np.ndarray, "H W"], centre: tuple[float, float], reach: float, count: int, multiple: int) -> Ring:
    """Divides the field into rings of equally many pixels; a rotation maps every ring onto itself.

    Args:
        whole: Pixels on which a patch can be centred.
        centre: Centre of rotation (y, x), px.
        reach: Largest distance from a position on a track to the patch centre used for it, px.
        count: Number of rings R.
        multiple: The number of locations of a ring is a multiple of this.

    Returns:
        The rings, stacked along a leading axis of length R.
    """
    y, x = np.indices(whole.shape)
    radius = np.hypot(y - centre[0], x - centre[1]).ravel()
    order = np.argsort(radius, kind="stable")
    size = -(-len(order) // count)
    pixels = np.pad(order, (0, size * count - len(order)), mode="edge").reshape(count, size)
    candidates = order[whole.ravel()[order]]
    low = np.searchsorted(radius[candidates], radius[pixels[:, 0]] - reach)
    high = np.searchsorted(radius[candidates], radius[pixels[:, -1]] + reach)
    n = max(multiple, -(-int((high - low).max()) // multiple) * multiple)
    passed = [candidates[start:stop] for start, stop in zip(low, high, strict=True)]
    locations = np.stack([np.resize(np.sort(part) if len(part) else candidates[:1], n) for part in passed])
    return Ring(pixels.astype(np.int32), locations.astype(np.int32))
