"""Tables of figures of merit as Markdown for the run directory, HTML for the report, and text for the terminal."""

import re
from dataclasses import dataclass
from typing import Any

import rich.box
import rich.table

from pulmo_jax.host.console import printable

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
LEAKS = "(leaks)"  # in the names of scores with random splits
# Characters that Markdown interprets: an underscore only at the end of a word, brackets only as a link.
MARKDOWN = re.compile(r"[\\`*<|&~]|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class Table:
    """A table of text cells.

    Attributes:
        title: Title.
        columns: Column headings.
        rows: Cells of each row.
        notes: Notes, such as the reason why a value is undefined.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def metrics_tables(metrics: dict[str, Any]) -> list[Table]:
    """Tables of pixel, image and lesion figures; the method comes first, followed by the baselines.

    Args:
        metrics: Content of metrics.json: {"pixel" | "image": {score: {figure: {"value", "low", "high", "reason"}}},
            "lesions": ...}.

    Returns:
        One table for each unit that is present.
    """
    tables = [figures_table(TITLES[unit], metrics[unit]) for unit in TITLES if unit in metrics]
    return [*tables, lesion_table(metrics["lesions"])] if "lesions" in metrics else tables


def figures_table(title: str, scores: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Table of the figures of merit of several scores.

    Args:
        title: Title of the table.
        scores: Figures of each score, the method first.

    Returns:
        The table.
    """
    names = [name for name in next(iter(scores.values())) if name in COLUMNS]
    rows = [[score, *(cell(figures[name]) for name in names)] for score, figures in scores.items()]
    reasons = [e["reason"] for figures in scores.values() for e in figures.values() if e.get("reason")]
    notes = [*baseline_notes(scores), *dict.fromkeys(reasons)]
    return Table(title, ["score", *(COLUMNS[name] for name in names)], rows, notes)


def baseline_notes(scores: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Name the trivial baselines that are better than the method by AUROC or AP.

    Args:
        scores: Figures of each score, the method first. Variants of the method, and scores with leaking splits, are no
            baselines.

    Returns:
        One sentence, or none.
    """
    method, *others = scores
    baselines = [name for name in others if not name.startswith(f"{method}, ") and LEAKS not in name]
    parts = []
    for key in ("auroc", "ap"):
        values = {name: scores[name].get(key, {}).get("value") for name in (method, *baselines)}
        own, known = values.pop(method), {name: value for name, value in values.items() if value is not None}
        best = max(known, key=lambda name: known[name], default=None)
        if own is not None and best is not None and known[best] > own:
            parts.append(f"{COLUMNS[key]} {number(own)}, but {best} {number(known[best])}")
    return [f"A trivial baseline is better than {method}: {'; '.join(parts)}."] if parts else []


def lesion_table(lesions: dict[str, Any]) -> Table:
    """Table of the recall of lesions by size.

    Args:
        lesions: The entry "lesions" of metrics.json.

    Returns:
        The table.
    """
    rows = [
        [format_size(row), f"{row['n_found']} of {row['n_lesions']}", cell(row["recall"])]
        for row in lesions["recall_by_size"]
        if row["n_lesions"]
    ]
    hits, images = lesions["images_with_highest_pixel_in_lesion"], lesions["images_with_lesions"]
    note = f"The highest score lies inside a lesion in {hits} of {images} images with lesions."
    return Table("Lesions found at the threshold", ["area", "found", "recall"], rows, [note])


def format_size(row: dict[str, Any]) -> str:
    """Format a size class of lesions.

    Args:
        row: Entry of "recall_by_size" in metrics.json.

    Returns:
        Range of areas in pixels.
    """
    low, high = row["min_area_px"], row["max_area_px"]
    return f"≥ {low} px" if high is None else f"{low} to {high - 1} px"


def cell(estimate: dict[str, Any]) -> str:
    """Format an estimate with its interval, as in `0.932 [0.910, 0.950]`.

    Args:
        estimate: Mapping with "value", "low" and "high".

    Returns:
        Text of the cell.
    """
    value, low, high = estimate["value"], estimate.get("low"), estimate.get("high")
    if value is None:
        return UNDEFINED
    return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """Format a number with three decimals, or with significant digits if it is small or large.

    Args:
        value: Number.

    Returns:
        Text.
    """
    if abs(value) >= 10:
        return f"{value:.4g}"
    return f"{value:.3f}" if value == 0 or abs(value) > 0.0095 else f"{value:.2g}"


def metrics_markdown(metrics: dict[str, Any]) -> str:
    """Content of metrics.md.

    Args:
        metrics: Content of metrics.json.

    Returns:
        Markdown text.
    """
    parts = ["# Metrics\n\nBrackets: 95 % bootstrap intervals over groups.\n"]
    parts += [table_markdown(table) for table in metrics_tables(metrics)]
    for title in ("calibration", "test", "training"):
        if title in metrics:
            parts.append(f"## {title.capitalize()}\n\n" + "\n".join(facts(metrics[title])) + "\n")
    return "\n".join(parts)


def table_markdown(table: Table) -> str:
    """Format a table in Markdown, with its title as a heading and its notes below.

    Args:
        table: The table.

    Returns:
        Markdown text.
    """
    rows = [markdown_row(table.columns), "|" + " --- |" * len(table.columns), *map(markdown_row, table.rows)]
    notes = (f"\n{markdown_text(note)}" for note in table.notes)
    return "\n".join([f"## {markdown_text(table.title)}\n", *rows, *notes]) + "\n"


def markdown_row(cells: list[str]) -> str:
    """Format a row of a Markdown table.

    Args:
        cells: Cells of the row.

    Returns:
        One line.
    """
    return "| " + " | ".join(map(markdown_text, cells)) + " |"


def markdown_text(text: str) -> str:
    """Escape text, such as the name of an image, so that Markdown shows it as it is.

    Args:
        text: Any text.

    Returns:
        One line without code, emphasis, links, images, HTML or the end of a table cell.
    """
    return MARKDOWN.sub(r"\\\g<0>", printable(text, keep=""))


def facts(section: dict[str, Any], prefix: str = "") -> list[str]:
    """Flatten nested facts to Markdown list items `- name: value`.

    Args:
        section: Section of metrics.json.
        prefix: Prefix of all names.

    Returns:
        One line per value.
    """
    lines = []
    for key, value in section.items():
        name = f"{prefix}{key}".replace("_", " ")
        lines += (
            facts(value, f"{name}: ")
            if isinstance(value, dict)
            else [f"- {markdown_text(name)}: {markdown_text(str(value))}"]
        )
    return lines


def metrics_console(metrics: dict[str, Any]) -> list[rich.table.Table]:
    """Tables for the terminal, without the intervals that metrics.md contains.

    Args:
        metrics: Content of metrics.json.

    Returns:
        Rich tables.
    """
    grids = []
    for table in metrics_tables(metrics):
        grid = rich.table.Table(*table.columns, title=table.title, box=rich.box.SIMPLE, caption=" ".join(table.notes))
        for row in table.rows:
            grid.add_row(*(text.partition(" [")[0] for text in row))
        grids.append(grid)
    return grids


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """Figures by which runs are compared in a sweep: those of the method, as far as metrics.json contains them.

    Args:
        metrics: Content of metrics.json.

    Returns:
        Values by name.
    """
    values = {}
    for unit in ("image", "pixel"):
        method = next(iter(metrics.get(unit, {}).values()), {})
        values |= {f"{unit} {COLUMNS[name]}": method.get(name, {}).get("value") for name in ("auroc", "ap")}
    method = next(iter(metrics.get("segmentation", {}).values()), {})
    values |= {f"Dice {name}": figures.get("dice", {}).get("value") for name, figures in method.items()}
    values |= {name: metrics.get(name) for name in ("sources", "highest_snr")}  # point-source runs
    return {name: float(value) for name, value in values.items() if value is not None}
