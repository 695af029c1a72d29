"""Threshold on the maximum of a field, from pure-noise fields."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from scipy.stats import binom, gumbel_r

from pulmo_jax.evaluation.null_field import FALSE_ALARM_FLOOR
from pulmo_jax.types import InputError

SCALE_ERROR = 1.05  # standard error of a Gumbel scale from the standard deviation of n maxima, times sqrt(n)
CONFIDENCE = 0.95  # of intervals
EULER = 0.5772156649015329  # mean of the standard Gumbel distribution


@dataclass(frozen=True, eq=False)
class FieldThreshold:
    """Value that noise alone exceeds anywhere in a field with a probability of at most `level`.

    Attributes:
        value: The threshold.
        level: The level asked for, or 1 / (n + 1) where n fields cannot certify a lower one.
        low: Lower end of the distribution-free 95 % interval of the quantile; infinite where no field reaches it.
        high: Upper end of that interval.
        certified: With 95 % confidence, noise exceeds the highest of all maxima with a lower probability than this (the
            rule of three).
        maxima: Highest value of each field, sorted.
    """

    value: float
    level: float
    low: float
    high: float
    certified: float
    maxima: Float[np.ndarray, "n"] = field(repr=False)

    def false_alarm(self, value: float) -> float:
        """Empirical false-alarm probability (1 + number of maxima at least as high) / (1 + n), at least 1 / (n + 1).

        Args:
            value: Maximum of the field.

        Returns:
            The probability.
        """
        return float((1 + np.sum(self.maxima >= value)) / (1 + len(self.maxima)))

    @property
    def floor(self) -> float:
        """Lowest probability that the extrapolation supports.

        A relative error e of the scale changes a probability p by the factor p^-e. At the floor one standard error of
        the scale is a factor of 10; it is never below FALSE_ALARM_FLOOR.
        """
        return max(FALSE_ALARM_FLOOR, float(10 ** (-np.sqrt(len(self.maxima)) / SCALE_ERROR)))

    def extrapolated(self, value: float) -> float:
        """False-alarm probability under a Gumbel distribution with the mean and standard deviation of the maxima.

        This extrapolates beyond the simulated maxima.

        Args:
            value: Maximum of the field.

        Returns:
            The probability, at least `floor`.
        """
        scale = max(float(self.maxima.std(ddof=1)) * np.sqrt(6) / np.pi, 1e-12)
        return max(self.floor, float(gumbel_r.sf(value, loc=self.maxima.mean() - EULER * scale, scale=scale)))


def field_threshold(maxima: Float[np.ndarray, "n"], level: float) -> FieldThreshold:
    """Threshold from the highest values of n independent fields of noise.

    Args:
        maxima: Highest value of each field.
        level: Probability of a false alarm anywhere in a field.

    Returns:
        The threshold.

    Raises:
        InputError: Fewer than two fields.

    Example:
        >>> found = field_threshold(np.arange(1.0, 100.0), level=0.05)  # 99 fields
        >>> found.value, found.level
        (95.0, 0.05)
        >>> field_threshold(np.arange(1.0, 5.0), level=0.05).level  # with 4 fields the lowest possible level
        0.2
    """
    n, ordered = len(maxima), np.sort(maxima)
    if n < 2:
        raise InputError(f"{n} null fields tell nothing of a threshold; give at least 2")
    above = int(np.floor(level * (n + 1) + 1e-9)) - 1  # maxima that may lie at or above the threshold
    above, level = (above, level) if above >= 0 else (0, 1 / (n + 1))
    tail = (1 - CONFIDENCE) / 2
    # The k-th smallest is below the quantile with the probability that fewer than k of n lie below it.
    low, high = binom.ppf(tail, n, 1 - level), binom.ppf(1 - tail, n, 1 - level) + 1
    return FieldThreshold(
        value=float(ordered[n - 1 - above]),
        level=level,
        low=float(ordered[int(low) - 1]) if low >= 1 else -np.inf,
        high=float(ordered[int(high) - 1]) if high <= n else np.inf,
        certified=float(1 - (1 - CONFIDENCE) ** (1 / n)),
        maxima=ordered,
    )
