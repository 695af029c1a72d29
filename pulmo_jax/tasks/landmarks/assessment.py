"""Evaluation of landmarks on labelled images: errors, baselines, coverage, quality flags, and the report."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table as Grid

from pulmo_jax.config.verbs import EvaluationConfig
from pulmo_jax.data.images import index_images
from pulmo_jax.data.landmark_table import read_landmarks, without_row
from pulmo_jax.data.letterbox import to_bytes
from pulmo_jax.data.pipeline import evenly_spaced
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sample_facts import described_sample, sample_line
from pulmo_jax.evaluation import landmark_metrics as metrics
from pulmo_jax.evaluation.landmark_metrics import Errors
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.inference.lung_frames import into_frame
from pulmo_jax.inference.outputs import as_csv
from pulmo_jax.methods.located import Found
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import Section, captioned
from pulmo_jax.reporting.tables import Table, cell, table_markdown
from pulmo_jax.reporting.training import training_sections
from pulmo_jax.runs import comparison
from pulmo_jax.runs.directory import citation_of
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.report import Findings, summarise_training
from pulmo_jax.tasks.landmarks import figures as draw
from pulmo_jax.tasks.landmarks.captions import CAPTIONS
from pulmo_jax.tasks.landmarks.comparison import UNIT_NAMES, images_of, results_of
from pulmo_jax.tasks.landmarks.config import EvaluateLandmarksConfig
from pulmo_jax.tasks.landmarks.data import Labelled, labelled
from pulmo_jax.tasks.landmarks.figures import LandmarkExample
from pulmo_jax.tasks.landmarks.run import LandmarkRun

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.68, 0.8, 0.9, 0.95, 0.99)
NOTABLE_PX = 0.5  # rounding error of the labels above which a note is shown


@dataclass(frozen=True)
class Tested:
    """Predictions for labelled images.

    Attributes:
        labelled: Labelled images.
        found: Predicted landmarks.
        errors: Radial errors by method, px, the run first, then baselines.
    """

    labelled: Labelled
    found: Found
    errors: dict[str, Float[np.ndarray, "N K"]]

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, px, (N, 2)."""
        return np.array([ref.shape[:2] for ref in self.labelled.refs])

    @property
    def own(self) -> Float[np.ndarray, "N K"]:
        """Radial errors of the run, px."""
        return next(iter(self.errors.values()))


def read_test(run: LandmarkRun, config: EvaluateLandmarksConfig, place: Place) -> Labelled:
    """Read labelled test images; keys missing in the config are those of the run.

    Args:
        run: Opened run.
        config: Config of `evaluate`.
        place: Output folder and console.

    Returns:
        Labelled images.

    Raises:
        InputError: If images or table cannot be used.
    """
    data, trained = config.data, run.config.data
    own = {key: getattr(data, key) or getattr(trained, key) for key in ("group_regex", "class_regex", "units")}
    options = trained.model_copy(update=own | {"on_error": data.on_error, "normal_name": data.normal_name})
    index = index_images(
        data.images,
        group_regex=options.group_regex,
        max_image_mb=options.max_image_mb,
        formats=place.formats,
        say=place.note,
    )
    table = read_landmarks(
        data.test,
        data.images,
        n_points=run.n_landmarks,
        on_error=options.on_error,
        index=index,
        units=options.units,
    )
    notes = table.notes() + without_row([table])
    for note in notes:
        place.note(f"note: {note}")
    return replace(
        labelled(table.refs, table.points, run.size, options, place.console, "test", place.formats), notes=tuple(notes)
    )


def assess(run: LandmarkRun, data: Labelled, config: EvaluateLandmarksConfig, place: Place) -> Findings:
    """Evaluate a run and its baselines on labelled images."""
    normal, options = config.data.normal_name, config.evaluation
    return assess_landmarks(run, data, place, options, normal=normal, seed=config.seed, notes=data.notes)


