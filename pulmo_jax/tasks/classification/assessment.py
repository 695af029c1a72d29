"""A classification run on labelled images: figures of merit beside baselines, calibration, saliency, and the report."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pulmo_jax.config.verbs import EvaluationConfig
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.square_batches import onto_image, window_of
from pulmo_jax.evaluation.class_calibration import Scaling, expected_calibration_error, reliability
from pulmo_jax.evaluation.class_metrics import class_figures, confusion, figure_difference
from pulmo_jax.evaluation.metadata_baseline import majority_probabilities, metadata_probabilities
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import CaptionedFigure, Section, captioned
from pulmo_jax.reporting.tables import Table, cell, figures_table, markdown_row, metrics_console, metrics_markdown
from pulmo_jax.reporting.training import training_sections
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings, summarise_training
from pulmo_jax.tasks.classification import figures as draw
from pulmo_jax.tasks.classification.captions import CAPTIONS
from pulmo_jax.tasks.classification.config import EvaluateClassesConfig
from pulmo_jax.tasks.classification.data import ClassSet, class_counts, metadata_features, read_classes
from pulmo_jax.tasks.classification.figures import ClassExample
from pulmo_jax.tasks.classification.run import ClassifierRun, Plan, allowed_networks
from pulmo_jax.types import InputError

LEAKS = "random split (leaks)"
BLOCK = 512  # images classified at a time
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
    """

    dataset: ClassSet
    results: dict[str, Probabilities]
    as_trained: Probabilities | None = None

    @property
    def own(self) -> Probabilities:
        return next(iter(self.results.values()))

    @property
    def mean(self) -> Float[np.ndarray, "N K"]:
        return mean_of(self.own)


