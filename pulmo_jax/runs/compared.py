"""The comparison of evaluations: figures of merit, paired differences, cost, and the report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.table
from jaxtyping import Int

from pulmo_jax.config.verbs import CompareConfig
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.evaluation.paired import (
    Figures,
    Scored,
    auroc_p_value,
    difference,
    error_p_value,
    estimate,
    fewest_groups,
    resampled,
)
from pulmo_jax.host.calls import without_home
from pulmo_jax.host.reading import read_json
from pulmo_jax.host.tables import csv_text
from pulmo_jax.reporting import comparison_figures as draw
from pulmo_jax.reporting.figures import roc_and_pr, save
from pulmo_jax.reporting.report import CaptionedFigure, Section, captioned
from pulmo_jax.reporting.tables import UNDEFINED, Table, cell, number, table_markdown
from pulmo_jax.runs.comparison import STORED, EvaluatedImage, Evaluation, Matched, labels_of
from pulmo_jax.runs.report import Findings
from pulmo_jax.runs.task import Comparison
from pulmo_jax.types import InputError

SMALL = 2**24  # largest metrics.json and run.json, bytes
FEW_GROUPS = 10
UNPAIRED = (
    "no interval: the evaluations drew other groups; evaluate the runs with the same seed and evaluation.replicates"
)
COST = {
    "training_s": "training, s",
    "steps": "steps",
    "parameters": "parameters",
    "seconds_per_image": "evaluation of an image, s",
    "devices": "training device",
}


@dataclass(frozen=True)
class Method:
    """A run or a trivial baseline on the compared images.

    Attributes:
        name: Name in tables and figures.
        scored: Its results.
        values: Figures of merit: the value, then the bootstrap replicates.
        baseline: Whether it is a trivial baseline.
    """

    name: str
    scored: Scored
    values: Figures
    baseline: bool = False


@dataclass(frozen=True)
class Compared:
    """Methods on the same images; the first is the reference of all differences.

    Attributes:
        images: The compared images.
        methods: Runs, then baselines.
        estimates: Figures of merit by method.
        gaps: Differences from the first method, by the other methods.
        p_values: p-values of the differences in AUROC or mean error; None if unknown.
        titles: Titles of the figures of merit.
    """

    images: Sequence[EvaluatedImage]
    methods: Sequence[Method]
    estimates: Mapping[str, Mapping[str, Estimate]]
    gaps: Mapping[str, Mapping[str, Estimate]]
    p_values: Mapping[str, float | None]
    titles: Mapping[str, str]

    @property
    def groups(self) -> list[str]:
        """Group of each image."""
        return [image.group for image in self.images]


def compare_evaluations(matched: Matched, comparison: Comparison, config: CompareConfig, out_dir: Path) -> Findings:
    """Compare evaluations of the same images.

    Args:
        matched: The evaluations, in the order of `config.runs`.
        comparison: Module comparison.py of their task.
        config: Typed config of `compare`.
        out_dir: Output folder, for the figures.

    Returns:
        Metrics, tables and report.

    Raises:
        InputError: If stored results are not valid.
    """
    evaluations, rows, notes = matched.evaluations, matched.rows, list(matched.notes)
    labels = labels_of(config.runs, evaluations)
    images = [evaluations[0].images[row] for row in rows[0]]
    results = [
        scored_images(folder, evaluation, comparison, own)
        for folder, evaluation, own in zip(config.runs, evaluations, rows, strict=True)
    ]
    compared = compare_methods(images, methods_of(labels, results, images, config), comparison.TITLES, config.seed)
    costs = [cost_of(folder, evaluation) for folder, evaluation in zip(config.runs, evaluations, strict=True)]
    if config.images == "common" and any(len(own) < len(e.images) for own, e in zip(rows, evaluations, strict=True)):
        notes.append("Figures of merit of pixels are stored for whole evaluations only, and left out here.")
    if len({image.group for image in images}) < FEW_GROUPS:
        notes.append(f"Fewer than {FEW_GROUPS} groups: intervals and p-values are rough.")
    folders = {label: without_home(str(folder)) for label, folder in zip(labels, config.runs, strict=True)}
    costs_table = cost_table(dict(zip(labels, costs, strict=True)))
    tables = [figures_of_merit_table("Figures of merit", compared, compared.estimates), difference_table(compared)]
    return Findings(
        title=f"Comparison: {', '.join(labels)}",
        metrics=as_metrics(compared, folders, costs),
        markdown="\n".join(["# Comparison\n", *map(table_markdown, [*tables, costs_table])]),
        sections=sections_of(compared, tables, costs_table, out_dir),
        summary={**folders, "images": str(len(images)), "groups": str(len(set(compared.groups)))},
        shown=[console_table(tables[0], intervals=False), *map(console_table, [tables[1], costs_table])],
        tables={"comparison.csv": comparison_csv(compared), "by_image.csv": by_image_csv(compared)},
        warnings=notes,
        sample=next((evaluation.sample for evaluation in evaluations if evaluation.sample), ""),
    )


def scored_images(
    folder: Path, evaluation: Evaluation, comparison: Comparison, rows: Int[np.ndarray, "M"]
) -> Mapping[str, Scored]:
    """Results of an evaluation for the compared images. Raises InputError if they are not valid."""
    try:
        return comparison.scored(evaluation.results, evaluation.images, rows)
    except (ValueError, KeyError, IndexError, TypeError) as error:  # of a damaged file
        reason = str(error).partition("\n")[0]
        raise InputError(f"{folder / STORED}: is not valid ({reason:.120}); evaluate the run again") from error


def methods_of(
    labels: Sequence[str],
    results: Sequence[Mapping[str, Scored]],
    images: Sequence[EvaluatedImage],
    config: CompareConfig,
) -> list[Method]:
    """The runs, then their trivial baselines, each once if it has the same figures in several runs.

    Args:
        labels: Names of the runs.
        results: Results of each run and its baselines.
        images: The compared images.
        config: Seed and number of replicates.

    Returns:
        Methods.
    """
    groups, runs, baselines = [image.group for image in images], [], list[Method]()
    for label, by_method in zip(labels, results, strict=True):
        (_, own), *others = by_method.items()
        runs.append(Method(label, own, resampled(own, groups, config.replicates, config.seed)))
        for name, scored in others:
            values = resampled(scored, groups, config.replicates, config.seed)
            known = [baseline for baseline in baselines if baseline.name.startswith(name)]
            if not any(equal(values, baseline.values) for baseline in known):
                baselines.append(Method(f"{name} ({label})" if known else name, scored, values, baseline=True))
    return [*runs, *baselines]


def equal(a: Figures, b: Figures) -> bool:
    """Whether two methods have the same figures of merit, up to rounding."""
    return a.keys() == b.keys() and all(np.allclose(a[k][0], b[k][0], rtol=1e-9, atol=0, equal_nan=True) for k in a)


def compare_methods(
    images: Sequence[EvaluatedImage], methods: Sequence[Method], titles: Mapping[str, str], seed: int
) -> Compared:
    """Estimates of all methods, and their differences from the first.

    Args:
        images: The compared images.
        methods: Methods; the first is the reference.
        titles: Titles of the figures of merit; others, such as those of a class, are shown by their names.
        seed: Seed of the permutations.

    Returns:
        The comparison.
    """
    groups, first = [image.group for image in images], methods[0]
    n_groups = fewest_groups([image.label for image in images], groups)
    n_all = len(set(groups))
    of_images = first.scored.errors is not None  # errors need no classes
    n = n_all if of_images else n_groups
    known = {**titles, **{name: name for name in first.values if name not in titles}}
    names = {name: title for name, title in known.items() if all(name in method.values for method in methods)}
    estimates = {m.name: {name: estimate(m.values[name], n) for name in names} for m in methods}
    gaps = {m.name: {name: gap(m, first, name, n) for name in names} for m in methods[1:]}
    p_values = {m.name: p_value(m.scored, first.scored, groups, seed) for m in methods[1:]}
    return Compared(images, methods, estimates, gaps, p_values, names)


def gap(method: Method, first: Method, name: str, n_groups: int) -> Estimate:
    """Difference of a figure of merit from the first method; without an interval if the replicates are not paired."""
    a, b = method.values[name], first.values[name]
    if name in method.scored.drawn and method.scored.drawn_with != first.scored.drawn_with:
        return Estimate(float(a[0] - b[0]), reason=UNPAIRED)
    return difference(a, b, n_groups)


def p_value(a: Scored, b: Scored, groups: Sequence[str], seed: int) -> float | None:
    """p-value for equal mean errors or, without errors, for equal AUROCs."""
    if a.errors is not None and b.errors is not None:
        return error_p_value(a.errors, b.errors, groups, seed)
    return auroc_p_value(a, b, groups)


def cost_of(folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Recorded cost of a run: training time, steps, parameters, time per image and devices; None if unknown."""
    run = folder if (folder / "config.yaml").is_file() else evaluation.run
    metrics, made = (facts_in(run / name) for name in ("metrics.json", "run.json"))
    training = metrics.get("training")
    training = training if isinstance(training, dict) else {}
    devices = made.get("devices")
    return {
        **{key: value if isinstance(value := training.get(key), int | float) else None for key in list(COST)[:3]},
        "seconds_per_image": evaluation.seconds_per_image,
        "devices": ", ".join(map(str, devices)) if isinstance(devices, list) else None,
    }


