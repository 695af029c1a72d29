"""Figures for publication in a common style that is safe for colour-blind readers, as PNG and vector PDF.

Figures are created without pyplot, and matplotlib's global settings are not changed.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator
from scipy import stats

from pulmo_jax.host.console import printable
from pulmo_jax.host.files import atomically

TEXT_WIDTH_IN = 7.0  # text width of a two-column page
COLUMN_WIDTH_IN = 3.4
PNG_DPI, PDF_IMAGE_DPI = 150, 300

# Okabe & Ito, "Color universal design", 2008
BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
)
CURVE_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE)
DASHES = ((4, 1.5), (1.5, 1), (5, 1, 1, 1))  # line styles of baselines, distinguishable where curves coincide
MANY_SCORES = 1000  # number of scores above which the counts have a logarithmic axis
MAX_BINS = 80
MAX_RATIO = 1e4  # largest ratio of scores on a logarithmic axis; lower scores share the first bin
FEW_SCORES = 30  # a class with fewer scores is drawn as dots, because its histogram would show the bins alone
GOLDEN = (5**0.5 - 1) / 2

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # bundled with matplotlib, so identical on every machine
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "figure.titlesize": 8.5,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType, required by journals
}

Scores = Float[np.ndarray, "_"] | tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]


def style() -> AbstractContextManager[None]:
    """Context manager that applies the common style."""
    return matplotlib.rc_context(cast(Any, STYLE))


@contextmanager
def drawing() -> Iterator[None]:
    """Context manager for writing a figure: the common style, and boxes for characters that the font lacks."""
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def literal(text: str, longest: int = 60) -> str:
    """Escape a name so that it is not parsed as TeX, and shorten it in the middle. The result is a single line.

    Args:
        text: Name.
        longest: Maximum number of characters, approximately.

    Returns:
        Text for matplotlib.
    """
    text, half = printable(text, keep=""), longest // 2
    short = text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"
    return short.replace("$", r"\$")


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Save a figure as name.pdf and name.png; each file is replaced atomically.

    Args:
        figure: Figure.
        folder: Output folder, created if necessary.
        name: File name without suffix.

    Returns:
        Path of the PNG file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with drawing():
        for kind, dpi, metadata in (("pdf", PDF_IMAGE_DPI, {"CreationDate": None}), ("png", PNG_DPI, {})):
            draw = partial(figure.savefig, format=kind, dpi=dpi, metadata=metadata)
            atomically(folder / f"{name}.{kind}", draw)
    return folder / f"{name}.png"


def loss_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, learning rate and gradient norm against training step.

    Args:
        rows: Rows of metrics.jsonl with "step" and any of "train/loss", "val/loss", "train/learning_rate" and
            "train/gradient_norm"; None marks a non-finite value.

    Returns:
        The figure.
    """
    series = {name: _series(rows, f"train/{name}") for name in ("learning_rate", "gradient_norm")}
    lower = {name: xy for name, xy in series.items() if xy[0].size}
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN * 0.7, 2.2 + 0.9 * len(lower)), layout="constrained")
        panels = figure.subplots(1 + len(lower), 1, sharex=True, squeeze=False, height_ratios=[2.6] + [1] * len(lower))[
            :, 0
        ]
        _losses(panels[0], _series(rows, "train/loss"), _series(rows, "val/loss"))
        for axes, (name, (step, value)) in zip(panels[1:], lower.items(), strict=True):
            axes.plot(step, value, color="0.3", lw=0.8, marker="." if step.size == 1 else None)
            axes.set_ylabel(name.replace("_", "\n"))
            if name == "gradient_norm" and (value > 0).all():
                log_axis(axes.yaxis, float(value.min()), float(value.max()), small=True)
            else:
                axes.yaxis.set_major_locator(MaxNLocator(3))
        panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        panels[-1].set_xlabel("training step")
        figure.align_ylabels(panels)
    return figure


def time_shares(seconds: Mapping[str, float]) -> Figure:
    """Stacked bar of the time spent in each phase of a run.

    Args:
        seconds: Seconds by phase.

    Returns:
        The figure.
    """
    total, left = sum(seconds.values()), 0.0
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 0.9), layout="constrained")
        axes = figure.subplots()
        for (name, value), colour in zip(seconds.items(), CURVE_COLOURS, strict=False):
            axes.barh(0, value, left=left, color=colour, label=f"{name}: {_seconds(value)} s ({value / total:.0%})")
            left += value
        axes.set(xlim=(0, total), yticks=[], xlabel="s")
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value >= 0.01 else "< 0.01"


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    step, value = np.array(points, float).reshape(-1, 2).T
    return step, value


