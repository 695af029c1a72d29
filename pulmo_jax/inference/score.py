"""The score map of one image: the one path that calibration, evaluation and prediction share.

All is computed on the device. An image goes there in strips of rows and leaves it in strips of scores, so that memory
does not grow with the height of the image. Tiles are divided among all devices of this process. Every program is
compiled once for a run, except those of the strips, which are compiled once for each of a few shapes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from pulmo_jax.core.tiling import Grid, Wanted, batches, blend_strips
from pulmo_jax.data.transforms import Preprocessing, finite, preprocess, resize_bands
from pulmo_jax.host.resources import explain_out_of_memory
from pulmo_jax.inference.strips import cut_batches, everywhere, padded
from pulmo_jax.inference.transfers import read_behind
from pulmo_jax.methods.base import Detailed, Method, Params
from pulmo_jax.methods.score_maps import Extent

STRIP_PX = 2**21  # of all tiles in a strip: at an overlap of a half, a quarter as many of the image

Strips = Iterator[tuple[int, np.ndarray]]  # (first row, rows), consecutive
OnTiles = Callable[[Params, Float[Array, "B P P C"]], Float[Array, "B P P M"]]


@dataclass(frozen=True)
class Tiles:
    """How an image is covered: `overlap` of each tile by the next (0 to below 1), `batch_size` tiles at a time."""

    overlap: float = 0.5
    batch_size: int = 64

    def stride(self, tile: int) -> int:
        return max(1, round(tile * (1 - self.overlap)))


@dataclass(frozen=True)
class Scorer:
    """A trained method with all that it needs to score an image. `scorer(pixels, foreground)` gives the map.

    residual, reconstruct, detail_maps: the method's functions, compiled; score_window: see `window_scorer`.
    """

    method: Method
    params: Params
    how: Preprocessing
    tiles: Tiles
    residual: OnTiles
    reconstruct: OnTiles
    detail_maps: OnTiles | None
    score_window: Callable[..., Any]

    @classmethod
    def of(cls, method: Method, params: Params, how: Preprocessing, tiles: Tiles) -> "Scorer":
        """Compiles each function once, on its first tiles. The parameters are copied to every device."""
        details = jax.jit(method.details) if isinstance(method, Detailed) else None
        on_tiles = jax.jit(method.residual), jax.jit(method.reconstruct), details
        return cls(method, jax.tree.map(everywhere, params), how, tiles, *on_tiles, window_scorer(method))

    def __call__(
        self, pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None = None
    ) -> Float[np.ndarray, "H W"]:
        """The score at every pixel, float32; NaN outside the foreground and where the image is not finite.

        Raises InputError that names the settings to lower where memory runs out.
        """
        with naming_what_to_lower(self.tiles, pixels.shape):
            return gathered(self.strips(pixels, foreground), np.empty(pixels.shape[:2], np.float32))

    def reconstruction(
        self, pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None = None
    ) -> Float[np.ndarray, "H W C"]:
        """The normal version of the image, normalised units."""
        with naming_what_to_lower(self.tiles, pixels.shape):
            return gathered(self._maps(self.reconstruct, pixels, foreground), np.empty(pixels.shape, np.float32))

    def details(
        self, pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None = None
    ) -> dict[str, Float[np.ndarray, "H W"]]:
        """The method's other maps, by name; NaN where there is no score."""
        names = detail_names(self.method)
        if not names or self.detail_maps is None:
            return {}
        with naming_what_to_lower(self.tiles, pixels.shape):
            strips = self._maps(self.detail_maps, pixels, foreground)
            maps = gathered(strips, np.empty((*pixels.shape[:2], len(names)), np.float32))
        maps[~Inside(pixels, foreground)(0, len(pixels))] = np.nan
        return {name: maps[..., i] for i, name in enumerate(names)}

    def strips(self, pixels: np.ndarray, foreground: np.ndarray | None) -> Strips:
        """The score map from the top to the bottom, in strips."""
        height, width = pixels.shape[:2]
        inside, grid, halo = Inside(pixels, foreground), self._grid(pixels.shape), self.method.halo_px
        residual = self._blended(self.residual, pixels, foreground, grid, inside.any_of_tiles(grid.tile))
        scores = scored(self.score_window, residual, inside, grid, halo)
        end = 0
        for i, rows in enumerate(read_behind(scores, ahead=1)):
            top = i * grid.rows - halo
            rows = rows[max(-top, 0) : height - top, :width]
            if len(rows):
                yield end, rows
            end += len(rows)
        if end < height:  # no pixel to score at all
            yield end, np.full((height - end, width), np.nan, np.float32)

    def _grid(self, shape: tuple[int, ...]) -> Grid:
        size = self.how.patch_size
        return Grid.over((shape[0], shape[1]), size, self.tiles.stride(size), self.method.halo_px, STRIP_PX)

    def _maps(self, function: OnTiles, pixels: np.ndarray, foreground: np.ndarray | None) -> Strips:
        """The blended maps of all tiles, (h, W, M)."""
        grid, (height, width) = self._grid(pixels.shape), pixels.shape[:2]
        strips = self._blended(function, pixels, foreground, grid)
        for i, rows in enumerate(read_behind(map(bands_last, strips), ahead=1)):
            yield i * grid.rows, rows[: height - i * grid.rows, :width]

    def _blended(
        self,
        function: OnTiles,
        pixels: np.ndarray,
        foreground: np.ndarray | None,
        grid: Grid,
        wanted: Wanted | None = None,
    ) -> Iterator[Float[Array, "M rows width"]]:
        if self.how.resize:
            return self._resized(function, pixels, foreground, grid)
        devices = len(jax.local_devices())
        size = -(-self.tiles.batch_size // devices) * devices
        tiles = cut_batches(batches(grid.positions(wanted), size), size, pixels, foreground, grid, self.how)
        maps = ((positions, everywhere(function(self.params, batch))) for positions, batch in tiles)
        return blend_strips(maps, grid)

    def _resized(
        self, function: OnTiles, pixels: np.ndarray, foreground: np.ndarray | None, grid: Grid
    ) -> Iterator[Float[Array, "M rows width"]]:
        """The whole image as one tile; such images are small."""
        size = grid.tile
        whole = resize_bands(preprocess(pixels, foreground, self.how), size, size)
        maps = resize_bands(np.asarray(function(self.params, everywhere(whole[None])))[0], *grid.shape)
        for k in range(grid.n_strips):
            yield everywhere(np.moveaxis(padded(maps, k * grid.rows, grid.rows, grid.width), -1, 0))


def window_scorer(method: Method) -> Callable[..., tuple[Float[Array, "rows width"], Float[Array, "M halos width"]]]:
    """The compiled function that scores a strip as soon as the `halo_px` rows below it are known."""
    halo = method.halo_px

    def score(
        above: Float[Array, "M halos width"],
        strip: Float[Array, "M rows width"],
        inside: Bool[Array, "h width"],
        extent: Extent,
    ) -> tuple[Float[Array, "rows width"], Float[Array, "M halos width"]]:
        """(scores of as many rows as the strip has, beginning `halo_px` above it; what the next call needs as above)

        above: the last 2 halo_px rows before the strip. inside, extent: of both together.
        """
        window, rows = jnp.concatenate([above, strip], axis=1), strip.shape[1]
        scores = method.score_map(jnp.moveaxis(window, 0, -1), inside, extent)
        return scores[halo : halo + rows], window[:, rows:]

    return jax.jit(score)


def scored(
    score_window: Callable[..., Any],
    strips: Iterator[Float[Array, "M rows width"]],
    inside: "Inside",
    grid: Grid,
    halo: int,
) -> Iterator[Float[Array, "rows width"]]:
    """Scores on the device: those of part k begin with the image row k * rows - halo."""
    (height, width), above, strip = grid.shape, None, None
    everything = None if inside.may_be_false else everywhere(np.ones((2 * halo + grid.rows, grid.width), bool))
    for k in range(-(-(height + halo) // grid.rows)):
        strip = next(strips, strip)  # below the image any rows will do
        if strip is None:
            return
        if above is None:
            above = jnp.zeros((len(strip), 2 * halo, grid.width), jnp.float32, device=strip.sharding)
        top = k * grid.rows - 2 * halo
        here = everywhere(inside.window(top, 2 * halo + grid.rows, grid.width)) if everything is None else everything
        scores, above = score_window(above, strip, here, Extent(-top, height - top, 0, width))
        yield scores


@jax.jit
def bands_last(strip: Float[Array, "M rows width"]) -> Float[Array, "rows width M"]:
    return jnp.moveaxis(strip, 0, -1)


def detail_names(method: Method) -> tuple[str, ...]:
    return method.detail_names if isinstance(method, Detailed) else ()


@dataclass(frozen=True)
class Inside:
    """Which pixels are to be scored, some rows at a time: those of the foreground that are numbers."""

    pixels: Shaped[np.ndarray, "H W C"]
    foreground: Bool[np.ndarray, "H W"] | None

    def __call__(self, top: int, bottom: int) -> Bool[np.ndarray, "h W"]:
        inside = finite(self.pixels[top:bottom])
        return inside if self.foreground is None else inside & self.foreground[top:bottom]

    @property
    def may_be_false(self) -> bool:
        return self.foreground is not None or not np.issubdtype(self.pixels.dtype, np.integer)

    def window(self, top: int, rows: int, width: int) -> Bool[np.ndarray, "rows width"]:
        """Also of rows and columns beyond the image, where it is False."""
        here, height = np.zeros((rows, width), bool), len(self.pixels)
        first, end = max(top, 0), min(top + rows, height)
        if first < end:
            here[first - top : end - top, : self.pixels.shape[1]] = self(first, end)
        return here

    def any_of_tiles(self, tile: int) -> Wanted | None:
        """Whether tiles at row y and columns xs have such a pixel; None where all have."""
        if not self.may_be_false:
            return None

        def any_of(y: int, xs: np.ndarray) -> np.ndarray:
            columns = self(y, y + tile).any(axis=0)
            count = np.append(0, np.cumsum(columns))
            return count[np.minimum(xs + tile, columns.size)] > count[xs]

        return any_of


def gathered(strips: Iterable[tuple[int, np.ndarray]], whole: np.ndarray) -> np.ndarray:
    """The strips in one array."""
    for y, rows in strips:
        whole[y : y + len(rows)] = rows
    return whole


def naming_what_to_lower(tiles: Tiles, shape: tuple[int, ...]) -> AbstractContextManager[None]:
    """A lack of memory becomes an InputError."""
    return explain_out_of_memory(
        f"scoring an image of {shape[0]} x {shape[1]} px",
        f"lower tiles.batch_size (now {tiles.batch_size}; for a finished run in its config.yaml), or skip such "
        "large images with data.max_image_mb",
    )
