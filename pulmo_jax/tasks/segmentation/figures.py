"""Figures of segmentations: contours of truth and prediction, Dice by size and threshold, reliability of pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from matplotlib import colormaps, patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from scipy import ndimage

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.reporting.figures import (
    BLUE,
    COLUMN_WIDTH_IN,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    TEXT_WIDTH_IN,
    VERMILLION,
    literal,
    log_axis,
    style,
)
from pulmo_jax.types import Window

TRUTH, PREDICTED = "#00E5FF", "#FFE600"  # of a single class: cyan and yellow, distinct from grey
PALETTE = (SKY, ORANGE, GREEN, PURPLE, "#F0E442", VERMILLION, BLUE)  # Okabe & Ito, bright colours first
COLUMNS = 3  # panels of an example
PANEL_WIDTH_IN = TEXT_WIDTH_IN / COLUMNS
MAX_SIDE_PX = 1024  # exceeds the resolution of a panel
DETAIL_PX = 64  # least size of the detail
MANY_REGIONS = 400  # a mask with more regions is drawn as a coloured layer: labels of scattered pixels have no contours
SHADE = 0.55  # opacity of the layer on unlabelled pixels
MANY_CLASSES = 12  # in a legend
MANY_FALSE = 10  # false components per image above which their axis is logarithmic from 1


@dataclass(frozen=True, eq=False)
class Example:
    """An image with true and predicted classes.

    Attributes:
        title: Heading, such as the file name and the Dice of each class.
        image: Normalised image, shown from 0 to 1, in colour if C is 3, otherwise as the mean of the bands.
        truth: Labelled pixels inside each class.
        predicted: Pixels assigned to each class.
        labelled: Labelled pixels.
    """

    title: str
    image: Float32[np.ndarray, "H W C"]
    truth: Bool[np.ndarray, "H W K"]
    predicted: Bool[np.ndarray, "H W K"]
    labelled: Bool[np.ndarray, "H W"]


@dataclass(frozen=True, eq=False)
class View:
    """An example reduced to figure size, so that many examples fit in memory.

    Attributes:
        whole: The image, downsampled to at most MAX_SIDE_PX.
        detail: A window of it, downsampled likewise.
        window: The window in px of `whole`.
    """

    whole: Example
    detail: Example
    window: Float[np.ndarray, "4"]


def view(example: Example) -> View:
    """Reduce an example to figure size, as a whole and in a detail where truth and prediction differ most."""
    y, x, height, width = window = detail_window(example)
    rows, columns = slice(y, y + height), slice(x, x + width)
    masks = {name: getattr(example, name)[rows, columns].copy() for name in ("image", "truth", "predicted", "labelled")}
    whole, step = _shrunk(example)
    return View(whole, _shrunk(replace(example, **masks))[0], np.array(window, float) / step)


def detail_window(example: Example) -> Window:
    """Window of a quarter of the image's height and width where truth and prediction differ most.

    Differing pixels of class k weigh 1/(|T_k| + |P_k|): their sum over the image is 1 - Dice, so that every class
    counts alike. Where nothing differs, the window shows most pixels of the classes.

    Args:
        example: The example.

    Returns:
        The window, px.
    """
    shape = np.array(example.labelled.shape)
    size = np.ceil(shape * min(1.0, max(0.25, DETAIL_PX / shape.max()))).astype(int)
    truth, predicted = example.truth, example.predicted & example.labelled[..., None]
    total = truth.sum((0, 1)) + predicted.sum((0, 1))
    differing = truth != predicted
    shown = differing if differing.any() else truth | predicted
    weight = (shown @ (1 / np.maximum(total, 1))).astype(np.float32)
    density = ndimage.uniform_filter(weight, size.tolist(), mode="constant")
    centre = np.unravel_index(np.argmax(density), density.shape)
    top, left = np.clip(centre - size // 2, 0, shape - size).tolist()
    return Window(top, left, *size.tolist())


def _shrunk(example: Example) -> tuple[Example, int]:
    """Downsample an example to at most MAX_SIDE_PX; return it with the factor. Small regions are preserved."""
    step = math.ceil(max(example.labelled.shape) / MAX_SIDE_PX)
    if step == 1:
        return example, 1
    image = _blocks(example.image, step).mean((1, 3))
    masks = {name: _blocks(getattr(example, name), step).any((1, 3)) for name in ("truth", "predicted", "labelled")}
    return replace(example, image=image, **masks), step


def _blocks(array: np.ndarray, step: int) -> np.ndarray:
    """Reshape (H, W, ...) to (h, step, w, step, ...), padded with edge values."""
    height, width, *bands = array.shape
    padded = np.pad(array, [(0, -height % step), (0, -width % step), *[(0, 0) for _ in bands]], mode="edge")
    return padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step, *bands)


def class_colours(count: int) -> list[str]:
    """Colours of classes, distinct on grey images: those of Okabe and Ito, and further hues for many classes.

    Args:
        count: Number of classes.

    Returns:
        Colours as #rrggbb.
    """
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return [to_hex(colour) for colour in colormaps["hsv"](np.linspace(0, 1, count, endpoint=False))]


def contours(views: Sequence[View], names: Sequence[str], title: str) -> Figure:
    """Draw images with the contours of the true and the predicted classes, whole and in detail.

    Args:
        views: Examples.
        names: Names of the classes.
        title: Title of the figure.

    Returns:
        The figure.
    """
    aspects = [v.whole.labelled.shape[0] / v.whole.labelled.shape[1] for v in views]
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0, compress=True)
    height_in = PANEL_WIDTH_IN * sum(aspects) + 0.18 * len(views) + 0.75
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, height_in), layout=layout)
        figure.suptitle(literal(title, 100))
        panels = figure.subplots(len(views), COLUMNS, squeeze=False, height_ratios=aspects)
        for row, v in zip(panels, views, strict=True):
            _show(row[0], v.whole.image)
            _show_classes(row[1], v.whole, 0.7)
            _show_classes(row[2], v.detail, 1.0, closed=False)
            y, x, height, width = v.window
            row[1].add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, ec="white", lw=0.6))
        _name(panels, ("image", "truth and prediction", "detail"), [literal(v.whole.title, 150) for v in views])
        _legend(figure, views, names)
    return figure


def _show(axes: Axes, image: np.ndarray) -> None:
    """Draw a normalised image without axes."""
    shown = image if image.shape[2] == 3 else image.mean(axis=2)
    axes.imshow(np.clip(shown, 0, 1), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.autoscale(False)


def _show_classes(axes: Axes, example: Example, width: float, *, closed: bool = True) -> None:
    """Draw an image with shaded unlabelled pixels and the contours of all classes, those of the truth below.

    Contours of a part of an image end at its edge; those of a whole image are closed there.
    """
    _show(axes, example.image)
    if not example.labelled.all():
        axes.imshow(_layer(~example.labelled, "black", SHADE))
    for k, (truth, predicted) in enumerate(_looks(example.truth.shape[2])):
        _draw_mask(axes, example.truth[..., k], closed, linewidths=1.7 * width, **truth)
        _draw_mask(axes, example.predicted[..., k], closed, linewidths=1.1 * width, **predicted)


def _looks(count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Lines of truth and prediction: two colours for a single class, solid and dashed lines for several."""
    if count == 1:
        return [({"colors": TRUTH}, {"colors": PREDICTED})]
    dashed = {"linestyles": [(0, (3, 1.5))]}
    return [({"colors": colour}, {"colors": colour} | dashed) for colour in class_colours(count)]


