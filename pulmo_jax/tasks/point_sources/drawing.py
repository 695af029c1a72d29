"""Elements shared by the figures of point sources: image panels, sky axes, compass, colour bars, labels."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, ScaledTranslation

from pulmo_jax.inference.point_sources import NORTH_DEG
from pulmo_jax.reporting.figures import TEXT_WIDTH_IN

THEORETICAL = r"theoretical SNR $b/\sqrt{a}$"  # names of the two SNRs in legends
CALIBRATED = "calibrated (empirical null, Student t)"
BACKGROUND = "0.85"  # colour of NaN
MAX_HEIGHT_IN = 8.0
MIN_PANEL_IN, MAX_PANEL_IN = 1.5, 2.9
TICKS_IN = 0.4  # space for tick labels beside an image
LABEL_PT, BESIDE_PT = 6.5, (9.0, 15.0)  # font size of source numbers, and their distances from the source
COMPASS_PT, COMPASS_LABEL_PT, COMPASS_MARGIN_PT = 15.0, 21.0, 6.0  # arrows, distance of the letters, from the edge
NORTH_UP_DEG = 0.05  # largest rotation at which the axes of a map are labelled as right ascension and declination
Number = float | int


class Sky(NamedTuple):
    """Orientation and scale of a map.

    Attributes:
        centre: Position (y, x) of the star, px.
        pixel_scale: Pixel scale, arcsec per pixel; None if unknown.
        north_deg: Direction of north, degrees from the x axis toward y. East is 90 degrees counter-clockwise of north.
    """

    centre: tuple[Number, Number]
    pixel_scale: Number | None = None
    north_deg: Number = NORTH_DEG

    @property
    def north_up(self) -> bool:
        return abs((self.north_deg - 90 + 180) % 360 - 180) < NORTH_UP_DEG


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


def label_map_axes(panels: Sequence[Axes], sky: Sky, most_ticks: int = 7) -> None:
    """Label the axes of maps: offsets from the star in arcsec where the pixel scale is known, otherwise pixels.

    The offsets are right ascension (times cos declination, increasing to the left) and declination if north is up, and
    along x and y otherwise. The y axis of the leftmost panels only is labelled.

    Args:
        panels: Panels with the limits of their images, px.
        sky: Orientation and scale of the maps.
        most_ticks: Largest number of ticks on the longer axis, approximately.
    """
    x_name, y_name, x_sign = ("ΔRA", "ΔDec", -1) if sky.north_up else ("Δx", "Δy", 1)
    for axes in panels:
        if sky.pixel_scale is None:
            axes.set(xlabel="x (px)", ylabel="y (px)")
        else:
            axes.set(xlabel=f"{x_name} (arcsec)", ylabel=f"{y_name} (arcsec)")
            ends = axes.get_xlim(), axes.get_ylim()
            longest = max(abs(high - low) for low, high in ends)
            for axis, limits, middle, sign in zip(
                (axes.xaxis, axes.yaxis), ends, sky.centre[::-1], (x_sign, 1), strict=True
            ):
                n = max(2, round(most_ticks * abs(limits[1] - limits[0]) / longest))
                _offset_ticks(axis, limits, middle, sign / sky.pixel_scale, n)
        first = cast(SubplotSpec, axes.get_subplotspec()).is_first_col()
        axes.tick_params(labelleft=first)
        axes.set_ylabel(axes.get_ylabel() if first else "")


def _offset_ticks(axis: Axis, limits: tuple[float, float], middle: Number, px_per_arcsec: float, n: int) -> None:
    """Set ticks at round offsets from the star; a negative scale is an axis that increases to the left."""
    low, high = sorted((end - middle) / px_per_arcsec for end in limits)
    offsets = np.round(MaxNLocator(n, steps=[1, 2, 5, 10]).tick_values(low, high), 9) + 0.0  # no -0
    offsets = offsets[(offsets >= low) & (offsets <= high)]
    labels = [f"{offset:g}".replace("-", "−") for offset in offsets]
    axis.set_ticks(list(middle + offsets * px_per_arcsec), labels=labels)


def add_compass(axes: Axes, sky: Sky, marks: Sequence[tuple[Number, Number]]) -> None:
    """Draw arrows toward north and east in the corner farthest from the marks (y, x).

    Args:
        axes: Panel with the limits of its image, px, and equal aspect.
        sky: Orientation of the map.
        marks: Positions (y, x) to be kept free, px.
    """
    angles = np.deg2rad([sky.north_deg, sky.north_deg + 90])
    ways = np.stack([np.cos(angles), np.sin(angles)], 1)
    corner = np.array(_emptiest_corner(axes, marks))
    reach = np.concatenate([np.zeros((1, 2)), COMPASS_LABEL_PT * ways])
    inward = np.where(corner == 0, COMPASS_MARGIN_PT - reach.min(0), -COMPASS_MARGIN_PT - reach.max(0))
    in_points = Affine2D().scale(1 / 72) + cast(Figure, axes.figure).dpi_scale_trans
    place = in_points + ScaledTranslation(corner[0], corner[1], cast(Any, axes.transAxes))
    white = [patheffects.withStroke(linewidth=2.2, foreground="white")]
    arrow: dict[str, Any] = {"arrowstyle": "-|>,head_width=0.15,head_length=0.3", "lw": 0.9, "color": "black"}
    for letter, way in zip("NE", ways, strict=True):
        tip = tuple(inward + COMPASS_PT * way)
        line = axes.annotate(
            "", tip, tuple(inward), xycoords=place, textcoords=place,
            arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0, "path_effects": white},
        )  # fmt: skip
        text = axes.annotate(
            letter, tuple(inward + COMPASS_LABEL_PT * way), xycoords=place, ha="center", va="center",
            fontsize=LABEL_PT, path_effects=white,
        )  # fmt: skip
        for artist in (line, text):
            artist.set_in_layout(False)  # the layout would measure the arrows before the panel has its place


def _emptiest_corner(axes: Axes, marks: Sequence[tuple[Number, Number]]) -> tuple[int, int]:
    """Corner (x, y) of the panel, each 0 or 1, that is farthest from the marks (y, x); lower left for no marks."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    at = np.array([((x - left) / (right - left), (y - bottom) / (top - bottom)) for y, x in marks]).reshape(-1, 2)
    corners = [(x, y) for y in (0, 1) for x in (0, 1)]
    apart = [np.hypot(*(at - corner).T).min(initial=np.inf) for corner in corners]
    return corners[int(np.argmax(np.minimum(apart, 0.35)))]


