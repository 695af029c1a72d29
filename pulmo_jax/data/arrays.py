"""Numeric arrays from FITS, TIFF, .npy and text files, read by `read_array`.

Unlike the image sources, which read pages and windows, this module reads a whole array with axes of any meaning.
"""

import gzip
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from jaxtyping import Shaped
from numpy.lib import format as npy

from pulmo_jax.data.fits_headers import check_fits, copy_declared
from pulmo_jax.data.sources.source import check_free_memory, check_is_file, decoding
from pulmo_jax.data.sources.tiff import open_tiff
from pulmo_jax.types import InputError

MAX_BYTES = 32 * 2**30
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_GZIP_RATIO = 1040  # deflate expands to at most 1032 times its size
_COPIES_OF_UNZIPPED = 3  # the unzipped file, the bytes that astropy reads from it, and the array in native byte order
_MAX_NPY_HEADER_BYTES = 10_000  # as in numpy, which reads the header before it checks its length
_REMEDY = "save a part of it"
_MAX_TEXT_BYTES = 16 * 2**20  # parsing takes about ten times as much memory
_VARIABLE_LENGTH = re.compile(r"\d*[PQ]")  # TFORM of arrays which may all refer to the same bytes
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Validates a header before memory is allocated: (shape, dtype, bytes of data in the file; None if compressed).
# and the bytes of memory that reading takes, if these are more than the array itself.
Check = Callable[..., None]


def read_array(
    path: Path, dims: tuple[int, ...], *, description: str = "an array", max_bytes: int = MAX_BYTES
) -> Shaped[np.ndarray, "..."]:
    """Read the numeric array in a file.

    The content determines the format, not the file name:

    - FITS, also gzipped: the first image with an allowed number of axes, scaled by BSCALE and BZERO; without such an
      image, the only numeric column of a table.
    - TIFF: all pages; the bands of a page form an axis before its rows.
    - .npy.
    - Text: numbers separated by white space or commas, comments after #.

    Args:
        path: The file.
        dims: Allowed numbers of axes. Leading and trailing axes of length 1 are dropped to reach one of them.
        description: Name of the array in error messages.
        max_bytes: Limit on the size in memory. The header must also declare no more than the free memory; both are
            checked before memory is allocated.

    Returns:
        The array in native byte order. Integers stay integers, float32 and float64 are kept, float16 becomes float32
        and longer floats become float64.

    Raises:
        InputError: The file cannot be read, exceeds the limit or does not hold such an array.
    """

    def check(shape: tuple[int, ...], dtype: np.dtype, available: int | None, needed: int = 0) -> None:
        _check_layout(path, shape, dtype, dims, description)
        size = prod(shape) * dtype.itemsize
        needed = max(needed, size)
        if needed > max_bytes:
            required = f"{_layout(shape, dtype)} takes {needed / 2**30:.3g} GiB"
            raise InputError(
                f"{path}: {required}, the limit is {max_bytes / 2**30:.3g} GiB; save a part of it, or raise "
                "data.max_image_mb"
            )
        if available is not None and size > available:
            raise InputError(
                f"{path}: damaged or cut off: its header declares {_layout(shape, dtype)}, that is {size} bytes, "
                f"but the file has only {available} bytes of data; copy or export it again"
            )
        check_free_memory(path, needed, _REMEDY)

    with decoding(path), _opened(path, description, max_bytes) as (file, size):
        head = file.read(16)
        file.seek(0)
        if head.startswith(_TIFF_MAGIC):
            array = _read_tiff(path, file, check, max_bytes)
        elif head.startswith(b"SIMPLE  ="):
            check_fits(path, file, size)
            file.seek(0)
            array = _read_fits(path, file, size, dims, description, check)
        elif head.startswith(npy.MAGIC_PREFIX):
            array = _read_npy(path, file, size, check)
        elif head.startswith(b"PK"):
            raise InputError(f"{path}: is an archive (.npz or .zip); save {description} alone as .npy")
        else:
            array = _read_text(path, file, size, description, check)
        return np.ascontiguousarray(array.reshape(fitting_shape(array.shape, dims)), _native(array.dtype))


