"""Atomic writing of files."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name and rename it when the block succeeds, so no partial file is ever visible.

    Args:
        path: The file to write; its folder is created if necessary.

    Yields:
        The temporary path to write to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
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
    """Write JSON atomically, without holding the whole text in memory.

    Args:
        path: The file to write.
        value: JSON-serialisable value without NaN or infinity.
    """

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, allow_nan=False)
            file.write("\n")

    atomically(path, write)
