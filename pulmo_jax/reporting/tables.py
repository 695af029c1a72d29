"""Metrics as tables: Markdown for the run directory, HTML for the report, rich for the terminal."""

from dataclasses import dataclass
from typing import Any

import rich.box
import rich.table

TITLES = {"pixel": "Pixels", "image": "Images"}
COLUMNS = {
    "auroc": "AUROC",
    "ap": "AP",
    "aupro": "AUPRO",
    "dice": "Dice at threshold",
    "best_dice": "best Dice",
    "false_alarm_rate": "false-alarm rate",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "ece": "ECE",
    "log_loss": "log loss",
    "sensitivity_at_95_specificity": "sensitivity at 95 % specificity",
}
UNDEFINED = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; notes say why some are undefined."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def metrics_tables(metrics: dict[str, Any]) -> list[Table]:
    """One table for pixels and one for images, the method first and baselines after it; and one for lesions.

    metrics: {"pixel" | "image": {score: {figure: {"value", "low", "high", "reason"}}}, "lesions": ...}.
    """
    tables = [figures_table(TITLES[unit], metrics[unit]) for unit in TITLES if unit in metrics]
    return [*tables, lesion_table(metrics["lesions"])] if "lesions" in metrics else tables


def figures_table(title: str, scores: dict[str, dict[str, dict[str, Any]]]) -> Table:
    names = [name for name in next(iter(scores.values())) if name in COLUMNS]
    rows = [[score, *(cell(figures[name]) for name in names)] for score, figures in scores.items()]
    reasons = [e["reason"] for figures in scores.values() for e in figures.values() if e.get("reason")]
    return Table(title, ["score", *(COLUMNS[name] for name in names)], rows, list(dict.fromkeys(reasons)))


def lesion_table(lesions: dict[str, Any]) -> Table:
    rows = [
        [size(row), f"{row['n_found']} of {row['n_lesions']}", cell(row["recall"])]
        for row in lesions["recall_by_size"]
        if row["n_lesions"]
    ]
    found, images = lesions["images_with_highest_pixel_in_lesion"], lesions["images_with_lesions"]
    note = f"In {found} of {images} images with lesions the highest score lies in one."
    return Table("Lesions found at the threshold", ["area", "found", "recall"], rows, [note])


def size(row: dict[str, Any]) -> str:
    low, high = row["min_area_px"], row["max_area_px"]
    return f"{low} px and more" if high is None else f"{low} to below {high} px"


def cell(estimate: dict[str, Any]) -> str:
    """`0.932 [0.910, 0.950]`."""
    value, low, high = estimate["value"], estimate.get("low"), estimate.get("high")
    if value is None:
        return UNDEFINED
    return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """Three decimals, or significant digits where these would say 0.000 or too much."""
    if abs(value) >= 10:
        return f"{value:.4g}"
    return f"{value:.3f}" if value == 0 or abs(value) > 0.0095 else f"{value:.2g}"


def metrics_markdown(metrics: dict[str, Any]) -> str:
    parts = ["# Metrics\n\nIn brackets: 95 % intervals, by bootstrap over groups.\n"]
    for table in metrics_tables(metrics):
        lines = [f"## {table.title}\n", markdown_row(table.columns), markdown_row(["---"] * len(table.columns))]
        lines += [markdown_row(row) for row in table.rows]
        lines += [f"\n{note}" for note in table.notes]
        parts.append("\n".join(lines) + "\n")
    for title in ("calibration", "test", "training"):
        if title in metrics:
            parts.append(f"## {title.capitalize()}\n\n" + "\n".join(facts(metrics[title])) + "\n")
    return "\n".join(parts)


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def facts(section: dict[str, Any], prefix: str = "") -> list[str]:
    """`- name: value` for every plain entry, nested names joined."""
    lines = []
    for key, value in section.items():
        name = f"{prefix}{key}".replace("_", " ")
        lines += facts(value, f"{name}: ") if isinstance(value, dict) else [f"- {name}: {value}"]
    return lines


def metrics_console(metrics: dict[str, Any]) -> list[rich.table.Table]:
    """The tables for a terminal, without the intervals, which metrics.md has."""
    shown = []
    for table in metrics_tables(metrics):
        grid = rich.table.Table(*table.columns, title=table.title, box=rich.box.SIMPLE, caption=" ".join(table.notes))
        for row in table.rows:
            grid.add_row(*(text.partition(" [")[0] for text in row))
        shown.append(grid)
    return shown


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """The few figures by which runs are compared, as far as metrics.json has them: of the method, not its baselines."""
    found = {}
    for unit in ("image", "pixel"):
        method = next(iter(metrics.get(unit, {}).values()), {})
        found |= {f"{unit} {COLUMNS[name]}": method.get(name, {}).get("value") for name in ("auroc", "ap")}
    found |= {name: metrics.get(name) for name in ("sources", "highest_snr")}  # of a rotating stack
    return {name: float(value) for name, value in found.items() if value is not None}
