"""Bounded reading of the files of a checkpoint, which may come from elsewhere.

Orbax writes arrays in the zarr format, a JSON header and Zstandard-compressed chunks each, into an OCDBT database:
manifests and B-tree nodes, which contain short values, and data files with the long ones. Its reader allocates the
chunks that a header declares: an array of 8 kB with such a header took 8.6 GB (tensorstore 0.1.86). Here the folder is
compared with the manifest of the checkpoint, every node is unpacked within a bound before tensorstore does, and chunks
are fetched as they are stored and unpacked into the bytes that the manifest declares. Only what Orbax writes for this
package is accepted.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import tensorstore
from imagecodecs import ZstdError, zstd_decode

from pulmo_jax.host.reading import parse_json
from pulmo_jax.types import InputError

STATE = "state"
FILES = re.compile(
    r"state/(_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas/process_[0-9]{1,6}"
    r"|(ocdbt\.process_[0-9]{1,6}/)?(manifest\.ocdbt|d/[0-9a-f]{1,64}))"
)
DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|bfloat16|float8_\w{1,20}")
MAX_DIMENSIONS = 32
SPARE_BYTES, SPARE_BYTES_OF_ARRAY = 2**20, 2**14  # headers and metadata of Orbax, for older manifests without sizes
SMALL_BYTES, MAX_RATIO = 2**28, 64  # arrays larger than this in total must not be compressed more than this
HEADER_BYTES, CHECKSUM_BYTES = 14, 4  # of a node or manifest: magic, length, version, compression; CRC-32C
MAGIC = re.compile(rb"\x0c\xdb(?:\x3a\x2a|\x20\xde|\x12\x34)")  # manifest, B-tree node, version tree node
LONGEST_MAGIC = 4
NODE_BYTES, NODE_BYTES_OF_ARRAY = 2**23, 2**14
ZARR_BYTES = 4096


class FormatError(InputError):
    """A checkpoint differs from what Orbax writes for this package."""


def array_bytes(arrays: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of all arrays that a manifest declares.

    Args:
        arrays: Shape and dtype of every array by name.

    Returns:
        Bytes.

    Raises:
        FormatError: A declaration is not valid.
    """
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in map(declared, arrays.values()))


