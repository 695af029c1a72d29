"""Arrays of numbers in files: FITS, TIFF, .npy and text behind one `read_array`.

Unlike the image sources, which hand out pages and windows, this reads a file's whole array, whatever its axes mean.
"""

import gzip
import os
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
from numpy.lib import format as npy

from pulmo_jax.data.fits_headers import check_fits
from pulmo_jax.data.sources.source import check_is_file, decoding
from pulmo_jax.data.sources.tiff import open_tiff
from pulmo_jax.types import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK_BYTES = 2**20
_MAX_TEXT_BYTES = 16 * 2**20  # as lines and numbers it takes some ten times as much memory
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# The check of a header found: shape, dtype, and the bytes that the file has for them, None where compressed.
Check = Callable[[tuple[int, ...], np.dtype, int | None], None]


def read_array(path: Path, dims: tuple[int, ...], *, what: str = "an array", max_bytes: int = 32 * 2**30) -> np.ndarray:
    """The array in a file, its number of axes one of `dims`; axes of length 1 at its ends are dropped for that.

    Content decides the format, not the name: FITS (.gz too; the first image that fits, scaled by BSCALE and BZERO, or
    else the one numeric column of a table), TIFF (all pages; bands of a page as an axis before its rows), .npy, and
    text (numbers between white space or commas, comments after #). Native byte order; integers stay integers, float32
    and float64 are kept, float16 becomes float32, longer floats float64.

    what: the array's name in messages. max_bytes: limit on its size, checked from the header before memory is taken.
    Raises InputError for what cannot be read or is anything else.
    """

    def check(shape: tuple[int, ...], dtype: np.dtype, available: int | None) -> None:
        _check_layout(path, shape, dtype, dims, what)
        size = prod(shape) * dtype.itemsize
        if size > max_bytes:
            found = f"{_words(shape, dtype)} takes {size / 2**30:.3g} GiB"
            raise InputError(f"{path}: {found}, the limit is {max_bytes / 2**30:.3g} GiB; save a part of it")
        if available is not None and size > available:
            raise InputError(
                f"{path}: damaged or cut off: its header says {_words(shape, dtype)}, that is {size} bytes, "
                f"the file has {available} bytes for it"
            )

    with decoding(path), _opened(path, what, max_bytes) as (file, size):
        head = file.read(16)
        file.seek(0)
        if head.startswith(_TIFF_MAGIC):
            array = _read_tiff(path, check, max_bytes)
        elif head.startswith(b"SIMPLE  ="):
            check_fits(path, file, size)
            file.seek(0)
            array = _read_fits(path, file, size, dims, what, check)
        elif head.startswith(npy.MAGIC_PREFIX):
            array = _read_npy(file, size, check)
        elif head.startswith(b"PK"):
            raise InputError(f"{path}: an archive (.npz or .zip); save {what} alone as .npy")
        else:
            array = _read_text(path, file, size, what, check)
        return np.ascontiguousarray(array.reshape(fitting_shape(array.shape, dims)), _native(array.dtype))


