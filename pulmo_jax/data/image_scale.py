"""Intensity scale of a single image, for images whose units are not comparable (data.normalize=image)."""

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.transforms import Preprocessing, finite

SAMPLED_PX = 65_536  # pixels of a regular grid, at most about this many, determine the percentiles
BLOCK_ROWS = 256  # read at once


def for_image(how: Preprocessing, rows: Any) -> Preprocessing:
    """Preprocessing of one image.

    Args:
        how: Preprocessing of a run.
        rows: The image, see `image_scale`.

    Returns:
        `how` itself, unless it has percentiles: then with the offset and scale of this image.
    """
    if how.percentiles is None:
        return how
    offset, scale = image_scale(rows, how.percentiles)
    return replace(how, offset=tuple(offset.tolist()), scale=tuple(scale.tolist()))


def image_scale(rows: Any, percentiles: tuple[float, float]) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Compute the offset and scale that map percentiles of an image to 0 and 1.

    Args:
        rows: Pixels (H, W, C), as an array or any object with `shape` whose slices of rows are arrays; it is read in
            blocks of rows.
        percentiles: Lower and upper percentile in percent.

    Returns:
        Offset and scale of each band (C,), in the unit of the image, from a regular grid of at most about SAMPLED_PX
        pixels. Pixels that are not finite do not count. The scale of a band that is constant is 1.
    """
    height, width, bands = rows.shape
    step = int(np.ceil(np.sqrt(height * width / SAMPLED_PX)))
    block = max(1, BLOCK_ROWS // step) * step
    sample = np.concatenate([_known(rows[y : min(y + block, height)][::step, ::step]) for y in range(0, height, block)])
    if not len(sample):  # the grid misses all known pixels
        sample = np.concatenate(
            [_known(rows[y : min(y + block, height)])[:SAMPLED_PX] for y in range(0, height, block)]
        )
    if not len(sample):
        return np.zeros(bands), np.ones(bands)
    low, high = np.percentile(sample, percentiles, axis=0)
    smallest = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    return low, np.where(high - low > smallest, high - low, 1.0)


def _known(pixels: np.ndarray) -> Float[np.ndarray, "_ C"]:
    """Finite pixels as float64."""
    return pixels[finite(pixels)].astype(np.float64)
