"""Figures of images with findings: reconstructions, score maps, galleries of misses and false alarms."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Bool, Float, Float32
from matplotlib import colormaps, patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from scipy import ndimage

from pulmo_jax.evaluation.detection import label_regions
from pulmo_jax.reporting.figures import TEXT_WIDTH_IN, literal, style
from pulmo_jax.tasks.anomalies.units import NORMALISED, Intensity, scale_bar
from pulmo_jax.types import Window

TRUTH, DETECTED = "#00E5FF", "#FFE600"  # cyan and yellow, distinct from grey and from the inferno colours
BACKGROUND = "0.85"  # colour of pixels without a score
PANEL_WIDTH_IN = TEXT_WIDTH_IN / 4
BAR_HEIGHT_IN = 0.1
MAX_SIDE_PX = 1024  # exceeds the resolution of a panel
DETAIL_PX = 128

# Reduction of a block of pixels when an image is downsampled; small regions and peaks are preserved.
POOL = {
    "image": np.mean,
    "reconstruction": np.mean,
    "score": np.fmax.reduce,
    "truth": np.any,
    "detected": np.any,
}


@dataclass(frozen=True, eq=False)
class Example:
    """An image with its findings.

    Attributes:
        title: Title.
        image: Normalised image, shown from 0 to 1, in colour if C is 3, otherwise as the mean of the bands.
        reconstruction: Normalised reconstruction, if any.
        score: Score map; NaN outside the foreground.
        truth: Ground truth, if known.
        detected: Pixels of the findings.
        image_score: Score of the image.
        threshold: Pixel threshold.
        label: True if abnormal; None: unknown.
        focus: Window shown in detail; None: the largest true region, otherwise the highest score.
        pixel_mm: Height and width of a pixel in mm; None: unknown.
        intensity: Scale of the normalised intensities.
    """

    title: str
    image: Float32[np.ndarray, "H W C"]
    reconstruction: Float32[np.ndarray, "H W C"] | None
    score: Float32[np.ndarray, "H W"]
    truth: Bool[np.ndarray, "H W"] | None
    detected: Bool[np.ndarray, "H W"]
    image_score: float
    threshold: float
    label: bool | None
    focus: Window | None = None
    pixel_mm: tuple[float, float] | None = None
    intensity: Intensity = NORMALISED


@dataclass(frozen=True, eq=False)
class View:
    """An example reduced to figure size, so that many examples fit in memory.

    Attributes:
        whole: The image, downsampled to at most MAX_SIDE_PX.
        detail: A window of it, downsampled likewise.
        window: The window, px.
        whole_step: Downsampling factor of `whole`.
        detail_step: Downsampling factor of `detail`.
    """

    whole: Example
    detail: Example
    window: Window
    whole_step: int
    detail_step: int


def view(example: Example) -> View:
    """Reduce an example to figure size, as a whole and in a detail."""
    window = _detail_window(example)
    whole, whole_step = _shrunk(example)
    detail, detail_step = _shrunk(_cut(example, window))
    return View(whole, detail, window, whole_step, detail_step)


def reconstructions(views: Sequence[View]) -> Figure:
    """Draw images, reconstructions and their differences.

    Args:
        views: Examples; at least one has a reconstruction, others are ignored.

    Returns:
        The figure.
    """
    pairs = [(v, v.whole.reconstruction) for v in views if v.whole.reconstruction is not None]
    intensity = _common_intensity([v for v, _ in pairs])
    span = intensity.high - intensity.low
    differences = [span * _difference(v.whole, reconstruction) for v, reconstruction in pairs]
    limit = _percentile(np.concatenate([np.abs(d).ravel() for d in differences]), 99.5)
    scale = ScalarMappable(Normalize(-limit, limit), colormaps["RdBu_r"].with_extremes(bad=BACKGROUND))
    with style():
        figure, panels, grid = _grid([v for v, _ in pairs], 3)
        for row, (v, reconstruction), difference in zip(panels, pairs, differences, strict=True):
            _show_image(row[0], v.whole.image, v.whole_step, v.whole.pixel_mm)
            _show_image(row[1], reconstruction, v.whole_step, v.whole.pixel_mm)
            _show(row[2], difference, scale)
        names = [literal(v.whole.title) for v, _ in pairs]
        _name(panels, ("image", "reconstruction", "difference"), names)
        _grey_bar(figure, grid[-1, :2], views)
        _bar(figure, grid[-1, 2:], scale, intensity.label("image minus reconstruction"), extend="both")
    return figure


def score_maps(views: Sequence[View], title: str) -> Figure:
    """Draw images and score maps, whole and in detail, with contours of lesions (ground truth) and findings.

    Args:
        views: Examples.
        title: Title of the figure.

    Returns:
        The figure.
    """
    scale = _score_scale(views)
    with style():
        figure, panels, grid = _grid(views, 4, title)
        for row, v in zip(panels, views, strict=True):
            _show_views(row, v, scale)
        _name(panels, ("image", "detail", "score", "score, detail"), [_heading(v.whole) for v in views])
        _grey_bar(figure, grid[-1, :2], views)
        _score_bar(figure, grid[-1, 2:], scale, sorted({v.whole.threshold for v in views}))
        _legend(figure, views)
    return figure


def _heading(example: Example) -> str:
    """Heading of an example: title, class and image score."""
    kind = {True: "abnormal, ", False: "normal, ", None: ""}[example.label]
    return f"{literal(example.title)}: {kind}image score {example.image_score:.3g}"


def _show_views(row: np.ndarray, v: View, scale: ScalarMappable) -> None:
    """Draw one row: image and score map, whole and in detail."""
    _show_part(row[0], row[2], v.whole, v.whole_step, scale, 0.6)
    _show_part(row[1], row[3], v.detail, v.detail_step, scale, 1.0)
    y, x, height, width = (side / v.whole_step for side in v.window)
    for axes in (row[0], row[2]):
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, ec="white", lw=0.6))


def _show_part(
    image_axes: Axes, score_axes: Axes, part: Example, step: int, scale: ScalarMappable, width: float
) -> None:
    """Draw image and score map with contours of lesions (ground truth) and findings."""
    _show_image(image_axes, part.image, step, part.pixel_mm)
    _show(score_axes, part.score, scale)
    for axes in (image_axes, score_axes):
        _contour(axes, part.truth, TRUTH, 1.8 * width)
    _contour(image_axes, part.detected, DETECTED, 0.7 * width)  # narrower than the contour of the truth below it


def _grid(views: Sequence[View], n_columns: int, title: str = "") -> tuple[Figure, np.ndarray, GridSpec]:
    """Grid of panels with the aspect ratios of the images, and a row for colour bars."""
    aspects = [v.whole.score.shape[0] / v.whole.score.shape[1] for v in views]
    height_in = PANEL_WIDTH_IN * sum(aspects) + 0.16 * len(views) + (1.1 if title else 0.75)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0, compress=True)
    figure = Figure(figsize=(n_columns * PANEL_WIDTH_IN, height_in), layout=layout)
    if title:
        figure.suptitle(literal(title))
    grid = figure.add_gridspec(len(views) + 1, n_columns, height_ratios=[*aspects, BAR_HEIGHT_IN / PANEL_WIDTH_IN])
    cells = [[figure.add_subplot(grid[row, column]) for column in range(n_columns)] for row in range(len(views))]
    return figure, np.array(cells), grid


def _name(panels: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Write the names of rows and columns above the panels."""
    for axes, name in zip(panels[0], columns, strict=True):
        axes.set_title(f"\n{name}", fontstyle="italic")
    for i, (axes, name) in enumerate(zip(panels[:, 0], rows, strict=True)):
        above = {"xytext": (0, 15 if i == 0 else 5), "textcoords": "offset points", "annotation_clip": False}
        # Excluded from the layout, because a long name would widen its column; an empty title reserves the space.
        axes.annotate(name, (0, 1), xycoords="axes fraction", **above).set_in_layout(False)
        if i > 0:
            axes.set_title(" ")


