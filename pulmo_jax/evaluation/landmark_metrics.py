"""Errors of landmarks and the calibration of their uncertainties, with 95 % bootstrap intervals over groups of images.

N images, K landmarks; points are (y, x) in px of the image. A landmark without a truth is NaN there and counts nowhere.
Chi-squared has two degrees of freedom throughout: a point has two coordinates. Groups, such as patients, are what is
drawn anew; without their names each image is one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import stats

from pulmo_jax.core.histogram import percentile_interval
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.types import InputError

REPLICATES = 1000
LEVELS = (0.68, 0.95)
REFERENCE_PX = 224  # the side of the images of many networks
Unit = Literal["px", "px_at_224", "percent_of_diagonal"]
UNITS: tuple[Unit, ...] = ("px", "px_at_224", "percent_of_diagonal")
CELL_RADIUS = (math.sqrt(2) + math.asinh(1)) / 6  # mean distance of a square's points from its centre, in sides
USES = 5  # of each coordinate, on average, before few distinct ones are called a grid


class Errors(NamedTuple):
    """mean and median over all landmarks of all images."""

    mean: Estimate
    median: Estimate


class Shift(NamedTuple):
    """How much larger a class's mean error is than the reference's.

    p_value: of a permutation of the groups, two-sided; None with fewer than two groups in either.
    """

    difference: Estimate
    p_value: float | None


def radial_errors(points: Float[np.ndarray, "N K 2"], truth: Float[np.ndarray, "N K 2"]) -> Float[np.ndarray, "N K"]:
    """Euclidean distances, px of the image."""
    return np.hypot(*np.moveaxis(points - truth, -1, 0))


def label_floor_px(truth: Float[np.ndarray, "N K 2"]) -> float:
    """The mean error of a perfect prediction where labels lie on a square grid, px; 0 where they do not.

    They do if they have few distinct coordinates: a label made at 64x64 and stored at 299 has a step of 4.67 px.
    """
    known = truth[~np.isnan(truth)]
    distinct = np.unique(known)
    if distinct.size < 2 or known.size < USES * distinct.size:
        return 0.0
    return CELL_RADIUS * float(np.ptp(distinct)) / (distinct.size - 1)


def in_unit(errors: Float[np.ndarray, "N K"], sizes: Int[np.ndarray, "N 2"], unit: Unit) -> Float[np.ndarray, "N K"]:
    """Errors in px as those of an image with a longer side of 224 px, or in percent of the diagonal. sizes: (H, W)."""
    if unit == "px":
        return errors
    if unit == "px_at_224":
        return errors * (REFERENCE_PX / sizes.max(1, keepdims=True))
    return errors * (100 / np.hypot(*sizes.T)[:, None])


def with_interval(
    values: Float[np.ndarray, "N *rest"],
    statistic: Callable[[np.ndarray], np.ndarray],
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[Estimate]:
    """Each element of `statistic(values)`, a 1-D array, with a percentile interval: whole groups are drawn anew."""
    rows = _rows_of_groups(_names(len(values), groups))
    n = len(rows)
    rng = np.random.default_rng(seed)
    main = np.atleast_1d(statistic(values))
    drawn = np.array(
        [
            statistic(values[np.concatenate([rows[i] for i in rng.integers(0, n, n)])])
            for _ in range(replicates if n > 1 else 0)
        ],
        float,
    )
    return [_estimate(value, column, n) for value, column in zip(main, drawn.reshape(-1, main.size).T, strict=True)]


def _names(n: int, groups: Sequence[str] | None) -> Shaped[np.ndarray, "n"]:
    return np.arange(n) if groups is None else np.array(groups)


def _rows_of_groups(names: Shaped[np.ndarray, "n"]) -> list[Int[np.ndarray, "m"]]:
    """Which images each group has."""
    return [np.flatnonzero(names == name) for name in np.unique(names)]


def _estimate(value: float, replicates: np.ndarray, n_groups: int) -> Estimate:
    if np.isnan(value):
        return Estimate(None, reason="there are no such landmarks with a truth")
    low, high = percentile_interval(replicates.astype(np.float64), n_groups)
    reason = "no interval: it takes two groups" if low is None else ""
    return Estimate(float(value), low, high, reason=reason, skipped=int(np.isnan(replicates).sum()))


def error_figures(
    errors: Float[np.ndarray, "N K"],
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Errors:
    """Mean and median over all landmarks of all images."""
    of_known = lambda drawn: _mean_and_median(drawn[~np.isnan(drawn)])  # noqa: E731
    return Errors(*with_interval(errors, of_known, replicates, seed, groups))


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
    """Of every other class, how much larger its mean error is than that of the class `reference`.

    Groups are drawn anew within each class. Raises InputError if no image is of the reference.
    """
    member, names = np.array(labels), sorted(set(labels))
    if reference not in names:
        raise InputError(f"No image is of the class {reference!r}, to compare with; the classes are {names}.")
    of_image, group = _image_means(errors), _names(len(errors), groups)
    known = {}
    for name in names:
        inside = (member == name) & ~np.isnan(of_image)
        rows = _rows_of_groups(group[inside])
        known[name] = np.array([[of_image[inside][r].sum(), r.size] for r in rows]).reshape(-1, 2)
    return {name: _shift(known[name], known[reference], replicates, seed) for name in names if name != reference}


def _shift(values: Float[np.ndarray, "G 2"], reference: Float[np.ndarray, "H 2"], replicates: int, seed: int) -> Shift:
    """Of groups' sums of their images' mean errors, and their numbers of images."""
    n, m = len(values), len(reference)
    if min(n, m) == 0:
        return Shift(Estimate(None, reason="there are no landmarks with a truth in one of the two"), None)
    difference = float(_mean(values) - _mean(reference))
    if min(n, m) < 2:
        return Shift(Estimate(difference, reason="no interval: it takes two groups of each class"), None)
    rng = np.random.default_rng(seed)
    drawn = [_mean(x[rng.integers(0, len(x), (replicates, len(x)))]) for x in (values, reference)]
    low, high = percentile_interval(drawn[0] - drawn[1], min(n, m))
    shuffled = np.concatenate([values, reference])[rng.permuted(np.tile(np.arange(n + m), (replicates, 1)), axis=1)]
    null = _mean(shuffled[:, :n]) - _mean(shuffled[:, n:])
    at_least = np.sum(np.abs(null) >= abs(difference) - 1e-12)
    return Shift(Estimate(difference, low, high), float((1 + at_least) / (1 + replicates)))


def _mean(groups: Float[np.ndarray, "*R G 2"]) -> Float[np.ndarray, "*R"]:
    """Over the images of groups of (sum, number)."""
    return np.asarray(groups[..., 0].sum(-1) / groups[..., 1].sum(-1))


def cumulative_error(errors: Float[np.ndarray, "N K"]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The errors, ascending, and the share of landmarks with at most each of them."""
    ascending = np.sort(errors[~np.isnan(errors)])
    return ascending, np.arange(1, ascending.size + 1) / max(ascending.size, 1)


