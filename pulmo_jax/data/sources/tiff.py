"""TIFF and BigTIFF files, read with tifffile: selection and validation of pages.

A page is an image file directory (IFD); axes that some software describes in text (ImageJ, OME) are ignored.
Directories marked as a reduced copy are skipped, and so are the lower levels of an Aperio slide. Those marked as a
transparency mask declare the missing pixels of the directory before them. The orientation tag is not applied.
"""

import logging
import re
import struct
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tifffile import TiffFile, TiffPage

from pulmo_jax.data.sources.missing import can_occur, float_dtype, parse_missing_value
from pulmo_jax.data.sources.source import ImageSource, check_page_size, decoding
from pulmo_jax.data.sources.tiff_pixels import (
    Missing,
    as_type,
    encoding_of,
    opacity_band,
    pixel_layout,
    pixel_reader,
    sample_reader,
    segment_grid,
)
from pulmo_jax.types import ImageTags, InputError

_GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
_GDAL_NODATA = 42113
# tifffile warns about values that it cannot convert; `missing.parse_missing_value` handles all of them.
logging.getLogger("tifffile").addFilter(lambda record: "GDAL_NODATA" not in record.getMessage())
# Tags that determine the pixels and their georeference.
_LAYOUT_TAGS = (254, *range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 317, 320)
_USED_TAGS = {*_LAYOUT_TAGS, *range(322, 326), 338, 339, 347, 530, _GDAL_NODATA, *_GEO_TAGS}
_MAX_PAGES = 100_000  # tifffile takes 0.1 ms and 3.5 kB each
_MAX_SHARED_TAG_BYTES = 16 * 2**20
_TYPE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # others take 1 byte
_METAMORPH_PLANES = 33629


def open_tiff(path: Path, max_bytes: int, as_stored: bool = False) -> ImageSource:
    """Open a TIFF file.

    Args:
        path: The file.
        max_bytes: Limit on the decoded size of a page in bytes.
        as_stored: Whether to read the stored samples, such as the indices of a palette, instead of pixels.

    Raises:
        InputError: The file cannot be read, is not supported or exceeds the limit.
    """
    with ExitStack() as stack, decoding(path):
        # For these flavours of TIFF tifffile would guess additional pages; only directories count here.
        file = stack.enter_context(path.open("rb", buffering=0))
        tif = TiffFile(file, name=path.name, is_lsm=False, is_ndpi=False, is_scanimage=False)
        pages, masks = _image_pages(path, tif)
        height, width, channels, stored = _common_layout(path, pages)
        shape = (len(pages), height, width, channels)
        check_page_size(path, shape, stored, max_bytes)
        values = [_missing_value(path, page) for page in pages]
        read_pages = [*pages, *masks.values()]
        for page in read_pages:
            _check_segments(path, page, tif.filehandle.size, max_bytes)
        for page, value in zip(pages, values, strict=True):
            page.nodata = _fill(page, value)  # tifffile does not understand every number
        samples = sample_reader(file, tif, read_pages, stack)
        if as_stored:
            kind, shape = _sample_type(pages[0]), (*shape[:3], pages[0].samplesperpixel)
            reader, encoding = as_type(samples, kind), encoding_of(pages[0], values[0])
            return ImageSource(path, shape, kind, _tags(pages[0]), reader, stack.pop_all(), None, encoding)
        numbers = {page: len(pages) + k for k, page in enumerate(masks)}
        missing = [
            Missing(value, opacity_band(page, partial(samples, i)), numbers.get(i))
            for i, (page, value) in enumerate(zip(pages, values, strict=True))
        ]
        opacity = next((page.alpha for page in missing if page.alpha is not None), None)
        missing = [replace(page, alpha=opacity) for page in missing]
        dtype = float_dtype(stored) if any(missing) else stored
        shape = (*shape[:3], channels - (opacity is not None))
        check_page_size(path, shape, dtype, max_bytes)
        reader = pixel_reader(samples, pages, missing, stored, dtype)
        kept = stored if any(missing) else None
        return ImageSource(path, shape, dtype, _tags(pages[0]), reader, stack.pop_all(), kept)


