"""Tiles of one fixed shape over an image of any size, and the blend that puts them together again.

Every tile is weighted by a separable Gaussian with sigma = tile / 8 (Isensee et al. 2021, nnU-Net, Nature Methods
18:203). Tiles lie on a product grid, so the sum of weights is a product of two vectors and needs no image. The blend
comes in strips of finished rows, from the top: what is held is one row of tiles, whatever the height of the image.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

AHEAD = 2  # batches that are computed while one is added up
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


def cut_tiles(
    image: Shaped[np.ndarray, "H W ..."], positions: Int[np.ndarray, "B 2"], tile: int
) -> Shaped[np.ndarray, "B tile tile ..."]:
    """The tiles at these positions, as `cut` gives them."""
    height, width, *bands = image.shape
    missing = [(0, max(tile - height, 0)), (0, max(tile - width, 0))] + [(0, 0)] * len(bands)
    if any(after for _, after in missing):
        image = np.pad(image, missing, mode="edge")
    top, bottom = positions[:, 0].min(), positions[:, 0].max() + tile
    rows = np.ascontiguousarray(image[top:bottom]).reshape(bottom - top, -1)
    samples = rows.shape[1] // image.shape[1]  # of a pixel
    windows = np.lib.stride_tricks.sliding_window_view(rows, (tile, tile * samples))
    return windows[positions[:, 0] - top, positions[:, 1] * samples].reshape(-1, tile, tile, *bands)


Maps = Callable[[np.ndarray], Any]  # positions (B, 2) to maps (B, tile, tile, M), an array of NumPy or JAX
Wanted = Callable[[int, np.ndarray], np.ndarray]


def map_tiles(
    function: Maps, shape: tuple[int, int], tile: int, stride: int, batch_size: int
) -> Float[np.ndarray, "H W M"]:
    """The strips of `blend_strips` in one map."""
    strips = blend_strips(function, shape, tile, stride, batch_size)
    y, first = next(strips)
    whole = np.empty((*shape, first.shape[-1]), np.float32)
    whole[y : y + len(first)] = first
    for y, rows in strips:
        whole[y : y + len(rows)] = rows
    return whole


def blend_strips(
    function: Maps,
    shape: tuple[int, int],
    tile: int,
    stride: int,
    batch_size: int,
    wanted: Wanted | None = None,
) -> Iterator[tuple[int, Float[np.ndarray, "h W M"]]]:
    """Blend what `function` gives for every tile: (first row, rows) of consecutive strips, from the top to the bottom.

    function: takes positions (B, 2) as (y, x) and returns maps (B, tile, tile, M). It is always called with
        exactly `batch_size` positions (the last batch repeats its last position), so it compiles once. It is called
        for a batch before the maps of the batch before are looked at: JAX computes the one while NumPy adds the other.
    shape: (H, W) of the image. Every pixel is covered by at least one tile.
    wanted: which of the tiles at row y and columns xs are needed at all, (len(xs),) bool; default: all. Pixels of a
        tile that is left out have no meaning. If none is wanted there are no strips.
    The sum at a pixel is taken in one order, whatever the batch size.
    """
    height, width = shape
    ys, xs = tile_starts(height, tile, stride), tile_starts(width, tile, stride)
    pieces = _by_row(_computed(function, _positions(ys, xs, wanted), batch_size), xs)
    piece = next(pieces, None)
    if piece is None:
        return
    bands = piece[2].shape[-1]
    window = blend_window(tile)
    weight = np.repeat(window[:, None] * window[None, :], bands, axis=1)  # last axes are one: pixels and their bands
    weight_y = summed_weights(ys, tile, height)[:, None]
    weight_x = np.repeat(summed_weights(xs, tile, width), bands)
    row = np.zeros((len(xs), tile, tile * bands), np.float32)
    total = np.zeros((tile, (int(xs[-1]) + tile + stride) * bands), np.float32)
    for y, below in zip(ys.tolist(), [*ys[1:].tolist(), height], strict=True):
        if wanted is not None:
            row[:] = 0
        while piece is not None and piece[0] == y:
            _, columns, maps = piece
            row[columns] = maps.reshape(-1, tile, tile * bands) * weight
            piece = next(pieces, None)
        _add_row(total, row, xs, stride)
        done = below - y
        strip = total[:done, : width * bands] / weight_y[y:below]
        strip /= weight_x
        yield y, strip.reshape(done, width, bands)
        total[: tile - done] = total[done:].copy()
        total[tile - done :] = 0


def _positions(ys: np.ndarray, xs: np.ndarray, wanted: Wanted | None) -> Iterator[np.ndarray]:
    """(n, 2) for each row of tiles: the positions of those that are wanted."""
    for y in ys.tolist():
        columns = xs if wanted is None else xs[wanted(y, xs)]
        yield np.stack([np.full(len(columns), y), columns], axis=-1)


def _computed(
    function: Maps, rows: Iterator[np.ndarray], size: int
) -> Iterator[tuple[Int[np.ndarray, "n 2"], Float[np.ndarray, "n tile tile M"]]]:
    """Batches of positions and their maps; the next batch is under way while one is looked at."""
    under_way: deque = deque()
    for some in batches(rows, size):
        padded = np.pad(some, ((0, size - len(some)), (0, 0)), mode="edge")
        under_way.append((some, function(padded)))
        if len(under_way) > AHEAD:
            some, maps = under_way.popleft()
            yield some, np.asarray(maps)[: len(some)]
    for some, maps in under_way:
        yield some, np.asarray(maps)[: len(some)]


def batches(rows: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The positions (n, 2) of all rows, `size` at a time; the last batch may be shorter."""
    pending = np.empty((0, 2), np.int64)
    for row in rows:
        pending = np.concatenate([pending, row])
        while len(pending) >= size:
            yield pending[:size]
            pending = pending[size:]
    if len(pending):
        yield pending


def _by_row(computed: Iterator, xs: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(y, columns, maps): each batch parted where a row of tiles ends."""
    for positions, maps in computed:
        parts = np.flatnonzero(np.diff(positions[:, 0])) + 1
        for some, values in zip(np.split(positions, parts), np.split(maps, parts), strict=True):
            yield int(some[0, 0]), np.searchsorted(xs, some[:, 1]), values


def _add_row(total: np.ndarray, row: np.ndarray, xs: np.ndarray, stride: int) -> None:
    """Add a row of weighted tiles to the rows of pixels that it covers.

    Every q-th tile of a regular grid can be added at once, q being the number of tiles that cover a pixel.
    """
    n_tiles, tile, samples = row.shape
    bands = samples // tile
    regular = n_tiles - 1 if n_tiles > 1 and xs[-1] - xs[-2] != stride else n_tiles
    q = -(-tile // stride)
    for first in range(min(q, regular)):
        some = row[first:regular:q]
        step, start = q * stride * bands, first * stride * bands
        view = total[:, start : start + len(some) * step].reshape(tile, len(some), step, copy=False)
        view[:, :, :samples] += some.transpose(1, 0, 2)
    if regular < n_tiles:  # the last one, flush with the end
        start = xs[-1] * bands
        total[:, start : start + samples] += row[-1]


def summed_weights(starts: np.ndarray, tile: int, length: int) -> Float[np.ndarray, "length"]:
    """Sum of the blend windows along one axis."""
    window, total = blend_window(tile), np.zeros(max(length, tile), np.float32)
    for start in starts:
        total[start : start + tile] += window
    return total[:length]