def mean_of(p: Probabilities) -> Float[np.ndarray, "N K"]:
    """Mean over the repeats that test an image; NaN if there are none."""
    known = np.isfinite(p)
    return np.where(known.any(0), np.where(known, p, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def read_test(run: ClassifierRun, config: EvaluateClassesConfig, place: Place) -> ClassSet:
    """Read labelled test images.

    Args:
        run: Opened run.
        config: Config of `evaluate`.
        place: Output folder and console.

    Returns:
        Images with class labels.

    Raises:
        InputError: If their classes differ from those of the run, or images cannot be used.
    """
    data = config.data
    if data.normal_name not in (None, run.classes[run.normal]):
        raise InputError(
            f"data.normal_name={data.normal_name}: the normal class of {config.run} is {run.classes[run.normal]}; omit "
            "this key"
        )
    own = {"group_regex": data.group_regex or run.config.data.group_regex, "on_error": data.on_error}
    options = run.config.data.model_copy(update=own)
    return read_classes(data.test, options, run.size, place.console, run.classes)


def assess(run: ClassifierRun, data: ClassSet, config: EvaluateClassesConfig, place: Place) -> Findings:
    return assess_test_set(run, data, place, config.evaluation, config.seed)


def assess_training(
    run: ClassifierRun,
    dataset: ClassSet,
    plan: Plan,
    predictions: Predictions,
    training: Mapping[str, Any],
    objective: float,
    place: Place,
) -> Findings:
    """Report of a finished cross-validation.

    Args:
        run: Calibrated run.
        dataset: Images of the run.
        plan: Plan of the cross-validation.
        predictions: Out-of-fold predictions.
        training: Summary of the training.
        objective: Objective of a sweep.
        place: Output folder and console.

    Returns:
        Metrics and report.
    """
    name, results = method_name(run), {}
    results[name] = predictions.honest
    repeats = len(predictions.honest)
    if repeats > 1:
        results[f"{name}, {repeats} repeats averaged"] = mean_of(predictions.honest)[None]
    results |= baselines(dataset, plan, leaky=False)
    if predictions.leaky is not None:
        results[f"{name}, {LEAKS}"] = predictions.leaky
        results |= {
            f"{key}, {LEAKS}": p for key, p in baselines(dataset, plan, leaky=True).items() if "metadata" in key
        }
    tables = {"out_of_fold.csv": out_of_fold_csv(dataset, plan, predictions.honest)}
    warnings = list(dataset.notes)
    if run.config.trainer.split == "random" and len(set(dataset.groups)) < len(dataset.refs):
        counts = f"{len(dataset.refs)} images in {len(set(dataset.groups))} groups"
        warnings.insert(
            0,
            f"trainer.split=random: copies are in training and test sets ({counts}), so the results are optimistic.",
        )
    tested = Tested(dataset, results, predictions.as_trained)
    options, seed = run.config.evaluation, run.config.seed
    return findings_of(run, tested, place.folder, options, seed, warnings, training, tables, objective)


def assess_test_set(
    run: ClassifierRun, dataset: ClassSet, place: Place, options: EvaluationConfig, seed: int
) -> Findings:
    """Evaluate a run on labelled images; copies are classified only by networks that were not trained on them.

    Args:
        run: Opened run.
        dataset: Labelled images.
        place: Output folder and console.
        options: Options of the evaluation.
        seed: Random seed of the bootstrap.

    Returns:
        Metrics and report.

    Raises:
        InputError: If all images are copies of training images of every network.
    """
    allowed, copies = allowed_networks(run, dataset)
    rows = np.arange(len(dataset.refs))
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    by_network = np.concatenate([run.of_networks(dataset.squares.stack(block)) for block in blocks], axis=1)
    weights = allowed.T[..., None] / np.maximum(allowed.sum(1), 1)[None, :, None]
    mean = np.where(allowed.any(axis=1, keepdims=True), (weights * by_network).sum(0), np.nan)
    warnings = [*relabelled(run, dataset), *dataset.notes]
    if copies:
        none_left = len(dataset.refs) - int(allowed.any(axis=1).sum())
        more = f"; {none_left} images without such a network are excluded." if none_left else "."
        warnings.insert(
            0,
            f"{copies} of the {len(dataset.refs)} images are exact or near copies of images of the run; each is "
            f"classified only by networks that were not trained on it{more}",
        )
    if np.isnan(mean).all():
        raise InputError(
            f"all {len(dataset.refs)} images are copies of training images of every network of {run.path}: "
            "no image is left for the test; give other images"
        )
    results = {method_name(run): mean[None]}
    if not copies:  # otherwise the baselines would be biased
        known = np.array([image["metadata"] for image in run.images])
        labels = np.array([run.classes.index(image["label"]) for image in run.images])
        size = len(run.classes), run.config.seed
        of_files = metadata_probabilities(known, labels, metadata_features(dataset), *size)
        results["file metadata"] = of_files[None]
        results["majority class"] = majority_probabilities(labels, len(dataset.refs), size[0])[None]
    return findings_of(run, Tested(dataset, results), place.folder, options, seed, warnings)


def relabelled(run: ClassifierRun, dataset: ClassSet) -> list[str]:
    """Note on files whose class differs from that in the run."""
    before = {image["content"]: image["label"] for image in run.images}
    now = [dataset.classes[label] for label in dataset.labels]
    labelled = zip(dataset.titles, now, dataset.contents, strict=True)
    other = [
        f"{title} (was {before[content]})" for title, name, content in labelled if before.get(content, name) != name
    ]
    if not other:
        return []
    return [
        f"{len(other)} images have another class than in the run, such as {other[0]}; their present class is used. "
        "One of the labels is wrong: remove these files, or train again with the correct labels"
    ]


def method_name(run: ClassifierRun) -> str:
    return run.config.method["_target_"].rpartition(".")[2]


def baselines(dataset: ClassSet, plan: Plan, leaky: bool) -> dict[str, Probabilities]:
    """Baselines on the same folds: a classifier of file metadata, and the class frequencies.

    Args:
        dataset: Images of the run.
        plan: Plan of the cross-validation.
        leaky: Use the random splits.

    Returns:
        Probabilities by baseline.
    """
    features, k = metadata_features(dataset), len(dataset.classes)
    which = [i for i, member in enumerate(plan.members) if member.leaky == leaky and member.number == 0]
    first = plan.members[which[0]].repeat
    shape = (plan.members[which[-1]].repeat - first + 1, len(dataset.refs), k)
    metadata, majority = np.full(shape, np.nan), np.full(shape, np.nan)
    for i in which:
        rows, repeat = plan.folds[i], plan.members[i].repeat - first
        known = np.concatenate([rows.training, rows.validation])
        labels, asked = dataset.labels[known], features[rows.test]
        seed = plan.members[i].seed
        metadata[repeat, rows.test] = metadata_probabilities(features[known], labels, asked, k, seed)
        majority[repeat, rows.test] = majority_probabilities(labels, len(rows.test), k)
    return {"file metadata": metadata, "majority class": majority}


def out_of_fold_csv(dataset: ClassSet, plan: Plan, honest: Probabilities) -> str:
    """out_of_fold.csv: out-of-fold predictions, one row per image and repeat."""
    columns = ["repeat", "fold", "filename", "class", "group", "label", *(f"p_{name}" for name in dataset.classes)]
    first = {(m.repeat, m.fold): plan.folds[i].test for i, m in enumerate(plan.members) if not m.leaky}
    rows = [
        {
            "repeat": repeat,
            "fold": fold,
            "filename": dataset.titles[row],
            "class": dataset.classes[dataset.labels[row]],
            "group": dataset.groups[row],
            "label": dataset.classes[int(honest[repeat, row].argmax())],
            **{f"p_{name}": honest[repeat, row, k] for k, name in enumerate(dataset.classes)},
        }
        for (repeat, fold), test in first.items()
        for row in test.tolist()
    ]
    return as_csv(columns, rows)


def findings_of(
    run: ClassifierRun,
    tested: Tested,
    out_dir: Path,
    options: EvaluationConfig,
    seed: int,
    warnings: Sequence[str],
    training: Mapping[str, Any] | None = None,
    tables: Mapping[str, str] | None = None,
    objective: float = math.nan,
) -> Findings:
    """Figures of merit with intervals, and the report.

    Args:
        run: Calibrated run.
        tested: Labelled images with predictions.
        out_dir: Output folder.
        options: Options of the evaluation.
        seed: Random seed of the bootstrap.
        warnings: Warnings for the report.
        training: Summary of the training, if any.
        tables: Further tables by file name.
        objective: Objective of a sweep.

    Returns:
        Metrics and report.
    """
    training = training or {}
    dataset, drawn = (
        tested.dataset,
        (tested.dataset.labels, tested.dataset.groups, run.positive, options.replicates, seed),
    )
    estimates = {name: class_figures(p, *drawn) for name, p in tested.results.items()}
    metrics: dict[str, Any] = {
        "image": {name: {key: asdict(e) for key, e in values.items()} for name, values in estimates.items()},
        "differences": {},
        "test": {"images": class_counts(dataset), "groups": len(set(dataset.groups))},
        "calibration": calibration_facts(run, tested),
        "training": dict(training),
    }
    own = next(iter(tested.results))
    for name, p in tested.results.items():
        if name != own and "averaged" not in name:
            gap = figure_difference(tested.own, p, *drawn, "auroc")
            metrics["differences"][name] = asdict(gap)
    differences = difference_table(metrics["differences"])
    shown = [figures_table("Images", metrics["image"]), differences]
    return Findings(
        title=f"{run.config.name}: {', '.join(run.classes)}",
        metrics=metrics,
        markdown=metrics_markdown(metrics) + as_markdown(differences),
        sections=report_sections(run, tested, estimates, shown, options, out_dir, training),
        summary=summarise_training(run, training),
        shown=metrics_console(metrics),
        tables=tables or {},
        warnings=warnings,
        objective=objective,
    )


def calibration_facts(run: ClassifierRun, tested: Tested) -> dict[str, Any]:
    """Temperatures of the calibration, and the calibration error before it."""
    temperatures = [1 / scaling.scale for scaling in run.scalings]
    facts: dict[str, Any] = {"temperature": {"lowest": min(temperatures), "highest": max(temperatures)}}
    if tested.as_trained is not None:
        facts["ece_as_trained"] = mean_ece(tested.as_trained, tested.dataset.labels)
    return facts


def difference_table(differences: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [[name, cell(dict(gap))] for name, gap in differences.items()]
    return Table(
        "AUROC minus the AUROC of", ["", "difference"], rows, ["Paired bootstrap: the same images are drawn for both."]
    )


def as_markdown(table: Table) -> str:
    lines = [f"\n## {table.title}\n", markdown_row(table.columns), markdown_row(["---"] * len(table.columns))]
    return "\n".join([*lines, *(markdown_row(row) for row in table.rows), *(f"\n{n}" for n in table.notes)]) + "\n"


def report_sections(
    run: ClassifierRun,
    tested: Tested,
    estimates: Mapping[str, Mapping[str, Estimate]],
    tables: list[Table],
    options: EvaluationConfig,
    out_dir: Path,
    training: Mapping[str, Any],
) -> list[Section]:
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
    groups = {"saliency_right": (hits, "Right", n_right), "saliency_wrong": (misses, "Wrong", n_wrong)}
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
    notes = [f"{text}, is {run.classes[dataset.labels[row]]}" for text, row in zip(sure, which, strict=True)]
    return [example(run, dataset, *row) for row in zip(which.tolist(), notes, maps, strict=True)]


def example(run: ClassifierRun, dataset: ClassSet, row: int, note: str, saliency: np.ndarray) -> ClassExample:
    image = dataset.squares.reader.image(dataset.refs[row])
    where = onto_image(saliency, image.shape, window_of(image, run.config.data.crop))
    return ClassExample(dataset.titles[row], to_bytes(image), where, note)
