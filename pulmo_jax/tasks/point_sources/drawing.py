"""Elements shared by the figures of point sources: image panels, colour bars, labels, scale bars."""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pulmo_jax.reporting.figures import TEXT_WIDTH_IN

BACKGROUND = "0.85"  # colour of NaN
MAX_HEIGHT_IN = 8.0
MIN_PANEL_IN, MAX_PANEL_IN = 1.5, 2.9
TICKS_IN = 0.4  # space for tick labels beside an image
LABEL_PT, BESIDE_PT = 6.5, (9.0, 15.0)  # font size of source numbers, and their distances from the source
Number = float | int


def percentile(values: np.ndarray, percent: float) -> float:
    """Percentile of the finite values; 0 if there are none."""
    kept = values[np.isfinite(values)]
    return float(np.percentile(kept, percent)) if kept.size else 0.0


def signed_scale(limit: float) -> ScalarMappable:
    return ScalarMappable(Normalize(-limit, limit), colormaps["RdBu_r"].with_extremes(bad=BACKGROUND))


def image_panels(n_panels: int, aspect: float, rest_in: float) -> tuple[Figure, list[Axes], float]:
    """Figure with images in a row, or in a column if they are wide.

    Args:
        n_panels: Number of images.
        aspect: Height / width of an image.
        rest_in: Height of labels, colour bars and legend, inches.

    Returns:
        Figure, panels, and approximate width of a panel with its labels, inches.
    """
    in_a_row = aspect > 0.4
    n_rows, n_columns = (1, n_panels) if in_a_row else (n_panels, 1)
    widest = min(TEXT_WIDTH_IN / n_columns, MAX_PANEL_IN if in_a_row else TEXT_WIDTH_IN)
    panel_in = min(widest, max((MAX_HEIGHT_IN / n_rows - rest_in) / aspect + TICKS_IN, MIN_PANEL_IN))
    height_in = min(n_rows * ((panel_in - TICKS_IN) * aspect + rest_in), MAX_HEIGHT_IN)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.0, compress=True)
    figure = Figure(figsize=(n_columns * panel_in, height_in), layout=layout)
    return figure, list(figure.subplots(n_rows, n_columns, squeeze=False).flat), panel_in


def label_rows(panels: Sequence[Axes]) -> None:
    """Label the y axis of the leftmost panels only."""
    for axes in panels:
        first = cast(SubplotSpec, axes.get_subplotspec()).is_first_col()
        axes.tick_params(labelleft=first)
        axes.set_ylabel("y (px)" if first else "")


def show_image(axes: Axes, values: np.ndarray, scale: ScalarMappable, **options: Any) -> ScalarMappable:
    image = axes.imshow(values, norm=cast(Normalize, scale.norm), cmap=scale.cmap, **options)
    axes.autoscale(False)
    return image


def add_colour_bar(
    figure: Figure, axes: Axes | Sequence[Axes], image: ScalarMappable, label: str, signed: bool = False
) -> None:
    """Add a colour bar, pointed where values exceed the colours; a signed scale is labelled at both ends."""
    values = np.ma.masked_invalid(cast(np.ndarray, image.get_array())).compressed()
    low, high = image.get_clim()
    rounding = 1e-6 * (high - low)
    below, above = bool((values < low - rounding).any()), bool((values > high + rounding).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    shape: dict[str, Any] = {"aspect": 28, "pad": 0.02} if isinstance(axes, Axes) else {"aspect": 50, "pad": 0.05}
    where: dict[str, Any] = {"location": "bottom", "shrink": 0.85, "extend": extend} | shape
    bar = figure.colorbar(image, ax=axes, label=label, **where)
    if signed:
        bar.set_ticks([low, 0, high], labels=[f"−{high:.3g}", "0", f"{high:.3g}"])
        bar.set_ticks([low / 2, high / 2], minor=True)
    elif isinstance(image.norm, AsinhNorm):  # its default ticks are crowded near 0
        values = [float(f"{value:.2g}") for value in image.norm.inverse(np.linspace(0.02, 0.98, 5))]
        bar.set_ticks(values, labels=[f"{value:g}".replace("-", "−") for value in values])
        bar.minorticks_off()
    cast(Any, bar.outline).set_visible(False)


def write_labels(
    axes: Axes,
    places: Sequence[tuple[float, float]],
    labels: Sequence[str],
    others: Sequence[tuple[Number, Number]],
    size_pt: tuple[float, float],
) -> None:
    """Write labels beside points (x, y) without covering others; the axis limits must be set."""
    white = [patheffects.withStroke(linewidth=1.8, foreground="white")]
    options: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "path_effects": white}
    points = np.reshape([*places, *others], (-1, 2)).astype(float)
    points_pt = (axes.transScale + axes.transLimits).transform(points) * size_pt
    for place, label, offset in zip(places, labels, _label_offsets(points_pt, labels, size_pt), strict=True):
        axes.annotate(label, place, xytext=tuple(offset), fontsize=LABEL_PT, weight="bold", **options)


