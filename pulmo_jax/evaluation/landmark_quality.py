"""Quality flags for landmarks and images, with a known false-alarm rate.

A landmark is flagged if its predicted standard deviation exceeds that of nearly all validation images. An image is
flagged if it resembles the training images less than nearly all validation images do: upside down, lateral, or not a
chest radiograph. Thresholds are conformal: at most the configured fraction of exchangeable images is flagged (Vovk et
al. 2005).
"""

from math import floor, isqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pulmo_jax.core import ppca
from pulmo_jax.core.ppca import PPCA
from pulmo_jax.types import InputError

CONTRAST_FLOOR = 0.1  # regulariser of the local standard deviation, relative to that of the image


class SurpriseModel(NamedTuple):
    """PPCA of downsampled square images with locally normalised contrast.

    Attributes:
        distribution: PPCA of the pixels.
        smoothing_px: Scale of the local normalisation, in pixels of the downsampled images.
    """

    distribution: PPCA
    smoothing_px: float | Float[Array, ""]


def fit_surprise(
    images: Float[Array, "N S S"], side: int = 32, n_components: int = 10, smoothing_px: float = 3.0
) -> SurpriseModel:
    """Fit the model of the appearance of training images.

    Args:
        images: N square training images.
        side: Side of the downsampled images in pixels.
        n_components: Number of principal components, at most N - 2.
        smoothing_px: Scale of the local normalisation, in pixels of the downsampled images.

    Returns:
        The model.

    Raises:
        InputError: If there are fewer than three images.
    """
    if len(images) < 3:
        raise InputError(f"{len(images)} training images are too few for the image-quality model; provide at least 3.")
    small = _small(images, side, smoothing_px)
    vectors = small.reshape(len(images), -1)
    return SurpriseModel(ppca.fit(vectors, min(n_components, len(images) - 2)), smoothing_px)


def surprise(model: SurpriseModel, images: Float[Array, "B S S"]) -> Float[Array, "B"]:
    """Dissimilarity of images to the training images: -ln p plus a penalty for a wrong orientation, in nats.

    The penalty is the decrease of -ln p, if any, under the best quarter turn or upside-down reflection. A left-right
    reflection is not penalised, because a chest is nearly symmetric.

    Args:
        model: Model of the training images.
        images: B square images.

    Returns:
        Surprise of each image; infinite for constant images and images with NaN.
    """
    small = _small(images, isqrt(model.distribution.mean.size), model.smoothing_px)

    def score(view: Array) -> Array:
        return ppca.negative_log_likelihood(model.distribution, view.reshape(len(view), -1))

    turned = [small[:, ::-1], *(jnp.rot90(small, turns, (1, 2)) for turns in (1, 2, 3))]
    upright = score(small)
    total = upright + jnp.maximum(upright - jnp.stack([score(view) for view in turned]).min(0), 0)
    defined = jnp.isfinite(total) & (jnp.abs(small).max((1, 2)) > 0)
    return jnp.where(defined, total, jnp.inf)


def _small(images: Array, side: int, smoothing_px: float | Array) -> Array:
    """Downsampled images (B, side, side): deviations from the local mean divided by the local spread; zeros for
    constant images.
    """
    small = jax.image.resize(images, (len(images), side, side), "linear", antialias=True)
    small = small - small.mean((1, 2), keepdims=True)
    spread = small.std((1, 2), keepdims=True)
    gray = spread <= 1e-5 * jnp.abs(images).max((1, 2), keepdims=True)
    small = small / jnp.where(gray, jnp.inf, spread)
    distance = jnp.arange(side)[:, None] - jnp.arange(side)
    window = jnp.exp(-0.5 * (distance / smoothing_px) ** 2)
    window = window / window.sum(1, keepdims=True)
    deviation = small - window @ small @ window.T
    variance = window @ deviation**2 @ window.T
    return deviation / (jnp.sqrt(variance) + CONTRAST_FLOOR)


def std_px(covariance: Float[np.ndarray, "N K 2 2"]) -> Float[np.ndarray, "N K"]:
    """Standard deviation of a landmark coordinate, averaged over directions: sqrt(trace / 2).

    Args:
        covariance: Covariance of each landmark in px^2.

    Returns:
        Standard deviations in pixels.
    """
    return np.sqrt(np.trace(covariance, axis1=-2, axis2=-1) / 2)


def threshold(scores: Float[np.ndarray, "N *K"], rate: float) -> Float[np.ndarray, "*K"]:
    """Conformal threshold along the first axis.

    The threshold is the k-th smallest score with k = ceil((N + 1) (1 - rate)), or the largest score if N is too small.

    Args:
        scores: Scores of N validation images.
        rate: Highest probability that a new exchangeable score exceeds the threshold.

    Returns:
        Threshold for each column.

    Raises:
        InputError: If there are no scores.

    Example:
        >>> threshold(np.arange(1.0, 100.0), rate=0.05).tolist()
        95.0
    """
    n = len(scores)
    if n == 0:
        raise InputError(
            "Quality thresholds require validation images with landmarks, but there are none; provide some."
        )
    exceeding = floor((n + 1) * rate + 1e-9)  # 1e-9 absorbs rounding errors of whole products
    return np.asarray(np.sort(scores, axis=0)[n - max(1, exceeding)])


def attained_rate(n: int, rate: float) -> float:
    """Upper bound of the false-alarm rate of `threshold`.

    Args:
        n: Number of validation scores.
        rate: Requested rate.

    Returns:
        The bound; above `rate` only if n is too small.

    Example:
        >>> attained_rate(99, 0.05), attained_rate(4, 0.05)
        (0.05, 0.2)
    """
    return max(1, floor((n + 1) * rate + 1e-9)) / (n + 1)


def low_quality(
    std: Float[np.ndarray, "N K"],
    std_thresholds: Float[np.ndarray, "K"],
    surprise: Float[np.ndarray, "N"],
    surprise_threshold: float,
) -> Bool[np.ndarray, "N K"]:
    """Flag unreliable landmarks.

    Args:
        std: Predicted standard deviation of each landmark in pixels.
        std_thresholds: Threshold for each landmark.
        surprise: Surprise of each image.
        surprise_threshold: Threshold of the surprise.

    Returns:
        True for landmarks whose standard deviation is too large or not a number, and for all landmarks of an image with
        too large a surprise.
    """
    return ~(std <= std_thresholds) | ~(surprise <= surprise_threshold)[:, None]
