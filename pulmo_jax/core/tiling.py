"""Tiles of one fixed shape over an image of any size, and the blend that puts them together again, on the device.

Every tile is weighted by a separable Gaussian with sigma = tile / 8 (Isensee et al. 2021, nnU-Net, Nature Methods
18:203). Tiles lie on a product grid, so the sum of weights is a product of two vectors and needs no image. The image is
blended in strips of rows, from the top, so that memory does not grow with its height. Shapes of arrays are rounded up,
so that few compiled programs serve images of all sizes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

AHEAD = 3  # batches that may wait on the device for their turn
WEIGHT_FLOOR = 1e-3  # a corner covered by one tile only still divides by a number far from rounding errors

Wanted = Callable[[int, Int[np.ndarray, "n"]], np.ndarray]


def tile_starts(length: int, tile: int, stride: int) -> Int[np.ndarray, "n"]:
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


def summed_weights(starts: Int[np.ndarray, "n"], tile: int, length: int) -> Float[np.ndarray, "length"]:
    """Sum of the blend windows along one axis."""
    window, total = blend_window(tile), np.zeros(max(length, tile), np.float32)
    for start in starts:
        total[start : start + tile] += window
    return total[:length]


def cut(image: Shaped[np.ndarray, "H W ..."], y: int, x: int, tile: int) -> Shaped[np.ndarray, "tile tile ..."]:
    """One tile of the image; beyond the image's end its last pixels are repeated."""
    crop = image[y : y + tile, x : x + tile]
    missing = [(0, tile - crop.shape[0]), (0, tile - crop.shape[1])] + [(0, 0)] * (crop.ndim - 2)
    return np.pad(crop, missing, mode="edge") if crop.shape[:2] != (tile, tile) else crop