def assess_landmarks(
    run: LandmarkRun,
    labelled: Labelled,
    place: Place,
    options: EvaluationConfig,
    *,
    normal: str,
    seed: int,
    training: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    chosen_on: bool = False,
    objective: float = math.nan,
) -> Findings:
    """Errors, coverage and quality flags on labelled images, and the figures of the report.

    Args:
        run: Calibrated run.
        labelled: Labelled images.
        place: Output folder and console.
        options: Options of the evaluation.
        normal: Reference class.
        seed: Random seed of the bootstrap.
        training: Summary of the training, if any.
        notes: Warnings for the report.
        chosen_on: The images are the validation images, so the errors are optimistic.
        objective: Objective of a sweep.

    Returns:
        Metrics and report.
    """
    began = time.monotonic()
    tested = test(run, labelled)
    seconds = time.monotonic() - began
    normal = normal.lower()
    merits = figures_of_merit(run, tested, normal, options.replicates, seed)
    warnings = list(notes)
    if merits["by_class"] and not merits["class_shift"]:
        warnings.append(
            f"The classes are {', '.join(merits['by_class'])}, and none is data.normal_name={normal}: the classes are "
            "not compared."
        )
    if chosen_on:
        warnings.insert(0, "No test table was given: the errors are those of the validation images, which were used to "
                        "select the checkpoint and to calibrate the uncertainties.")  # fmt: skip
    tables = metric_tables(merits)
    curves = training_sections(run.path, place.folder, training or {})
    data = "validation images, on which the checkpoint was selected" if chosen_on else "test images"
    return Findings(
        title=f"{run.config.name}: landmarks",
        metrics={"training": dict(training or {}), **merits},
        markdown=as_markdown(tables),
        sections=[*report_sections(run, tested, merits, tables, options, place, data), *curves],
        summary=summarise_training(run, training or {}),
        shown=[for_console(tables[0])],
        tables={"landmark_errors.csv": errors_csv(tested)},
        sample=sample_line(described_sample(labelled.refs[0].folder), described_sample(run.config.data.images)),
        citations=citation_of(run.path),
        warnings=warnings,
        printed=list(notes),
        objective=objective,
        evaluation=None if chosen_on else evaluated_images(run, tested, seconds),
    )


def evaluated_images(run: LandmarkRun, tested: Tested, seconds: float) -> comparison.Evaluation:
    """Results by image, for later comparisons; `seconds` is the time of all predictions."""
    results = results_of(tested.errors, tested.sizes)
    return comparison.describe_evaluation(run, images_of(tested.labelled), results, seconds)


def test(run: LandmarkRun, labelled: Labelled) -> Tested:
    """Predict landmarks by the run and the baselines, with their errors in px of each image."""
    working, found = labelled.working, run.find(labelled.working)
    errors = {run.config.method["_target_"].rpartition(".")[2]: metrics.radial_errors(found.points, labelled.points)}
    for name, points in run.companions.baselines.locate(working.pixels).items():
        errors[name] = metrics.radial_errors(working.to_images(points), labelled.points)
    return Tested(labelled, found, errors)


def figures_of_merit(run: LandmarkRun, tested: Tested, normal_name: str, replicates: int, seed: int) -> dict[str, Any]:
    """Figures of merit as in metrics.json.

    Args:
        run: Calibrated run.
        tested: Predictions for labelled images.
        normal_name: Reference class, in lower case.
        replicates: Bootstrap replicates.
        seed: Random seed of the bootstrap.

    Returns:
        Errors by method and unit, by landmark and by class, class shifts, coverage and quality flags.
    """
    labelled, own, found = tested.labelled, tested.own, tested.found
    drawn = (replicates, seed, labelled.groups)
    squared = metrics.squared_distance(found.points, found.covariance, labelled.points)
    classes, class_of, groups = labelled.classes, np.array(labelled.classes), np.array(labelled.groups)

    def in_units(errors: np.ndarray, which: Any = np.s_[:]) -> dict[str, Any]:
        found = metrics.summary(errors[which], tested.sizes[which], replicates, seed, groups[which].tolist())
        return {unit: {name: asdict(estimate) for name, estimate in e._asdict().items()} for unit, e in found.items()}

    several = len(set(classes)) > 1
    normal = next((name for name in sorted(set(classes)) if name.lower() == normal_name), None)
    return {
        "errors": {name: in_units(errors) for name, errors in tested.errors.items()},
        "by_landmark": [in_units(column) for column in np.split(own, own.shape[1], axis=1)],
        "by_class": {name: in_units(own, class_of == name) for name in (sorted(set(classes)) if several else [])},
        "class_shift": {
            name: {"difference_px": asdict(shift.difference), "p_value": shift.p_value}
            for name, shift in metrics.class_shift(own, classes, normal, *drawn).items()
        }
        if several and normal
        else {},
        "coverage": {
            str(level): asdict(e) for level, e in zip(LEVELS, metrics.coverage(squared, LEVELS, *drawn), strict=True)
        },
        "quality": quality(run, tested),
        "test": {"images": len(labelled.refs), "landmarks": own.shape[1], "groups": len(set(labelled.groups))},
        "label_floor_px": metrics.label_floor_px(labelled.points),
    }


