"""Errors of landmarks and the calibration of their uncertainties, with 95 % bootstrap intervals over images.

N images, K landmarks; points are (y, x) in px of the image. A landmark without a truth is NaN there and counts nowhere.
Chi-squared has two degrees of freedom throughout: a point has two coordinates.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from pulmo_jax.core.histogram import percentile_interval
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.types import InputError

REPLICATES = 1000
LEVELS = (0.68, 0.95)
REFERENCE_PX = 224  # the side of the images of many networks
Unit = Literal["px", "px_at_224", "percent_of_diagonal"]
UNITS: tuple[Unit, ...] = ("px", "px_at_224", "percent_of_diagonal")


class Errors(NamedTuple):
    """mean and median over all landmarks of all images."""

    mean: Estimate
    median: Estimate


class Shift(NamedTuple):
    """How much larger a class's mean error is than the reference's.

    p_value: of a permutation test on the images' mean errors, two-sided; None with fewer than two images in either.
    """

    difference: Estimate
    p_value: float | None


def radial_errors(points: Float[np.ndarray, "N K 2"], truth: Float[np.ndarray, "N K 2"]) -> Float[np.ndarray, "N K"]:
    """Euclidean distances, px of the image."""
    return np.hypot(*np.moveaxis(points - truth, -1, 0))


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
) -> list[Estimate]:
    """Each element of `statistic(values)`, a 1-D array, with a percentile interval: whole images are drawn anew."""
    n = len(values)
    rng = np.random.default_rng(seed)
    main = np.atleast_1d(statistic(values))
    drawn = np.array([statistic(values[rng.integers(0, n, n)]) for _ in range(replicates if n > 1 else 0)], float)
    return [_estimate(value, column, n) for value, column in zip(main, drawn.reshape(-1, main.size).T, strict=True)]


def _estimate(value: float, replicates: np.ndarray, n_images: int) -> Estimate:
    if np.isnan(value):
        return Estimate(None, reason="there are no such landmarks with a truth")
    low, high = percentile_interval(replicates.astype(np.float64), n_images)
    reason = "no interval: it takes two images" if low is None else ""
    return Estimate(float(value), low, high, reason=reason, skipped=int(np.isnan(replicates).sum()))


def error_figures(errors: Float[np.ndarray, "N K"], replicates: int = REPLICATES, seed: int = 0) -> Errors:
    """Mean and median over all landmarks of all images."""
    return Errors(*with_interval(errors, lambda drawn: _mean_and_median(drawn[~np.isnan(drawn)]), replicates, seed))


def _mean_and_median(values: np.ndarray) -> np.ndarray:
    return np.array([values.mean(), np.median(values)]) if values.size else np.full(2, np.nan)


def by_landmark(errors: Float[np.ndarray, "N K"], replicates: int = REPLICATES, seed: int = 0) -> list[Errors]:
    """Mean and median over the images, for each landmark."""
    return [error_figures(column[:, None], replicates, seed) for column in errors.T]


def by_class(
    errors: Float[np.ndarray, "N K"], labels: Sequence[str], replicates: int = REPLICATES, seed: int = 0
) -> dict[str, Errors]:
    """Mean and median over the landmarks of each class of images, by name."""
    member = np.array(labels)
    return {name: error_figures(errors[member == name], replicates, seed) for name in sorted(set(labels))}


def class_shift(
    errors: Float[np.ndarray, "N K"],
    labels: Sequence[str],
    reference: str,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Shift]:
    """Of every other class, how much larger its mean error is than that of the class `reference`.

    Images are drawn anew within each class. Raises InputError if no image is of the reference.
    """
    member, names = np.array(labels), sorted(set(labels))
    if reference not in names:
        raise InputError(f"No image is of the class {reference!r}, to compare with; the classes are {names}.")
    of_image = _image_means(errors)
    known = {name: of_image[(member == name) & ~np.isnan(of_image)] for name in names}
    return {name: _shift(known[name], known[reference], replicates, seed) for name in names if name != reference}


def _shift(values: np.ndarray, reference: np.ndarray, replicates: int, seed: int) -> Shift:
    if min(values.size, reference.size) == 0:
        return Shift(Estimate(None, reason="there are no landmarks with a truth in one of the two"), None)
    difference = float(values.mean() - reference.mean())
    if min(values.size, reference.size) < 2:
        return Shift(Estimate(difference, reason="no interval: it takes two images of each class"), None)
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(x, (replicates, x.size)).mean(1) for x in (values, reference)]
    low, high = percentile_interval(drawn[0] - drawn[1], min(values.size, reference.size))
    both = np.concatenate([values, reference])
    shuffled = rng.permuted(np.tile(both, (replicates, 1)), axis=1)
    null = shuffled[:, : values.size].mean(1) - shuffled[:, values.size :].mean(1)
    at_least = np.sum(np.abs(null) >= abs(difference) - 1e-12)
    return Shift(Estimate(difference, low, high), float((1 + at_least) / (1 + replicates)))


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
    rank = min(known.size, ceil(level * (n_images + 1) / n_images * known.size - 1e-9))
    return float(known[rank - 1] / stats.chi2.ppf(level, 2))


def coverage(
    squared: Float[np.ndarray, "N K"],
    levels: Sequence[float] = LEVELS,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> list[Estimate]:
    """The share of truths inside their region, for regions of each nominal level. squared: `squared_distance`."""
    limits = stats.chi2.ppf(np.array(levels), 2)

    def shares(drawn: np.ndarray) -> np.ndarray:
        known = drawn[~np.isnan(drawn)]
        return (known[:, None] <= limits).mean(0) if known.size else np.full(limits.size, np.nan)

    return with_interval(squared, shares, replicates, seed)


def summary(
    errors: Float[np.ndarray, "N K"], sizes: Int[np.ndarray, "N 2"], replicates: int = REPLICATES, seed: int = 0
) -> Mapping[Unit, Errors]:
    """Mean and median in every unit."""
    return {unit: error_figures(in_unit(errors, sizes, unit), replicates, seed) for unit in UNITS}
