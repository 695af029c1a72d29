"""Which landmarks, and which images, are not to be trusted: flags with a known false-alarm rate.

A landmark is doubtful if its predicted standard deviation is larger than on nearly all validation images, an image if
it is less like the training images than nearly all of them: upside down, lateral, or no chest at all. Thresholds are
conformal: of exchangeable images at most the configured rate is flagged (Vovk et al. 2005).
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

CONTRAST_FLOOR = 0.1  # of the image's standard deviation: below it nothing is amplified


class SurpriseModel(NamedTuple):
    """PPCA of small square images of locally normalised contrast. smoothing_px: what is local, in their px."""

    distribution: PPCA
    smoothing_px: float | Float[Array, ""]


def fit_surprise(
    images: Float[Array, "N S S"], side: int = 32, n_components: int = 10, smoothing_px: float = 3.0
) -> SurpriseModel:
    """What training images look like; fewer components where there are few images.

    Raises InputError with fewer than three images.
    """
    if len(images) < 3:
        raise InputError(f"{len(images)} training images cannot show what an image looks like: give 3 or more.")
    small = _small(images, side, smoothing_px)
    vectors = small.reshape(len(images), -1)
    return SurpriseModel(ppca.fit(vectors, min(n_components, len(images) - 2)), smoothing_px)


def surprise(model: SurpriseModel, images: Float[Array, "B S S"]) -> Float[Array, "B"]:
    """How unlike the training images: -ln p, plus what a turned or mirrored image would have less of it (if any).

    In nats. Turns are the quarter turns and the image upside down; the left-right mirror image counts as it is, for
    nearly all of a chest is symmetric. Infinite for an image that is one gray, and for one with NaN.
    """
    small = _small(images, isqrt(model.distribution.mean.size), model.smoothing_px)

    def score(view: Array) -> Array:
        return ppca.negative_log_likelihood(model.distribution, view.reshape(len(view), -1))

    turned = [small[:, ::-1], *(jnp.rot90(small, turns, (1, 2)) for turns in (1, 2, 3))]
    upright = score(small)
    total = upright + jnp.maximum(upright - jnp.stack([score(view) for view in turned]).min(0), 0)
    known = jnp.isfinite(total) & (jnp.abs(small).max((1, 2)) > 0)
    return jnp.where(known, total, jnp.inf)


def _small(images: Array, side: int, smoothing_px: float | Array) -> Array:
    """(B, side, side): deviations from the local mean over their local spread; all zeros for one gray."""
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
    """Standard deviation of a coordinate, the mean over directions: sqrt(trace / 2)."""
    return np.sqrt(np.trace(covariance, axis1=-2, axis2=-1) / 2)


def threshold(scores: Float[np.ndarray, "N *K"], rate: float) -> Float[np.ndarray, "*K"]:
    """What one more exchangeable score exceeds with a probability of at most `rate`, along the first axis.

    The k-th smallest, k = ceil((N + 1) (1 - rate)); the largest where there are too few scores for that.
    """
    n = len(scores)
    if n == 0:
        raise InputError("No threshold can be set without validation images with landmarks: give some.")
    exceeding = floor((n + 1) * rate + 1e-9)  # 1e-9 for products that are whole but for rounding
    return np.asarray(np.sort(scores, axis=0)[n - max(1, exceeding)])


def attained_rate(n: int, rate: float) -> float:
    """The rate that `threshold` of n scores keeps: above `rate` only where n is too small."""
    return max(1, floor((n + 1) * rate + 1e-9)) / (n + 1)


def low_quality(
    std: Float[np.ndarray, "N K"],
    std_thresholds: Float[np.ndarray, "K"],
    surprise: Float[np.ndarray, "N"],
    surprise_threshold: float,
) -> Bool[np.ndarray, "N K"]:
    """Landmarks not to be trusted: their own spread is too large (or not a number), or their image too surprising."""
    return ~(std <= std_thresholds) | ~(surprise <= surprise_threshold)[:, None]
