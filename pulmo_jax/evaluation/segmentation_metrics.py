"""Scores of segmented images: compact records from which every figure of merit and its bootstrap follow.

Scores have one row per class and, if there is more than one class, a last row for any class against the background.
Unlabelled pixels, and pixels without a probability (NaN), count nowhere. N images, K classes, L rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, UInt8
from scipy import ndimage

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.evaluation.detection import label_regions
from pulmo_jax.evaluation.surface_distance import surface_figures

ANY = "any class"
BINS = 200  # of probability; thresholds are multiples of 1 / BINS, among them 0.5
IMAGE_FIGURES = (
    "dice",
    "iou",
    "sensitivity",
    "precision",
    "surface_distance",
    "surface_distance_95",
    "surface_dice",
)


@dataclass(frozen=True)
class ImageScores:
    """Scores of one image.

    Attributes:
        counts: Labelled pixels of each row: true positives, false positives, false negatives, true negatives.
        surface: Symmetric mean distance, 95 % distance and surface Dice of each row; NaN if neither mask has a contour.
        histogram: Labelled pixels by probability, of each row: number outside the class, number inside, and sum of the
            probabilities.
        lesions: For each row, the true components: area in labelled pixels, and the highest probability of the
            predicted components that overlap it; 0 if none does.
        false: For each row, the predicted components without a true pixel: area in labelled pixels, and highest
            probability.
    """

    counts: Float64[np.ndarray, "L 4"]
    surface: Float64[np.ndarray, "L 3"]
    histogram: Float64[np.ndarray, "L 3 bins"]
    lesions: tuple[Float64[np.ndarray, "_ 2"], ...]
    false: tuple[Float64[np.ndarray, "_ 2"], ...]


def row_names(classes: Classes) -> tuple[str, ...]:
    """Names of the rows of scores: the classes and, if there is more than one, `ANY`."""
    return (*classes.names, ANY) if len(classes) > 1 else classes.names


def decided(
    probabilities: Float[np.ndarray, "*grid K"], thresholds: Sequence[float], overlapping: bool
) -> Bool[np.ndarray, "*grid K"]:
    """Decide the classes of pixels.

    Exclusive classes: the largest of p_0 and p_k (1 - t_k) / t_k, with p_0 the probability of the background; the
    background wins a tie, then the first class. For a single class this is p_1 > t_1. Overlapping classes: p_k >= t_k.

    Args:
        probabilities: Probabilities of the classes, without the background.
        thresholds: Threshold t_k of each class, between 0 and 1.
        overlapping: Whether a pixel can belong to several classes.

    Returns:
        Whether a pixel is assigned to each class; never if one of its probabilities is NaN.
    """
    t = np.array(thresholds, probabilities.dtype)
    known = np.isfinite(probabilities).all(-1, keepdims=True)
    p = np.where(known, probabilities, 0)  # only background
    if overlapping:
        return p >= t
    odds = p * ((1 - t) / t)
    best = odds.argmax(-1)
    above = np.take_along_axis(odds, best[..., None], -1) > 1 - p.sum(-1, keepdims=True)
    return (best[..., None] == np.arange(len(t))) & above


def score_image(
    probabilities: Float[np.ndarray, "H W K"],
    predicted: Bool[np.ndarray, "H W K"],
    codes: UInt8[np.ndarray, "H W"],
    classes: Classes,
    spacing: tuple[float, float] = (1.0, 1.0),
    tolerance: float = 2.0,
    min_area_px: int = 1,
) -> ImageScores:
    """Score one image.

    The probability of any class is the sum of those of exclusive classes, and the highest of those of overlapping
    classes, a lower bound.

    Args:
        probabilities: Probabilities of the classes, without the background; NaN where there is none.
        predicted: Decided classes of the pixels, see `decided`.
        codes: Codes of the true classes of the pixels (see `data.codes`).
        classes: The classes.
        spacing: Size of a pixel in y and x.
        tolerance: Largest distance that the surface Dice tolerates, in the unit of the spacing.
        min_area_px: Smallest area of a predicted component, in pixels; smaller ones neither find a lesion nor count as
            false. Dice and all other figures of pixels keep them.

    Returns:
        The scores.
    """
    labelled = (codes != UNLABELLED) & np.isfinite(probabilities).all(-1)
    truths = [classes.inside(codes, k) & labelled for k in range(len(classes))]
    rows = [(probabilities[..., k], predicted[..., k], truth) for k, truth in enumerate(truths)]
    if len(classes) > 1:
        union = probabilities.max(-1) if classes.overlapping else np.minimum(probabilities.sum(-1), 1)
        rows.append((union, np.any(predicted, axis=-1), np.logical_or.reduce(truths)))
    components = [_components(p, mask, truth, labelled, min_area_px) for p, mask, truth in rows]
    return ImageScores(
        counts=np.stack([_counts(mask, truth, labelled) for _, mask, truth in rows]),
        surface=np.array([surface_figures(truth, mask, labelled, spacing, tolerance) for _, mask, truth in rows]),
        histogram=np.stack([_histogram(p[labelled], truth[labelled]) for p, _, truth in rows]),
        lesions=tuple(lesions for lesions, _ in components),
        false=tuple(false for _, false in components),
    )


def image_figures(scores: Sequence[ImageScores]) -> dict[str, Float64[np.ndarray, "N L"]]:
    """Figures of merit of each image.

    An image without true pixels of a class in which none are predicted has no figures (NaN) for it: it is left out of
    their means, and `empty_images` counts it. If pixels are predicted although none are true, Dice, IoU, precision and
    surface Dice are 0 and there is no sensitivity. If none are predicted although some are true, Dice, IoU, sensitivity
    and surface Dice are 0 and there is no precision. In both cases the distances are the diagonal of the image.

    Args:
        scores: Scores of N images.

    Returns:
        `IMAGE_FIGURES` by name.
    """
    tp, fp, fn, _ = np.moveaxis(np.stack([s.counts for s in scores]), -1, 0)
    distance, percentile, surface_dice = np.moveaxis(np.stack([s.surface for s in scores]), -1, 0)
    values = (
        ratio(2 * tp, 2 * tp + fp + fn),
        ratio(tp, tp + fp + fn),
        ratio(tp, tp + fn),
        ratio(tp, tp + fp),
        distance,
        percentile,
        surface_dice,
    )
    return dict(zip(IMAGE_FIGURES, values, strict=True))


def empty_images(scores: Sequence[ImageScores]) -> dict[str, Float64[np.ndarray, "L"]]:
    """Count images by the presence of each class.

    Args:
        scores: Scores of N images.

    Returns:
        Number of images with true pixels (`with_class`), with predicted but no true pixels (`only_predicted`), and with
        neither (`empty`).
    """
    tp, fp, fn, _ = np.moveaxis(np.stack([s.counts for s in scores]), -1, 0)
    true, predicted = tp + fn > 0, tp + fp > 0
    counted = {"with_class": true, "only_predicted": ~true & predicted, "empty": ~true & ~predicted}
    return {name: images.sum(0).astype(np.float64) for name, images in counted.items()}


def lesion_counts(
    scores: Sequence[ImageScores], row: int, limit: float = 0.0, sizes: tuple[float, float] = (0.0, np.inf)
) -> Float64[np.ndarray, "N 3"]:
    """Count the lesions of each image.

    Args:
        scores: Scores of N images.
        row: Row of the scores.
        limit: Component threshold: predicted components with a lower highest probability do not count.
        sizes: Smallest area, inclusive, and largest area, exclusive, of the counted components in pixels.

    Returns:
        Number of true components, of those that a predicted component overlaps, and of false components.
    """
    low, high = sizes
    counts = np.zeros((len(scores), 3))
    for image, s in enumerate(scores):
        (area, peak), (false_area, false_peak) = s.lesions[row].T, s.false[row].T
        lesions, false = (low <= area) & (area < high), (low <= false_area) & (false_area < high)
        found = lesions & (peak > 0) & (peak >= limit)
        counts[image] = lesions.sum(), found.sum(), (false & (false_peak >= limit)).sum()
    return counts


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise ratio; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)


def _counts(
    predicted: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], labelled: Bool[np.ndarray, "H W"]
) -> Float64[np.ndarray, "4"]:
    """Labelled pixels: true and false positives, false and true negatives."""
    n_labelled, n_true = np.count_nonzero(labelled), np.count_nonzero(truth)
    n_predicted, tp = np.count_nonzero(predicted & labelled), np.count_nonzero(predicted & truth)
    return np.array([tp, n_predicted - tp, n_true - tp, n_labelled - n_predicted - n_true + tp], np.float64)


def _histogram(probability: Float[np.ndarray, "n"], truth: Bool[np.ndarray, "n"]) -> Float64[np.ndarray, "3 bins"]:
    """Pixels outside and inside the class, and sum of their probabilities, by bin of probability [j, j + 1) / BINS."""
    index = np.clip((probability.astype(np.float64) * BINS).astype(np.intp), 0, BINS - 1)
    inside, total = (np.bincount(indices, minlength=BINS) for indices in (index[truth], index))
    return np.stack([total - inside, inside, np.bincount(index, probability, minlength=BINS)]).astype(np.float64)


def _components(
    probability: Float[np.ndarray, "H W"],
    predicted: Bool[np.ndarray, "H W"],
    truth: Bool[np.ndarray, "H W"],
    labelled: Bool[np.ndarray, "H W"],
    min_area_px: int,
) -> tuple[Float64[np.ndarray, "n 2"], Float64[np.ndarray, "m 2"]]:
    """Area and peak probability of the lesions (0 if not found), and of the false components."""
    labels, area = label_regions(predicted & np.isfinite(probability))
    index = np.arange(1, area.size)
    peak = np.zeros(area.size)
    if index.size:
        peak[1:] = ndimage.maximum(probability, labels, index)
    peak[area < min_area_px] = 0
    lesion, lesion_area = label_regions(truth)
    found = np.zeros(lesion_area.size)
    np.maximum.at(found, lesion[truth], peak[labels[truth]])
    n_labelled, n_true = (np.bincount(labels[pixels], minlength=area.size) for pixels in (labelled, truth))
    false = index[(n_labelled[1:] > 0) & (n_true[1:] == 0) & (area[1:] >= min_area_px)]
    return (
        np.stack([lesion_area[1:].astype(np.float64), found[1:]], axis=1),
        np.stack([n_labelled[false].astype(np.float64), peak[false]], axis=1),
    )
