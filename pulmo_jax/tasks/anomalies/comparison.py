"""Comparison of anomaly runs: image figures from the scores, pixel figures from the stored replicates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from pydantic import BaseModel

from pulmo_jax.evaluation.metrics import IMAGE_FIGURES, PIXEL_FIGURES, PixelMetrics, image_figures
from pulmo_jax.evaluation.paired import Scored
from pulmo_jax.inference.assess import Assessment
from pulmo_jax.reporting.tables import COLUMNS
from pulmo_jax.runs.comparison import EvaluatedImage, contents_of, json_values
from pulmo_jax.tasks.anomalies.report import named
from pulmo_jax.tasks.anomalies.run import Run

CLASSES = ("normal", "abnormal")
UNPAIRED = ("best_dice_threshold",)  # a score, which has another scale in every run
TITLES = {
    **{name: f"image {COLUMNS[name]}" for name in IMAGE_FIGURES},
    **{f"pixel_{name}": f"pixel {COLUMNS[name]}" for name in PIXEL_FIGURES if name not in UNPAIRED},
}


class Results(BaseModel):
    """Results of an evaluation by score name, the method first.

    Attributes:
        scores: Score of each image.
        thresholds: Image threshold.
        pixels: Pixel figures: the value, then the bootstrap replicates; None where undefined.
        replicates: Number of replicates.
        seed: Seed of the replicates.
    """

    scores: dict[str, list[float | None]]
    thresholds: dict[str, float]
    pixels: dict[str, dict[str, list[float | None]]]
    replicates: int
    seed: int


def images_of(assessment: Assessment) -> list[EvaluatedImage]:
    """The images of an evaluation.

    Args:
        assessment: Scores of the test images.

    Returns:
        Names, contents and ground truth.
    """
    contents = contents_of(assessment.refs)
    rows = zip(assessment.refs, contents, assessment.abnormal, assessment.truths, strict=True)
    return [
        EvaluatedImage(ref.title, content, CLASSES[abnormal], truth, ref.group)
        for ref, content, abnormal, truth in rows
    ]


def results_of(run: Run, assessment: Assessment, replicates: int, seed: int) -> dict[str, Any]:
    """Results that `scored` reads.

    Args:
        run: Calibrated run.
        assessment: Scores of the test images.
        replicates: Number of bootstrap replicates.
        seed: Random seed of the bootstrap.

    Returns:
        JSON values.
    """
    pixels = assessment.pixels or {}
    return {
        "scores": {named(run, name): json_values(np.array(scores)) for name, scores in assessment.image_scores.items()},
        "thresholds": {
            named(run, name): run.calibrations[name].image_threshold.value for name in assessment.image_scores
        },
        "pixels": {
            named(run, name): {
                figure: json_values(np.array([row[figure] for row in (state.resampled[0], *state.resampled[1])]))
                for figure in PIXEL_FIGURES
                if figure not in UNPAIRED
            }
            for name, state in pixels.items()
        },
        "replicates": replicates,
        "seed": seed,
    }


def replicates_of(state: PixelMetrics, figure: str) -> Any:
    """A pixel figure and its bootstrap replicates, for JSON."""
    value, replicates = state.resampled
    return json_values(np.array([row[figure] for row in (value, *replicates)]))


def scored(
    results: Mapping[str, Any], images: Sequence[EvaluatedImage], rows: Int[np.ndarray, "M"]
) -> dict[str, Scored]:
    """Results of each method for some images.

    Args:
        results: What `results_of` returned.
        images: All images of the evaluation.
        rows: The images to be compared. Pixel figures are available only for all of them.

    Returns:
        Results by score name, the method first.
    """
    stored = Results.model_validate(results)
    abnormal = np.array([images[row].label == CLASSES[1] for row in rows])
    complete = len(rows) == len(images)
    groups = tuple(image.group for image in images)

    def of(name: str) -> Scored:
        scores = np.array(stored.scores[name], np.float64)[rows]
        drawn = {f"pixel_{key}": np.array(row, np.float64) for key, row in stored.pixels.get(name, {}).items()}

        def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
            table = [image_figures(scores, abnormal, stored.thresholds[name], weight) for weight in weights]
            return {figure: np.array([row[figure] for row in table]) for figure in IMAGE_FIGURES}

        drawn_with = (stored.replicates, stored.seed, *groups)
        return Scored(figures, drawn if complete else {}, drawn_with, scores=scores[None], positive=abnormal)

    return {name: of(name) for name in stored.scores}
