"""Weights in files of PyTorch, in the zip format (since 1.6) and the one before, without unpickling anything."""

import math
import mmap
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from pulmo_jax.data.weights.tensor_pickle import MalformedError, Storage, Tensor, read_value
from pulmo_jax.host.reading import open_regular
from pulmo_jax.types import InputError

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MOST_PICKLE_BYTES = 64 * 2**20  # of data.pkl, which only names the tensors
MOST_DEPTH, MOST_VALUES = 16, 1_000_000  # of nested dicts
MOST_SHARED = 4  # tensors of this many times the size of the file, because they may share values
LITTLE = b"little"
ZIP = b"PK\x03\x04"
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError, RuntimeError)
DAMAGED += (OSError, OverflowError, zipfile.BadZipFile, zlib.error)
Weights = dict[str, np.ndarray]


def read_torch(path: Path) -> Weights:
    """Read the tensors of a state dict.

    Args:
        path: File written by torch.save: a state dict, or a dict that contains one.

    Returns:
        Arrays by name; the names of nested dicts are joined by dots.

    Raises:
        InputError: If it is not such a file, is damaged, or contains anything but tensors.
    """
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            weights = _read_zip(file, path) if content[:4] == ZIP else _read_legacy(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise InputError(f"{path}: is damaged, or no weights of PyTorch ({error})") from error
    if not weights:
        raise InputError(f"{path}: contains no tensors; give a state dict, written by torch.save(model.state_dict())")
    return weights


def _read_legacy(file: mmap.mmap) -> Weights:
    """Five pickles (magic, protocol, system, content, keys), then the number and the values of each storage."""
    if (read_value(file), read_value(file)) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise MalformedError("another magic number")
    if read_value(file).get("little_endian") is not True:
        raise MalformedError("values are not little-endian")
    tensors, keys = tensors_in(read_value(file)), read_value(file)
    storages = storages_of(tensors, len(file))
    values = {}
    for key in keys:
        storage, count = storages.get(str(key)), int.from_bytes(file.read(8), "little")
        if storage is None or count != storage.count:
            raise MalformedError(f"storage {key} is not the one described")
        values[storage.key] = _array(file.read(count * dtype_of(storage).itemsize), storage)
    return {name: view_of(tensor, values[tensor.storage.key]) for name, tensor in tensors.items()}


def _read_zip(file: BinaryIO, path: Path) -> Weights:
    """NAME/data.pkl describes the tensors, NAME/data/KEY has the values of a storage."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise MalformedError("without data.pkl")
        root = names[0].removesuffix("data.pkl")
        if archive.getinfo(names[0]).file_size > MOST_PICKLE_BYTES:
            raise MalformedError(f"data.pkl is larger than {MOST_PICKLE_BYTES // 2**20} MiB")
        if f"{root}byteorder" in archive.namelist():
            with archive.open(f"{root}byteorder") as order:
                if order.read(len(LITTLE) + 1) != LITTLE:
                    raise MalformedError("values are not little-endian")
        tensors = tensors_in(read_value(BytesIO(archive.read(names[0]))))
        values = {}
        for storage in storages_of(tensors, path.stat().st_size).values():
            entry = archive.getinfo(f"{root}data/{storage.key}")
            if entry.file_size != storage.count * dtype_of(storage).itemsize:
                raise MalformedError(f"storage {storage.key} has {entry.file_size} bytes")
            values[storage.key] = _array(archive.read(entry), storage)
    return {name: view_of(tensor, values[tensor.storage.key]) for name, tensor in tensors.items()}


def tensors_in(content: Any) -> dict[str, Tensor]:
    """List the tensors of nested dicts by name.

    Args:
        content: What a pickle describes.

    Returns:
        Tensors by name; everything else, such as the number of an epoch, is left out.

    Raises:
        MalformedError: If dicts are nested too deeply, or contain each other.
    """
    found: dict[str, Tensor] = {}
    waiting, visited = [(0, "", content)], 0
    while waiting:
        depth, name, value = waiting.pop()
        visited += 1
        if depth > MOST_DEPTH or visited > MOST_VALUES:
            raise MalformedError(f"dicts nested more than {MOST_DEPTH} deep, or more than {MOST_VALUES:,} values")
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict):
            within = [(depth + 1, f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
            waiting += reversed(within)
    return found


def storages_of(tensors: Mapping[str, Tensor], file_bytes: int) -> dict[str, Storage]:
    """List the storages of tensors, and bound the memory that they need by the size of the file.

    Args:
        tensors: Tensors by name.
        file_bytes: Size of the file in bytes.

    Returns:
        Storages by key.

    Raises:
        MalformedError: If the storages, or the tensors that share them, are too large for the file.
    """
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    if sum(storage.count * dtype_of(storage).itemsize for storage in storages.values()) > file_bytes:
        raise MalformedError("describes more values than the file has")
    sizes = (math.prod(tensor.shape) * dtype_of(tensor.storage).itemsize for tensor in tensors.values())
    if sum(sizes) > MOST_SHARED * file_bytes:
        raise MalformedError(f"describes tensors of more than {MOST_SHARED} times the size of the file")
    return storages


def dtype_of(storage: Storage) -> np.dtype:
    """Type of the values of a storage, little-endian."""
    if storage.dtype == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(storage.dtype).newbyteorder("<")


def _array(values: bytes, storage: Storage) -> np.ndarray:
    if len(values) != storage.count * dtype_of(storage).itemsize:
        raise MalformedError(f"ends within storage {storage.key}")
    return np.frombuffer(values, dtype_of(storage))


def view_of(tensor: Tensor, values: np.ndarray) -> np.ndarray:
    """Copy a tensor from the values of its storage.

    Args:
        tensor: Shape and strides of the tensor.
        values: All values of its storage.

    Returns:
        The array, contiguous.

    Raises:
        MalformedError: If it reaches beyond the values.
    """
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    size = math.prod(tensor.shape)
    if size and (last >= len(values) or size > len(values)):
        raise MalformedError("a tensor reaches beyond its values")
    strides = [step * values.itemsize for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view).reshape(tensor.shape)
