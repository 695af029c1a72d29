"""Landmark errors and the calibration of their uncertainties, with 95 % bootstrap intervals over groups of images.

N images, K landmarks; points are (y, x) in pixels of the image. A landmark without ground truth is NaN and is ignored.
Chi-squared distributions have two degrees of freedom, one per coordinate. The bootstrap resamples groups, such as
patients; without group names each image is a separate group.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import stats

from pulmo_jax.evaluation.metrics import Estimate, bootstrap_estimate
from pulmo_jax.types import InputError

REPLICATES = 1000
LEVELS = (0.68, 0.95)
REFERENCE_PX = 224  # input size of many networks
Unit = Literal["px", "px_at_224", "percent_of_diagonal"]
UNITS: tuple[Unit, ...] = ("px", "px_at_224", "percent_of_diagonal")
CELL_RADIUS = (math.sqrt(2) + math.asinh(1)) / 6  # mean distance from the centre of a unit square
USES = 5  # mean number of uses of each distinct coordinate above which labels are assumed to lie on a grid


class Errors(NamedTuple):
    """Error statistics over all landmarks of all images.

    Attributes:
        mean: Mean error.
        median: Median error.
    """

    mean: Estimate
    median: Estimate


class Shift(NamedTuple):
    """Difference in mean error between a class and the reference class.

    Attributes:
        difference: Mean error of the class minus that of the reference.
        p_value: Two-sided p-value of a permutation test over groups; None with fewer than two groups in either class.
    """

    difference: Estimate
    p_value: float | None


def radial_errors(points: Float[np.ndarray, "N K 2"], truth: Float[np.ndarray, "N K 2"]) -> Float[np.ndarray, "N K"]:
    """Euclidean distance between predicted and true landmarks.

    Args:
        points: Predicted landmarks (y, x) in pixels.
        truth: True landmarks (y, x) in pixels.

    Returns:
        Errors in pixels of the image.

    Example:
        >>> radial_errors(np.array([[[3.0, 4.0]]]), np.zeros((1, 1, 2))).tolist()
        [[5.0]]
    """
    return np.hypot(*np.moveaxis(points - truth, -1, 0))


def label_floor_px(truth: Float[np.ndarray, "N K 2"]) -> float:
    """Mean error of a perfect prediction that is due to labels on a square grid.

    Labels are assumed to lie on a grid if they have few distinct coordinates: labels made at 64 x 64 and stored at 299
    x 299 have a step of 4.67 px.

    Args:
        truth: True landmarks (y, x) in pixels.

    Returns:
        Mean error in pixels; 0 if the labels do not lie on a grid.
    """
    labelled = truth[~np.isnan(truth)]
    distinct = np.unique(labelled)
    if distinct.size < 2 or labelled.size < USES * distinct.size:
        return 0.0
    return CELL_RADIUS * float(np.ptp(distinct)) / (distinct.size - 1)


def convert_unit(
    errors: Float[np.ndarray, "N K"], sizes: Int[np.ndarray, "N 2"], unit: Unit
) -> Float[np.ndarray, "N K"]:
    """Convert errors from pixels to another unit.

    Args:
        errors: Errors in pixels of the image.
        sizes: Height and width of each image in pixels.
        unit: "px"; "px_at_224": pixels of the image scaled to a longer side of 224; "percent_of_diagonal".

    Returns:
        Errors in that unit.
    """
    if unit == "px":
        return errors
    if unit == "px_at_224":
        return errors * (REFERENCE_PX / sizes.max(1, keepdims=True))
    return errors * (100 / np.hypot(*sizes.T)[:, None])


def bootstrap_estimates(
    values: Float[np.ndarray, "N *rest"],
    statistic: Callable[[np.ndarray], np.ndarray],
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[Estimate]:
    """Evaluate a statistic and its percentile intervals by resampling whole groups.

    Args:
        values: One row per image.
        statistic: Function from rows to a 1-D array.
        replicates: Number of bootstrap replicates.
        seed: Seed of the resampling.
        groups: Group of each image; None: each image is a separate group.

    Returns:
        One estimate for each element of the statistic.
    """
    rows = _rows_of_groups(_names(len(values), groups))
    n = len(rows)
    rng = np.random.default_rng(seed)
    point_estimate = np.atleast_1d(statistic(values))
    resampled = np.array(
        [
            statistic(values[np.concatenate([rows[i] for i in rng.integers(0, n, n)])])
            for _ in range(replicates if n > 1 else 0)
        ],
        float,
    )
    return [
        _estimate(value, column, n)
        for value, column in zip(point_estimate, resampled.reshape(-1, point_estimate.size).T, strict=True)
    ]


def _names(n: int, groups: Sequence[str] | None) -> Shaped[np.ndarray, "n"]:
    return np.arange(n) if groups is None else np.array(groups)


def _rows_of_groups(names: Shaped[np.ndarray, "n"]) -> list[Int[np.ndarray, "m"]]:
    """Indices of the images of each group."""
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def _estimate(value: float, replicates: np.ndarray, n_groups: int) -> Estimate:
    if np.isnan(value):
        return Estimate(None, reason="there are no such landmarks with ground truth")
    return bootstrap_estimate(float(value), replicates.astype(np.float64), n_groups, "no interval: requires two groups")


def error_figures(
    errors: Float[np.ndarray, "N K"],
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Errors:
    """Mean and median error over all landmarks of all images.

    Args:
        errors: Errors; NaN where there is no ground truth.
        replicates: Number of bootstrap replicates.
        seed: Seed of the resampling.
        groups: Group of each image; None: each image is a separate group.

    Returns:
        Mean and median with their intervals.
    """
    known_mean_and_median = lambda resampled: _mean_and_median(resampled[~np.isnan(resampled)])  # noqa: E731
    return Errors(*bootstrap_estimates(errors, known_mean_and_median, replicates, seed, groups))


def _mean_and_median(values: np.ndarray) -> np.ndarray:
    return np.array([values.mean(), np.median(values)]) if values.size else np.full(2, np.nan)


def class_shift(
    errors: Float[np.ndarray, "N K"],
    labels: Sequence[str],
    reference: str,
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> dict[str, Shift]:
    """Compare the mean error of each class with that of a reference class.

    Groups are resampled within each class.

    Args:
        errors: Errors; NaN where there is no ground truth.
        labels: Class of each image.
        reference: Reference class.
        replicates: Number of bootstrap replicates and permutations.
        seed: Seed of the resampling.
        groups: Group of each image; None: each image is a separate group.

    Returns:
        Difference to the reference for every other class.

    Raises:
        InputError: If no image belongs to the reference class.
    """
    member, names = np.array(labels), sorted(set(labels))
    if reference not in names:
        raise InputError(f"No image belongs to the reference class {reference!r}; the classes are {names}.")
    image_error, group = image_means(errors), _names(len(errors), groups)
    group_sums = {}
    for name in names:
        inside = (member == name) & ~np.isnan(image_error)
        rows = _rows_of_groups(group[inside])
        group_sums[name] = np.array([[image_error[inside][r].sum(), r.size] for r in rows]).reshape(-1, 2)
    return {
        name: _shift(group_sums[name], group_sums[reference], replicates, seed) for name in names if name != reference
    }


def _shift(values: Float[np.ndarray, "G 2"], reference: Float[np.ndarray, "H 2"], replicates: int, seed: int) -> Shift:
    """Of groups' sums of their images' mean errors, and their numbers of images."""
    n, m = len(values), len(reference)
    if min(n, m) == 0:
        return Shift(Estimate(None, reason="there are no landmarks with a truth in one of the two"), None)
    difference = float(_mean(values) - _mean(reference))
    if min(n, m) < 2:
        return Shift(Estimate(difference, reason="no interval: it takes two groups of each class"), None)
    rng = np.random.default_rng(seed)
    resampled = [_mean(x[rng.integers(0, len(x), (replicates, len(x)))]) for x in (values, reference)]
    estimate = bootstrap_estimate(difference, resampled[0] - resampled[1], min(n, m), "")
    shuffled = np.concatenate([values, reference])[rng.permuted(np.tile(np.arange(n + m), (replicates, 1)), axis=1)]
    null = _mean(shuffled[:, :n]) - _mean(shuffled[:, n:])
    at_least = np.sum(np.abs(null) >= abs(difference) - 1e-12)
    return Shift(estimate, float((1 + at_least) / (1 + replicates)))


def _mean(groups: Float[np.ndarray, "*R G 2"]) -> Float[np.ndarray, "*R"]:
    """Mean over the images of groups given as (sum, number)."""
    return np.asarray(groups[..., 0].sum(-1) / groups[..., 1].sum(-1))


def cumulative_error(errors: Float[np.ndarray, "N K"]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Cumulative distribution of the errors.

    Args:
        errors: Errors; NaN where there is no ground truth.

    Returns:
        Errors in ascending order, and the fraction of landmarks with at most that error.
    """
    ascending = np.sort(errors[~np.isnan(errors)])
    return ascending, np.arange(1, ascending.size + 1) / max(ascending.size, 1)


