"""Sections of the report of a segmentation: figures and tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.table
from jaxtyping import Float

from pulmo_jax.core.histogram import percentile_interval
from pulmo_jax.evaluation.false_components import LesionRow
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.evaluation.paired import image_weights
from pulmo_jax.evaluation.segmentation_calibration import dice_curves
from pulmo_jax.evaluation.segmentation_calibration import reliability as pixel_reliability
from pulmo_jax.evaluation.segmentation_metrics import BINS, ImageScores, lesion_counts, ratio
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.comparison_figures import intervals_figure
from pulmo_jax.reporting.figures import literal
from pulmo_jax.reporting.report import CaptionedFigure, Section, captioned
from pulmo_jax.reporting.tables import Table, cell, format_size, number
from pulmo_jax.reporting.training import training_sections
from pulmo_jax.tasks.segmentation import figures as draw
from pulmo_jax.tasks.segmentation.captions import CAPTIONS
from pulmo_jax.tasks.segmentation.config import SegmentationEvaluationConfig
from pulmo_jax.tasks.segmentation.run import SegmentationRun
from pulmo_jax.tasks.segmentation.testing import Tested, example

OVERLAP = {"dice": "Dice", "iou": "IoU", "sensitivity": "sensitivity", "precision": "precision",
           "pooled_dice": "Dice, pooled pixels"}  # fmt: skip
SURFACE = {"surface_distance": "mean surface distance, px", "surface_distance_95": "95 % surface distance, px",
           "surface_dice": "surface Dice", "ece": "ECE of the pixels"}  # fmt: skip
CURVE_POINTS = 100  # thresholds of a free-response curve
Estimates = Mapping[str, Mapping[str, Mapping[str, Estimate]]]  # by method, row and figure


@dataclass(frozen=True)
class Assessed:
    """Figures of merit of a run on labelled images.

    Attributes:
        run: Calibrated run.
        tested: Scores of the images.
        estimates: Figures of merit by method, row of the scores and name.
        differences: Differences of the run from each baseline, by row and name.
        lesions: Recall and false components by class and size.
        false_components: Listed false components per image, of all classes.
        options: Options of the evaluation.
        seed: Random seed of the bootstrap.
        data: What the images are, for the captions.
    """

    run: SegmentationRun
    tested: Tested
    estimates: Estimates
    differences: Estimates
    lesions: Mapping[str, Sequence[LesionRow]]
    false_components: Estimate
    options: SegmentationEvaluationConfig
    seed: int
    data: str

    @property
    def drawn(self) -> tuple[list[str], int, int]:
        """Groups of the images, replicates and seed of the bootstrap."""
        return self.tested.labelled.groups, self.options.replicates, self.seed


def report_sections(found: Assessed, out_dir: Path, training: Mapping[str, Any]) -> list[Section]:
    """Results, examples, components, calibration and training curves.

    Args:
        found: Figures of merit.
        out_dir: Output folder.
        training: Summary of the training; empty: no training curves.

    Returns:
        Sections of the report.
    """
    run, tested, groups = found.run, found.tested, found.tested.labelled.groups
    shared = {"images": len(groups), "groups": len(set(groups)), "data": found.data, "methods": len(found.estimates)}

    def save(figure: Any, name: str, **counts: int) -> CaptionedFigure:
        path = figures.save(figure, out_dir / "figures", name)
        figure.clear()  # breaks reference cycles, which would keep the drawn arrays in memory
        return captioned(path, CAPTIONS, **shared, min_area_px=run.config.calibration.min_area_px, **counts)

    by_method = {method: {row: own["dice"] for row, own in rows.items()} for method, rows in found.estimates.items()}
    titles = {row: literal(f"Dice: {row}", 40) for row in tested.rows}
    area = tested.labelled.counts[:, 1:-1].astype(np.float64)
    names = tested.labelled.classes.names
    text = (
        f"{len(groups)} images in {len(set(groups))} groups ({found.data}). Brackets: 95 % bootstrap intervals over "
        "groups. Figures are means over the images in which they are defined; those of pooled pixels count every pixel "
        "alike."
    )
    sizes = save(draw.dice_by_size(area, tested.dice[:, : len(names)], names), "dice_by_size")
    responses = response_curves(tested.own, names, run.calibration.component_threshold)
    froc = [save(draw.free_response(responses), "free_response")] if responses else []
    calibration = [
        save(draw.reliability([reliable(found, row) for row in range(len(names))]), "reliability"),
        save(draw.dice_by_threshold(threshold_curves(found)), "dice_by_threshold"),
    ]
    results = [save(intervals_figure(by_method, titles), "comparison")]
    first = "The images with the lowest Dice come first."
    return [
        Section("Results", text, results, all_tables(found)),
        Section("Examples", first, galleries(run, tested, found.options.examples, save)),
        Section("Dice by size", "", [sizes]),
        Section("Components", components_text(run, found.false_components), froc, [lesion_table(found.lesions)]),
        Section("Calibration", "", calibration, [threshold_table(run)]),
        *(training_sections(run.path, out_dir, training) if training else []),
    ]


def all_tables(found: Assessed) -> list[Table]:
    """Tables of the figures of merit, and of the differences from the baselines, if there are any."""
    gaps = [difference_table(found.differences, next(iter(found.estimates)))] if found.differences else []
    return [*metric_tables(found.estimates), *gaps]


def components_text(run: SegmentationRun, observed: Estimate) -> str:
    """How the threshold of the components was chosen, what it guarantees, and what these images show.

    Args:
        run: Calibrated run.
        observed: False components per image of the assessed images, of all classes.

    Returns:
        One paragraph.
    """
    found, here = run.calibration.components, f"On these images: {cell(asdict(observed))} false components per image."
    if found is None:
        return f"All components of the decided classes are listed: calibration.false_components is not set. {here}"
    if not np.isfinite(found.threshold):
        return f"No component is listed: {found.reason}."
    return (
        f"Components with a highest probability of at least {number(found.threshold)} are listed, so that at most "
        f"{found.limit:g} false components per image are expected (conformal risk control on {found.n_groups} "
        f"validation groups, with at most {found.bound:g} counted per image). On the validation images: "
        f"{cell(asdict(found.expected))} per image. The limit holds on average over groups that are exchangeable with "
        f"the validation groups. {here}"
    )


def galleries(
    run: SegmentationRun, tested: Tested, count: int, save: Callable[..., CaptionedFigure]
) -> list[CaptionedFigure]:
    """Contours of the worst, median and best images, the worst first; of the latter two half as many."""
    dice, groups, half = tested.mean_dice, tested.labelled.groups, max(1, count // 2)
    chosen = {
        "worst": ("Images with the lowest Dice", extremes(dice, groups, count)),
        "median": ("Images of median Dice", medians(dice, half)),
        "best": ("Images with the highest Dice", extremes(dice, groups, half, highest=True)),
    }
    names = tested.labelled.classes.names
    return [
        save(draw.contours([draw.view(example(run, tested, row)) for row in rows], names, title), name, shown=len(rows))
        for name, (title, rows) in chosen.items()
        if rows
    ]


def extremes(dice: Float[np.ndarray, "N"], groups: Sequence[str], count: int, *, highest: bool = False) -> list[int]:
    """Images with the lowest (or highest) Dice: one of each group first, then the next of each.

    Args:
        dice: Dice of each image; those with NaN are never chosen.
        groups: Group of each image.
        count: Number of images.
        highest: The highest instead of the lowest Dice.

    Returns:
        Their rows, the most extreme first.
    """
    value = -dice if highest else dice
    order: list[int] = [row for row in np.argsort(value, kind="stable").tolist() if np.isfinite(value[row])]
    before: dict[str, int] = {}
    rank: dict[int, int] = {}
    for row in order:
        rank[row] = before[groups[row]] = before.get(groups[row], -1) + 1
    return sorted(sorted(order, key=lambda row: rank[row])[:count], key=lambda row: value[row])


def medians(dice: Float[np.ndarray, "N"], count: int) -> list[int]:
    """Images whose Dice is nearest to the median, by increasing Dice; those with NaN are never chosen."""
    known = np.flatnonzero(np.isfinite(dice))
    if not known.size:
        return []
    nearest = known[np.argsort(np.abs(dice[known] - np.median(dice[known])), kind="stable")[:count]]
    return nearest[np.argsort(dice[nearest], kind="stable")].tolist()


def reliable(found: Assessed, row: int) -> draw.Reliable:
    """Reliability of the pixels of a class, for the figure."""
    scores = found.tested.own
    diagram = pixel_reliability(scores, row, *found.drawn)
    ends = np.array([[as_number(e.value), as_number(e.low), as_number(e.high)] for e in diagram.frequency]).T
    pixels = np.sum([s.histogram[row, :2].sum(0) for s in scores], axis=0)
    count = pixels.reshape(diagram.probability.size, -1).sum(1)
    ece = as_number(diagram.ece.value)
    return draw.Reliable(found.tested.rows[row], diagram.probability, *ends, count=count, ece=ece)


def as_number(value: float | None) -> float:
    """The value; NaN for None."""
    return np.nan if value is None else value


def threshold_curves(found: Assessed) -> list[draw.ThresholdCurve]:
    """Mean Dice of each class at every threshold, with intervals over groups, for the figure."""
    curves, scores, groups = [], found.tested.own, np.array(found.tested.labelled.groups, str)
    names = found.tested.labelled.classes.names
    for row, (name, chosen) in enumerate(zip(names, found.run.calibration.by_class, strict=True)):
        dice = dice_curves(scores, row)[:, 1:]
        filled, known = np.nan_to_num(dice), np.isfinite(dice).astype(np.float64)
        means = np.concatenate([ratio(w @ filled, w @ known) for w in image_weights(*found.drawn)])
        with_class = np.array([s.counts[row, [0, 2]].any() for s in scores])
        n_groups = np.unique(groups[with_class]).size
        ends = np.array([percentile_interval(column, n_groups) for column in means[1:].T], float).T
        interval = None if chosen.low is None or chosen.high is None else (chosen.low, chosen.high)
        threshold, value = np.arange(1, BINS) / BINS, found.run.mapper.thresholds[row]
        curves.append(draw.ThresholdCurve(name, threshold, means[0], *ends, chosen=value, interval=interval))
    return curves


def response_curves(scores: Sequence[ImageScores], names: Sequence[str], limit: float) -> list[draw.Components]:
    """Recall of components against false components per image for each class, for the figure."""
    curves = []
    for row, name in enumerate(names):
        peaks = np.concatenate([part[row][:, 1] for s in scores for part in (s.lesions, s.false)])
        steps = np.unique(peaks[peaks > 0])
        some = steps[np.linspace(0, steps.size - 1, min(steps.size, CURVE_POINTS)).round().astype(int)]
        totals = np.array([lesion_counts(scores, row, t).sum(0) for t in [*some, np.inf]])
        at = lesion_counts(scores, row, limit).sum(0)
        lesions = at[0]
        if not lesions:
            continue
        point = float(at[2] / len(scores)), float(at[1] / lesions)
        curves.append(draw.Components(name, totals[:, 2] / len(scores), totals[:, 1] / lesions, point))
    return curves


def metric_tables(estimates: Estimates) -> list[Table]:
    """Tables of the figures of merit: overlap, then surfaces and calibration; one row per method and class."""
    tables = []
    for title, columns in (("Overlap", OVERLAP), ("Surfaces and calibration", SURFACE)):
        rows = [
            [row, method, *(cell(asdict(estimates[method][row][name])) for name in columns)]
            for row in next(iter(estimates.values()))
            for method in estimates
        ]
        reasons = dict.fromkeys(
            found[name].reason for rows in estimates.values() for found in rows.values() for name in columns
        )
        notes = [*(baseline_notes(estimates) if columns is OVERLAP else []), *(reason for reason in reasons if reason)]
        tables.append(Table(title, ["class", "method", *columns.values()], rows, notes))
    return tables


def console_table(table: Table) -> rich.table.Table:
    """Format a table for the console, without the intervals."""
    grid = rich.table.Table(*table.columns, title=table.title, box=rich.box.SIMPLE, caption="\n".join(table.notes))
    for row in table.rows:
        grid.add_row(*(text.partition(" [")[0] for text in row))
    return grid


def baseline_notes(estimates: Estimates) -> list[str]:
    """Name the baseline with a higher mean Dice than the run, by class."""
    method, *baselines = estimates
    parts = []
    for row, own in estimates[method].items():
        value = own["dice"].value
        known = {name: as_number(estimates[name][row]["dice"].value) for name in baselines}
        better = {name: dice for name, dice in known.items() if value is not None and dice > value}
        if better:
            best = max(better, key=lambda name: better[name])
            parts.append(f"{row} {number(as_number(value))}, but {best} {number(better[best])}")
    return [f"A trivial baseline has a higher Dice than {method}: {'; '.join(parts)}."] if parts else []


def difference_table(differences: Mapping[str, Mapping[str, Mapping[str, Estimate]]], method: str) -> Table:
    """Table of the differences of the run from its baselines, paired over images."""
    columns = OVERLAP | {"surface_dice": "surface Dice"}
    rows = [
        [row, name, *(cell(asdict(found[key])) for key in columns)]
        for row in next(iter(differences.values()), {})
        for name, by_row in differences.items()
        for found in [by_row[row]]
    ]
    note = "Positive: the run is better. The same groups are drawn for both; an interval above 0 shows a difference."
    return Table(f"{method} minus baseline", ["class", "baseline", *columns.values()], rows, [note])


def lesion_table(lesions: Mapping[str, Sequence[LesionRow]]) -> Table:
    """Table of the recall of true components and of the false components, by class and size."""
    rows = [
        [
            name,
            format_size(asdict(found)),
            f"{found.n_found} of {found.n_lesions}",
            cell(asdict(found.recall)),
            str(found.n_false),
            cell(asdict(found.false_per_image)),
        ]
        for name, by_size in lesions.items()
        for found in by_size
        if found.n_lesions or found.n_false
    ]
    note = (
        "A true component is found if a listed component overlaps it; a listed component is false if it overlaps no "
        "true pixel of the class. The sizes are those of the component itself."
    )
    columns = ["class", "area", "found", "recall", "false components", "per image"]
    return Table("Components by size", columns, rows, [note])


def threshold_table(run: SegmentationRun) -> Table:
    """Table of the thresholds."""
    rows = [
        [name, cell(asdict(found))] for name, found in zip(run.classes.names, run.calibration.by_class, strict=True)
    ]
    reasons = dict.fromkeys(found.reason for found in run.calibration.by_class if found.reason)
    notes = [
        "Thresholds of the highest mean Dice on the validation images of each fold, unless calibration.threshold is "
        "set. Of several folds: mean (lowest to highest)."
    ]
    return Table("Thresholds of the probability", ["class", "threshold"], rows, [*notes, *reasons])
