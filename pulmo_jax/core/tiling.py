"""Tiles of one fixed shape over an image of any size, and the blend that puts them together again.

Every tile is weighted by a separable Gaussian with sigma = tile / 8 (Isensee et al. 2021, nnU-Net, Nature Methods
18:203). Tiles lie on a product grid, so the sum of weights is a product of two vectors and needs no image.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Shaped

WEIGHT_FLOOR = 1e-3  # a corner covered by one tile only still divides by a number far from rounding errors


def tile_starts(length: int, tile: int, stride: int) -> np.ndarray:
    """First pixels of the tiles along one axis: every `stride`, the last one flush with the end.

    A `length` below `tile` gives the single start 0: the tile reaches beyond the image and is padded.
    """
    if not 1 <= stride <= tile:
        raise ValueError(f"stride is {stride}; it must be 1 to {tile} (the tile), or pixels would be left out")
    last = max(length - tile, 0)
    return np.unique(np.append(np.arange(0, last, stride), last))


def blend_window(tile: int) -> Float[np.ndarray, "tile"]:
    """Weights along one axis of a tile, symmetric, 1 at the centre."""
    offset = np.arange(tile) - (tile - 1) / 2
    return np.maximum(np.exp(-0.5 * (offset / (tile / 8)) ** 2), WEIGHT_FLOOR).astype(np.float32)


def cut(image: Shaped[np.ndarray, "H W ..."], y: int, x: int, tile: int) -> Shaped[np.ndarray, "tile tile ..."]:
    """One tile of the image; beyond the image's end its last pixels are repeated."""
    crop = image[y : y + tile, x : x + tile]
    missing = [(0, tile - crop.shape[0]), (0, tile - crop.shape[1])] + [(0, 0)] * (crop.ndim - 2)
    return np.pad(crop, missing, mode="edge") if crop.shape[:2] != (tile, tile) else crop


def batches(positions: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive slices of `size` positions; the last may be shorter."""
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def map_tiles(
    function: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, int],
    tile: int,
    stride: int,
    batch_size: int,
) -> Float[np.ndarray, "H W M"]:
    """Blend what `function` gives for every tile into one map.

    function: takes positions (B, 2) as (y, x) and returns maps (B, tile, tile, M). It is always called with
        exactly `batch_size` positions (the last batch repeats its last position), so it compiles once.
    shape: (H, W) of the image. Every pixel is covered by at least one tile.
    """
    height, width = shape
    ys, xs = tile_starts(height, tile, stride), tile_starts(width, tile, stride)
    window = blend_window(tile)
    weight = window[:, None] * window[None, :]
    total: np.ndarray | None = None
    positions = np.stack(np.meshgrid(ys, xs, indexing="ij"), axis=-1).reshape(-1, 2)
    for some in batches(positions, batch_size):
        padded = np.pad(some, ((0, batch_size - len(some)), (0, 0)), mode="edge")
        maps = function(padded)[: len(some)]
        if total is None:
            total = np.zeros((height, width, maps.shape[-1]), np.float32)
        for (y, x), values in zip(some, maps, strict=True):
            target = total[y : y + tile, x : x + tile]
            target += (values * weight[..., None])[: target.shape[0], : target.shape[1]]
    assert total is not None  # there is always at least one tile
    total /= summed_weights(ys, tile, height)[:, None, None]
    total /= summed_weights(xs, tile, width)[None, :, None]
    return total


def summed_weights(starts: np.ndarray, tile: int, length: int) -> Float[np.ndarray, "length"]:
    """Sum of the blend windows along one axis."""
    window, total = blend_window(tile), np.zeros(max(length, tile), np.float32)
    for start in starts:
        total[start : start + tile] += window
    return total[:length]
