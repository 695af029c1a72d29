"""Statistics of a score map that summarise an image in one number each: its highest pixel, its mean, and others."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import get_args

import numpy as np
from jaxtyping import Float, Float32, Float64

from pulmo_jax.core.histogram import ScoreHistogram
from pulmo_jax.types import Statistic

STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
TOP_FRACTION = 100  # top1 is the mean of 1 / TOP_FRACTION of the pixels
GRIDS: dict[Statistic, int] = {"cell16": 16, "cell4": 4}  # cells per side; all divide the first
FINEST = 16
MIN_FILLED = 0.5  # scored pixels of a cell, relative to the fullest cell of the image
BLOCK_PX = 2**15  # pixels read at a time
TABLE_KNOTS = 256  # 6 % steps in the number of pixels above, for an image of 10^6 pixels


def image_statistics(scores: Float[np.ndarray, "H W"], pixel_threshold: float) -> dict[Statistic, float]:
    """Compute all statistics of a score map in one pass over its rows.

    Args:
        scores: Score map; non-finite pixels are ignored.
        pixel_threshold: Threshold for the area.

    Returns:
        max: highest score. top1: mean of the highest 1 %. mean: mean. area: fraction of the scored pixels above the
        threshold. cell16, cell4: highest mean of a cell of a 16 x 16 or 4 x 4 grid over the image; cells with less than
        half as many scored pixels as the fullest cell are left out. NaN if no pixel is scored.
    """
    highest, above, floor = [np.zeros(0, scores.dtype)], 0, -np.inf
    sums, counts = np.zeros(FINEST**2), np.zeros(FINEST**2)
    room = max(1, scores.size // TOP_FRACTION)
    for values, cells in _blocks(scores):
        above += np.count_nonzero(values > pixel_threshold)
        sums += np.bincount(cells, values, FINEST**2)
        counts += np.bincount(cells, minlength=FINEST**2)
        highest.append(values[values > floor])
        if sum(map(len, highest)) >= 2 * room + BLOCK_PX:
            highest = [np.partition(np.concatenate(highest), -room)[-room:]]
            floor = highest[0][0]
    n = int(counts.sum())
    if n == 0:
        return dict.fromkeys(STATISTICS, float("nan"))
    keep = max(1, n // TOP_FRACTION)
    top = np.partition(np.concatenate(highest), -keep)[-keep:]
    return {
        "max": float(top.max()),
        "top1": float(top.mean(dtype=np.float64)),
        "mean": float(sums.sum() / n),
        "area": above / n,
        **{name: _highest_cell(sums, counts, side) for name, side in GRIDS.items()},
    }


def _blocks(scores: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Finite scores and their cells in the finest grid, some rows at a time: a large image is not copied at once."""
    height, width = scores.shape
    rows, columns = (np.arange(length) * FINEST // max(length, 1) for length in scores.shape)
    step = max(1, BLOCK_PX // max(width, 1))
    for top in range(0, height, step):
        block = scores[top : top + step]
        finite = np.isfinite(block)
        cells = rows[top : top + step, None] * FINEST + columns
        yield block[finite], cells[finite]


def _highest_cell(sums: np.ndarray, counts: np.ndarray, side: int) -> float:
    """Highest mean of a cell of a grid with `side` cells per side, from the sums over the finest grid."""
    part = FINEST // side
    total, count = (a.reshape(side, part, side, part).sum((1, 3)) for a in (sums, counts))
    filled = count >= max(1, MIN_FILLED * count.max())
    return float((total[filled] / count[filled]).max())


@dataclass(frozen=True, eq=False)
class UpperTail:
    """Number of pixels of an image above any score, in a table of bounded size.

    Attributes:
        scores: Ascending scores.
        above: Number of pixels above each of them; linear in between.
    """

    scores: Float32[np.ndarray, "knots"]
    above: Float64[np.ndarray, "knots"]

    @staticmethod
    def of(pixels: ScoreHistogram) -> "UpperTail":
        """Tabulate the pixels of one image at equal ratios of the number above.

        Args:
            pixels: Histogram of its scores.

        Returns:
            The table. Between its knots, which are at most 6 % of the number above apart for 10^6 pixels, it is linear;
            it has a knot for every bin of the histogram if these are fewer than `TABLE_KNOTS`.
        """
        above = pixels.n - np.cumsum(pixels.count)
        last = above.size - 1
        chosen = np.arange(last + 1)
        if last >= TABLE_KNOTS:
            targets = np.exp(np.linspace(log(pixels.n), 0, TABLE_KNOTS))
            chosen = np.unique([0, *np.clip(np.searchsorted(-above, -targets), 0, last), last])
        before = np.nextafter(pixels.low[:1], np.float32(-np.inf))
        return UpperTail(np.append(before, pixels.high[chosen]), np.append(float(pixels.n), above[chosen]))

    @property
    def n(self) -> float:
        """Number of pixels."""
        return float(self.above[0])

    def __call__(self, scores: Float64[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
        """Number of pixels above each score."""
        return np.interp(scores, self.scores.astype(np.float64), self.above)
