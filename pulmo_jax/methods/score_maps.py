"""Score maps: smoothing within the foreground on the device.

Score maps are computed from whole images or from strips of rows. `Extent` locates the image in an array, so that both
give the same values: reflection padding applies at the borders of the image, not at those of the array.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

MIN_WEIGHT = 1e-6


class Extent(NamedTuple):
    """Bounds of an image in the coordinates of an array, half-open, px.

    Attributes:
        top: First row; negative if the image continues above a strip.
        bottom: Row after the last; beyond the array if the image continues below a strip.
        left: First column.
        right: Column after the last.
    """

    top: int | Int[Array, ""]
    bottom: int | Int[Array, ""]
    left: int | Int[Array, ""]
    right: int | Int[Array, ""]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Extent":
        """Return the extent of an image that fills an array of this shape."""
        return cls(0, shape[0], 0, shape[1])


@partial(jax.jit, static_argnames="sigma_px")
def smooth_within(
    maps: Float[Array, "H W M"], foreground: Bool[Array, "H W"], sigma_px: float, extent: Extent | None = None
) -> Float[Array, "H W M"]:
    """Smooth maps within the foreground by normalised convolution with a Gaussian.

    Background values do not leak into the foreground, and values do not decay towards its edge.

    Args:
        maps: M maps; background values are ignored and may be NaN.
        foreground: Pixels included in the weighted means.
        sigma_px: Standard deviation, px; the kernel is truncated at `smoothing_radius`.
        extent: Position of the image in the arrays, with reflection at its borders. Default: the arrays hold exactly
            one image.

    Returns:
        Weighted means over the foreground; 0 where no foreground lies within the kernel.

    Reference:
        Knutsson & Westin 1993, CVPR, normalised convolution.
    """
    extent = extent or Extent.whole(foreground.shape)
    values = jnp.where(foreground[..., None], maps, 0)
    if smoothing_radius(sigma_px) == 0:
        return values
    bands = jnp.concatenate([jnp.moveaxis(values, -1, 0), foreground[None].astype(values.dtype)])
    *sums, weight = gaussian(bands, sigma_px, extent)
    return jnp.stack(sums, axis=-1) / jnp.maximum(weight, MIN_WEIGHT)[..., None]


def gaussian(images: Float[Array, "N H W"], sigma_px: float, extent: Extent) -> Float[Array, "N H W"]:
    """Convolve images with a separable Gaussian.

    Shifted copies are summed in the same order at every pixel, so strips match the whole image bit for bit.

    Args:
        images: Images or strips.
        sigma_px: Standard deviation, px; the kernel is truncated at `smoothing_radius`.
        extent: Position of the image in the arrays, with reflection at its borders.

    Returns:
        The smoothed images.
    """
    radius = smoothing_radius(sigma_px)
    kernel = np.exp(-0.5 * (np.arange(radius + 1) / sigma_px) ** 2)
    kernel = (kernel / (2 * kernel.sum() - 1)).astype(images.dtype)
    for axis, borders in ((1, extent[:2]), (2, extent[2:])):
        longer, length = mirrored(images, (radius, radius), *borders, axis), images.shape[axis]

        def at(offset: int, longer: Array = longer, length: int = length, axis: int = axis) -> Array:
            return lax.slice_in_dim(longer, radius + offset, radius + offset + length, axis=axis)

        images = kernel[0] * at(0)
        for i in range(1, radius + 1):
            images += kernel[i] * (at(-i) + at(i))
    return images


def mirrored(
    image: Shaped[Array, "..."], margins: tuple[int, int], start: int | Array, stop: int | Array, axis: int
) -> Shaped[Array, "..."]:
    """Pad an array along one of its last two axes by reflecting the image about its borders, (b a | a b).

    Args:
        image: Array that holds the image, or a strip of it.
        margins: Number of entries to add before and after, px.
        start: First index of the image along the axis.
        stop: Index after the last.
        axis: Axis to pad, non-negative.

    Returns:
        The padded array. A margin has arbitrary values on a side where the image continues beyond the array.
    """
    length, (before, after) = image.shape[axis], margins

    def reflection(places: Array) -> Array:
        along = (places - start) % (2 * (stop - start))
        along = jnp.minimum(along, 2 * (stop - start) - 1 - along) + start
        return jnp.take(image, jnp.clip(along, 0, length - 1), axis=axis)

    if axis == image.ndim - 2:  # gathering rows is fast, gathering columns is slow
        return reflection(jnp.arange(-before, length + after))
    longer = jnp.pad(image, [margins if a == axis else (0, 0) for a in range(image.ndim)])
    above, below = reflection(start - before + jnp.arange(before)), reflection(stop + jnp.arange(after))
    longer = lax.dynamic_update_slice_in_dim(longer, above, jnp.maximum(start, 0), axis)
    return lax.dynamic_update_slice_in_dim(longer, below, stop + before, axis)


@partial(jax.jit, static_argnames="reach_px")
def eroded(foreground: Bool[Array, "H W"], reach_px: int, extent: Extent | None = None) -> Bool[Array, "H W"]:
    """Erode the foreground with a square window, with reflection at the borders of the image.

    Args:
        foreground: Foreground pixels.
        reach_px: Side length of the window, px; it starts `reach_px // 2` before the pixel.
        extent: Position of the image in the array. Default: the array holds exactly one image.

    Returns:
        Whether all pixels in the window of each pixel are foreground.
    """
    extent = extent or Extent.whole(foreground.shape)
    for axis, (start, stop) in enumerate((extent[:2], extent[2:])):
        length = foreground.shape[axis]
        margins = reach_px // 2, reach_px - 1 - reach_px // 2
        window, foreground = 1, mirrored(foreground, margins, start, stop, axis)
        while window < reach_px:  # doubling: two overlapping windows give one of up to twice the side
            step = min(window, reach_px - window)
            kept = foreground.shape[axis] - step
            first, second = (lax.slice_in_dim(foreground, i, i + kept, axis=axis) for i in (0, step))
            window, foreground = window + step, first & second
        assert foreground.shape[axis] == length
    return foreground


@partial(jax.jit, static_argnames="side_px")
def median_filtered(image: Float[Array, "H W"], side_px: int, extent: Extent | None = None) -> Float[Array, "H W"]:
    """Filter an image by the median of a square window, with reflection at the borders of the image.

    Args:
        image: Image without NaN.
        side_px: Side of the window, odd.
        extent: Position of the image in the array. Default: the array holds exactly one image.

    Returns:
        Median of the window around each pixel.
    """
    extent, (height, width), reach = extent or Extent.whole(image.shape), image.shape, side_px // 2
    for axis, (start, stop) in enumerate((extent[:2], extent[2:])):
        image = mirrored(image, (reach, reach), start, stop, axis)
    windows = [image[y : y + height, x : x + width] for y in range(side_px) for x in range(side_px)]
    return jnp.sort(jnp.stack(windows), axis=0)[side_px**2 // 2]


def smoothing_radius(sigma_px: float) -> int:
    """Return the truncation radius of a Gaussian of this standard deviation (4 sigma, rounded), px."""
    return int(4 * sigma_px + 0.5)
