"""Elements of figures of point sources: their lines and words, and a check that no word covers another."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from pulmo_jax.reporting import figures
from pulmo_jax.types import PointSource


def point_source(
    label: int = 1, y: float = 20.2, x: float = 60.3, centre: tuple[float, float] = (30.0, 35.5), **fields: Any
) -> PointSource:
    """A detected source of flux 10 with a likelihood error of 1 and an empirical one of 2.5, other values by name."""
    found = PointSource(
        label=label, y=y, x=x, y_std=0.1, x_std=0.2, separation_px=math.hypot(y - centre[0], x - centre[1]),
        separation_px_std=0.15, position_angle_deg=30.0, position_angle_deg_std=0.4, snr=8.0, snr_debiased=10.0,
        snr_calibrated=7.0, flux=5.0, flux_std=0.6, flux_debiased=10.0, flux_debiased_std=1.0,
        flux_debiased_std_empirical=2.5, flux_corrected=10.0, flux_corrected_std=2.5, near_threshold=False,
        false_alarm_probability=1e-6,
    )  # fmt: skip
    return replace(found, **fields)


def texts(figure: Figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(Text))


def line(axes: Axes, label: str) -> Line2D:
    return next(drawn for drawn in axes.lines if str(drawn.get_label()).startswith(label))


def points(axes: Axes, marker: str) -> list[tuple[float, ...]]:
    drawn = [artist for artist in axes.lines if artist.get_marker() == marker]
    return [tuple(point) for artist in drawn for point in np.asarray(artist.get_xydata())]


def assert_words_apart(figure: Figure) -> None:
    """Draws the figure, and looks at where its words came to stand: apart from each other, and on the page."""
    canvas = FigureCanvasAgg(figure)
    with figures.style():
        canvas.draw()
        all_axes = [*figure.axes, *(child for axes in figure.axes for child in axes.child_axes)]
        ticks = [axis for axes in all_axes for axis in (axes.xaxis, axes.yaxis)]
        # An axis keeps ticks that lie beyond its limits, and does not draw them.
        kept = {id(text) for axis in ticks for text in axis.get_ticklabels(which="both")}
        drawn = {id(text) for axis in ticks for tick in axis._update_ticks() for text in (tick.label1, tick.label2)}
        words = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        words = [text for text in words if id(text) in drawn or id(text) not in kept]
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in words]
    assert len(boxes) > 5
    page = figure.bbox
    for text, box in boxes:
        assert box.x0 > page.x0 - 1, text
        assert box.x1 < page.x1 + 1, text
        assert box.y0 > page.y0 - 1, text
        assert box.y1 < page.y1 + 1, text
    for (text, box), (other_text, other) in itertools.combinations(boxes, 2):
        inner = (min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0))
        assert min(inner) < 1, f"{text} lies on {other_text}"
