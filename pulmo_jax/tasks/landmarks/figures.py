"""Figures of landmarks: predictions with uncertainties, errors, and errors by class.

Predictions are orange dots with 95 % ellipses, true landmarks blue diamonds, and low-quality predictions crosses, which
differ in shape as well as in colour.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from pulmo_jax.evaluation.landmark_metrics import Errors
from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.host.files import atomically
from pulmo_jax.inference.outputs import overlay_step
from pulmo_jax.reporting.figures import (
    BLUE,
    COLUMN_WIDTH_IN,
    CURVE_COLOURS,
    DASHES,
    ORANGE,
    SKY,
    TEXT_WIDTH_IN,
    VERMILLION,
    literal,
    style,
)

CHI2_95 = 5.991464547107979  # chi-squared with two degrees of freedom: -2 ln 0.05
ELLIPSE_POINTS = 32
OVERLAY_MIN_PX = 512  # smaller images are enlarged by an integer factor
COLUMNS = 4  # columns of a gallery


@dataclass(frozen=True, eq=False)
class LandmarkExample:
    """An image with landmarks.

    Attributes:
        title: Title.
        image: Grey or RGB values from 0 to 255.
        points: Landmarks (y, x), px.
        covariance: Covariance of each landmark, px^2, if known.
        truth: True landmarks (y, x), px, if known; NaN where unknown.
        doubtful: Flags of low quality.
        label: Legend entry of the points.
    """

    title: str
    image: UInt8[np.ndarray, "H W"] | UInt8[np.ndarray, "H W 3"]
    points: Float[np.ndarray, "K 2"]
    covariance: Float[np.ndarray, "K 2 2"] | None = None
    truth: Float[np.ndarray, "K 2"] | None = None
    doubtful: Bool[np.ndarray, "K"] | None = None
    label: str = "predicted"


def ellipses(points: Float[np.ndarray, "K 2"], covariance: Float[np.ndarray, "K 2 2"]) -> Float[np.ndarray, "K E 2"]:
    """Outlines of the 95 % confidence regions.

    Args:
        points: Landmarks (y, x), px.
        covariance: Covariance of each landmark, px^2.

    Returns:
        E points (y, x) of each outline, px.
    """
    angle = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
    circle = np.stack([np.sin(angle), np.cos(angle)], axis=-1) * np.sqrt(CHI2_95)
    return points[:, None] + circle @ np.linalg.cholesky(covariance).swapaxes(-1, -2)


def write_overlay(path: Path, example: LandmarkExample) -> None:
    """Write an image with its numbered landmarks as PNG.

    Args:
        path: Output file.
        example: Image with landmarks.
    """
    step = overlay_step(example.image.shape)
    picture = Image.fromarray(example.image[::step, ::step]).convert("RGB")
    factor = max(1, -(-OVERLAY_MIN_PX // max(picture.size)))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    _draw(ImageDraw.Draw(picture), example, factor / step, radius=max(3, max(picture.size) // 200))
    atomically(path, lambda p: picture.save(p, format="PNG", compress_level=1))


def _draw(draw: ImageDraw.ImageDraw, example: LandmarkExample, zoom: float, radius: int) -> None:
    """Draw the landmarks and their 95 % ellipses on an enlarged image."""

    def place(position: np.ndarray) -> np.ndarray:
        """(y, x) of pixel centres to Pillow's (x, y)."""
        return ((position + 0.5) * zoom - 0.5)[..., ::-1]

    if example.covariance is not None:
        for border in place(ellipses(example.points, example.covariance)):
            _closed(draw, border, ORANGE, 2)
    if example.truth is not None:
        for x, y in place(example.truth[np.isfinite(example.truth).all(-1)]):
            diamond = np.array([(x, y - 2 * radius), (x + 2 * radius, y), (x, y + 2 * radius), (x - 2 * radius, y)])
            _closed(draw, diamond, SKY, 2)
    doubtful = np.zeros(len(example.points), bool) if example.doubtful is None else example.doubtful
    for number, ((x, y), doubt) in enumerate(zip(place(example.points), doubtful, strict=True), start=1):
        box = (x - radius, y - radius, x + radius, y + radius)
        if doubt:
            for ends in (box, (box[0], box[3], box[2], box[1])):
                draw.line(ends, fill="black", width=radius + 2)
                draw.line(ends, fill=VERMILLION, width=max(2, radius // 2))
        else:
            draw.ellipse(box, fill=ORANGE, outline="black")
        text = {"font_size": 4 * radius, "fill": "white", "stroke_width": 1, "stroke_fill": "black"}
        draw.text((x + 2 * radius, y - 2 * radius), str(number), anchor="ls", **text)


def _closed(draw: ImageDraw.ImageDraw, corners: np.ndarray, colour: str, width: int) -> None:
    """Draw a closed polygon with a black outline."""
    line = [tuple(corner) for corner in (*corners, corners[0])]
    draw.line(line, fill="black", width=width + 2, joint="curve")
    draw.line(line, fill=colour, width=width, joint="curve")


def gallery(examples: Sequence[LandmarkExample], title: str) -> Figure:
    """Gallery of images with their landmarks.

    Args:
        examples: Images, at least one.
        title: Title of the figure.

    Returns:
        The figure.
    """
    n_rows = -(-len(examples) // COLUMNS)
    columns = min(COLUMNS, len(examples))
    with style():
        panel = TEXT_WIDTH_IN / columns
        figure = Figure(figsize=(TEXT_WIDTH_IN, n_rows * (panel + 0.25) + 0.6), layout="constrained")
        figure.suptitle(literal(title))
        panels = figure.subplots(n_rows, columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, example in zip(panels, examples, strict=False):
            _show(axes, example)
        handles: dict[str, Any] = {}
        for axes in panels[: len(examples)]:
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def _show(axes: Axes, example: LandmarkExample) -> None:
    """Draw one image with its landmarks in a panel."""
    axes.imshow(example.image, cmap="gray", vmin=0, vmax=255)
    axes.set_title(literal(example.title, 36), fontsize=6.5)
    limits = axes.get_xlim(), axes.get_ylim()
    if example.covariance is not None:
        borders = ellipses(example.points, example.covariance)[..., ::-1]
        axes.add_collection(
            PolyCollection(list(borders), facecolors="none", edgecolors=ORANGE, linewidths=0.6, label="95 % region")
        )
    doubtful = np.zeros(len(example.points), bool) if example.doubtful is None else example.doubtful
    dot: dict[str, Any] = {"ls": "", "mec": "black", "mew": 0.3}
    if example.truth is not None:
        axes.plot(*example.truth.T[::-1], "D", ls="", mfc="none", mec=SKY, mew=0.7, ms=3.5, label="truth")
    if not doubtful.all():
        axes.plot(*example.points[~doubtful].T[::-1], "o", mfc=ORANGE, ms=2.6, label=example.label, **dot)
    if doubtful.any():
        axes.plot(
            *example.points[doubtful].T[::-1], "X", mfc=VERMILLION, ms=4.5, label=f"{example.label}, low quality", **dot
        )
    axes.set(xlim=limits[0], ylim=limits[1])


def shape_clouds(
    given: Float[np.ndarray, "N K 2"], aligned: Float[np.ndarray, "N K 2"], mean: Float[np.ndarray, "K 2"]
) -> Figure:
    """Landmarks of many images before and after Procrustes alignment.

    Args:
        given: Landmarks (y, x), px.
        aligned: Aligned landmarks.
        mean: Mean shape.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, points in ((left, given), (right, aligned)):
            for k in range(points.shape[1]):
                axes.plot(
                    *points[:, k].T[::-1], ".", ls="", ms=2, mec="none", color=CURVE_COLOURS[k % len(CURVE_COLOURS)]
                )
            axes.set_aspect("equal")
            axes.invert_yaxis()
        right.plot(*mean.T[::-1], "D", ls="", mfc="none", mec="black", mew=0.8, ms=4, label="mean shape")
        left.set(title="in the images", xlabel="x / px", ylabel="y / px")
        right.set(title="aligned", xlabel="x / shape size", ylabel="y / shape size")
        figure.legend(loc="outside lower center")
    return figure


def cumulative_errors(errors: Mapping[str, Float[np.ndarray, "n"]], unit: str) -> Figure:
    """Cumulative distribution of the errors by method.

    The axis ends at the 99 % quantile of the first method, or the 95 % quantile of the best baseline if larger.

    Args:
        errors: Ascending errors by method, the run first, then baselines; see `cumulative_error`.
        unit: Unit of the errors.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH_IN * 1.3, 2.9), layout="constrained")
        axes = figure.subplots()
        for i, (name, ascending) in enumerate(errors.items()):
            share = np.arange(1, ascending.size + 1) / ascending.size
            look: dict[str, Any] = {"lw": 1.6} if i == 0 else {"lw": 0.9, "ls": (0, DASHES[i % len(DASHES)])}
            label = f"{literal(name, 30)}, median {np.median(ascending):.3g}"
            colour = CURVE_COLOURS[i % len(CURVE_COLOURS)]
            axes.step(np.append(0, ascending), np.append(0, share), where="post", color=colour, label=label, **look)
        first, *others = errors.values()
        ends = [np.quantile(first, 0.99), *([min(np.quantile(other, 0.95) for other in others)] if others else [])]
        axes.set(xlim=(0, max(ends)), ylim=(0, 1.01), xlabel=f"error / {unit}", ylabel="fraction of landmarks")
        axes.grid(color="0.9", lw=0.5)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def error_by_landmark(errors: Float[np.ndarray, "N K"], estimates: Sequence[Errors], unit: str) -> Figure:
    """Box plot of the errors of each landmark: quartiles, 5 and 95 % quantiles, and the mean with its interval.

    Args:
        errors: Errors; NaN where unknown.
        estimates: Mean and median of each landmark.
        unit: Unit of the errors.

    Returns:
        The figure.
    """
    columns = [column[~np.isnan(column)] for column in errors.T]
    names = [str(k + 1) for k in range(len(columns))]
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 2.6), layout="constrained")
        axes = figure.subplots()
        _boxes(axes, columns, names)
        _mean_dots(axes, [estimate.mean for estimate in estimates])
        axes.set(xlabel="landmark", ylabel=f"error / {unit}", ylim=(0, None))
        figure.legend(*_legend(axes), loc="outside upper center", ncols=2)
    return figure


