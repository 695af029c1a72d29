"""The record of the files in an output folder, in its file MARK (see `pulmo_jax.host.outputs`).

The first line names the kind of results; each further line is the path of a file, relative to the folder, as JSON.
"""

import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from pulmo_jax.host.places import naming_place
from pulmo_jax.types import InputError

MARK = ".pulmo_jax"
FORMAT = "pulmo_jax output 1"
TEMPORARY = ".writing"  # suffix of the temporary name of a file
UNFINISHED = f"{MARK}{TEMPORARY}"  # temporary name of the record itself
MAX_MARK_BYTES = 2**30  # of some million files


def adopt(folder: Path, kind: str, paths: Iterable[Path]) -> None:
    """Make a record for a folder that an older version wrote, which kept none.

    Args:
        folder: The output folder.
        kind: What it holds.
        paths: Its files.
    """
    write_mark(absolute(folder), kind, sorted(path.relative_to(folder).as_posix() for path in paths))


def check_kind(folder: Path, found: str, kind: str) -> None:
    """Raise InputError if a folder holds results of another kind."""
    if found != kind:
        raise InputError(f"{folder}: holds results of `{found}`, not of `{kind}`; give another folder")


def read_mark(folder: Path, kind: str) -> list[str]:
    """Read the record of an output folder; paths that leave the folder are ignored, as is a truncated last line.

    Args:
        folder: The folder.
        kind: What it must hold.

    Returns:
        Paths relative to the folder; empty without a record.

    Raises:
        InputError: The folder holds something else, or the record cannot be read.
    """
    path = folder / MARK
    if not os.path.lexists(path):
        return []
    first, *lines = read_lines(path)
    check_kind(folder, header_kind(path, first), kind)
    names = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            name = json.loads(line)
            if isinstance(name, str) and is_inside(name):
                names.append(name)
    return names


def kind_of(folder: Path) -> str:
    """What an output folder holds, according to its record. Raises InputError without a valid record."""
    path = folder / MARK
    return header_kind(path, read_lines(path)[0])


def read_lines(path: Path) -> list[str]:
    """Lines of a record; at least one."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MARK_BYTES:
        raise InputError(f"{path}: is not a record of pulmo_jax; give another output folder")
    return path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]


def header_kind(path: Path, line: str) -> str:
    """Kind in the first line of a record."""
    try:
        header = json.loads(line)
        if header["format"] == FORMAT and isinstance(header["kind"], str):
            return header["kind"]
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(f"{path}: is not a record of pulmo_jax; give another output folder")


def write_mark(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Write the record atomically."""
    lines = [json.dumps({"format": FORMAT, "kind": kind}), *map(json.dumps, names)]
    temporary = folder / UNFINISHED
    with naming_place(folder):
        if os.path.lexists(temporary) and not is_unfinished(temporary):
            raise InputError(f"{temporary}: exists and was not written by pulmo_jax; move it away")
        try:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            os.replace(temporary, folder / MARK)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def is_unfinished(path: Path) -> bool:
    """Whether a file is the start of a record, which a killed process left."""
    start = json.dumps({"format": FORMAT})[:-1].encode()
    return path.is_file() and start.startswith(path.read_bytes()[: len(start)])


def is_inside(name: str) -> bool:
    """Whether a path of a record stays in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts and "\0" not in name


def is_ours(path: Path, folder: Path) -> bool:
    """Whether a recorded path exists and no folder on the way to it is a link."""
    between = (parent for parent in path.parents if parent != folder and parent.is_relative_to(folder))
    return os.path.lexists(path) and not any(parent.is_symlink() for parent in between)


def absolute(path: Path) -> Path:
    """Absolute path without `..` and `.`; links are not resolved."""
    return Path(os.path.abspath(path))
