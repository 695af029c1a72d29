"""Stores: any number of images in one HDF5 file, for random access without decoding the original files again.

The dataset /images/HxWxC_dtype holds all pages of that shape and dtype as (N, H, W, C). A page is one chunk, or several
tiles if it is large; chunks are deflated, or stored uncompressed where compression does not pay off. /index has one row
per page (see `store_index.Record`). Attributes of the file hold the schema, its version and the digest of the index.
Chunks are read raw and decompressed here, because HDF5 does both under a global lock, on which threads would wait.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Shaped

from pulmo_jax.data.sources.source import ImageSource, check_page_size, decoding
from pulmo_jax.data.sources.store_chunks import chunk_corners, pixel_sha256, unpack
from pulmo_jax.data.sources.store_index import Record, index_array, index_digest, read_index
from pulmo_jax.data.sources.store_structure import open_pages, read_chunk
from pulmo_jax.types import ImageTags, InputError, Window

index_of, digest = index_array, index_digest  # former names, used by scripts that make stores
MAGIC = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Pages:
    """An open dataset of pages.

    Attributes:
        id: Low-level identifier of the dataset.
        rows: Number of pages.
        chunk: Shape (h, w, C) of a chunk.
        dtype: Data type of the pixels.
    """

    id: Any
    rows: int
    chunk: tuple[int, int, int]
    dtype: np.dtype

    def packed(self, corner: tuple[int, int, int, int]) -> memoryview:
        """Read a chunk without decompressing it.

        Args:
            corner: Index (row, y, x, 0) of its first pixel.

        Returns:
            zlib stream.

        Raises:
            ValueError: The dataset lacks the chunk, or it is larger than any zlib stream of its pixels.
        """
        if corner[0] >= self.rows:
            raise ValueError(f"row {corner[0]} of a dataset of {self.rows} pages")
        return read_chunk(self.id, corner, prod(self.chunk) * self.dtype.itemsize)

    def read(self, corner: tuple[int, int, int, int]) -> Shaped[np.ndarray, "h w C"]:
        """Read a chunk.

        Args:
            corner: Index (row, y, x, 0) of its first pixel.

        Returns:
            Pixels of the chunk.
        """
        return unpack(self.packed(corner), self.chunk, self.dtype)


class Store:
    """A store, open for reading. Threads may share it.

    Args:
        path: The HDF5 file.

    Attributes:
        path: The HDF5 file.
        records: The index, one record per page.
        by_name: The records of each file, by file name.

    Raises:
        InputError: The file cannot be read, is not a store, is of a newer version or is damaged, or has names that are
            not paths inside the store.
    """

    def __init__(self, path: Path):
        self.path = path
        with decoding(path):
            self.file: Any = h5py.File(path, "r")  # its type stubs do not distinguish datasets from groups
        try:
            self.by_name = read_index(path, self.file)
        except BaseException:
            self.file.close()
            raise
        self.records = self.by_name.records
        self.pages: dict[str, Pages] = {}  # open datasets: opening one takes as long as reading a page

    def header(self, name: str, max_bytes: int) -> tuple[int, tuple[int, int, int], str, str, str]:
        """Read the header of a file from the index.

        Args:
            name: Name of the file.
            max_bytes: Limit on the decoded size of a page in bytes.

        Returns:
            Number of pages, shape (H, W, C), dtype, group, and stored dtype if it is another.

        Raises:
            InputError: The pages are empty or exceed the limit.
        """
        pages = self.by_name[name]
        check_page_size(f"{self.path}/{name}", (len(pages), *pages[0].shape), np.dtype(pages[0].dtype), max_bytes)
        return len(pages), pages[0].shape, pages[0].dtype, pages[0].group, pages[0].stored_dtype

    def read(self, record: Record, window: Window | None = None) -> Shaped[np.ndarray, "h w C"]:
        """Read a page or a window of it.

        Args:
            record: The page.
            window: Region to read, in px; None reads the whole page.

        Returns:
            Pixels (h, w, C) in the dtype of the page.
        """
        y, x, h, w = window or (0, 0, record.height, record.width)
        pages = self._pages(record)
        height, width = pages.chunk[:2]
        if (height, width) == (record.height, record.width) == (h, w):
            return pages.read((record.row, 0, 0, 0))
        out = np.empty((h, w, record.channels), pages.dtype)
        for top in range(y - y % height, y + h, height):
            for left in range(x - x % width, x + w, width):
                tile = pages.read((record.row, top, left, 0))
                rows, columns = (slice(max(a, b), min(a + n, b + m)) for a, n, b, m in
                                 ((y, h, top, height), (x, w, left, width)))  # fmt: skip
                part = tile[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
                out[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x] = part
        return out

    def content_digest(self, name: str) -> str:
        """Hash what a file's pages are stored as: shape, dtype and compressed chunks.

        Unlike the hashes in the index, which whoever wrote the store may have chosen freely, it depends on the pixels.

        Args:
            name: Name of the file.

        Returns:
            SHA-256 in hexadecimal.

        Raises:
            InputError: The store has no such file, or its pages cannot be read.
        """
        digest = hashlib.sha256()
        with decoding(self.path / name):
            for record in self.pages_of(name):
                pages = self._pages(record)
                digest.update(f"{record.shape} {record.dtype}\n".encode())
                for top, left in chunk_corners(record.shape, *pages.chunk[:2]):
                    packed = pages.packed((record.row, top, left, 0))
                    digest.update(len(packed).to_bytes(8, "little"))
                    digest.update(packed)
        return digest.hexdigest()

    def pages_of(self, name: str) -> list[Record]:
        """Records of the pages of a file.

        Args:
            name: Name of the file.

        Returns:
            The records, in the order of the pages.

        Raises:
            InputError: The store has no such file.
        """
        records = self.by_name.get(name)
        if records is None:
            raise InputError(f"{self.path}: contains no image {name}; ingest it or correct the name")
        return records

    def _pages(self, record: Record) -> Pages:
        if record.images not in self.pages:
            dtype = np.dtype(record.dtype)
            dataset = open_pages(self.file, record.images, record.shape, dtype)
            self.pages[record.images] = Pages(dataset.id, len(dataset), dataset.chunks[1:], dtype)
        return self.pages[record.images]

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_damaged(store: Store, track: Callable[[Iterable, int], Iterable] = lambda items, _: items) -> list[Record]:
    """Read all pages and compare them with their SHA-256.

    Args:
        store: The store.
        track: Wraps an iterable of known length to show progress.

    Returns:
        Records of the pages that cannot be read or have changed.
    """
    bad = []
    for record in track(store.records, len(store.records)):
        try:
            same = pixel_sha256(store.read(record)) == record.pixels
        except Exception:  # HDF5 and the codec raise various errors on damaged data
            same = False
        bad += [] if same else [record]
    return bad


_open: dict[tuple[Path, int, int, int], Store] = {}
_lock = threading.Lock()


def open_store(path: Path) -> Store:
    """Open a store for reading. It stays open and is shared in this process; a replaced file is opened again.

    Args:
        path: The HDF5 file.

    Returns:
        The store, which must not be closed.

    Raises:
        InputError: The file cannot be read, is not a store, is of a newer version or is damaged.
    """
    with decoding(path):
        status = path.stat()
    key = (path, os.getpid(), status.st_ino, status.st_mtime_ns)  # HDF5 handles do not survive a fork
    with _lock:
        if key not in _open:
            for old in [k for k in _open if k[0] == path]:
                del _open[old]  # closed when its last reader releases it
            _open[key] = Store(path)
        return _open[key]


def is_store(path: Path) -> bool:
    """Whether a path is an HDF5 file; `Store` raises an error for HDF5 files that are not stores."""
    if not path.is_file():
        return False
    with decoding(path), path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_record(path: Path, name: str, max_bytes: int) -> ImageSource:
    """Open an ingested file.

    Args:
        path: The store.
        name: Name of the file in the store.
        max_bytes: Limit on the decoded size of a page in bytes.

    Returns:
        The pages of the file.

    Raises:
        InputError: The store cannot be read or has no such file, or a page exceeds the limit.
    """
    store = open_store(path)
    records = store.pages_of(name)
    shape = (len(records), *records[0].shape)
    check_page_size(path / name, shape, np.dtype(records[0].dtype), max_bytes)
    stored = np.dtype(records[0].stored_dtype) if records[0].stored_dtype else None

    def read_window(page: int, window: Window) -> np.ndarray:
        return store.read(records[page], window)

    return ImageSource(
        path / name, shape, np.dtype(records[0].dtype), ImageTags(), read_window, ExitStack(), stored_dtype=stored
    )


def in_store(path: Path) -> tuple[Path, str] | None:
    """Split STORE.h5/name, the path of an image in a store.

    Args:
        path: Path of an image.

    Returns:
        Path of the store and name of the image; None for any other path.
    """
    if os.path.exists(path):  # unlike Path.exists, these functions raise no error: names in a store can be long
        return None
    for parent in reversed(path.parents):
        if os.path.isfile(parent):
            return parent, path.relative_to(parent).as_posix()
        if not os.path.isdir(parent):
            return None
    return None
