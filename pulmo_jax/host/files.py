"""Atomic writing of files, which are recorded in their output folder (see `pulmo_jax.host.outputs`)."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pulmo_jax.host.marks import TEMPORARY
from pulmo_jax.host.outputs import adding
from pulmo_jax.host.places import naming_place


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Write a file under a temporary name and rename it when the block succeeds, so no partial file is ever visible.

    Args:
        path: The file to write; its folder is created if necessary.
        temporary: Temporary name in the same folder; None: one of this process.

    Yields:
        The temporary path to write to.

    Raises:
        InputError: The file exists and was not written by pulmo_jax, or this file cannot be written.
        OutputError: The place is full, read-only or forbidden.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    with naming_place(path):
        adding(temporary, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically.

    Args:
        path: The file to write.
        write: Function that writes to the temporary path passed to it.
    """
    with replacing(path) as temporary:
        write(temporary)


def write_text(path: Path, text: str) -> None:
    """Write text atomically, in UTF-8.

    Args:
        path: The file to write.
        text: Its content.
    """
    atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically.

    Args:
        path: The file to write.
        value: JSON-serialisable value without NaN or infinity.
    """
    atomically(path, lambda temporary: dump_json(temporary, value))


def dump_json(path: Path, value: Any) -> None:
    """Write JSON without holding the whole text in memory; the file is not recorded and not replaced atomically.

    Args:
        path: The file to write.
        value: JSON-serialisable value without NaN or infinity.
    """
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
