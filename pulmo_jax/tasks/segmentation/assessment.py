"""Evaluation of segmentation on labelled images: figures of merit, baselines, calibration, and the report."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from pulmo_jax.data.folds import Fold
from pulmo_jax.data.sample_facts import described_sample, sample_line
from pulmo_jax.evaluation.false_components import expected_false, false_peaks, lesions_by_size
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.evaluation.segmentation_baselines import Baseline
from pulmo_jax.evaluation.segmentation_metrics import ImageScores, empty_images, image_figures
from pulmo_jax.evaluation.segmentation_summary import compare_methods, summarise
from pulmo_jax.host.console import tracker
from pulmo_jax.host.tables import csv_text
from pulmo_jax.reporting.tables import table_markdown
from pulmo_jax.runs import comparison
from pulmo_jax.runs.directory import citation_of
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings, summarise_training
from pulmo_jax.tasks.segmentation.comparison import images_of, results_of
from pulmo_jax.tasks.segmentation.config import AssessMasksConfig, SegmentationEvaluationConfig
from pulmo_jax.tasks.segmentation.data import Labelled, read_labelled
from pulmo_jax.tasks.segmentation.report import (
    Assessed,
    all_tables,
    console_table,
    lesion_table,
    report_sections,
    threshold_table,
)
from pulmo_jax.tasks.segmentation.run import SegmentationRun, require_fit
from pulmo_jax.tasks.segmentation.testing import Tested, allowed_networks, test_images
from pulmo_jax.types import InputError


def read_test(run: SegmentationRun, config: AssessMasksConfig, place: Place) -> Labelled:
    """Read labelled test images; without data.group_regex or data.ignore, those of the run are used.

    Args:
        run: Opened run.
        config: Config of `evaluate`.
        place: Output folder and console.

    Returns:
        The labelled images.

    Raises:
        InputError: If images or masks cannot be used, or have other classes or bands than those of the run.
    """
    given, trained = config.data, run.config.data
    ignore = trained.ignore if given.ignore is None else given.ignore
    data = given.model_copy(update={"group_regex": given.group_regex or trained.group_regex, "ignore": ignore})
    labelled = read_labelled(data, run.classes, trained.max_image_mb, place.console, place.formats)
    for ref in labelled.refs:
        require_fit(ref, run.networks)
    return labelled


def assess(run: SegmentationRun, data: Labelled, config: AssessMasksConfig, place: Place) -> Findings:
    """Evaluate a run on labelled images; those of the run are predicted only by networks that have not seen them.

    Args:
        run: Opened run.
        data: Labelled images.
        config: Config of `evaluate`.
        place: Output folder and console.

    Returns:
        Metrics and report.

    Raises:
        InputError: If all images were used to train or select every network of the run.
    """
    allowed, known = allowed_networks(run, data.contents)
    usable = allowed.any(axis=1)
    if not usable.any():
        raise InputError(
            f"all {len(data.refs)} images were used to train every network of {run.path}: no image is left for the "
            "test; give other images"
        )
    rows = np.flatnonzero(usable)
    labelled, weights = data.subset(rows), allowed[rows].astype(np.float64)
    folds = weights.argmax(1) // run.networks.members
    baselines = run.baselines if config.evaluation.baselines else []
    began = time.monotonic()
    tested = test_images(run, labelled, weights, folds, baselines, config.evaluation, tracker(place.console, "testing"))
    seconds = time.monotonic() - began
    notes = [*seen_notes(int(known.sum()), int((~usable).sum()), len(data.refs)), *data.notes]
    return findings_of(run, tested, config.evaluation, config.seed, place, notes, "test images", seconds)


def seen_notes(n_known: int, n_left_out: int, total: int) -> list[str]:
    """Note on the images that belong to the run, if any."""
    if not n_known:
        return []
    more = f"; {n_left_out} that all networks have seen are left out." if n_left_out else "."
    return [
        f"{n_known} of {total} images belong to the run; each is predicted only by networks that were not trained on "
        f"it{more}"
    ]


def assess_training(
    run: SegmentationRun,
    labelled: Labelled,
    folds: Sequence[Fold],
    baselines: Sequence[Mapping[str, Baseline]],
    training: Mapping[str, Any],
    objective: float,
    place: Place,
) -> Findings:
    """Report of a finished training: every test image is predicted by the networks of its fold.

    Args:
        run: Calibrated run.
        labelled: All images of the run.
        folds: Training, validation and test images of each fold.
        baselines: Baselines of each fold (see `testing.fold_baselines`); empty: none.
        training: Summary of the training.
        objective: Objective of a sweep.
        place: Output folder and console.

    Returns:
        Metrics and report. Without test images, those of the validation images, with a warning.
    """
    chosen_on = not any(fold.test.size for fold in folds)
    parts = [fold.validation if chosen_on else fold.test for fold in folds]
    rows = np.concatenate(parts)
    of_fold = np.repeat(np.arange(len(folds)), [part.size for part in parts])
    order = np.argsort(rows, kind="stable")
    rows, of_fold = rows[order], of_fold[order]
    weights = np.equal.outer(of_fold, np.arange(len(run.networks)) // run.networks.members).astype(np.float64)
    options = run.config.evaluation
    began = time.monotonic()
    track = tracker(place.console, "testing")
    tested = test_images(run, labelled.subset(rows), weights, of_fold, baselines, options, track)
    seconds = time.monotonic() - began
    notes, data = list(labelled.notes), "test images" if len(folds) == 1 else "out-of-fold predictions"
    if chosen_on:
        data = "validation images, on which the run was calibrated"
        notes.insert(
            0,
            "There are no test images (data.test_fraction=0): the figures are those of the validation images, by "
            "which the parameters were selected and the thresholds set, and are optimistic.",
        )
    findings = findings_of(run, tested, options, run.config.seed, place, notes, data, seconds, training)
    evaluation = None if chosen_on else findings.evaluation
    return replace(findings, objective=objective, evaluation=evaluation, printed=labelled.notes)


def findings_of(
    run: SegmentationRun,
    tested: Tested,
    options: SegmentationEvaluationConfig,
    seed: int,
    place: Place,
    notes: Sequence[str],
    data: str,
    seconds: float,
    training: Mapping[str, Any] | None = None,
) -> Findings:
    """Figures of merit with intervals, and the report.

    Args:
        run: Calibrated run.
        tested: Scores of the labelled images.
        options: Options of the evaluation.
        seed: Random seed of the bootstrap.
        place: Output folder and console.
        notes: Warnings for the report.
        data: What the images are, for the captions.
        seconds: Time of all predictions, with the baselines.
        training: Summary of the training, if any.

    Returns:
        Metrics and report.
    """
    found, labelled = assessed(run, tested, options, seed, data), tested.labelled
    facts = dict(training or {})
    tables = [*all_tables(found), lesion_table(found.lesions), threshold_table(run)]
    heading = "# Segmentation\n\nBrackets: 95 % bootstrap intervals over groups.\n"
    evaluation = comparison.describe_evaluation(run, images_of(labelled), results_of(tested), seconds)
    return Findings(
        title=f"{run.config.name}: segmentation",
        metrics={**metrics_of(found), **({"training": facts} if facts else {})},
        markdown="\n".join([heading, *map(table_markdown, tables)]),
        sections=report_sections(found, place.folder, facts),
        summary=summarise_training(run, facts),
        shown=[console_table(tables[0])],
        tables={"image_scores.csv": image_scores_csv(tested)},
        sample=sample_line(described_sample(labelled.refs[0].folder), described_sample(run.config.data.images)),
        citations=citation_of(run.path),
        warnings=list(notes),
        printed=labelled.notes,
        objective=math.nan,
        evaluation=evaluation,
    )


def assessed(
    run: SegmentationRun, tested: Tested, options: SegmentationEvaluationConfig, seed: int, data: str
) -> Assessed:
    """Compute the figures of merit of the run and its baselines.

    The threshold of the components holds for the run alone: all components of the baselines count.

    Args:
        run: Calibrated run.
        tested: Scores of the labelled images.
        options: Options of the evaluation.
        seed: Random seed of the bootstrap.
        data: What the images are, for the captions.

    Returns:
        Figures of merit.
    """
    groups, rows, own = tested.labelled.groups, tested.rows, tested.own
    method, *baselines = tested.scores
    drawn, limit = (groups, options.replicates, seed), run.calibration.component_threshold
    estimates = {
        name: summarise(scores, rows, *drawn, [limit] * len(rows) if name == method else None)
        for name, scores in tested.scores.items()
    }
    differences = {
        name: {
            title: compare_methods(own, tested.scores[name], row, *drawn, (limit, 0.0))
            for row, title in enumerate(rows)
        }
        for name in baselines
    }
    lesions = {
        name: lesions_by_size(own, row, groups, options.lesion_sizes_px, options.replicates, seed, limit)
        for row, name in enumerate(tested.labelled.classes.names)
    }
    false = expected_false(false_peaks(own, range(len(lesions))), groups, limit, options.replicates, seed)
    return Assessed(run, tested, estimates, differences, lesions, false, options, seed, data)


def metrics_of(found: Assessed) -> dict[str, Any]:
    """Content of metrics.json.

    Args:
        found: Figures of merit.

    Returns:
        {"segmentation": {method: {class: {figure: estimate}}}, "differences": {baseline: ...}, ...}.
    """
    labelled, rows = found.tested.labelled, found.tested.rows
    present = empty_images(found.tested.own)

    def plain(by_method: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> dict[str, Any]:
        return {
            method: {row: {name: asdict(e) for name, e in values.items()} for row, values in by_row.items()}
            for method, by_row in by_method.items()
        }

    return {
        "segmentation": plain(found.estimates),
        "differences": plain(found.differences),
        "components": {name: [asdict(row) for row in by_size] for name, by_size in found.lesions.items()},
        "calibration": {
            "thresholds": dict(zip(labelled.classes.names, map(asdict, found.run.calibration.by_class), strict=True)),
            "components": found.run.calibration.as_json()["components"],
        },
        "test": {
            "images": len(labelled.refs),
            "groups": len(set(labelled.groups)),
            "data": found.data,
            "false_components": asdict(found.false_components),
            "images_by_class": {
                row: {name: int(counts[i]) for name, counts in present.items()} for i, row in enumerate(rows)
            },
        },
    }


def image_scores_csv(tested: Tested) -> str:
    """image_scores.csv: figures of merit of every image by class and method, and pixel counts."""
    figures = {name: image_figures(scores) for name, scores in tested.scores.items()}
    columns = ["filename", "page", "group", "fold", "class", "method", *next(iter(figures.values()))]
    columns += ["true_px", "predicted_px", "labelled_px"]
    rows = (
        [
            *(ref.name, ref.page, ref.group, int(tested.folds[i]), row, name),
            *(number(values[i, k]) for values in figures[name].values()),
            *pixel_counts(scores[i], k),
        ]
        for i, ref in enumerate(tested.labelled.refs)
        for k, row in enumerate(tested.rows)
        for name, scores in tested.scores.items()
    )
    return csv_text(columns, rows)


def number(value: float) -> float | None:
    """The value, or None for NaN, which is an empty cell."""
    return float(value) if np.isfinite(value) else None


def pixel_counts(scores: ImageScores, row: int) -> tuple[int, int, int]:
    """Number of true, predicted and labelled pixels of a row."""
    counts: Float[np.ndarray, 4] = scores.counts[row]
    tp, fp, fn, _ = counts.astype(int).tolist()
    return tp + fn, tp + fp, int(counts.sum())
