"""CSV tables that no spreadsheet runs: text stays text, whatever it begins with."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from pulmo_jax.host.console import printable

FORMULA = frozenset("=+-@\uff1d\uff0b\uff0d\uff20")  # a spreadsheet runs text that begins so, some in full width


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]], digits: str | None = None) -> str:
    """Format a table as CSV.

    Text, such as the name of an image, is written as `text_cell`; numbers, also negative ones, stay numbers.

    Args:
        columns: Column names.
        rows: Cells of each row: text, numbers, or None for an empty cell.
        digits: Format of numbers other than integers, such as ".8g"; those that are not finite become empty cells.
            None: all digits.

    Returns:
        CSV text.
    """

    def cell(value: Any) -> Any:
        if isinstance(value, str):
            return text_cell(value)
        if digits is None or value is None or isinstance(value, int):
            return value
        return format(value, digits) if math.isfinite(value) else ""

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in (columns, *rows))
    return text.getvalue()


def text_cell(text: str) -> str:
    """Escape text for a cell of a table.

    Args:
        text: Any text.

    Returns:
        Printable text on one line. If a spreadsheet would run it as a formula, it follows an apostrophe (OWASP, CSV
        injection); so does text that already begins with such an apostrophe, so that `cell_text` inverts this.
    """
    shown = printable(text, keep="")
    return f"'{shown}" if starts_formula(shown) else shown


def cell_text(cell: str) -> str:
    """Remove the apostrophe that `text_cell` has put in front.

    Args:
        cell: Content of a cell.

    Returns:
        The text; control characters stay escaped.
    """
    return cell[1:] if cell.startswith("'") and starts_formula(cell) else cell


def starts_formula(text: str) -> bool:
    """Whether text begins as a formula does, after any apostrophes."""
    return bool(rest := text.lstrip("'")) and rest[0] in FORMULA