def declared(array: Mapping[str, Any]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype that a manifest declares for an array. Raises FormatError if they are not valid."""
    shape, dtype = array.get("shape"), array.get("dtype")
    if not (isinstance(dtype, str) and DTYPES.fullmatch(dtype) and isinstance(array.get("sha256"), str)):
        raise FormatError(f"the manifest declares an array of type {str(dtype)[:40]}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"the manifest declares an array of shape {str(shape)[:100]}")
    try:
        return tuple(shape), jnp.dtype(dtype)
    except TypeError as error:
        raise FormatError(f"the manifest declares an array of type {dtype}") from error


def require_same_files(
    folder: Path, listed: Mapping[str, str], sizes: Mapping[str, int], arrays: Mapping[str, Mapping[str, Any]]
) -> dict[str, int]:
    """Compare the files of a checkpoint with its manifest, without opening them.

    Args:
        folder: Folder of the checkpoint.
        listed: Files that the manifest lists.
        sizes: Size of every file; empty in manifests of older versions.
        arrays: Arrays that the manifest declares.

    Returns:
        Size of every file in bytes.

    Raises:
        FormatError: Files are missing or additional, have other sizes, or cannot hold the declared arrays.
    """
    wrong = [name for name in listed if not FILES.fullmatch(name)]
    if wrong:
        raise FormatError(f"{folder}: the manifest lists {wrong[0][:100]!r}, which is not a file of a checkpoint")
    found = dict(files_below(folder / STATE, STATE))
    for name in sorted(set(listed) - set(found)):
        raise FormatError(f"{folder / name}: cannot be read (it is missing, or not a regular file)")
    for name in sorted(set(found) - set(listed)):
        raise FormatError(f"{folder}: contains {name[:100]!r}, which the manifest does not list")
    for name, size in sizes.items():
        if found.get(name) != size:
            raise FormatError(f"{folder / name[:100]}: {found.get(name)} bytes, damaged, the manifest says {size}")
    stored, needed = sum(found.values()), array_bytes(arrays)
    if stored > 2 * needed + SPARE_BYTES + SPARE_BYTES_OF_ARRAY * len(arrays):
        raise FormatError(f"{folder}: files of {stored:,} bytes for arrays of {needed:,}")
    if needed > max(SMALL_BYTES, MAX_RATIO * stored):
        raise FormatError(f"{folder}: files of {stored:,} bytes cannot contain the arrays of {needed:,} bytes")
    return found


def files_below(folder: Path, prefix: str, depth: int = 4) -> Iterator[tuple[str, int]]:
    """Relative names and sizes of the regular files below a folder; other entries have the size -1.

    Args:
        folder: The folder.
        prefix: Prefix of the names.
        depth: Number of levels of folders.

    Yields:
        Name and size in bytes.
    """
    try:
        entries = list(itertools.islice(os.scandir(folder), 10_000))
    except OSError as error:
        raise FormatError(f"{folder}: cannot be read ({error.strerror})") from error
    for entry in entries:
        name = f"{prefix}/{entry.name}"
        if entry.is_dir(follow_symlinks=False) and depth:
            yield from files_below(Path(entry.path), name, depth - 1)
        elif entry.is_file(follow_symlinks=False):
            yield name, entry.stat(follow_symlinks=False).st_size
        else:
            yield f"{name} (not a regular file)", -1


class NodeCheck:
    """Unpacks every node of an OCDBT file within a bound; a node is recognised by its magic number.

    Args:
        path: The file, for error messages.
        left: Bytes to which the nodes may unpack, `node_bytes` for all files of a checkpoint.
    """

    def __init__(self, path: Path, left: int):
        self.path, self.left, self.tail = path, left, b""

    def __call__(self, file: BinaryIO, block: bytes, offset: int) -> None:
        """Check the nodes that begin in a block of a file, for `pulmo_jax.host.reading.sha256_of`.

        Args:
            file: The open file.
            block: Content from `offset`.
            offset: Offset of the block in the file.

        Raises:
            FormatError: The nodes unpack to more than those of an honest checkpoint, or are not valid.
        """
        joined = block if offset == 0 else self.tail + block
        start = offset + len(block) - len(joined)
        for match in MAGIC.finditer(joined):
            self.check(file, start + match.start())
        self.tail = joined[1 - LONGEST_MAGIC :]

    def check(self, file: BinaryIO, start: int) -> None:
        """Check the node at an offset, unless its length shows that it is none."""
        descriptor = file.fileno()
        head = os.pread(descriptor, HEADER_BYTES, start)
        length = int.from_bytes(head[LONGEST_MAGIC:12], "little")
        if not HEADER_BYTES + CHECKSUM_BYTES < length <= os.fstat(descriptor).st_size - start:
            return
        if head[12:] not in (b"\0\0", b"\0\1") or length > self.left:
            raise FormatError(f"{self.path}: has an index that Orbax does not write")
        body = os.pread(descriptor, length, start)[HEADER_BYTES:-CHECKSUM_BYTES]
        self.left -= unpacked_size(body, self.left, self.path) if head[13] else len(body)
        if self.left <= 0:
            raise FormatError(f"{self.path}: its index is too long for its arrays")


def node_bytes(n_arrays: int) -> int:
    """Bytes to which all nodes of a checkpoint of `n_arrays` arrays may unpack."""
    return NODE_BYTES + NODE_BYTES_OF_ARRAY * n_arrays


def unpacked_size(content: bytes, limit: int, path: Path) -> int:
    """Bytes of Zstandard data; raise FormatError if there are more than `limit`, or they are damaged."""
    try:
        return len(zstd_decode(content, out=limit))
    except ZstdError as error:
        raise FormatError(f"{path}: its index is damaged, or unpacks to more than {limit:,} bytes") from error


def read_arrays(folder: Path, arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Read arrays of a checkpoint whose files have been checked.

    Args:
        folder: Folder of the checkpoint.
        arrays: Shape and dtype of the wanted arrays by name.

    Returns:
        The arrays by name.

    Raises:
        FormatError: An array is not stored as declared.
        ValueError: tensorstore cannot read the database.
    """
    base = {"driver": "file", "path": f"{folder.absolute() / STATE}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    return {name: read_array(store, name, *declared(array), folder) for name, array in arrays.items()}


def read_array(
    store: tensorstore.KvStore, name: str, shape: tuple[int, ...], dtype: np.dtype, folder: Path
) -> np.ndarray:
    """Read an array in the zarr format.

    Args:
        store: Database.
        name: Name of the array.
        shape: Declared shape.
        dtype: Declared dtype.
        folder: Folder of the checkpoint, for error messages.

    Returns:
        The array.

    Raises:
        FormatError: It is not stored as declared.
    """
    where = f"{folder}: the array {name}"
    header = store.read(f"{name}/.zarray").result().value
    if not 0 < len(header) <= ZARR_BYTES:
        raise FormatError(f"{where} has no valid header")
    chunk, packed = chunk_of(parse_json(header, folder / STATE), shape, dtype, where)
    array = np.empty(shape, dtype)
    for index in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunk, strict=True))):
        content = store.read(f"{name}/{'.'.join(map(str, index)) or '0'}").result().value
        part = chunk_values(content, math.prod(chunk) * dtype.itemsize, packed, where).view(dtype).reshape(chunk)
        place = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))
        array[place] = part[tuple(slice(0, n) for n in array[place].shape)]
    return array


