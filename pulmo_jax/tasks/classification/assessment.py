"""Evaluation of classification on labelled images: metrics, baselines, calibration, saliency, and the report."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from pulmo_jax.config.verbs import EvaluationConfig
from pulmo_jax.data.sample_facts import described_sample, sample_line
from pulmo_jax.evaluation.class_metrics import class_figures, figure_difference
from pulmo_jax.evaluation.metadata_baseline import majority_probabilities, metadata_probabilities
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.reporting.tables import Table, cell, figures_table, metrics_console, metrics_markdown, table_markdown
from pulmo_jax.runs import comparison
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings, summarise_training
from pulmo_jax.tasks.classification.comparison import images_of, results_of
from pulmo_jax.tasks.classification.config import EvaluateClassesConfig
from pulmo_jax.tasks.classification.data import ClassSet, class_counts, metadata_features, read_classes
from pulmo_jax.tasks.classification.report import (
    LEAKS,
    Predictions,
    Probabilities,
    Tested,
    mean_ece,
    mean_of,
    report_sections,
)
from pulmo_jax.tasks.classification.run import ClassifierRun, Plan, allowed_networks
from pulmo_jax.types import InputError

BLOCK = 512  # images classified at a time


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
    return read_classes(data.test, options, run.size, place.console, run.classes, place.formats, "data.test")


def assess(run: ClassifierRun, data: ClassSet, config: EvaluateClassesConfig, place: Place) -> Findings:
    """Evaluate a run on labelled test images; see `assess_test_set`."""
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
    counted = counted_as(run, dataset, predictions.honest)
    tables = {"out_of_fold.csv": out_of_fold_csv(dataset, plan, predictions.honest, counted)}
    warnings = [*dataset.notes, *copies_note(counted)]
    if run.config.trainer.split == "random" and len(set(dataset.groups)) < len(dataset.refs):
        counts = f"{len(dataset.refs)} images in {len(set(dataset.groups))} groups"
        warnings.insert(
            0,
            f"trainer.split=random: copies are in training and test sets ({counts}), so the results are optimistic.",
        )
    tested = Tested(dataset, results, predictions.as_trained).without_copies(np.unique(counted))
    options, seed = run.config.evaluation, run.config.seed
    findings = findings_of(run, tested, place.folder, options, seed, warnings, training, tables, objective)
    return replace(findings, evaluation=evaluated_images(run, tested.dataset, tested.results, None))


def evaluated_images(
    run: ClassifierRun, dataset: ClassSet, results: Mapping[str, Probabilities], seconds: float | None
) -> comparison.Evaluation:
    """Results by image, for later comparisons; `seconds` is the time of all predictions."""
    images, by_method = images_of(dataset), results_of(dataset, run.positive, results)
    return comparison.describe_evaluation(run, images, by_method, seconds)


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
    began = time.monotonic()
    by_network = np.concatenate([run.of_networks(dataset.squares.stack(block)) for block in blocks], axis=1)
    seconds = time.monotonic() - began
    weights = allowed.T[..., None] / np.maximum(allowed.sum(1), 1)[None, :, None]
    mean = np.where(allowed.any(axis=1, keepdims=True), (weights * by_network).sum(0), np.nan)
    counted = counted_as(run, dataset, mean[None])
    warnings = [*relabelled(run, dataset), *dataset.notes, *copies_note(counted)]
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
    tested = Tested(dataset, results).without_copies(np.unique(counted))
    findings = findings_of(run, tested, place.folder, options, seed, warnings)
    seconds *= len(tested.dataset.refs) / len(dataset.refs)  # copies were predicted, too
    return replace(findings, evaluation=evaluated_images(run, tested.dataset, tested.results, seconds))


def counted_as(run: ClassifierRun, dataset: ClassSet, own: Probabilities) -> Int[np.ndarray, "N"]:
    """Index of the image as which each image counts: itself, or the image that it copies (`ClassSet.counted_as`)."""
    return dataset.counted_as(run.config.data.near_bits, np.asarray(np.isfinite(own).all(-1).any(0)))


def copies_note(counted: Int[np.ndarray, "N"]) -> list[str]:
    """Note on the copies, which the figures of merit do not count, if any."""
    total, distinct = counted.size, np.unique(counted).size
    if distinct == total:
        return []
    copies, other = total - distinct, "another image of the same class"
    are = f"is a copy or near copy of {other}" if copies == 1 else f"are copies or near copies of {other}"
    return [f"{copies} of {total} images {are}: the figures of merit count each image once ({distinct} images)"]


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
    """Class name of the method."""
    return run.config.method["_target_"].rpartition(".")[2]


def baselines(dataset: ClassSet, plan: Plan, leaky: bool) -> dict[str, Probabilities]:
    """Baselines: a classifier of file metadata on the same folds, and the class frequencies of all images of the run.

    The frequencies of each fold's training images would differ by fold and rank the pooled images, below chance in
    part: a fold with many images of a class leaves few of them for training.

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
    frequencies = majority_probabilities(dataset.labels, len(dataset.refs), k)
    for i in which:
        rows, repeat = plan.folds[i], plan.members[i].repeat - first
        known = np.concatenate([rows.training, rows.validation])
        labels, asked = dataset.labels[known], features[rows.test]
        seed = plan.members[i].seed
        metadata[repeat, rows.test] = metadata_probabilities(features[known], labels, asked, k, seed)
        majority[repeat, rows.test] = frequencies[rows.test]
    return {"file metadata": metadata, "majority class": majority}


def out_of_fold_csv(dataset: ClassSet, plan: Plan, honest: Probabilities, counted: Int[np.ndarray, "N"]) -> str:
    """out_of_fold.csv: out-of-fold predictions, one row per image and repeat.

    Args:
        dataset: Images of the run.
        plan: Plan of the cross-validation.
        honest: Calibrated probabilities.
        counted: Index of the image as which each image counts.

    Returns:
        Content of the file; `copy_of` names the image that a copy counts as.
    """
    names = [f"p_{name}" for name in dataset.classes]
    columns = ["repeat", "fold", "filename", "class", "group", "copy_of", "label", *names]
    first = {(m.repeat, m.fold): plan.folds[i].test for i, m in enumerate(plan.members) if not m.leaky}
    rows = [
        {
            "repeat": repeat,
            "fold": fold,
            "filename": dataset.titles[row],
            "class": dataset.classes[dataset.labels[row]],
            "group": dataset.groups[row],
            "copy_of": "" if counted[row] == row else dataset.titles[counted[row]],
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
        "test": {"images": class_counts(dataset), "groups": len(set(dataset.groups)), "copies": tested.copies},
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
        markdown=f"{metrics_markdown(metrics)}\n{table_markdown(differences)}",
        sections=report_sections(run, tested, estimates, shown, options, out_dir, training),
        summary=summarise_training(run, training),
        shown=metrics_console(metrics),
        tables=tables or {},
        sample=sample_line(described_sample(dataset.refs[0].folder), described_sample(run.config.data.root)),
        warnings=warnings,
        printed=dataset.notes,
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
    """Table of the AUROC differences from the baselines."""
    rows = [[name, cell(dict(gap))] for name, gap in differences.items()]
    return Table(
        "AUROC minus the AUROC of", ["", "difference"], rows, ["Paired bootstrap: the same images are drawn for both."]
    )
