"""A store: any number of images in one HDF5 file, read at random without decoding their files anew.

/images/HxWxC_dtype holds all pages of that shape, (N, H, W, C): a chunk a page, or several tiles of a large one, each
deflated, the most at level 0: as they are. /index has a row a page (`Record`). The file's attributes name schema and
version, and hold the digest of the index. Chunks are read raw and inflated here: HDF5 does both under one lock, so that
threads would wait for each other.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import groupby
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, overload

import h5py
import imagecodecs
import numpy as np

from pulmo_jax.data.sources.source import ImageSource, check_page_size, decoding
from pulmo_jax.types import ImageTags, InputError, Window

MAGIC = b"\x89HDF\r\n\x1a\n"
SCHEMA, VERSION = "pulmo_jax.store", 1
WHOLE_BYTES = 4 * 2**20  # a page up to this size is one chunk
TILE_PX = 512  # of a larger one
WORTH = 0.25  # a chunk is deflated where that makes so much of it or less
SAMPLE, EVERY = 256, 4096  # to see that, so many bytes of so many are


@dataclass(frozen=True, slots=True)
class Record:
    """One page of one file, and where it is.

    name: the file's path relative to the folder that was ingested. label: its first folder, "" where it lies in none.
    group: what must stay together in a split. content: SHA-256 of the file. pixels: SHA-256 of the page's bytes. look:
    its perceptual hash. file_bytes: size of the file. images, row: the dataset below /images, and the place in it.
    """

    name: str
    page: int
    pages: int
    label: str
    group: str
    content: str
    pixels: str
    look: int
    height: int
    width: int
    channels: int
    dtype: str
    file_bytes: int
    images: str
    row: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.height, self.width, self.channels

    @property
    def title(self) -> str:
        return self.name if self.pages == 1 else f"{self.name}[{self.page}]"


NAMES = tuple(f.name for f in fields(Record))
VALUES = attrgetter(*NAMES)


class Records(Sequence[Record]):
    """The rows of an index: a record is made when it is asked for, so that many cost little."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> "Records": ...
    def __getitem__(self, place: int | slice) -> "Record | Records":
        if isinstance(place, slice):
            return Records(self.rows[place])
        values: list[Any] = [v.decode() if isinstance(v, bytes) else v for v in self.rows[place].tolist()]
        return Record(*values)

    def __len__(self) -> int:
        return len(self.rows)


class Files(Mapping[str, list[Record]]):
    """The pages of each file that was ingested, by its name."""

    def __init__(self, records: Records):
        self.records, self.names = records, records.rows["name"].astype("S")
        self.order = np.argsort(self.names, kind="stable")

    def __getitem__(self, name: str) -> list[Record]:
        wanted = name.encode(errors="surrogateescape")
        start, stop = (np.searchsorted(self.names, wanted, side, self.order) for side in ("left", "right"))
        if start == stop:
            raise KeyError(name)
        return [self.records[place] for place in self.order[start:stop].tolist()]

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name, _ in groupby(self.names[self.order]))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Pages:
    """A dataset of pages, opened."""

    id: Any
    chunk: tuple[int, int, int]
    dtype: np.dtype

    def read(self, corner: tuple[int, int, int, int]) -> np.ndarray:
        _, packed = self.id.read_direct_chunk(corner)
        return unpack(packed, self.chunk, self.dtype)


