"""report.html: one file with everything to look at, to keep, to mail."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from pulmo_jax.reporting.tables import Table

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Section:
    """A heading with a text, figures (PNG files, a PDF of each beside it) and tables."""

    title: str
    text: str = ""
    figures: Sequence[Path] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Picture:
    """A figure as the page carries it."""

    name: str
    data: str = field(repr=False)


def write_report(
    path: Path,
    title: str,
    summary: dict[str, str],
    sections: Sequence[Section],
    citations: Sequence[str],
    warnings: Sequence[str],
) -> None:
    """Write the page, whole or not at all. Sections without content are left out; all text is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    filled = [s for s in sections if s.text or s.figures or s.tables]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        summary=summary,
        sections=[(s, [embed(figure) for figure in s.figures]) for s in filled],
        citations=citations,
        warnings=warnings,
    )
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def embed(figure: Path) -> Picture:
    return Picture(figure.stem.replace("_", " "), base64.b64encode(figure.read_bytes()).decode())