def _image_pages(path: Path, tif: TiffFile) -> tuple[list[TiffPage], dict[int, TiffPage]]:
    """The directories of the image at full resolution, and the transparency masks by the number of their directory."""
    directories = _directories(path, tif)
    if hidden := _hidden_images(directories):
        raise InputError(f"{path}: holds {hidden}; save it with one directory per image (as BigTIFF above 4 GB)")
    if tif.is_svs:
        return [page.aspage() for page in tif.series[0] if page is not None], {}
    pages, masks = [], {}
    for page in directories:
        if page.is_reduced:
            continue
        if page.is_mask:
            masks[len(pages) - 1] = page
        else:
            pages.append(page)
    if not pages:
        raise InputError(f"{path}: all its pages are marked as reduced copies or masks; save it without these marks")
    for number, mask in masks.items():
        image = pages[max(number, 0)]
        if mask.shaped[:1] != (1,) or (mask.imagelength, mask.imagewidth) != (image.imagelength, image.imagewidth):
            raise InputError(
                f"{path}: its transparency mask has {mask.imagelength} x {mask.imagewidth} px, the image "
                f"{image.imagelength} x {image.imagewidth}; save it with a mask of the same size, or without one"
            )
        pixel_layout(path, mask)
    return pages, {max(number, 0): mask for number, mask in masks.items()}


def _missing_value(path: Path, page: TiffPage) -> float | None:
    """The value that the GDAL_NODATA tag of a page declares."""
    tag = page.tags.get(_GDAL_NODATA)
    return None if tag is None else parse_missing_value(path, str(tag.value))


def _fill(page: TiffPage, value: float | None) -> int | float:
    """Value of strips and tiles that were never written."""
    if value is None or not can_occur(value, dtype := np.dtype(page.dtype)):
        return 0
    return value if dtype.kind == "f" else int(value)


def _sample_type(page: TiffPage) -> np.dtype:
    return np.dtype(np.uint8) if np.dtype(page.dtype).kind == "b" else np.dtype(page.dtype)


def _directories(path: Path, tif: TiffFile) -> list[TiffPage]:
    """The whole chain of directories. tifffile silently truncates a broken chain."""
    chain = _raw_directories(path, tif)
    directories = [page.aspage() for page in tif.pages]
    for page in directories:
        if lost := sorted(_USED_TAGS.intersection(chain.get(page.offset, ())).difference(page.tags.keys())):
            raise InputError(f"{path}: damaged: tag {lost[0]} of page {page.index} cannot be read")
    if len(directories) != len(chain):
        raise InputError(f"{path}: damaged or cut off: only {len(directories)} of its image directories can be read")
    return directories


def _raw_directories(path: Path, tif: TiffFile) -> dict[int, list[int]]:
    """Tag codes of each directory, by offset.

    They are read before tifffile parses them. It silently skips tags that it cannot read, and keeps all values of all
    tags, which can be many more than the file has: directories can share them.
    """
    directories: dict[int, list[int]] = {}
    file, size, values = tif.filehandle, tif.filehandle.size, 0
    file.seek(8 if tif.is_bigtiff else 4)
    (following,) = struct.unpack(tif.tiff.offsetformat, file.read(tif.tiff.offsetsize))
    while following:
        if following in directories:
            raise InputError(f"{path}: damaged: its chain of image directories is circular")
        if following >= size:
            reason = f"there is no image directory after the first {len(directories)}"
            raise InputError(f"{path}: damaged or cut off: {reason if directories else 'it has no image directory'}")
        offset, (following, codes, own) = following, _raw_directory(tif, following)
        directories[offset] = codes
        values += own
        if len(directories) > _MAX_PAGES:
            raise InputError(f"{path}: has more than {_MAX_PAGES} pages; save them as several files")
        if values > size + _MAX_SHARED_TAG_BYTES:
            raise InputError(f"{path}: damaged: its tags have more values than the file can hold")
    if not directories:
        raise InputError(f"{path}: damaged or cut off: it has no image directory")
    return directories


