"""Output of an assessment: metrics.json, metrics.md, report.html and tables of the task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import RenderableType

from pulmo_jax.config.nodes import build_function
from pulmo_jax.host.calls import CALL
from pulmo_jax.host.console import Console
from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.reporting.figures import save
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.reporting.report import CaptionedFigure, Section, write_report
from pulmo_jax.reporting.tables import markdown_text
from pulmo_jax.runs.comparison import STORED, Evaluation
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.task import Assessment
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class Findings:
    """The outcome of an assessment.

    Attributes:
        title: Heading of the report.
        metrics: Content of metrics.json.
        markdown: Content of metrics.md.
        sections: Sections of the report; their figures are already written.
        summary: Facts at the top of the report.
        shown: Tables for the console.
        tables: Further text files by name.
        citations: Citations of the data.
        warnings: Warnings for the report, also printed.
        printed: Those of the warnings that were printed before, as when the images were read; not printed again.
        objective: Objective of a sweep, which is minimised.
        sample: First line of a report on sample data; see `data.sample_facts.sample_line`.
        evaluation: Results by image, for later comparisons; None if there were no labelled images.
    """

    title: str
    metrics: Mapping[str, Any]
    markdown: str
    sections: Sequence[Section]
    summary: Mapping[str, str]
    shown: Sequence[RenderableType] = ()
    tables: Mapping[str, str] = field(default_factory=dict)
    citations: Sequence[str] = ()
    warnings: Sequence[str] = ()
    printed: Sequence[str] = ()
    objective: float = math.nan
    sample: str = ""
    evaluation: Evaluation | None = None


def assess_and_write(assessment: Assessment, run: Any, config: Any, place: Place) -> Findings:
    """Evaluate a run on labelled images; the results of an earlier call in the same folder are replaced.

    Args:
        assessment: Assessment of the task.
        run: Opened run.
        config: Typed config of `evaluate`.
        place: Output folder and console.

    Returns:
        The outcome.
    """
    data = assessment.read_test(run, config, place)
    place.clear()
    findings = with_figures(assessment.assess(run, data, config, place), run, config, place.folder)
    write_json(place.folder / "run.json", {**provenance(), "seconds": round(CALL.get().seconds, 1)})
    write_findings(findings, place.folder, place.console)
    return findings


def write_findings(findings: Findings, folder: Path, console: Console) -> None:
    """Write and print an assessment; report.html is written last.

    Args:
        findings: Outcome of the assessment.
        folder: Output folder.
        console: For tables and warnings.
    """
    write_json(
        folder / "metrics.json", {**findings.metrics, **({"sample": findings.sample} if findings.sample else {})}
    )
    write_text(folder / "metrics.md", with_sample_line(findings.markdown, findings.sample))
    for name, content in findings.tables.items():
        write_text(folder / name, content)
    if findings.sample:
        console.print(findings.sample)
    if findings.evaluation is not None:
        write_json(folder / STORED, replace(findings.evaluation, sample=findings.sample).as_json())
    for table in findings.shown:
        console.print(table)
    for warning in findings.warnings:
        if warning not in findings.printed:
            console.print(f"warning: {warning}")
    write_report(
        folder / "report.html",
        title=findings.title,
        summary=dict(findings.summary),
        sections=findings.sections,
        citations=findings.citations,
        warnings=findings.warnings,
        sample=findings.sample,
    )


def with_sample_line(markdown: str, sample: str) -> str:
    """Insert the line on sample data, if any, below the heading of a Markdown text."""
    heading, _, rest = markdown.partition("\n")
    return f"{heading}\n\n{markdown_text(sample)}\n{rest}" if sample else markdown


def with_figures(findings: Findings, run: Any, config: Any, folder: Path) -> Findings:
    """The findings with a further section of the user's figures; see `figure_sections`."""
    return replace(findings, sections=[*findings.sections, *figure_sections(findings, run, config, folder)])


def figure_sections(findings: Any, run: Any, config: Any, folder: Path) -> list[Section]:
    """Draw the figures that the config lists under `figures`.

    Args:
        findings: Findings of the task; for point sources, the result of the search.
        run: The open run; for point sources, the observation with its detection limits.
        config: Config with `plugins` and `figures`, nodes of functions (run, findings) -> (matplotlib figure, caption).
        folder: Folder of the report.

    Returns:
        A section of the report; empty if there are no such figures.

    Raises:
        InputError: If a node cannot be built, or its function returns something else.
    """
    drawn = []
    for name, node in config.figures.items():
        result = build_function(node, f"figures.{name}", config.plugins)(run=run, findings=findings)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Figure)):
            raise InputError(f"figures.{name}: returned {type(result).__name__}; it must return (figure, caption)")
        drawn.append(CaptionedFigure(save(result[0], folder / "figures", name), str(result[1])))
    return [Section("Further figures", figures=drawn)] if drawn else []


def summarise_training(run: Any, training: Mapping[str, Any]) -> dict[str, str]:
    """Format the scalar results of a training for the top of its report.

    Args:
        run: Opened run.
        training: Training section of metrics.json.

    Returns:
        Text by label, starting with run directory and seed.
    """
    facts = {"run": str(run.path), "seed": str(run.config.seed)}
    plain = {key: value for key, value in training.items() if not isinstance(value, Mapping)}
    return facts | {k.replace("_", " "): f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in plain.items()}
