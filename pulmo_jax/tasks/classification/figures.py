"""Figures of classification: performance, calibration, and saliency.

Saliency is scaled to the maximum of each image, so colours cannot be compared between images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.host.console import printable
from pulmo_jax.host.files import atomically
from pulmo_jax.reporting.comparison_figures import intervals_figure
from pulmo_jax.reporting.figures import (
    BLUE,
    COLUMN_WIDTH_IN,
    CURVE_COLOURS,
    DASHES,
    TEXT_WIDTH_IN,
    Curve,
    literal,
    roc_and_pr,
    style,
)
from pulmo_jax.reporting.tables import COLUMNS

MOST_POINTS = 2000  # of a curve
MARKERS = "osD^v"
PAIRS = 2  # of a gallery, beside each other
TITLE_IN, BAR_IN = 0.45, 0.45  # height of the lines above and below an image, and of the colour bar

PAIR_MIN_PX, PAIR_MAX_PX = 384, 1024  # the least height and the greatest side of an image beside its saliency
GAP_PX = 8
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
FONT_MIN_PX = 16
HEAT = "inferno"
SHADES = colormaps[HEAT](np.linspace(0, 1, 256))[:, :3].astype(np.float32) * 255
OPACITY = np.float32(0.75) * np.clip(np.linspace(-0.25, 2, 256, dtype=np.float32), 0, 1)[:, None]  # of each shade


def roc_curves(curves: Mapping[str, tuple[Int[np.ndarray, "N"], Float[np.ndarray, "R N"]]], positive: str) -> Figure:
    """ROC and precision-recall curves, averaged over repeats at fixed false-positive rate and recall.

    Args:
        curves: Labels (1: positive class) and scores of each repeat (NaN: not predicted) by method, the run first,
            then baselines. Repeats with images of a single class are ignored. The band of the first method spans its
            repeats.
        positive: Name of the positive class.

    Returns:
        The figure.
    """
    means, bands = [], None
    for name, (labels, scores) in curves.items():
        known = [(labels[seen], row[seen]) for row in scores for seen in [~np.isnan(row)]]
        repeats = [pair for pair in known if np.unique(pair[0]).size == 2]
        if repeats:
            (fpr, tpr), (recall, precision) = _vertical_roc(repeats), _vertical_precision(repeats)
            auroc, ap = (
                float(np.mean([area(*pair) for pair in repeats])) for area in (roc_auc_score, average_precision_score)
            )
            means.append(Curve(name, fpr, tpr.mean(0), precision.mean(0), recall, auroc, ap))
            if len(means) == 1:
                bands = (fpr, tpr), (recall, precision)
        else:
            none = np.array([np.nan])
            means.append(Curve(f"{name}: undefined", none, none, none, none, None, None))
    first = next(iter(curves.values()))[0]
    figure = roc_and_pr(means, f"Positive class: {positive}", prevalence=float(first.mean()))
    if bands is not None and len(bands[0][1]) > 1:
        with style():
            for axes, (x, y), step in zip(figure.axes, bands, (None, "pre"), strict=True):
                label = f"lowest to highest of {len(y)} repeats"
                axes.fill_between(x, y.min(0), y.max(0), step=step, color=BLUE, alpha=0.2, lw=0, label=label)
                axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _vertical_roc(repeats: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rates, each twice, and the true-positive rates of every repeat just before and at them.

    Vertical averaging as in Fawcett, "An introduction to ROC analysis", 2006, section 9.1, but at all occurring rates
    and on both sides of a step, so that the area under the mean curve is the mean area.
    """
    curves = [roc_curve(*pair)[:2] for pair in repeats]
    fpr = _grid([x for x, _ in curves])
    # np.interp uses the last of several points with the same x; from the right this is the first.
    sides = [(np.interp(-fpr, -x[::-1], y[::-1]), np.interp(fpr, x, y)) for x, y in curves]
    return np.repeat(fpr, 2), np.array([np.stack(side, -1).ravel() for side in sides])