def _losses(axes: Axes, train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]) -> None:
    axes.plot(*train, color=BLUE, lw=0.8, marker="." if train[0].size == 1 else None, label="training")
    if val[0].size:
        axes.plot(*val, color=VERMILLION, marker="o", ms=3, label="validation")
        best = np.argmin(val[1])
        label = f"best validation: {val[1][best]:.3g} at step {val[0][best]:.0f}"
        axes.plot(val[0][best], val[1][best], "o", ms=8, mfc="none", mec="black", mew=0.8, label=label)
    values = np.concatenate([train[1], val[1]])
    if (values > 0).all():
        log_axis(axes.yaxis, float(values.min()), float(values.max()))
    axes.set_ylabel("loss")
    axes.legend()


def log_axis(axis: XAxis | YAxis, low: float, high: float, *, small: bool = False) -> None:
    """Make an axis logarithmic, with tick labels that are plain numbers and do not overlap, however short the range.

    Args:
        axis: Axis.
        low: Lowest value shown.
        high: Highest value shown.
        small: The axis has room for few labels.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    if high / low >= 100:  # otherwise too few powers of ten
        return
    if high / low > 5:
        axis.set_major_locator(LogLocator(subs=(1, 3) if small else (1, 2, 5)))
    else:
        axis.set_major_locator(MaxNLocator(2 if small else 5, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@dataclass(frozen=True, eq=False)
class Curve:
    """ROC and precision-recall curve of a method.

    Attributes:
        name: Name of the method.
        fpr: False-positive rate at each threshold.
        tpr: True-positive rate at each threshold.
        precision: Precision at each threshold.
        recall: Recall at each threshold.
        auroc: Area under the ROC curve; None if undefined.
        ap: Average precision; None if undefined.
        point: (fpr, tpr, precision) at the calibrated threshold.
    """

    name: str
    fpr: Float[np.ndarray, "N"]
    tpr: Float[np.ndarray, "N"]
    precision: Float[np.ndarray, "M"]
    recall: Float[np.ndarray, "M"]
    auroc: float | None
    ap: float | None
    point: tuple[float, float, float] | None = None


def roc_and_pr(curves: Sequence[Curve], title: str, prevalence: float) -> Figure:
    """ROC and precision-recall curves of a method and its baselines, with chance level.

    Args:
        curves: Curves, the method first.
        title: Title of the figure.
        prevalence: Fraction of positives, the precision of a random classifier.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN * 0.86, 3.7), layout="constrained")
        figure.suptitle(literal(title))
        roc, pr = figure.subplots(1, 2)
        for i, curve in enumerate(curves):
            look: dict[str, Any] = {"color": CURVE_COLOURS[i % len(CURVE_COLOURS)], "zorder": 3 - i / len(curves)}
            look |= {"lw": 1.6} if i == 0 else {"lw": 0.9, "ls": (0, DASHES[i % len(DASHES)])}
            roc.plot(curve.fpr, curve.tpr, label=_with_area(curve.name, "AUROC", curve.auroc), **look)
            _plot_precision(pr, curve, look)
            if curve.point is not None:
                fpr, tpr, precision = curve.point
                dot: dict[str, Any] = {"ms": 5, "mfc": look["color"], "mec": "white", "zorder": 5, "clip_on": False}
                roc.plot(fpr, tpr, "o", label="at the threshold", **dot)
                pr.plot(tpr, precision, "o", label="at the threshold", **dot)
        roc.plot([0, 1], [0, 1], color="0.55", lw=0.8, ls=":", label="chance")
        pr.axhline(prevalence, color="0.55", lw=0.8, ls=":", label=f"chance (prevalence {prevalence:.2g})")
        roc.set(xlabel="false-positive rate", ylabel="true-positive rate (sensitivity)")
        pr.set(xlabel="recall (sensitivity)", ylabel="precision")
        for axes in (roc, pr):
            axes.set(xlim=(0, 1), ylim=(0, 1.02), box_aspect=1)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _plot_precision(axes: Axes, curve: Curve, look: dict[str, Any]) -> None:
    """Step curve whose area is the average precision."""
    ascending = slice(None, None, -1 if curve.recall[0] > curve.recall[-1] else 1)
    recall, precision = curve.recall[ascending], curve.precision[ascending]
    axes.plot(recall, precision, ds="steps-pre", label=_with_area(curve.name, "AP", curve.ap), **look)


