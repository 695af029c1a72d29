"""Figures are drawn where a test looks at them: drawing takes half of the time of a report."""

from typing import Any

from matplotlib.figure import Figure
from PIL import Image

_draw = Figure.savefig


def _save_small_picture(figure: Figure, file: Any, *, format: str, **options: Any) -> None:
    Image.new("RGB", (8, 8)).save(file, format)


def draw_figures(draw: bool) -> None:
    """Draw figures from here on, or write a small picture into each of their files."""
    Figure.savefig = _draw if draw else _save_small_picture
