"""Chunks of a store: pages are split into tiles, byte-shuffled and deflated, as by HDF5's built-in filters."""

import hashlib
from math import prod
from typing import Any, cast

import imagecodecs
import numpy as np
from jaxtyping import Shaped

MAX_CHUNK_BYTES = 4 * 2**20  # larger pages are split into tiles
TILE_PX = 512
MAX_RATIO = 0.25  # a chunk is compressed only if a sample shrinks to at most this fraction
SAMPLE_BYTES, SAMPLE_STRIDE = 256, 4096  # the sample takes this many bytes of every so many


def chunk_shape(shape: tuple[int, int, int], dtype: np.dtype) -> tuple[int, int, int]:
    """Shape of the chunks of a page: the whole page, or tiles of a large one.

    Args:
        shape: Shape (H, W, C) of the page in px.
        dtype: Dtype of the page.

    Returns:
        Shape (h, w, C) of a chunk in px.
    """
    if prod(shape) * dtype.itemsize <= MAX_CHUNK_BYTES:
        return shape
    return min(shape[0], TILE_PX), min(shape[1], TILE_PX), shape[2]


def chunk_corners(shape: tuple[int, ...], height: int, width: int) -> list[tuple[int, int]]:
    """Upper left corners of the chunks of a page, in row-major order.

    Args:
        shape: Shape (H, W, C) of the page in px.
        height: Height of a chunk in px.
        width: Width of a chunk in px.

    Returns:
        Corners (y, x) in px.
    """
    return [(top, left) for top in range(0, shape[0], height) for left in range(0, shape[1], width)]


def split_into_chunks(page: Shaped[np.ndarray, "H W C"]) -> list[Shaped[np.ndarray, "h w C"]]:
    """Split a page into chunks in row-major order.

    Args:
        page: Pixels of the page.

    Returns:
        Chunks of equal shape; those that extend beyond the page are padded with 0.
    """
    height, width, _ = chunk_shape(page.shape, page.dtype)
    return [
        _padded(page[top : top + height, left : left + width], height, width)
        for top, left in chunk_corners(page.shape, height, width)
    ]


def _padded(tile: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad a tile at the bottom and right with 0."""
    if tile.shape[:2] == (height, width):
        return np.ascontiguousarray(tile)
    out = np.zeros((height, width, tile.shape[2]), tile.dtype)
    out[: tile.shape[0], : tile.shape[1]] = tile
    return out


def pack(chunk: Shaped[np.ndarray, "h w C"]) -> bytes:
    """Compress a chunk with HDF5's shuffle and deflate filters; an incompressible chunk is stored uncompressed.

    Args:
        chunk: Pixels of the chunk.

    Returns:
        zlib stream.
    """
    planes = np.ascontiguousarray(chunk.reshape(-1, 1).view(np.uint8).reshape(-1, chunk.itemsize).T).reshape(-1)
    return _deflated(planes, int(_is_compressible(planes)))


def unpack(packed: bytes | memoryview, shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """Decompress a chunk.

    Args:
        packed: zlib stream.
        shape: Shape of the chunk.
        dtype: Dtype of the chunk.

    Returns:
        Values of the chunk.

    Raises:
        Exception: The stream is damaged or does not decompress to exactly this size; it is never decompressed further.
    """
    size, stream = prod(shape), cast(Any, packed)
    flat = imagecodecs.deflate_decode(stream, out=bytearray(size * dtype.itemsize), raw=False)
    planes = np.frombuffer(flat, np.uint8).reshape(dtype.itemsize, size)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)


def _deflated(values: Any, level: int) -> bytes:
    """Compress to a zlib stream; level 0 stores the bytes uncompressed."""
    packed: Any = imagecodecs.deflate_encode(values, level=level, raw=False)
    return packed


def _is_compressible(planes: np.ndarray) -> bool:
    """Whether a sample of the chunk compresses well; chunks that do not are stored, which also makes reading faster."""
    whole = planes[: planes.size // SAMPLE_STRIDE * SAMPLE_STRIDE]
    sample = np.ascontiguousarray(whole.reshape(-1, SAMPLE_STRIDE)[:, :SAMPLE_BYTES])
    return len(_deflated(sample, 1)) <= MAX_RATIO * sample.size


def pixel_sha256(page: Shaped[np.ndarray, "H W C"]) -> str:
    """Hash the pixels of a page.

    Args:
        page: Pixels of the page.

    Returns:
        SHA-256 in hexadecimal.
    """
    return hashlib.sha256(np.ascontiguousarray(page).data).hexdigest()
