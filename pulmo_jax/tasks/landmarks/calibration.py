"""Calibration of landmark uncertainties on validation images and on their degraded copies."""

import numpy as np
from jaxtyping import Bool, Float

from pulmo_jax.data.pipeline import evenly_spaced
from pulmo_jax.evaluation.landmark_degraded import degraded
from pulmo_jax.evaluation.landmark_doubt import UNUSUAL_RATE, Doubt, fit_doubt
from pulmo_jax.evaluation.landmark_metrics import held_out_coverage, scale_covariance
from pulmo_jax.evaluation.landmark_quality import SurpriseModel, attained_rate, std_px, surprise, threshold
from pulmo_jax.inference.locate import Locate, Positions, in_batches
from pulmo_jax.tasks.landmarks.data import Labelled
from pulmo_jax.tasks.landmarks.stored import LandmarkCalibration
from pulmo_jax.types import InputError

LOW_RATE = 0.02  # nominal rate of validation landmarks, and of validation images, of low quality
MOST_DEGRADED = 48  # validation images of which degraded copies are made
LARGEST = 1e30  # pixel value; larger ones overflow in noise


def calibrate(located: Positions, validation: Labelled, unlike: Float[np.ndarray, "N"]) -> LandmarkCalibration:
    """Calibrate the uncertainties on the validation images.

    Args:
        located: Predicted landmarks, px of the resized images.
        validation: Validation images.
        unlike: Dissimilarity of each image, nats; not finite for an image without contrast, which is ignored.

    Returns:
        The calibration.

    Raises:
        InputError: If no validation image has contrast.
    """
    truth = validation.square_points
    seen = unlike[np.isfinite(unlike)]  # images without contrast are ignored
    if not seen.size:
        raise InputError(f"none of the {len(unlike)} validation images has any contrast; give other images")
    factor = scale_covariance(located.points, located.covariance, truth)
    return LandmarkCalibration(
        covariance_factor=float(factor),
        std_limits=tuple(threshold(std_px(located.covariance * factor), LOW_RATE).tolist()),
        surprise_limit=float(threshold(seen, LOW_RATE)),
        rate=attained_rate(len(truth), LOW_RATE),
        n_images=len(truth),
        held_out_coverage=held_out_coverage(located.points, located.covariance, truth, validation.groups),
    )


def doubt_of(
    locate: Locate,
    look: SurpriseModel,
    validation: Labelled,
    unlike: Float[np.ndarray, "N"],
    factor: float,
    seed: int,
) -> Doubt:
    """Fit the additional variance of landmarks to validation images and their degraded copies.

    Args:
        locate: Localisation in resized images.
        look: Appearance model.
        validation: Validation images.
        unlike: Their dissimilarity, nats.
        factor: Factor of the covariances.
        seed: Seed of the noise.

    Returns:
        Additional variance by dissimilarity.
    """
    rows = evenly_spaced(np.flatnonzero(np.isfinite(unlike)), MOST_DEGRADED)
    rows = rows[np.abs(validation.working.pixels[rows]).max((1, 2)) < LARGEST]
    if not rows.size:
        return Doubt((), ())
    images, truth = np.asarray(validation.working.pixels[rows]), validation.square_points[rows]
    parts = []
    for pixels, points in [(images, truth), *(copies for _, copies in degraded(images, truth, seed))]:
        located = locate(pixels)
        parts.append((surprises(look, pixels), located.points, located.covariance * factor, points))
    surprise, *landmarks = map(np.concatenate, zip(*parts, strict=True))
    return fit_doubt(surprise, *landmarks, usual=float(threshold(unlike[np.isfinite(unlike)], UNUSUAL_RATE)))


def at_least(
    covariance: Float[np.ndarray, "N K 2 2"], limits: Float[np.ndarray, "K"], low: Bool[np.ndarray, "N K"]
) -> Float[np.ndarray, "N K 2 2"]:
    """Scale the covariances of landmarks of low quality to standard deviations of at least the limits."""
    ratio = np.where(low, np.maximum(limits / std_px(covariance), 1), 1)
    return covariance * ratio[..., None, None] ** 2


def surprises(look: SurpriseModel, images: Float[np.ndarray, "N S S"]) -> Float[np.ndarray, "N"]:
    """Dissimilarity of each image to the training images, nats."""
    return in_batches(lambda batch: surprise(look, batch), images)
