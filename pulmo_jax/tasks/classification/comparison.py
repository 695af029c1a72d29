"""Comparison of classification runs, from the class probabilities of every image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel

from pulmo_jax.evaluation.class_metrics import FIGURES, weighted_figures
from pulmo_jax.evaluation.paired import Scored
from pulmo_jax.reporting.tables import COLUMNS
from pulmo_jax.runs.comparison import EvaluatedImage, json_values
from pulmo_jax.tasks.classification.data import ClassSet

TITLES = {name: COLUMNS[name] for name in FIGURES}
BASELINES = ("file metadata", "majority class")


class Results(BaseModel):
    """Results of an evaluation.

    Attributes:
        classes: Names of the classes.
        positive: Positive class of two; None: mean over all classes.
        probabilities: Class probabilities (R, N, K) by method, the run first; None for images without a prediction.
    """

    classes: list[str]
    positive: int | None
    probabilities: dict[str, list[list[list[float | None]]]]


def images_of(dataset: ClassSet) -> list[EvaluatedImage]:
    """The images of an evaluation.

    Args:
        dataset: Labelled images.

    Returns:
        Names, contents and classes.
    """
    rows = zip(dataset.titles, dataset.contents, dataset.labels, dataset.groups, strict=True)
    return [EvaluatedImage(title, content, dataset.classes[label], "", group) for title, content, label, group in rows]


def results_of(
    dataset: ClassSet, positive: int | None, probabilities: Mapping[str, Float[np.ndarray, "R N K"]]
) -> dict[str, Any]:
    """Results that `scored` reads.

    Args:
        dataset: Labelled images.
        positive: Positive class, if there are two.
        probabilities: Class probabilities by method, the run first.

    Returns:
        JSON values.
    """
    first = next(iter(probabilities))
    kept = {name: p for name, p in probabilities.items() if name in (first, *BASELINES)}
    return {
        "classes": list(dataset.classes),
        "positive": positive,
        "probabilities": {name: json_values(p) for name, p in kept.items()},
    }


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
    labels = np.array([stored.classes.index(images[row].label) for row in rows])

    def of(name: str) -> Scored:
        p = np.array(stored.probabilities[name], np.float64)[:, rows]
        table = weighted_figures(p, labels, stored.positive)

        def figures(weights: np.ndarray) -> dict[str, np.ndarray]:
            return dict(zip(FIGURES, table(weights).T, strict=True))

        if stored.positive is None:
            return Scored(figures)
        return Scored(figures, scores=p[..., stored.positive], positive=labels == stored.positive)

    return {name: of(name) for name in stored.probabilities}
