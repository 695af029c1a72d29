"""Evaluation of anomaly detection on labelled images: figures of merit, examples, and the report."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sample_facts import described_sample, sample_line
from pulmo_jax.data.transforms import Preprocessing, same_scale
from pulmo_jax.evaluation.calibration import Calibration
from pulmo_jax.evaluation.image_statistics import STATISTICS
from pulmo_jax.evaluation.metrics import image_metrics
from pulmo_jax.host.console import tracker
from pulmo_jax.host.tables import csv_text
from pulmo_jax.inference.assess import METHOD, Assessment, Truth, truth_by_folder, truth_by_masks
from pulmo_jax.inference.assess import assess as score_all
from pulmo_jax.inference.baselines import BASELINES
from pulmo_jax.inference.image_rating import image_statistic_of
from pulmo_jax.reporting.report import Section
from pulmo_jax.reporting.tables import metrics_console, metrics_markdown
from pulmo_jax.runs import comparison
from pulmo_jax.runs.directory import citation_of
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings, summarise_training
from pulmo_jax.tasks.anomalies import planted
from pulmo_jax.tasks.anomalies.aligning import align_data, low_quality_notes, open_frame
from pulmo_jax.tasks.anomalies.comparison import images_of, results_of
from pulmo_jax.tasks.anomalies.config import AnomalyEvaluationConfig, AssessConfig, EvaluateDataConfig, TrainConfig
from pulmo_jax.tasks.anomalies.report import (
    assessment_sections,
    calibration_sections,
    distance_sections,
    example_views,
    loss_sections,
    named,
    validation_sections,
)
from pulmo_jax.tasks.anomalies.run import Run, missing_masks, thresholds
from pulmo_jax.types import InputError, Say, Statistic


def read_test(run: Run, config: AssessConfig, place: Place) -> EvaluateDataConfig:
    """Locate the labelled images; align them if the training images were aligned.

    Args:
        run: Opened run.
        config: Config of `evaluate`.
        place: Output folder and console.

    Returns:
        Folders of the labelled images and masks.

    Raises:
        InputError: If they cannot be used.
    """
    data, trained = config.data, run.config.data
    if trained.align_run is None:
        return data
    data = data.model_copy(update={"foreground": data.foreground or trained.foreground})
    frame = open_frame(trained.align_run, config.plugins, run.scorer.how.aligned_by)
    return align_data(frame, data, place.folder / "aligned", trained.max_image_mb, place.console, place.formats)


def assess(run: Run, data: EvaluateDataConfig, config: AssessConfig, place: Place) -> Findings:
    """Evaluate a run on labelled images.

    Args:
        run: Opened run.
        data: Folders of the labelled images and masks.
        config: Config of `evaluate`.
        place: Output folder and console.

    Returns:
        Metrics and report.

    Raises:
        InputError: If the images cannot be used.
    """
    run = run if config.image_statistic is None else run.by_statistic(config.image_statistic)
    tested = test_images(run, data, config.evaluation, config.seed, place)
    sections = [*loss_sections(run, place.folder, {}), *calibration_sections(run, place.folder)]
    return findings_of(run, tested, sections, caveats=low_quality_notes(place.folder / "aligned"))


def assess_training(
    run: Run,
    data: EvaluateDataConfig | None,
    validation: Sequence[ImageRef],
    training: Mapping[str, Any],
    caveats: Sequence[str],
    place: Place,
) -> Findings:
    """Report of a finished training: losses, validation images and, if given, test images.

    Args:
        run: Calibrated run.
        data: Labelled images, if any.
        validation: Normal validation images.
        training: Summary of the training.
        caveats: Warnings from the training.
        place: Output folder and console.

    Returns:
        Metrics and report.
    """
    reader, options, folder = Reader(run.config.data.max_image_mb, place.formats), run.config.evaluation, place.folder
    tested = None if data is None else test_images(run, data, options, run.config.seed, place)
    precision = planted.measure(run, validation, reader, place)
    sections = [
        *loss_sections(run, folder, training),
        *calibration_sections(run, folder),
        *validation_sections(run, validation, options.examples, reader, folder),
        *planted.sections(precision, folder),
        *distance_sections(run, validation, reader, folder),
    ]
    findings = findings_of(run, tested, sections, training, [*caveats, *low_quality_notes(folder / "aligned")])
    return replace(
        findings,
        metrics={**findings.metrics, **planted.describe(precision)},
        objective=planted.objective_of(run, precision, training.get("best_val_loss", math.nan)),
    )


@dataclass(frozen=True)
class Tested:
    """Outcome of a test.

    Attributes:
        scores: Figures of merit, for metrics.json.
        sections: Sections of the report.
        warnings: Warnings.
        image_scores: Content of image_scores.csv.
        folder: Folder of the test images.
        by_image: Results by image, for later comparisons.
    """

    scores: dict[str, Any]
    sections: list[Section]
    warnings: list[str]
    image_scores: str
    folder: Path
    by_image: comparison.Evaluation


def test_images(
    run: Run, data: EvaluateDataConfig, options: AnomalyEvaluationConfig, seed: int, place: Place
) -> Tested:
    """Score every test image and draw examples.

    Args:
        run: Calibrated run.
        data: Folders of the labelled images and masks.
        options: Options of the evaluation.
        seed: Random seed of the bootstrap.
        place: Output folder and console.

    Returns:
        Figures of merit and report sections.
    """
    reader = Reader(run.config.data.max_image_mb, place.formats)
    refs, truth_of = labelled_images(run.config, run.scorer.how, data, reader, place.note)
    warning, began = missing_masks(refs, run), time.monotonic()
    assessment = score_all(
        run.scorer,
        run.calibrations,
        refs,
        truth_of,
        reader,
        lesion_sizes_px=options.lesion_sizes_px,
        replicates=options.replicates,
        seed=seed,
        track=tracker(place.console, "testing"),
    )
    seconds = time.monotonic() - began
    scores = figures_of_merit(run, assessment, options.replicates, seed)
    views = example_views(run, assessment, options.examples, truth_of, reader)
    sections = assessment_sections(run, assessment, scores, views, place.folder)
    results = results_of(run, assessment, options.replicates, seed)
    by_image = comparison.describe_evaluation(run, images_of(assessment), results, seconds)
    warnings, table = [warning] if warning else [], image_scores_csv(run, assessment)
    return Tested(scores, sections, warnings, table, refs[0].folder, by_image)


def findings_of(
    run: Run,
    tested: Tested | None,
    sections: Sequence[Section],
    training: Mapping[str, Any] | None = None,
    caveats: Sequence[str] = (),
) -> Findings:
    """Combine metrics, warnings and report sections.

    Args:
        run: Calibrated run.
        tested: Outcome of the test, if any.
        sections: Further sections of the report.
        training: Summary of the training, if any.
        caveats: Warnings from the training.

    Returns:
        Metrics and report.
    """
    metrics: dict[str, Any] = {"training": dict(training)} if training else {}
    metrics["calibration"] = describe_calibration(run)
    warnings = [*caveats, *(threshold.warning for threshold in thresholds(run) if threshold.warning)]
    if tested is not None:
        warnings += tested.warnings
        metrics |= {**tested.scores, "test": {**tested.scores["test"], "warnings": warnings}}
    return Findings(
        title=f"{run.config.name}: anomalies",
        metrics=metrics,
        markdown=metrics_markdown(metrics),
        sections=[*(tested.sections if tested else []), *sections],
        summary=summarise_training(run, training or {}),
        shown=metrics_console(metrics),
        tables={"image_scores.csv": tested.image_scores} if tested else {},
        sample=sample_line(
            described_sample(tested.folder if tested else None), described_sample(run.config.data.train)
        ),
        citations=citation_of(run.path),
        warnings=warnings,
        evaluation=None if tested is None else tested.by_image,
    )


def labelled_images(
    config: TrainConfig,
    preprocessing: Preprocessing,
    data: EvaluateDataConfig,
    reader: Reader,
    say: Say | None = None,
) -> tuple[list[ImageRef], Callable[[ImageRef], Truth]]:
    """List the test images with their ground truth.

    Args:
        config: Config of the run.
        preprocessing: Preprocessing of the run.
        data: Folders of the labelled images and masks.
        reader: Reader of the images.
        say: Takes one line about the files that hold no image, if there are any.

    Returns:
        Images, and a function that returns the ground truth of an image.

    Raises:
        InputError: If an image cannot be used.
    """
    masks = data.foreground or config.data.foreground
    refs, skipped = index_images(
        data.test,
        masks=masks,
        group_regex=data.group_regex or config.data.group_regex,
        max_image_mb=config.data.max_image_mb,
        require_masks=data.foreground is not None,
        formats=reader.formats,
        say=say,
    )
    if skipped:
        raise InputError(
            f"{skipped[0].reason}\n({len(skipped)} of {len(skipped) + len(refs)} test images cannot be used)"
        )
    for ref in refs:
        if ref.shape[2] != preprocessing.channels or not same_scale(ref.scale, preprocessing.dtype):
            raise InputError(
                f"{ref.path}: {ref.shape[2]} bands of {ref.scale}, but the run was trained on "
                f"{preprocessing.channels} of {preprocessing.dtype}; convert the image"
            )
    if data.test_masks is not None:
        return refs, truth_by_masks(refs, data.test_masks, data.normal_name, reader)
    return refs, truth_by_folder(refs, data.test, data.normal_name)


def figures_of_merit(run: Run, assessment: Assessment, replicates: int, seed: int) -> dict[str, Any]:
    """Figures of merit as in metrics.json.

    Args:
        run: Calibrated run.
        assessment: Scores of the test images.
        replicates: Bootstrap replicates.
        seed: Random seed of the bootstrap.

    Returns:
        {"pixel"|"image": {score name: {metric: estimate}}, "lesions": ..., ...}.
    """
    labels = np.array(assessment.abnormal)

    def figures(scores: list[float], calibration: Calibration) -> dict[str, Any]:
        threshold = calibration.image_threshold.value
        found = image_metrics(np.array(scores), labels, assessment.groups, threshold, replicates, seed)
        return {metric: asdict(estimate) for metric, estimate in found.items()}

    rated = {name: (scores, run.calibrations[name]) for name, scores in assessment.image_scores.items()}
    rated |= statistics_of(run, assessment)
    baselines = [name for name in rated if name in BASELINES]
    order = [*(name for name in rated if name not in baselines), *baselines]
    result: dict[str, Any] = {
        "image": {named(run, name): figures(*rated[name]) for name in order},
        "test": {
            "normal_images": int((~labels).sum()),
            "abnormal_images": int(labels.sum()),
            "groups": len(set(assessment.groups)),
            "unscored_images": assessment.unscored,
        },
    }
    if assessment.pixels is not None:
        result["pixel"] = {
            named(run, name): {metric: asdict(estimate) for metric, estimate in state.estimates().items()}
            for name, state in assessment.pixels.items()
        }
    found, lesions = assessment.peak_in_lesion
    if assessment.pixels is not None and lesions:
        result["lesions"] = {
            "recall_by_size": [asdict(row) for row in assessment.pixels[METHOD].recall_by_size()],
            "images_with_highest_pixel_in_lesion": found,
            "images_with_lesions": lesions,
        }
    return result


def statistics_of(run: Run, assessment: Assessment) -> dict[str, tuple[list[float], Calibration]]:
    """Image scores by the statistics that are not the score of the run, with their calibrations.

    Args:
        run: Calibrated run.
        assessment: Scores of the test images.

    Returns:
        Scores of the test images and calibration, by score name; none for runs of older versions.
    """
    calibration = run.calibrations[METHOD]
    if calibration.normal_statistics is None:
        return {}
    return {
        f"{METHOD}, {name}": (values, calibration.by_statistic(name))
        for name, values in assessment.statistics.items()
        if name != calibration.image_statistic
    }


def image_scores_csv(run: Run, assessment: Assessment) -> str:
    """image_scores.csv: class and scores of every image, by method, baseline and single statistic, and p-values."""
    scores, calibration = assessment.image_scores, run.calibrations[METHOD]
    columns = ["filename", "page", "group", "abnormal", *(named(run, name) for name in scores)]
    columns += [*STATISTICS, *(f"p_{name}" for name in STATISTICS)]

    def row(i: int, ref: ImageRef) -> list[Any]:
        statistics: dict[Statistic, float] = {name: assessment.statistics[name][i] for name in STATISTICS}
        p_values = calibration.statistic_p_values(statistics)
        return [
            *(ref.name, ref.page, ref.group, int(assessment.abnormal[i]), *(values[i] for values in scores.values())),
            *(*statistics.values(), *(p_values.get(name) for name in statistics)),
        ]

    return csv_text(columns, (row(i, ref) for i, ref in enumerate(assessment.refs)))


def describe_calibration(run: Run) -> dict[str, Any]:
    """Thresholds of a run and its image score, for metrics.json."""
    pixel, image = thresholds(run)
    statistic = image_statistic_of(run.scorer.method, run.calibrations[METHOD])
    return {"pixel_threshold": asdict(pixel), "image_threshold": asdict(image), "image_statistic": statistic}
