"""Test a run on labelled images, and write metrics and report: what `evaluate` does, and `train` at its end."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pulmo_jax.config.verbs import EvaluateDataConfig, EvaluationConfig
from pulmo_jax.data.images import ImageRef, Reader, index_images, same_scale
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.evaluation.metrics import image_metrics
from pulmo_jax.host.console import tracker
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.inference.assess import METHOD, Assessment, Truth, assess, truth_by_folder, truth_by_masks
from pulmo_jax.reporting.report import write_report
from pulmo_jax.reporting.tables import metrics_console, metrics_markdown
from pulmo_jax.runs.directory import Run, missing_masks, thresholds
from pulmo_jax.tasks.anomalies.config import TrainConfig
from pulmo_jax.tasks.anomalies.report import (
    assessment_sections,
    calibration_sections,
    citations,
    distance_sections,
    example_views,
    named,
    summary,
    training_sections,
    validation_sections,
)
from pulmo_jax.types import InputError


def assess_and_report(
    run: Run,
    data: EvaluateDataConfig | None,
    options: EvaluationConfig,
    seed: int,
    out_dir: Path,
    console: Console,
    training: Mapping[str, Any] | None = None,
    validation: Sequence[ImageRef] = (),
    caveats: Sequence[str] = (),
) -> None:
    """Test where there is something to test on; metrics.json, metrics.md, figures/ and report.html in any case.

    training, validation: facts and validation images of the training that has just ended, for its own report.
    caveats: what must be known of it.
    """
    reader = Reader(run.config.data.max_image_mb)
    metrics: dict[str, Any] = {"training": dict(training)} if training else {}
    metrics["calibration"] = describe_calibration(run)
    warnings = [*caveats, *(threshold.warning for threshold in thresholds(run) if threshold.warning)]
    for caveat in caveats:
        console.print(f"warning: {caveat}", highlight=False)
    labelled = None if data is None else labelled_images(run.config, run.scorer.how, data, reader)
    sections = [
        *training_sections(run, out_dir, training or {}),
        *calibration_sections(run, out_dir),
        *validation_sections(run, validation, options.examples, reader, out_dir),
        *(distance_sections(run, validation, reader, out_dir) if validation else []),
    ]
    if labelled is not None:
        refs, truth_of = labelled
        if warning := missing_masks(refs, run):
            warnings.append(warning)
            console.print(f"warning: {warning}", highlight=False)
        track = tracker(console, "testing")
        assessment = assess(
            run.scorer,
            run.calibrations,
            refs,
            truth_of,
            reader,
            lesion_sizes_px=options.lesion_sizes_px,
            replicates=options.replicates,
            seed=seed,
            track=track,
        )
        scores = figures_of_merit(run, assessment, options.replicates, seed)
        scores["test"]["warnings"] = warnings
        metrics |= scores
        write_text(out_dir / "image_scores.csv", image_scores_csv(run, assessment))
        for table in metrics_console(scores):
            console.print(table)
        views = example_views(run, assessment, options.examples, truth_of, reader)
        sections = [*assessment_sections(run, assessment, scores, views, out_dir), *sections]
    write_json(out_dir / "metrics.json", metrics)
    write_text(out_dir / "metrics.md", metrics_markdown(metrics))
    write_report(
        out_dir / "report.html",
        title=f"{run.config.name}: what does not belong",
        summary=summary(run, training or {}),
        sections=sections,
        citations=citations(run),
        warnings=warnings,
    )


def labelled_images(
    config: TrainConfig, how: Preprocessing, data: EvaluateDataConfig, reader: Reader
) -> tuple[list[ImageRef], Callable[[ImageRef], Truth]]:
    """The test images and what is known of each. Raises InputError for any that cannot be used."""
    masks = data.foreground or config.data.foreground
    refs, skipped = index_images(
        data.test,
        masks=masks,
        group_regex=data.group_regex or config.data.group_regex,
        max_image_mb=config.data.max_image_mb,
        require_masks=data.foreground is not None,
    )
    if skipped:
        raise InputError(
            f"{skipped[0].reason}\n({len(skipped)} of {len(skipped) + len(refs)} test images cannot be used)"
        )
    for ref in refs:
        if ref.shape[2] != how.channels or not same_scale(ref.dtype, how.dtype):
            raise InputError(
                f"{ref.path}: {ref.shape[2]} bands of {ref.dtype}, but the run was trained on {how.channels} of "
                f"{how.dtype}; convert the image"
            )
    if data.test_masks is not None:
        return refs, truth_by_masks(refs, data.test_masks, data.normal_name, reader)
    return refs, truth_by_folder(refs, data.test, data.normal_name)


def figures_of_merit(run: Run, assessment: Assessment, replicates: int, seed: int) -> dict[str, Any]:
    """metrics.json's test sections: {"pixel"|"image": {score name: {metric: estimate}}, "lesions": ..., ...}."""
    labels = np.array(assessment.abnormal)
    result: dict[str, Any] = {
        "image": {
            named(run, name): {
                metric: asdict(estimate)
                for metric, estimate in image_metrics(
                    np.array(scores),
                    labels,
                    assessment.groups,
                    run.calibrations[name].image_threshold.value,
                    replicates,
                    seed,
                ).items()
            }
            for name, scores in assessment.image_scores.items()
        },
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


def image_scores_csv(run: Run, assessment: Assessment) -> str:
    """One row an image: what it is, and its score by the method and by every baseline."""
    text = io.StringIO()
    names = list(assessment.image_scores)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["filename", "page", "group", "abnormal", *(named(run, name) for name in names)])
    for i, ref in enumerate(assessment.refs):
        scores = (assessment.image_scores[name][i] for name in names)
        writer.writerow([ref.name, ref.page, ref.group, int(assessment.abnormal[i]), *scores])
    return text.getvalue()


def describe_calibration(run: Run) -> dict[str, Any]:
    pixel, image = thresholds(run)
    return {"pixel_threshold": asdict(pixel), "image_threshold": asdict(image)}
