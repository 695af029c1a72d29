"""Calibration of a segmentation on the validation images of each fold: probabilities, thresholds, components."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, UInt8

from pulmo_jax.data.folds import Fold
from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.evaluation.false_components import ConformalThreshold, conformal_threshold, false_peaks
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.evaluation.segmentation_calibration import best_threshold, fit_pixel_scaling, pool, sample_pixels
from pulmo_jax.evaluation.segmentation_metrics import ImageScores, score_image
from pulmo_jax.inference.class_maps import ClassMapper, class_masks
from pulmo_jax.inference.score import gathered
from pulmo_jax.tasks.segmentation.config import SegmentationConfig
from pulmo_jax.tasks.segmentation.data import Labelled
from pulmo_jax.tasks.segmentation.networks import Networks
from pulmo_jax.tasks.segmentation.stored import Calibration

PIXELS_PER_IMAGE = 20_000  # labelled pixels of an image that enter the scaling
DEFAULT = 0.5  # threshold of a class without validation pixels

Track = Callable[[Iterable[int], int], Iterable[int]]


def calibrate(
    raw: ClassMapper,
    labelled: Labelled,
    folds: Sequence[Fold],
    networks: Networks,
    config: SegmentationConfig,
    track: Track,
) -> Calibration:
    """Calibrate each network on the validation images of its fold; no other image is looked at.

    Args:
        raw: Mapper of the networks with uncalibrated probabilities.
        labelled: All labelled images.
        folds: Training, validation and test images of each fold.
        networks: The networks.
        config: Config of the training.
        track: Shows the progress over the folds.

    Returns:
        Scaling of each network, thresholds of each fold, and the threshold of the components if it is configured.
    """
    scalings: list[Scaling] = []
    thresholds: list[tuple[Estimate, ...]] = []
    peaks, groups = [], []
    for index in track(range(len(folds)), len(folds)):
        rows, own = folds[index].validation, networks.of_fold(index)
        scalings += fit_scalings(raw, labelled, rows, own, config.seed)
        padded = (*scalings, *raw.scalings[len(scalings) :])
        mapper = replace(raw, scalings=padded)
        weights = [float(network in own) for network in range(len(networks))]
        half = (DEFAULT,) * len(networks.classes)
        scores = [score(mapper, labelled, row, weights, half, config) for row in rows.tolist()]
        found = fold_thresholds(scores, labelled, rows, config)
        thresholds.append(found)
        if config.calibration.false_components is not None:
            values = [DEFAULT if t.value is None else t.value for t in found]
            scores = [score(mapper, labelled, row, weights, values, config) for row in rows.tolist()]
            peaks += false_peaks(scores, range(len(networks.classes)))
            groups += [labelled.groups[row] for row in rows.tolist()]
    return Calibration(tuple(scalings), tuple(thresholds), limit_components(peaks, groups, config))


def fit_scalings(
    raw: ClassMapper, labelled: Labelled, rows: np.ndarray, networks: Sequence[int], seed: int
) -> list[Scaling]:
    """Fit the scaling of the networks of a fold to pixels of its validation images.

    Args:
        raw: Mapper with uncalibrated probabilities.
        labelled: All labelled images.
        rows: Validation images.
        networks: Networks of the fold.
        seed: Seed of the sampled pixels.

    Returns:
        One scaling for each network.
    """
    outputs = labelled.classes.n_outputs
    samples: list[list] = [[] for _ in networks]
    for row in rows.tolist():
        pixels, codes = read_pair(labelled, row)
        shape = (*codes.shape, len(networks) * outputs)
        maps = gathered(raw.raw_strips(pixels, list(networks)), np.empty(shape, np.float32))
        for i, sample in enumerate(samples):
            sample.append(sample_pixels(maps[..., i * outputs : (i + 1) * outputs], codes, PIXELS_PER_IMAGE, seed))
    # Whole images have the class frequencies of the data. Offsets of several classes would only fit the frequencies of
    # a few validation groups.
    offsets = not raw.hows[0].resize or len(labelled.classes) == 1
    return [fit_pixel_scaling(pool(sample), labelled.classes, offsets=offsets) for sample in samples]


def read_pair(labelled: Labelled, row: int) -> tuple[np.ndarray, UInt8[np.ndarray, "H W"]]:
    """Pixels (H, W, C) and codes of an image."""
    ref = labelled.refs[row]
    return labelled.reader.image(ref), labelled.labels.codes(ref)


def score(
    mapper: ClassMapper,
    labelled: Labelled,
    row: int,
    weights: Sequence[float],
    thresholds: Sequence[float],
    config: SegmentationConfig,
) -> ImageScores:
    """Score an image with calibrated probabilities.

    Args:
        mapper: Calibrated mapper.
        labelled: All labelled images.
        row: Row of the image.
        weights: Weight of each network.
        thresholds: Threshold of each class.
        config: Config of the training.

    Returns:
        Scores of the image.
    """
    pixels, codes = read_pair(labelled, row)
    p: Float[np.ndarray, "H W K"] = mapper.probabilities(pixels, weights)
    predicted = class_masks(p, thresholds, labelled.classes)
    return score_image(p, predicted, codes, labelled.classes, min_area_px=config.calibration.min_area_px)


def fold_thresholds(
    scores: Sequence[ImageScores], labelled: Labelled, rows: np.ndarray, config: SegmentationConfig
) -> tuple[Estimate, ...]:
    """Threshold of each class of a fold: that of the config, or that of the highest mean Dice.

    Of several exclusive classes, the most probable is assigned (thresholds of DEFAULT): a threshold that is the best
    for a class against the rest would take pixels from its neighbours.

    Args:
        scores: Scores of the validation images.
        labelled: All labelled images.
        rows: Validation images.
        config: Config of the training.

    Returns:
        One threshold for each class; DEFAULT, with the reason, for a class without validation pixels.
    """
    if config.calibration.threshold is not None:
        return (Estimate(config.calibration.threshold, reason="set by calibration.threshold"),) * len(labelled.classes)
    if len(labelled.classes) > 1 and not labelled.classes.overlapping:
        return (Estimate(DEFAULT, reason="exclusive classes: the most probable"),) * len(labelled.classes)
    groups = [labelled.groups[row] for row in rows.tolist()]
    found = []
    for k in range(len(labelled.classes)):
        best = best_threshold(scores, k, groups, config.evaluation.replicates, config.seed)
        found.append(best if best.value is not None else Estimate(DEFAULT, reason=best.reason))
    return tuple(found)


def limit_components(
    peaks: Sequence[np.ndarray], groups: Sequence[str], config: SegmentationConfig
) -> ConformalThreshold | None:
    """Threshold of the highest probability of components, if the number of false ones is to be limited.

    Args:
        peaks: Highest probability of each false component of each validation image.
        groups: Group of each validation image.
        config: Config of the training.

    Returns:
        The threshold; None if there is no limit.
    """
    limit = config.calibration.false_components
    if limit is None:
        return None
    bound, replicates = float(config.calibration.most_false), config.evaluation.replicates
    return conformal_threshold(peaks, groups, limit, bound, replicates, config.seed)
