"""Choice of one column of a table by name, for FITS tables and text files with a header line."""

import re
from collections.abc import Sequence
from pathlib import Path

from pulmo_jax.types import InputError

PARALLACTIC = ("parang", "parangle", "parallacticangle", "parallacticangles")
DEROTATION = ("derot", "derotang", "derotangle", "derotangles", "derotationangle", "derotationangles")
ANGLES = (*PARALLACTIC, *DEROTATION, "angle", "angles", "pa", "posang", "positionangle")
WAVELENGTHS = ("wavelength", "wavelengths", "wave", "lambda", "lam", "wl", "wvl", "wvs")
_UNIT = re.compile(r"(deg|degrees?|nm|um|micron|microns|angstroms?)$")


def plain_name(column: str) -> str:
    """Lower-case letters and digits of a column name, without a unit at its end: `Derot angle (deg)` is derotangle."""
    text = re.sub(r"[^a-z0-9]", "", column.lower())
    return _UNIT.sub("", text) or text


def choose_column(path: Path, columns: Sequence[str], known: Sequence[str], wanted: str | None = None) -> str:
    """Choose a column: the one asked for, else the only one with a known name, else the only one there is.

    Args:
        path: The file, for error messages.
        columns: Names of the numeric columns.
        known: Names that identify the quantity, as returned by `plain_name`.
        wanted: Name of the column that the user asks for.

    Returns:
        The name of the column.

    Raises:
        InputError: If the choice is ambiguous or the column does not exist; the message lists the columns.
    """
    listed = ", ".join(columns) or "none"
    if wanted is not None:
        found = [name for name in columns if name == wanted] or [n for n in columns if n.lower() == wanted.lower()]
        if len(found) != 1:
            raise InputError(f"{path}: has no numeric column {wanted!r}; its numeric columns are: {listed}")
        return found[0]
    named = [name for name in columns if plain_name(name) in known]
    if len(named) == 1 or (not named and len(columns) == 1):
        return (named or list(columns))[0]
    problem = f"{len(named)} of them ({', '.join(named)}) fit" if named else "none has a name that identifies it"
    raise InputError(
        f"{path}: the table has {len(columns)} numeric columns ({listed}), and {problem}; choose one: "
        f"'{path}[col NAME]'"
        if columns
        else f"{path}: the table has 0 numeric columns; save the required one as numbers"
    )
