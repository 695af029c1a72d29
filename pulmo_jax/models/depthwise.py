"""Depthwise convolution that is fast on a CPU: a sum of shifted products, with a gradient of its own.

On a CPU, XLA's depthwise convolution takes many times longer than these sums, and its gradient still longer
(experiments/benchmarks/depthwise.py). On other devices XLA's convolution is used.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
    padded, size = _padded(stride, x, len(kernel)), len(kernel)
    height, width = ((length - size) // stride * stride + 1 for length in padded.shape[1:3])
    windows = (padded[:, i : i + height : stride, j : j + width : stride] for i in range(size) for j in range(size))
    elements = kernel.reshape(-1, kernel.shape[-1])
    return sum(w * element for w, element in zip(windows, elements, strict=True))  # type: ignore[return-value]


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


def _padded(stride: int, x: jax.Array, size: int) -> jax.Array:
    padding = [same_padding(length, size, stride) for length in x.shape[1:3]]
    return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _windows(rows: jax.Array, size: int, stride: int) -> Iterator[jax.Array]:
    """One row of the images shifted to each element of the kernel, from the rows (B, size, W, F) that it depends on."""
    width = (rows.shape[2] - size) // stride * stride + 1
    for i in range(size):
        for j in range(size):
            yield rows[:, i, j : j + width : stride]


def _sum_of_products(padded: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same sum, row by row, for use with a gradient.

    The loop makes XLA store operands and result, which it would otherwise compute anew for each use in the gradient.
    """
    size, elements = len(kernel), kernel.reshape(-1, kernel.shape[-1])
    height, width = ((length - size) // stride + 1 for length in padded.shape[1:3])

    def put(row: jax.Array, result: jax.Array) -> jax.Array:
        seen = jax.lax.dynamic_slice_in_dim(padded, row * stride, size, 1)
        products = (w * element for w, element in zip(_windows(seen, size, stride), elements, strict=True))
        return jax.lax.dynamic_update_index_in_dim(result, sum(products), row, 1)  # type: ignore[arg-type]

    empty = jnp.zeros((len(padded), height, width, padded.shape[-1]), padded.dtype)
    return jax.lax.fori_loop(0, height, put, empty)


def _forward(stride: int, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _sum_of_products(_padded(stride, x, len(kernel)), kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    size = len(kernel)
    padding = [same_padding(length, size, stride) for length in x.shape[1:3]]
    by_kernel = _sum_over_rows(_padded(stride, x, size), g, size, stride)
    spread = _spread(g, stride)
    around = [
        (size - 1 - before, length + before - inside)
        for (before, _), length, inside in zip(padding, x.shape[1:3], spread.shape[1:3], strict=True)
    ]
    by_x = _sum_of_products(jnp.pad(spread, ((0, 0), *around, (0, 0))), kernel[::-1, ::-1], 1)
    return by_x, by_kernel


def _spread(g: jax.Array, stride: int) -> jax.Array:
    """Put `stride` - 1 zeros between pixels."""
    return jax.lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0)])


def _sum_over_rows(padded: jax.Array, g: jax.Array, size: int, stride: int) -> jax.Array:
    """Sum over images and pixels of a shifted image times g, for each element of the kernel.

    A loop over rows adds products element by element; a sum over pixels within one program step is slow. The loop also
    makes XLA store its operands, which it would otherwise compute anew for each element of the kernel.
    """
    images, rows, columns, features = g.shape

    def add(row: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        of_row = jax.lax.dynamic_index_in_dim(g, row, 1, keepdims=False)
        seen = jax.lax.dynamic_slice_in_dim(padded, row * stride, size, 1)
        return [t + window * of_row for t, window in zip(totals, _windows(seen, size, stride), strict=True)]

    start = [jnp.zeros((images, columns, features), jnp.float32)] * size**2
    totals = jax.lax.fori_loop(0, rows, add, start)
    return jnp.stack([total.sum((0, 1)) for total in totals]).reshape(size, size, features).astype(padded.dtype)


shifted_products.defvjp(_forward, _backward)
