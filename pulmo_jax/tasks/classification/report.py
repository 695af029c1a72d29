"""Sections of the report of a classification run: figures and tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pulmo_jax.config.verbs import EvaluationConfig
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.square_batches import onto_image, window_of
from pulmo_jax.evaluation.class_calibration import Scaling, expected_calibration_error, reliability
from pulmo_jax.evaluation.class_metrics import confusion
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import CaptionedFigure, Section, captioned
from pulmo_jax.reporting.tables import Table
from pulmo_jax.reporting.training import training_sections
from pulmo_jax.tasks.classification import figures as draw
from pulmo_jax.tasks.classification.captions import CAPTIONS
from pulmo_jax.tasks.classification.data import ClassSet
from pulmo_jax.tasks.classification.figures import ClassExample
from pulmo_jax.tasks.classification.run import ClassifierRun, Plan

LEAKS = "random split (leaks)"
COMPARED = ("auroc", "balanced_accuracy", "accuracy")
Probabilities = Float[np.ndarray, "R N K"]


@dataclass(frozen=True)
class Predictions:
    """Out-of-fold predictions; NaN where a repeat does not test an image.

    Attributes:
        honest: Calibrated probabilities.
        as_trained: Probabilities before calibration.
        leaky: Calibrated probabilities with random splits, if any.
    """

    honest: Probabilities
    as_trained: Probabilities
    leaky: Float[np.ndarray, "_ N K"] | None

    @staticmethod
    def of(
        plan: Plan, logits: Sequence[np.ndarray], scalings: Sequence[Scaling], count: int, n_classes: int
    ) -> "Predictions":
        """Average the networks of each repeat.

        Args:
            plan: Plan of the cross-validation.
            logits: Logits of each network for its test images.
            scalings: Calibration of each network.
            count: Number of images.
            n_classes: Number of classes.

        Returns:
            Out-of-fold predictions.
        """
        plain = [Scaling(1.0, (0.0,) * n_classes)] * len(scalings)
        honest, leaky = plan.honest, [i for i, member in enumerate(plan.members) if member.leaky]

        def averaged(which: Sequence[int], by: Sequence[Scaling]) -> Probabilities:
            first = plan.members[which[0]].repeat
            repeats = plan.members[which[-1]].repeat - first + 1
            total, networks = np.zeros((repeats, count, n_classes)), np.zeros((repeats, count, 1))
            for i in which:
                at = plan.members[i].repeat - first, plan.folds[i].test
                total[at] += by[i].probabilities(logits[i])
                networks[at] += 1
            return np.where(networks > 0, total / np.maximum(networks, 1), np.nan)

        return Predictions(
            averaged(honest, scalings), averaged(honest, plain), averaged(leaky, scalings) if leaky else None
        )


@dataclass(frozen=True)
class Tested:
    """Labelled images with predictions.

    Attributes:
        dataset: Labelled images.
        results: Probabilities by method, the run first, then baselines.
        as_trained: Probabilities of the run before calibration, if known.
        copies: Number of further images that are copies of these and are not counted.
    """

    dataset: ClassSet
    results: dict[str, Probabilities]
    as_trained: Probabilities | None = None
    copies: int = 0

    @property
    def own(self) -> Probabilities:
        """Probabilities of the run."""
        return next(iter(self.results.values()))

    @property
    def mean(self) -> Float[np.ndarray, "N K"]:
        """Probabilities of the run, mean over the repeats."""
        return mean_of(self.own)

    def without_copies(self, rows: Int[np.ndarray, "_"]) -> "Tested":
        """Keep the given images, of which all others are copies."""
        results = {name: p[:, rows] for name, p in self.results.items()}
        as_trained = None if self.as_trained is None else self.as_trained[:, rows]
        return Tested(self.dataset.subset(rows), results, as_trained, len(self.dataset.refs) - len(rows))


def mean_of(p: Probabilities) -> Float[np.ndarray, "N K"]:
    """Mean over the repeats that test an image; NaN if there are none."""
    known = np.isfinite(p)
    return np.where(known.any(0), np.where(known, p, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def report_sections(
    run: ClassifierRun,
    tested: Tested,
    estimates: Mapping[str, Mapping[str, Estimate]],
    tables: list[Table],
    options: EvaluationConfig,
    out_dir: Path,
    training: Mapping[str, Any],
) -> list[Section]:
    """Results, calibration, saliency and training curves.

    Args:
        run: Calibrated run.
        tested: Labelled images with predictions.
        estimates: Figures of merit by method.
        tables: Tables of the results.
        options: Options of the evaluation.
        out_dir: Output folder.
        training: Summary of the training; empty: no training curves.

    Returns:
        Sections of the report.
    """
    folder, dataset = out_dir / "figures", tested.dataset
    names = [name for name in tested.results if LEAKS not in name and "majority" not in name]

    def save(figure: Any, name: str, **counts: int) -> CaptionedFigure:
        path = figures.save(figure, folder, name)
        figure.clear()  # breaks reference cycles, which would keep the drawn arrays in memory
        return captioned(path, CAPTIONS, **shared, **counts)

    shared = {
        "images": len(dataset.refs),
        "groups": len(set(dataset.groups)),
        "classes": len(run.classes),
        "methods": len(estimates),
        "positive": None if run.positive is None else run.classes[run.positive],
        "data": "out-of-fold predictions of the cross-validation" if training else "test images",
    }

    results = [save(draw.comparison(estimates, COMPARED), "comparison")]
    if run.positive is not None:
        scores = {
            name: ((dataset.labels == run.positive).astype(int), tested.results[name][..., run.positive])
            for name in names
        }
        results.append(save(draw.roc_curves(scores, run.classes[run.positive]), "roc_curves"))
    results.append(save(draw.confusion_matrix(confusion(tested.own, dataset.labels), run.classes), "confusion_matrix"))
    parts = {"calibrated": tested.own} | ({} if tested.as_trained is None else {"as trained": tested.as_trained})
    reliable = {
        name: (reliability(mean_of(p), dataset.labels), mean_ece(p, dataset.labels)) for name, p in parts.items()
    }
    text = (
        f"{len(dataset.refs)} images in {len(set(dataset.groups))} groups; copies share a group, and no group is in "
        "both training and test set. Intervals are 95 % bootstrap intervals over groups."
    )
    return [
        Section("Results", text, results, tables),
        Section("Calibration", "", [save(draw.reliability_diagram(reliable), "reliability")], []),
        Section("Saliency", "", galleries(run, tested, options.examples, save), []),
        *(training_sections(run.path, out_dir, training) if training else []),
    ]


def mean_ece(p: Probabilities, labels: Int[np.ndarray, "N"]) -> float:
    """Expected calibration error, mean over the repeats."""
    return float(np.mean([expected_calibration_error(repeat, labels) for repeat in p]))


def galleries(
    run: ClassifierRun, tested: Tested, count: int, save: Callable[..., CaptionedFigure]
) -> list[CaptionedFigure]:
    """Galleries of the most confident correct predictions, balanced over classes, and of the most confident errors."""
    mean, labels = tested.mean, tested.dataset.labels
    known = np.atleast_1d(np.isfinite(mean).all(axis=1))
    sure, right = np.where(known, mean.max(1), -1), np.asarray(mean.argmax(1) == labels)
    order = one_of_each_group(np.argsort(-sure, kind="stable").tolist(), tested.dataset.groups)
    by_class = [[i for i in order if known[i] and right[i] and labels[i] == k] for k in range(len(run.classes))]
    hits = [i for some in zip_longest(*by_class) for i in some if i is not None][:count]
    misses = [i for i in order if known[i] and not right[i]][:count]
    n_right, n_wrong = int((known & right).sum()), int((known & ~right).sum())
    groups = {
        "saliency_right": (hits, "Correctly classified", n_right),
        "saliency_wrong": (misses, "Misclassified", n_wrong),
    }
    return [
        save(draw.saliency_gallery(examples(run, tested, np.array(which)), title), name, shown=len(which), total=total)
        for name, (which, title, total) in groups.items()
        if len(which)
    ]


def one_of_each_group(rows: Sequence[int], groups: Sequence[str]) -> list[int]:
    """First image of each group, so that a gallery shows no copies."""
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(groups[row], row)
    return list(first.values())


def examples(run: ClassifierRun, tested: Tested, which: Int[np.ndarray, "_"]) -> list[ClassExample]:
    """Examples with the saliency of the predicted class, averaged over all networks."""
    dataset, predicted = tested.dataset, tested.mean[which].argmax(1)
    maps = run.saliency(dataset.squares.stack(which), predicted)
    sure = [f"{run.classes[label]} {p:.2f}" for label, p in zip(predicted, tested.mean[which].max(1), strict=True)]
    notes = [f"predicted {text}, is {run.classes[dataset.labels[row]]}" for text, row in zip(sure, which, strict=True)]
    return [example(run, dataset, *row) for row in zip(which.tolist(), notes, maps, strict=True)]


def example(run: ClassifierRun, dataset: ClassSet, row: int, note: str, saliency: np.ndarray) -> ClassExample:
    """Read an image again and map its saliency onto it."""
    image = dataset.squares.reader.image(dataset.refs[row])
    where = onto_image(saliency, image.shape, window_of(image, run.config.data.crop))
    return ClassExample(dataset.titles[row], to_bytes(image), where, note)