def _show(axes: Axes, values: np.ndarray, scale: ScalarMappable) -> None:
    """Draw an array with a colour scale, without axes."""
    axes.imshow(values, norm=cast(Normalize, scale.norm), cmap=scale.cmap)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.autoscale(False)


def _show_image(axes: Axes, image: np.ndarray, step: int, pixel_mm: tuple[float, float] | None) -> None:
    """Draw a normalised image with a scale bar."""
    shown = image if image.shape[2] == 3 else image.mean(axis=2)
    _show(axes, np.clip(shown, 0, 1), ScalarMappable(Normalize(0, 1), "gray"))
    _scale_bar(axes, image.shape[1] * step, None if pixel_mm is None else pixel_mm[1])


def _scale_bar(axes: Axes, width_px: int, pixel_mm: float | None) -> None:
    """Draw a scale bar, in mm where the width of a pixel is known."""
    length, label = scale_bar(width_px, pixel_mm)
    start, effects = 0.04, _outline(1.5)
    line = {"color": "white", "lw": 1.5, "transform": axes.transAxes, "path_effects": _outline(2.5)}
    axes.plot([start, start + length / width_px], [0.05, 0.05], solid_capstyle="butt", **line)
    where = {"transform": axes.transAxes, "path_effects": effects}
    axes.text(start, 0.075, label, color="white", fontsize=6, va="bottom", **where)


