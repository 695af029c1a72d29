"""The unfinished part of a store: pages that are decoded and packed, one after another, in a file that a kill cannot
harm. What is whole of it is used when ingesting goes on, by its checksums; an entry that is cut off ends it.

Nothing waits for the disk here: where the machine goes down, not the process alone, work is lost and nothing else."""

import json
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = b"pulmo_jax store part 2\n"
SIZES = struct.Struct("<QI")  # of the JSON, and the checksum of JSON and chunks


@dataclass(frozen=True)
class Entry:
    """A page: what is known of it, and its packed chunks."""

    facts: dict[str, Any]
    chunks: list[bytes]


@dataclass(frozen=True)
class Logged:
    """An entry that is in the log: where its chunks begin, and how long each is."""

    facts: dict[str, Any]
    start: int
    lengths: list[int]


class Log:
    """Opened for appending, by any number of threads; `entries` are those that are whole."""

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("r+b" if path.exists() else "w+b")
        self.entries = list(self._whole())

    def _whole(self) -> Iterator[Logged]:
        """Those before the first that is cut off or damaged, after which the file is cut."""
        size, good = self.path.stat().st_size, len(HEAD)
        self.file.seek(0)
        if self.file.read(len(HEAD)) != HEAD:
            self.file.seek(0)
            self.file.write(HEAD)
            self.file.truncate()
        while len(sizes := self.file.read(SIZES.size)) == SIZES.size:
            length, checksum = SIZES.unpack(sizes)
            text = self.file.read(min(length, size))
            try:
                facts = json.loads(text)
                lengths = facts.pop("chunk_bytes")
            except (ValueError, AttributeError, KeyError):
                break
            start, found = self.file.tell(), zlib.crc32(text)
            if start + sum(lengths) > size:
                break
            for chunk in lengths:
                found = zlib.crc32(self.file.read(chunk), found)
            if found != checksum:
                break
            good = self.file.tell()
            yield Logged(facts, start, lengths)
        self.file.seek(good)
        self.file.truncate()

    def append(self, entry: Entry) -> None:
        """OSError, such as of a full disk, leaves those before."""
        lengths = [len(chunk) for chunk in entry.chunks]
        text = json.dumps(entry.facts | {"chunk_bytes": lengths}).encode()
        checksum = zlib.crc32(text)
        for chunk in entry.chunks:
            checksum = zlib.crc32(chunk, checksum)
        with self.lock:
            self.file.write(SIZES.pack(len(text), checksum) + text)
            start = self.file.tell()
            for chunk in entry.chunks:
                self.file.write(chunk)
            self.file.flush()
            self.entries.append(Logged(entry.facts, start, lengths))

    def chunks(self, entry: Logged) -> list[bytes]:
        self.file.seek(entry.start)
        return [self.file.read(length) for length in entry.lengths]

    def close(self) -> None:
        self.file.close()
