"""Figures of merit of class probabilities, each with a 95 % bootstrap interval over groups of images.

R repeats of a cross-validation, N images, K classes. In each repeat an image has one prediction, from the fold in which
it was held out. A row of NaN marks an image without a prediction, which is excluded from that repeat. A figure is the
mean over the repeats. Repeats use the same images and add no independent evidence, so the bootstrap resamples groups of
images, such as patients, with the same weights in every repeat.

The calibration error is a sum of absolute values, which resampling biases upwards: the percentiles of its replicates
can all exceed it. Its interval follows from the triangle inequality instead (`norm_interval`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from pulmo_jax.core.histogram import group_weights
from pulmo_jax.evaluation.class_calibration import calibration_gaps, has_prediction
from pulmo_jax.evaluation.metrics import Estimate, bootstrap_estimate

FIGURES = ("accuracy", "balanced_accuracy", "auroc", "ap", "sensitivity", "specificity", "ece", "log_loss")
ERROR = "ece_error"  # additional column: deviation of the replicate's calibration gaps
CLASS_INDEPENDENT = ("accuracy", "ece", "log_loss")  # the others need images of particular classes
BLOCK = 2**17  # number of weights held in memory
Kind = int | None  # index of a class, or None for all images


def class_figures(
    probabilities: Float[np.ndarray, "R N K"],
    labels: Int[np.ndarray, "N"],
    groups: Sequence[str],
    positive: int | None,
    replicates: int,
    seed: int,
) -> dict[str, Estimate]:
    """Compute all figures of merit with their intervals.

    The predicted class is that of the highest probability, the first in case of ties. Groups are resampled as in
    `ScoreHistogram`: each has a weight of Poisson(1).

    Args:
        probabilities: Class probabilities of each repeat and image.
        labels: True class of each image.
        groups: Group of each image.
        positive: Class to which auroc, ap, sensitivity and specificity refer in a two-class problem. None: mean over
            all classes, each against the rest.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap weights.

    Returns:
        `FIGURES` by name.
    """
    *rows, deviation = _resampled([probabilities], labels, groups, positive, replicates, seed)[:, 0].T
    n_groups = _group_counts(probabilities, labels, groups)
    estimates = {
        name: _estimate(row, _needed(name, positive, n_groups)) for name, row in zip(FIGURES, rows, strict=True)
    }
    return estimates | {"ece": norm_interval(estimates["ece"], deviation[1:], n_groups[None])}


def figure_difference(
    a: Float[np.ndarray, "R N K"],
    b: Float[np.ndarray, "S N K"],
    labels: Int[np.ndarray, "N"],
    groups: Sequence[str],
    positive: int | None,
    replicates: int,
    seed: int,
    name: str,
) -> Estimate:
    """Paired difference of a figure of merit between two models.

    Each bootstrap replicate uses the same image weights for both models.

    Args:
        a: Class probabilities of the first model, for each repeat and image.
        b: Class probabilities of the second model.
        labels: True class of each image.
        groups: Group of each image.
        positive: Positive class, see `class_figures`.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap weights.
        name: One of `FIGURES`.

    Returns:
        Figure of a minus figure of b.
    """
    values_a, values_b = _resampled([a, b], labels, groups, positive, replicates, seed)[..., FIGURES.index(name)].T
    n_groups = _group_counts(np.concatenate([a, b]), labels, groups)
    return _estimate(values_a - values_b, _needed(name, positive, n_groups))


def weighted_figures(
    probabilities: Float[np.ndarray, "R N K"], labels: Int[np.ndarray, "N"], positive: int | None
) -> Callable[[Float64[np.ndarray, "B N"]], Float[np.ndarray, "B figures"]]:
    """Function from image weights to `FIGURES`, mean over the repeats; NaN where undefined.

    Args:
        probabilities: Class probabilities of each repeat and image.
        labels: True class of each image.
        positive: Positive class, see `class_figures`.

    Returns:
        The function, which treats each row of weights separately.
    """
    repeats = [_repeat_figures(repeat, labels, positive) for repeat in probabilities]
    return lambda weights: np.mean([figures(weights)[:, : len(FIGURES)] for figures in repeats], axis=0)


def confusion(probabilities: Float[np.ndarray, "R N K"], labels: Int[np.ndarray, "N"]) -> Float[np.ndarray, "K K"]:
    """Confusion matrix, averaged over the repeats.

    Args:
        probabilities: Class probabilities of each repeat and image.
        labels: True class of each image.

    Returns:
        Number of images by true class (rows) and predicted class (columns).

    Example:
        >>> one_repeat = np.array([[[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]])
        >>> confusion(one_repeat, np.array([0, 0, 1])).tolist()
        [[1.0, 1.0], [0.0, 1.0]]
    """
    n_repeats, _, n_classes = probabilities.shape
    repeat, image = np.nonzero(has_prediction(probabilities))
    cell = labels[image] * n_classes + probabilities[repeat, image].argmax(1)
    return np.bincount(cell, minlength=n_classes**2).reshape(n_classes, n_classes) / n_repeats


def _resampled(
    models: Sequence[Float[np.ndarray, "_ N K"]],
    labels: Int[np.ndarray, "N"],
    groups: Sequence[str],
    positive: int | None,
    replicates: int,
    seed: int,
) -> Float[np.ndarray, "rows models figures"]:
    """`FIGURES` and `ERROR` of each model: the point estimate first, then every bootstrap replicate."""
    functions = [[_repeat_figures(repeat, labels, positive) for repeat in model] for model in models]

    def means(weight: np.ndarray) -> np.ndarray:
        return np.stack([np.mean([figures(weight) for figures in model], axis=0) for model in functions], axis=1)

    return np.concatenate([means(weight) for weight in _weights(groups, replicates, seed)])


def _weights(groups: Sequence[str], replicates: int, seed: int) -> Iterator[Float64[np.ndarray, "B N"]]:
    """Image weights, in blocks: 1 first, then those of the bootstrap replicates."""
    names, member = np.unique(np.array(groups, str), return_inverse=True)
    yield np.ones((1, member.size))
    group_weight = np.zeros((replicates, names.size), np.uint8)  # Poisson(1) values are far below 255
    for i, name in enumerate(names.tolist()):
        group_weight[:, i] = group_weights(name, replicates, seed)
    size = max(1, BLOCK // max(1, member.size))
    for start in range(0, replicates, size):
        yield group_weight[start : start + size, member].astype(np.float64)


def _repeat_figures(
    probabilities: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"], positive: int | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Function from weights (B, N) to `FIGURES` and `ERROR` of one repeat (B, figures); NaN where undefined."""
    indices = np.flatnonzero(has_prediction(probabilities))
    p, class_index = probabilities[indices].astype(np.float64), np.arange(probabilities.shape[1])
    truth, predicted = labels[indices, None] == class_index, p.argmax(1)[:, None] == class_index
    classes = class_index if positive is None else np.array([positive])
    gaps = calibration_gaps(p, labels[indices])
    loss = -np.log(np.maximum(p[truth], np.finfo(np.float64).eps))  # bounded as in scikit-learn
    areas = [_curve_areas(p[:, k], truth[:, k]) for k in classes]
    mean_gaps = gaps.mean(0) if indices.size else gaps.sum(0)

    def figures(weights: np.ndarray) -> np.ndarray:
        weight = weights[:, indices]
        total = weight.sum(1)
        n, n_predicted, n_correct = (
            weight @ indicator.astype(np.float64) for indicator in (truth, predicted, truth & predicted)
        )
        n_rest = total[:, None] - n
        recall, specificity = _ratio(n_correct, n), _ratio(n_rest - n_predicted + n_correct, n_rest)
        auroc, ap = np.mean([area(weight) for area in areas], axis=0)
        values = {
            "accuracy": _ratio(n_correct.sum(1), total),
            "balanced_accuracy": recall.mean(1),
            "auroc": auroc,
            "ap": ap,
            "sensitivity": recall[:, classes].mean(1),
            "specificity": specificity[:, classes].mean(1),
            "ece": _ratio(np.abs(weight @ gaps).sum(1), total),
            "log_loss": _ratio(weight @ loss, total),
            ERROR: _ratio(np.abs(weight @ gaps - total[:, None] * mean_gaps).sum(1), total),
        }
        return np.stack([values[name] for name in (*FIGURES, ERROR)], axis=1)

    return figures


def _curve_areas(
    scores: Float64[np.ndarray, "N"], positive: Bool[np.ndarray, "N"]
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Function from weights (B, N) to AUROC and AP (B each); scores are sorted once and curves are cumulative sums."""
    order = np.argsort(-scores)
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # last index of each run of tied scores

    def curve(weight: np.ndarray) -> np.ndarray:
        """Weight of the images that score at least as high as each distinct score, from none to all."""
        return np.pad(np.cumsum(weight[:, order], axis=1)[:, last], ((0, 0), (1, 0)))

    def areas(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tp, fp = curve(weight * positive), curve(weight * ~positive)
        precision = np.divide(tp, tp + fp, out=np.zeros(tp.shape), where=tp > 0)
        gained = np.sum(np.diff(tp) * precision[:, 1:], axis=1)  # without interpolation, as in scikit-learn
        n_pairs = tp[:, -1] * fp[:, -1]
        return _ratio(np.trapezoid(tp, fp, axis=1), n_pairs), _ratio(gained * fp[:, -1], n_pairs)

    return areas


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise ratio; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)


def _group_counts(
    probabilities: Float[np.ndarray, "R N K"], labels: Int[np.ndarray, "N"], groups: Sequence[str]
) -> dict[Kind, int]:
    """Number of groups with predicted images of each kind, in the repeat with the fewest."""
    names, predicted = np.array(groups, str), has_prediction(probabilities)
    kinds: dict[Kind, np.ndarray] = {k: labels == k for k in range(probabilities.shape[2])}
    kinds[None] = np.ones(labels.shape, bool)
    return {kind: min(np.unique(names[images & row]).size for row in predicted) for kind, images in kinds.items()}


def _needed(name: str, positive: int | None, n_groups: Mapping[Kind, int]) -> dict[Kind, int]:
    """Entries of `n_groups` for the kinds of images that a figure depends on."""
    if name in CLASS_INDEPENDENT:
        return {None: n_groups[None]}
    classes = {k for k in n_groups if k is not None}
    if positive is not None and name == "sensitivity":
        classes = {positive}
    if positive is not None and name == "specificity":
        classes -= {positive}
    return {k: n for k, n in n_groups.items() if k in classes}


def _estimate(row: Float[np.ndarray, "rows"], n_groups: Mapping[Kind, int]) -> Estimate:
    """Estimate from a figure and its replicates; an interval requires two groups of every kind in `n_groups`."""
    images = {kind: "images" if kind is None else f"images of class {kind}" for kind in n_groups}
    if missing := [images[kind] for kind, n in n_groups.items() if n == 0]:
        return Estimate(None, reason=f"there are no {' and no '.join(missing)} with a prediction in every repeat")
    requirement = f"no interval: requires two groups with {' and two with '.join(images.values())}"
    return bootstrap_estimate(float(row[0]), row[1:], min(n_groups.values()), requirement)


def norm_interval(estimate: Estimate, deviations: Float[np.ndarray, "R"], n_groups: int) -> Estimate:
    """Interval of a calibration error, conservative.

    The error is a norm |g| of the mean gaps g of all bins. With the true gaps m, ||g| - |m|| <= |g - m|, and the
    bootstrap gives the distribution of |g - m|. Its 95th percentile is the half-width.

    Args:
        estimate: The error.
        deviations: |g* - g| in each replicate; NaN where undefined.
        n_groups: Number of groups that were resampled.

    Returns:
        The estimate with this interval.
    """
    defined = deviations[~np.isnan(deviations)]
    if estimate.value is None or n_groups < 2 or defined.size == 0:
        return estimate
    half = float(np.percentile(defined, 95))
    low, high = max(0.0, estimate.value - half), min(1.0, estimate.value + half)
    return Estimate(estimate.value, low, high, skipped=estimate.skipped)
