"""Content of image files, by which a changed file is noticed and a result is known to belong to its input."""

import hashlib
import os
from pathlib import Path
from typing import Any

from pulmo_jax.data.sources.store import in_store, open_store
from pulmo_jax.types import InputError


def fingerprint(path: Path | None) -> list[int] | None:
    """Size, times and inode of a file or of the store that contains it, to detect that it changes during a call.

    Args:
        path: The file; None for no file.

    Returns:
        Size in bytes, times of modification and status change in ns, and inode; None for no file, or a deleted one.
    """
    if path is None:
        return None
    record = in_store(path)
    try:
        status = (record[0] if record else path).stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def content_of(path: Path | None) -> list[Any] | None:
    """Size and SHA-256 of the content of a file, or of the pages of an image in a store.

    Args:
        path: The file; None for no file.

    Returns:
        Size in bytes (of the store, for an image in a store) and digest; None for no file.
    """
    if path is None:
        return None
    if record := in_store(path):
        return [record[0].stat().st_size, open_store(record[0]).content_digest(record[1])]
    with path.open("rb", buffering=0) as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def has_content(path: Path | None, content: Any) -> bool:
    """Whether a file still has the content that `content_of` returned; a file of another size is not read."""
    if path is None or not isinstance(content, list):
        return path is None and content is None
    try:
        if in_store(path) is None and path.stat().st_size != content[0]:
            return False
        now = content_of(path)
    except (InputError, OSError):  # deleted or damaged meanwhile
        return False
    return now is not None and now[1:] == content[1:]  # a store may have grown
