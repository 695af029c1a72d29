"""Geometry of a rotating image stack: positions in each frame of a source in the derotated map.

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
    """Rotate positions of the derotated map into a frame; arguments are broadcast against each other.

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
    """Distance from a midpoint between pixels within which a position is treated as a tie, px.

    A position that mathematically lies midway between two pixels is computed with an error that depends on precision,
    compiler and device. The tolerance exceeds this error, so that all of them select the same pixel. It is
    `TIE_ROUNDINGS` roundings of the largest coordinate, 1e-4 px for 100 px in float32. The bound: an angle of up to
    180 degrees in `frame_position` has a relative error of 3 roundings, and sine, cosine, products and sums add 3.

    Args:
        dtype: Floating-point type of the position.
        extent_px: Largest coordinate of the frame, px. The error scales with it, not with the position itself.

    Returns:
        The tolerance, at least `TIE_PX`.
    """
    return max(TIE_PX, TIE_ROUNDINGS * float(jnp.finfo(dtype).eps) * extent_px)


def nearest(position: Float[Array, "*shape"], extent_px: float) -> tuple[Int[Array, "*shape"], Float[Array, "*shape"]]:
    """Round coordinates to pixels; ties are rounded up, in every precision (see `tie_tolerance_px`).

    Args:
        position: Coordinates along one axis, px.
        extent_px: Largest coordinate of the frame, px.

    Returns:
        The nearest pixels, and the offset of each position from its pixel, in [-0.5, 0.5) up to the tolerance.
    """
    pixel = jnp.floor(position + 0.5 + tie_tolerance_px(position.dtype, extent_px))
    return pixel.astype(jnp.int32), position - pixel


def rotation_deg(angles_deg: Float[np.ndarray, "T"]) -> float:
    """Length of the shortest arc that contains all angles, which may wrap at 360 degrees.

    Args:
        angles_deg: Angles of T frames, degrees.

    Returns:
        Length of the arc, degrees.

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
    """Divide the field into rings with equal numbers of pixels; a rotation maps every ring onto itself.

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
