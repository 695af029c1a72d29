"""Fixed-size tiling of images of any size, and weighted blending of the tiles on the device.

Every tile is weighted by a separable Gaussian with sigma = tile / 8 (Isensee et al. 2021, nnU-Net, Nature Methods
18:203). Tiles lie on a product grid, so the sum of weights is an outer product of two vectors and needs no image.
Strips of rows are blended from top to bottom, so memory does not grow with the height of the image. Array shapes are
rounded up, so that a few compiled programs serve images of all sizes.
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

AHEAD = 3  # largest number of pending batches on the device
WEIGHT_FLOOR = 1e-3  # avoids division by tiny weights at corners covered by a single tile

Wanted = Callable[[int, Int[np.ndarray, "n"]], np.ndarray]


def tile_starts(length: int, tile: int, stride: int) -> Int[np.ndarray, "n"]:
    """Compute the first pixel of each tile along one axis: every `stride`, with the last tile flush with the end.

    Args:
        length: Length of the axis in pixels. Below `tile` there is a single tile, which is padded.
        tile: Side of a tile in pixels.
        stride: Distance between tiles in pixels, 1 to `tile`.

    Returns:
        First pixels, ascending.

    Raises:
        ValueError: If the stride is out of range.
    """
    if not 1 <= stride <= tile:
        raise ValueError(f"stride is {stride}; it must be 1 to {tile} (the tile), or pixels would be left out")
    last = max(length - tile, 0)
    return np.unique(np.append(np.arange(0, last, stride), last))


def blend_window(tile: int) -> Float[np.ndarray, "tile"]:
    """Gaussian weights along one axis of a tile, symmetric, bounded below by `WEIGHT_FLOOR`.

    Args:
        tile: Side of a tile in pixels.

    Returns:
        Weights; 1 at the centre.
    """
    offset = np.arange(tile) - (tile - 1) / 2
    return np.maximum(np.exp(-0.5 * (offset / (tile / 8)) ** 2), WEIGHT_FLOOR).astype(np.float32)


def summed_weights(starts: Int[np.ndarray, "n"], tile: int, length: int) -> Float[np.ndarray, "length"]:
    """Sum of the blend windows along one axis.

    Args:
        starts: First pixels of the tiles.
        tile: Side of a tile in pixels.
        length: Length of the axis in pixels.

    Returns:
        Sum of weights at each pixel.
    """
    window, total = blend_window(tile), np.zeros(max(length, tile), np.float32)
    for start in starts:
        total[start : start + tile] += window
    return total[:length]


def cut(image: Shaped[np.ndarray, "H W ..."], y: int, x: int, tile: int) -> Shaped[np.ndarray, "tile tile ..."]:
    """Extract one tile of an image, padded with the nearest pixel beyond the image.

    Args:
        image: Image.
        y: First row of the tile in pixels.
        x: First column of the tile in pixels.
        tile: Side of the tile in pixels.

    Returns:
        The tile.
    """
    crop = image[y : y + tile, x : x + tile]
    missing = [(0, tile - crop.shape[0]), (0, tile - crop.shape[1])] + [(0, 0)] * (crop.ndim - 2)
    return np.pad(crop, missing, mode="edge") if crop.shape[:2] != (tile, tile) else crop


def rounded(count: int) -> int:
    """Round up to a power of two or, above 16, to a multiple of 1/8 of one; few distinct sizes mean few compilations.

    Args:
        count: Positive integer.

    Returns:
        Rounded integer, at most a quarter larger above 16.
    """
    up = 2 ** (count - 1).bit_length()
    step = up // 8
    return up if count <= 16 else -(-count // step) * step


def rounded_height(count: int) -> int:
    """Round up to 9/8 of a power of two: image sides are often powers of two, to which a halo is added.

    Args:
        count: Positive integer.

    Returns:
        Rounded integer.
    """
    return -(-9 * 2 ** (-(-8 * count // 9) - 1).bit_length() // 8)


# --- where tiles and strips lie


@dataclass(frozen=True)
class Grid:
    """Tiles of an image, and the strips of rows in which they are blended.

    Strip k consists of the image rows from k * rows up to (k + 1) * rows, and of the tiles that start there. Its tiles
    occupy slots: `regular[0]` rows by `regular[1]` columns of slots for tiles at multiples of the stride, and
    one more row and column for the last tiles of the image, which are flush with its end.

    Attributes:
        shape: Height and width of the image in pixels.
        tile: Side of a tile in pixels.
        stride: Distance between tiles in pixels.
        regular: Rows and columns of slots for regular tiles.
    """

    shape: tuple[int, int]
    tile: int
    stride: int
    regular: tuple[int, int]

    @classmethod
    def over(cls, shape: tuple[int, int], tile: int, stride: int, halo: int, most_px: int) -> "Grid":
        """Construct a grid with the highest possible strips, up to the image height plus `halo` rows.

        Args:
            shape: Height and width of the image in pixels.
            tile: Side of a tile in pixels.
            stride: Distance between tiles in pixels.
            halo: Rows added to the height of the image, in pixels.
            most_px: Largest total number of pixels of the tiles of a strip; exceeded if a single row of tiles has more.

        Returns:
            The grid.
        """
        columns = rounded(max(1, len(tile_starts(shape[1], tile, stride)) - 1))
        rows = max(1, most_px // ((columns + 1) * tile**2))
        return cls(shape, tile, stride, (min(rows, rounded_height(-(-(shape[0] + halo) // stride))), columns))

    @property
    def rows(self) -> int:
        """Image rows per strip."""
        return self.regular[0] * self.stride

    @property
    def width(self) -> int:
        """Columns of a strip, including those beyond the image."""
        return self.regular[1] * self.stride + self.tile

    @property
    def n_strips(self) -> int:
        """Number of strips."""
        return -(-self.shape[0] // self.rows)

    @cached_property
    def starts(self) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
        """First rows and first columns of the tiles, in pixels."""
        height, width = self.shape
        return tile_starts(height, self.tile, self.stride), tile_starts(width, self.tile, self.stride)

    @cached_property
    def weights(self) -> tuple[Float[np.ndarray, "h"], Float[np.ndarray, "w"]]:
        """Summed blend windows over the rows of all strips and over the columns; 1 beyond the image."""
        sizes = self.n_strips * self.rows, self.width
        sums = (summed_weights(*along) for along in zip(self.starts, (self.tile,) * 2, self.shape, strict=True))
        rows, columns = (np.pad(s, (0, n - len(s)), constant_values=1) for s, n in zip(sums, sizes, strict=True))
        return rows, columns

    def positions(self, wanted: Wanted | None) -> Iterator[Int[np.ndarray, "n 2"]]:
        """Iterate over the rows of tiles.

        Args:
            wanted: Function (y, xs) that selects tiles of a row; None selects all tiles.

        Yields:
            First pixels (y, x) of the selected tiles of a row.
        """
        ys, xs = self.starts
        for y in ys.tolist():
            columns = xs if wanted is None else xs[wanted(y, xs)]
            yield np.stack([np.full(len(columns), y), columns], axis=-1)

    def strip_of(self, positions: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, "n"]:
        """Index of the strip that contains each tile, from its first pixel (y, x)."""
        return positions[:, 0] // self.rows

    def slots_of(self, positions: Int[np.ndarray, "n 2"], strip: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the slots of tiles in a strip, padded to a fixed size.

        Args:
            positions: First pixels (y, x) of the tiles.
            strip: Index of the strip.
            size: Padded length.

        Returns:
            Row and column of each slot (size,). Tiles of other strips and padding have distinct rows beyond the last.
        """
        (ys, xs), (last_row, last_column) = self.starts, self.regular
        here = self.strip_of(positions) == strip
        rows = np.where(positions[:, 0] == ys[-1], last_row, positions[:, 0] // self.stride - strip * last_row)
        columns = np.where(positions[:, 1] == xs[-1], last_column, positions[:, 1] // self.stride)
        nowhere = last_row + 1 + np.arange(size)
        nowhere[: len(rows)][here] = rows[here]
        return nowhere.astype(np.int32), np.pad(columns, (0, size - len(columns))).astype(np.int32)

    def last_tile(self, strip: int) -> tuple[int, int]:
        """First row (relative to the strip) and column of the last row and column of tiles, in pixels.

        Args:
            strip: Index of the strip.

        Returns:
            Row and column; row 0 if the strip does not contain the last row of tiles.
        """
        ys, xs = self.starts
        return (int(ys[-1]) - strip * self.rows if ys[-1] // self.rows == strip else 0), int(xs[-1])


def batches(rows: Iterable[Int[np.ndarray, "_ 2"]], size: int) -> Iterator[Int[np.ndarray, "_ 2"]]:
    """Regroup positions into batches.

    Args:
        rows: Positions (y, x) of the tiles of each row.
        size: Batch size.

    Yields:
        Positions of `size` tiles; the last batch may be smaller.
    """
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
    """Blend the maps of all tiles into strips of the image, from top to bottom, on the device.

    Each pixel is summed in a fixed order that does not depend on the batches or the height of the strips. No data are
    transferred to the host, which only waits if more than `AHEAD` batches are pending.

    Args:
        computed: Positions of n tiles and B maps for each batch, in the order of `grid.positions`; only the first n
            maps are used. Pixels covered by no computed tile are undefined.
        grid: Tiles and strips.

    Yields:
        Weighted mean of the maps in each strip; no strips if there are no tiles.
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
    """Allocate zero slots for a strip, on the devices of `carry` and with its number of maps."""
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
    """Write weighted maps into their slots; the buffer of `slots` is donated.

    Args:
        slots: Weighted maps of a strip.
        maps: Maps of B tiles.
        rows: Row of the slot of each map; maps with a row beyond the last one are dropped.
        columns: Column of the slot of each map.
        window: Blend window along one axis.

    Returns:
        Updated slots.
    """
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
    """Blend the tiles of a strip.

    Args:
        slots: Weighted maps of the strip.
        carry: Weighted sums that tiles of the previous strip contribute to this one.
        last_tile: First row and column of the last row and column of tiles, see `Grid.last_tile`.
        weight_y: Summed weights along the rows of the strip.
        weight_x: Summed weights along the columns.
        stride: Distance between tiles in pixels.

    Returns:
        Weighted means of the strip, and weighted sums that its tiles contribute to the next strip.
    """
    (bands, n_rows, tile, n_columns, _), (y, x) = slots.shape, last_tile
    height, width = len(weight_y), len(weight_x)

    def add_row(row: Array, total: Array) -> Array:
        """Add a row of tiles; the loop runs from the top, so the order of summation does not depend on the strips."""
        tiles, top = slots[:, row], jnp.where(row == n_rows - 1, y, row * stride)
        along = _added_up(tiles[:, :, :-1].reshape(-1, n_columns - 1, tile), stride, width)
        total = _add_at(total, along.reshape(bands, tile, width), (0, top, 0))
        return _add_at(total, tiles[:, :, -1], (0, top, x))

    total = lax.fori_loop(0, n_rows, add_row, jnp.pad(carry, ((0, 0), (0, height), (0, 0))))
    return total[:, :height] / weight_y[:, None] / weight_x, total[:, height:]


def _added_up(parts: Float[Array, "A n tile"], stride: int, length: int) -> Float[Array, "A length"]:
    """Sum of overlapping parts, each shifted by `stride`.

    With q parts covering a pixel, every q-th part is disjoint, so the parts are added in q groups.
    """
    lines, n, tile = parts.shape
    q = -(-tile // stride)
    total = jnp.zeros((lines, length), parts.dtype)
    for first in range(min(q, n)):
        some = jnp.pad(parts[:, first::q], ((0, 0), (0, 0), (0, q * stride - tile)))
        flat = some.reshape(lines, -1)
        total += jnp.pad(flat, ((0, 0), (first * stride, length - first * stride - flat.shape[1])))
    return total


def _add_at(total: Array, part: Array, start: tuple[int | Int[Array, ""], ...]) -> Array:
    """Add a part to an array at a given start index."""
    here = lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, here + part, start)
