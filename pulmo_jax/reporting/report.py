"""report.html: one file with everything to look at, to keep, to mail."""

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
    write_text(path, page)


def embed(figure: Path) -> Picture:
    return Picture(
        CAPTIONS.get(figure.stem, figure.stem.replace("_", " ")), base64.b64encode(figure.read_bytes()).decode()
    )
