"""The HTML report: one self-contained file with figures, captions and tables."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from pulmo_jax.host.files import write_text
from pulmo_jax.reporting.tables import Table

TEMPLATE = Path(__file__).with_name("report.html.j2")
CAPTIONS = {
    "sweep": "The jobs by what was swept: dots are jobs, lines means over seeds, bars one standard deviation over them",
    "loss_curves": "Training and validation loss by step",
    "time_shares": "Where the time of this training went",
    "profile": "Time of a training step by kind of operation, traced",
    "calibration": "Scores of the normal validation images, and the image threshold set on them",
    "validation_score_maps": "Normal images that the model was not trained on, and their scores",
    "validation_reconstructions": "The same with what the model makes of them",
    "roc_pr_images": "How image scores separate abnormal from normal images",
    "roc_pr_pixels": "How pixel scores separate findings from normal tissue",
    "scores_images": "Image scores of both classes, and the threshold",
    "scores_pixels": "Pixel scores of both classes, and the threshold",
    "false_alarms_pixels": "False alarms among normal test pixels against the rate that calibration promises",
    "score_maps_hits": "Abnormal images with the highest scores",
    "score_maps_misses": "Abnormal images with the lowest scores",
    "score_maps_false_alarms": "Normal images with the highest scores",
    "detection_maps": "Signal-to-noise ratio and flux of a point source at every pixel, with what was found",
    "spectra": "Flux of every source by wavelength, with its errors",
    "null_distribution": "The empirical null against the normal distribution that theory has",
    "null_by_radius": "Its spread by separation",
    "contrast_curve": "The faintest source that is found, by separation, and what is left of an injected one",
    "combined_maps": "All epochs together, by where the source stood at the first date",
    "snr_by_epoch": "What each epoch says along the track, and all of them",
    "epoch_maps": "The maps of the epochs, and where the track is in them",
    "null_maxima": "The highest criterion in fields of noise, and the threshold",
    "frames": "Frames of the stack, and where the first source stands in them",
    "reconstructions": "What the model holds to be the normal version of each image, and the difference",
}


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure of the report and its caption.

    Attributes:
        path: PNG file; the PDF of the same name lies beside it.
        caption: What the figure shows, how many images or sources it is based on, and what to look for. Plain text.

    Raises:
        ValueError: If the caption is blank.
    """

    path: Path
    caption: str

    def __post_init__(self) -> None:
        if not self.caption.strip():
            raise ValueError(f"{self.path.name}: a figure of a report needs a caption")


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
    figures: Sequence[Path | CaptionedFigure] = ()
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
) -> None:
    """Write the report as a single HTML file that loads nothing; the file is replaced atomically.

    Args:
        path: Output file.
        title: Page title.
        summary: Facts of the run by name, shown below the title.
        sections: Sections in order; empty ones are omitted.
        citations: References that users of the run should cite.
        warnings: Messages shown above everything else. All text is HTML-escaped.

    Raises:
        FileNotFoundError: If a figure does not exist; an existing report is then left as it is.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    nonempty = [s for s in sections if s.text or s.figures or s.tables]
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        summary=summary,
        sections=[(section, [_embed(figure) for figure in section.figures]) for section in nonempty],
        citations=citations,
        warnings=warnings,
    )
    write_text(path, page)


def _embed(figure: Path | CaptionedFigure) -> EmbeddedFigure:
    if isinstance(figure, Path):
        figure = CaptionedFigure(figure, CAPTIONS.get(figure.stem, figure.stem.replace("_", " ")))
    return EmbeddedFigure(figure.caption, base64.b64encode(figure.path.read_bytes()).decode())
