"""Anomalies planted into the validation images of a run: their average precision, for metrics.json and the report."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import preprocess
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.evaluation.planted import KINDS, Planted, PlantedPrecision
from pulmo_jax.host.console import tracker
from pulmo_jax.inference.assess import METHOD
from pulmo_jax.inference.image_rating import rate_image
from pulmo_jax.inference.planted import anomalies, planted_precision
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import Section, captioned
from pulmo_jax.reporting.tables import Table
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.anomalies.captions import CAPTIONS
from pulmo_jax.tasks.anomalies.figures import Example, View, score_maps, view
from pulmo_jax.tasks.anomalies.run import Run
from pulmo_jax.tasks.anomalies.units import intensity_of


def measure(run: Run, refs: Sequence[ImageRef], reader: Reader, place: Place) -> PlantedPrecision | None:
    """Compute and print the average precision of `evaluation.planted` anomalies.

    Args:
        run: Calibrated run.
        refs: Normal validation images.
        reader: Reader of the images.
        place: Output folder and console.

    Returns:
        The precision; None if no anomalies are to be planted.
    """
    count, seed = run.config.evaluation.planted, run.config.seed
    if not count:
        return None
    found = planted_precision(run.scorer, refs, reader, count, seed, tracker(place.console, "planting anomalies"))
    if found.value is not None:
        place.note(f"{found.count} anomalies planted into validation images: pixel AP {estimate(found)}")
    return found


def describe(found: PlantedPrecision | None) -> dict[str, Any]:
    """Entry "validation" of metrics.json; empty if no anomalies were planted."""
    return {} if found is None else {"validation": {"planted_ap": asdict(found)}}


def objective_of(run: Run, found: PlantedPrecision | None, val_loss: float) -> float:
    """Objective of a sweep, which is minimised: the validation loss, or minus the average precision.

    Args:
        run: Run, whose `trainer.objective` selects it.
        found: Average precision of planted anomalies.
        val_loss: Lowest validation loss.

    Returns:
        The objective; NaN if it is not known.
    """
    if run.config.trainer.objective == "val_loss":
        return val_loss
    return math.nan if found is None or found.value is None else -found.value


def sections(
    run: Run, found: PlantedPrecision | None, refs: Sequence[ImageRef], reader: Reader, folder: Path
) -> list[Section]:
    """Section of the report with the precision of each kind, and one example of each.

    Args:
        run: Calibrated run.
        found: Average precision of planted anomalies.
        refs: Normal validation images.
        reader: Reader of the images.
        folder: Output folder.

    Returns:
        At most one section.
    """
    if found is None or found.value is None:
        return []
    text = (
        f"{found.count} anomalies planted into normal validation images; average precision of their pixels "
        f"{estimate(found)}. It ranks settings of the model without labels, but does not predict the precision on real "
        "lesions."
    )
    rows = [[kind, f"{value:.3f}"] for kind, value in found.by_kind.items()]
    table = Table("Planted anomalies", ["kind", "AP"], rows, [])
    shown = {p.kind: (ref, p) for ref, p in anomalies(run.scorer.how, refs, reader, 2 * len(KINDS), run.config.seed)}
    views = [example(run, *shown[kind], reader) for kind in KINDS if kind in shown]
    saved = figures.save(score_maps(views, "Planted anomalies"), folder / "figures", "planted")
    return [Section("Planted anomalies", text, [captioned(saved, CAPTIONS, shown=len(views))], [table])]


def estimate(found: PlantedPrecision) -> str:
    """Format the precision with its standard error."""
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    return f"{found.value:.3f}{error}"


def example(run: Run, ref: ImageRef, planted: Planted, reader: Reader) -> View:
    """Score a planted anomaly and collect the arrays of its figure."""
    pixels, foreground = planted.image
    scores, calibration = run.scorer(pixels, foreground, ref.scale), run.calibrations[METHOD]
    _, detected = find_detections(scores, calibration, min_area_px=run.config.calibration.min_area_px)
    return view(
        Example(
            title=f"{planted.kind}: {ref.title}",
            image=preprocess(pixels, None, run.scorer.how),
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