def class_comparison(
    of_image: Mapping[str, Float[np.ndarray, "n"]], estimates: Mapping[str, Errors], unit: str
) -> Figure:
    """Mean error of each image by class, with box plots and class means with intervals.

    Args:
        of_image: Mean errors of the images, by class.
        estimates: Mean and median error of each class.
        unit: Unit of the errors.

    Returns:
        The figure.
    """
    names = list(of_image)
    rng = np.random.default_rng(0)
    with style():
        figure = Figure(figsize=(max(COLUMN_WIDTH_IN, 0.9 * len(names) + 0.8), 2.8), layout="constrained")
        axes = figure.subplots()
        for i, values in enumerate(of_image.values()):
            spread = i + 1 + rng.uniform(-0.28, 0.28, values.size)
            dots: dict[str, Any] = {"ms": 1.8, "mfc": SKY, "mec": "none", "alpha": 0.7, "zorder": 1}
            axes.plot(spread, values, "o", ls="", label=None if i else "image", **dots)
        labels = [f"{literal(name, 16)}\n{of_image[name].size} images" for name in names]
        _boxes(axes, list(of_image.values()), labels)
        _mean_dots(axes, [estimates[name].mean for name in names])
        axes.set(ylabel=f"mean error per image / {unit}", ylim=(0, None))
        figure.legend(*_legend(axes), loc="outside upper center", ncols=2, columnspacing=1.0, handletextpad=0.4)
    return figure


