"""Comparison of landmark runs, from the radial error of every landmark of every image."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int
from pydantic import BaseModel

from pulmo_jax.evaluation.landmark_metrics import UNITS, convert_unit, image_means
from pulmo_jax.evaluation.paired import Scored
from pulmo_jax.runs.comparison import EvaluatedImage, contents_of, json_values
from pulmo_jax.tasks.landmarks.data import Labelled

UNIT_NAMES = {"px": "px", "px_at_224": "px at 224", "percent_of_diagonal": "% of the diagonal"}
TITLES = {f"{kind}_{unit}": f"{kind} error, {UNIT_NAMES[unit]}" for unit in UNITS for kind in ("mean", "median")}


class Results(BaseModel):
    """Results of an evaluation.

    Attributes:
        errors: Radial errors (N, K) by method, px, the run first; None without ground truth.
        sizes: Height and width of each image, px.
    """

    errors: dict[str, list[list[float | None]]]
    sizes: list[tuple[int, int]]


def images_of(labelled: Labelled) -> list[EvaluatedImage]:
    """The images of an evaluation.

    Args:
        labelled: Labelled images.

    Returns:
        Names, contents, classes, and the true landmarks with their digests.
    """
    truths = [hashlib.sha256(points.astype(np.float64).tobytes()).hexdigest() for points in labelled.points]
    points = [tuple(map(tuple, json_values(values.astype(np.float64)))) for values in labelled.points]
    contents = contents_of(labelled.refs)
    rows = zip(labelled.titles, contents, labelled.classes, truths, labelled.groups, points, strict=True)
    return [EvaluatedImage(*row) for row in rows]


def results_of(errors: Mapping[str, Float[np.ndarray, "N K"]], sizes: Int[np.ndarray, "N 2"]) -> dict[str, Any]:
    """Results that `scored` reads.

    Args:
        errors: Radial errors by method, px, the run first.
        sizes: Height and width of each image, px.

    Returns:
        JSON values.
    """
    stored = {name: json_values(e) for name, e in errors.items()}
    return {"errors": stored, "sizes": sizes.tolist()}


def scored(
    results: Mapping[str, Any], images: Sequence[EvaluatedImage], rows: Int[np.ndarray, "M"]
) -> dict[str, Scored]:
    """Results of each method for some images.

    Args:
        results: What `results_of` returned.
        images: All images of the evaluation.
        rows: The images to be compared.

    Returns:
        Results by method, the run first.
    """
    stored = Results.model_validate(results)
    sizes = np.array(stored.sizes)[rows]

    def of(name: str) -> Scored:
        errors = np.array(stored.errors[name], np.float64)[rows]
        by_unit = {unit: convert_unit(errors, sizes, unit) for unit in UNITS}

        def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
            found = {unit: mean_and_median(values, weights) for unit, values in by_unit.items()}
            return {
                f"{kind}_{unit}": column
                for unit, columns in found.items()
                for kind, column in zip(("mean", "median"), columns, strict=True)
            }

        return Scored(figures, errors=image_means(errors))

    return {name: of(name) for name in stored.errors}


def mean_and_median(
    errors: Float[np.ndarray, "N K"], weights: Float64[np.ndarray, "B N"]
) -> tuple[Float64[np.ndarray, "B"], Float64[np.ndarray, "B"]]:
    """Mean and median error over all landmarks of images that are repeated as often as their weights say.

    Args:
        errors: Errors; NaN without ground truth.
        weights: Whole numbers.

    Returns:
        Mean and median for each row of weights; NaN if no landmark has weight.
    """
    image, landmark = np.nonzero(np.isfinite(errors))
    values = errors[image, landmark]
    order = np.argsort(values)
    values, repeated = values[order], weights[:, image[order]]
    upto = np.cumsum(repeated, axis=1)
    total = upto[:, -1] if values.size else np.zeros(len(weights))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (repeated @ values) / total

    def ranked(rank: np.ndarray) -> np.ndarray:
        """Value of a rank, counted from 0, in each row."""
        return np.array([values[np.searchsorted(row, r, side="right")] for row, r in zip(upto, rank, strict=True)])

    known = total > 0
    median = np.full(len(weights), np.nan)
    if known.any():
        upto = upto[known]
        middle = total[known]
        median[known] = (ranked((middle - 1) // 2) + ranked(middle // 2)) / 2
    return np.where(known, mean, np.nan), median