def quality(run: LandmarkRun, tested: Tested) -> dict[str, Any]:
    """Fraction of flagged landmarks, and mean errors with and without flag, px."""
    low, own = tested.found.low, tested.own
    return {
        "share_low": float(low.mean()),
        "nominal_rate": run.calibration.rate,
        "mean_error_ok_px": float(own[~low].mean()) if (~low).any() else None,
        "mean_error_low_px": float(own[low].mean()) if low.any() else None,
        "covariance_factor": run.calibration.covariance_factor,
        "coverage_95_held_out_validation": run.calibration.held_out_coverage,
    }


def metric_tables(merits: Mapping[str, Any]) -> list[Table]:
    """Tables of the figures of merit: errors overall, by landmark and by class; coverage; quality flags."""
    units = [f"{figure}, {name}" for name in UNIT_NAMES.values() for figure in ("mean", "median")]

    def cells(errors: Mapping[str, Any]) -> list[str]:
        return [cell(errors[unit][figure]) for unit in UNIT_NAMES for figure in ("mean", "median")]

    floor = merits["label_floor_px"]
    note = f"The labels are rounded to a grid: a perfect prediction has a mean error of {floor:.1f} px."
    rows = [[name, *cells(errors)] for name, errors in merits["errors"].items()]
    notes = [*baseline_notes(merits["errors"]), *([note] if floor >= NOTABLE_PX else [])]
    tables = [Table("Errors", ["method", *units], rows, notes)]
    rows = [[str(k + 1), *cells(errors)] for k, errors in enumerate(merits["by_landmark"])]
    tables.append(Table("By landmark", ["landmark", *units], rows, []))
    if merits["by_class"]:
        shift = merits["class_shift"]
        rows = [
            [
                name,
                *cells(errors),
                cell(shift[name]["difference_px"]) if name in shift else "",
                f"{shift[name]['p_value']:.3g}" if name in shift and shift[name]["p_value"] is not None else "",
            ]
            for name, errors in merits["by_class"].items()
        ]
        columns = ["class", *units, "difference from the normal class, px", "p"]
        tables.append(Table("By class", columns, rows, ["p: two-sided permutation test over groups."]))
    rows = [[level, cell(e)] for level, e in merits["coverage"].items() if level in ("0.68", "0.95")]
    tables.append(
        Table("Coverage of the confidence regions", ["nominal", "fraction of true landmarks inside"], rows, [])
    )
    rows = [[k.replace("_", " "), "-" if v is None else f"{v:.3g}"] for k, v in merits["quality"].items()]
    tables.append(Table("Quality flags", ["", ""], rows, []))
    return tables


def baseline_notes(errors: Mapping[str, Any]) -> list[str]:
    """Name the baseline that is better than the run's method by mean error, if any."""
    means = {name: units["px"]["mean"]["value"] for name, units in errors.items()}
    method, *baselines = [name for name, mean in means.items() if mean is not None]
    best = min(baselines, key=lambda name: means[name], default=method)
    if best == method or means[best] >= means[method]:
        return []
    return [f"A baseline is better than {method}: mean error {means[method]:.3g} px, but {best} {means[best]:.3g}."]


def as_markdown(tables: Sequence[Table]) -> str:
    """Format the tables in Markdown."""
    parts = ["# Landmarks\n\nIn brackets: 95 % bootstrap intervals over groups of images.\n"]
    return "\n".join([*parts, *map(table_markdown, tables)])


def for_console(table: Table) -> Grid:
    """Format a table for the console, without the confidence intervals."""
    grid = Grid(*table.columns, title=table.title, caption=" ".join(table.notes))
    for row in table.rows:
        grid.add_row(*(text.partition(" [")[0] for text in row))
    return grid


def errors_csv(tested: Tested) -> str:
    """landmark_errors.csv: error of every landmark by method, px, with predicted std and quality."""
    columns = ["filename", "class", "landmark", *tested.errors, "std", "quality"]
    rows = [
        {
            "filename": ref.title,
            "class": tested.labelled.classes[i],
            "landmark": k + 1,
            **{name: errors[i, k] for name, errors in tested.errors.items()},
            "std": tested.found.std[i, k],
            "quality": "low" if tested.found.low[i, k] else "ok",
        }
        for i, ref in enumerate(tested.labelled.refs)
        for k in range(tested.own.shape[1])
    ]
    return as_csv(columns, rows)


