"""Structure of a store's HDF5 file, checked before its data are read.

HDF5 is more general than a store. Links can lead to other files, virtual and external datasets read other files, and
compressed data can expand without limit. So only plain datasets are accepted, chunks are read raw into buffers of
bounded size, and they are decompressed here.
"""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5s, h5t, h5z  # pyright: ignore[reportAttributeAccessIssue]

from pulmo_jax.data.sources.store_chunks import chunk_shape, unpack
from pulmo_jax.host.resources import host_memory_bytes
from pulmo_jax.types import InputError

ROWS_PER_CHUNK = 1024  # of the index
MAX_TEXT_BYTES = 2**16  # width of a text column
_MAX_INDEX_RATIO, _MIN_INDEX_LIMIT = 32, 128 * 2**20  # size in memory relative to that of the file; of small files
_FREE_MEMORY_FACTOR = 3  # names are copied and sorted
_CHECKED_BYTES = 64 * 2**20  # smaller allocations are not compared with the free memory
_FILTERS = [h5z.FILTER_SHUFFLE, h5z.FILTER_DEFLATE]


def open_plain(group: Any, name: str, kind: type) -> Any:
    """Open a group or dataset that is stored in the file itself.

    Args:
        group: The group that contains it.
        name: Its name.
        kind: h5py.Group or h5py.Dataset.

    Returns:
        The open object. A dataset has fixed-size elements, and is contiguous or has shuffled and deflated chunks.

    Raises:
        ValueError: It is a link, is of another kind, or its data are elsewhere or stored in another way.
    """
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"/{name} is a link")
    found = group[name]
    if not isinstance(found, kind):
        raise ValueError(f"/{name} is a {type(found).__name__.lower()}")
    if isinstance(found, h5py.Dataset):
        _check_storage(found.id, name)
    return found


def _check_storage(dataset: Any, name: str) -> None:
    stored = dataset.get_create_plist()
    layout, filters = stored.get_layout(), [stored.get_filter(k)[0] for k in range(stored.get_nfilters())]
    if layout not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED) or stored.get_external_count():
        raise ValueError(f"/{name} keeps its data in other datasets or files")
    if filters != (_FILTERS if layout == h5d.CHUNKED else []):
        raise ValueError(f"/{name} has filters {filters[:9]}; chunks must be shuffled and deflated")


def read_chunk(dataset: Any, corner: tuple[int, ...], size: int) -> memoryview:
    """Read the compressed bytes of a chunk.

    Args:
        dataset: Low-level identifier of the dataset.
        corner: Index of the first element of the chunk.
        size: Decompressed size of the chunk in bytes.

    Returns:
        zlib stream.

    Raises:
        ValueError: The chunk is larger than any zlib stream of its data, or is not compressed.
    """
    buffer = np.empty(size + size // 64 + 1024, np.uint8)
    skipped_filters, packed = dataset.read_direct_chunk(corner, out=buffer)
    if skipped_filters:
        raise ValueError("a chunk is not shuffled and deflated")
    return packed


def read_rows(path: Path, file: Any, columns: dict[str, type]) -> np.ndarray:
    """Read the table of an index.

    Args:
        path: The store, for error messages.
        file: The open HDF5 file.
        columns: Name and type (str or int) of each column.

    Returns:
        Structured array (N,) with text of fixed length.

    Raises:
        ValueError: The table has other columns, other types, another shape or another layout.
        InputError: The table is too large for the file or for the free memory.
    """
    index = open_plain(file, "index", h5py.Dataset).id
    dtype, shape = _row_dtype(index.get_type(), columns), index.shape
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"/index has shape {shape}")
    _check_index_size(path, shape[0] * dtype.itemsize)
    rows = np.empty(shape, dtype)
    stored = index.get_create_plist()
    if stored.get_layout() != h5d.CHUNKED:
        if index.get_storage_size() != rows.nbytes:
            raise ValueError("/index is incomplete")
        index.read(h5s.ALL, h5s.ALL, rows, index.get_type())
        return rows
    (length,) = stored.get_chunk()
    if length != min(ROWS_PER_CHUNK, shape[0]):
        raise ValueError(f"/index has chunks of {length} rows")
    for start in range(0, shape[0], length):
        chunk = unpack(read_chunk(index, (start,), length * dtype.itemsize), (length,), dtype)
        rows[start : start + length] = chunk[: shape[0] - start]
    return rows


def _row_dtype(kind: Any, columns: dict[str, type]) -> np.dtype:
    """The type of a row, without gaps between its columns."""
    if kind.get_class() != h5t.COMPOUND or kind.get_nmembers() != len(columns):
        raise ValueError(f"/index does not have the columns {', '.join(columns)}")
    fields = []
    for k, (name, expected) in enumerate(columns.items()):
        member = kind.get_member_type(k)
        if kind.get_member_name(k) != name.encode():
            raise ValueError(f"column {k} of /index is not {name}")
        fields.append((name, _column_dtype(member, name, expected)))
    dtype = np.dtype(fields)
    if dtype.itemsize != kind.get_size():
        raise ValueError(f"a row of /index takes {kind.get_size()} bytes instead of {dtype.itemsize}")
    return dtype


def _column_dtype(member: Any, name: str, expected: type) -> np.dtype:
    size = member.get_size()
    if expected is str:
        if member.get_class() == h5t.STRING and member.is_variable_str():
            raise ValueError("it is of an early version, with text of variable length; ingest the images again")
        if member.is_variable_str() or not 1 <= size <= MAX_TEXT_BYTES:
            raise ValueError(f"column {name} of /index is not text of a fixed length of 1 to {MAX_TEXT_BYTES} bytes")
        return np.dtype(f"S{size}")
    if member.get_class() != h5t.INTEGER or size != 8 or (member.get_sign() == h5t.SGN_NONE) != (name == "look"):
        raise ValueError(f"column {name} of /index is not a 64-bit integer")
    order = ">" if member.get_order() == h5t.ORDER_BE else "<"
    return np.dtype(f"{order}{'u' if name == 'look' else 'i'}8")


def _check_index_size(path: Path, size: int) -> None:
    limit = max(_MIN_INDEX_LIMIT, _MAX_INDEX_RATIO * path.stat().st_size)
    if size > limit:
        raise InputError(f"{path}: damaged: its index takes {size / 2**20:.0f} MB, too much for a file of its size")
    needed, free = _FREE_MEMORY_FACTOR * size, host_memory_bytes()
    if size > _CHECKED_BYTES and free is not None and needed > free:
        raise InputError(
            f"{path}: its index needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free; "
            "close other programs or ingest the images into several stores"
        )


def open_pages(file: Any, images: str, shape: tuple[int, int, int], dtype: np.dtype) -> Any:
    """Open the dataset of the pages of one shape and dtype.

    Args:
        file: The open HDF5 file.
        images: Name of the dataset below /images.
        shape: Shape (H, W, C) of its pages.
        dtype: Dtype of its pages.

    Returns:
        The dataset.

    Raises:
        ValueError: The dataset has another shape, dtype, chunk shape or layout.
    """
    dataset = open_plain(open_plain(file, "images", h5py.Group), images, h5py.Dataset)
    found = (dataset.id.get_type().dtype, dataset.id.shape[1:], dataset.chunks)
    if found != (dtype, shape, (1, *chunk_shape(shape, dtype))):
        kind, size, chunks = found
        raise ValueError(f"/images/{images} has pages {size} of {kind} in chunks {chunks}"[:300])
    return dataset
