"""The HTML report: one self-contained file with figures, captions and tables."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from pulmo_jax.host.console import printable
from pulmo_jax.host.files import write_text
from pulmo_jax.reporting.provenance import how_made
from pulmo_jax.reporting.tables import Table

TEMPLATE = Path(__file__).with_name("report.html.j2")
LONG = 30  # characters of a cell above which it is wrapped


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure of the report and its caption.

    Attributes:
        path: PNG file; a PDF of the same name is in the same folder.
        caption: What the figure shows, how many images or sources it is based on, and what to look for. Plain text.

    Raises:
        ValueError: If the caption is blank.
    """

    path: Path
    caption: str

    def __post_init__(self) -> None:
        if not self.caption.strip():
            raise ValueError(f"{self.path.name}: a figure of a report needs a caption")


def captioned(path: Path, captions: Mapping[str, str], **values: object) -> CaptionedFigure:
    """Add the caption of a figure from a table of templates.

    Args:
        path: PNG file of the figure.
        captions: Template (`str.format`) by file name without suffix.
        **values: Values of the placeholders, such as the number of images.

    Returns:
        The figure with its caption.

    Raises:
        KeyError: If there is no template for the figure, or a placeholder has no value.
    """
    return CaptionedFigure(path, captions[path.stem].format(**values))


@dataclass(frozen=True)
class Section:
    """A section of the report: heading, text, figures and tables.

    Attributes:
        title: Heading, also the link text in the table of contents.
        text: One paragraph of plain text.
        figures: In the order in which they are shown.
        tables: Shown above the figures.
    """

    title: str
    text: str = ""
    figures: Sequence[CaptionedFigure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class EmbeddedFigure:
    """A figure as it stands in the page: `png` is base64."""

    caption: str
    png: str = field(repr=False)


def write_report(
    path: Path,
    title: str,
    summary: dict[str, str],
    sections: Sequence[Section],
    citations: Sequence[str],
    warnings: Sequence[str],
    sample: str = "",
    made: Mapping[str, str] | None = None,
) -> None:
    """Write the report as a single HTML file that loads nothing; the file is replaced atomically.

    Args:
        path: Output file.
        title: Page title.
        summary: Facts of the run by name, shown below the title.
        sections: Sections in order; empty ones are omitted.
        citations: References that users of the run should cite.
        warnings: Messages shown above everything else. All text is HTML-escaped.
        sample: Line below the title of a report on sample data.
        made: How the results were made, by label, shown at the end; None: `how_made` of this process.

    Raises:
        FileNotFoundError: If a figure does not exist; an existing report is then left as it is.
    """
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    environment = jinja2.Environment(finalize=_shown, **options)
    nonempty = [s for s in sections if s.text or s.figures or s.tables]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        summary=summary,
        sections=[(section, [_embed(figure) for figure in section.figures]) for section in nonempty],
        citations=citations,
        warnings=warnings,
        sample=sample,
        long=LONG,
        made=how_made() if made is None else made,
    )
    write_text(path, page)


def _shown(value: object) -> object:
    """Escape characters of a text that a page cannot show, and that could reverse the text around a name."""
    return printable(value) if isinstance(value, str) else value


def _embed(figure: CaptionedFigure) -> EmbeddedFigure:
    return EmbeddedFigure(figure.caption, base64.b64encode(figure.path.read_bytes()).decode())
