"""Pixels of a TIFF page: reading a window decodes only the strips or tiles ("segments") that it overlaps.

The bit depth is kept. Bands and CMYK are kept as channels, an alpha channel is not. Palette images become RGB,
white-is-zero images are inverted, and 1-bit images become 0 and 1. Pixels that the file declares to be missing, by a
no-data value, an alpha channel or a transparency mask, become NaN (see `missing`). So do segments of a sparse file that
were never written.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from io import RawIOBase
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
from tifffile import PHOTOMETRIC, FileHandle, TiffFile, TiffPage

from pulmo_jax.data.sources.embedded import check_embedded_size
from pulmo_jax.data.sources.missing import is_opacity, missing_pixels, with_nan
from pulmo_jax.data.sources.source import Encoding, WindowReader
from pulmo_jax.types import InputError, Window

_CACHE_BYTES = 128 * 2**20  # of decoded segments, which neighbouring windows share
_JPEG = (6, 7, 33007, 34892)
# Segments that are images with a header of their own: JPEG, JPEG 2000, LERC, PNG, WebP.
_EMBEDDED = (*_JPEG, 33003, 33004, 33005, 34712, 34887, 34933, 34927, 50001)
# None, CCITT, LZW, deflate, PackBits, LZMA, zstd: their decoders accept a limit on the output size.
_BOUNDED = (1, 2, 3, 4, 5, 8, 32946, 50013, 32773, 34925, 34926, 50000)
_ALPHA = (1, 2)  # premultiplied or not
_OPACITY_ROWS, _OPACITY_BLOCKS = 64, 4  # read to judge whether a band is opacity
_WRITE_BOOL_AS_STORED = ("tifffile", "imageio", "scikit-image")
_AS_STORED = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.SEPARATED)


def pixel_layout(path: Path, page: TiffPage) -> tuple[int, int, int, np.dtype]:
    """Determine the layout of the decoded pixels of a page.

    Args:
        path: The file, for error messages.
        page: The page.

    Returns:
        (H, W, C, dtype).

    Raises:
        InputError: The page has an unsupported data type, compression or colour space.
    """
    if page.imagedepth > 1:
        raise InputError(f"{path}: page {page.index} is a volume {page.shape}; save one page per slice")
    if page.dtype is None or page.dtype.kind not in "biuf":
        raise InputError(
            f"{path}: page {page.index} has samples of {page.bitspersample} bits "
            f"in format {page.sampleformat!r}; save it as integers or floats"
        )
    if page.compression not in _BOUNDED + _EMBEDDED:
        name = getattr(page.compression, "name", page.compression)
        raise InputError(f"{path}: page {page.index} is compressed with {name}; save it with deflate, LZW or JPEG")
    _check_colours(path, page)
    if _colour_space(page) == PHOTOMETRIC.PALETTE:
        return page.imagelength, page.imagewidth, 3, _palette(page).dtype
    dtype = np.dtype(np.uint8) if page.dtype.kind == "b" else page.dtype
    return page.imagelength, page.imagewidth, page.samplesperpixel, dtype


def segment_grid(page: TiffPage) -> tuple[int, int, int, int]:
    """Layout of the strips or tiles of a page.

    Args:
        page: TIFF page.

    Returns:
        Height and width of a segment in px, and the number of rows and columns of segments in a plane.
    """
    tiled = page.is_tiled
    height, width = (page.tilelength, page.tilewidth) if tiled else (page.rowsperstrip, page.imagewidth)
    return height, width, ceil(page.imagelength / height), ceil(page.imagewidth / width)


@dataclass(frozen=True)
class Missing:
    """Declarations of the missing pixels of a page.

    Attributes:
        value: The no-data value; None if there is none.
        alpha: Index of the band that holds opacity; None if there is none.
        mask: Number of the page that is the transparency mask, 0 where pixels are missing; None if there is none.
    """

    value: float | None = None
    alpha: int | None = None
    mask: int | None = None

    def __bool__(self) -> bool:
        return (self.value, self.alpha, self.mask) != (None, None, None)


def sample_reader(file: RawIOBase, tif: TiffFile, pages: list[TiffPage], resources: ExitStack) -> WindowReader:
    """Make a reader of windows of stored samples.

    Args:
        file: The open file, unbuffered.
        tif: The same file, open in tifffile.
        pages: Its pages, whose segments are known to be inside the file.
        resources: Its closing clears the cache of segments.

    Returns:
        Maps (page, window) to stored samples (h, w, C).
    """

    @lru_cache(maxsize=max(1, _CACHE_BYTES // max(map(_segment_bytes, pages))))
    def segment(number: int, index: int) -> np.ndarray:
        return decode_segment(tif.filehandle, pages[number], index)

    def read_window(number: int, window: Window) -> np.ndarray:
        page = pages[number]
        if page.is_final:  # uncompressed, in one piece
            samples = _stored_samples(file, tif, page, window)
        else:
            samples = _assembled(page, window, partial(segment, number))
        planes, h, w, contiguous = samples.shape
        return samples.transpose(1, 2, 0, 3).reshape(h, w, planes * contiguous)

    resources.callback(segment.cache_clear)
    return read_window


def as_type(samples: WindowReader, dtype: np.dtype) -> WindowReader:
    """Make a reader of stored samples in a dtype of native byte order.

    Args:
        samples: Reader of stored samples.
        dtype: Data type of the result.

    Returns:
        Maps (page, window) to samples (h, w, C).
    """
    return lambda number, window: np.ascontiguousarray(samples(number, window), dtype)


def pixel_reader(
    samples: WindowReader, pages: list[TiffPage], missing: list[Missing], stored: np.dtype, dtype: np.dtype
) -> WindowReader:
    """Make a reader of windows of pixels.

    Args:
        samples: Reader of stored samples.
        pages: The pages.
        missing: Declarations of the missing pixels of each page.
        stored: Data type of the pixels before missing ones become NaN.
        dtype: Data type of the pixels.

    Returns:
        Maps (page, window) to pixels (h, w, C).
    """

    def read_window(number: int, window: Window) -> np.ndarray:
        values, declared = samples(number, window), missing[number]
        pixels = _pixels(pages[number], values, stored)
        if dtype == stored and not declared:
            return pixels
        unknown = np.zeros(pixels.shape[:2], bool)
        if declared.value is not None:
            unknown |= missing_pixels(values, declared.value)
        if declared.alpha is not None:
            unknown |= values[..., declared.alpha] == 0
            pixels = np.delete(pixels, declared.alpha, axis=-1)
        if declared.mask is not None:
            unknown |= samples(declared.mask, window)[..., 0] == 0
        return with_nan(pixels, unknown, dtype)

    return read_window


def opacity_band(page: TiffPage, read_rows: Callable[[Window], np.ndarray]) -> int | None:
    """Find the band that holds opacity (see `missing.is_opacity`), from a few rows unless they are all 0.

    A band that is 0 everywhere is opacity if all of the page is 0, as tiles beyond the edge of a mosaic are.

    Args:
        page: The page.
        read_rows: Maps a window to stored samples (h, w, C).

    Returns:
        Index of the band; None if there is none.
    """
    extra = page.samplesperpixel - len(page.extrasamples)
    tagged = [extra + i for i, kind in enumerate(page.extrasamples) if kind in _ALPHA]
    if len(tagged) != 1:
        return None
    height, width = page.imagelength, page.imagewidth
    tops = np.unique(np.linspace(0, max(0, height - _OPACITY_ROWS), _OPACITY_BLOCKS).astype(int)).tolist()
    used = False
    for starts in (tops, range(0, height, _OPACITY_ROWS)):
        band = []
        for y in starts:
            samples = read_rows(Window(y, 0, min(_OPACITY_ROWS, height - y), width))
            band.append(samples[..., tagged[0]].ravel())
            used |= bool(samples.any())
        if (verdict := is_opacity(np.concatenate(band))) is not None:
            return tagged[0] if verdict else None
    return None if used else tagged[0]


def _stored_samples(file: RawIOBase, tif: TiffFile, page: TiffPage, window: Window) -> np.ndarray:
    """Read a window (planes, h, w, samples) of uncompressed contiguous pixels.

    The file is not memory-mapped, because accessing a mapped file that is truncated meanwhile kills the process.
    """
    y, x, h, w = window
    planes, _, height, width, samples = page.shaped
    dtype = np.dtype(page.dtype).newbyteorder(tif.byteorder)
    pixel, start = samples * dtype.itemsize, int(page.dataoffsets[0])
    out = np.empty((planes, h, w, samples), dtype)
    rows, rest = (h, 1) if w == width else (1, h)  # full-width rows are contiguous
    size, buffer = rows * w * pixel, out.reshape(-1).view(np.uint8).data
    starts = (start + ((plane * height + y + k) * width + x) * pixel for plane in range(planes) for k in range(rest))
    for piece, offset in enumerate(starts):
        file.seek(offset)
        read_into(file, buffer[piece * size : piece * size + size])
    return out


def read_into(file: RawIOBase, buffer: memoryview) -> None:
    """Fill a buffer from the current position of a file.

    Args:
        file: Unbuffered file.
        buffer: Buffer to fill.

    Raises:
        EOFError: The file ends before the buffer is full.
    """
    while count := file.readinto(buffer) or 0:
        if count == len(buffer):
            return
        buffer = buffer[count:]  # the system reads at most 2 GiB at a time
    raise EOFError("the file ends within its pixels")


def decode_segment(file: FileHandle, page: TiffPage, index: int) -> np.ndarray:
    """Decode one strip or tile.

    Args:
        file: The open file.
        page: The page.
        index: Index of the segment.

    Returns:
        Samples (h, w, samples) of the segment.

    Raises:
        EOFError: The file ends within the segment.
        ValueError: The segment does not match its page.
    """
    offset, size = int(page.dataoffsets[index]), int(page.databytecounts[index])
    file.seek(offset)
    data = file.read(size) if offset and size else None
    if data is not None and len(data) < size:
        raise EOFError("the file ends within its pixels")
    if data and page.compression in _EMBEDDED:
        height, width, _, _ = segment_grid(page)
        check_embedded_size((page.jpegheader or b"") + data, height, width, page.shaped[4], "a strip or tile")
    decoded, _, shape = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
    if decoded is None:
        return np.full(shape[1:], page.nodata, page.dtype)
    if decoded.dtype != page.dtype and page.dtype != bool:
        raise ValueError(f"a strip or tile of {decoded.dtype} in a page of {page.dtype}")
    return decoded[0]


def _segment_bytes(page: TiffPage) -> int:
    height, width, _, _ = segment_grid(page)
    return height * width * page.tiledepth * page.shaped[4] * np.dtype(page.dtype).itemsize


def _assembled(page: TiffPage, window: Window, segment: Callable[[int], np.ndarray]) -> np.ndarray:
    """Assemble a window (planes, h, w, samples) from the segments that it overlaps."""
    height, width, rows, columns = segment_grid(page)
    y, x, h, w = window
    planes, _, _, _, samples = page.shaped
    out = np.empty((planes, h, w, samples), page.dtype)
    segment_rows = range(y // height, (y + h - 1) // height + 1)
    segment_columns = range(x // width, (x + w - 1) // width + 1)
    for plane, row, column in product(range(planes), segment_rows, segment_columns):
        decoded = segment((plane * rows + row) * columns + column)
        segment_y, window_y = _overlap(row * height, height, y, h)
        segment_x, window_x = _overlap(column * width, width, x, w)
        out[plane, window_y, window_x] = decoded[segment_y, segment_x]
    return out


def _overlap(segment: int, segment_length: int, window: int, window_length: int) -> tuple[slice, slice]:
    """Overlap of a segment and a window along one axis, relative to the start of each."""
    low, high = max(segment, window), min(segment + segment_length, window + window_length)
    return slice(low - segment, high - segment), slice(low - window, high - window)


def _pixels(page: TiffPage, samples: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert stored samples (h, w, C) to pixels (h, w, C)."""
    if _colour_space(page) == PHOTOMETRIC.PALETTE:
        return _palette(page)[samples[..., 0]]
    if white_is_zero(page):
        white = 2**page.bitspersample - 1
        samples = samples.dtype.type(white) - samples if samples.dtype.kind == "u" else ~samples
    return np.ascontiguousarray(samples, dtype)  # no copy needed: `samples` is not shared


