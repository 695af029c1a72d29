"""Calibration of the probabilities of pixels: scaling, thresholds and reliability.

An image has the same weight whatever its number of pixels. N images, n pixels, M outputs (K exclusive classes have
M = K + 1 with the background first, K overlapping classes have M = K).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, UInt8
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.evaluation.class_calibration import (
    LOG_SCALE_LIMIT,
    OFFSET_SD,
    SCORE_SCALE_SD,
    Scaling,
    fit_scaling,
)
from pulmo_jax.evaluation.class_metrics import norm_interval
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.evaluation.paired import estimate, image_weights
from pulmo_jax.evaluation.segmentation_metrics import BINS, ImageScores, ratio

RELIABILITY_BINS = 10
LOWEST = 1e-6  # probabilities are clipped to LOWEST and 1 - LOWEST before their logarithm
# Independent pixels that an image counts for against the priors of the scaling. Of 1, 10, 100 and 1000, 100 is within
# 4 % of the lowest held-out log loss, for distorted ridge probabilities of lesions and for simulated rare classes; 10
# is up to 8 % above it where a rare class is predicted much too confidently.
EFFECTIVE_PIXELS = 100.0


@dataclass(frozen=True)
class PixelSample:
    """Labelled pixels of some images, by which probabilities are calibrated.

    Attributes:
        probabilities: Uncalibrated probabilities of the M outputs.
        codes: Codes of the true classes (see `data.codes`).
        weights: Weight of each pixel; those of an image sum to 1.
    """

    probabilities: Float[np.ndarray, "n M"]
    codes: UInt8[np.ndarray, "n"]
    weights: Float64[np.ndarray, "n"]


@dataclass(frozen=True)
class PixelReliability:
    """Reliability diagram of the pixels of a class.

    Attributes:
        probability: Mean probability in each bin; NaN in empty bins.
        frequency: Fraction of the pixels in each bin that belong to the class, with its interval.
        fraction: Fraction of all pixels that lies in each bin.
        ece: Expected calibration error.
    """

    probability: Float64[np.ndarray, "bins"]
    frequency: tuple[Estimate, ...]
    fraction: Float64[np.ndarray, "bins"]
    ece: Estimate


def sample_pixels(
    probabilities: Float[np.ndarray, "*grid M"], codes: UInt8[np.ndarray, "*grid"], count: int, seed: int
) -> PixelSample:
    """Draw labelled pixels of one image at random.

    Args:
        probabilities: Uncalibrated probabilities of the outputs; NaN where there are none.
        codes: Codes of the true classes.
        count: Largest number of pixels drawn.
        seed: Seed.

    Returns:
        The pixels, with weights of sum 1; empty if no pixel is labelled.
    """
    flat, of_pixel = probabilities.reshape(-1, probabilities.shape[-1]), codes.ravel()
    labelled = np.flatnonzero((of_pixel != UNLABELLED) & np.isfinite(flat).all(1))
    if labelled.size > count:
        labelled = np.random.default_rng(seed).choice(labelled, count, replace=False)
    return PixelSample(flat[labelled], of_pixel[labelled], np.full(labelled.size, 1 / max(1, labelled.size)))


def pool(samples: Sequence[PixelSample]) -> PixelSample:
    """Join the samples of several images."""
    fields = ("probabilities", "codes", "weights")
    return PixelSample(*(np.concatenate([getattr(sample, name) for sample in samples]) for name in fields))


def logits(probabilities: Float[np.ndarray, "*grid M"], overlapping: bool) -> Float64[np.ndarray, "*grid M"]:
    """Logits of probabilities: log p of exclusive outputs, log p / (1 - p) of overlapping ones."""
    p = np.clip(probabilities.astype(np.float64), LOWEST, 1 - LOWEST)
    return np.log(p) - np.log1p(-p) if overlapping else np.log(p)


def fit_pixel_scaling(
    sample: PixelSample, classes: Classes, effective_pixels: float = EFFECTIVE_PIXELS, *, offsets: bool = True
) -> Scaling:
    """Fit the temperature and an offset of each class to pixels of validation images.

    The offsets undo the excess of foreground in the training patches. The priors are those of
    `class_calibration.fit_scaling`. Neighbouring pixels are no independent evidence: the pixels of an image together
    weigh as much as `effective_pixels` against the priors.

    Args:
        sample: Pixels of the validation images.
        classes: The classes.
        effective_pixels: Weight of an image.
        offsets: Whether to fit offsets of exclusive classes; those of overlapping classes are always fitted.

    Returns:
        Maximum a posteriori scaling; the identity without pixels.
    """
    z, weights = logits(sample.probabilities, classes.overlapping), effective_pixels * sample.weights
    if classes.overlapping:
        return _fit_sigmoid(z, classes.memberships[sample.codes].astype(np.float64), weights)
    return fit_scaling(z, sample.codes.astype(np.int64), offsets=offsets, weights=weights)


def _fit_sigmoid(
    z: Float64[np.ndarray, "n K"], truth: Float64[np.ndarray, "n K"], weights: Float64[np.ndarray, "n"]
) -> Scaling:
    """Scale and offsets of sigmoid(scale * z + offsets) with the highest posterior."""
    precision = np.array([SCORE_SCALE_SD] + [OFFSET_SD] * z.shape[1]) ** -2.0
    sign = 2 * truth - 1

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log posterior of (log(scale), *offsets) and its gradient."""
        scale = np.exp(parameters[0])
        scaled = scale * z + parameters[1:]
        residual = weights[:, None] * (expit(scaled) - truth)
        gradient = np.append(scale * np.sum(residual * z), residual.sum(0))
        log_p = weights @ log_expit(sign * scaled)
        return 0.5 * precision @ parameters**2 - log_p.sum(), gradient + precision * parameters

    bounds = [(-LOG_SCALE_LIMIT, LOG_SCALE_LIMIT)] + [(None, None)] * z.shape[1]
    best = minimize(loss, np.zeros(precision.size), jac=True, method="L-BFGS-B", bounds=bounds).x
    return Scaling(float(np.exp(best[0])), tuple(best[1:].tolist()))


