"""Variance that is added to landmarks in images unlike the training images.

A method states a covariance from what it sees, and the calibration scales it by the errors on validation images. Both
fail on an image of another kind: a template that fits nowhere still has a sharp best fit. The dissimilarity of the
image to the training images (its surprise) reveals such images, so the variance grows with it, by as much as the errors
do on degraded validation images.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95  # share of the landmarks that the regions are to contain
UNUSUAL_RATE = 0.05  # highest share of images like the validation images to which something is added
BINS = 8
LEAST = 20  # images in a bin


class Doubt(NamedTuple):
    """Additional variance as a piecewise linear function of the surprise, constant beyond its ends.

    Attributes:
        surprise: Knots, nats, ascending.
        variance: Additional variance of a coordinate, px^2 of the resized image, ascending from 0; empty: none.
    """

    surprise: tuple[float, ...]
    variance: tuple[float, ...]


def added_variance(doubt: Doubt, surprise: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Additional variance of the landmarks of each image.

    Args:
        doubt: The function.
        surprise: Surprise of each image, nats; infinite for images without contrast.

    Returns:
        Variance of a coordinate, px^2 of the resized image.
    """
    if not doubt.surprise:
        return np.zeros(len(surprise))
    known = np.where(np.isnan(surprise), np.inf, surprise)
    return np.interp(known, doubt.surprise, doubt.variance)


def required_variance(
    points: Float[np.ndarray, "N K 2"],
    covariance: Float[np.ndarray, "N K 2 2"],
    truth: Float[np.ndarray, "N K 2"],
    level: float = LEVEL,
) -> Float[np.ndarray, "N K"]:
    """Smallest variance v by which the region of each landmark contains the truth.

    With the eigenvalues a, b of the covariance and the error (e, f) along its axes, v solves e^2 / (a + v) +
    f^2 / (b + v) = q, a quadratic equation, where q is the chi-squared quantile of the level.

    Args:
        points: Predicted landmarks (y, x), px.
        covariance: Predicted covariance, px^2.
        truth: True landmarks, px; NaN where unknown.
        level: Level of the region.

    Returns:
        The variance, px^2; 0 if the region contains the truth as it is, NaN without a truth.
    """
    q = stats.chi2.ppf(level, 2)
    values, axes = np.linalg.eigh(covariance.astype(float))
    along = np.einsum("nkij,nki->nkj", axes, points - truth) ** 2
    (a, b), (e, f) = np.moveaxis(values, -1, 0), np.moveaxis(along, -1, 0)
    half = (a + b - (e + f) / q) / 2
    rest = a * b - (e * b + f * a) / q
    return np.maximum(np.sqrt(np.maximum(half**2 - rest, 0)) - half, 0)


def fit_doubt(
    surprise: Float[np.ndarray, "N"],
    points: Float[np.ndarray, "N K 2"],
    covariance: Float[np.ndarray, "N K 2 2"],
    truth: Float[np.ndarray, "N K 2"],
    usual: float,
) -> Doubt:
    """Fit the additional variance to validation images and their degraded copies.

    Images are divided by their surprise into bins with equal numbers. In each bin the variance is the quantile LEVEL of
    those that its landmarks require, and never smaller than in a bin of less surprise.

    Args:
        surprise: Surprise of each image, nats.
        points: Predicted landmarks (y, x), px of the resized image.
        covariance: Calibrated covariance, px^2.
        truth: True landmarks; NaN where unknown.
        usual: Surprise up to which nothing is added, nats.

    Returns:
        The function.
    """
    required = required_variance(points, covariance, truth)
    unusual = np.flatnonzero(np.isfinite(surprise) & (surprise > usual) & np.isfinite(required).any(1))
    if not unusual.size:
        return Doubt((), ())
    ascending = unusual[np.argsort(surprise[unusual], kind="stable")]
    knots, variances = [usual], [0.0]
    for rows in np.array_split(ascending, max(1, min(BINS, len(ascending) // LEAST))):
        knots.append(float(np.median(surprise[rows])))
        known = required[rows][np.isfinite(required[rows])]
        variances.append(max(variances[-1], float(np.quantile(known, LEVEL))))
    return Doubt(tuple(knots), tuple(variances))
