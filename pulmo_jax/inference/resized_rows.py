"""Bilinear resizing of whole images to one tile and back, strip by strip.

Pillow resizes along rows first, then along columns. So the rows of a strip can be narrowed as soon as they are read,
and the rows of a strip of the result need only a few rows of the tile.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from pulmo_jax.data.file_rows import Rows
from pulmo_jax.data.transforms import Preprocessing, preprocess, resize_bands


def narrowed(pixels: Rows, hows: Sequence[Preprocessing], rows: int) -> list[Float[np.ndarray, "P P C"]]:
    """Normalise an image as each network needs it, and resize it to one tile, as `resize_bands(preprocess(...))` does.

    Args:
        pixels: Image (H, W, C) of which rows can be read.
        hows: Preprocessings of one patch size P.
        rows: Number of rows to read at a time.

    Returns:
        The normalised tile for each preprocessing.
    """
    height, size = len(pixels), hows[0].patch_size
    narrow = [np.empty((height, size, how.channels), np.float32) for how in hows]
    for top in range(0, height, rows):
        block = pixels[top : top + rows]
        for how, whole in zip(hows, narrow, strict=True):
            whole[top : top + rows] = resize_bands(preprocess(block, None, how), len(block), size)
    return [resize_bands(whole, size, size) for whole in narrow]


def resized_rows(
    tile: Float[np.ndarray, "P P M"], top: int, rows: int, shape: tuple[int, int]
) -> Float[np.ndarray, "rows W M"]:
    """Compute some rows of a tile that is resized to an image, as `resize_bands` does for all rows.

    Args:
        tile: Maps of the tile.
        top: First row of the image.
        rows: Number of rows.
        shape: Height and width (H, W) of the image.

    Returns:
        The rows.
    """
    (height, width), (size, _, bands) = shape, tile.shape
    box = (0, top * size / height, tile.shape[1], (top + rows) * size / height)
    resized = [
        Image.fromarray(np.ascontiguousarray(tile[..., m])).resize((width, rows), Image.Resampling.BILINEAR, box)
        for m in range(bands)
    ]
    return np.stack([np.asarray(band) for band in resized], axis=-1)