def _vertical_precision(repeats: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Recalls, and the precision of every repeat at the highest threshold that reaches them."""
    curves = [precision_recall_curve(*pair)[:2] for pair in repeats]
    rising = [(precision[-2::-1], recall[-2::-1]) for precision, recall in curves]  # without scikit-learn's (1, 0)
    recall = _grid([np.zeros(1), *(x for _, x in rising)])
    return recall, np.array([y[np.searchsorted(x, recall)] for y, x in rising])


def _grid(values: Sequence[np.ndarray]) -> np.ndarray:
    """Sorted distinct values, thinned to at most MOST_POINTS."""
    every = np.unique(np.concatenate(values))
    return every[np.linspace(0, every.size - 1, min(every.size, MOST_POINTS)).round().astype(int)]


def reliability_diagram(parts: Mapping[str, tuple[Any, float]]) -> Figure:
    """Reliability diagram: accuracy against confidence with 95 % intervals, and the number of predictions per bin.

    Args:
        parts: `Reliability` over bins of equal width from 0 to 1, and the expected calibration error, by name.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH_IN, 4.3), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        for i, (name, (bins, ece)) in enumerate(parts.items()):
            some, colour = bins.count > 0, CURVE_COLOURS[i % len(CURVE_COLOURS)]
            x, y, low, high = (values[some] for values in (bins.confidence, bins.accuracy, bins.low, bins.high))
            look: dict[str, Any] = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "zorder": 4 - i / len(parts)}
            look |= {"lw": 0.8, "elinewidth": 0.8, "capsize": 1.5, "clip_on": False}
            look |= {"ms": 4} if i == 0 else {"ms": 6.5, "mfc": "none", "mew": 0.9, "ls": (0, DASHES[i % len(DASHES)])}
            label = f"{literal(name, 40)}, ECE {ece:.3f}"
            upper.errorbar(x, y, np.maximum(0, [y - low, high - y]), label=label, **look)
            edges = np.linspace(0, 1, len(bins.count) + 1)
            lower.stairs(bins.count, edges, color=colour, fill=i == 0, alpha=0.25 if i == 0 else 1, lw=1)
            lower.stairs(bins.count, edges, color=colour, lw=1.2 - 0.4 * (i == 0), ls="-" if i == 0 else "--")
        upper.plot([0, 1], [0, 1], color="0.4", lw=0.8, ls="--", label="perfectly calibrated")
        upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        lower.set(xlabel="confidence", ylabel="predictions", ylim=(0, max(1, lower.get_ylim()[1])))
        lower.yaxis.set_major_locator(MaxNLocator(2, integer=True, steps=[1, 2, 5, 10]))
        upper.tick_params(labelbottom=True)
        figure.align_ylabels()
        figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center")
    return figure


