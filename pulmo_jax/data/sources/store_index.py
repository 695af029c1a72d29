"""The index of a store: one record per page, kept as a table in the HDF5 file and as STORE.h5.json beside it."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints, overload

import h5py
import numpy as np

from pulmo_jax.data.sources.source import decoding
from pulmo_jax.data.sources.store_attributes import read_attributes
from pulmo_jax.data.sources.store_structure import read_rows
from pulmo_jax.data.sources.store_values import check_names, check_values
from pulmo_jax.types import InputError

SCHEMA = "pulmo_jax.store"
VERSION = 2  # with the column stored_dtype; a store that does not need it is written as version 1


@dataclass(frozen=True, slots=True)
class Record:
    """One page of an ingested file.

    Attributes:
        name: Path of the file relative to the ingested folder, separated by "/".
        page: Index of the page, from 0.
        pages: Number of pages in the file.
        label: First folder of `name`, or "" without a folder.
        group: Images of one group stay on one side of every split.
        content: SHA-256 of the file.
        pixels: SHA-256 of the decoded page.
        look: Perceptual hash of the page.
        height: Height in px.
        width: Width in px.
        channels: Number of channels.
        dtype: Data type of the pixels, such as "uint16".
        file_bytes: Size of the file in bytes.
        images: Name of the dataset below /images that holds the page.
        row: Row of the page in this dataset.
        stored_dtype: Data type of the samples in the file, if it declared missing pixels and integers therefore became
            floats; "" if it is `dtype`.
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
    stored_dtype: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) in px."""
        return self.height, self.width, self.channels

    @property
    def title(self) -> str:
        """The name, with the page index if the file has several pages."""
        return self.name if self.pages == 1 else f"{self.name}[{self.page}]"


COLUMNS: dict[str, type] = get_type_hints(Record)
NAMES = tuple(COLUMNS)


class Records(Sequence[Record]):
    """The records of an index. They are created on access, which saves memory for large stores.

    Args:
        rows: The table of the index.
    """

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return Records(self.rows[index])
        values: list[Any] = [v.decode() if isinstance(v, bytes) else v for v in self.rows[index].tolist()]
        return Record(*values)

    def __len__(self) -> int:
        return len(self.rows)


def names_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The columns that records need: the last one, stored_dtype, only if a record has it.

    Args:
        records: Records of all pages.

    Returns:
        Names of the columns.
    """
    if isinstance(records, Records):
        return tuple(name for name in NAMES if name in (records.rows.dtype.names or ()))
    return NAMES if any(record.stored_dtype for record in records) else NAMES[:-1]


def version_of(records: Sequence[Record]) -> int:
    """The lowest version of a store that can hold the records, so that older programs read what they can."""
    return VERSION if len(names_of(records)) == len(NAMES) else VERSION - 1


class Files(Mapping[str, list[Record]]):
    """The pages of each ingested file, by file name.

    Args:
        records: The index.
    """

    def __init__(self, records: Records):
        self.records, self.names = records, records.rows["name"].astype("S")
        self.order = np.argsort(self.names, kind="stable")

    def __getitem__(self, name: str) -> list[Record]:
        key = name.encode(errors="surrogateescape")
        start, stop = (np.searchsorted(self.names, key, side, self.order) for side in ("left", "right"))
        if start == stop:
            raise KeyError(name)
        return [self.records[row] for row in self.order[start:stop].tolist()]

    def __iter__(self) -> Iterator[str]:
        return (name.decode() for name, _ in groupby(self.names[self.order]))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_index(path: Path, file: Any) -> "Files":
    """Read and verify the index of a store.

    Args:
        path: The store, for error messages.
        file: The open HDF5 file.

    Returns:
        The records by file.

    Raises:
        InputError: The file is not a store, is of a newer version, has a damaged index or has names that are not paths
            inside the store.
    """
    with decoding(path):
        attributes = read_attributes(file)
        version = attributes.get("version")
        if attributes.get("schema") != SCHEMA:
            raise InputError(f"{path}: is an HDF5 file but not a store; make one with `python -m pulmo_jax.ingest`")
        if not isinstance(version, int) or version > VERSION:
            raise InputError(
                f"{path}: has store version {version}, but this program reads versions up to {VERSION}; update it"
            )
        rows = read_rows(path, file, COLUMNS if version == VERSION else {name: COLUMNS[name] for name in NAMES[:-1]})
        check_names(path, rows["name"])
        if index_digest(Records(rows)) != attributes.get("digest"):
            raise InputError(f"{path}: damaged: its index does not match its digest; ingest the images again")
        files = Files(Records(rows))
        check_values(rows, files.order)
        return files


def index_array(records: Sequence[Record]) -> np.ndarray:
    """Convert records to the table of an index.

    Strings have fixed length, that of the longest one, because HDF5 reads variable-length strings individually and
    keeps them all in memory.

    Args:
        records: Records of all pages.

    Returns:
        Structured array (N,).
    """

    def column_dtype(name: str, kind: Any) -> np.dtype:
        if kind is str:
            return h5py.string_dtype(length=max(1, *(len(getattr(record, name).encode()) for record in records)))
        return np.dtype(np.uint64 if name == "look" else np.int64)

    names = names_of(records)
    values = attrgetter(*names)
    rows = [tuple(v.encode() if isinstance(v, str) else v for v in values(record)) for record in records]
    return np.array(rows, [(name, column_dtype(name, COLUMNS[name])) for name in names])


def index_digest(records: Sequence[Record]) -> str:
    """SHA-256 of the JSON text of all values, computed without storing that text in memory.

    Args:
        records: Records of all pages.

    Returns:
        Digest in hexadecimal.
    """
    sha256, separator, values = hashlib.sha256(b"["), "", attrgetter(*names_of(records))
    for record in records:
        sha256.update((separator + json.dumps(values(record))).encode())
        separator = ", "
    sha256.update(b"]")
    return sha256.hexdigest()


def as_metadata(records: Sequence[Record]) -> dict[str, Any]:
    """Content of STORE.h5.json.

    Args:
        records: Records of all pages.

    Returns:
        JSON-serialisable dictionary.
    """
    names = names_of(records)
    values = attrgetter(*names)
    rows = [dict(zip(names, values(record), strict=True)) for record in records]
    return {"schema": SCHEMA, "version": version_of(records), "digest": index_digest(records), "records": rows}
