"""Anomalies planted into the validation images of a run: their average precision, for metrics.json and the report."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import preprocess
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.evaluation.planted import KINDS, Kind, PlantedPrecision
from pulmo_jax.host.console import tracker
from pulmo_jax.inference.assess import METHOD
from pulmo_jax.inference.image_rating import rate_image
from pulmo_jax.inference.planted import Scored, planted_precision, scored_anomalies
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import Section, captioned
from pulmo_jax.reporting.tables import Table
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.anomalies.captions import CAPTIONS
from pulmo_jax.tasks.anomalies.figures import Example, View, score_maps, view
from pulmo_jax.tasks.anomalies.run import Run
from pulmo_jax.tasks.anomalies.units import intensity_of


class Measured(NamedTuple):
    """Precision of planted anomalies, with examples.

    Attributes:
        precision: Average precision.
        views: The first anomaly of each kind, in the order of `KINDS`.
    """

    precision: PlantedPrecision
    views: tuple[View, ...]


def measure(run: Run, refs: Sequence[ImageRef], reader: Reader, place: Place) -> Measured | None:
    """Compute and print the average precision of `evaluation.planted` anomalies.

    Args:
        run: Calibrated run.
        refs: Normal validation images.
        reader: Reader of the images.
        place: Output folder and console.

    Returns:
        Precision and examples; None if no anomalies are to be planted.
    """
    count, views = run.config.evaluation.planted, dict[Kind, View]()
    if not count:
        return None
    track = tracker(place.console, "planting anomalies")
    scored = track(scored_anomalies(run.scorer, refs, reader, count, run.config.seed), count)
    found = planted_precision(collecting(scored, views, run, reader))
    if found.value is not None:
        place.note(f"{found.count} anomalies planted into validation images: pixel AP {estimate(found)}")
    return Measured(found, tuple(views[kind] for kind in KINDS if kind in views))


def collecting(scored: Iterable[Scored], views: dict[Kind, View], run: Run, reader: Reader) -> Iterator[Scored]:
    """Yield all anomalies, and add the view of the first of each kind to `views`."""
    for one in scored:
        if one.planted.kind not in views:
            views[one.planted.kind] = example(run, one, reader)
        yield one


def describe(found: Measured | None) -> dict[str, Any]:
    """Entry "validation" of metrics.json; empty if no anomalies were planted."""
    return {} if found is None else {"validation": {"planted_ap": asdict(found.precision)}}


def objective_of(run: Run, found: Measured | None, val_loss: float) -> float:
    """Objective of a sweep, which is minimised: the validation loss, or minus the average precision.

    Args:
        run: Run, whose `trainer.objective` selects it.
        found: Precision of planted anomalies.
        val_loss: Lowest validation loss.

    Returns:
        The objective; NaN if it is not known.
    """
    if run.config.trainer.objective == "val_loss":
        return val_loss
    return math.nan if found is None or found.precision.value is None else -found.precision.value


def sections(found: Measured | None, folder: Path) -> list[Section]:
    """Section of the report with the precision of each kind, and one example of each.

    Args:
        found: Precision of planted anomalies.
        folder: Output folder.

    Returns:
        At most one section.
    """
    if found is None or found.precision.value is None:
        return []
    text = (
        f"{found.precision.count} anomalies planted into normal validation images; average precision of their pixels "
        f"{estimate(found.precision)}. It ranks settings of the model without labels, but does not predict the "
        "precision on real lesions."
    )
    rows = [[kind, f"{value:.3f}"] for kind, value in found.precision.by_kind.items()]
    table = Table("Planted anomalies", ["kind", "AP"], rows, [])
    saved = figures.save(score_maps(found.views, "Planted anomalies"), folder / "figures", "planted")
    return [Section("Planted anomalies", text, [captioned(saved, CAPTIONS, shown=len(found.views))], [table])]


def estimate(found: PlantedPrecision) -> str:
    """Format the precision with its standard error."""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    return f"{found.value:.3f}{error}"


def example(run: Run, scored: Scored, reader: Reader) -> View:
    """Collect the arrays of the figure of a planted anomaly."""
    (ref, planted, scores), calibration = scored, run.calibrations[METHOD]
    _, detected = find_detections(scores, calibration, min_area_px=run.config.calibration.min_area_px)
    return view(
        Example(
            title=f"{planted.kind}: {ref.title}",
            image=preprocess(planted.image.pixels, None, run.scorer.how),
            reconstruction=None,
            score=scores,
            truth=planted.mask,
            detected=detected,
            image_score=rate_image(run.scorer.method, calibration, scores).score,
            threshold=calibration.pixel_threshold.value,
            label=None,
            pixel_mm=reader.tags(ref).pixel_mm,
            intensity=intensity_of(ref, run.scorer.how, reader),
        )
    )