def chunk_of(header: Any, shape: tuple[int, ...], dtype: np.dtype, where: str) -> tuple[tuple[int, ...], bool]:
    """Shape of the chunks of an array, and whether they are compressed.

    Args:
        header: Content of .zarray.
        shape: Declared shape.
        dtype: Declared dtype.
        where: Array, for error messages.

    Returns:
        Shape, and True for Zstandard.

    Raises:
        FormatError: The header does not fit the declaration, or its options are not those of Orbax.
    """
    typestr = dtype.name if dtype.kind == "V" or dtype.name.startswith(("bfloat", "float8")) else dtype.str
    expected = {"zarr_format": 2, "shape": list(shape), "dtype": typestr, "order": "C", "filters": None}
    header = header if isinstance(header, dict) else {}
    chunk, compressor = header.get("chunks"), header.get("compressor")
    codec = compressor.get("id") if isinstance(compressor, dict) else compressor
    valid = isinstance(chunk, list) and len(chunk) == len(shape) and all(type(c) is int for c in chunk)
    if (
        any(header.get(key) != value for key, value in expected.items())
        or codec not in (None, "zstd")
        or header.get("dimension_separator", ".") != "."
        or not valid
        or not all(1 <= c <= max(n, 1) for n, c in zip(shape, chunk, strict=True))
    ):
        raise FormatError(f"{where} is not stored as the manifest declares, {dtype} of shape {shape}")
    return tuple(chunk), codec is not None


def chunk_values(content: bytes, size: int, packed: bool, where: str) -> np.ndarray:
    """Bytes of a chunk, unpacked into exactly as many as declared; raise FormatError if there are more or fewer."""
    values = bytearray(size)
    try:
        found = zstd_decode(content, out=values) if packed else content
    except ZstdError as error:
        raise FormatError(f"{where} is damaged, or unpacks to more than the declared {size:,} bytes") from error
    if len(found) != size:
        raise FormatError(f"{where} has {len(found):,} bytes instead of {size:,}")
    return np.frombuffer(found, np.uint8)
