"""Calibration of class probabilities: temperature scaling, reliability diagrams and calibration error.

N images, K classes. A row of NaN marks an image without a prediction, which is ignored.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest

BINS = 10
SCALE_SD = 0.25  # prior sd of log(scale) for logits of a trained network, which are nearly calibrated
SCORE_SCALE_SD, OFFSET_SD = 1.0, 3.0  # prior sd of log(scale) and of an offset for scores in arbitrary units
LOG_SCALE_LIMIT = 30.0  # far outside the prior; keeps exp finite during the line search


class Reliability(NamedTuple):
    """Reliability diagram.

    Attributes:
        confidence: Mean confidence in each bin; NaN in empty bins.
        accuracy: Accuracy in each bin; NaN in empty bins.
        count: Number of predictions in each bin.
        low: Lower limit of Wilson's 95 % interval of the accuracy.
        high: Upper limit of Wilson's 95 % interval of the accuracy.
    """

    confidence: Float[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]
    count: Int[np.ndarray, "bins"]  # pyright: ignore[reportIncompatibleMethodOverride]
    low: Float[np.ndarray, "bins"]
    high: Float[np.ndarray, "bins"]


@dataclass(frozen=True)
class Scaling:
    """Calibration map from logits to probabilities, softmax(scale * logits + offsets).

    Attributes:
        scale: Inverse temperature.
        offsets: Offset of each class.
    """

    scale: float
    offsets: tuple[float, ...]

    def probabilities(self, logits: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
        """Calibrated class probabilities.

        Args:
            logits: Logits of N images.

        Returns:
            Class probabilities.
        """
        return softmax(self.scale * logits + np.array(self.offsets), axis=1)


def fit_scaling(
    logits: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, "N"],
    *,
    offsets: bool,
    weights: Float[np.ndarray, "N"] | None = None,
) -> Scaling:
    """Fit the temperature, and optionally class offsets, to the logits of validation images.

    This departs from plain temperature scaling by using priors: log(scale) ~ N(0, 1/4^2), and with offsets log(scale) ~
    N(0, 1) and offset ~ N(0, 3^2). Without a prior a few perfectly separated images give an infinite scale, and the
    scale from a dozen images is mostly noise that would distort the average over networks. Hundreds of images outweigh
    the prior. Without images the logits are unchanged.

    Args:
        logits: Logits of N images.
        labels: True class of each image.
        offsets: Also fit an offset for every class except class 0; intended for scores that are not log-probabilities.
        weights: Weight of each image, default 1.

    Returns:
        Maximum a posteriori scaling.

    Reference:
        Guo et al., "On calibration of modern neural networks", ICML 2017, Section 4.2.
    """
    z, n_classes = logits.astype(np.float64), logits.shape[1]
    first = 1 if offsets else n_classes  # first class with a free offset
    truth = labels[:, None] == np.arange(n_classes)
    weight = np.ones(len(labels)) if weights is None else weights
    precision = np.array([SCORE_SCALE_SD if offsets else SCALE_SD] + [OFFSET_SD] * (n_classes - first)) ** -2.0

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log posterior of (log(scale), *offsets) and its gradient."""
        scale, shift = np.exp(parameters[0]), np.pad(parameters[1:], (first, 0))
        log_p = log_softmax(scale * z + shift, axis=1)
        residual = weight[:, None] * (np.exp(log_p) - truth)
        gradient = np.append(scale * np.sum(residual * z), residual.sum(0)[first:])
        return 0.5 * precision @ parameters**2 - weight @ log_p[truth], gradient + precision * parameters

    bounds = [(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)] + [(None, None)] * (n_classes - first)
    best = minimize(loss, np.zeros(precision.size), jac=True, method="L-BFGS-B", bounds=bounds).x
    return Scaling(float(np.exp(best[0])), tuple(np.pad(best[1:], (first, 0)).tolist()))


def expected_calibration_error(
    probabilities: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, "N"],
    weights: Float[np.ndarray, "N"] | None = None,
    bins: int = BINS,
) -> float:
    """Expected calibration error: mean gap between confidence (the highest probability) and accuracy, over bins of
    equal width.

    Args:
        probabilities: Class probabilities of N images.
        labels: True class of each image.
        weights: Weight of each image, default 1.
        bins: Number of bins.

    Returns:
        Calibration error; NaN if the total weight is 0.

    Reference:
        Guo et al. 2017, Eq. 3.
    """
    predicted = has_prediction(probabilities)
    weight = predicted.astype(np.float64) if weights is None else weights * predicted
    gaps = weight[predicted] @ calibration_gaps(probabilities[predicted], labels[predicted], bins)
    return float(np.abs(gaps).sum() / weight.sum()) if weight.any() else np.nan


def calibration_gaps(
    probabilities: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"], bins: int = BINS
) -> Float[np.ndarray, "N bins"]:
    """Contribution of each image to the calibration error.

    The calibration error is the sum of the absolute column means.

    Args:
        probabilities: Class probabilities of N images.
        labels: True class of each image.
        bins: Number of bins.

    Returns:
        Correctness (0 or 1) minus confidence in the column of the image's bin; 0 in all other columns.
    """
    confidence, correct, bin_index = _confidence(probabilities, labels, bins)
    return np.where(bin_index[:, None] == np.arange(bins), (correct - confidence)[:, None], 0.0)


def reliability(probabilities: Float[np.ndarray, "M K"], labels: Int[np.ndarray, "M"], bins: int = BINS) -> Reliability:
    """Reliability diagram over the bins of the calibration error.

    Args:
        probabilities: Class probabilities of M predictions.
        labels: True class of each prediction.
        bins: Number of bins.

    Returns:
        The diagram; its intervals treat predictions as independent.
    """
    predicted = has_prediction(probabilities)
    confidence, correct, bin_index = _confidence(probabilities[predicted], labels[predicted], bins)
    count, n_correct = np.bincount(bin_index, minlength=bins), np.bincount(bin_index[correct], minlength=bins)
    values = np.full((4, bins), np.nan)
    for i in np.flatnonzero(count):
        accuracy = binomtest(int(n_correct[i]), int(count[i]))
        values[:, i] = confidence[bin_index == i].mean(), accuracy.statistic, *accuracy.proportion_ci(method="wilson")
    return Reliability(values[0], values[1], count, values[2], values[3])


def has_prediction(probabilities: Float[np.ndarray, "*R N K"]) -> Bool[np.ndarray, "*R N"]:
    """Select rows without NaN.

    Args:
        probabilities: Class probabilities of N images.

    Returns:
        True for each image that has a prediction.
    """
    return ~np.isnan(probabilities.sum(-1))


def _confidence(
    probabilities: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"], bins: int
) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Highest probability, whether its class is correct, and its bin (bins include their upper edge)."""
    confidence, edges = probabilities.max(1).astype(np.float64), np.linspace(0, 1, bins + 1)
    return confidence, probabilities.argmax(1) == labels, np.searchsorted(edges[1:-1], confidence)
