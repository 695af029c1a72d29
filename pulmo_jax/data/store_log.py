"""The log of an unfinished ingestion: decoded and compressed pages, appended to a file.

Killing the process does not damage the log. When ingestion resumes, entries with a valid checksum are used, up to the
first truncated one. The log is not synced to disk, so a crash of the machine may lose entries, but never corrupts data.
"""

import json
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pulmo_jax.data.sources.source import decoding
from pulmo_jax.host.places import naming_place

HEAD = b"pulmo_jax store part 2\n"
SIZES = struct.Struct("<QI")  # length of the JSON text, and CRC-32 of the JSON text and the chunks


@dataclass(frozen=True)
class Entry:
    """A page to append.

    Attributes:
        facts: Values of its record (see `store_index.Record`), as far as known.
        chunks: Compressed chunks of its pixels.
    """

    facts: dict[str, Any]
    chunks: list[bytes]


@dataclass(frozen=True)
class Logged:
    """A page in the log.

    Attributes:
        facts: Values of its record (see `store_index.Record`), as far as known.
        start: Offset of its first chunk in the file in bytes.
        lengths: Length of each chunk in bytes.
    """

    facts: dict[str, Any]
    start: int
    lengths: list[int]


def is_log(path: Path) -> bool:
    """Whether a file is a log, possibly one without entries whose head was not completely written."""
    if not path.is_file():
        return False
    with decoding(path), path.open("rb") as file:
        head = file.read(len(HEAD))
    return HEAD.startswith(head)


class Log:
    """A log file, open for reading and appending. Threads may share it.

    Args:
        path: The file, which is created if necessary. Invalid entries at its end are removed.

    Attributes:
        entries: The valid entries.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        with naming_place(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self.entries = list(self._valid_entries())

    def _valid_entries(self) -> Iterator[Logged]:
        """The entries before the first truncated or damaged one, where the file is then truncated."""
        size, valid_end = self.path.stat().st_size, len(HEAD)
        self.file.seek(0)
        if self.file.read(len(HEAD)) != HEAD:
            self.file.seek(0)
            self._write(HEAD)
            self.file.truncate()
        while len(sizes := self.file.read(SIZES.size)) == SIZES.size:
            length, checksum = SIZES.unpack(sizes)
            text = self.file.read(min(length, size))
            try:
                facts = json.loads(text)
                lengths = facts.pop("chunk_bytes")
            except (ValueError, AttributeError, KeyError):
                break
            start, actual = self.file.tell(), zlib.crc32(text)
            if start + sum(lengths) > size:
                break
            for chunk in lengths:
                actual = zlib.crc32(self.file.read(chunk), actual)
            if actual != checksum:
                break
            valid_end = self.file.tell()
            yield Logged(facts, start, lengths)
        self.file.seek(valid_end)
        self.file.truncate()

    def append(self, entry: Entry) -> None:
        """Append a page.

        Args:
            entry: The page.

        Raises:
            OutputError: The place is full; earlier entries remain valid.
        """
        lengths = [len(chunk) for chunk in entry.chunks]
        text = json.dumps(entry.facts | {"chunk_bytes": lengths}).encode()
        checksum = zlib.crc32(text)
        for chunk in entry.chunks:
            checksum = zlib.crc32(chunk, checksum)
        with self.lock, naming_place(self.path):
            self._write(SIZES.pack(len(text), checksum) + text)
            start = self.file.tell()
            for chunk in entry.chunks:
                self._write(chunk)
            self.entries.append(Logged(entry.facts, start, lengths))

    def _write(self, content: bytes) -> None:
        """Write all bytes: an unbuffered file may write a part of them, and raises an error for the rest."""
        rest = memoryview(content)
        while len(rest):
            rest = rest[self.file.write(rest) :]

    def chunks(self, entry: Logged) -> list[bytes]:
        """Read the compressed chunks of an entry.

        Args:
            entry: Entry of the log.

        Returns:
            Compressed chunks.
        """
        self.file.seek(entry.start)
        return [self.file.read(length) for length in entry.lengths]

    def close(self) -> None:
        """Close the file."""
        self.file.close()
