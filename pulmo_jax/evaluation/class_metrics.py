"""Figures of merit of class probabilities, each with its 95 % bootstrap interval over groups of images.

R repeats of a cross-validation, N images, K classes. In a repeat every image has one prediction, made by the fold that
it was held out of; a row of NaN is an image without one, and is left out of that repeat. A figure is the mean of the
repeats' figures. Repeats see the same images, so that they are no new evidence: what is drawn anew are groups of
images, such as patients, with the same weights in every repeat.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from pulmo_jax.core.histogram import group_weights, percentile_interval
from pulmo_jax.evaluation.class_calibration import calibration_gaps, has_prediction
from pulmo_jax.evaluation.metrics import Estimate

FIGURES = ("accuracy", "balanced_accuracy", "auroc", "ap", "sensitivity", "specificity", "ece", "log_loss")
OF_ANY_CLASS = ("accuracy", "ece", "log_loss")  # the others need images of certain classes
BLOCK = 2**17  # weights that are held at once
Kind = int | None  # images of a class, or all


def class_figures(
    probabilities: Float[np.ndarray, "R N K"],
    labels: Int[np.ndarray, "N"],
    groups: Sequence[str],
    positive: int | None,
    replicates: int,
    seed: int,
) -> dict[str, Estimate]:
    """FIGURES by name. An image is called the class of the greatest probability, the first of equal ones.

    positive: of two classes, the one that is found; auroc, ap, sensitivity and specificity are of it. None: their
    means over all classes, each against the rest. Groups are resampled as in ScoreHistogram: each weighs Poisson(1).
    """
    rows = _resampled([probabilities], labels, groups, positive, replicates, seed)[:, 0]
    n_groups = _group_counts(probabilities, labels, groups)
    return {
        name: _estimate(column, _needed(name, positive, n_groups)) for name, column in zip(FIGURES, rows.T, strict=True)
    }


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
    """A figure of a less that of b, paired: a bootstrap replicate weighs the images of both alike."""
    of_a, of_b = _resampled([a, b], labels, groups, positive, replicates, seed)[..., FIGURES.index(name)].T
    n_groups = _group_counts(np.concatenate([a, b]), labels, groups)
    return _estimate(of_a - of_b, _needed(name, positive, n_groups))


def confusion(probabilities: Float[np.ndarray, "R N K"], labels: Int[np.ndarray, "N"]) -> Float[np.ndarray, "K K"]:
    """How many images of each class (rows) were called each class (columns), in the mean of the repeats."""
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
    """FIGURES of each model: first of the images as they are, then of every bootstrap replicate."""
    functions = [[_repeat_figures(repeat, labels, positive) for repeat in model] for model in models]

    def means(weight: np.ndarray) -> np.ndarray:
        return np.stack([np.mean([figures(weight) for figures in model], axis=0) for model in functions], axis=1)

    return np.concatenate([means(weight) for weight in _weights(groups, replicates, seed)])


def _weights(groups: Sequence[str], replicates: int, seed: int) -> Iterator[Float64[np.ndarray, "B N"]]:
    """What every image weighs: 1, then in the bootstrap replicates, a block of them at a time."""
    names, member = np.unique(np.array(groups, str), return_inverse=True)
    yield np.ones((1, member.size))
    of_group = np.zeros((replicates, names.size), np.uint8)  # Poisson(1) numbers are far below 255
    for i, name in enumerate(names.tolist()):
        of_group[:, i] = group_weights(name, replicates, seed)
    size = max(1, BLOCK // max(1, member.size))
    for start in range(0, replicates, size):
        yield of_group[start : start + size, member].astype(np.float64)


def _repeat_figures(
    probabilities: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"], positive: int | None
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from weights, B x N, to FIGURES of one repeat, B x figures; NaN where undefined."""
    known = np.flatnonzero(has_prediction(probabilities))
    p, of_class = probabilities[known].astype(np.float64), np.arange(probabilities.shape[1])
    truth, called = labels[known, None] == of_class, p.argmax(1)[:, None] == of_class
    classes = of_class if positive is None else np.array([positive])
    gaps = calibration_gaps(p, labels[known])
    loss = -np.log(np.maximum(p[truth], np.finfo(np.float64).eps))  # bounded as in scikit-learn
    areas = [_curve_areas(p[:, k], truth[:, k]) for k in classes]

    def figures(weights: np.ndarray) -> np.ndarray:
        weight = weights[:, known]
        total = weight.sum(1)
        n, n_called, n_right = (weight @ of.astype(np.float64) for of in (truth, called, truth & called))
        n_rest = total[:, None] - n
        recall, rest_recall = _ratio(n_right, n), _ratio(n_rest - n_called + n_right, n_rest)
        auroc, ap = np.mean([area(weight) for area in areas], axis=0)
        values = {
            "accuracy": _ratio(n_right.sum(1), total),
            "balanced_accuracy": recall.mean(1),
            "auroc": auroc,
            "ap": ap,
            "sensitivity": recall[:, classes].mean(1),
            "specificity": rest_recall[:, classes].mean(1),
            "ece": _ratio(np.abs(weight @ gaps).sum(1), total),
            "log_loss": _ratio(weight @ loss, total),
        }
        return np.stack([values[name] for name in FIGURES], axis=1)

    return figures


