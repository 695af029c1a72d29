"""Depthwise convolution that is fast on a CPU: a sum of shifted products, with a gradient of its own.

On a CPU, XLA's depthwise convolution takes many times longer than these sums, and its gradient still longer
(experiments/benchmarks/depthwise.py). On other devices XLA's convolution is used.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

GROUPS = 8  # parts of a batch that are added element by element before the sum over pixels, which is slow


def depthwise(stride: int, x: Float[Array, "B H W F"], kernel: Float[Array, "k k F"]) -> Float[Array, "B y x F"]:
    """Convolve each feature map with a kernel of its own; zero padding as in TensorFlow's SAME.

    Args:
        stride: Stride, 1 or 2.
        x: B images of F feature maps.
        kernel: One square kernel for each feature.

    Returns:
        Feature maps at every `stride`-th pixel.
    """
    if jax.default_backend() == "cpu":
        return shifted_products(stride, x, kernel)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        "SAME",
        dimension_numbers=layout,
        feature_group_count=x.shape[-1],
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def shifted_products(stride: int, x: Float[Array, "B H W F"], kernel: Float[Array, "k k F"]) -> Float[Array, "B y x F"]:
    """Compute `depthwise` as the sum over kernel elements of shifted images times the element."""
    size = len(kernel)
    padding = [same_padding(length, size, stride) for length in x.shape[1:3]]
    return _sum_of_products(jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel, stride)


def same_padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """Padding before and after an axis of a convolution with one output for every `stride` inputs.

    Args:
        length: Length of the axis.
        size: Length of the kernel.
        stride: Stride.

    Returns:
        Number of zeros before and after.

    Example:
        >>> same_padding(8, 3, 2), same_padding(7, 3, 2)
        ((0, 1), (1, 1))
    """
    total = max((-(-length // stride) - 1) * stride + size - length, 0)
    return total // 2, total - total // 2


def _windows(padded: jax.Array, size: int, stride: int) -> Iterator[jax.Array]:
    """Images shifted to each element of the kernel."""
    height, width = ((length - size) // stride * stride + 1 for length in padded.shape[1:3])
    for i in range(size):
        for j in range(size):
            yield padded[:, i : i + height : stride, j : j + width : stride]


def _sum_of_products(padded: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    elements = kernel.reshape(-1, kernel.shape[-1])
    windows = _windows(padded, len(kernel), stride)
    return sum(window * element for window, element in zip(windows, elements, strict=True))  # type: ignore[return-value]


def _forward(stride: int, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return shifted_products(stride, x, kernel), (x, kernel)


def _backward(stride: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    size = len(kernel)
    before, _ = zip(*(same_padding(length, size, stride) for length in x.shape[1:3]), strict=True)
    padding = [same_padding(length, size, stride) for length in x.shape[1:3]]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    by_column = jnp.stack([_sum_over_rows(window, g) for window in _windows(padded, size, stride)])
    spread = _spread(g, stride)
    around = [
        (size - 1 - first, length - 1 + first - (inside - 1))
        for first, length, inside in zip(before, x.shape[1:3], spread.shape[1:3], strict=True)
    ]
    by_x = _sum_of_products(jnp.pad(spread, ((0, 0), *around, (0, 0))), kernel[::-1, ::-1], 1)
    return by_x, by_column.sum(1).reshape(kernel.shape)


def _spread(g: jax.Array, stride: int) -> jax.Array:
    """Put `stride` - 1 zeros between pixels."""
    return jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0)])


def _sum_over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum products over images and rows, groups of images first. Slices precede the product, so nothing is stored."""
    length = len(a) // GROUPS
    starts = range(0, GROUPS * length, length or 1)
    parts = [a[GROUPS * length :] * b[GROUPS * length :]] if len(a) % GROUPS else []
    if length:
        parts.append(sum(a[i : i + length] * b[i : i + length] for i in starts))  # type: ignore[arg-type]
    return sum(part.sum((0, 1)) for part in parts)  # type: ignore[return-value]


shifted_products.defvjp(_forward, _backward)
