"""A single image, given as an array or as a path."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped

from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources.formats import Format
from pulmo_jax.data.transforms import as_pixels
from pulmo_jax.types import InputError

ImageLike = Shaped[np.ndarray, "H W"] | Shaped[np.ndarray, "H W C"] | Path | str
ARRAY = "array"


def one_image(
    image: ImageLike, page: int, max_image_mb: int, masks: Path | None = None, formats: Sequence[Format] = ()
) -> tuple[ImageRef, Shaped[np.ndarray, "H W C"]]:
    """Read a single image.

    Args:
        image: Array (H, W) or (H, W, C) in the unit of the training images, or a path. Masked pixels of a masked array
            are missing.
        page: Index of the page in a file, from 0.
        max_image_mb: Limit on the decoded size of a page in MiB.
        masks: Folder of foreground masks with the names of their images; ignored for an array.
        formats: User-defined image formats, in addition to the built-in ones.

    Returns:
        Reference and pixels (H, W, C) of the image.

    Raises:
        InputError: The file cannot be read or has no such page, or the array has another number of dimensions.
    """
    if isinstance(image, Path | str):
        return from_file(Path(image), page, max_image_mb, masks, formats)
    pixels = as_pixels(image)
    stored = image.dtype.name if np.ma.isMaskedArray(image) else ""
    shape = (pixels.shape[0], pixels.shape[1], pixels.shape[2])
    return ImageRef(Path(), ARRAY, 0, 1, shape, pixels.dtype.name, ARRAY, None, stored), pixels


def one_foreground(
    foreground: ImageLike | None, ref: ImageRef, max_image_mb: int, formats: Sequence[Format] = ()
) -> Bool[np.ndarray, "H W"] | None:
    """Read the foreground of a single image.

    Args:
        foreground: Array (H, W) that is not 0 in the foreground, or path of a mask; None for the mask of `ref`.
        ref: The image.
        max_image_mb: Limit on the decoded size of a page in MiB.
        formats: User-defined image formats, in addition to the built-in ones.

    Returns:
        True for foreground (H, W); None if all of the image is foreground.

    Raises:
        InputError: The mask cannot be read, or its size differs from that of the image.
    """
    if foreground is None or isinstance(foreground, Path | str):
        reader = Reader(max_image_mb, formats)
        try:
            return reader.foreground(ref if foreground is None else replace(ref, mask=Path(foreground)))
        finally:
            reader.close()
    inside = np.asarray(foreground)
    if inside.shape != ref.shape[:2]:
        raise InputError(f"the foreground has shape {inside.shape}, the image {ref.shape[:2]}; they must agree")
    return inside if inside.dtype == bool else inside != 0


def from_file(
    path: Path, page: int, max_image_mb: int, masks: Path | None, formats: Sequence[Format] = ()
) -> tuple[ImageRef, Shaped[np.ndarray, "H W C"]]:
    """Read a page of an image file.

    Args:
        path: Image file.
        page: Index of the page, from 0.
        max_image_mb: Limit on the decoded size of a page in MiB.
        masks: Folder of foreground masks with the names of their images.
        formats: User-defined image formats.

    Returns:
        Reference and pixels (H, W, C) of the page.

    Raises:
        InputError: The file cannot be read or has no such page.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'does not exist'}; give one image")
    refs, skipped = index_images(path, masks=masks, max_image_mb=max_image_mb, formats=formats)
    if skipped:
        raise InputError(skipped[0].reason)
    if not 0 <= page < len(refs):
        raise InputError(f"{path}: there is no page {page}; the file has pages 0 to {len(refs) - 1}")
    reader = Reader(max_image_mb, formats)
    try:
        return refs[page], reader.image(refs[page])
    finally:
        reader.close()