def facts_in(path: Path) -> dict[str, Any]:
    """Content of a JSON file of a run; empty if it cannot be read, as when the run has been moved."""
    try:
        content = read_json(path, SMALL, path.parent)
    except (OSError, InputError):
        return {}
    return content if isinstance(content, dict) else {}


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Table of the cost of each run."""
    rows = [[label, *(shown(cost[key]) for key in COST)] for label, cost in costs.items()]
    note = "Evaluation of an image: reading, the model and, except for classification, the trivial baselines."
    return Table("Cost", ["run", *COST.values()], rows, [note])


def shown(value: Any) -> str:
    """Text of a cost; "-" if unknown."""
    return UNDEFINED if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def figures_of_merit_table(
    title: str, compared: Compared, rows: Mapping[str, Mapping[str, Estimate]], last: Sequence[Sequence[str]] = ()
) -> Table:
    """Table with a row for each figure of merit and a column for each method.

    Args:
        title: Title of the table.
        compared: The comparison.
        rows: Estimates by method and figure of merit.
        last: Further rows.

    Returns:
        The table; its notes say why estimates are undefined or have no interval.
    """
    cells = [[text, *(cell(asdict(row[name])) for row in rows.values())] for name, text in compared.titles.items()]
    reasons = dict.fromkeys(e.reason for row in rows.values() for e in row.values() if e.reason)
    return Table(title, ["", *rows], [*cells, *map(list, last)], list(reasons))


def difference_table(compared: Compared) -> Table:
    """Table of the differences from the first run, with their p-values."""
    errors = compared.methods[0].scored.errors is not None
    test = "sign flips of whole groups" if errors else "Obuchowski's test for clustered images"
    note = f"p: two-sided, {test}; not adjusted for the number of comparisons."
    known = any(p is not None for p in compared.p_values.values())
    row = ["p, mean error" if errors else "p, AUROC", *map(p_text, compared.p_values.values())]
    title = f"Difference from {compared.methods[0].name}"
    table = figures_of_merit_table(title, compared, compared.gaps, [row] if known else [])
    return replace(table, notes=[*table.notes, *([note] if known else [])])


def p_text(p: float | None) -> str:
    """Format a p-value; "-" if unknown."""
    return UNDEFINED if p is None else number(p) if p >= 1e-4 else f"{p:.1e}"


def console_table(table: Table, *, intervals: bool = True) -> rich.table.Table:
    """Format a table for the console."""
    grid = rich.table.Table(*table.columns, title=table.title, box=rich.box.SIMPLE, caption="\n".join(table.notes))
    for row in table.rows:
        grid.add_row(*(text if intervals else text.partition(" [")[0] for text in row))
    return grid


def as_metrics(compared: Compared, folders: Mapping[str, str], costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Content of metrics.json."""
    described = zip(folders.items(), costs, strict=True)
    return {
        "runs": {label: {"folder": folder, **cost} for (label, folder), cost in described},
        "reference": compared.methods[0].name,
        "figures": {name: {key: asdict(e) for key, e in row.items()} for name, row in compared.estimates.items()},
        "differences": {name: {key: asdict(e) for key, e in row.items()} for name, row in compared.gaps.items()},
        "p_values": dict(compared.p_values),
        "test": {"images": len(compared.images), "groups": len(set(compared.groups))},
    }