def confusion_matrix(counts: Float[np.ndarray, "K K"], classes: Sequence[str]) -> Figure:
    """Confusion matrix with counts and row percentages.

    Args:
        counts: Number of images by true class (rows) and predicted class (columns).
        classes: Names of the classes.

    Returns:
        The figure.
    """
    total, n = counts.sum(1, keepdims=True), len(classes)
    share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    with style():
        side = float(np.clip(0.5 * n + 0.8, 2.4, TEXT_WIDTH_IN - 0.5))
        figure = Figure(figsize=(side + 0.4, side), layout="constrained")
        axes = figure.subplots()
        edges = np.arange(n + 1) - 0.5
        axes.pcolormesh(edges, edges, np.nan_to_num(share), cmap="Blues", vmin=0, vmax=1, edgecolors="0.85", lw=0.4)
        for (i, j), count in np.ndenumerate(counts):
            number = f"{count:,.0f}" if count == round(count) else f"{count:,.1f}"
            text = number + (f"\n{share[i, j]:.0%}" if total[i, 0] > 0 else "")
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8 if n < 6 else 6)
        names = [literal(name, 18) for name in classes]
        short = max(map(len, names)) * n < 30
        axes.set_xticks(range(n), names, **{} if short else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"})
        axes.set_yticks(range(n), names)
        axes.set(aspect="equal", ylim=(n - 0.5, -0.5), xlabel="predicted class", ylabel="true class")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def validation_gallery(
    images: Float[np.ndarray, "N S S"],
    probabilities: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, "N"],
    classes: Sequence[str],
    step: int,
) -> Figure:
    """Validation images with the class predicted during training, and its probability."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 0.3 + rows * TEXT_WIDTH_IN / columns * 1.1), layout="constrained")
        figure.suptitle(f"Validation images, step {step}")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, image, p, label in zip(panels, images, probabilities, labels, strict=False):
            axes.imshow(image, cmap="gray")
            said, true = (literal(classes[i], 16) for i in (int(p.argmax()), int(label)))
            axes.set_title(f"{said} {p.max():.2f}, is {true}", fontsize=7)
    return figure


def comparison(rows: Mapping[str, Mapping[str, Estimate]], figures: Sequence[str]) -> Figure:
    """Estimates with 95 % intervals by row (such as a method), one panel per figure of merit."""
    return intervals_figure(rows, {name: COLUMNS.get(name, literal(name, 30).replace("_", " ")) for name in figures})


@dataclass(frozen=True, eq=False)
class ClassExample:
    """An image with its saliency.

    Attributes:
        title: Title.
        image: Grey values from 0 to 255.
        saliency: Saliency; 0: none.
        note: Text on the prediction.
    """

    title: str
    image: UInt8[np.ndarray, "H W"]
    saliency: Float[np.ndarray, "H W"]
    note: str


def saliency_gallery(examples: Sequence[ClassExample], title: str) -> Figure:
    """Gallery of images, each beside its saliency map."""
    columns = min(PAIRS, len(examples))
    lines = -(-len(examples) // columns)
    pairs = [beside_saliency(example.image, example.saliency) for example in examples]
    with style():
        width = TEXT_WIDTH_IN / PAIRS
        shapes = [len(pair) / pair.shape[1] for pair in pairs]
        tall = [width * max(shapes[line * columns :][:columns]) for line in range(lines)]  # height of each line, in
        size = (width * columns, sum(tall) + TITLE_IN * lines + 0.3 + BAR_IN)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.06))  # a note belongs to the image above
        figure.suptitle(literal(title))
        grid = figure.add_gridspec(lines + 1, columns, height_ratios=[*(t + TITLE_IN for t in tall), BAR_IN])
        for i, (example, pair) in enumerate(zip(examples, pairs, strict=True)):
            axes = figure.add_subplot(grid[divmod(i, columns)])
            axes.imshow(pair)
            axes.set_title(literal(example.title, 48), fontsize=6.5)
            axes.set_xlabel(literal(example.note, 64), fontsize=6.5)
            axes.set(xticks=[], yticks=[], anchor="N")
            axes.spines[:].set_visible(False)
        room = figure.add_subplot(grid[-1, :])
        room.set_axis_off()
        look: dict[str, Any] = {"orientation": "horizontal", "label": "saliency"}
        bar = figure.colorbar(ScalarMappable(cmap=HEAT), cax=room.inset_axes((0.3, 0.7, 0.4, 0.3)), **look)
        bar.set_ticks([0, 1], labels=["none", "most of the image"])
    return figure


def beside_saliency(image: UInt8[np.ndarray, "H W"], saliency: Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "h w 3"]:
    """Image beside a copy overlaid with its saliency, which is transparent where it is low.

    Small images are enlarged by an integer factor, large images are downsampled.
    """
    height, width = image.shape
    greatest = max(image.shape)
    factor = min(-(-PAIR_MIN_PX // height), PAIR_MAX_PX // greatest) or PAIR_MAX_PX / greatest
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    gray = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))[..., None]
    known = np.nan_to_num(saliency.astype(np.float32))
    heat = np.asarray(Image.fromarray(known).resize(size, Image.Resampling.BILINEAR))
    level = (heat / (heat.max() or 1) * 255).astype(np.uint8)
    covered = gray * (1 - OPACITY)[level] + (SHADES * OPACITY)[level]
    gap = np.full((size[1], GAP_PX, 3), 255, np.uint8)
    return np.concatenate([np.repeat(gray, 3, -1), gap, covered.round().astype(np.uint8)], axis=1)


def write_saliency_overlay(
    path: Path, image: UInt8[np.ndarray, "H W"], saliency: Float[np.ndarray, "H W"], lines: Sequence[str]
) -> None:
    """Write the output of `beside_saliency` with lines of text as PNG.

    Args:
        path: Output file.
        image: Grey values from 0 to 255.
        saliency: Saliency.
        lines: Text below the images.
    """
    pair = Image.fromarray(beside_saliency(image, saliency))
    font = ImageFont.truetype(FONT, max(FONT_MIN_PX, pair.height // 40))
    line_px, margin = round(1.4 * font.size), round(font.size / 2)
    size = max(pair.width, 2 * PAIR_MIN_PX), pair.height + line_px * len(lines) + (margin if lines else 0)
    picture = Image.new("RGB", size, "white")
    picture.paste(pair)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        place = (margin, pair.height + margin // 2 + line_px * i)
        draw.text(place, _fitting(line, size[0] - 2 * margin, font), fill="black", font=font)
    atomically(path, lambda p: picture.save(p, format="PNG", compress_level=1))


def _fitting(line: str, width_px: int, font: ImageFont.FreeTypeFont) -> str:
    """Shorten a long line in its middle."""
    text = short = printable(line, keep="")
    while font.getlength(short) > width_px:
        half = len(short) // 2 - 1
        short = f"{text[:half]}…{text[-half:]}"
    return short
