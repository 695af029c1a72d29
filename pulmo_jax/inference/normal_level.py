"""Normal level of the score at each location of images that share a frame, such as aligned X-rays.

Some places vary more between normal images than others: the edge of the film, the arms, the diaphragm. Without a
correction, the highest pixel of an aligned X-ray is nearly always there, whatever the lungs look like. The logarithm of
a score is therefore standardised by its mean and standard deviation over normal images at the same place: scores are
positive, and their spread grows with their level. The result s is converted to softplus(s) = log(1 + exp(s)), which is
positive again, and gives deviations below the normal mean little weight.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from scipy.ndimage import gaussian_filter

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import resize_bands
from pulmo_jax.methods.score_maps import Extent
from pulmo_jax.types import InputError, ProgressTracker

SIDE = 64  # cells of the grid over an image
SMOOTH_CELLS = 1.0  # sigma of the smoothing over cells: estimates from few images are noisy
LEAST_SD = 0.25  # lowest standard deviation, relative to the mean over the image
LEAST_SHARE = 0.1  # share of the images that must cover a cell
OFFSET = 1e-3  # added to scores before the logarithm, relative to their mean

Score = Callable[[np.ndarray, np.ndarray | None, str], np.ndarray]  # scorer of an image


class NormalLevel(NamedTuple):
    """Distribution of the logarithm of normal scores on a square grid over the image.

    Attributes:
        offset: Added to a score before its logarithm.
        mean: Mean of the logarithm in each cell.
        sd: Standard deviation of the logarithm in each cell.
    """

    offset: float
    mean: Float32[np.ndarray, "S S"]
    sd: Float32[np.ndarray, "S S"]

    def to_json(self) -> dict[str, object]:
        """Convert to plain numbers and lists."""
        return {"offset": self.offset, "mean": self.mean.tolist(), "sd": self.sd.tolist()}

    @staticmethod
    def from_json(content: object) -> "NormalLevel":
        """Restore the level from parsed JSON.

        Args:
            content: Result of `to_json`.

        Returns:
            The level.

        Raises:
            ValueError: If the content is no level.
        """
        if not isinstance(content, Mapping) or set(content) != set(NormalLevel._fields):
            raise ValueError("it must have offset, mean and sd")
        offset = float(content["offset"])
        mean, sd = (np.asarray(content[name], np.float32) for name in ("mean", "sd"))
        if mean.ndim != 2 or not mean.size or mean.shape[0] != mean.shape[1] or sd.shape != mean.shape:
            raise ValueError("mean and sd must be square grids of one size")
        if not (offset > 0 and (sd > 0).all() and all(np.isfinite(part).all() for part in (offset, mean, sd))):
            raise ValueError("offset and sd must be positive, and all numbers finite")
        return NormalLevel(offset, mean, sd)


def normal_level(scorer: Score, refs: Sequence[ImageRef], reader: Reader, track: ProgressTracker) -> NormalLevel:
    """Score normal images, and fit the level to their scores; see `fit_level`.

    Args:
        scorer: Scorer of a run, without a level.
        refs: Normal images.
        reader: Reader of the images.
        track: Progress display.

    Returns:
        The level.
    """
    scored = (scorer(reader.image(ref), reader.foreground(ref), ref.scale) for ref in track(refs, len(refs)))
    return fit_level(np.stack([on_grid(scores) for scores in scored]))


def fit_level(maps: Float[np.ndarray, "N S S"]) -> NormalLevel:
    """Fit the level to score maps of normal images on a grid.

    Args:
        maps: Scores; NaN where not scored.

    Returns:
        The level; the mean over the image in cells that few images cover.

    Raises:
        InputError: If a score is negative, or all are zero.
    """
    covered = np.isfinite(maps)
    mean = float(maps[covered].mean()) if covered.any() else 0.0
    if not mean > 0 or maps[covered].min() < 0:
        raise InputError(
            "calibration.locations=each: takes the logarithm of scores, and those of the training images are not "
            "positive; give calibration.locations=pooled"
        )
    logarithm = np.where(covered, np.log(np.where(covered, maps, mean) + OFFSET * mean), 0)
    known = covered.mean(0) >= LEAST_SHARE
    means = np.where(known, logarithm.sum(0) / np.maximum(covered.sum(0), 1), logarithm[covered].mean())
    means = gaussian_filter(means, SMOOTH_CELLS)
    variances = np.where(covered, (logarithm - means) ** 2, 0)
    variances = np.where(known, variances.sum(0) / np.maximum(covered.sum(0), 1), variances[covered].mean())
    sd = np.sqrt(gaussian_filter(variances, SMOOTH_CELLS))
    sd = np.maximum(sd, LEAST_SD * sd.mean() or 1.0)
    return NormalLevel(OFFSET * mean, means.astype(np.float32), sd.astype(np.float32))


def on_grid(scores: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "S S"]:
    """Average a score map over the cells of the grid; NaN in cells with less than half of their pixels scored."""
    inside = np.isfinite(scores)
    both = np.stack([np.where(inside, scores, 0), inside], axis=-1).astype(np.float32)
    sums, share = np.moveaxis(resize_bands(both, SIDE, SIDE), -1, 0)
    return np.where(share >= 0.5, sums / np.maximum(share, 0.5), np.nan)


def relative_to(level: NormalLevel, scores: Float[Array, "H W"], extent: Extent) -> Float[Array, "H W"]:
    """Standardise the logarithm of scores by the normal level of their location.

    Args:
        level: Normal level.
        scores: Scores of an image or a strip; NaN where not scored. Negative ones count as 0.
        extent: Position of the image in the array; may be traced.

    Returns:
        softplus of the standardised logarithm; it increases with the score. NaN where not scored.
    """
    rows = cell_weights(scores.shape[0], extent.top, extent.bottom, len(level.mean))
    columns = cell_weights(scores.shape[1], extent.left, extent.right, len(level.mean))
    mean, sd = (jnp.einsum("hy,yx,wx->hw", rows, a, columns, precision="highest") for a in (level.mean, level.sd))
    return jax.nn.softplus((jnp.log(jnp.maximum(scores, 0) + level.offset) - mean) / sd)


def cell_weights(count: int, start: int | Array, stop: int | Array, side: int) -> Float[Array, "N S"]:
    """Weights of linear interpolation between the centres of cells, which divide an image evenly.

    Args:
        count: Number of pixels of the array along the axis.
        start: First pixel of the image.
        stop: Pixel after the last.
        side: Number of cells.

    Returns:
        Weights of the cells at each pixel; those of the outer cell beyond its centre.
    """
    along = (jnp.arange(count) - start + 0.5) / (stop - start) * side - 0.5
    return jnp.maximum(1 - jnp.abs(jnp.clip(along, 0, side - 1)[:, None] - jnp.arange(side)), 0)
