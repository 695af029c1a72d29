"""Names of parts of files, in the syntax of CFITSIO and ds9: `cube.fits[SCI]`, `table.fits[1][col PARANG]`."""

import re
from dataclasses import dataclass
from pathlib import Path

_PART = re.compile(
    r"(?P<file>.+?)(\[(?!col\s)(?P<extension>[^\[\]]+)\])?(\[col\s+(?P<column>[^\[\]]+)\])?", re.IGNORECASE | re.DOTALL
)


@dataclass(frozen=True)
class FilePart:
    """A file, or an extension or a column of it.

    Attributes:
        file: The file.
        extension: Number (0: primary), EXTNAME, or EXTNAME,EXTVER of a FITS extension.
        column: Name of a column of a FITS table or of a text file with a header line.
    """

    file: Path
    extension: str | None = None
    column: str | None = None


def split_part(path: Path) -> FilePart:
    """Split FILE[EXT][col NAME] into its components.

    A file whose own name ends in brackets is taken as it is.

    Args:
        path: Path of a file, with up to two selectors in brackets.

    Returns:
        The components; the whole path as the file if there is no file without the brackets either.
    """
    if not path.is_file() and (match := _PART.fullmatch(str(path))) and Path(match["file"]).is_file():
        return FilePart(Path(match["file"]), *(text and text.strip() for text in match.group("extension", "column")))
    return FilePart(path)


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths name the same existing file, or parts of it."""
    return split_part(one).file.samefile(split_part(other).file)


def is_part(path: Path) -> bool:
    """Whether a path names an extension or a column of a file."""
    return split_part(path).file != path
