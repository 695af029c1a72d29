"""Paired comparison of methods on the same labelled images: differences of figures of merit, and p-values.

The bootstrap draws whole groups, such as patients, and uses the same weights for all methods: what makes an image hard
for every method cancels in a difference. N images, R repeats of a cross-validation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.stats import norm, rankdata

from pulmo_jax.core.histogram import group_weights
from pulmo_jax.evaluation.metrics import Estimate, bootstrap_estimate

BLOCK = 2**21  # weights held in memory
PERMUTATIONS = 9999
Figures = Mapping[str, Float[np.ndarray, "B"]]


@dataclass(frozen=True)
class Scored:
    """Results of a method on labelled images.

    Attributes:
        figures: Maps image weights (B, N) to figures of merit by name, (B,) each; NaN where undefined.
        drawn: Figures whose bootstrap replicates were computed with the scores, such as those of pixels: the value,
            then the replicates.
        drawn_with: What the replicates depend on; those of methods with the same are paired.
        scores: Scores that should be higher for positive images, (R, N); None if the method does not rank images.
        positive: Positive images.
        errors: Error of each image; None if the method does not measure one.
    """

    figures: Callable[[Float64[np.ndarray, "B N"]], Figures]
    drawn: Figures = field(default_factory=dict)
    drawn_with: tuple[object, ...] = ()
    scores: Float[np.ndarray, "R N"] | None = None
    positive: Bool[np.ndarray, "N"] | None = None
    errors: Float[np.ndarray, "N"] | None = None


def resampled(scored: Scored, groups: Sequence[str], replicates: int, seed: int) -> Figures:
    """Figures of merit and their bootstrap replicates, with Poisson(1) weights for whole groups.

    Args:
        scored: Results of a method.
        groups: Group of each image.
        replicates: Number of bootstrap replicates.
        seed: Seed of the weights; methods with the same seed and groups are paired.

    Returns:
        By name: the value, then the replicates.
    """
    parts = [scored.figures(weights) for weights in image_weights(groups, replicates, seed)]
    return {**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, **scored.drawn}


def image_weights(groups: Sequence[str], replicates: int, seed: int) -> Iterator[Float64[np.ndarray, "B N"]]:
    """Image weights in blocks: 1 first, then those of the bootstrap replicates.

    Args:
        groups: Group of each image.
        replicates: Number of bootstrap replicates.
        seed: Seed of the weights.

    Yields:
        Weights of some replicates.
    """
    names, member = np.unique(np.array(groups, str), return_inverse=True)
    drawn = np.stack([group_weights(name, replicates, seed) for name in names.tolist()], axis=1).astype(np.uint8)
    yield np.ones((1, member.size))
    size = max(1, BLOCK // member.size)
    for start in range(0, replicates, size):
        yield drawn[start : start + size, member].astype(np.float64)


def estimate(values: Float[np.ndarray, "rows"], n_groups: int) -> Estimate:
    """Estimate with its 95 % percentile interval.

    Args:
        values: The value, then the replicates.
        n_groups: Groups in the class that has the fewest.

    Returns:
        The estimate; without a value if it is undefined; without an interval for fewer than two groups, or if the
        percentiles do not hold the value.
    """
    if not np.isfinite(values[0]):
        return Estimate(None, reason="undefined for these images")
    requirement = "no interval: requires two groups of every class"
    return bootstrap_estimate(float(values[0]), values[1:].astype(np.float64), n_groups, requirement)


def difference(a: Float[np.ndarray, "rows"], b: Float[np.ndarray, "more"], n_groups: int) -> Estimate:
    """Paired difference a - b of a figure of merit.

    Args:
        a: Value and replicates of the first method.
        b: Those of the second method, with the same weights.
        n_groups: Groups in the class that has the fewest.

    Returns:
        The difference; without an interval if the replicates are not paired, being of different numbers.
    """
    if a.size != b.size:
        reason = "no interval: the evaluations drew different numbers of replicates"
        return Estimate(float(a[0] - b[0]), reason=reason)
    return estimate(a - b, n_groups)


def fewest_groups(labels: Sequence[str], groups: Sequence[str]) -> int:
    """Number of groups in the class that has the fewest.

    Args:
        labels: Class of each image.
        groups: Group of each image.

    Returns:
        Number of groups.
    """
    by_class: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        by_class.setdefault(label, set()).add(group)
    return min(map(len, by_class.values()))


def auroc_p_value(a: Scored, b: Scored, groups: Sequence[str]) -> float | None:
    """Two-sided p-value for equal AUROCs on the same images, which may be correlated within groups.

    If every image is a group of its own, this is the test of DeLong et al.

    Args:
        a: First method.
        b: Second method, on the same images.
        groups: Group of each image.

    Returns:
        The p-value, 1 for equal scores; None if either method has no scores or a constant one, images lack scores, or
        a class has fewer than two groups.

    Reference:
        Obuchowski, Biometrics 53, 567 (1997), Equations 3 to 5; DeLong et al., Biometrics 44, 837 (1988).
    """
    if a.scores is None or b.scores is None or a.positive is None:
        return None
    if is_constant(a.scores) or is_constant(b.scores):
        return None
    positive, names = a.positive, np.array(groups, str)
    if np.isnan(a.scores).any() or np.isnan(b.scores).any() or not 0 < positive.sum() < positive.size:
        return None
    gap = placements(a.scores, positive) - placements(b.scores, positive)
    delta = float(gap[positive].mean())  # difference of the AUROCs, also the mean over the negative images
    variance = clustered_variance(gap - delta, positive, names)
    if variance is None:
        return None
    if variance <= 0:
        return 1.0 if abs(delta) < 1e-12 else 0.0
    return float(2 * norm.sf(abs(delta) / np.sqrt(variance)))


def is_constant(scores: Float[np.ndarray, "R N"]) -> bool:
    """Whether every repeat gives all images the same score, which ranks none."""
    return bool((scores == scores[:, :1]).all())


def placements(scores: Float[np.ndarray, "R N"], positive: Bool[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
    """Share of the images of the other class that an image is ranked correctly against; ties count one half.

    Args:
        scores: Scores in each repeat.
        positive: Positive images.

    Returns:
        Share for each image, mean over the repeats. Its mean over the images of either class is the AUROC.
    """
    return np.mean([_placements_of_repeat(repeat, positive) for repeat in scores.astype(np.float64)], axis=0)


def _placements_of_repeat(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    among_all, result = rankdata(scores), np.empty(scores.size)
    for own, sign in ((positive, 1), (~positive, -1)):
        below = among_all[own] - rankdata(scores[own])  # images of the other class below each image, ties half
        share = below / (~own).sum()
        result[own] = share if sign == 1 else 1 - share
    return result


def clustered_variance(
    centred: Float64[np.ndarray, "N"], positive: Bool[np.ndarray, "N"], groups: np.ndarray
) -> float | None:
    """Variance of an AUROC, or of a difference of two, from its centred placements.

    Args:
        centred: Placement of each image minus the AUROC.
        positive: Positive images.
        groups: Group of each image.

    Returns:
        The variance; None with fewer than two groups of either class.
    """
    _, member = np.unique(groups, return_inverse=True)
    m, n = positive.sum(), (~positive).sum()
    of_positive, of_negative = (np.bincount(member, centred * own) for own in (positive, ~positive))
    with_positive, with_negative = (np.count_nonzero(np.bincount(member, own)) for own in (positive, ~positive))
    if min(with_positive, with_negative) < 2:
        return None
    total = member.max() + 1
    return float(
        with_positive / (with_positive - 1) * (of_positive @ of_positive) / m**2
        + with_negative / (with_negative - 1) * (of_negative @ of_negative) / n**2
        + 2 * total / (total - 1) * (of_positive @ of_negative) / (m * n)
    )


def error_p_value(
    a: Float[np.ndarray, "N"], b: Float[np.ndarray, "N"], groups: Sequence[str], seed: int
) -> float | None:
    """Two-sided p-value for equal errors: the signs of the differences of whole groups are flipped at random.

    Args:
        a: Errors of the first method.
        b: Errors of the second method on the same images; NaN where there is no ground truth.
        groups: Group of each image.
        seed: Seed of the permutations.

    Returns:
        The p-value, 1 for equal errors; None with fewer than two groups.
    """
    known = np.isfinite(a) & np.isfinite(b)
    _, member = np.unique(np.array(groups, str)[known], return_inverse=True)
    if not known.any() or member.max() < 1:
        return None
    sums = np.bincount(member, (a - b)[known])
    signs = signs_of(sums.size, seed)
    return float((1 + np.sum(np.abs(signs @ sums) >= abs(sums.sum()) * (1 - 1e-12))) / (1 + len(signs)))


def signs_of(count: int, seed: int) -> Int[np.ndarray, "P count"]:
    """Random signs for each permutation and group."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), (PERMUTATIONS, count))
