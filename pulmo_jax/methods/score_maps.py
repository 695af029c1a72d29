"""Score maps: smoothing inside the foreground, on the device, and one number an image.

Score maps are made of whole images or of strips of them. `Extent` tells which part of an array is the image, so that
both give the same numbers: maps are mirrored at the borders of the image, not at those of the array.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

ImageStatistic = Literal["max", "mean", "top1"]
MIN_WEIGHT = 1e-6


class Extent(NamedTuple):
    """The image in the coordinates of an array: rows from top to below bottom, columns from left to below right.

    A strip has a negative top where the image goes on above it, and a bottom beyond its last row where it does below.
    """

    top: int | Int[Array, ""]
    bottom: int | Int[Array, ""]
    left: int | Int[Array, ""]
    right: int | Int[Array, ""]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Extent":
        """Of an array that is an image."""
        return cls(0, shape[0], 0, shape[1])


@partial(jax.jit, static_argnames="sigma_px")
def smooth_within(
    maps: Float[Array, "H W M"], foreground: Bool[Array, "H W"], sigma_px: float, extent: Extent | None = None
) -> Float[Array, "H W M"]:
    """Gaussian smoothing that neither leaks in from the background nor fades towards it.

    Args:
        maps: values in the background do not matter, NaN or not.
        foreground: pixels that count.
        sigma_px: standard deviation; the kernel ends at `smoothing_radius`.
        extent: where the image lies in the arrays; default: they are an image. It is mirrored at its borders.

    Returns:
        Weighted means of the foreground; 0 where there is none within reach.

    Reference: normalised convolution, Knutsson & Westin 1993, CVPR.
    """
    extent = extent or Extent.whole(foreground.shape)
    values = jnp.where(foreground[..., None], maps, 0)
    if smoothing_radius(sigma_px) == 0:
        return values
    bands = jnp.concatenate([jnp.moveaxis(values, -1, 0), foreground[None].astype(values.dtype)])
    *sums, weight = gaussian(bands, sigma_px, extent)
    return jnp.stack(sums, axis=-1) / jnp.maximum(weight, MIN_WEIGHT)[..., None]


def gaussian(images: Float[Array, "N H W"], sigma_px: float, extent: Extent) -> Float[Array, "N H W"]:
    """Sums over shifted copies, in one order at every pixel: strips get the bits of the whole image."""
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
    """The array with margins along an axis: beyond the image (start, stop) its mirror image, (b a | a b).

    Where the image goes on beyond the array, the margin there has no meaning.
    """
    length, (before, after) = image.shape[axis], margins

    def reflection(places: Array) -> Array:
        along = (places - start) % (2 * (stop - start))
        along = jnp.minimum(along, 2 * (stop - start) - 1 - along) + start
        return jnp.take(image, jnp.clip(along, 0, length - 1), axis=axis)

    if axis == image.ndim - 2:  # rows are quickly picked, columns are not
        return reflection(jnp.arange(-before, length + after))
    longer = jnp.pad(image, [margins if a == axis else (0, 0) for a in range(image.ndim)])
    above, below = reflection(start - before + jnp.arange(before)), reflection(stop + jnp.arange(after))
    longer = lax.dynamic_update_slice_in_dim(longer, above, jnp.maximum(start, 0), axis)
    return lax.dynamic_update_slice_in_dim(longer, below, stop + before, axis)


@partial(jax.jit, static_argnames="reach_px")
def eroded(foreground: Bool[Array, "H W"], reach_px: int, extent: Extent | None = None) -> Bool[Array, "H W"]:
    """Whether all pixels of the image in the square window around each pixel are foreground.

    reach_px: side of the window, which begins `reach_px // 2` before its pixel.
    """
    extent = extent or Extent.whole(foreground.shape)
    for axis, (start, stop) in enumerate((extent[:2], extent[2:])):
        length = foreground.shape[axis]
        margins = reach_px // 2, reach_px - 1 - reach_px // 2
        window, foreground = 1, mirrored(foreground, margins, start, stop, axis)
        while window < reach_px:  # windows of twice the side from two of them
            step = min(window, reach_px - window)
            kept = foreground.shape[axis] - step
            first, second = (lax.slice_in_dim(foreground, i, i + kept, axis=axis) for i in (0, step))
            window, foreground = window + step, first & second
        assert foreground.shape[axis] == length
    return foreground


def smoothing_radius(sigma_px: float) -> int:
    """Where the Gaussian is cut off, px."""
    return int(4 * sigma_px + 0.5)


def image_statistic(scores: Float[np.ndarray, "H W"], kind: ImageStatistic) -> float:
    """The highest finite score, the mean of all, or the mean of the top 1 %; NaN where there is none."""
    if kind == "top1":
        values = scores[np.isfinite(scores)]
        keep = max(1, values.size // 100)
        return float(np.partition(values, -keep)[-keep:].mean(dtype=np.float64)) if values.size else float("nan")
    highest, total, count = -np.inf, 0.0, 0
    for row in scores:  # one by one: a copy of the finite ones of a large image would be as large again
        values = row[np.isfinite(row)]
        highest = max(highest, values.max(initial=-np.inf))
        total, count = total + values.sum(dtype=np.float64), count + values.size
    if count == 0:
        return float("nan")
    return float(highest if kind == "max" else total / count)
