"""Numeric arrays from FITS, TIFF, .npy and text files, read by `read_array`.

Unlike the image sources, which read pages and windows, this module reads a whole array with axes of any meaning.
"""

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase, BytesIO
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from numpy.lib import format as npy

from pulmo_jax.data.file_parts import split_part
from pulmo_jax.data.fits_arrays import Request, read_fits
from pulmo_jax.data.fits_headers import check_fits, copy_declared
from pulmo_jax.data.sources.source import check_free_memory, check_is_file, decoding
from pulmo_jax.data.sources.tiff import open_tiff
from pulmo_jax.data.text_arrays import read_text
from pulmo_jax.types import InputError

MAX_BYTES = 32 * 2**30
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_GZIP_RATIO = 1040  # deflate expands to at most 1032 times its size
_COPIES_OF_UNZIPPED = 3  # the unzipped file, the bytes that astropy reads from it, and the array in native byte order
_MAX_NPY_HEADER_BYTES = 10_000  # as in numpy, which reads the header before it checks its length
_REMEDY = "save a part of it"
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Validates a header before memory is allocated: (shape, dtype, bytes of data in the file; None if compressed).
# and the bytes of memory that reading takes, if these are more than the array itself.
Check = Callable[..., None]


def read_array(
    path: Path,
    dims: tuple[int, ...],
    *,
    description: str = "an array",
    max_bytes: int = MAX_BYTES,
    columns: Sequence[str] = (),
) -> Shaped[np.ndarray, "..."]:
    """Read the numeric array in a file.

    The content determines the format, not the file name:

    - FITS, also gzipped: the only image with an allowed number of axes, or of several the only one with EXTNAME SCI,
      scaled by BSCALE and BZERO; without such an image, a column of a table. `path` may name the extension and the
      column, FILE[EXT][col NAME].
    - TIFF: all pages; the bands of a page form an axis before its rows.
    - .npy.
    - Text: numbers separated by white space or commas, comments after #; with a header line, one column.

    Args:
        path: The file, or a part of it (`split_part`).
        dims: Allowed numbers of axes. Leading and trailing axes of length 1 are dropped to reach one of them.
        description: Name of the array in error messages.
        max_bytes: Limit on the size in memory. The header must also declare no more than the free memory; both are
            checked before memory is allocated.
        columns: Names of columns that hold this array, as of `plain_name`.

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

    part = split_part(path)
    wanted, names = f"{description}, {_axes(dims)}-dimensional", columns if 1 in dims else None
    request = Request(path, part, wanted, lambda shape: fitting_shape(shape, dims) is not None, check, names)
    with decoding(path), opened(path, description, max_bytes) as (file, size):
        array = _read(file, size, request, description, max_bytes)
        return np.ascontiguousarray(array.reshape(fitting_shape(array.shape, dims)), _native(array.dtype))


def _read(file: BufferedIOBase, size: int, request: Request, description: str, max_bytes: int) -> np.ndarray:
    """The array in a file, by the format of its content."""
    path, part, check = request.path, request.part, request.check
    head = file.read(16)
    file.seek(0)
    if head.startswith(b"SIMPLE  ="):
        check_fits(path, file, size)
        file.seek(0)
        return read_fits(file, size, request)
    if part.extension is not None:
        raise InputError(f"{path}: {part.file} is not a FITS file, so it has no extension [{part.extension}]")
    binary = head.startswith((*_TIFF_MAGIC, npy.MAGIC_PREFIX, b"PK"))
    if binary and part.column is not None:
        raise InputError(f"{path}: {part.file} is not a table, so it has no column {part.column!r}")
    if head.startswith(_TIFF_MAGIC):
        return _read_tiff(path, file, check, max_bytes)
    if head.startswith(npy.MAGIC_PREFIX):
        return _read_npy(path, file, size, check)
    if head.startswith(b"PK"):
        raise InputError(f"{path}: is an archive (.npz or .zip); save {description} alone as .npy")
    return read_text(path, file, description, check, request.columns or (), part.column)


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
def opened(path: Path, description: str, max_bytes: int) -> Iterator[tuple[BufferedIOBase, int]]:
    """Open a file, or the file of a part (`split_part`).

    Of a gzipped FITS file, the HDUs are unzipped into memory, because astropy seeks in it.

    Args:
        path: The file.
        description: Name of its content in error messages.
        max_bytes: Limit on the size of the unzipped HDUs.

    Yields:
        The file and its size in bytes; of a gzipped file, the stream and the largest size that it can unzip to.
    """
    source = split_part(path).file
    check_is_file(source, f"a FITS, TIFF, .npy or text file with {description}")
    with source.open("rb") as file:
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