def failures(errors: Float[np.ndarray, "N K"], count: int) -> Int[np.ndarray, "n"]:
    """Images with the largest mean errors.

    Args:
        errors: Errors; NaN where there is no ground truth.
        count: Maximum number of images.

    Returns:
        Indices of the images, the largest error first; images without ground truth are excluded.
    """
    image_error = image_means(errors)
    order = np.argsort(-image_error, kind="stable")  # NaN sorts last
    return order[: min(count, int(np.sum(~np.isnan(image_error))))]


def image_means(errors: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N"]:
    """Mean error of each image.

    Args:
        errors: Errors; NaN where there is no ground truth.

    Returns:
        Means; NaN for images without ground truth.
    """
    labelled = ~np.isnan(errors)
    n = labelled.sum(1)
    return np.divide(np.where(labelled, errors, 0).sum(1), n, out=np.full(len(errors), np.nan), where=n > 0)


def squared_distance(
    points: Float[np.ndarray, "N K 2"], covariance: Float[np.ndarray, "N K 2 2"], truth: Float[np.ndarray, "N K 2"]
) -> Float[np.ndarray, "N K"]:
    """Squared Mahalanobis distance of the true from the predicted landmarks; chi-squared if the covariance is correct.

    Args:
        points: Predicted landmarks (y, x) in pixels.
        covariance: Predicted covariance of each landmark in px^2.
        truth: True landmarks (y, x) in pixels.

    Returns:
        Squared distances.

    Raises:
        InputError: If a covariance is not positive definite.
    """
    (yy, yx), (xy, xx) = np.moveaxis(covariance, (-2, -1), (0, 1))
    determinant = yy * xx - yx * xy
    bad = ~((determinant > 0) & (yy > 0))
    if bad.any():
        image, landmark = np.argwhere(bad)[0]
        raise InputError(f"The covariance of landmark {landmark + 1} of image {image} is not positive definite.")
    y, x = np.moveaxis(points - truth, -1, 0)
    return (xx * y**2 - (yx + xy) * y * x + yy * x**2) / determinant


def scale_covariance(
    points: Float[np.ndarray, "N K 2"],
    covariance: Float[np.ndarray, "N K 2 2"],
    truth: Float[np.ndarray, "N K 2"],
    level: float = 0.95,
) -> float:
    """Factor by which to scale the covariances for a given coverage.

    The factor is the conformal quantile of the squared distances divided by the chi-squared quantile. Images are
    exchangeable but landmarks of different images are not, so the K distances of a new image are set to infinity.

    Args:
        points: Predicted landmarks (y, x) in pixels.
        covariance: Predicted covariance of each landmark in px^2.
        truth: True landmarks (y, x) in pixels.
        level: Fraction of the landmarks of a new image that the confidence region is to cover.

    Returns:
        Scale factor of the covariances.

    Raises:
        InputError: If no landmark has ground truth.

    Reference:
        Lee, Barber and Willett, "Distribution-free inference with hierarchical data", 2023.
    """
    squared = squared_distance(points, covariance, truth)
    n_images = int((~np.isnan(squared)).any(1).sum())
    ascending = np.sort(squared[~np.isnan(squared)])
    if ascending.size == 0:
        raise InputError("Uncertainties cannot be calibrated: no validation image has a landmark with ground truth.")
    rank = min(ascending.size, math.ceil(level * (n_images + 1) / n_images * ascending.size - 1e-9))
    return float(ascending[rank - 1] / stats.chi2.ppf(level, 2))


def coverage(
    squared: Float[np.ndarray, "N K"],
    levels: Sequence[float] = LEVELS,
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[Estimate]:
    """Fraction of true landmarks inside their confidence region.

    Args:
        squared: Squared distances from `squared_distance`.
        levels: Nominal levels of the regions.
        replicates: Number of bootstrap replicates.
        seed: Seed of the resampling.
        groups: Group of each image; None: each image is a separate group.

    Returns:
        Coverage for each level.
    """
    limits = stats.chi2.ppf(np.array(levels), 2)

    def shares(resampled: np.ndarray) -> np.ndarray:
        known = resampled[~np.isnan(resampled)]
        return (known[:, None] <= limits).mean(0) if known.size else np.full(limits.size, np.nan)

    return bootstrap_estimates(squared, shares, replicates, seed, groups)


def held_out_coverage(
    points: Float[np.ndarray, "N K 2"],
    covariance: Float[np.ndarray, "N K 2 2"],
    truth: Float[np.ndarray, "N K 2"],
    groups: Sequence[str],
    folds: int = 5,
    level: float = 0.95,
) -> float | None:
    """Cross-validated coverage of the calibrated confidence regions.

    The covariances of each fold are scaled by `scale_covariance` of the other folds.

    Args:
        points: Predicted landmarks (y, x) in pixels.
        covariance: Predicted covariance of each landmark in px^2.
        truth: True landmarks (y, x) in pixels.
        groups: Group of each image; groups are never divided between folds.
        folds: Number of folds.
        level: Nominal level of the regions.

    Returns:
        Fraction of true landmarks inside their region; None with fewer groups than folds, or if a part has no ground
        truth.
    """
    rows = _rows_of_groups(np.array(groups))
    if len(rows) < folds:
        return None
    fold = np.zeros(len(points), int)
    for number, members in enumerate(rows):
        fold[members] = number % folds
    squared, inside = squared_distance(points, covariance, truth), np.full(truth.shape[:2], np.nan)
    for index in range(folds):
        held_out = fold == index
        if np.isnan(squared[~held_out]).all():
            return None
        factor = scale_covariance(points[~held_out], covariance[~held_out], truth[~held_out], level)
        inside[held_out] = squared[held_out] / factor <= stats.chi2.ppf(level, 2)
    return float(inside[~np.isnan(squared)].mean())


def summary(
    errors: Float[np.ndarray, "N K"],
    sizes: Int[np.ndarray, "N 2"],
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Mapping[Unit, Errors]:
    """Mean and median error in every unit.

    Args:
        errors: Errors in pixels; NaN where there is no ground truth.
        sizes: Height and width of each image in pixels.
        replicates: Number of bootstrap replicates.
        seed: Seed of the resampling.
        groups: Group of each image; None: each image is a separate group.

    Returns:
        Error statistics by unit.
    """
    return {unit: error_figures(convert_unit(errors, sizes, unit), replicates, seed, groups) for unit in UNITS}
