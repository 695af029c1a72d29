"""How far class probabilities can be believed, and the scaling of logits that makes them so.

N images, K classes. A row of NaN is an image without a prediction, and counts nowhere.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest

BINS = 10
SCALE_SD = 0.25  # of the prior of log(scale): of logits, which training has brought near to those of probabilities
SCORE_SCALE_SD, OFFSET_SD = 1.0, 3.0  # of scores in units of their own: of log(scale) and of an offset
LOG_SCALE_LIMIT = 30.0  # far outside the prior: keeps exp finite in a line search


class Reliability(NamedTuple):
    """By bin of confidence: its mean, the accuracy with Wilson's 95 % interval, and the number; NaN where it is 0."""

    confidence: Float[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]
    count: Int[np.ndarray, "bins"]  # pyright: ignore[reportIncompatibleMethodOverride]
    low: Float[np.ndarray, "bins"]
    high: Float[np.ndarray, "bins"]


@dataclass(frozen=True)
class Scaling:
    """From logits to probabilities: softmax(scale * logits + offsets), where 1 / scale is the temperature."""

    scale: float
    offsets: tuple[float, ...]

    def probabilities(self, logits: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
        return softmax(self.scale * logits + np.array(self.offsets), axis=1)


def fit_scaling(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"], *, offsets: bool) -> Scaling:
    """The likeliest scale of validation images' logits, and with `offsets` that of each class but 0, whose is 0.

    Temperature scaling: Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2. Departs from
    it in priors: log(scale) ~ N(0, 1/4^2), and with offsets, for logits that are scores, log(scale) ~ N(0, 1) and
    offset ~ N(0, 3^2). A few images that are perfectly told apart would make the scale infinite, and that of a dozen
    is noise, by which networks that are averaged would count unequally; hundreds outweigh the prior. Without images
    the logits stay as they are.
    """
    z, n_classes = logits.astype(np.float64), logits.shape[1]
    first = 1 if offsets else n_classes  # class with a free offset
    truth = labels[:, None] == np.arange(n_classes)
    precision = np.array([SCORE_SCALE_SD if offsets else SCALE_SD] + [OFFSET_SD] * (n_classes - first)) ** -2.0

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """The negative log posterior of (log(scale), *offsets), and its gradient."""
        scale, shift = np.exp(parameters[0]), np.pad(parameters[1:], (first, 0))
        log_p = log_softmax(scale * z + shift, axis=1)
        residual = np.exp(log_p) - truth
        gradient = np.append(scale * np.sum(residual * z), residual.sum(0)[first:])
        return 0.5 * precision @ parameters**2 - log_p[truth].sum(), gradient + precision * parameters

    bounds = [(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)] + [(None, None)] * (n_classes - first)
    best = minimize(loss, np.zeros(precision.size), jac=True, method="L-BFGS-B", bounds=bounds).x
    return Scaling(float(np.exp(best[0])), tuple(np.pad(best[1:], (first, 0)).tolist()))


def expected_calibration_error(
    probabilities: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, "N"],
    weights: Float[np.ndarray, "N"] | None = None,
    bins: int = BINS,
) -> float:
    """The mean gap between confidence, the greatest probability, and accuracy, over bins of equal width.

    Guo et al. (2017), Eq. 3. NaN where nothing weighs.
    """
    known = has_prediction(probabilities)
    weight = known.astype(np.float64) if weights is None else weights * known
    gaps = weight[known] @ calibration_gaps(probabilities[known], labels[known], bins)
    return float(np.abs(gaps).sum() / weight.sum()) if weight.any() else np.nan


def calibration_gaps(
    probabilities: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"], bins: int = BINS
) -> Float[np.ndarray, "N bins"]:
    """Of every image, 1 if it is right, less its confidence, in the column of its bin; 0 in the others.

    The calibration error is the sum of the absolute values of the columns' means.
    """
    confidence, right, at = _confidence(probabilities, labels, bins)
    return np.where(at[:, None] == np.arange(bins), (right - confidence)[:, None], 0.0)


def reliability(probabilities: Float[np.ndarray, "M K"], labels: Int[np.ndarray, "M"], bins: int = BINS) -> Reliability:
    """The reliability diagram over the bins of the calibration error; intervals take the rows as independent."""
    known = has_prediction(probabilities)
    confidence, right, at = _confidence(probabilities[known], labels[known], bins)
    count, n_right = np.bincount(at, minlength=bins), np.bincount(at[right], minlength=bins)
    values = np.full((4, bins), np.nan)
    for i in np.flatnonzero(count):
        accuracy = binomtest(int(n_right[i]), int(count[i]))
        values[:, i] = confidence[at == i].mean(), accuracy.statistic, *accuracy.proportion_ci(method="wilson")
    return Reliability(values[0], values[1], count, values[2], values[3])


def has_prediction(probabilities: Float[np.ndarray, "*R N K"]) -> Bool[np.ndarray, "*R N"]:
    """Whether a row has no NaN."""
    return ~np.isnan(probabilities.sum(-1))


def _confidence(
    probabilities: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"], bins: int
) -> tuple[Float[np.ndarray, "N"], Bool[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """The greatest probability, whether its class is right, and its bin, which holds its upper edge."""
    confidence, edges = probabilities.max(1).astype(np.float64), np.linspace(0, 1, bins + 1)
    return confidence, probabilities.argmax(1) == labels, np.searchsorted(edges[1:-1], confidence)