def failures(errors: Float[np.ndarray, "N K"], count: int) -> Int[np.ndarray, "n"]:
    """The images with the largest mean errors, the worst first; those without a truth are left out."""
    of_image = _image_means(errors)
    order = np.argsort(-of_image, kind="stable")  # NaN comes last
    return order[: min(count, int(np.sum(~np.isnan(of_image))))]


def _image_means(errors: np.ndarray) -> np.ndarray:
    known = ~np.isnan(errors)
    n = known.sum(1)
    return np.divide(np.where(known, errors, 0).sum(1), n, out=np.full(len(errors), np.nan), where=n > 0)


def squared_distance(
    points: Float[np.ndarray, "N K 2"], covariance: Float[np.ndarray, "N K 2 2"], truth: Float[np.ndarray, "N K 2"]
) -> Float[np.ndarray, "N K"]:
    """Squared Mahalanobis distance of each truth from its prediction; chi-squared if the covariance is right.

    Raises InputError for a covariance that is not positive definite.
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
    """By what to multiply covariances so that the region of `level` covers as many landmarks of a new image.

    The conformal quantile of the squared distances over chi-squared's. Landmarks of one image are not exchangeable
    with those of another, images are: the new image's K distances count as infinite (Lee, Barber & Willett,
    "Distribution-free inference with hierarchical data", 2023). Raises InputError without any truth.
    """
    squared = squared_distance(points, covariance, truth)
    n_images = int((~np.isnan(squared)).any(1).sum())
    known = np.sort(squared[~np.isnan(squared)])
    if known.size == 0:
        raise InputError("Uncertainties cannot be calibrated: no validation image has a landmark with a truth.")
    rank = min(known.size, math.ceil(level * (n_images + 1) / n_images * known.size - 1e-9))
    return float(known[rank - 1] / stats.chi2.ppf(level, 2))


def coverage(
    squared: Float[np.ndarray, "N K"],
    levels: Sequence[float] = LEVELS,
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[Estimate]:
    """The share of truths inside their region, for regions of each nominal level. squared: `squared_distance`."""
    limits = stats.chi2.ppf(np.array(levels), 2)

    def shares(drawn: np.ndarray) -> np.ndarray:
        known = drawn[~np.isnan(drawn)]
        return (known[:, None] <= limits).mean(0) if known.size else np.full(limits.size, np.nan)

    return with_interval(squared, shares, replicates, seed, groups)


def held_out_coverage(
    points: Float[np.ndarray, "N K 2"],
    covariance: Float[np.ndarray, "N K 2 2"],
    truth: Float[np.ndarray, "N K 2"],
    groups: Sequence[str],
    folds: int = 5,
    level: float = 0.95,
) -> float | None:
    """The share of truths inside their region of `level`, each group's covariances scaled by what the groups of the
    other folds show (`scale_covariance`). None with fewer groups than folds, or where a part has no truth.
    """
    rows = _rows_of_groups(np.array(groups))
    if len(rows) < folds:
        return None
    fold = np.zeros(len(points), int)
    for number, of_group in enumerate(rows):
        fold[of_group] = number % folds
    squared, inside = squared_distance(points, covariance, truth), np.full(truth.shape[:2], np.nan)
    for here in range(folds):
        held = fold == here
        if np.isnan(squared[~held]).all():
            return None
        factor = scale_covariance(points[~held], covariance[~held], truth[~held], level)
        inside[held] = squared[held] / factor <= stats.chi2.ppf(level, 2)
    return float(inside[~np.isnan(squared)].mean())


def summary(
    errors: Float[np.ndarray, "N K"],
    sizes: Int[np.ndarray, "N 2"],
    replicates: int = REPLICATES,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Mapping[Unit, Errors]:
    """Mean and median in every unit."""
    return {unit: error_figures(in_unit(errors, sizes, unit), replicates, seed, groups) for unit in UNITS}
