"""Where the sky stands in each frame of a rotating stack.

A source at angle theta = atan2(y - cy, x - cx) of the derotated map stands at theta - angle in a frame, at the same
distance from the centre.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

FULL_TURN = 360.0
TIE_PX = 1e-9


def frame_position(
    y: Num[Array, "..."],
    x: Num[Array, "..."],
    angle_deg: Float[Array, "..."],
    centre: Float[Array, "2"],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(y, x) in a frame of what stands at (y, x) of the derotated map; arguments are broadcast."""
    angle = jnp.deg2rad(angle_deg)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    dy, dx = y - centre[0], x - centre[1]
    return centre[0] + dy * cos - dx * sin, centre[1] + dx * cos + dy * sin


def nearest(position: Float[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Float[Array, "*shape"]]:
    """The nearest pixel of a coordinate and the way from it, in [-0.5, 0.5); halves go up, roundings aside."""
    pixel = jnp.floor(position + 0.5 + TIE_PX)
    return pixel.astype(jnp.int32), position - pixel


def rotation_deg(angles_deg: Float[np.ndarray, "T"]) -> float:
    """The shortest arc that holds all angles, whether or not they wrap at a full turn.

    Example:
        >>> rotation_deg(np.array([350.0, 0.0, 30.0]))
        40.0
    """
    angles = np.sort(np.mod(angles_deg, FULL_TURN))
    gaps = np.diff(np.append(angles, angles[0] + FULL_TURN))
    return float(FULL_TURN - gaps.max())


class Ring(NamedTuple):
    """Pixels at like distances from the centre, and the locations that their tracks pass.

    pixels: (M,) flat indices, the last repeated to fill; locations: (N,), repeated from the first on to fill.
    """

    pixels: Int[np.ndarray, "*rings M"]
    locations: Int[np.ndarray, "*rings N"]


def rings(whole: Bool[np.ndarray, "H W"], centre: tuple[float, float], reach: float, count: int, multiple: int) -> Ring:
    """The field in `count` rings of equally many pixels, stacked; a rotation takes no pixel out of its ring.

    whole: the locations that exist. reach: how far from its exact place a track looks, px. multiple: of which the
    number of locations in each is to be.
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
    locations = np.stack([np.resize(np.sort(candidates[a:b]), n) if b > a else np.full(n, candidates[0])
                          for a, b in zip(low, high, strict=True)])  # fmt: skip
    return Ring(pixels.astype(np.int32), locations.astype(np.int32))
