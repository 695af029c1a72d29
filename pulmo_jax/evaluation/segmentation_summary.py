"""Figures of merit of segmented images with 95 % bootstrap intervals over groups, and paired differences.

The bootstrap draws whole groups, such as patients, with weights of Poisson(1) that all methods share. N images, B rows
of weights; rows of scores are classes (see `evaluation.segmentation_metrics`).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float64

from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.evaluation.paired import Figures, Scored, difference, estimate, resampled
from pulmo_jax.evaluation.segmentation_calibration import calibration_error, calibration_gaps
from pulmo_jax.evaluation.segmentation_metrics import IMAGE_FIGURES, ImageScores, image_figures, lesion_counts, ratio

FIGURES = (*IMAGE_FIGURES, "pooled_dice", "lesion_recall", "false_components", "ece")
Images = Mapping[str, Bool[np.ndarray, "N"]]  # images that count, by name of the figure


def summarise(
    scores: Sequence[ImageScores],
    rows: Sequence[str],
    groups: Sequence[str],
    replicates: int,
    seed: int,
    limits: Sequence[float] | None = None,
) -> dict[str, dict[str, Estimate]]:
    """Compute all figures of merit of all rows with their intervals.

    Args:
        scores: Scores of N images.
        rows: Names of the rows, see `segmentation_metrics.row_names`.
        groups: Group of each image.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap weights.
        limits: Component threshold of each row: components whose highest probability is lower do not count; None: 0.

    Returns:
        `FIGURES` by row and name. Figures of images are means over the images in which they are defined; lesion recall
        and pooled Dice pool all images; false components are a number per image.
    """
    return {
        name: _row_estimates(scores, row, groups, replicates, seed, 0.0 if limits is None else limits[row])
        for row, name in enumerate(rows)
    }


def compare_methods(
    a: Sequence[ImageScores],
    b: Sequence[ImageScores],
    row: int,
    groups: Sequence[str],
    replicates: int,
    seed: int,
    limits: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Estimate]:
    """Paired differences a - b of all figures of merit of two methods on the same images.

    A mean over images includes only those in which both methods define the figure.

    Args:
        a: Scores of the first method.
        b: Scores of the second method on the same images.
        row: Row of the scores.
        groups: Group of each image.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap weights.
        limits: Component threshold of each method.

    Returns:
        Differences by name of the figure.
    """
    in_a, in_b = defined_images(a, row), defined_images(b, row)
    images = {name: in_a[name] & in_b[name] for name in in_a}
    of_a, of_b = (
        resampled(Scored(weighted_figures(scores, row, limit, images)), groups, replicates, seed)
        for scores, limit in zip((a, b), limits, strict=True)
    )
    counted = count_groups(images, groups)
    return {name: difference(of_a[name], of_b[name], counted[name]) for name in FIGURES}


def weighted_figures(
    scores: Sequence[ImageScores], row: int, limit: float = 0.0, images: Images | None = None
) -> Callable[[Float64[np.ndarray, "B N"]], Figures]:
    """Function from image weights to `FIGURES`, for `paired.Scored`; NaN where undefined.

    Args:
        scores: Scores of N images.
        row: Row of the scores.
        limit: Component threshold.
        images: Images that count; None: all in which the figure is defined.

    Returns:
        The function, which treats each row of weights separately.
    """
    used = defined_images(scores, row) if images is None else images
    means = {name: np.where(used[name], value[:, row], 0) for name, value in image_figures(scores).items()}
    counts = np.stack([s.counts[row] for s in scores]) * used["pooled_dice"][:, None]
    lesions, found, false = (lesion_counts(scores, row, limit)[:, i].astype(np.float64) for i in range(3))
    gaps = calibration_gaps(scores, row)

    def total(weights: np.ndarray, name: str) -> np.ndarray:
        return weights @ used[name].astype(np.float64)

    def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
        tp, fp, fn, _ = (weights @ counts).T
        return {
            **{name: ratio(weights @ value, total(weights, name)) for name, value in means.items()},
            "pooled_dice": ratio(2 * tp, 2 * tp + fp + fn),
            "lesion_recall": ratio(weights @ found, weights @ lesions),
            "false_components": ratio(weights @ false, total(weights, "false_components")),
            "ece": ratio(np.abs(weights @ gaps).sum(1), total(weights, "ece")),
        }

    return figures


def defined_images(scores: Sequence[ImageScores], row: int) -> dict[str, Bool[np.ndarray, "N"]]:
    """Images in which each of the `FIGURES` is defined.

    Args:
        scores: Scores of N images.
        row: Row of the scores.

    Returns:
        Whether each image contributes, by name of the figure.
    """
    counts = np.stack([s.counts[row] for s in scores])
    images = {name: np.isfinite(value[:, row]) for name, value in image_figures(scores).items()}
    labelled = counts.any(1)
    return images | {
        "pooled_dice": counts[:, :3].any(1),
        "lesion_recall": np.array([len(s.lesions[row]) > 0 for s in scores]),
        "false_components": labelled,
        "ece": labelled,
    }


def count_groups(images: Images, groups: Sequence[str]) -> dict[str, int]:
    """Number of groups that each figure depends on.

    Args:
        images: Images in which each figure is defined.
        groups: Group of each image.

    Returns:
        Number by name of the figure.
    """
    names = np.array(groups, str)
    return {name: np.unique(names[used]).size for name, used in images.items()}


def _row_estimates(
    scores: Sequence[ImageScores], row: int, groups: Sequence[str], replicates: int, seed: int, limit: float
) -> dict[str, Estimate]:
    images = defined_images(scores, row)
    counted = count_groups(images, groups)
    values = resampled(Scored(weighted_figures(scores, row, limit)), groups, replicates, seed)
    estimates = {name: estimate(values[name], counted[name]) for name in FIGURES}
    return estimates | {"ece": calibration_error(scores, row, groups, replicates, seed)}