def rounded(count: int) -> int:
    """Rounded up to a power of two, or from 16 on by at most a quarter: few numbers, each of which is compiled for."""
    up = 2 ** (count - 1).bit_length()
    step = up // 8
    return up if count <= 16 else -(-count // step) * step


def rounded_height(count: int) -> int:
    """Rounded up to nine eighths of a power of two: sides of images often are powers, and a halo is added to them."""
    return -(-9 * 2 ** (-(-8 * count // 9) - 1).bit_length() // 8)


# --- where tiles and strips lie


@dataclass(frozen=True)
class Grid:
    """The tiles of an image, and the strips of rows in which they are blended.

    Strip k holds the image rows from k * rows up to (k + 1) * rows, and the tiles that start there. Its tiles lie in
    slots: `regular[0]` rows by `regular[1]` columns of slots for tiles that start at multiples of the stride, then one
    more row and one more column for the last tiles of the image, which end with it.
    """

    shape: tuple[int, int]
    tile: int
    stride: int
    regular: tuple[int, int]

    @classmethod
    def over(cls, shape: tuple[int, int], tile: int, stride: int, halo: int, most_px: int) -> "Grid":
        """The strips as high as possible, but no higher than the image and `halo` rows.

        most_px: of all tiles in a strip together; a single row of tiles is a strip even if it has more.
        """
        columns = rounded(max(1, len(tile_starts(shape[1], tile, stride)) - 1))
        rows = max(1, most_px // ((columns + 1) * tile**2))
        return cls(shape, tile, stride, (min(rows, rounded_height(-(-(shape[0] + halo) // stride))), columns))

    @property
    def rows(self) -> int:
        """Image rows of a strip."""
        return self.regular[0] * self.stride

    @property
    def width(self) -> int:
        """Columns of a strip, those beyond the image included."""
        return self.regular[1] * self.stride + self.tile

    @property
    def n_strips(self) -> int:
        return -(-self.shape[0] // self.rows)

    @cached_property
    def starts(self) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
        """First rows and first columns of the tiles."""
        height, width = self.shape
        return tile_starts(height, self.tile, self.stride), tile_starts(width, self.tile, self.stride)

    @cached_property
    def weights(self) -> tuple[Float[np.ndarray, "h"], Float[np.ndarray, "w"]]:
        """Sums of the blend windows over the rows of all strips and over the columns; 1 beyond the image."""
        sizes = self.n_strips * self.rows, self.width
        sums = (summed_weights(*along) for along in zip(self.starts, (self.tile,) * 2, self.shape, strict=True))
        rows, columns = (np.pad(s, (0, n - len(s)), constant_values=1) for s, n in zip(sums, sizes, strict=True))
        return rows, columns

    def positions(self, wanted: Wanted | None) -> Iterator[Int[np.ndarray, "n 2"]]:
        """(y, x) of the tiles that are wanted, for each row of tiles."""
        ys, xs = self.starts
        for y in ys.tolist():
            columns = xs if wanted is None else xs[wanted(y, xs)]
            yield np.stack([np.full(len(columns), y), columns], axis=-1)

    def strip_of(self, positions: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        return positions[:, 0] // self.rows

    def slots_of(self, positions: Int[np.ndarray, "n 2"], strip: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each tile's slot in this strip, filled up to `size`.

        Tiles of other strips, and entries that only fill up, have rows beyond the last one, no two alike.
        """
        (ys, xs), (last_row, last_column) = self.starts, self.regular
        here = self.strip_of(positions) == strip
        rows = np.where(positions[:, 0] == ys[-1], last_row, positions[:, 0] // self.stride - strip * last_row)
        columns = np.where(positions[:, 1] == xs[-1], last_column, positions[:, 1] // self.stride)
        nowhere = last_row + 1 + np.arange(size)
        nowhere[: len(rows)][here] = rows[here]
        return nowhere.astype(np.int32), np.pad(columns, (0, size - len(columns))).astype(np.int32)

    def last_tile(self, strip: int) -> tuple[int, int]:
        """Where in a strip the last row and the last column of tiles start; row 0 where the strip has no last row."""
        ys, xs = self.starts
        return (int(ys[-1]) - strip * self.rows if ys[-1] // self.rows == strip else 0), int(xs[-1])


def batches(rows: Iterable[Int[np.ndarray, "_ 2"]], size: int) -> Iterator[Int[np.ndarray, "_ 2"]]:
    """The positions of all rows, `size` at a time; the last batch may be shorter."""
    pending = np.empty((0, 2), np.int64)
    for row in rows:
        pending = np.concatenate([pending, row])
        while len(pending) >= size:
            yield pending[:size]
            pending = pending[size:]
    if len(pending):
        yield pending


# --- blending


def blend_strips(
    computed: Iterable[tuple[Int[np.ndarray, "n 2"], Float[Array, "B tile tile M"]]], grid: Grid
) -> Iterator[Float[Array, "M rows width"]]:
    """Blend the maps of all tiles: the strips of the image, from the top to the bottom, on the device.

    computed: positions and maps of batches of tiles, in the order of `grid.positions`; of B maps the first n count.
        Pixels of a tile that is left out have no meaning. Without a single tile there are no strips.
    The sum at a pixel is taken in one order, whatever the batches and the height of the strips. Nothing is read by the
    host: it waits only where more than AHEAD batches are under way.
    """
    computed = iter(computed)
    first = next(computed, None)
    if first is None:
        return
    bands, window, done = first[1].shape[-1], blend_window(grid.tile), 0
    carry = jnp.zeros((bands, grid.tile, grid.width), jnp.float32, device=first[1].sharding)
    slots: dict[int, Array] = {}
    under_way: deque[Array] = deque()

    def blended(strip: int) -> tuple[Array, Array]:
        filled = slots.pop(strip) if strip in slots else empty_slots(grid, carry)
        along_y, along_x = grid.weights
        weight_y = along_y[strip * grid.rows : (strip + 1) * grid.rows]
        return blend(filled, carry, grid.last_tile(strip), weight_y, along_x, stride=grid.stride)

    for positions, maps in chain([first], computed):
        under_way.append(maps)
        if len(under_way) > AHEAD:
            jax.block_until_ready(under_way.popleft())
        strips = grid.strip_of(positions)
        for k in np.unique(strips).tolist():
            before = slots[k] if k in slots else empty_slots(grid, carry)
            slots[k] = place(before, maps, *grid.slots_of(positions, k, len(maps)), window)
        for k in range(done, int(strips[-1])):
            strip, carry = blended(k)
            yield strip
        done = int(strips[-1])
    for k in range(done, grid.n_strips):
        strip, carry = blended(k)
        yield strip


def empty_slots(grid: Grid, carry: Float[Array, "M tile width"]) -> Float[Array, "M r tile c tile"]:
    """On the devices of `carry`, with as many maps."""
    rows, columns = grid.regular
    shape = len(carry), rows + 1, grid.tile, columns + 1, grid.tile
    return jnp.zeros(shape, jnp.float32, device=carry.sharding)


@partial(jax.jit, donate_argnums=0)
def place(
    slots: Float[Array, "M r tile c tile"],
    maps: Float[Array, "B tile tile M"],
    rows: Int[Array, "B"],
    columns: Int[Array, "B"],
    window: Float[Array, "tile"],
) -> Float[Array, "M r tile c tile"]:
    """The slots with the weighted maps in them; maps with a row beyond the last one are left out."""
    weighted = jnp.moveaxis(maps, -1, 1) * (window[:, None] * window[None, :])
    return slots.at[:, rows, :, columns].set(weighted, mode="drop", unique_indices=True)


@partial(jax.jit, static_argnames="stride")
def blend(
    slots: Float[Array, "M r tile c tile"],
    carry: Float[Array, "M tile width"],
    last_tile: tuple[Int[Array, ""], Int[Array, ""]],
    weight_y: Float[Array, "rows"],
    weight_x: Float[Array, "width"],
    *,
    stride: int,
) -> tuple[Float[Array, "M rows width"], Float[Array, "M tile width"]]:
    """(weighted means of the strip, sums of the rows below it); carry: the sums that the strip above has left."""
    (bands, n_rows, tile, n_columns, _), (y, x) = slots.shape, last_tile
    height, width = len(weight_y), len(weight_x)

    def add_row(row: Array, total: Array) -> Array:
        """Row by row, from the top: the order of a sum must not depend on where strips begin."""
        tiles, top = slots[:, row], jnp.where(row == n_rows - 1, y, row * stride)
        along = _added_up(tiles[:, :, :-1].reshape(-1, n_columns - 1, tile), stride, width)
        total = _add_at(total, along.reshape(bands, tile, width), (0, top, 0))
        return _add_at(total, tiles[:, :, -1], (0, top, x))

    total = lax.fori_loop(0, n_rows, add_row, jnp.pad(carry, ((0, 0), (0, height), (0, 0))))
    return total[:, :height] / weight_y[:, None] / weight_x, total[:, height:]


def _added_up(parts: Float[Array, "A n tile"], stride: int, length: int) -> Float[Array, "A length"]:
    """The sum of parts, each `stride` to the right of the one before. Every q-th of them can be added at once, q being
    the number of parts that cover a place."""
    lines, n, tile = parts.shape
    q = -(-tile // stride)
    total = jnp.zeros((lines, length), parts.dtype)
    for first in range(min(q, n)):
        some = jnp.pad(parts[:, first::q], ((0, 0), (0, 0), (0, q * stride - tile)))
        flat = some.reshape(lines, -1)
        total += jnp.pad(flat, ((0, 0), (first * stride, length - first * stride - flat.shape[1])))
    return total


def _add_at(total: Array, part: Array, start: tuple[int | Int[Array, ""], ...]) -> Array:
    here = lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, here + part, start)
