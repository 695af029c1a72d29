"""Thresholds with a known false-alarm rate, and p-values, from the scores of normal validation images alone.

Pixels of one image are correlated, and so are images of one patient. The number of pixels therefore does not determine
the precision of a threshold, and intervals are taken over groups (patients, duplicate sets), never over pixels.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, log
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from pulmo_jax.core.histogram import ScoreHistogram, group_weights, percentile_interval
from pulmo_jax.evaluation.image_score import NormalStatistics, Values, left_out_areas, normal_scores
from pulmo_jax.evaluation.image_statistics import UpperTail, image_statistics
from pulmo_jax.host.files import write_json
from pulmo_jax.host.reading import read_json
from pulmo_jax.types import ImageStatistic, InputError, Statistic

REMEDY = "Restore it from the run that wrote it, or train again."
MAX_COUNT = 2**53  # exact in float64
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
REPLICATES = 200  # of the bootstrap of a threshold
OWN: Literal["own"] = "own"  # the method or baseline computes the image score itself
MAX_KNOTS = 1000  # size of the table of normal pixel scores; 2 % steps in the p-value for 10^9 pixels


@dataclass(frozen=True)
class Threshold:
    """A calibrated threshold; higher scores are abnormal.

    Attributes:
        value: Threshold.
        false_alarm_rate: Configured false-alarm rate, per pixel or per image.
        attainable_rate: Upper bound of the false-alarm rate that n_scores scores guarantee if they are exchangeable
            with new ones; higher than the configured rate only if there are too few scores. Nominal for combined
            scores, which are exchangeable only approximately.
        low: Lower limit of the 95 % interval over groups; None with fewer than two groups.
        high: Upper limit of the interval.
        n_scores: Number of normal scores.
        n_groups: Number of groups.
        warning: Message for the user if the configured rate cannot be guaranteed, otherwise empty.
    """

    value: FiniteFloat
    false_alarm_rate: FiniteFloat
    attainable_rate: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    n_scores: Count
    n_groups: Annotated[int, Field(ge=0, le=MAX_COUNT)]
    warning: str = ""


class Knot(NamedTuple):
    """A point of the survival function of normal pixel scores.

    Attributes:
        score: Score.
        n_pixels_at_least: Number of normal pixels with at least this score.
    """

    score: FiniteFloat
    n_pixels_at_least: Count


@dataclass(frozen=True)
class Calibration:
    """Calibration of a run, stored as `calibration.json`.

    p-values are (1 + #{normal scores >= score}) / (1 + n), hence never 0.

    Attributes:
        pixel_threshold: Threshold on pixel scores.
        image_threshold: Threshold on image scores.
        normal_pixel_scores: Survival function of normal pixel scores, in ascending order of the score.
        normal_image_scores: Scores of the normal images, ascending.
        normal_image_peaks: Highest pixel score of each normal image, ascending.
        n_images_without_foreground: Number of images excluded because they have no foreground.
        image_statistic: Statistic that is the image score; "own" if the method or baseline computes the score itself;
            None in runs of older versions.
        normal_statistics: Statistics of the normal images, for scores by any statistic; None if not computed.
    """

    pixel_threshold: Threshold
    image_threshold: Threshold
    normal_pixel_scores: Annotated[tuple[Knot, ...], Field(min_length=1)] = field(repr=False)
    normal_image_scores: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)] = field(repr=False)
    normal_image_peaks: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)] = field(repr=False)
    n_images_without_foreground: int = 0
    image_statistic: ImageStatistic | Literal["own"] | None = None
    normal_statistics: NormalStatistics | None = field(default=None, repr=False)

    def pixel_p_value(self, scores: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
        """Fraction of normal pixels that score at least as high, accurate to 3 % or one pixel.

        The table is interpolated linearly in the logarithm of the p-value.

        Args:
            scores: Pixel scores; NaN where undefined.

        Returns:
            p-values; NaN where the score is NaN.
        """
        score, at_least = np.array(self.normal_pixel_scores).T
        n = self.pixel_threshold.n_scores
        log_p = np.log1p(at_least) - np.log1p(n)
        return np.exp(np.interp(scores, score, log_p, right=-np.log1p(n))).astype(np.float32)

    def image_p_value(self, image_score: float) -> float:
        """Conformal p-value of an image score.

        Args:
            image_score: Score of an image.

        Returns:
            Fraction of normal images with an image score at least as high.
        """
        return _conformal_p_value(image_score, self.normal_image_scores)

    def peak_p_value(self, peak_score: float) -> float:
        """Conformal p-value of a peak score, with one image as the search area.

        Args:
            peak_score: Highest pixel score of a region.

        Returns:
            Fraction of normal images whose highest pixel scores at least as high.
        """
        return _conformal_p_value(peak_score, self.normal_image_peaks)

    def statistic_p_values(self, values: Mapping[Statistic, float]) -> dict[Statistic, float]:
        """Conformal p-value of each statistic of an image.

        Args:
            values: Statistics of the image.

        Returns:
            Fraction of normal images with a value at least as high; empty if those of the normal images are unknown.
        """
        if self.normal_statistics is None:
            return {}
        normal = self.normal_statistics.values
        return {name: _conformal_p_value(value, sorted(normal[name])) for name, value in values.items()}

    def by_statistic(self, statistic: ImageStatistic) -> "Calibration":
        """Calibrate another image score with the same normal images.

        Args:
            statistic: A single statistic or "combined".

        Returns:
            Calibration with threshold and scores of this statistic. Names of groups are not stored; the bootstrap
            weights of the interval follow from their numbers.

        Raises:
            InputError: If the statistics of the normal images are not stored.
        """
        if statistic == self.image_statistic:
            return self
        if self.normal_statistics is None:
            raise InputError(
                f"image_statistic={statistic}: calibration.json of this run does not hold the statistics of the normal "
                "images, because an older version wrote it; train again"
            )
        scores = normal_scores(statistic, self.normal_statistics)
        groups = [str(group) for group in self.normal_statistics.groups]
        return dataclasses.replace(
            self,
            image_threshold=_image_threshold(scores, groups, self.image_threshold.false_alarm_rate),
            normal_image_scores=tuple(sorted(scores.tolist())),
            image_statistic=statistic,
        )

    def to_json(self) -> dict[str, object]:
        """Convert to plain numbers, lists and dicts; `from_json` restores the identical calibration."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: object, path: Path) -> "Calibration":
        """Restore a calibration from parsed JSON.

        Args:
            content: Parsed JSON.
            path: File from which the content was read, for error messages.

        Returns:
            The calibration.

        Raises:
            InputError: If the content is not a valid calibration.
        """
        try:
            calibration = TypeAdapter(Calibration).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{path} is not a calibration: {where}: {first['msg']}. {REMEDY}") from error
        score, at_least = zip(*calibration.normal_pixel_scores, strict=True)
        ascending = (score, at_least[::-1], calibration.normal_image_scores, calibration.normal_image_peaks)
        if any(list(values) != sorted(values) for values in ascending):
            raise InputError(f"{path} is not a calibration: its tables are out of order. {REMEDY}")
        normal = calibration.normal_statistics
        if normal is not None and {len(row) for row in normal.values.values()} != {len(normal.groups)}:
            raise InputError(f"{path} is not a calibration: its statistics are not aligned. {REMEDY}")
        return calibration


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration as JSON.

    Args:
        path: Output file.
        calibration: Calibration of a run.
    """
    write_json(path, calibration.to_json())


def read_calibration(path: Path) -> Calibration:
    """Read a calibration from JSON.

    Args:
        path: File written by `write_calibration`.

    Returns:
        The calibration.

    Raises:
        InputError: If the file is missing, is not JSON, or is not a valid calibration.
    """
    try:
        content = read_json(path, inside=path.parent)
    except (OSError, InputError) as error:
        raise InputError(f"{path} cannot be read as a calibration: {error}. {REMEDY}") from error
    return Calibration.from_json(content, path)


class NormalImage(NamedTuple):
    """Summary of a normal image.

    Attributes:
        score: Image score of the method itself; NaN if it follows from the statistics.
        peak: Highest pixel score.
        group: Group of the image, such as its patient.
        statistics: Statistics of the score map, without the area; None if not computed.
        tail: Upper tail of the pixel scores, from which the area follows.
    """

    score: float
    peak: float
    group: str
    statistics: dict[Statistic, float] | None = None
    tail: UpperTail | None = None


@dataclass(frozen=True)
class Calibrator:
    """Accumulator of normal scores: a histogram over pixels and two numbers per image; `add` returns the next state.

    Attributes:
        pixels: Scores of all foreground pixels.
        images: Summary of each image.
        n_without_foreground: Number of images without a scored foreground pixel.
    """

    pixels: ScoreHistogram = field(default_factory=ScoreHistogram.empty)
    images: tuple[NormalImage, ...] = ()
    n_without_foreground: int = 0

    def add(
        self,
        score_map: Float32[np.ndarray, "H W"],
        foreground: Bool[np.ndarray, "H W"] | None,
        image_score: float | None,
        group: str,
        statistics: bool = False,
    ) -> "Calibrator":
        """Add a normal image; pixels outside the foreground or without a score (NaN) are ignored.

        Args:
            score_map: Score map.
            foreground: Evaluated pixels; None: all.
            image_score: Score of the image; None: it follows from the statistics.
            group: Group of the image.
            statistics: Whether to compute the statistics of the score map.

        Returns:
            The next state. An image without scored foreground pixels is only counted.
        """
        evaluated = evaluated_pixels(score_map, foreground)
        scores = score_map[evaluated]
        if scores.size == 0:
            return dataclasses.replace(self, n_without_foreground=self.n_without_foreground + 1)
        mine = ScoreHistogram.empty(self.pixels.n_replicates, self.pixels.seed).add(scores, group)
        image = NormalImage(np.nan if image_score is None else float(image_score), float(scores.max()), group)
        if statistics:
            within = score_map if foreground is None else np.where(evaluated, score_map, np.float32(np.nan))
            image = image._replace(statistics=image_statistics(within, np.inf), tail=UpperTail.of(mine))
        return dataclasses.replace(self, pixels=self.pixels.merge(mine), images=(*self.images, image))

    def finish(
        self, pixel_rate: float, image_rate: float, image_statistic: ImageStatistic | Literal["own"] = OWN
    ) -> Calibration:
        """Determine the thresholds for given false-alarm rates.

        Args:
            pixel_rate: False-alarm rate per pixel.
            image_rate: False-alarm rate per image.
            image_statistic: Statistic that is the image score; "own": the scores given to `add`.

        Returns:
            The calibration.

        Raises:
            InputError: If no normal image has foreground pixels.
        """
        if not self.images:
            raise InputError(
                f"Calibration failed: none of the {self.n_without_foreground} normal validation images has foreground "
                "pixels. Provide normal images with a non-empty foreground."
            )
        knots, groups = _survival_table(self.pixels), [image.group for image in self.images]
        normal, scores = _normal_statistics(self.images, knots, pixel_rate), np.array([i.score for i in self.images])
        if image_statistic != OWN:
            assert normal is not None, "statistics are computed by add(statistics=True)"
            scores = normal_scores(image_statistic, normal)
        seed, replicates = self.pixels.seed, self.pixels.n_replicates
        return Calibration(
            pixel_threshold=_pixel_threshold(self.pixels, pixel_rate),
            image_threshold=_image_threshold(scores, groups, image_rate, seed, replicates),
            normal_pixel_scores=knots,
            normal_image_scores=tuple(sorted(scores.tolist())),
            normal_image_peaks=tuple(sorted(image.peak for image in self.images)),
            n_images_without_foreground=self.n_without_foreground,
            image_statistic=image_statistic,
            normal_statistics=normal,
        )


def evaluated_pixels(
    score_map: Float32[np.ndarray, "H W"], foreground: Bool[np.ndarray, "H W"] | None
) -> Bool[np.ndarray, "H W"]:
    """Select foreground pixels that have a score.

    Args:
        score_map: Score map; NaN where the method computes no score.
        foreground: Foreground; None: all pixels.

    Returns:
        Mask of evaluated pixels.
    """
    scored = ~np.isnan(score_map)
    return scored if foreground is None else foreground & scored


def _pixel_threshold(pixels: ScoreHistogram, rate: float) -> Threshold:
    _, attainable_rate, warning = _conformal_rank(pixels.n, rate, "pixel")
    low, high = pixels.quantile_interval(1 - rate)
    value = pixels.quantile(1 - rate)
    return Threshold(value, rate, attainable_rate, low, high, pixels.n, len(pixels.groups), warning)


def _normal_statistics(
    images: Sequence[NormalImage], knots: Sequence[Knot], pixel_rate: float
) -> NormalStatistics | None:
    """Statistics of the normal images; None if they were not computed."""
    rows = [image.statistics for image in images if image.statistics is not None]
    tails = [image.tail for image in images if image.tail is not None]
    if not rows or len(rows) < len(images):
        return None
    codes = {group: i for i, group in enumerate(dict.fromkeys(image.group for image in images))}
    groups = [codes[image.group] for image in images]
    areas = left_out_areas(tails, np.array(groups), np.array([knot.score for knot in knots]), pixel_rate)
    values: Values = {name: tuple(row[name] for row in rows) for name in rows[0]}
    values["area"] = tuple(areas.tolist())
    return NormalStatistics(tuple(groups), values)


def _image_threshold(
    scores: Float64[np.ndarray, "N"], groups: Sequence[str], rate: float, seed: int = 0, replicates: int = REPLICATES
) -> Threshold:
    order, n, n_groups = np.argsort(scores, kind="stable"), scores.size, len(set(groups))
    scores = scores[order]
    rank, attainable_rate, warning = _conformal_rank(n, rate, "image")
    weights = np.stack([group_weights(group, replicates, seed) for group in groups])[order]
    at_rank = [_weighted_order_statistic(scores, weight, rate) for weight in weights.T]
    low, high = percentile_interval(np.array(at_rank), n_groups)
    return Threshold(float(scores[rank - 1]), rate, attainable_rate, low, high, n, n_groups, warning)


def _weighted_order_statistic(scores: np.ndarray, weight: np.ndarray, rate: float) -> float:
    """Conformal threshold of a bootstrap replicate; NaN if the replicate is empty."""
    rank = np.cumsum(weight)
    if rank[-1] == 0:
        return np.nan
    return float(scores[np.searchsorted(rank, _conformal_rank(int(rank[-1]), rate, "image")[0])])


def _conformal_rank(n: int, rate: float, unit: str) -> tuple[int, float, str]:
    """Rank (from 1) of the normal score that a new normal score exceeds with probability at most `rate`.

    k = ceil((n + 1)(1 - rate)). If the n normal scores and the new one are exchangeable, the new one exceeds the k-th
    with probability at most (n + 1 - k) / (n + 1) (Vovk, Gammerman and Shafer, "Algorithmic learning in a random
    world", 2005). If k > n no score satisfies the bound; the largest score is used and its bound is reported. Images of
    a few patients are not exchangeable with an image of a new patient: the n_groups and interval of a threshold
    indicate how far to trust it.

    Returns:
        Rank, bound on the false-alarm rate, and a warning or an empty string.
    """
    exceeding = floor((n + 1) * rate + 1e-9)  # n + 1 - k; 1e-9 absorbs rounding errors of whole products
    if exceeding >= 1:
        return n + 1 - exceeding, exceeding / (n + 1), ""
    warning = (
        f"A false-alarm rate of {rate:g} per {unit} cannot be guaranteed with {n} normal {unit}s: the "
        f"threshold is their largest score, which bounds the rate by {1 / (n + 1):.2g}."
    )
    return n, 1 / (n + 1), warning


def _survival_table(pixels: ScoreHistogram) -> tuple[Knot, ...]:
    """Knots at equal ratios of the number of pixels that score at least as high, or all bins if there are few."""
    at_least = np.cumsum(pixels.count[::-1])[::-1]
    last = at_least.size - 1
    targets = np.exp(np.linspace(log(pixels.n), 0, MAX_KNOTS))
    spaced = np.clip(np.searchsorted(-at_least, -targets), 0, last)
    chosen = np.arange(last + 1) if last < MAX_KNOTS else np.unique([0, *spaced, last])
    knots = [Knot(float(pixels.low[i]), int(at_least[i])) for i in chosen]
    if pixels.high[last] > pixels.low[last]:
        knots.append(Knot(float(pixels.high[last]), 1))
    return tuple(knots)


def _conformal_p_value(score: float, ascending: Sequence[float]) -> float:
    n = len(ascending)
    return (1 + n - bisect_left(ascending, score)) / (1 + n)