def fitting_shape(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape without as many axes of length 1 as it takes for a number of axes in `dims`; None if it cannot be."""
    while len(shape) not in dims and len(shape) > min(dims):
        if shape[0] == 1:
            shape = shape[1:]
        elif shape[-1] == 1:
            shape = shape[:-1]
        else:
            return None
    return shape if len(shape) in dims else None


def _check_layout(path: Path, shape: tuple[int, ...], dtype: np.dtype, dims: tuple[int, ...], what: str) -> None:
    allowed = f"needed: {what}, {_axes(dims)}-dimensional, of integers or real floats"
    if dtype.hasobject:
        raise InputError(f"{path}: holds pickled Python objects, which are never unpickled; {allowed}")
    if dtype.kind not in "iuf" or fitting_shape(shape, dims) is None:
        raise InputError(f"{path}: holds {_words(shape, dtype)}; {allowed}")
    if prod(shape) == 0:
        raise InputError(f"{path}: holds no values, {_words(shape, dtype)}; {allowed}")


def _axes(dims: tuple[int, ...]) -> str:
    return " or ".join(str(n) for n in dims)


def _words(shape: tuple[int, ...], dtype: np.dtype) -> str:
    return f"an array of shape {tuple(shape)} and type {dtype.newbyteorder('=')}"


def _native(dtype: np.dtype) -> np.dtype:
    if dtype.kind == "f":
        return np.dtype(np.float32 if dtype.itemsize <= 4 else np.float64)
    return dtype.newbyteorder("=")


@contextmanager
def _opened(path: Path, what: str, max_bytes: int) -> Iterator[tuple[BufferedIOBase, int]]:
    """The file and its size in bytes, unzipped into memory if it is zipped."""
    check_is_file(path, f"a FITS, TIFF, .npy or text file with {what}")
    with path.open("rb") as file:
        zipped = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        if not zipped:
            yield file, os.fstat(file.fileno()).st_size
            return
        content = BytesIO()
        with gzip.open(file) as unzipped:
            while content.write(unzipped.read(_CHUNK_BYTES)):
                if content.tell() > max_bytes:
                    raise InputError(f"{path}: unzips to more than the limit, {max_bytes / 2**30:.3g} GiB")
        size = content.tell()
        content.seek(0)
        yield content, size


def _read_tiff(path: Path, check: Check, max_bytes: int) -> np.ndarray:
    """(pages, bands, H, W), without the bands if there is one."""
    with open_tiff(path, max_bytes) as source:
        pages, height, width, bands = source.shape
        shape = (pages, height, width) if bands == 1 else (pages, bands, height, width)
        check(shape, source.dtype, None)
        array = np.empty((pages, bands, height, width), source.dtype)
        for page in range(pages):
            array[page] = np.moveaxis(source.read(page), -1, 0)
    return array.reshape(shape)


def _read_npy(file: BufferedIOBase, size: int, check: Check) -> np.ndarray:
    header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = header(file)
    check(shape, dtype, size - file.tell())
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _read_text(path: Path, file: BufferedIOBase, size: int, what: str, check: Check) -> np.ndarray:
    """float64, (lines, numbers of a line)."""
    if size == 0:
        raise InputError(f"{path}: is empty (0 bytes); it should hold {what}")
    try:
        text = file.read(_MAX_TEXT_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if size > _MAX_TEXT_BYTES and "\0" not in text:
        allowed = f"{_MAX_TEXT_BYTES / 2**20:.0f} MB"
        raise InputError(
            f"{path}: a text file of {size / 2**20:.1f} MB, the limit is {allowed}; save it as .npy or FITS"
        )
    if "\0" in text:
        raise InputError(f"{path}: its content is of no known format; what can be read is FITS, TIFF, .npy and text")
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    if not lines:
        raise InputError(f"{path}: a text file without numbers; it should hold {what}")
    delimiter = "," if any("," in line for line in lines) else None
    try:
        rows = np.loadtxt(lines, delimiter=delimiter, comments=None, ndmin=2)
    except ValueError as exc:
        raise InputError(f"{path}: a text file of more than numbers ({exc}); a line of words starts with #") from exc
    check(rows.shape, rows.dtype, None)
    return rows


def _read_fits(
    path: Path, file: BufferedIOBase, size: int, dims: tuple[int, ...], what: str, check: Check
) -> np.ndarray:
    shapes, table = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # of a file that is cut off: that is checked here
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
    found = f"images of shape {', '.join(shapes)}" if shapes else "no image"
    raise InputError(f"{path}: holds {found}; needed: {what}, {_axes(dims)}-dimensional")


def _image(hdu: Any, size: int, check: Check) -> np.ndarray:
    dtype = np.dtype({8: "u1", 16: "i2", 32: "i4", 64: "i8", -32: "f4", -64: "f8"}[hdu.header["BITPIX"]])
    packed = isinstance(hdu, fits.CompImageHDU)
    check(hdu.shape, dtype, None if packed else size - hdu.fileinfo()["datLoc"])
    return hdu.data.astype(_native(hdu.data.dtype))  # a copy, for the file is only mapped


def _only_column(path: Path, table: Any, size: int, check: Check) -> np.ndarray:
    """The one numeric column of a table."""
    if (stored := table.header["NAXIS1"] * table.header["NAXIS2"]) > size - table.fileinfo()["datLoc"]:
        raise InputError(f"{path}: damaged or cut off: its table takes {stored} bytes, more than the file has for it")
    numeric = [name for name in table.columns.names if table.data[name].dtype.kind in "iuf"]
    if len(numeric) != 1:
        names = ", ".join(numeric) or "none"
        raise InputError(f"{path}: a table of {len(numeric)} numeric columns ({names}); save the one needed alone")
    column = np.array(table.data[numeric[0]])
    check(column.shape, column.dtype, None)
    return column
