"""An image's score: several statistics of its score map, compared with those of normal images and combined.

A nodule raises the highest pixel, a diffuse disease the mean; the combination sees both. Each statistic is converted
into a p-value on the normal images, and the p-values are combined by their weighted harmonic mean, 1 / sum(w / p) for
weights of sum 1 (Good 1958, JASA 53:799; Wilson 2019, PNAS 116:1195). It follows the smallest p-values, and statistics
that see nothing weigh little. Its rival, the Cauchy combination (Liu & Xie 2020, JASA 115:393), goes to minus infinity
if one p-value is 1; a large p-value thus hides a small one. Statistics of the same scale are nearly copies of each
other, so the weight is divided equally between three scales: a few pixels, a region, and the whole image. The image
score is -log10 of the harmonic mean.

The statistics are strongly dependent. The distribution of the score is therefore not taken from theory: the score of
each normal image is computed from the images of the other groups, and these scores set threshold and p-value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, log
from typing import Annotated

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field, FiniteFloat

from pulmo_jax.evaluation.image_statistics import UpperTail
from pulmo_jax.types import ImageStatistic, Statistic

SCALES: tuple[tuple[Statistic, ...], ...] = (("max", "top1", "area", "cell16"), ("cell4",), ("mean",))
WEIGHTS: dict[Statistic, float] = {name: 1 / len(SCALES) / len(scale) for scale in SCALES for name in scale}
TAIL_SHARE = 0.1  # of the normal images, whose mean excess is the scale of the tail
TINY = 1e-30  # scores below it count as 0
SMALLEST = 1e-12  # scale of a law relative to its highest value, so that scores stay finite

Values = dict[Statistic, tuple[FiniteFloat, ...]]


@dataclass(frozen=True)
class NormalStatistics:
    """Statistics of the normal images.

    Attributes:
        groups: Number of the group of each image, such as its patient.
        values: Statistics by name, in the order of the groups. The pixel threshold of an area comes from the other
            groups.
    """

    groups: tuple[Annotated[int, Field(ge=0)], ...]
    values: Values

    @cached_property
    def laws(self) -> "list[NormalLaw]":
        """Law of each statistic, in the order of `WEIGHTS`."""
        return [NormalLaw.of(np.sort(np.array(self.values[name]))) for name in WEIGHTS]


@dataclass(frozen=True)
class NormalLaw:
    """Continuous, strictly decreasing p-value of a statistic, from its values on normal images.

    The p-value at the i-th highest of n values is (i + 1/2) / (n + 1), with the mean i of tied values, and is linear in
    between. Beyond the highest value it decays exponentially with the mean excess of the upper tenth of the values, the
    estimate of a generalised Pareto tail of shape 0; below the lowest it approaches 1.

    Attributes:
        values: Distinct values, ascending.
        p: Their p-values.
        upper_scale: Scale of the exponential above the values.
        lower_scale: Scale of the exponential below the values.
    """

    values: Float64[np.ndarray, "M"]
    p: Float64[np.ndarray, "M"]
    upper_scale: float
    lower_scale: float

    @staticmethod
    def of(ascending: Float64[np.ndarray, "N"]) -> "NormalLaw":
        """Fit the law.

        Args:
            ascending: Values of the normal images.

        Returns:
            The law.
        """
        n = ascending.size
        values, first, count = np.unique(ascending, return_index=True, return_counts=True)
        p = (n - first - (count - 1) / 2 + 0.5) / (n + 1)
        tail = min(ceil(TAIL_SHARE * n), n - 1)
        excess = float(np.mean(ascending[n - tail :] - ascending[n - tail - 1])) if tail else 0.0
        spread = float(np.mean(ascending) - ascending[0])
        high = abs(float(values[-1]))
        unit = high if high > TINY else 1.0  # of a constant, whose scale is unknown
        upper, lower = (max(scale, SMALLEST * unit) for scale in (excess or spread or unit, spread or unit))
        return NormalLaw(values, p, upper, lower)

    def log_p(self, value: Float64[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
        """Natural logarithm of the p-value; it stays finite where the p-value underflows."""
        low, high = self.values[[0, -1]]
        inside = np.log(np.interp(value, self.values, self.p))
        above = np.log(self.p[-1]) - np.maximum(value - high, 0) / self.upper_scale
        below = np.log1p((self.p[0] - 1) * np.exp(-np.maximum(low - value, 0) / self.lower_scale))
        return np.where(value > high, above, np.where(value < low, below, inside))


def combined_score(values: Float64[np.ndarray, "K M"], laws: Sequence[NormalLaw]) -> Float64[np.ndarray, "M"]:
    """Combine the statistics of images into one score.

    Args:
        values: Each statistic of the images, in the order of `WEIGHTS`.
        laws: Law of each statistic of normal images.

    Returns:
        -log10 of the weighted harmonic mean of the p-values; it increases with every statistic.
    """
    terms = [log(weight) - law.log_p(value) for weight, value, law in zip(WEIGHTS.values(), values, laws, strict=True)]
    return np.logaddexp.reduce(terms, axis=0) / log(10)


def score_of_statistics(values: dict[Statistic, float], normal: NormalStatistics) -> float:
    """Combined score of an image.

    Args:
        values: Its statistics.
        normal: Statistics of the normal images.

    Returns:
        Score, higher for less normal images; NaN if no pixel is scored.
    """
    if not np.isfinite(list(values.values())).all():
        return float("nan")
    return float(combined_score(np.array([[values[name]] for name in WEIGHTS]), normal.laws)[0])


def normal_scores(statistic: ImageStatistic, normal: NormalStatistics) -> Float64[np.ndarray, "N"]:
    """Image scores of the normal images, from which threshold and p-value follow.

    Args:
        statistic: A single statistic or "combined".
        normal: Statistics of the normal images.

    Returns:
        Scores in the order of the images.
    """
    return left_out_scores(normal) if statistic == "combined" else np.array(normal.values[statistic])


def left_out_scores(normal: NormalStatistics) -> Float64[np.ndarray, "N"]:
    """Combined score of each normal image compared with the images of the other groups.

    Args:
        normal: Statistics of the normal images.

    Returns:
        Scores. If there is one group, its images are left out one by one; a single image is compared with itself.
    """
    table, groups = np.array([normal.values[name] for name in WEIGHTS]), np.array(normal.groups)
    if (groups == groups[0]).all():
        groups = np.arange(groups.size)
    order = np.argsort(table, axis=1, kind="stable")
    scores = np.empty(groups.size)
    for group in np.unique(groups):
        mine = groups == group
        others = mine if mine.all() else ~mine
        laws = [NormalLaw.of(row[kept[others[kept]]]) for row, kept in zip(table, order, strict=True)]
        scores[mine] = combined_score(table[:, mine], laws)
    return scores


def left_out_areas(
    tails: list[UpperTail],
    groups: Int64[np.ndarray, "N"],
    candidates: Float64[np.ndarray, "M"],
    rate: float,
) -> Float64[np.ndarray, "N"]:
    """Fraction of the pixels of each normal image above the pixel threshold of the other groups.

    An image that helped to set its threshold would exceed it less often than a new one.

    Args:
        tails: Upper tail of each image.
        groups: Number of the group of each image. If there is one group, all its images set the threshold.
        candidates: Ascending scores between which the thresholds are interpolated.
        rate: False-alarm rate per pixel.

    Returns:
        Areas.
    """
    above = np.stack([tail(candidates) for tail in tails])
    sizes, areas = np.array([tail.n for tail in tails]), np.empty(len(tails))
    for group in np.unique(groups):
        mine = groups == group
        others = mine if mine.all() else ~mine
        share = above[others].sum(axis=0) / sizes[others].sum()
        threshold = np.interp([-rate], -share, candidates)
        areas[mine] = [tails[i](threshold)[0] / tails[i].n for i in np.flatnonzero(mine)]
    return areas
