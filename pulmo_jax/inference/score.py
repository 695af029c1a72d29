"""Score maps of images, computed in the same way for calibration, evaluation and prediction.

All computation is on the device. The image is uploaded in strips of rows, and the scores are read back in strips, so
that device memory does not grow with the height of the image. Tiles are divided among all devices of this process.
Every program is compiled once for a run, except those of the strips, which are compiled once for each of a few shapes.
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
from pulmo_jax.data.file_rows import Rows
from pulmo_jax.data.transforms import Preprocessing, finite, fitting, preprocess, resize_bands
from pulmo_jax.host.resources import explain_out_of_memory, require
from pulmo_jax.inference.memory import within_memory
from pulmo_jax.inference.normal_level import NormalLevel, relative_to
from pulmo_jax.inference.strips import cut_batches, everywhere, padded
from pulmo_jax.inference.transfers import read_behind
from pulmo_jax.methods.base import Detailed, Method, Params
from pulmo_jax.methods.ensemble import names_of
from pulmo_jax.methods.score_maps import Extent

LOWER = "lower tiles.batch_size (now {}; for a finished run in its config.yaml)"
STRIP_PX = 2**21  # pixels of all tiles in a strip; at an overlap of 0.5, a quarter as many image pixels

Strips = Iterator[tuple[int, np.ndarray]]  # (first row, rows), consecutive
OnTiles = Callable[[Params, Float[Array, "B P P C"]], Float[Array, "B P P M"]]


@dataclass(frozen=True)
class Tiles:
    """Tiling of an image.

    Attributes:
        overlap: Overlap of neighbouring tiles as a fraction of a tile, 0 to below 1.
        batch_size: Number of tiles per batch.
    """

    overlap: float = 0.5
    batch_size: int = 64

    def stride(self, tile: int) -> int:
        """Spacing of the tiles, px, at least 1.

        Args:
            tile: Side length of a tile, px.
        """
        return max(1, round(tile * (1 - self.overlap)))


@dataclass(frozen=True, repr=False)
class Scorer:
    """A trained method with everything needed to score an image: `scorer(pixels, foreground)` returns the score map.

    Attributes:
        method: Method of the run.
        params: Its parameters, on every device.
        how: Preprocessing of the run.
        tiles: Tiling.
        residual: Compiled residual of the method.
        reconstruct: Compiled reconstruction of the method.
        level: Normal level of each location, to which scores are relative; None: they are not.
        score_window: Compiled scores of a strip; see `window_scorer`.
        maps_window: Compiled scores and further maps of a strip.
    """

    method: Method
    params: Params
    how: Preprocessing
    tiles: Tiles
    residual: OnTiles
    reconstruct: OnTiles
    level: NormalLevel | None
    score_window: Callable[..., Any]
    maps_window: Callable[..., Any]

    @classmethod
    def of(
        cls,
        method: Method,
        params: Params,
        how: Preprocessing,
        tiles: Tiles,
        level: NormalLevel | None = None,
    ) -> "Scorer":
        """Make a scorer. The parameters are copied to every device; each function is compiled at its first call.

        Args:
            method: Method of the run.
            params: Its parameters.
            how: Preprocessing of the run.
            tiles: Tiling.
            level: Normal level of each location, to which scores are relative; None: they are not.

        Returns:
            The scorer.

        Raises:
            InputError: If a batch of tiles does not fit in the free memory.
        """
        what = f"a batch of {tiles.batch_size} tiles of {how.patch_size} x {how.patch_size} px"
        remedy = LOWER.format(tiles.batch_size)
        require(4 * tiles.batch_size * how.patch_size**2 * how.channels, what, remedy)
        return cls(
            method,
            jax.tree.map(everywhere, params),
            how,
            tiles,
            within_memory(method.residual, what, remedy),
            within_memory(method.reconstruct, what, remedy),
            level,
            window_scorer(method, level),
            window_scorer(method, level, detailed=bool(names_of(method))),
        )

    def __call__(
        self, pixels: Shaped[np.ndarray, "H W *C"], foreground: Bool[np.ndarray, "H W"] | None = None, scale: str = ""
    ) -> Float[np.ndarray, "H W"]:
        """Compute the score map of an image.

        Args:
            pixels: Pixels (H, W, C), or (H, W) of one band, in the units of the training images.
            foreground: Pixels to score; None: all.
            scale: The dtype whose range the intensities have (see `ImageRef.scale`); "" for that of `pixels`.

        Returns:
            Score of every pixel, float32; NaN outside the foreground and where the image is not finite.

        Raises:
            InputError: If the pixels differ from the training images in bands or scale, or memory is insufficient.
        """
        pixels = fitting(pixels, self.how, scale)
        with naming_what_to_lower(self.tiles, pixels.shape):
            return gathered(self.strips(pixels, foreground), np.empty(pixels.shape[:2], np.float32))

    def reconstruction(
        self, pixels: Shaped[np.ndarray, "H W *C"], foreground: Bool[np.ndarray, "H W"] | None = None, scale: str = ""
    ) -> Float[np.ndarray, "H W C"]:
        """Reconstruct an image as a normal image.

        Args:
            pixels: Pixels (H, W, C), or (H, W) of one band, in the units of the training images.
            foreground: Foreground; None: all pixels.
            scale: The dtype whose range the intensities have (see `ImageRef.scale`); "" for that of `pixels`.

        Returns:
            Reconstruction in normalised units.

        Raises:
            InputError: If the pixels differ from the training images in bands or scale, or memory is insufficient.
        """
        pixels = fitting(pixels, self.how, scale)
        with naming_what_to_lower(self.tiles, pixels.shape):
            return gathered(self._maps(self.reconstruct, pixels, foreground), np.empty(pixels.shape, np.float32))

    def maps(
        self, pixels: Shaped[np.ndarray, "H W *C"], foreground: Bool[np.ndarray, "H W"] | None = None, scale: str = ""
    ) -> tuple[Float[np.ndarray, "H W"], dict[str, Float[np.ndarray, "H W"]]]:
        """Compute the score map of an image and the further maps of the method in one pass.

        Args:
            pixels: Pixels (H, W, C), or (H, W) of one band, in the units of the training images.
            foreground: Pixels to score; None: all.
            scale: The dtype whose range the intensities have (see `ImageRef.scale`); "" for that of `pixels`.

        Returns:
            Score of every pixel, and the further maps by name; float32, NaN where there is no score.

        Raises:
            InputError: If the pixels differ from the training images in bands or scale, or memory is insufficient.
        """
        names, pixels = names_of(self.method), fitting(pixels, self.how, scale)
        with naming_what_to_lower(self.tiles, pixels.shape):
            found = np.empty((1 + len(names), *pixels.shape[:2]), np.float32)
            for y, rows in self.strips(pixels, foreground, self.maps_window):
                found[:, y : y + rows.shape[-2]] = rows
        return found[0], dict(zip(names, found[1:], strict=True))

    def strips(
        self, pixels: np.ndarray, foreground: np.ndarray | None, window: Callable[..., Any] | None = None
    ) -> Strips:
        """Compute the score map in strips from top to bottom.

        Args:
            pixels: Pixels in the units of the training images, (H, W, C).
            foreground: Pixels to score, (H, W); None: all.
            window: Compiled maps of a strip; None: the score only.

        Yields:
            First row of a strip, and its scores (rows, W); with further maps (1 + K, rows, W).
        """
        window = window or self.score_window
        height, width = pixels.shape[:2]
        inside, grid, halo = Inside(pixels, foreground), self._grid(pixels.shape), self.method.halo_px
        residual = self._blended(self.residual, pixels, foreground, grid, inside.any_of_tiles(grid.tile))
        scores = scored(window, residual, inside, grid, halo)
        end = 0
        for i, rows in enumerate(read_behind(scores, ahead=1)):
            top = i * grid.rows - halo
            rows = rows[..., max(-top, 0) : height - top, :width]
            if rows.shape[-2]:
                yield end, rows
            end += rows.shape[-2]
        if end < height:  # there are no pixels to score
            yield end, np.full((height - end, width), np.nan, np.float32)

    def _grid(self, shape: tuple[int, ...]) -> Grid:
        """Grid of tiles and strips for an image of this shape."""
        size = self.how.patch_size
        return Grid.over((shape[0], shape[1]), size, self.tiles.stride(size), self.method.halo_px, STRIP_PX)

    def _maps(self, function: OnTiles, pixels: np.ndarray, foreground: np.ndarray | None) -> Strips:
        """Blend a map of all tiles; yield first rows and strips (h, W, M)."""
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
        """Blend a map of the wanted tiles in strips on the device; a resized image is a single tile."""
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
        """Compute a map of the whole image, resized to one tile; such images are small."""
        size = grid.tile
        whole = resize_bands(preprocess(pixels, foreground, self.how), size, size)
        maps = resize_bands(np.asarray(function(self.params, everywhere(whole[None])))[0], *grid.shape)
        for k in range(grid.n_strips):
            yield everywhere(np.moveaxis(padded(maps, k * grid.rows, grid.rows, grid.width), -1, 0))


def window_scorer(
    method: Method, level: NormalLevel | None = None, detailed: bool = False
) -> Callable[..., tuple[Float[Array, "*K rows width"], Float[Array, "M halos width"]]]:
    """Compile the function that scores a strip as soon as the `halo_px` rows below it are known.

    Args:
        method: Method of the run.
        level: Normal level of each location, to which scores are relative; None: they are not.
        detailed: Whether to compute the further maps of a `Detailed` method as well.

    Returns:
        (rows above, strip, mask, extent) -> (maps, rows above the next strip). The maps are the scores (rows, width);
        if `detailed`, the scores and further maps (1 + K, rows, width).
    """
    halo = method.halo_px

    def score(
        above: Float[Array, "M halos width"],
        strip: Float[Array, "M rows width"],
        inside: Bool[Array, "h width"],
        extent: Extent,
    ) -> tuple[Float[Array, "*K rows width"], Float[Array, "M halos width"]]:
        """Score as many rows as the strip has, starting `halo_px` rows above it.

        Args:
            above: The last 2 `halo_px` rows before the strip.
            strip: Maps of the strip.
            inside: Pixels to score in both together.
            extent: Extent of the image in both together.

        Returns:
            Maps, and `above` of the next call.
        """
        window, rows = jnp.concatenate([above, strip], axis=1), strip.shape[1]
        residual = jnp.moveaxis(window, 0, -1)
        maps = method.score_map(residual, inside, extent)
        if level is not None:
            maps = relative_to(level, maps, extent)
        if detailed and isinstance(method, Detailed):
            further = jnp.moveaxis(method.detail_maps(residual, inside, extent), -1, 0)
            maps = jnp.stack([maps, *jnp.where(inside, further, jnp.nan)])
        return maps[..., halo : halo + rows, :], window[:, rows:]

    return jax.jit(score)


def scored(
    score_window: Callable[..., Any],
    strips: Iterator[Float[Array, "M rows width"]],
    inside: "Inside",
    grid: Grid,
    halo: int,
) -> Iterator[Float[Array, "*K rows width"]]:
    """Score the strips on the device.

    Args:
        score_window: Function of `window_scorer`.
        strips: Blended maps of the strips.
        inside: Pixels to score.
        grid: Grid of the tiles and strips.
        halo: Number of rows above and below a pixel that its score depends on.

    Yields:
        Maps of `window_scorer`; part k starts at image row k * rows - halo.
    """
    (height, width), above, strip = grid.shape, None, None
    everything = None if inside.may_be_false else everywhere(np.ones((2 * halo + grid.rows, grid.width), bool))
    for k in range(-(-(height + halo) // grid.rows)):
        strip = next(strips, strip)  # below the image, the values are not used
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
    """Move the maps to the last axis."""
    return jnp.moveaxis(strip, 0, -1)


@dataclass(frozen=True)
class Inside:
    """Pixels to score, evaluated some rows at a time: finite pixels in the foreground.

    Attributes:
        pixels: Pixels of the image.
        foreground: Foreground; None: all pixels.
    """

    pixels: Rows
    foreground: Bool[np.ndarray, "H W"] | None

    def __call__(self, top: int, bottom: int) -> Bool[np.ndarray, "h W"]:
        """Mask of the rows from `top` to `bottom` (exclusive)."""
        inside = finite(self.pixels[top:bottom])
        return inside if self.foreground is None else inside & self.foreground[top:bottom]

    @property
    def may_be_false(self) -> bool:
        """Whether pixels can be excluded: if there is a foreground, or the dtype is not an integer type."""
        return self.foreground is not None or not np.issubdtype(self.pixels.dtype, np.integer)

    def window(self, top: int, rows: int, width: int) -> Bool[np.ndarray, "rows width"]:
        """Mask of a window that may extend beyond the image, where it is False.

        Args:
            top: First row; may be negative.
            rows: Number of rows.
            width: Number of columns, at least that of the image.

        Returns:
            The mask.
        """
        here, height = np.zeros((rows, width), bool), len(self.pixels)
        first, end = max(top, 0), min(top + rows, height)
        if first < end:
            here[first - top : end - top, : self.pixels.shape[1]] = self(first, end)
        return here

    def any_of_tiles(self, tile: int) -> Wanted | None:
        """Make the test whether a tile has pixels to score.

        Args:
            tile: Side length of a tile, px.

        Returns:
            Function of the row y and columns xs of tiles; None if all tiles have such pixels.
        """
        if not self.may_be_false:
            return None

        def any_of(y: int, xs: np.ndarray) -> np.ndarray:
            columns = self(y, y + tile).any(axis=0)
            count = np.append(0, np.cumsum(columns))
            return count[np.minimum(xs + tile, columns.size)] > count[xs]

        return any_of


def gathered(strips: Iterable[tuple[int, np.ndarray]], whole: np.ndarray) -> np.ndarray:
    """Copy strips into a given array and return it.

    Args:
        strips: First row and rows of each strip.
        whole: Array to fill.

    Returns:
        The array.
    """
    for y, rows in strips:
        whole[y : y + len(rows)] = rows
    return whole


def naming_what_to_lower(tiles: Tiles, shape: tuple[int, ...]) -> AbstractContextManager[None]:
    """Context that turns a lack of memory into an InputError, which names the settings to lower.

    Args:
        tiles: Tiling.
        shape: Shape of the image.
    """
    return explain_out_of_memory(
        f"scoring an image of {shape[0]} x {shape[1]} px",
        f"{LOWER.format(tiles.batch_size)}, or skip such large images with data.max_image_mb",
    )