def show_image(axes: Axes, values: np.ndarray, scale: ScalarMappable, **options: Any) -> ScalarMappable:
    options = {"interpolation": "nearest"} | options  # the default smooths enlarged maps
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
        bar.set_ticks([low, 0, high], labels=[number(low), "0", number(high)])
        bar.set_ticks([low / 2, high / 2], minor=True)
    elif isinstance(image.norm, AsinhNorm):  # its default ticks are crowded near 0
        values = [float(f"{value:.2g}") for value in image.norm.inverse(np.linspace(0.02, 0.98, 5))]
        bar.set_ticks(values, labels=[number(value) for value in values])
        bar.minorticks_off()
    cast(Any, bar.outline).set_visible(False)


def number(value: float) -> str:
    """A number with up to three digits, as text for matplotlib; with a power of ten if it is very small or large."""
    mantissa, _, power = f"{float(f'{value:.3g}'):g}".partition("e")
    return rf"${mantissa}\times 10^{{{int(power)}}}$" if power else mantissa.replace("-", "−")


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


def add_arcsec_axis(axes: Axes, pixel_scale: Number | None) -> None:
    """Add an axis in arcsec above the panel."""
    if pixel_scale is not None:
        both_ways = (lambda px: np.multiply(px, pixel_scale), lambda arcsec: np.divide(arcsec, pixel_scale))
        above = axes.secondary_xaxis("top", functions=both_ways)
        above.set_xlabel("separation (arcsec)")
