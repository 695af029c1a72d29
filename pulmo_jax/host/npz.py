"""Bounded reading of .npz files that may come from elsewhere: every header is judged before an array is allocated."""

import ast
import io
import math
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pulmo_jax.host.reading import open_regular, size_within
from pulmo_jax.types import InputError

END, END64, END_BYTES, LOCATOR_BYTES = b"PK\5\6", b"PK\6\7", 22, 20  # of a zip archive without a comment
MAX_ENTRIES, DIRECTORY_BYTES = 1000, 2**18
HEADER_BYTES, MAX_DIMENSIONS = 10_000, 32
KINDS = "biuf"


def read_npz(path: Path, limit: int, inside: Path | None = None) -> dict[str, np.ndarray]:
    """Read an archive of numeric arrays that `numpy.savez` wrote, which is not compressed.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.
        inside: Folder that must contain the file after all links are resolved.

    Returns:
        Arrays by name.

    Raises:
        OSError: The file is missing or not readable.
        InputError: It is not such an archive, or an array is not of the size that its header declares.
    """
    with open_regular(path, inside) as file:
        size = size_within(path, file, limit)
        try:
            require_plain_directory(file, size)
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                if sum(entry.file_size for entry in entries) > size or any(e.compress_type for e in entries):
                    raise ValueError("its arrays are compressed, or larger than the file")
                return {e.filename.removesuffix(".npy"): array_of(archive.read(e)) for e in entries}
        except (zipfile.BadZipFile, ValueError, SyntaxError, EOFError, NotImplementedError, RuntimeError) as error:
            raise InputError(f"{path}: is not a valid .npz file ({str(error)[:200]})") from error


def require_plain_directory(file: BinaryIO, size: int) -> None:
    """Raise ValueError unless the directory of a zip archive is short, because zipfile reads all of it."""
    file.seek(max(size - END_BYTES - LOCATOR_BYTES, 0))
    locator, end = file.read(LOCATOR_BYTES), file.read(END_BYTES)
    count, directory = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    if end[:4] != END or locator[:4] == END64 or count > MAX_ENTRIES or directory > DIRECTORY_BYTES:
        raise ValueError("it does not end with the directory of a small archive")
    file.seek(0)


def array_of(content: bytes) -> np.ndarray:
    """Array from the content of an .npy file.

    Args:
        content: The content.

    Returns:
        The array.

    Raises:
        ValueError: It is not a numeric array of exactly the declared size.
    """
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(file.read(width), "little")
    if version not in ((1, 0), (2, 0), (3, 0)) or length > HEADER_BYTES:
        raise ValueError("an array has a header of another format")
    header = ast.literal_eval(file.read(length).decode("latin-1").strip())
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError("an array has a header of another format")
    shape, descr, fortran = header["shape"], header["descr"], header["fortran_order"]
    if not isinstance(descr, str) or not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("an array has a header of another format")
    try:
        dtype = np.dtype(descr)
    except TypeError as error:
        raise ValueError(f"an array has the type {descr[:40]!r}") from error
    if dtype.kind not in KINDS or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array of type {descr[:40]!r} and shape {str(shape)[:100]}")
    if len(content) - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of {len(content)} bytes declares the shape {str(shape)[:100]}")
    values = np.frombuffer(content, dtype, offset=file.tell())
    return values.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="))
