"""The score map of one image: the one path that calibration, evaluation and prediction share.

An image passes in rows of tiles and leaves in strips of scores, so that what is held besides the image and its map does
not grow with its height. Tiles are divided among all devices of this process.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from pulmo_jax.core.tiling import blend_strips, cut_tiles
from pulmo_jax.data.transforms import Preprocessing, finite, preprocess, resize_bands
from pulmo_jax.host.resources import explain_out_of_memory
from pulmo_jax.methods.base import Detailed, Method, Params

STRIP_PX = 2**20  # scored at a time; fewer rows of a wide image, so that its strips need no more memory

Strips = Iterator[tuple[int, np.ndarray]]  # (first row, rows), consecutive


@dataclass(frozen=True)
class Tiles:
    """How an image is covered: `overlap` of each tile by the next (0 to below 1), `batch_size` tiles at a time."""

    overlap: float = 0.5
    batch_size: int = 64

    def stride(self, tile: int) -> int:
        return max(1, round(tile * (1 - self.overlap)))


@dataclass(frozen=True)
class Scorer:
    """A trained method with all that it needs to score an image. `scorer(pixels, foreground)` gives the map."""

    method: Method
    params: Params
    how: Preprocessing
    tiles: Tiles
    residual: Callable[[Params, Float[Array, "B P P C"]], Float[Array, "B P P M"]]
    reconstruct: Callable[[Params, Float[Array, "B P P C"]], Float[Array, "B P P C"]]

    @classmethod
    def of(cls, method: Method, params: Params, how: Preprocessing, tiles: Tiles) -> "Scorer":
        """Compiles each function once, on its first tiles. The parameters are copied to every device."""
        params = jax.device_put(params, on_devices(PartitionSpec()))
        return cls(method, params, how, tiles, jax.jit(method.residual), jax.jit(method.reconstruct))

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
            return gathered(self._blend(self.reconstruct, pixels, foreground), np.empty(pixels.shape, np.float32))

    def details(
        self, pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None = None
    ) -> dict[str, Float[np.ndarray, "H W"]]:
        """What else the method says of every pixel, by name; NaN where there is no score."""
        names = detail_names(self.method)
        if not names:
            return {}
        with naming_what_to_lower(self.tiles, pixels.shape):
            strips = self._blend(jax.jit(cast(Detailed, self.method).details), pixels, foreground)
            maps = gathered(strips, np.empty((*pixels.shape[:2], len(names)), np.float32))
        maps[~Inside(pixels, foreground)(0, len(pixels))] = np.nan
        return {name: maps[..., i] for i, name in enumerate(names)}

    def strips(self, pixels: np.ndarray, foreground: np.ndarray | None) -> Strips:
        """The score map from the top to the bottom, in strips of about STRIP_PX pixels."""
        height, width = pixels.shape[:2]
        inside = Inside(pixels, foreground)

        def score_strip(top: int, residual: np.ndarray, done: int, end: int) -> tuple[int, np.ndarray]:
            score = self.method.score_map(residual, inside(top, top + len(residual)))
            return done, score[done - top : end - top]

        residuals = self._blend(self.residual, pixels, foreground, inside.any_of_tiles(self.how.patch_size))
        halo = self.method.halo_px
        strips = overlapping(residuals, height, max(1, halo, STRIP_PX // width), halo)
        end = 0
        for y, score in one_behind(score_strip, strips):
            yield y, score
            end = y + len(score)
        if end < height:  # no pixel to score at all
            yield end, np.full((height - end, width), np.nan, np.float32)

    def _blend(
        self,
        function: Callable,
        pixels: np.ndarray,
        foreground: np.ndarray | None,
        wanted: Callable[[int, np.ndarray], np.ndarray] | None = None,
    ) -> Strips:
        """Only the tiles of one batch are ever normalised to floats; the image stays in its own dtype."""
        height, width = pixels.shape[:2]
        size = self.how.patch_size
        if self.how.resize:
            whole = resize_bands(preprocess(pixels, foreground, self.how), size, size)
            maps = function(self.params, jax.device_put(whole[None], on_devices(PartitionSpec())))
            yield 0, resize_bands(np.asarray(maps)[0], height, width)  # such images are small
            return

        def of_tiles(positions: Int[np.ndarray, "B 2"]) -> Float[Array, "B P P M"]:
            tiles = cut_tiles(pixels, positions, size)
            inside = None if foreground is None else cut_tiles(foreground, positions, size)
            return function(self.params, jax.device_put(preprocess(tiles, inside, self.how), on_devices(TILES)))

        devices = len(jax.local_devices())
        batch_size = -(-self.tiles.batch_size // devices) * devices
        yield from blend_strips(of_tiles, (height, width), size, self.tiles.stride(size), batch_size, wanted)


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

    def any_of_tiles(self, tile: int) -> Callable[[int, np.ndarray], np.ndarray] | None:
        """Whether tiles at row y and columns xs have such a pixel; None where all have."""
        if self.foreground is None and np.issubdtype(self.pixels.dtype, np.integer):
            return None

        def any_of(y: int, xs: np.ndarray) -> np.ndarray:
            columns = self(y, y + tile).any(axis=0)
            count = np.append(0, np.cumsum(columns))
            return count[np.minimum(xs + tile, columns.size)] > count[xs]

        return any_of


def overlapping(strips: Strips, height: int, rows: int, halo: int) -> Iterator[tuple[int, np.ndarray, int, int]]:
    """(top, strip, done, end): strips of at least `rows` new rows, from `done` to `end`, with `halo` rows on either
    side of them where the image has any; `top` is the first row of the strip."""
    parts: list[np.ndarray] = []
    top = done = bottom = 0
    for y, strip in strips:
        parts.append(strip)
        bottom = y + len(strip)
        end = height if bottom == height else bottom - halo
        if end - done < rows and end < height:
            continue
        held = np.concatenate(parts) if len(parts) > 1 else parts[0]
        yield top, held, done, end
        kept = max(end - halo, 0)
        parts, top, done = [held[kept - top :].copy()], kept, end


def one_behind(function: Callable[..., Any], arguments: Iterable[tuple]) -> Iterator[Any]:
    """function(*a) for each, in a thread of its own while the next is being made."""
    with ThreadPoolExecutor(1) as thread:
        before = None
        for some in arguments:
            now = thread.submit(function, *some)
            if before is not None:
                yield before.result()
            before = now
        if before is not None:
            yield before.result()


def gathered(strips: Iterable[tuple[int, np.ndarray]], whole: np.ndarray) -> np.ndarray:
    """The strips in one array."""
    for y, rows in strips:
        whole[y : y + len(rows)] = rows
    return whole


TILES = PartitionSpec("tiles")


@cache
def on_devices(spec: PartitionSpec) -> NamedSharding:
    """Over the devices of this process: batches of tiles divided, or all on each."""
    return NamedSharding(Mesh(np.array(jax.local_devices()), ("tiles",), axis_types=(AxisType.Auto,)), spec)


def naming_what_to_lower(tiles: Tiles, shape: tuple[int, ...]) -> AbstractContextManager[None]:
    """A lack of memory becomes an InputError."""
    return explain_out_of_memory(
        f"scoring an image of {shape[0]} x {shape[1]} px",
        f"lower tiles.batch_size (now {tiles.batch_size}; of a finished run in its config.yaml), or leave out such "
        "large images by data.max_image_mb",
    )