def _curve_areas(
    scores: Float64[np.ndarray, "N"], positive: Bool[np.ndarray, "N"]
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A function from weights, B x N, to AUROC and AP, B each: scores are sorted once, curves are cumulative sums."""
    order = np.argsort(-scores)
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of each run of equal scores

    def curve(weight: np.ndarray) -> np.ndarray:
        """What scores at least as high as each distinct score, from none to all."""
        return np.pad(np.cumsum(weight[:, order], axis=1)[:, last], ((0, 0), (1, 0)))

    def areas(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tp, fp = curve(weight * positive), curve(weight * ~positive)
        precision = np.divide(tp, tp + fp, out=np.zeros(tp.shape), where=tp > 0)
        gained = np.sum(np.diff(tp) * precision[:, 1:], axis=1)  # not interpolated, as in scikit-learn
        n_pairs = tp[:, -1] * fp[:, -1]
        return _ratio(np.trapezoid(tp, fp, axis=1), n_pairs), _ratio(gained * fp[:, -1], n_pairs)

    return areas


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN of nothing."""
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _group_counts(
    probabilities: Float[np.ndarray, "R N K"], labels: Int[np.ndarray, "N"], groups: Sequence[str]
) -> dict[Kind, int]:
    """How many groups have images of each kind with a prediction, in the repeat that has the fewest."""
    names, known = np.array(groups, str), has_prediction(probabilities)
    kinds: dict[Kind, np.ndarray] = {k: labels == k for k in range(probabilities.shape[2])}
    kinds[None] = np.ones(labels.shape, bool)
    return {kind: min(np.unique(names[images & row]).size for row in known) for kind, images in kinds.items()}


def _needed(name: str, positive: int | None, n_groups: Mapping[Kind, int]) -> dict[Kind, int]:
    """The part of n_groups of the kinds of images that a figure needs."""
    if name in OF_ANY_CLASS:
        return {None: n_groups[None]}
    classes = {k for k in n_groups if k is not None}
    if positive is not None and name == "sensitivity":
        classes = {positive}
    if positive is not None and name == "specificity":
        classes -= {positive}
    return {k: n for k, n in n_groups.items() if k in classes}


def _estimate(row: Float[np.ndarray, "rows"], n_groups: Mapping[Kind, int]) -> Estimate:
    """Of a figure and its replicates. n_groups: those with images that it needs; an interval takes two of each kind."""
    images = {kind: "images" if kind is None else f"images of class {kind}" for kind in n_groups}
    if missing := [images[kind] for kind, n in n_groups.items() if n == 0]:
        return Estimate(None, reason=f"there are no {' and no '.join(missing)} with a prediction in every repeat")
    low, high = percentile_interval(row[1:], min(n_groups.values()))
    wanted = f"no interval: it takes two groups with {' and two with '.join(images.values())}"
    return Estimate(float(row[0]), low, high, wanted if low is None else "", int(np.isnan(row[1:]).sum()))