def _contour(axes: Axes, mask: np.ndarray | None, colour: str, width: float) -> None:
    """Draw the outline of a mask, if any."""
    if mask is None or not mask.any():
        return
    height_px, width_px = mask.shape
    closed = np.pad(mask, 1).astype(np.float32)  # closes contours at the edge of the image
    x, y = np.arange(-1, width_px + 1), np.arange(-1, height_px + 1)
    lines = axes.contour(x, y, closed, levels=[0.5], colors=colour, linewidths=width)
    lines.set_path_effects(_outline(width + 0.5))


def _outline(width: float) -> list[patheffects.AbstractPathEffect]:
    """Black outline of a line or letter, for contrast on any image."""
    return [patheffects.withStroke(linewidth=width, foreground="black")]


def _bar(figure: Figure, cell: SubplotSpec, scale: ScalarMappable, label: str, extend: str = "neither") -> Axes:
    """Draw a horizontal colour bar."""
    room = figure.add_subplot(cell)
    room.set_axis_off()
    bar = figure.colorbar(
        scale, cax=room.inset_axes((0.1, 0, 0.8, 1)), label=label, orientation="horizontal", extend=extend
    )
    bar.outline.set_visible(False)
    return bar.ax


def _score_bar(figure: Figure, cell: SubplotSpec, scale: ScalarMappable, thresholds: list[float]) -> None:
    """Draw the colour bar of the scores, with marks at the pixel thresholds."""
    marks = ", ".join(f"{threshold:.3g}" for threshold in thresholds)
    bar = _bar(figure, cell, scale, f"anomaly score (▼ pixel threshold: {marks})", extend="max")
    above = bar.get_xaxis_transform()
    bar.plot(thresholds, [1.5] * len(thresholds), "v", color="black", ms=4, clip_on=False, transform=above)


def _grey_bar(figure: Figure, cell: SubplotSpec, views: Sequence[View]) -> None:
    """Draw the grey scale, unless all images are in colour."""
    if any(v.whole.image.shape[2] != 3 for v in views):
        scale = _common_intensity(views)
        _bar(figure, cell, ScalarMappable(Normalize(scale.low, scale.high), "gray"), scale.label("intensity"))


def _common_intensity(views: Sequence[View]) -> Intensity:
    """Intensity scale of the images; that of normalised values if they differ."""
    scales = {v.whole.intensity for v in views}
    return scales.pop() if len(scales) == 1 else NORMALISED


def _legend(figure: Figure, views: Sequence[View]) -> None:
    """Draw the legend of contours, colours and window."""
    lines = {"finding: score above the pixel threshold": DETECTED, "window shown in detail": "white"}
    if any(v.whole.truth is not None and v.whole.truth.any() for v in views):
        lines = {"lesion (ground truth)": TRUTH} | lines
    handles: list[Artist] = [
        Line2D([], [], color=colour, lw=1.5, path_effects=_outline(2.5)) for colour in lines.values()
    ]
    unscored = Rectangle((0, 0), 1, 1, fc=BACKGROUND, ec="none")
    figure.legend([*handles, unscored], [*lines, "not scored"], loc="outside lower center", ncols=4)


