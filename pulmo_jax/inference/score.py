"""The score map of one image: the one path that calibration, evaluation and prediction share."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from pulmo_jax.core.tiling import cut, map_tiles
from pulmo_jax.data.transforms import Preprocessing, finite, preprocess, resize_bands
from pulmo_jax.methods.base import Method, Params


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
        """Compiles each function once, on its first tiles."""
        return cls(method, params, how, tiles, jax.jit(method.residual), jax.jit(method.reconstruct))

    def __call__(
        self, pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None = None
    ) -> Float[np.ndarray, "H W"]:
        """The score at every pixel, float32; NaN outside the foreground and where the image is not finite."""
        inside = finite(pixels) if foreground is None else foreground & finite(pixels)
        return self.method.score_map(self._blend(self.residual, pixels, foreground), inside)

    def reconstruction(
        self, pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None = None
    ) -> Float[np.ndarray, "H W C"]:
        """The normal version of the image, normalised units."""
        return self._blend(self.reconstruct, pixels, foreground)

    def _blend(self, function: Callable, pixels: np.ndarray, foreground: np.ndarray | None) -> np.ndarray:
        """Only the tiles of one batch are ever normalised to floats; the image stays in its own dtype."""
        height, width = pixels.shape[:2]
        size = self.how.patch_size
        if self.how.resize:
            whole = resize_bands(preprocess(pixels, foreground, self.how), size, size)
            maps = np.asarray(function(self.params, jnp.asarray(whole[None])))[0]
            return resize_bands(maps, height, width)

        def of_tiles(positions: np.ndarray) -> np.ndarray:
            at = positions.tolist()
            tiles = np.stack([cut(pixels, y, x, size) for y, x in at])
            inside = None if foreground is None else np.stack([cut(foreground, y, x, size) for y, x in at])
            return np.asarray(function(self.params, jnp.asarray(preprocess(tiles, inside, self.how))))

        return map_tiles(of_tiles, (height, width), size, self.tiles.stride(size), self.tiles.batch_size)
