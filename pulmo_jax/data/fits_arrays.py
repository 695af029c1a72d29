"""One image or table column of a FITS file; a file with several that fit is refused, not guessed at."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning

from pulmo_jax.data.columns import choose_column, plain_name
from pulmo_jax.data.file_parts import FilePart
from pulmo_jax.types import InputError

_VARIABLE_LENGTH = re.compile(r"\d*[PQ]")  # TFORM of arrays which may all refer to the same bytes
_LISTED = 12  # HDUs in an error message
SCIENCE = "SCI"  # EXTNAME of the data where a file also has their errors and flags


@dataclass(frozen=True)
class Request:
    """What is asked of a file.

    Attributes:
        path: The path as given, for error messages.
        part: The file, and the extension and column if the user names them.
        wanted: Description of what is asked for.
        fitting: Whether an image of a shape is asked for.
        check: Validates (shape, dtype, bytes in the file or None, bytes needed) before an array is read.
        columns: Column names that identify the quantity; None if no column is asked for.
    """

    path: Path
    part: FilePart
    wanted: str
    fitting: Callable[[tuple[int, ...]], bool]
    check: Callable[..., None]
    columns: Sequence[str] | None


def read_fits(file: BufferedIOBase, size: int, request: Request) -> np.ndarray:
    """Read an image or a column.

    Without a named extension: the only image with fitting axes, or of several the only one called SCI; without any,
    the column of the tables that `choose_column` chooses.

    Args:
        file: The file, at its start, with valid headers.
        size: Its length in bytes.
        request: What is asked for.

    Returns:
        The array as stored, in native byte order.

    Raises:
        InputError: If nothing fits, or several do; the message lists the HDUs and how to name one.
    """
    part = request.part
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)  # about truncated files, which `check` detects
        with fits.open(file) as opened:
            hdus = _units(opened)
            chosen = hdus if part.extension is None else [_named(hdus, request)]
            images = [hdu for hdu in chosen if hdu.is_image and hdu.shape and request.fitting(hdu.shape)]
            tables = [hdu for hdu in chosen if hdu.header.get("XTENSION") in ("BINTABLE", "TABLE") and not hdu.is_image]
            if part.column is None and images:
                return _image(_only(images, hdus, request), size, request)
            if request.columns is not None and tables:
                return _column(tables, hdus, size, request, request.columns)
            shapes = [str(tuple(hdu.shape)) for hdu in chosen if hdu.is_image and hdu.shape]
            content = f"images of shape {', '.join(shapes[:_LISTED])}" if shapes else "no image"
            raise InputError(f"{request.path}: holds {content}; give {request.wanted}{_hint(hdus, part)}")


def _units(opened: fits.HDUList) -> list[Any]:
    """All HDUs; padding after the last one, which `check_fits` admits, is none to astropy either but an error."""
    hdus = []
    while True:
        try:
            hdus.append(opened[len(hdus)])
        except (IndexError, OSError):
            return hdus


def listing(hdus: Sequence[Any]) -> str:
    """Numbers, names and shapes of HDUs, for an error message."""
    lines = []
    for number, hdu in enumerate(hdus[:_LISTED]):
        if hdu.is_image:
            content = f"image {tuple(hdu.shape)}" if hdu.shape else "no data"
        else:
            content = f"table of {hdu.header.get('NAXIS2')} rows"
        lines.append(f"[{number}]{f' {hdu.name}' if hdu.name else ''}: {content}")
    more = f" and {len(hdus) - _LISTED} more" if len(hdus) > _LISTED else ""
    return "; ".join(lines) + more


def _hint(hdus: Sequence[Any], part: FilePart) -> str:
    return f". The file has {listing(hdus)}" if len(hdus) > 1 or part.extension is not None else ""


def _named(hdus: Sequence[Any], request: Request) -> Any:
    """The HDU with a number, or with an EXTNAME and possibly an EXTVER."""
    extension = request.part.extension or ""
    name, _, version = (text.strip() for text in extension.partition(","))
    if name.isdigit():
        found = [hdu for number, hdu in enumerate(hdus) if number == int(name)]
    else:
        found = [hdu for hdu in hdus if hdu.name.upper() == name.upper() and version in ("", str(hdu.ver))]
    if len(found) != 1:
        problem = f"{len(found)} extensions called" if found else "no extension"
        raise InputError(f"{request.path}: has {problem} {extension!r}; the file has {listing(hdus)}")
    return found[0]


def _only(images: Sequence[Any], hdus: Sequence[Any], request: Request) -> Any:
    science = [hdu for hdu in images if hdu.name.upper() == SCIENCE]
    if len(images) == 1 or len(science) == 1:
        return (science or images)[0]
    raise InputError(
        f"{request.path}: {len(images)} images could be {request.wanted}: {listing(hdus)}. Name one by its number or "
        f"EXTNAME: '{request.part.file}[{hdus.index(images[-1])}]'"
    )


def _image(hdu: Any, size: int, request: Request) -> np.ndarray:
    bits = hdu.header["BITPIX"]
    dtype = np.dtype({8: "u1", 16: "i2", 32: "i4", 64: "i8", -32: "f4", -64: "f8"}[bits])
    packed = isinstance(hdu, fits.CompImageHDU)
    scaled = bits > 0 and any(key in hdu.header for key in ("BSCALE", "BZERO", "BLANK"))
    decoded = (4 if bits <= 16 else 8) if scaled else dtype.itemsize  # astropy scales to float32 or float64
    needed = prod(hdu.shape) * decoded * (2 if packed or scaled else 1)
    request.check(hdu.shape, dtype, None if packed else size - hdu.fileinfo()["datLoc"], needed)
    return np.array(hdu.data, hdu.data.dtype.newbyteorder("="))  # copied, because the file is memory-mapped


def numeric_columns(path: Path, table: Any, size: int) -> list[str]:
    """Names of the numeric columns of a table.

    Args:
        path: The file, for error messages.
        table: The table.
        size: Length of the file in bytes.

    Returns:
        The names.

    Raises:
        InputError: If the table is cut off.
    """
    if (stored := table.header["NAXIS1"] * table.header["NAXIS2"]) > size - table.fileinfo()["datLoc"]:
        raise InputError(
            f"{path}: damaged or cut off: its table needs {stored} bytes, more than the file has; copy it again"
        )
    plain = [column.name for column in table.columns if not _VARIABLE_LENGTH.match(column.format)]
    return [name for name in plain if table.data[name].dtype.kind in "iuf"]


def _column(
    tables: Sequence[Any], hdus: Sequence[Any], size: int, request: Request, known: Sequence[str]
) -> np.ndarray:
    """A column of the only table, or of the only one that has a column with a known name."""
    path, part = request.path, request.part
    names = [numeric_columns(path, table, size) for table in tables]
    fitting = [i for i in range(len(tables)) if part.column is None and any(plain_name(n) in known for n in names[i])]
    if len(tables) > 1 and len(fitting) != 1:
        raise InputError(
            f"{path}: {len(fitting) or len(tables)} tables could hold the column: {listing(hdus)}. Name one by its "
            f"number or EXTNAME: '{part.file}[{hdus.index(tables[0])}]'"
        )
    number = fitting[0] if len(tables) > 1 else 0
    column = np.array(tables[number].data[choose_column(path, names[number], known, part.column)])
    request.check(column.shape, column.dtype, None)
    return column
