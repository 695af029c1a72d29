"""Places that cannot be written: full, read-only or forbidden. They end a verb in one line that names them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pulmo_jax.types import InputError, OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO, errno.ENODEV)
DESCRIBED = (*FULL, errno.EROFS)  # recognised by their description, too, where a library keeps only that
SHORT_WRITE = " requested and "  # numpy's tofile: "N requested and M written"


def number_of(error: BaseException | None, numbers: tuple[int, ...] = (*FULL, *FORBIDDEN)) -> int | None:
    """Find the error number of the system in an error or its causes, some of which keep only the message.

    Args:
        error: The error; None for none.
        numbers: Numbers to look for.

    Returns:
        The number; None if there is none of these.
    """
    visited: list[BaseException] = []
    while error is not None and error not in visited:
        text = str(error)
        number = getattr(error, "errno", None)
        quoted = [n for n in numbers if f"errno = {n}," in text or (n in DESCRIBED and os.strerror(n) in text)]
        found = [number] if number in numbers else quoted
        if found:
            return found[0]
        if errno.ENOSPC in numbers and isinstance(error, OSError) and SHORT_WRITE in text:
            return errno.ENOSPC
        visited.append(error)
        error = error.__cause__ or error.__context__
    return None


def is_full(error: BaseException | None) -> bool:
    """Whether an error or one of its causes is a full disk, an exhausted quota or a limit on the size of files."""
    return number_of(error, FULL) is not None


def sentence(path: Path | str, number: int) -> str:
    """Describe a place that cannot be written.

    Args:
        path: The file or folder.
        number: Error number of the system.

    Returns:
        The start of an error message, without a full stop.
    """
    if number == errno.EFBIG:
        return f"the limit on the size of files is reached (ulimit -f): {path} could not be written"
    if number in FULL:
        return f"the disk is full: {path} could not be written"
    return f"{path}: cannot be written ({os.strerror(number)})"


@contextmanager
def naming_place(path: Path) -> Iterator[None]:
    """Convert errors of the system while a file is written.

    Args:
        path: The file or folder that is written in the `with` block.

    Raises:
        OutputError: The place is full, read-only or forbidden: no other file could be written there either.
        InputError: This file alone cannot be written, for example because its name is too long.
    """
    try:
        yield
    except (InputError, OutputError):
        raise
    except Exception as error:
        number = number_of(error)
        if number is not None:
            raise OutputError(sentence(path, number)) from error
        if not isinstance(error, OSError) and "embedded null" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        hint = "" if reason == str(error) and isinstance(error, OSError) else "; rename the file that it is named after"
        raise InputError(f"{path}: cannot be written ({reason}){hint}") from error