def _raw_directory(tif: TiffFile, offset: int) -> tuple[int, list[int], int]:
    """Offset of the next directory, 0 after the last; tag codes of this one, and the size of their values in bytes."""
    file, sizes = tif.filehandle, tif.tiff
    file.seek(offset)
    (tags,) = struct.unpack(sizes.tagnoformat, file.read(sizes.tagnosize))
    content = file.read(tags * sizes.tagsize)
    (following,) = struct.unpack(sizes.offsetformat, file.read(sizes.offsetsize))
    count = sizes.offsetformat[-1]  # as wide as an offset
    entries = list(struct.iter_unpack(f"{sizes.byteorder}HH{count}{sizes.offsetsize}x", content))
    lengths = [_TYPE_BYTES.get(kind, 1) * number for _, kind, number in entries]
    return following, [code for code, _, _ in entries], sum(n for n in lengths if n > sizes.offsetsize)


def _hidden_images(directories: list[TiffPage]) -> str | None:
    """Describe multiple images in one directory, as some software writes; only the first would be read."""
    first, count = directories[0], len(directories)
    declared = re.search(r"^images=(\d+)", first.description, re.MULTILINE)
    if first.description.startswith("ImageJ=") and declared and int(declared[1]) > count:
        return f"{declared[1]} ImageJ images in {count} directories"
    if first.description.startswith("{") and '"truncated": true' in first.description:
        return "several images in one directory"
    if (planes := first.tags.get(_METAMORPH_PLANES)) is not None and planes.count > count:
        return f"{planes.count} MetaMorph planes in {count} directories"
    return None


def _common_layout(path: Path, pages: list[TiffPage]) -> tuple[int, int, int, np.dtype]:
    """(H, W, C, dtype) of every page."""
    layouts = [pixel_layout(path, page) for page in pages]
    for page, layout in zip(pages, layouts, strict=True):
        if layout != layouts[0]:
            raise InputError(
                f"{path}: page {page.index} is {_describe(*layout)}, "
                f"page {pages[0].index} is {_describe(*layouts[0])}.\n"
                "All pages of a file must have the same shape and bit depth; save them as separate files."
            )
    return layouts[0]


def _describe(height: int, width: int, channels: int, dtype: np.dtype) -> str:
    return f"{height} x {width} px of {channels} x {dtype}"


def _check_segments(path: Path, page: TiffPage, file_size: int, max_bytes: int) -> None:
    """Refuse strips and tiles that are missing, extend beyond the file or would not fit into memory."""
    height, width, rows, columns = segment_grid(page)
    decoded = (1, height, width, page.tiledepth * page.shaped[4])
    check_page_size(path, decoded, np.dtype(page.dtype), max_bytes, "a strip or tile")
    needed = page.shaped[0] * rows * columns
    offsets, sizes = (np.array(x[:needed], np.int64) for x in (page.dataoffsets, page.databytecounts))
    segments = f"strips or tiles of page {page.index}"
    if len(offsets) < needed or len(sizes) < needed or (page.is_final and sizes.sum() < page.nbytes):
        raise InputError(
            f"{path}: damaged: {len(offsets)} of {needed} {segments} listed, with {sizes.sum()} bytes; save it again"
        )
    if page.is_final:  # a single block, whose size some software overstates
        offsets, sizes = offsets[:1], np.array([page.nbytes])
    beyond = (offsets < 0) | (sizes < 0) | (offsets > file_size - sizes)
    if beyond.any():
        raise InputError(
            f"{path}: cut off: {beyond.sum()} of {needed} {segments} are beyond the end of the file; copy it again"
        )
    missing = (offsets == 0) | (sizes == 0)
    value = _missing_value(path, page)
    if missing.any() and (value is None or not can_occur(value, np.dtype(page.dtype))):
        raise InputError(
            f"{path}: {missing.sum()} of {needed} {segments} were never written, "
            "and there is no GDAL_NODATA tag with a fill value; save it complete"
        )


def _tags(page: TiffPage) -> ImageTags:
    geo = [page.tags.get(code) for code in _GEO_TAGS]
    geo = tuple((tag.code, int(tag.dtype), tag.count, tag.value) for tag in geo if tag is not None)
    return ImageTags(_resolution(page), geo)


def _resolution(page: TiffPage) -> tuple[float, float, int] | None:
    """XResolution, YResolution and ResolutionUnit, if they are valid."""
    fractions = [page.tags.valueof(code, default=(0, 1)) for code in (282, 283)]
    x, y = (float(n / d) if d else 0.0 for n, d in fractions)
    unit = int(page.tags.valueof(296, default=2))
    return (x, y, unit) if x > 0 and y > 0 and unit in (1, 2, 3) else None