def dice_curves(scores: Sequence[ImageScores], row: int) -> Float64[np.ndarray, "N bins"]:
    """Dice of each image at every threshold.

    Args:
        scores: Scores of N images.
        row: Row of the scores.

    Returns:
        Dice of the pixels with p >= j / BINS, for j from 0; NaN if there are neither true nor predicted pixels.
    """
    outside, inside, _ = np.moveaxis(np.stack([s.histogram[row] for s in scores]), 1, 0)
    fp, tp = (np.cumsum(count[:, ::-1], axis=1)[:, ::-1] for count in (outside, inside))
    return ratio(2 * tp, tp + fp + tp[:, :1])


def best_threshold(
    scores: Sequence[ImageScores], row: int, groups: Sequence[str], replicates: int, seed: int
) -> Estimate:
    """Threshold of the highest mean Dice.

    Args:
        scores: Scores of N validation images.
        row: Row of the scores.
        groups: Group of each image.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap weights.

    Returns:
        The threshold with its bootstrap interval over groups, a multiple of 1 / (2 BINS) above 0: the middle of the
        thresholds that share the highest Dice. Undefined if no image has pixels of the class.
    """
    curves = dice_curves(scores, row)[:, 1:]
    with_class = np.array([s.counts[row, [0, 2]].any() for s in scores])
    if not with_class.any():
        return Estimate(None, reason="no validation image has pixels of the class")
    filled, defined = np.nan_to_num(curves), np.isfinite(curves).astype(np.float64)
    parts = []
    for weights in image_weights(groups, replicates, seed):
        mean = ratio(weights @ filled, weights @ defined)
        usable = (weights @ with_class > 0)[:, None]  # a replicate without the class has no best threshold
        parts.append(middle_of_highest(np.where(usable, mean, np.nan)))
    return estimate(np.concatenate(parts), np.unique(np.array(groups, str)[with_class]).size)