def _with_area(name: str, area: str, value: float | None) -> str:
    return literal(name, 40) + ("" if value is None else f", {area} {value:.3f}")


def score_histogram(
    normal: Scores,
    abnormal: Scores | None,
    threshold: float,
    interval: tuple[float, float] | None,
    name: str,
) -> Figure:
    """Scores by class with the threshold and its 95 % interval: a dot for each score of small classes, else histograms.

    Args:
        normal: Scores, or (scores, weights) for binned scores.
        abnormal: The same for scores that are abnormal according to the ground truth, if any.
        threshold: Calibrated threshold.
        interval: 95 % interval of the threshold, if known.
        name: Unit that is scored, "pixel" or "image".

    Returns:
        The figure.
    """
    classes = {"normal": _weighted(normal)}
    if abnormal is not None:
        classes["lesion" if name == "pixel" else "abnormal"] = _weighted(abnormal)
    with style():
        if name == "image" and min(score.size for score, _ in classes.values()) < FEW_SCORES:
            return _score_dots({label: score for label, (score, _) in classes.items()}, threshold, interval, name)
        figure = Figure(figsize=(COLUMN_WIDTH_IN * 1.4, 2.5), layout="constrained")
        axes = figure.subplots()
        edges = _edges(list(classes.values()), [threshold, *(interval or ())])
        for (label, (score, weight)), colour in zip(classes.items(), (BLUE, VERMILLION), strict=False):
            share, _ = np.histogram(np.clip(score, edges[0], edges[-1]), edges, weights=weight / weight.sum())
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(share, edges, color=colour, lw=1, label=f"{label} ({weight.sum():,.0f} {name}s)")
        _mark_threshold(axes, threshold, interval)
        lower = any(score.min() < edges[0] for score, _ in classes.values())
        note = " (first bin includes all lower scores)" if lower else ""
        axes.set(xlabel=f"{name} score{note}", ylabel=f"fraction of {name}s per bin", xlim=(edges[0], edges[-1]))
        if edges[0] > 0:
            log_axis(axes.xaxis, float(edges[0]), float(edges[-1]))
        if max(weight.sum() for _, weight in classes.values()) > MANY_SCORES:
            axes.set_yscale("log")
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _score_dots(
    classes: Mapping[str, np.ndarray], threshold: float, interval: tuple[float, float] | None, name: str
) -> Figure:
    """A row of dots for each class, one per score, spread vertically so that equal scores do not hide each other."""
    figure = Figure(figsize=(COLUMN_WIDTH_IN * 1.4, 1.3 + 0.6 * len(classes)), layout="constrained")
    axes = figure.subplots()
    looks = ((BLUE, "o"), (VERMILLION, "D"))
    for row, (scores, (colour, marker)) in enumerate(zip(classes.values(), looks, strict=False)):
        spread = (np.arange(scores.size) * GOLDEN % 1 - 0.5) * 0.6
        look: dict[str, Any] = {"color": colour, "mec": "white", "mew": 0.4, "ms": 4.5 if scores.size < 100 else 2.5}
        axes.plot(np.sort(scores), row + spread, marker, ls="", rasterized=scores.size > MANY_SCORES, **look)
    _mark_threshold(axes, threshold, interval)
    values = np.concatenate([*classes.values(), [threshold, *(interval or ())]])
    if values.min() > 0:
        log_axis(axes.xaxis, float(values.min()), float(values.max()))
    axes.margins(x=0.04)
    rows = [f"{label}\n{scores.size} {name}{'s' * (scores.size != 1)}" for label, scores in classes.items()]
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=f"{name} score", ylim=(len(rows) - 0.5, -0.5))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _weighted(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    return scores if isinstance(scores, tuple) else (scores, np.ones(scores.size))


def _edges(classes: list[tuple[np.ndarray, np.ndarray]], marks: list[float]) -> np.ndarray:
    """Bin edges of equal ratios, or of equal widths if scores are not positive; the lowest scores may lie below the
    first bin.
    """
    score, weight = (np.concatenate(parts) for parts in zip(*classes, strict=True))
    order = np.argsort(score)
    rank = np.cumsum(weight[order])
    low = min(score[order][np.searchsorted(rank, 1e-3 * rank[-1])], *marks)
    high = max(score.max(), *marks)
    if low > 0:
        low = min(max(low, high / MAX_RATIO), *marks)
    if low == high:
        low, high = low - 0.5, high + 0.5
    n_bins = int(np.clip(np.sqrt(rank[-1]) * 2, 10, MAX_BINS))
    return np.geomspace(low, high * 1.05, n_bins + 1) if low > 0 else np.linspace(low, high, n_bins + 1)


def _mark_threshold(axes: Axes, threshold: float, interval: tuple[float, float] | None) -> None:
    axes.axvline(threshold, color="black", lw=1, ls="--", label=f"threshold {threshold:.3g}")
    if interval is not None:
        low, high = interval
        axes.axvspan(low, high, color="0.5", alpha=0.3, lw=0, label=f"95 % interval [{low:.3g}, {high:.3g}]")


def p_value_calibration(
    nominal: Float[np.ndarray, "N"],
    observed: Float[np.ndarray, "N"],
    low: Float[np.ndarray, "N"],
    high: Float[np.ndarray, "N"],
    unit: str = "pixel",
) -> Figure:
    """Observed against nominal false-alarm rate on held-out normal data.

    Args:
        nominal: Nominal rates.
        observed: Fraction of held-out normal pixels (or images) with a p-value of at most each nominal rate.
        low: Lower limit of the 95 % interval of the observed rate; NaN if unknown.
        high: Upper limit of the interval.
        unit: "pixel" or "image".

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH_IN, 3.1), layout="constrained")
        axes = figure.subplots()
        limits = (nominal.min() / 1.5, min(1.0, nominal.max() * 1.5))
        axes.plot(limits, limits, color="0.4", lw=0.8, ls="--", label="perfect calibration")
        axes.set(xscale="log", yscale="log")
        if np.isfinite(low).any():
            axes.fill_between(nominal, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
        nonzero = observed > 0
        label = f"held-out normal {unit}s"
        axes.plot(nominal[nonzero], observed[nonzero], color=BLUE, marker="o", ms=3, label=label)
        if not nonzero.all():
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(nominal[~nonzero], np.zeros(sum(~nonzero)), "v", color=BLUE, mfc="white", label="zero", **edge)
        positive = np.concatenate([observed, limits])
        positive = positive[positive > 0]
        axes.set(xlim=limits, ylim=(positive.min() / 1.5, min(1.0, positive.max() * 1.5)), box_aspect=1)
        axes.set(xlabel=f"nominal false-alarm rate per {unit}", ylabel="observed false-alarm rate")
        axes.legend()
    return figure


def distance_law(
    distance: Float[np.ndarray, "n"],
    dimensions: int,
    nominal: Float[np.ndarray, "N"],
    observed: Mapping[str, Float[np.ndarray, "N"]],
) -> Figure:
    """Squared Mahalanobis distances against chi-squared quantiles, and observed against nominal false-alarm rates of
    theoretical p-values.

    Args:
        distance: Squared distances, ascending.
        dimensions: Number of dimensions of the Gaussian.
        nominal: Nominal rates.
        observed: Observed rates for each theoretical distribution.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        levels = (np.arange(distance.size) + 0.5) / distance.size
        shown = np.unique(np.geomspace(1, distance.size, 400).round().astype(int))  # denser in the upper tail
        expected = stats.chi2.isf(1 - levels[-shown], dimensions)
        both = (float(expected.min() / dimensions), float(expected.max() / dimensions))
        left.plot(both, both, color="0.4", lw=0.8, ls="--", label="Gaussian")
        left.plot(expected / dimensions, distance[-shown] / dimensions, color=BLUE, label="held-out normal windows")
        lowest, highest = (float(distance[i] / dimensions) for i in (0, -1))
        log_axis(left.xaxis, *both)
        log_axis(left.yaxis, max(min(both[0], lowest), 1e-300), max(both[1], highest))
        left.set(box_aspect=1)
        left.set(xlabel="chi-squared quantile / dimensions", ylabel="squared distance / dimensions")
        left.legend()
        limits = (nominal.min() / 1.5, min(1.0, nominal.max() * 1.5))
        right.plot(limits, limits, color="0.4", lw=0.8, ls="--", label="perfect agreement")
        looks: tuple[dict[str, Any], ...] = (
            {"marker": "o", "ms": 5.5, "mfc": "none"},
            {"marker": ".", "ms": 4, "ls": ""},
        )
        for (name, rate), colour, look in zip(observed.items(), CURVE_COLOURS, looks, strict=False):
            right.plot(nominal[rate > 0], rate[rate > 0], color=colour, label=name, **look)  # visible where they agree
        right.set(xscale="log", yscale="log", xlim=limits, box_aspect=1)
        right.set(xlabel="nominal false-alarm rate per window", ylabel="observed false-alarm rate")
        right.legend()
    return figure