def report_sections(
    run: LandmarkRun,
    tested: Tested,
    merits: Mapping[str, Any],
    tables: Sequence[Table],
    options: EvaluationConfig,
    place: Place,
    data: str,
) -> list[Section]:
    """Errors, example images, uncertainty and alignment.

    Args:
        run: Calibrated run.
        tested: Predictions for labelled images.
        merits: Figures of merit.
        tables: Tables of `metric_tables`.
        options: Options of the evaluation.
        place: Output folder and console.
        data: What the images are, for the captions.

    Returns:
        Sections of the report.
    """
    folder, own, labelled = place.folder / "figures", tested.own, tested.labelled
    cumulative = {name: metrics.cumulative_error(errors)[0] for name, errors in tested.errors.items()}
    estimates = [_errors(errors["px"]) for errors in merits["by_landmark"]]
    curves = [
        figures.save(draw.cumulative_errors(cumulative, "px"), folder, "cumulative_errors"),
        figures.save(draw.error_by_landmark(own, estimates, "px"), folder, "error_by_landmark"),
    ]
    if merits["by_class"]:
        means, classes = own.mean(1), np.array(labelled.classes)
        of_image = {name: means[classes == name] for name in merits["by_class"]}
        by_class = {name: _errors(errors["px"]) for name, errors in merits["by_class"].items()}
        curves.append(figures.save(draw.class_comparison(of_image, by_class, "px"), folder, "class_comparison"))
    levels = [Estimate(**merits["coverage"][str(level)]) for level in LEVELS]
    coverage = figures.save(draw.coverage_calibration(np.array(LEVELS), levels), folder, "coverage")
    reader = Reader(run.config.data.max_image_mb, place.formats)
    worst = metrics.failures(own, options.examples)
    spread = np.argsort(own.mean(1))[evenly_spaced(np.arange(len(own)), options.examples)]
    galleries = [
        figures.save(draw.gallery([example(tested, i, reader) for i in map(int, which)], title), folder, name)
        for which, title, name in (
            (spread, "Images by increasing error, evenly spaced", "examples"),
            (worst, "The largest errors", "failures"),
        )
    ]
    warped = figures.save(aligned_figure(run, tested, spread[:4], reader), folder, "aligned")
    n = {"images": len(own), "landmarks": own.shape[1], "classes": len(merits["by_class"]), "data": data}
    shown = {"examples": len(spread), "failures": len(worst), "aligned": len(spread[:4])}
    text = f"{len(labelled.refs)} images in {len(set(labelled.groups))} groups. Intervals are 95 % bootstrap intervals."
    return [
        Section("Errors", text, [captioned(path, CAPTIONS, **n) for path in curves], list(tables[:3])),
        Section("Images", "", [captioned(path, CAPTIONS, shown=shown[path.stem], **n) for path in galleries], []),
        Section("Uncertainty", "", [captioned(coverage, CAPTIONS, **n)], list(tables[3:])),
        Section("Alignment", "", [captioned(warped, CAPTIONS, shown=shown["aligned"], **n)], []),
    ]


def _errors(plain: Mapping[str, Any]) -> Errors:
    """Mean and median error from their entries in metrics.json."""
    return Errors(*(Estimate(**plain[name]) for name in ("mean", "median")))


def example(tested: Tested, i: int, reader: Reader) -> LandmarkExample:
    """Read an image again and collect the arrays of its figure."""
    ref, found = tested.labelled.refs[i], tested.found
    return LandmarkExample(
        f"{ref.title}: {tested.own[i].mean():.3g} px",
        to_bytes(reader.image(ref)),
        found.points[i],
        found.covariance[i],
        tested.labelled.points[i],
        found.low[i],
    )


def aligned_figure(run: LandmarkRun, tested: Tested, which: np.ndarray, reader: Reader) -> Any:
    """Figure of aligned images with the landmarks of the lung frame."""
    shown = []
    for i in which:
        image = to_bytes(reader.image(tested.labelled.refs[i]))
        warped = into_frame(image[..., None], tested.found.points[i], run.frame)[..., 0]
        shown.append(
            LandmarkExample(
                tested.labelled.refs[i].title, warped, run.frame.points, label="landmarks of the lung frame"
            )
        )
    return draw.gallery(shown, "In the lung frame")