def _boxes(axes: Axes, values: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Draw box plots: quartiles, 5 and 95 % quantiles."""
    axes.boxplot(
        list(values),
        tick_labels=list(names),
        whis=(5, 95),
        showfliers=False,
        widths=0.6,
        boxprops={"color": BLUE, "linewidth": 0.8},
        whiskerprops={"color": BLUE, "linewidth": 0.8},
        capprops={"color": BLUE, "linewidth": 0.8},
        medianprops={"color": BLUE, "linewidth": 1.6},
    )


def _mean_dots(axes: Axes, means: Sequence[Estimate]) -> None:
    """Draw means with their confidence intervals."""
    known = [(i + 1, mean) for i, mean in enumerate(means) if mean.value is not None]
    ends = np.array([[m.value if end is None else end for end in (m.low, m.value, m.high)] for _, m in known], float)
    low, value, high = ends.reshape(-1, 3).T
    look: dict[str, Any] = {"fmt": "o", "color": VERMILLION, "ms": 3, "lw": 1.2, "capsize": 2, "zorder": 4}
    axes.errorbar(
        [i for i, _ in known], value, np.stack([value - low, high - value]), label="mean, 95 % interval", **look
    )


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    """Legend entries, including the box plots."""
    handles, labels = axes.get_legend_handles_labels()
    box = axes.plot([], [], "s", mfc="none", mec=BLUE, ls="")[0]
    return [*handles, box], [*labels, "median, 25-75 %, 5-95 %"]


def coverage_calibration(nominal: Float[np.ndarray, "n"], observed: Sequence[Estimate], title: str = "") -> Figure:
    """Observed against nominal coverage of the confidence regions.

    Args:
        nominal: Nominal levels.
        observed: Observed coverage with intervals.
        title: Title of the figure.

    Returns:
        The figure.
    """
    share = np.array([estimate.value for estimate in observed], float)
    ends = [(e.value if e.low is None else e.low, e.value if e.high is None else e.high) for e in observed]
    low, high = np.array(ends, float).T
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH_IN, 3.1), layout="constrained")
        axes = figure.subplots()
        axes.plot((0, 1), (0, 1), color="0.4", lw=0.8, ls="--", label="calibrated")
        axes.fill_between(nominal, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval over images")
        axes.plot(nominal, share, color=BLUE, marker="o", ms=2.5, label="landmarks")
        for level in (0.68, 0.95):
            axes.axvline(level, color="0.7", lw=0.6, ls=":")
        axes.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
        axes.set(xlabel="nominal level of the region", ylabel="fraction of true landmarks inside", title=literal(title))
        figure.legend(loc="outside lower center", ncols=2)
    return figure