def _score_scale(views: Sequence[View]) -> ScalarMappable:
    """Common colour scale, from 0 or the lowest score to three thresholds or the highest scores."""
    scores = np.concatenate([v.whole.score.ravel() for v in views])
    threshold = max(v.whole.threshold for v in views)
    low = min(0.0, _percentile(scores, 0.1), threshold)
    high = max(3 * threshold, _percentile(scores, 99.9))
    return ScalarMappable(Normalize(low, high), colormaps["inferno"].with_extremes(bad=BACKGROUND))


def _percentile(values: np.ndarray, percent: float) -> float:
    """Percentile ignoring NaN; 0 if all values are NaN."""
    kept = values[~np.isnan(values)]
    return float(np.percentile(kept, percent)) if kept.size else 0.0


def _difference(example: Example, reconstruction: np.ndarray) -> Float32[np.ndarray, "H W"]:
    """Image minus reconstruction, mean over bands; NaN where the score is."""
    return np.where(np.isnan(example.score), np.float32(np.nan), (example.image - reconstruction).mean(axis=2))


def _detail_window(example: Example) -> Window:
    """Window about the focus, of twice its size or DETAIL_PX, with the aspect ratio of the image."""
    height_px, width_px = example.score.shape
    box = example.focus or _focus(example)
    least = min(DETAIL_PX / max(height_px, width_px), 0.5)
    share = min(1.0, max(least, 2 * box.height / height_px, 2 * box.width / width_px))
    height, width = math.ceil(share * height_px), math.ceil(share * width_px)
    y = np.clip(box.y + (box.height - height) // 2, 0, height_px - height)
    x = np.clip(box.x + (box.width - width) // 2, 0, width_px - width)
    return Window(int(y), int(x), height, width)


def _focus(example: Example) -> Window:
    """Largest region of the ground truth; without one, the pixel with the highest score."""
    if example.truth is not None and example.truth.any():
        labels, area = label_regions(example.truth)
        rows, columns = ndimage.find_objects(labels)[np.argmax(area[1:])]
        return Window(rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
    peak = np.argmax(np.nan_to_num(example.score, nan=-np.inf))
    y, x = np.unravel_index(peak, example.score.shape)
    return Window(int(y), int(x), 1, 1)


def _arrays(example: Example) -> dict[str, np.ndarray]:
    """Arrays of an example by name, without those that are None."""
    named = {name: getattr(example, name) for name in POOL}
    return {name: array for name, array in named.items() if array is not None}


def _cut(example: Example, window: Window) -> Example:
    """Crop an example to a window."""
    rows, columns = slice(window.y, window.y + window.height), slice(window.x, window.x + window.width)
    parts = {name: array[rows, columns].copy() for name, array in _arrays(example).items()}
    return dataclasses.replace(example, **parts)


def _shrunk(example: Example) -> tuple[Example, int]:
    """Downsample an example to at most MAX_SIDE_PX; return it with the factor."""
    step = math.ceil(max(example.score.shape) / MAX_SIDE_PX)
    if step == 1:
        return example, 1
    pooled = {name: POOL[name](_blocks(a, step), axis=(1, 3)) for name, a in _arrays(example).items()}
    return dataclasses.replace(example, **pooled), step


def _blocks(array: np.ndarray, step: int) -> np.ndarray:
    """Reshape (H, W, ...) to (h, step, w, step, ...), padded with edge values."""
    height, width, *bands = array.shape
    padding = [(0, -height % step), (0, -width % step), *[(0, 0) for _ in bands]]
    padded = np.pad(array, padding, mode="edge")
    return padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step, *bands)


def patch_grid(patches: Float[np.ndarray, "B P P C"], rebuilt: Float[np.ndarray, "B P P C"], step: int) -> Figure:
    """Draw patches above their reconstructions.

    Args:
        patches: Normalised patches.
        rebuilt: Their reconstructions.
        step: Training step, for the title.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.2), layout="constrained")
        figure.suptitle(f"Validation patches, step {step}")
        panels = figure.subplots(2, len(patches), squeeze=False)
        for row, name, images in zip(panels, ("input", "output"), (patches, rebuilt), strict=True):
            row[0].set_ylabel(name)
            for axes, image in zip(row, images, strict=True):
                shown = np.clip(image if image.shape[-1] == 3 else image.mean(axis=-1), 0, 1)
                axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
    return figure