def _label_offsets(
    points: Float[np.ndarray, "M 2"], labels: Sequence[str], size: tuple[float, float]
) -> Float[np.ndarray, "N 2"]:
    """Offsets of the labels of the first N of M points, away from points, other labels and the edge.

    Args:
        points: Points (x, y) from the lower left corner of the panel. Lengths are in typographic points.
        labels: Labels of the first N points.
        size: Width and height of the panel.

    Returns:
        Offset of each label from its point.
    """
    angles = np.radians(np.arange(45, 405, 45))
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    taken, offsets = points, np.zeros((len(labels), 2))
    for i, label in enumerate(labels):
        longer = np.sign(ring.round(3)) * (LABEL_PT * 0.35 * (len(label) - 1), 0)
        candidates = np.concatenate([distance * ring + longer for distance in BESIDE_PT])
        places = points[i] + candidates
        others = np.delete(taken, i, axis=0)
        apart = np.hypot(*(places[:, None] - others[None]).T).min(axis=0, initial=np.inf)
        room = np.minimum(places, np.array(size) - places).min(axis=1)
        # Beyond some distance all candidates are equally good; the first one is used.
        best = np.argmax(np.minimum(apart, 1.8 * LABEL_PT) + 4 * np.minimum(room - LABEL_PT, 0))
        offsets[i] = candidates[best]
        taken = np.concatenate([taken, places[best : best + 1]])
    return offsets


def add_scale_bar(axes: Axes, pixel_scale: Number | None, marks: Sequence[tuple[float, float]]) -> None:
    """Draw a scale bar in the corner farthest from the marks (y, x)."""
    width, height = (abs(high - low) for low, high in (axes.get_xlim(), axes.get_ylim()))
    scale, unit = (1, "px") if pixel_scale is None else (pixel_scale, "arcsec")
    length = _round_length(width * scale / 3.5)
    share = length / scale / width
    middles = [(x, y) for y in (0.05, 0.9) for x in (0.05 + share / 2, 0.95 - share / 2)]
    at = np.array([(x / width, y / height) for y, x in marks]).reshape(-1, 2)
    apart = [np.hypot(*(at - middle).T).min(initial=np.inf) for middle in middles]
    x, y = middles[int(np.argmax(np.minimum(apart, 0.35)))]
    white = [patheffects.withStroke(linewidth=3, foreground="white")]
    line: dict[str, Any] = {"color": "black", "lw": 1.5, "solid_capstyle": "butt", "transform": axes.transAxes}
    axes.plot([x - share / 2, x + share / 2], [y, y], **line, path_effects=white)
    above: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 6}
    axes.annotate(f"{length:g} {unit}", (x, y), xycoords="axes fraction", **above, path_effects=white)


def _round_length(longest: float) -> float:
    """Largest length 1, 2 or 5 times a power of ten up to a maximum."""
    power = 10.0 ** math.floor(math.log10(longest))
    return power * max(digit for digit in (1, 2, 5) if digit * power <= longest * (1 + 1e-9))


def add_arcsec_axis(axes: Axes, pixel_scale: Number | None) -> None:
    """Add an axis in arcsec above the panel."""
    if pixel_scale is not None:
        both_ways = (lambda px: np.multiply(px, pixel_scale), lambda arcsec: np.divide(arcsec, pixel_scale))
        above = axes.secondary_xaxis("top", functions=both_ways)
        above.set_xlabel("separation (arcsec)")
