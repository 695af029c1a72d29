"""Report on drawn images: beside real patches, with the distance of each image from the nearest training patch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from pulmo_jax.data.pipeline import evenly_spaced
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sample_facts import described_sample, sample_line
from pulmo_jax.evaluation.nearest_patch import Nearest, nearest_patch
from pulmo_jax.reporting.figures import TEXT_WIDTH_IN, save, style
from pulmo_jax.reporting.report import CaptionedFigure, Section, write_report
from pulmo_jax.reporting.tables import Table
from pulmo_jax.runs.directory import citation_of
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.anomalies.captions import CAPTIONS
from pulmo_jax.tasks.anomalies.real_patches import RealPatches
from pulmo_jax.tasks.anomalies.run import Run
from pulmo_jax.tasks.anomalies.units import NORMALISED, intensity_of

PER_ROW, SHOWN = 8, 16
AT_ONCE = 64  # images compared with all training patches at once
COPY = 0.5  # an image nearer than this fraction of a small distance of validation patches counts as a copy
SMALL = 0.05  # quantile of that distance; the smallest one may be 0, because real images may contain equal patches
QUANTILES = {"smallest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "largest": 1.0}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Comparison of drawn images with real patches; distances are root mean square differences.

    Attributes:
        real: Patches of the run's images.
        distance: Distance of each drawn image from the nearest training patch.
        nearest: Nearest training patch of each image in the figure.
        validation: Distance of each validation patch from the nearest training patch.
    """

    real: RealPatches
    distance: Float[np.ndarray, "N"]
    nearest: Float[np.ndarray, "n P P C"]
    validation: Float[np.ndarray, "M"]

    @property
    def copy_limit(self) -> float:
        """Distance below which an image counts as a copy; 0: copies cannot be told from other images."""
        return COPY * float(np.quantile(self.validation, SMALL))

    @property
    def copies(self) -> int:
        """Number of drawn images that are nearly copies of a training patch."""
        return int((self.distance < self.copy_limit).sum())

    def as_json(self) -> dict[str, Any]:
        """Distances, normalised intensities, for summary.json."""
        return {
            "training_patches": len(self.real.training),
            "validation_patches": len(self.real.validation),
            "rms_difference": self.distance.tolist(),
            "rms_difference_of_validation_patches": quantiles(self.validation),
            "copy_limit": self.copy_limit,
            "copies": self.copies,
        }


def nearest_training_patch(images: Float[np.ndarray, "N P P C"], real: RealPatches) -> Nearest:
    """Find the nearest training patch of each image, in the symmetries of the training."""
    parts = [nearest_patch(images[i : i + AT_ONCE], real.training, real.codes) for i in range(0, len(images), AT_ONCE)]
    return Nearest(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def write_sampling_report(
    images: Float[np.ndarray, "n P P C"],
    comparison: Comparison | None,
    run: Run,
    summary: Mapping[str, Any],
    warnings: list[str],
    place: Place,
) -> None:
    """Write samples.png and report.html.

    Args:
        images: The first drawn images, normalised, at most `SHOWN`.
        comparison: Comparison with real patches; None if there are none.
        run: Opened run.
        summary: Facts for the top of the report.
        warnings: Warnings for the report.
        place: Output folder and console.
    """
    figure = save(samples_figure(images, comparison), place.folder, "samples")
    caption = CAPTIONS["samples_alone" if comparison is None else "samples"].format(
        shown=len(images), images=summary["images"], scale=scale_of(comparison, run, place)
    )
    text = (
        "The images show what the model has learnt of normal images. Structure that real patches lack, or that is "
        "missing here, is a weakness of the model."
    )
    tables = [] if comparison is None else [distance_table(comparison)]
    write_report(
        place.folder / "report.html",
        title=f"{run.config.name}: drawn images",
        summary={"run": str(run.path)} | {k.replace("_", " "): shown(v) for k, v in summary.items()},
        sections=[Section("Drawn images", text, [CaptionedFigure(figure, caption)], tables)],
        citations=citation_of(run.path),
        warnings=warnings,
        sample=sample_line("", described_sample(run.config.data.train)),
    )


def distance_table(comparison: Comparison) -> Table:
    """Table of the distances from the nearest training patch."""
    kinds = {"drawn images": comparison.distance, "validation patches": comparison.validation}
    rows = [
        [name, str(len(distance)), *(f"{value:.3g}" for value in quantiles(distance).values())]
        for name, distance in kinds.items()
    ]
    note = (
        f"Root mean square difference from the nearest of {len(comparison.real.training)} training patches, normalised "
        f"intensities. An image below {COPY:g} times the {100 * SMALL:g} % quantile of the validation patches, that is "
        f"below {comparison.copy_limit:.3g}, counts as a copy: {comparison.copies}. Images without fine structure are "
        "near to every patch."
    )
    return Table("Distance from the nearest training patch", ["", "number", *QUANTILES], rows, [note])


def quantiles(values: Float[np.ndarray, "N"]) -> dict[str, float]:
    """Quantiles by name."""
    return {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}


def samples_figure(images: Float[np.ndarray, "n P P C"], comparison: Comparison | None) -> Figure:
    """Draw images above their nearest training patches, and validation patches below.

    Args:
        images: Drawn images, normalised.
        comparison: Comparison with real patches; None if there are none.

    Returns:
        The figure.
    """
    rows: list[tuple[str, np.ndarray]] = []
    for start in range(0, len(images), PER_ROW):
        part = slice(start, start + PER_ROW)
        rows.append(("drawn", images[part]))
        if comparison is not None:
            rows.append(("nearest", comparison.nearest[part]))
    if comparison is not None:
        normal = evenly_spaced(comparison.real.validation, len(images))
        rows += [("validation", normal[i : i + PER_ROW]) for i in range(0, len(normal), PER_ROW)]
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 1.05 * TEXT_WIDTH_IN / PER_ROW * len(rows)), layout="constrained")
        for row, (name, patches) in zip(figure.subplots(len(rows), PER_ROW, squeeze=False), rows, strict=True):
            row[0].set_ylabel(name)
            for axes, image in zip(row, patches, strict=False):
                grey = np.clip(image if image.shape[-1] == 3 else image.mean(axis=-1), 0, 1)
                axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            for axes in row[len(patches) :]:
                axes.set_axis_off()
    return figure


def scale_of(comparison: Comparison | None, run: Run, place: Place) -> str:
    """Range of the grey values in the unit of the files, for the caption."""
    scale = NORMALISED
    if comparison is not None:
        reader = Reader(run.config.data.max_image_mb, place.formats)
        scale = intensity_of(comparison.real.reference, run.scorer.how, reader)
    if scale.unit is None:
        return "normalised intensities of 0 to 1"
    return f"{scale.low:.4g} to {scale.high:.4g} {scale.unit or '(file units)'}"


def shown(value: Any) -> str:
    """Format a fact for the report."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
