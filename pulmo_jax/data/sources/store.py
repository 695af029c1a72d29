"""A store: any number of images in one HDF5 file, read at random without decoding their files anew.

/images/HxWxC_dtype holds all pages of that shape, (N, H, W, C): a chunk a page, or several tiles of a large one, each
deflated. /index has a row a page (`Record`). The file's attributes name schema and version, and hold the digest of the
index. Chunks are read raw and inflated here: HDF5 does both under one lock, so that threads would wait for each other.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import numpy as np

from pulmo_jax.data.sources.source import ImageSource, check_page_size, decoding
from pulmo_jax.types import ImageTags, InputError, Window

MAGIC = b"\x89HDF\r\n\x1a\n"
SCHEMA, VERSION = "pulmo_jax.store", 1
WHOLE_BYTES = 4 * 2**20  # a page up to this size is one chunk
TILE_PX = 512  # of a larger one


@dataclass(frozen=True)
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


KINDS = {str: h5py.string_dtype(), int: np.dtype(np.int64)}
INDEX = np.dtype([(f.name, np.dtype(np.uint64) if f.name == "look" else KINDS[f.type]) for f in fields(Record)])  # pyright: ignore[reportArgumentType]


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
        self.by_name: dict[str, list[Record]] = {}
        for record in self.records:
            self.by_name.setdefault(record.name, []).append(record)

    def read(self, record: Record, window: Window | None = None) -> np.ndarray:
        """(h, w, C) in the page's own dtype."""
        y, x, h, w = window or (0, 0, record.height, record.width)
        dataset = self.file[f"images/{record.images}"]
        tall, wide = dataset.chunks[1:3]
        if (tall, wide) == (record.height, record.width) == (h, w):
            return self._chunk(dataset, (record.row, 0, 0, 0))
        out = np.empty((h, w, record.channels), dataset.dtype)
        for top in range(y - y % tall, y + h, tall):
            for left in range(x - x % wide, x + w, wide):
                tile = self._chunk(dataset, (record.row, top, left, 0))
                rows, columns = (slice(max(a, b), min(a + n, b + m)) for a, n, b, m in
                                 ((y, h, top, tall), (x, w, left, wide)))  # fmt: skip
                part = tile[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
                out[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = part
        return out

    def _chunk(self, dataset: Any, corner: tuple[int, ...]) -> np.ndarray:
        _, packed = dataset.id.read_direct_chunk(corner)
        return unpack(packed, dataset.chunks[1:], dataset.dtype)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_index(path: Path, file: Any) -> list[Record]:
    schema, version = file.attrs.get("schema"), file.attrs.get("version")
    if schema != SCHEMA:
        raise InputError(f"{path}: is an HDF5 file but no store; `python -m pulmo_jax.ingest` makes one from a folder")
    if not isinstance(version, np.integer | int) or version > VERSION:
        raise InputError(f"{path}: is a store of version {version}, this program reads up to {VERSION}; update it")
    with decoding(path):
        rows = file["index"][()]
        values: list[list[Any]] = [[v.decode() if isinstance(v, bytes) else int(v) for v in row] for row in rows]
        records = [Record(*row) for row in values]
    if digest(records) != file.attrs.get("digest"):
        raise InputError(f"{path}: its index is not as it was written, the file is damaged; ingest the images again")
    return records


def digest(records: Sequence[Record]) -> str:
    return hashlib.sha256(json.dumps([list(asdict(r).values()) for r in records]).encode()).hexdigest()


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
    planes = tile.reshape(-1, 1).view(np.uint8).reshape(-1, tile.itemsize)
    return bytes(imagecodecs.deflate_encode(planes.T.tobytes(), level=1, raw=False))


def unpack(packed: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = prod(shape)
    flat = imagecodecs.deflate_decode(packed, out=size * dtype.itemsize, raw=False)
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
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix()
        if parent.exists():
            return None
    return None


def describe(records: Sequence[Record]) -> dict[str, Any]:
    """metadata.json."""
    return {"schema": SCHEMA, "version": VERSION, "digest": digest(records), "records": [asdict(r) for r in records]}
