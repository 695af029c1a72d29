"""Image score of a score map with its p-values, as calibrated on normal images."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from pulmo_jax.evaluation.calibration import OWN, Calibration
from pulmo_jax.evaluation.image_score import score_of_statistics
from pulmo_jax.evaluation.image_statistics import image_statistics
from pulmo_jax.methods.base import Method, OwnScore, Summarised
from pulmo_jax.methods.ensemble import Ensemble
from pulmo_jax.types import ImageStatistic, Statistic


@dataclass(frozen=True)
class ImageRating:
    """Image score and p-values.

    Attributes:
        score: Image score; NaN if no pixel was scored.
        p_value: Fraction of normal images that score at least as high; NaN if no pixel was scored.
        anomalous: Whether the score is above the image threshold.
        scores: Image score by every single statistic and, unless an older version made the run, by their combination.
        p_values: Fraction of normal images with a statistic at least as high, by name; empty if no pixel was scored,
            and for runs of older versions.
    """

    score: float
    p_value: float
    anomalous: bool
    scores: dict[ImageStatistic, float]
    p_values: dict[Statistic, float]

    @property
    def scored(self) -> bool:
        """Whether any pixel was scored."""
        return bool(np.isfinite(self.score))


def image_statistic_of(method: Method, calibration: Calibration | None = None) -> ImageStatistic | Literal["own"]:
    """Name of the statistic that is the image score.

    Args:
        method: Method of the run.
        calibration: Its calibration, which takes precedence; None before the calibration.

    Returns:
        A single statistic, "combined", or "own" if the method computes the score itself.
    """
    if calibration is not None and calibration.image_statistic is not None:
        return calibration.image_statistic
    one = member_of(method)
    if isinstance(one, OwnScore):
        return OWN
    chosen = one.image_statistic if isinstance(one, Summarised) else "combined"
    older = calibration is not None and calibration.normal_statistics is None
    return "max" if older and chosen == "combined" else chosen  # the default of older versions


def member_of(method: Method) -> Method:
    """The method whose image score an ensemble has; another method itself."""
    return method.member if isinstance(method, Ensemble) else method


def own_score(method: Method, scores: Float[np.ndarray, "H W"]) -> float | None:
    """Image score that the method itself computes; None if it follows from the statistics.

    Args:
        method: Method of the run.
        scores: Score map.

    Returns:
        Image score, or None.
    """
    one = member_of(method)
    return float(one.image_score(scores)) if isinstance(one, OwnScore) else None


def rate_image(method: Method, calibration: Calibration, scores: Float[np.ndarray, "H W"]) -> ImageRating:
    """Compute the image score of a score map, and its p-values.

    Args:
        method: Method of the run.
        calibration: Calibration of the method.
        scores: Score map, NaN where not scored.

    Returns:
        The rating.
    """
    statistics = image_statistics(scores, calibration.pixel_threshold.value)
    kind, normal = image_statistic_of(method, calibration), calibration.normal_statistics
    found: dict[ImageStatistic, float] = {**statistics}
    if normal is not None:
        found["combined"] = score_of_statistics(statistics, normal)
    score = found[kind] if kind != OWN else own_score(method, scores)
    if score is None or not np.isfinite(score):
        return ImageRating(float("nan"), float("nan"), False, found, {})
    p_value, anomalous = calibration.image_p_value(score), score > calibration.image_threshold.value
    return ImageRating(score, p_value, anomalous, found, calibration.statistic_p_values(statistics))
