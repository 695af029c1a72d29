"""Size of the compressed tiles of a FITS image, checked before astropy decompresses them.

A tile compressed with gzip can expand to a thousand times its size, and many table rows can refer to the same bytes.

Reference:
    FITS standard 4.0 (2018), section 10.1.3 for the table of tiles, 7.3.5 for its variable-length arrays.
"""

import re
import zlib
from collections.abc import Mapping
from io import BufferedIOBase
from math import prod
from pathlib import Path

import numpy as np

from pulmo_jax.types import InputError

_BYTES = {"L": 1, "B": 1, "A": 1, "I": 2, "J": 4, "E": 4, "K": 8, "D": 8, "C": 8, "M": 16}  # of table 18
_ARRAY = re.compile(r"1?([PQ])([LBAIJEKDCM])")  # TFORM of variable-length arrays
_MAX_OVERLAP = 2  # sum of the lengths of the arrays, relative to the space that they are stored in
_TEXT = re.compile(rb"(TTYPE|TFORM)(\d+) *= *'([^']*)'")
_HEAP = re.compile(rb"THEAP *= *(\d+)")


def check_tiles(
    path: Path, file: BufferedIOBase, header: bytes, numbers: Mapping[str, int], place: tuple[int, int], unit: int
) -> None:
    """Check that the tiles of a compressed image expand to no more than their pixels.

    Args:
        path: Name of the file in error messages.
        file: The file, open for reading.
        header: Header of the table of tiles.
        numbers: Its keywords with integer values.
        place: First and last offset of the table and its heap in the file, in bytes.
        unit: Number of the HDU.

    Raises:
        InputError: A tile expands further, or the tiles overlap.
    """
    width, rows = numbers.get("NAXIS1", 0), numbers.get("NAXIS2", 0)
    tile = prod(numbers.get(f"ZTILE{k + 1}", numbers.get("ZNAXIS1", 1) if k == 0 else 1) for k in range(9))
    start, stop = place
    if not 0 < width * rows <= stop - start:
        return  # astropy refuses a table that is cut off
    found = _HEAP.search(header)
    heap = start + (int(found[1]) if found else width * rows)
    file.seek(start)
    table = np.frombuffer(file.read(width * rows), np.uint8).reshape(rows, width)
    for name, (offset, number_bytes, item_bytes) in _array_columns(header).items():
        counts, starts = _descriptors(table, offset, number_bytes)
        if (counts < 0).any() or int(counts.sum()) * item_bytes > _MAX_OVERLAP * max(0, stop - heap):
            raise InputError(f"{path}: damaged: the tiles of HDU {unit} overlap or are beyond its end")
        for row in np.flatnonzero(counts > 8 * tile // 1000) if "COMPRESSED" in name else ():
            file.seek(heap + int(starts[row]))
            _check_tile(path, file.read(int(counts[row]) * item_bytes), 8 * tile, unit)


def _array_columns(header: bytes) -> dict[str, tuple[int, int, int]]:
    """Offset in a row, bytes of a number of the descriptor, and bytes of an element, by column with such arrays."""
    texts: dict[tuple[bytes, int], str] = {}
    for k in range(0, len(header), 80):
        if match := _TEXT.match(header[k : k + 80]):
            texts[match[1], int(match[2])] = match[3].decode("ascii", "replace").strip()
    columns, offset = {}, 0
    for k in sorted(number for keyword, number in texts if keyword == b"TFORM"):
        form = texts[b"TFORM", k]
        if match := _ARRAY.match(form):
            number_bytes = 4 if match[1] == "P" else 8
            columns[texts.get((b"TTYPE", k), str(k))] = offset, number_bytes, _BYTES[match[2]]
            offset += 2 * number_bytes
        elif match := re.match(r"(\d*)([LBAIJEKDCM])", form):
            offset += int(match[1] or 1) * _BYTES[match[2]]
    return columns


def _descriptors(table: np.ndarray, offset: int, number_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of elements and offset in the heap of each row's array."""
    numbers = np.ascontiguousarray(table[:, offset : offset + 2 * number_bytes]).view(f">i{number_bytes}")
    return numbers[:, 0].astype(np.int64), numbers[:, 1].astype(np.int64)


def _check_tile(path: Path, data: bytes, limit: int, unit: int) -> None:
    """Refuse a gzipped tile that expands beyond the limit; other codecs know the size of their output."""
    if not data.startswith(b"\x1f\x8b"):
        return
    stream = zlib.decompressobj(wbits=31)
    try:
        expanded = len(stream.decompress(data, limit + 1))
    except zlib.error as error:
        raise InputError(f"{path}: damaged: a tile of HDU {unit} cannot be unzipped ({error})") from error
    if expanded > limit or stream.unused_data.strip(b"\0"):
        raise InputError(f"{path}: damaged: a tile of HDU {unit} expands to more than its pixels")
