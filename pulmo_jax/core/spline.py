"""Cubic B-spline interpolation of images (Unser 1999, IEEE Signal Processing Magazine 16(6), 22)."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

POLE = 3**0.5 - 2
HORIZON = {4: 14, 8: 30}  # terms of a sum of POLE^k until they are below rounding, by bytes of the floating-point type

Fraction = TypeVar("Fraction", Array, np.ndarray)


def coefficients(images: Float[Array, "*batch H W"]) -> Float[Array, "*batch H W"]:
    """Coefficients of the splines that pass through every pixel; images are mirrored at their edges.

    Equals `scipy.ndimage.spline_filter` of order 3 with mode="mirror".

    Args:
        images: Images with sides of at least 2 px.

    Returns:
        The coefficients.
    """
    return filter_axis(filter_axis(images, -2), -1)


def filter_axis(images: Float[Array, "*batch H W"], axis: int) -> Float[Array, "*batch H W"]:
    """Recursive spline prefilter along one axis (Unser 1999, box 2): a causal pass followed by an anticausal pass.

    Args:
        images: Images with sides of at least 2 px, mirrored at their edges.
        axis: Axis to filter.

    Returns:
        Filtered images.
    """
    lines = jnp.moveaxis(images, axis, 0)
    n = len(lines)
    reach = jnp.arange(HORIZON[images.dtype.itemsize])
    period = reach % (2 * n - 2)
    mirrored = jnp.where(period < n, period, 2 * n - 2 - period)
    start = jnp.tensordot(jnp.asarray(POLE, images.dtype) ** reach, lines[mirrored], 1)

    def forward(before: Array, line: Array) -> tuple[Array, Array]:
        return (now := line + POLE * before), now

    def backward(after: Array, line: Array) -> tuple[Array, Array]:
        return (now := POLE * (after - line)), now

    _, rising = jax.lax.scan(forward, start, lines[1:])
    rising = jnp.concatenate([start[None], rising])
    end = POLE / (POLE**2 - 1) * (rising[-1] + POLE * rising[-2])
    _, falling = jax.lax.scan(backward, end, rising[:-1], reverse=True)
    return jnp.moveaxis(6 * jnp.concatenate([falling, end[None]]), 0, axis)


def weights(fraction: Fraction) -> list[Fraction]:
    """Weights of the four coefficients around a position.

    Args:
        fraction: Position between coefficients 0 and 1, in [0, 1).

    Returns:
        Weights of coefficients -1, 0, 1 and 2. A list and not an array: XLA then keeps them in registers, which makes a
        sum over the four 4 times faster.
    """
    u, v = fraction, 1 - fraction
    return [v**3 / 6, (4 - 6 * u**2 + 3 * u**3) / 6, (4 - 6 * v**2 + 3 * v**3) / 6, u**3 / 6]