def comparison_csv(compared: Compared) -> str:
    """comparison.csv: one row per method and figure of merit, with the difference from the first run."""
    columns = ["method", "baseline", "figure", "value", "low", "high"]
    columns += ["difference", "difference_low", "difference_high", "reason"]
    none = Estimate(None)
    rows = []
    for method in compared.methods:
        for name in compared.titles:
            own, gap = compared.estimates[method.name][name], compared.gaps.get(method.name, {}).get(name, none)
            numbers = [own.value, own.low, own.high, gap.value, gap.low, gap.high]
            rows.append([method.name, int(method.baseline), name, *numbers, own.reason or gap.reason])
    return csv_text(columns, rows)


def by_image_csv(compared: Compared) -> str:
    """by_image.csv: score or error of every image by every method."""
    columns = {method.name: by_image(method.scored) for method in compared.methods}
    known = {name: values for name, values in columns.items() if values is not None}
    rows = (
        [image.name, image.label, image.group, *(float(v[i]) if np.isfinite(v[i]) else None for v in known.values())]
        for i, image in enumerate(compared.images)
    )
    return csv_text(["filename", "class", "group", *known], rows)


def by_image(scored: Scored) -> np.ndarray | None:
    """Error of each image or, without errors, its score, mean over the repeats."""
    if scored.errors is not None or scored.scores is None:
        return scored.errors
    known = np.isfinite(scored.scores)
    sums = np.where(known, scored.scores, 0).sum(0)
    return np.divide(sums, known.sum(0), out=np.full(sums.size, np.nan), where=known.any(0))