def _draw_mask(axes: Axes, mask: np.ndarray, closed: bool, colors: str, **look: Any) -> None:
    """Draw the outline of a mask, or a layer of its colour if it has many regions."""
    if not mask.any():
        return
    if cast(tuple[Any, int], ndimage.label(mask))[1] > MANY_REGIONS:
        axes.imshow(_layer(mask, colors, 0.6))
        return
    height_px, width_px = mask.shape
    padded = np.pad(mask, 1, mode="constant" if closed else "edge").astype(np.float32)
    if padded.all():
        return
    x, y = np.arange(-1, width_px + 1), np.arange(-1, height_px + 1)
    lines = axes.contour(x, y, padded, levels=[0.5], colors=colors, **look)
    lines.set_path_effects(_halo(look["linewidths"] + 0.5))


def _layer(mask: np.ndarray, colour: str, opacity: float) -> UInt8[np.ndarray, "H W 4"]:
    """A colour on the pixels of a mask."""
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = [round(255 * value) for value in (*to_rgb(colour), opacity)]
    return layer


def _halo(width: float) -> list[patheffects.AbstractPathEffect]:
    """Black outline of a line, for contrast on any image."""
    return [patheffects.withStroke(linewidth=width, foreground="black")]


def _name(panels: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Write the names of rows and columns above the panels."""
    for axes, name in zip(panels[0], columns, strict=True):
        axes.set_title(f"\n{name}", fontstyle="italic")
    for i, (axes, name) in enumerate(zip(panels[:, 0], rows, strict=True)):
        above = {"xytext": (0, 15 if i == 0 else 4), "textcoords": "offset points", "annotation_clip": False}
        # Excluded from the layout, because a long name would widen its column; an empty title reserves the space.
        axes.annotate(name, (0, 1), xycoords="axes fraction", fontsize=6.5, **above).set_in_layout(False)
        if i > 0:
            axes.set_title(" ")


def _legend(figure: Figure, views: Sequence[View], names: Sequence[str]) -> None:
    """Draw the legend of contours, window and unlabelled pixels; classes that no image shows are omitted."""
    window = Line2D([], [], color="white", lw=1, path_effects=_halo(2)), "window shown in detail"
    handles: list[tuple[Artist, str]] = []
    if len(names) == 1:
        for colour, kind in ((TRUTH, "ground truth"), (PREDICTED, "prediction")):
            line = Line2D([], [], color=colour, lw=1.5, path_effects=_halo(2.3))
            handles.append((line, f"{literal(names[0], 30)}: {kind}"))
    else:
        shown = [np.any([(v.whole.truth | v.whole.predicted)[..., k].any() for v in views]) for k in range(len(names))]
        lines = [
            (Line2D([], [], color=colour, lw=1.5, path_effects=_halo(2.3)), f"{literal(name, 30)}: ground truth")
            for colour, name, used in zip(class_colours(len(names)), names, shown, strict=True)
            if used
        ]
        handles += lines[:MANY_CLASSES]
        dashed = Line2D([], [], color="white", lw=1.2, ls=(0, (3, 1.5)), path_effects=_halo(2.2))
        handles.append((dashed, "prediction"))
    handles.append(window)
    if not all(v.whole.labelled.all() for v in views):
        handles.append((Rectangle((0, 0), 1, 1, fc="0.3", ec="none"), "unlabelled"))
    columns = 4 if max(len(label) for _, label in handles) < 26 else 3
    figure.legend(*zip(*handles, strict=True), loc="outside lower center", ncols=columns, handlelength=2.6)


def dice_by_size(
    area_px: Float[np.ndarray, "N K"], dice: Float[np.ndarray, "N K"], names: Sequence[str], unit: str = "px"
) -> Figure:
    """Dice of each image against the true area of the class, one panel for each class.

    Args:
        area_px: True area of each class in each image.
        dice: Dice; NaN where the class is neither true nor predicted.
        names: Names of the classes.
        unit: Unit of the areas.

    Returns:
        The figure.
    """
    with style():
        figure, panels = _panels(len(names), 1.9)
        for axes, name, area, value in zip(panels, names, area_px.T, dice.T, strict=False):
            defined = np.isfinite(value)
            known, without = defined & (area > 0), int((defined & (area == 0)).sum())
            mean = float(value[defined].mean()) if defined.any() else None
            axes.plot(area[known], value[known], "o", color=BLUE, ms=3, alpha=0.7, mec="none", clip_on=False)
            if known.any():
                log_axis(axes.xaxis, 0.8 * float(area[known].min()), 1.2 * float(area[known].max()), small=True)
            if mean is not None:
                axes.axhline(mean, color="0.4", lw=0.8, ls="--")
            heading = f"{literal(name, 30)}: " + ("in no image" if mean is None else f"mean {mean:.3f}")
            heading += f"\n{without} image{'s' * (without > 1)} with false pixels only" if without else ""
            axes.set(title=heading, xlabel=f"true area / {unit}", ylim=(0, 1.02))
        panels[0].set_ylabel("Dice of an image")
    return figure


def _panels(count: int, height_in: float) -> tuple[Figure, list[Axes]]:
    """Figure with a panel for each class, in rows of COLUMNS."""
    rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
    width = COLUMN_WIDTH_IN if columns == 1 else PANEL_WIDTH_IN * columns
    figure = Figure(figsize=(width, height_in * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.remove()
    return figure, list(panels[:count])


@dataclass(frozen=True, eq=False)
class Reliable:
    """Reliability of the probabilities of a class.

    Attributes:
        name: Name of the class.
        predicted: Mean probability in each bin; NaN in empty bins.
        observed: Fraction of its pixels that belong to the class.
        low: Lower limit of the 95 % interval; NaN if unknown.
        high: Upper limit.
        count: Number of pixels in each bin.
        ece: Expected calibration error.
    """

    name: str
    predicted: Float[np.ndarray, "B"]
    observed: Float[np.ndarray, "B"]
    low: Float[np.ndarray, "B"]
    high: Float[np.ndarray, "B"]
    count: Float[np.ndarray, "B"]
    ece: float


def reliability(classes: Sequence[Reliable]) -> Figure:
    """Observed fraction of pixels against their predicted probability, and the number of pixels, for each class.

    Args:
        classes: Reliability of each class, in bins of equal width from 0 to 1.

    Returns:
        The figure.
    """
    rows, columns = -(-len(classes) // COLUMNS), min(len(classes), COLUMNS)
    with style():
        width = COLUMN_WIDTH_IN if columns == 1 else PANEL_WIDTH_IN * columns
        figure = Figure(figsize=(width, (3.6 if columns == 1 else 2.9) * rows + 0.3), layout="constrained")
        panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[4, 1] * rows)
        for i in range(rows * columns):
            upper, lower = panels[2 * (i // columns), i % columns], panels[2 * (i // columns) + 1, i % columns]
            if i >= len(classes):
                upper.remove()
                lower.remove()
                continue
            _draw_reliability(upper, lower, classes[i])
        panels[0, 0].set_ylabel("fraction of pixels in the class")
        panels[1, 0].set_ylabel("pixels")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2 if columns == 1 else 4)
    return figure


def _draw_reliability(upper: Axes, lower: Axes, found: Reliable) -> None:
    """Draw the reliability of a class above the number of pixels."""
    known = found.count > 0
    upper.plot([0, 1], [0, 1], color="0.4", lw=0.8, ls="--", label="perfectly calibrated")
    x, y, low, high = (values[known] for values in (found.predicted, found.observed, found.low, found.high))
    upper.fill_between(x, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
    upper.plot(x, y, color=BLUE, marker="o", ms=3, lw=1, label="calibrated", clip_on=False)
    upper.set(xlim=(0, 1), ylim=(0, 1), title=f"{literal(found.name, 30)}, ECE {found.ece:.2g}")
    upper.tick_params(labelbottom=False)
    lower.stairs(found.count, np.linspace(0, 1, found.count.size + 1), color=BLUE, fill=True, alpha=0.35)
    lower.set(xlim=(0, 1), xlabel="predicted probability", yscale="log", ylim=(0.8, 2 * max(found.count.max(), 1)))


@dataclass(frozen=True, eq=False)
class ThresholdCurve:
    """Mean Dice of a class against the threshold.

    Attributes:
        name: Name of the class.
        threshold: Thresholds of the probability.
        dice: Mean Dice at each; NaN if undefined.
        low: Lower limit of the 95 % interval; NaN if unknown.
        high: Upper limit.
        chosen: Threshold of the run.
        interval: 95 % interval of the chosen threshold, or its range over several folds, if known.
        validation: Mean Dice of the validation images, if known.
    """

    name: str
    threshold: Float[np.ndarray, "T"]
    dice: Float[np.ndarray, "T"]
    low: Float[np.ndarray, "T"]
    high: Float[np.ndarray, "T"]
    chosen: float
    interval: tuple[float, float] | None = None
    validation: Float[np.ndarray, "T"] | None = None


def dice_by_threshold(curves: Sequence[ThresholdCurve]) -> Figure:
    """Mean Dice against the threshold, with the threshold of the run, one panel for each class.

    Args:
        curves: Curves of the classes.

    Returns:
        The figure.
    """
    with style():
        figure, panels = _panels(len(curves), 1.9)
        for axes, curve in zip(panels, curves, strict=True):
            axes.fill_between(
                curve.threshold, curve.low, curve.high, color=BLUE, alpha=0.2, lw=0, label="95 % interval"
            )
            axes.plot(curve.threshold, curve.dice, color=BLUE, label="these images")
            if curve.validation is not None:
                axes.plot(curve.threshold, curve.validation, color=VERMILLION, lw=0.9, ls="--", label="validation")
            axes.axvline(curve.chosen, color="black", lw=0.9, ls="--", label="threshold of the run")
            if curve.interval is not None:
                axes.axvspan(*curve.interval, color="0.5", alpha=0.25, lw=0, label="its interval or range")
            axes.set(title=f"{literal(curve.name, 30)}: {curve.chosen:.2f}", xlim=(0, 1), ylim=(0, 1.02))
            axes.set_xlabel("threshold of the probability")
        panels[0].set_ylabel("mean Dice")
        columns = (2, 3, 5)[min(len(curves), COLUMNS) - 1]
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=columns)
    return figure


@dataclass(frozen=True, eq=False)
class Components:
    """Recall of components against false components per image, as the threshold of their probability varies.

    Attributes:
        name: Name of the class.
        false_per_image: Mean number of false components per image.
        recall: Fraction of the true components that are found; NaN if there are none.
        point: (false components per image, recall) at the threshold of the run.
    """

    name: str
    false_per_image: Float[np.ndarray, "T"]
    recall: Float[np.ndarray, "T"]
    point: tuple[float, float] | None = None


def free_response(curves: Sequence[Components]) -> Figure:
    """Free-response curves (FROC): recall of components against false components per image.

    Args:
        curves: Curves of the classes.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH_IN * 1.2, 2.9), layout="constrained")
        axes = figure.subplots()
        highest = max((float(np.nanmax(c.false_per_image, initial=0)) for c in curves), default=0)
        colours = [BLUE] if len(curves) == 1 else class_colours(len(curves))
        for curve, colour in zip(curves, colours, strict=True):
            axes.plot(curve.false_per_image, curve.recall, color=colour, lw=1.3, label=literal(curve.name, 30))
            if curve.point is not None:
                axes.plot(*curve.point, "o", color=colour, ms=5, mec="white", clip_on=False, zorder=5)
        if highest > MANY_FALSE:
            axes.set_xscale("symlog", linthresh=1)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set(ylim=(0, 1.02), xlim=(0, max(1.05 * highest, 0.1)))
        axes.set(xlabel="false components per image", ylabel="fraction of true components found")
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def validation_gallery(
    images: Float32[np.ndarray, "N P P C"],
    codes: UInt8[np.ndarray, "N P P"],
    probabilities: Float[np.ndarray, "N P P K"],
    classes: Classes,
    step: int,
) -> Figure:
    """Validation images with contours of the truth and of the pixels whose probability is at least one half.

    Args:
        images: Normalised images.
        codes: Codes of their pixels (see `data.codes`).
        probabilities: Probabilities of the classes, without the background.
        classes: The classes.
        step: Training step, for the title.

    Returns:
        The figure.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    memberships = classes.memberships.astype(bool)
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 0.5 + rows * TEXT_WIDTH_IN / columns), layout="constrained")
        figure.suptitle(f"Validation images, step {step}: ground truth solid, prediction dashed or yellow")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, image, code, p in zip(panels, images, codes, probabilities, strict=False):
            _show_classes(axes, Example("", image, memberships[code], p >= 0.5, code != UNLABELLED), 0.8)
    return figure