def fitting_shape(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Drop leading and trailing axes of length 1 until the number of axes is allowed.

    Args:
        shape: Shape of the array.
        dims: Allowed numbers of axes.

    Returns:
        The reduced shape, or None if no allowed number of axes can be reached.
    """
    while len(shape) not in dims and len(shape) > min(dims):
        if shape[0] == 1:
            shape = shape[1:]
        elif shape[-1] == 1:
            shape = shape[:-1]
        else:
            return None
    return shape if len(shape) in dims else None


def _check_layout(path: Path, shape: tuple[int, ...], dtype: np.dtype, dims: tuple[int, ...], description: str) -> None:
    allowed = f"give {description}, {_axes(dims)}-dimensional, of integers or real floats"
    if dtype.hasobject:
        raise InputError(f"{path}: holds pickled Python objects, which are never unpickled; {allowed}")
    if dtype.kind not in "iuf" or fitting_shape(shape, dims) is None:
        raise InputError(f"{path}: holds {_layout(shape, dtype)}; {allowed}")
    if any(length < 1 for length in shape):
        raise InputError(f"{path}: holds no values, {_layout(shape, dtype)}; {allowed}")


def _axes(dims: tuple[int, ...]) -> str:
    return " or ".join(str(n) for n in dims)


def _layout(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"an array of shape {tuple(shape)} and type {dtype.newbyteorder('=')}"


def _native(dtype: np.dtype) -> np.dtype:
    if dtype.kind == "f":
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    return dtype.newbyteorder("=")


@contextmanager
def _opened(path: Path, description: str, max_bytes: int) -> Iterator[tuple[BufferedIOBase, int]]:
    """The file and its size in bytes; of a gzipped file, the stream and the largest size that it can unzip to.

    Of a gzipped FITS file, the HDUs are unzipped into memory, because astropy seeks in it.
    """
    check_is_file(path, f"a FITS, TIFF, .npy or text file with {description}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        zipped = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        if not zipped:
            yield file, size
            return
        most = _MAX_GZIP_RATIO * size
        with gzip.open(file) as unzipped:
            fits_file = unzipped.read(9) == b"SIMPLE  ="
            unzipped.seek(0)
            if not fits_file:
                yield unzipped, most
                return
            content = BytesIO()
            for length in copy_declared(path, unzipped, content, min(most, max_bytes)):
                check_free_memory(path, _COPIES_OF_UNZIPPED * length, _REMEDY)
            content.seek(0)
            yield content, len(content.getbuffer())


def _read_tiff(path: Path, file: BufferedIOBase, check: Check, max_bytes: int) -> np.ndarray:
    """(pages, bands, H, W), or (pages, H, W) for a single band."""
    if isinstance(file, gzip.GzipFile):
        raise InputError(f"{path}: is a gzipped TIFF file; unzip it")
    with open_tiff(path, max_bytes) as source:
        pages, height, width, bands = source.shape
        shape = (pages, height, width) if bands == 1 else (pages, bands, height, width)
        check(shape, source.dtype, None)
        array = np.empty((pages, bands, height, width), source.dtype)
        for page in range(pages):
            array[page] = np.moveaxis(source.read(page), -1, 0)
    return array.reshape(shape)


def _read_npy(path: Path, file: BufferedIOBase, size: int, check: Check) -> np.ndarray:
    version_1 = npy.read_magic(file) == (1, 0)
    length = int.from_bytes(file.read(2 if version_1 else 4), "little")
    if length > _MAX_NPY_HEADER_BYTES:
        raise InputError(
            f"{path}: damaged or cut off: its header takes {length} bytes, allowed: {_MAX_NPY_HEADER_BYTES}"
        )
    file.seek(npy.MAGIC_LEN)
    shape, _, dtype = (npy.read_array_header_1_0 if version_1 else npy.read_array_header_2_0)(file)
    check(shape, dtype, size - file.tell(), (1 if dtype == _native(dtype) else 2) * prod(shape) * dtype.itemsize)
    file.seek(0)
    array = npy.read_array(file, allow_pickle=False)
    if isinstance(file, gzip.GzipFile) and file.read(1):  # reading to the end also verifies the checksum
        raise InputError(f"{path}: damaged: unzips to more than its header declares; save it again")
    return array


def _read_text(path: Path, file: BufferedIOBase, size: int, description: str, check: Check) -> np.ndarray:
    """(lines, numbers per line) in float64."""
    content = file.read(_MAX_TEXT_BYTES + 1)
    if not content:
        raise InputError(f"{path}: is empty (0 bytes); it should hold {description}")
    too_long = len(content) > _MAX_TEXT_BYTES
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = "" if too_long and error.start > len(content) - 4 else "\0"  # cut within a character, or not text
    if "\0" in text:
        raise InputError(f"{path}: unknown file format; supported formats are FITS, TIFF, .npy and text")
    if too_long:
        raise InputError(
            f"{path}: is a text file of more than {_MAX_TEXT_BYTES / 2**20:.0f} MB, the limit; save it as .npy or FITS"
        )
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    if not lines:
        raise InputError(f"{path}: is a text file without numbers; it should hold {description}")
    delimiter = "," if any("," in line for line in lines) else None
    try:
        rows = np.loadtxt(lines, delimiter=delimiter, comments=None, ndmin=2)
    except ValueError as exc:
        raise InputError(f"{path}: is not a table of numbers ({exc}); start comment lines with #") from exc
    check(rows.shape, rows.dtype, None)
    return rows


def _read_fits(
    path: Path, file: BufferedIOBase, size: int, dims: tuple[int, ...], description: str, check: Check
) -> np.ndarray:
    shapes, table = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # about truncated files, which `check` detects
        with fits.open(file) as hdus:
            hdu: Any
            for hdu in hdus:
                if hdu.is_image and hdu.shape:
                    if fitting_shape(hdu.shape, dims) is not None:
                        return _image(hdu, size, check)
                    shapes.append(str(tuple(hdu.shape)))
                elif table is None and hdu.header.get("XTENSION") in ("BINTABLE", "TABLE"):
                    table = hdu
            if table is not None and 1 in dims:
                return _only_column(path, table, size, check)
    content = f"images of shape {', '.join(shapes)}" if shapes else "no image"
    raise InputError(f"{path}: holds {content}; give {description}, {_axes(dims)}-dimensional")


def _image(hdu: Any, size: int, check: Check) -> np.ndarray:
    bits = hdu.header["BITPIX"]
    dtype = np.dtype({8: "u1", 16: "i2", 32: "i4", 64: "i8", -32: "f4", -64: "f8"}[bits])
    packed = isinstance(hdu, fits.CompImageHDU)
    scaled = bits > 0 and any(key in hdu.header for key in ("BSCALE", "BZERO", "BLANK"))
    decoded = (4 if bits <= 16 else 8) if scaled else dtype.itemsize  # astropy scales to float32 or float64
    needed = prod(hdu.shape) * decoded * (2 if packed or scaled else 1)
    check(hdu.shape, dtype, None if packed else size - hdu.fileinfo()["datLoc"], needed)
    return hdu.data.astype(_native(hdu.data.dtype))  # copied, because the file is memory-mapped


def _only_column(path: Path, table: Any, size: int, check: Check) -> np.ndarray:
    """The only numeric column of a table."""
    if (stored := table.header["NAXIS1"] * table.header["NAXIS2"]) > size - table.fileinfo()["datLoc"]:
        raise InputError(
            f"{path}: damaged or cut off: its table needs {stored} bytes, more than the file has; copy it again"
        )
    plain = [column.name for column in table.columns if not _VARIABLE_LENGTH.match(column.format)]
    numeric = [name for name in plain if table.data[name].dtype.kind in "iuf"]
    if len(numeric) != 1:
        names = ", ".join(numeric) or "none"
        raise InputError(
            f"{path}: the table has {len(numeric)} numeric columns ({names}), but exactly one is allowed; "
            "save the required column alone"
        )
    column = np.array(table.data[numeric[0]])
    check(column.shape, column.dtype, None)
    return column
