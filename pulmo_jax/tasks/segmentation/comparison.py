"""Comparison of segmentation runs, from the figures of merit of every image."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel

from pulmo_jax.evaluation.paired import Scored
from pulmo_jax.evaluation.segmentation_metrics import IMAGE_FIGURES, image_figures, ratio
from pulmo_jax.runs.comparison import EvaluatedImage, json_values
from pulmo_jax.tasks.segmentation.data import Labelled
from pulmo_jax.tasks.segmentation.testing import Tested, mean_of_defined

TITLES = {
    "dice": "Dice, mean over classes",
    "iou": "IoU",
    "sensitivity": "sensitivity",
    "precision": "precision",
    "surface_distance": "mean surface distance, px",
    "surface_distance_95": "95 % surface distance, px",
    "surface_dice": "surface Dice",
}


class Results(BaseModel):
    """Results of an evaluation.

    Attributes:
        rows: Names of the classes, and of any class if there are several.
        classes: Number of classes.
        figures: `IMAGE_FIGURES` of every image and row (N, L) by method, the run first; None where undefined.
    """

    rows: list[str]
    classes: int
    figures: dict[str, dict[str, list[list[float | None]]]]


def images_of(labelled: Labelled) -> list[EvaluatedImage]:
    """The images of an evaluation.

    Args:
        labelled: Labelled images.

    Returns:
        Names, contents, and digests of the labels.
    """
    truths = [
        hashlib.sha256(labelled.labels.codes(ref).tobytes() + repr(labelled.classes.names).encode()).hexdigest()
        for ref in labelled.refs
    ]
    rows = zip(labelled.titles, labelled.contents, truths, labelled.groups, strict=True)
    return [EvaluatedImage(title, content, "", truth, group) for title, content, truth, group in rows]


def results_of(tested: Tested) -> dict[str, Any]:
    """Results that `scored` reads.

    Args:
        tested: Scores of the images.

    Returns:
        JSON values.
    """
    by_method = {
        method: {name: json_values(values) for name, values in image_figures(scores).items()}
        for method, scores in tested.scores.items()
    }
    return {"rows": list(tested.rows), "classes": len(tested.labelled.classes), "figures": by_method}


def scored(
    results: Mapping[str, Any], images: Sequence[EvaluatedImage], rows: Int[np.ndarray, "M"]
) -> dict[str, Scored]:
    """Results of each method for some images.

    Args:
        results: What `results_of` returned.
        images: All images of the evaluation.
        rows: The images to be compared.

    Returns:
        Results by method, the run first: the mean of each figure over the images in which it is defined, and over the
        classes; and, for several classes, the Dice of each.
    """
    stored = Results.model_validate(results)

    def of(method: str) -> Scored:
        tables = {name: np.array(stored.figures[method][name], np.float64)[rows] for name in IMAGE_FIGURES}

        def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
            means = {name: class_means(table, weights) for name, table in tables.items()}
            merits = {name: mean_of_defined(mean[:, : stored.classes]) for name, mean in means.items()}
            several = stored.rows if len(stored.rows) > 1 else []
            return merits | {f"Dice: {row}": means["dice"][:, k] for k, row in enumerate(several)}

        return Scored(figures, scores=mean_of_defined(tables["dice"][:, : stored.classes])[None])

    return {method: of(method) for method in stored.figures}


def class_means(table: Float[np.ndarray, "M L"], weights: Float[np.ndarray, "B M"]) -> Float[np.ndarray, "B L"]:
    """Weighted mean of each column over the images in which it is defined; NaN if there are none."""
    return ratio(weights @ np.nan_to_num(table), weights @ np.isfinite(table).astype(np.float64))