class Store:
    """A store, opened for reading by any number of threads. Raises InputError for what is none, or is of a newer
    version, or is damaged."""

    def __init__(self, path: Path):
        self.path = path
        with decoding(path):
            self.file: Any = h5py.File(path, "r")  # its stubs know no dataset from a group
        try:
            self.records = read_index(path, self.file)
        except BaseException:
            self.file.close()
            raise
        self.by_name = Files(self.records)
        self.pages: dict[str, Pages] = {}  # by dataset; to open one takes as long as to read from it

    def header(self, name: str, max_bytes: int) -> tuple[int, tuple[int, int, int], str, str]:
        """Pages, shape, dtype and group of a file."""
        pages = self.by_name[name]
        check_page_size(f"{self.path}/{name}", (len(pages), *pages[0].shape), np.dtype(pages[0].dtype), max_bytes)
        return len(pages), pages[0].shape, pages[0].dtype, pages[0].group

    def read(self, record: Record, window: Window | None = None) -> np.ndarray:
        """(h, w, C) in the page's own dtype."""
        y, x, h, w = window or (0, 0, record.height, record.width)
        pages = self._pages(record.images)
        tall, wide = pages.chunk[:2]
        if (tall, wide) == (record.height, record.width) == (h, w):
            return pages.read((record.row, 0, 0, 0))
        out = np.empty((h, w, record.channels), pages.dtype)
        for top in range(y - y % tall, y + h, tall):
            for left in range(x - x % wide, x + w, wide):
                tile = pages.read((record.row, top, left, 0))
                rows, columns = (slice(max(a, b), min(a + n, b + m)) for a, n, b, m in
                                 ((y, h, top, tall), (x, w, left, wide)))  # fmt: skip
                part = tile[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
                out[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = part
        return out

    def _pages(self, images: str) -> "Pages":
        if images not in self.pages:
            dataset = self.file[f"images/{images}"]
            self.pages[images] = Pages(dataset.id, dataset.chunks[1:], dataset.dtype)
        return self.pages[images]

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_index(path: Path, file: Any) -> Records:
    schema, version = file.attrs.get("schema"), file.attrs.get("version")
    if schema != SCHEMA:
        raise InputError(f"{path}: is an HDF5 file but no store; `python -m pulmo_jax.ingest` makes one from a folder")
    if not isinstance(version, np.integer | int) or version > VERSION:
        raise InputError(f"{path}: is a store of version {version}, this program reads up to {VERSION}; update it")
    with decoding(path):
        records = Records(file["index"][()])
        found = digest(records)
    if found != file.attrs.get("digest"):
        raise InputError(f"{path}: its index is not as it was written, the file is damaged; ingest the images again")
    return records


def index_of(records: Sequence[Record]) -> np.ndarray:
    """Strings are as long as the longest: HDF5 reads those of any length one by one, and keeps them all in memory."""

    def kind(name: str, of: Any) -> np.dtype:
        if of is str:
            return h5py.string_dtype(length=max(1, *(len(getattr(record, name).encode()) for record in records)))
        return np.dtype(np.uint64 if name == "look" else np.int64)

    rows = [tuple(v.encode() if isinstance(v, str) else v for v in VALUES(record)) for record in records]
    return np.array(rows, [(f.name, kind(f.name, f.type)) for f in fields(Record)])


def digest(records: Iterable[Record]) -> str:
    """SHA-256 of the JSON of all values, which is never there as a whole."""
    found, separator = hashlib.sha256(b"["), ""
    for record in records:
        found.update((separator + json.dumps(VALUES(record))).encode())
        separator = ", "
    found.update(b"]")
    return found.hexdigest()


def damaged(store: Store, track: Callable[[Iterable, int], Iterable] = lambda items, _: items) -> list[Record]:
    """The records whose pixels are not those that were put in."""
    bad = []
    for record in track(store.records, len(store.records)):
        try:
            same = pixel_digest(store.read(record)) == record.pixels
        except Exception:  # whatever HDF5 or the codec says of damaged bytes
            same = False
        bad += [] if same else [record]
    return bad


def pixel_digest(page: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(page).data).hexdigest()


# --- chunks


def chunk_shape(shape: tuple[int, int, int], dtype: np.dtype) -> tuple[int, int, int]:
    """Of a page: itself, or tiles."""
    if prod(shape) * dtype.itemsize <= WHOLE_BYTES:
        return shape
    return min(shape[0], TILE_PX), min(shape[1], TILE_PX), shape[2]


def tiles_of(page: np.ndarray) -> list[np.ndarray]:
    """The chunks of a page, row by row; the last ones are filled up with 0."""
    tall, wide, _ = chunk_shape(page.shape, page.dtype)
    return [
        filled(page[top : top + tall, left : left + wide], tall, wide) for top, left in corners(page.shape, tall, wide)
    ]


def corners(shape: tuple[int, ...], tall: int, wide: int) -> list[tuple[int, int]]:
    return [(top, left) for top in range(0, shape[0], tall) for left in range(0, shape[1], wide)]


def filled(tile: np.ndarray, tall: int, wide: int) -> np.ndarray:
    if tile.shape[:2] == (tall, wide):
        return np.ascontiguousarray(tile)
    out = np.zeros((tall, wide, tile.shape[2]), tile.dtype)
    out[: tile.shape[0], : tile.shape[1]] = tile
    return out


def pack(tile: np.ndarray) -> bytes:
    """HDF5's filters shuffle and deflate: the bytes of all values by their place in the value, then zlib."""
    planes = np.ascontiguousarray(tile.reshape(-1, 1).view(np.uint8).reshape(-1, tile.itemsize).T).reshape(-1)
    return deflated(planes, int(shrinks(planes)))


def deflated(values: Any, level: int) -> bytes:
    """An array as zlib's stream: its level 0 stores the bytes as they are."""
    packed: Any = imagecodecs.deflate_encode(values, level=level, raw=False)
    return packed


def shrinks(planes: np.ndarray) -> bool:
    """Whether a sample says that deflating is worth its time; what is not is only wrapped, which is read faster too."""
    sample = np.ascontiguousarray(planes[: planes.size // EVERY * EVERY].reshape(-1, EVERY)[:, :SAMPLE])
    return len(deflated(sample, 1)) <= WORTH * sample.size


def unpack(packed: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = prod(shape)
    flat = imagecodecs.deflate_decode(packed, out=bytearray(size * dtype.itemsize), raw=False)
    planes = np.frombuffer(flat, np.uint8).reshape(dtype.itemsize, size)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)


# --- stores that are open


_open: dict[tuple[Path, int, int, int], Store] = {}
_lock = threading.Lock()


def opened(path: Path) -> Store:
    """A store that this process reads, opened once and kept; a file that has been replaced is opened anew."""
    with decoding(path):
        status = path.stat()
    key = (path, os.getpid(), status.st_ino, status.st_mtime_ns)  # handles do not survive a fork
    with _lock:
        if key not in _open:
            for old in [k for k in _open if k[0] == path]:
                del _open[old]  # its last reader closes it
            _open[key] = Store(path)
        return _open[key]


def is_store(path: Path) -> bool:
    """Whether it is an HDF5 file; `Store` says whether it is one of ours."""
    if not path.is_file():
        return False
    with decoding(path), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_record(path: Path, name: str, max_bytes: int) -> ImageSource:
    """The pages of one file that was ingested."""
    store = opened(path)
    records = store.by_name.get(name)
    if records is None:
        raise InputError(f"{path}: holds no {name}")
    shape = (len(records), *records[0].shape)
    check_page_size(path / name, shape, np.dtype(records[0].dtype), max_bytes)
    tags = ImageTags()
    return ImageSource(
        path / name, shape, np.dtype(records[0].dtype), tags, lambda p, w: store.read(records[p], w), ExitStack()
    )


def in_store(path: Path) -> tuple[Path, str] | None:
    """(store, name) of STORE.h5/name, the path of a record; None for any other path."""
    if os.path.exists(path):  # it says no where the system may not tell
        return None
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix()
        if parent.exists():
            return None
    return None


def describe(records: Sequence[Record]) -> dict[str, Any]:
    """metadata.json."""
    rows = [dict(zip(NAMES, VALUES(record), strict=True)) for record in records]
    return {"schema": SCHEMA, "version": VERSION, "digest": digest(records), "records": rows}