def middle_of_highest(mean: Float64[np.ndarray, "B n"]) -> Float64[np.ndarray, "B"]:
    """Middle of the first run of thresholds j / BINS, j from 1, with the highest value; NaN without a value."""
    values = np.nan_to_num(mean, nan=-1.0)
    highest = values >= values.max(1, keepdims=True) - 1e-12
    first = highest.argmax(1)
    run = np.logical_and.accumulate(highest | (np.arange(values.shape[1]) < first[:, None]), axis=1).sum(1)
    return np.where(np.isnan(mean).all(1), np.nan, (first + 1 + run) / 2 / BINS)


def reliability(
    scores: Sequence[ImageScores],
    row: int,
    groups: Sequence[str],
    replicates: int,
    seed: int,
    bins: int = RELIABILITY_BINS,
) -> PixelReliability:
    """Reliability of the pixel probabilities of a class.

    Args:
        scores: Scores of N images.
        row: Row of the scores.
        groups: Group of each image.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap weights.
        bins: Number of bins, a divisor of `segmentation_metrics.BINS`.

    Returns:
        The diagram, with bootstrap intervals over groups.
    """
    outside, inside, total = _shares(scores, row, bins)
    names, share = np.array(groups, str), outside + inside
    rows = [ratio(weights @ inside, weights @ share) for weights in image_weights(groups, replicates, seed)]
    in_bin = [np.unique(names[share[:, j] > 0]).size for j in range(bins)]
    return PixelReliability(
        probability=ratio(total.sum(0), share.sum(0)),
        frequency=tuple(map(estimate, np.concatenate(rows).T, in_bin)),
        fraction=ratio(share.sum(0), np.full(bins, share.sum())),
        ece=calibration_error(scores, row, groups, replicates, seed, bins),
    )


def calibration_error(
    scores: Sequence[ImageScores],
    row: int,
    groups: Sequence[str],
    replicates: int,
    seed: int,
    bins: int = RELIABILITY_BINS,
) -> Estimate:
    """Expected calibration error: mean gap between the probability of pixels and the frequency of the class.

    Args:
        scores: Scores of N images.
        row: Row of the scores.
        groups: Group of each image.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap weights.
        bins: Number of bins, a divisor of `segmentation_metrics.BINS`.

    Returns:
        The error with the interval of `class_metrics.norm_interval`.
    """
    labelled = np.array([s.counts[row].any() for s in scores])
    kept = [s for s, has_labels in zip(scores, labelled, strict=True) if has_labels]
    if not kept:
        return Estimate(None, reason="no image has labelled pixels")
    names = np.array(groups, str)[labelled].tolist()
    gaps = calibration_gaps(kept, row, bins)
    centred = gaps - gaps.mean(0)
    blocks = [
        [ratio(np.abs(weights @ values).sum(1), weights.sum(1)) for values in (gaps, centred)]
        for weights in image_weights(names, replicates, seed)
    ]
    error, deviation = np.concatenate(blocks, axis=1)
    count = len(set(names))
    return norm_interval(estimate(error, count), deviation[1:], count)


def calibration_gaps(
    scores: Sequence[ImageScores], row: int, bins: int = RELIABILITY_BINS
) -> Float64[np.ndarray, "N bins"]:
    """Contribution of each image to the calibration error, which is the sum of the absolute column means.

    Args:
        scores: Scores of N images.
        row: Row of the scores.
        bins: Number of bins, a divisor of `segmentation_metrics.BINS`.

    Returns:
        For each bin, the sum of truth (0 or 1) minus probability over its pixels, divided by the number of labelled
        pixels of the image; 0 for an image without any.
    """
    _, inside, total = _shares(scores, row, bins)
    return inside - total


def _shares(scores: Sequence[ImageScores], row: int, bins: int) -> Float64[np.ndarray, "3 N bins"]:
    """Histograms in coarser bins, divided by the number of labelled pixels of each image."""
    fine = np.stack([s.histogram[row] for s in scores], axis=1)
    coarse = fine.reshape(3, len(scores), bins, BINS // bins).sum(-1)
    pixels = coarse[:2].sum((0, 2))
    return coarse / np.maximum(pixels, 1)[:, None]
