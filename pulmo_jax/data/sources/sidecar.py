"""Missing pixels that GDAL declares in files beside an image: IMAGE.msk, a transparency mask, and IMAGE.aux.xml."""

import os
import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pulmo_jax.data.sources.missing import float_dtype, missing_pixels, parse_missing_value, with_nan
from pulmo_jax.data.sources.source import ImageSource, check_page_size
from pulmo_jax.data.sources.tiff import open_tiff
from pulmo_jax.types import InputError, Window

_MAX_XML_BYTES = 2**20
_NODATA = re.compile(rb"<NoDataValue[^>]*>([^<]{0,80})</NoDataValue>")


def with_sidecars(source: ImageSource, max_bytes: int) -> ImageSource:
    """Apply what GDAL has written beside an image, if anything.

    Args:
        source: The open image; it is closed with the result.
        max_bytes: Limit on the decoded size of a page in bytes.

    Returns:
        The source, in which the declared pixels are NaN.

    Raises:
        InputError: The mask cannot be read or has another size, or the value is not a number.
    """
    path = source.path
    mask_path, xml = (path.with_name(path.name + suffix) for suffix in (".msk", ".aux.xml"))
    value = _declared_value(xml) if os.path.isfile(xml) else None
    if value is None and not os.path.isfile(mask_path):
        return source
    with ExitStack() as stack:
        stack.callback(source.close)
        mask = (
            stack.enter_context(open_tiff(mask_path, max_bytes, as_stored=True)) if os.path.isfile(mask_path) else None
        )
        if mask is not None and mask.shape[1:3] != source.shape[1:3]:
            raise InputError(
                f"{mask_path}: is the transparency mask of {path.name}, but has {mask.shape[1]} x {mask.shape[2]} px "
                f"instead of {source.shape[1]} x {source.shape[2]}; make it again or move it away"
            )
        dtype = float_dtype(source.dtype)
        check_page_size(path, source.shape, dtype, max_bytes)

        def read_window(page: int, window: Window) -> np.ndarray:
            pixels = source.read_window(page, window)
            missing = np.zeros(pixels.shape[:2], bool) if value is None else missing_pixels(pixels, value)
            if mask is not None:
                missing |= ~mask.read_window(min(page, mask.shape[0] - 1), window).any(axis=-1)
            return with_nan(pixels, missing, dtype)

        stored = source.stored_dtype or source.dtype
        return ImageSource(path, source.shape, dtype, source.tags, read_window, stack.pop_all(), stored)


def _declared_value(xml: Path) -> float | None:
    """The no-data value in an .aux.xml file, which is searched but not parsed, so that no entity is expanded."""
    with xml.open("rb") as file:
        found = _NODATA.search(file.read(_MAX_XML_BYTES))
    return None if found is None else parse_missing_value(xml, found[1].decode(errors="replace"))
