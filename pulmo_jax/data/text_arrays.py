"""Numbers from text: lines of numbers, or a table with a header line of column names."""

import csv
from collections.abc import Callable, Sequence
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.columns import choose_column
from pulmo_jax.types import InputError

_MAX_BYTES = 16 * 2**20  # parsing takes about ten times as much memory


def read_text(
    path: Path,
    file: BufferedIOBase,
    description: str,
    check: Callable[..., None],
    known: Sequence[str] = (),
    column: str | None = None,
) -> Float[np.ndarray, "N M"]:
    """Read numbers separated by white space, commas or semicolons; text after # is a comment.

    If the first line holds a word, it is the header line, and one column is read (`choose_column`). Its names are
    separated by tabs if there are any, so that they may contain spaces.

    Args:
        path: The file, for error messages.
        file: The file, open for reading.
        description: Name of the array in error messages.
        check: Validates (shape, dtype, None).
        known: Column names that identify the quantity.
        column: Column that the user asks for.

    Returns:
        Lines and numbers per line, in float64; (N, 1) for a column.

    Raises:
        InputError: If the file is not a table of numbers, or the column is ambiguous.
    """
    lines = _lines(path, file, description)
    delimiter = next((mark for mark in ",;" if any(mark in line for line in lines)), None)
    if not all(_is_number(field) for field in _fields(lines[0], delimiter)):
        delimiter = "\t" if delimiter is None and "\t" in lines[0] else delimiter
        rows = _column(path, [_fields(line, delimiter) for line in lines], known, column)
    elif column is not None:
        raise InputError(f"{path}: has no header line, so it has no column {column!r}; add a first line of names")
    else:
        try:
            rows = np.loadtxt(lines, delimiter=delimiter, comments=None, ndmin=2)
        except ValueError as error:
            raise InputError(f"{path}: is not a table of numbers ({error}); start comment lines with #") from error
    check(rows.shape, rows.dtype, None)
    return rows


def _lines(path: Path, file: BufferedIOBase, description: str) -> list[str]:
    """Lines without comments and blank lines."""
    content = file.read(_MAX_BYTES + 1)
    if not content:
        raise InputError(f"{path}: is empty (0 bytes); it should hold {description}")
    too_long = len(content) > _MAX_BYTES
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = "" if too_long and error.start > len(content) - 4 else "\0"  # cut within a character, or not text
    if "\0" in text:
        raise InputError(f"{path}: unknown file format; supported formats are FITS, TIFF, .npy and text")
    if too_long:
        raise InputError(
            f"{path}: is a text file of more than {_MAX_BYTES / 2**20:.0f} MB, the limit; save it as .npy or FITS"
        )
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    if not lines:
        raise InputError(f"{path}: is a text file without numbers; it should hold {description}")
    return lines


def _fields(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        return line.split()
    return [field.strip() for field in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text
    return True


def _column(path: Path, lines: list[list[str]], known: Sequence[str], wanted: str | None) -> np.ndarray:
    """The chosen column (N, 1) of a table with a header line."""
    names, rows = lines[0], lines[1:]
    if not rows:
        raise InputError(
            f"{path}: is not a table of numbers: it has none below its first line, {' '.join(names)[:100]!r}"
        )
    if odd := next((row for row in rows if len(row) != len(names)), None):
        raise InputError(
            f"{path}: its header line has {len(names)} columns ({', '.join(names)[:100]}), but a line below has "
            f"{len(odd)} ({', '.join(odd)[:60]}); give every line a value for each column"
        )
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    if len(columns) < len(names):
        raise InputError(f"{path}: two columns have the same name ({', '.join(names)[:100]}); rename one")
    numeric = [name for name, values in columns.items() if all(v and _is_number(v) for v in values)]
    chosen = choose_column(path, numeric, known, wanted)
    return np.array([[float(value)] for value in columns[chosen]])