def encoding_of(page: TiffPage, missing: float | None) -> Encoding:
    """Describe the meaning of the stored samples of a page.

    Args:
        page: The page.
        missing: Declared value of missing pixels.

    Returns:
        The encoding.
    """
    palette = _palette(page) if _colour_space(page) == PHOTOMETRIC.PALETTE else None
    alpha = len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA
    black = 2**page.bitspersample - 1 if white_is_zero(page) else None
    return Encoding(palette, (), alpha, black, page.compression in _JPEG, missing)


def white_is_zero(page: TiffPage) -> bool:
    """Whether 0 is white. tifffile tags arrays of bool so, but neither writes nor reads them inverted."""
    bits_of_tifffile = page.bitspersample == 1 and (
        page.software.startswith(_WRITE_BOOL_AS_STORED) or page.description.startswith('{"shape":')
    )
    return _colour_space(page) == PHOTOMETRIC.MINISWHITE and not bits_of_tifffile


def _colour_space(page: TiffPage) -> int:
    """The colour space. tifffile takes a missing tag as white-is-zero; keeping the values is safer."""
    return page.photometric if 262 in page.tags else PHOTOMETRIC.MINISBLACK


def _check_colours(path: Path, page: TiffPage) -> None:
    colours, kind, single = _colour_space(page), np.dtype(page.dtype).kind, page.samplesperpixel == 1
    readable = (
        colours in _AS_STORED
        or (colours == PHOTOMETRIC.MASK and single and page.is_mask)
        or (colours == PHOTOMETRIC.MINISWHITE and single and kind in "biu")
        or (colours == PHOTOMETRIC.PALETTE and single and kind == "u")
        or (colours == PHOTOMETRIC.YCBCR and page.compression in _JPEG)  # tifffile converts it to RGB
    )
    if not readable:
        raise InputError(
            f"{path}: page {page.index} has {page.samplesperpixel} x {page.dtype} samples of colour space "
            f"{getattr(colours, 'name', colours)}; save it as greyscale or RGB"
        )


def _palette(page: TiffPage) -> np.ndarray:
    """Palette (entries, 3) in uint16, or in uint8 if the 16-bit entries are scaled or copied 8-bit values."""
    if page.colormap is None or page.colormap.shape != (3, 2**page.bitspersample):
        raise ValueError(f"no palette of {2**page.bitspersample} colours")
    levels = page.colormap.T.astype(np.uint16)
    if levels.max() < 256:
        return levels.astype(np.uint8)
    stretched = not (levels & 255).any() or not (levels % 257).any()
    return (levels >> 8).astype(np.uint8) if stretched else levels
