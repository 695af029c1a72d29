"""Standard output and error that never fail: the work of a verb does not depend on who reads its messages."""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

MODES = ("r", "w", "w")  # of the descriptors 0 to 2


class Unbreakable(io.RawIOBase):
    """Raw output that drops what cannot be written: a closed pipe, a full disk, a terminal that is gone.

    Args:
        raw: The raw output.

    Attributes:
        broken: Whether something has been dropped.
    """

    def __init__(self, raw: Any):
        self._raw, self.broken = raw, False

    def writable(self) -> bool:
        """Whether it can be written to."""
        return True

    def fileno(self) -> int:
        """The file descriptor."""
        return self._raw.fileno()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        """Write bytes, and wait for a slow reader of a pipe that does not block."""
        try:
            while (count := self._raw.write(data)) is None:
                select.select([], [self._raw], [])
            return count
        except OSError:
            self.broken = True
            return len(data)


def guard_streams() -> None:
    """Make standard output and error usable whatever becomes of them. Call it before any file is opened.

    Closed descriptors 0 to 2 are opened on the null device, because the next file to be opened would get their
    number and then the messages. Errors of writing are dropped, and characters that the encoding of a stream lacks
    are escaped. Streams that a program has replaced, such as in a notebook, stay as they are.
    """
    for descriptor, (name, mode) in enumerate(zip(("stdin", "stdout", "stderr"), MODES, strict=True)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            os.dup2(opened, descriptor, inheritable=True)
            if opened != descriptor:
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, unbreakable(stream))


def unbreakable(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Wrap a text stream so that writing to it never fails."""
    with suppress(OSError):
        stream.flush()
    inner = stream.buffer
    raw = Unbreakable(inner.raw if isinstance(inner, io.BufferedWriter) else inner)  # not buffered with python -u
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def reader_left() -> bool:
    """Whether a part of standard output has been dropped, because its reader has closed the pipe, as `head` does."""
    buffer = sys.stdout.buffer if isinstance(sys.stdout, io.TextIOWrapper) else None
    return isinstance(buffer, io.BufferedWriter) and isinstance(buffer.raw, Unbreakable) and buffer.raw.broken