def sections_of(compared: Compared, tables: Sequence[Table], costs: Table, out_dir: Path) -> list[Section]:
    """Sections of the report, with their figures, which are saved."""
    images, groups = len(compared.images), len(set(compared.groups))
    runs = sum(not method.baseline for method in compared.methods)
    text = (
        f"{runs} runs on the same {images} images in {groups} groups. Brackets: 95 % bootstrap intervals over groups; "
        "the same groups are drawn for all methods. The last columns are trivial baselines."
    )
    values = {"runs": runs, "images": images, "groups": groups, "reference": compared.methods[0].name}

    def saved(name: str, figure: Any) -> CaptionedFigure:
        return captioned(save(figure, out_dir / "figures", name), draw.CAPTIONS, **values)

    curves = [saved(name, figure) for name, figure in curve_figures(compared).items()]
    gaps = [saved("differences", draw.differences_figure(compared.gaps, compared.titles))]
    return [
        Section("Figures of merit", text, tables=tables[:1]),
        Section(f"Differences from {compared.methods[0].name}", "", figures=gaps, tables=tables[1:]),
        Section("Curves", "", figures=curves),
        Section("Cost", "", tables=[costs]),
    ]


def curve_figures(compared: Compared) -> dict[str, Any]:
    """Overlaid curves by file name: ROC and PR of scores, or distributions of errors."""
    first, *others = compared.methods
    if first.scored.errors is not None:
        errors = {method.name: method.scored.errors for method in compared.methods if method.scored.errors is not None}
        runs = {m.name: m.scored.errors for m in others if m.scored.errors is not None and not m.baseline}
        return {
            "errors": draw.cumulative_figure(errors),
            "errors_by_image": draw.by_image_figure(first.name, first.scored.errors, runs),
        }
    positive = first.scored.positive
    if positive is None or positive.all() or not positive.any():
        return {}
    curves = [
        draw.score_curve(
            m.name, m.scored.scores, positive, *(compared.estimates[m.name][k].value for k in ("auroc", "ap"))
        )
        for m in compared.methods
        if m.scored.scores is not None
    ]
    return {"curves": roc_and_pr(curves, "Images", float(positive.mean()))}
