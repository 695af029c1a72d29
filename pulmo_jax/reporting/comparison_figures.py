"""Figures of a comparison of runs: differences with intervals, and errors by image."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from sklearn.metrics import precision_recall_curve, roc_curve

from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.reporting.figures import BLUE, COLUMN_WIDTH_IN, CURVE_COLOURS, TEXT_WIDTH_IN, Curve, literal, style

PANELS_IN_ROW = 3
CAPTIONS = {
    "curves": (
        "ROC and precision-recall curves of {runs} runs and their trivial baselines on the same {images} images. "
        "Curves that cross mean that the better run depends on the false-alarm rate in use. "
        "Of repeated cross-validations the mean score is drawn; the areas are means over the repeats."
    ),
    "differences": (
        "Difference from {reference} for each figure of merit, with 95 % bootstrap intervals over {groups} groups. The "
        "same groups are drawn for both. An interval that includes the dotted line shows no difference."
    ),
    "errors": (
        "Cumulative distribution of the mean error of an image, {images} images. A curve further to the left is better."
    ),
    "errors_by_image": (
        "Mean error of each of {images} images by {reference} and by each other run. Images below the diagonal are "
        "better with the other run. Look for single images that make the whole difference."
    ),
}


def score_curve(
    name: str,
    scores: Float[np.ndarray, "R N"],
    positive: Bool[np.ndarray, "N"],
    auroc: float | None,
    ap: float | None,
) -> Curve:
    """ROC and precision-recall curve of scores, averaged over the repeats.

    Args:
        name: Name in the legend.
        scores: Scores in each repeat; NaN where there is none.
        positive: Positive images.
        auroc: Area under the ROC curve, for the legend.
        ap: Average precision, for the legend.

    Returns:
        The curve.
    """
    known = np.isfinite(scores).any(0)
    mean, truth = np.nanmean(scores[:, known], axis=0), positive[known]
    fpr, tpr, _ = roc_curve(truth, mean)
    precision, recall, _ = precision_recall_curve(truth, mean)
    return Curve(name, fpr, tpr, precision, recall, auroc, ap)


def differences_figure(rows: Mapping[str, Mapping[str, Estimate]], titles: Mapping[str, str]) -> Figure:
    """Differences from the first run, one panel for each figure of merit.

    Args:
        rows: Differences by method and figure of merit.
        titles: Titles of the figures of merit that are drawn.

    Returns:
        The figure.
    """
    n_rows = -(-len(titles) // PANELS_IN_ROW)
    with style():
        size = TEXT_WIDTH_IN, n_rows * (0.75 + 0.22 * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(n_rows, PANELS_IN_ROW, squeeze=False).ravel()
        for axes in panels[len(titles) :]:
            axes.remove()
        for i, (key, title) in enumerate(titles.items()):
            axes = panels[i]
            axes.axvline(0, color="0.55", lw=0.8, ls=":")
            for y, found in enumerate(rows.values()):
                draw_estimate(axes, y, found[key], CURVE_COLOURS[(y + 1) % len(CURVE_COLOURS)])
            names = [literal(name, 24) for name in rows] if i % PANELS_IN_ROW == 0 else []
            axes.set_yticks(range(len(rows)) if names else [], names or None)
            axes.set(ylim=(len(rows) - 0.5, -0.5))
            axes.set_title(literal(title), fontsize="small")
            axes.locator_params(axis="x", nbins=4)
    return figure


def draw_estimate(axes: Any, y: float, estimate: Estimate, colour: Any) -> None:
    """Dot with a horizontal interval; nothing if the estimate is undefined."""
    if estimate.value is None:
        return
    axes.plot(estimate.value, y, "o", ms=4, color=colour)
    if estimate.low is not None:
        axes.plot([estimate.low, estimate.high], [y, y], color=colour, lw=1.2)


def intervals_figure(rows: Mapping[str, Mapping[str, Estimate]], titles: Mapping[str, str]) -> Figure:
    """Estimates with 95 % intervals by method, one panel for each figure of merit.

    Args:
        rows: Estimates by method and figure of merit, the run first; missing ones are undefined.
        titles: Titles of the figures of merit that are drawn.

    Returns:
        The figure.
    """
    lines = -(-len(titles) // PANELS_IN_ROW)
    columns = -(-len(titles) // lines)
    names = [textwrap.fill(literal(name, 60), 26) for name in rows]
    with style():
        figure = Figure(figsize=(1.7 + 1.75 * columns, lines * (0.34 * len(rows) + 0.5)), layout="constrained")
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for axes, (name, title) in zip(panels, titles.items(), strict=False):
            for place, row in enumerate(rows.values()):
                _interval(axes, place, row.get(name, Estimate(None)), BLUE if place == 0 else "0.25")
            axes.margins(x=0.16)
            axes.set(xlabel=title, ylim=(len(rows) - 0.5, -0.6))
            axes.set_yticks(range(len(rows)), names)
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]) if axes.lines else NullLocator())
            axes.grid(axis="y", color="0.92", lw=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
        for axes in panels[len(titles) :]:
            axes.remove()
    return figure


def _interval(axes: Axes, place: int, estimate: Estimate, colour: str) -> None:
    """Draw an estimate with its confidence interval."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None:
        middle = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center"}
        axes.text(0.5, place, "undefined", color="0.5", fontsize=6.5, backgroundcolor="white", **middle)
        return
    ends = [value if end is None else end for end in (low, high)]
    axes.plot(ends, [place, place], color=colour, lw=1.4, solid_capstyle="butt")
    axes.plot(value, place, "o", color=colour, ms=4)
    near = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 6.5}
    axes.annotate(f"{value:.3f}", (value, place), xytext=(0, 3), color=colour, **near)


def cumulative_figure(errors: Mapping[str, Float[np.ndarray, "N"]]) -> Figure:
    """Cumulative distribution of the errors of images by method.

    Args:
        errors: Errors of each method, px; NaN without ground truth.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH_IN * 1.3, 2.9), layout="constrained")
        axes = figure.subplots()
        for i, (name, values) in enumerate(errors.items()):
            ascending = np.sort(values[np.isfinite(values)])
            share = np.arange(ascending.size + 1) / max(ascending.size, 1)
            label = f"{literal(name, 30)}, mean {ascending.mean():.3g}"
            axes.step(
                np.append(ascending[:1], ascending),
                share,
                where="post",
                color=CURVE_COLOURS[i % len(CURVE_COLOURS)],
                label=label,
            )
        axes.set(xlim=(0, None), ylim=(0, 1.01), xlabel="mean error of an image / px", ylabel="fraction of images")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def by_image_figure(
    reference: str, first: Float[np.ndarray, "N"], others: Mapping[str, Float[np.ndarray, "N"]]
) -> Figure:
    """Error of each image by the first run and by the other runs.

    Args:
        reference: Name of the first run.
        first: Its errors, px.
        others: Errors of the other runs.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH_IN * 1.2, COLUMN_WIDTH_IN * 1.3), layout="constrained")
        axes = figure.subplots()
        end = 1.05 * max(np.nanmax(values) for values in (first, *others.values()))
        axes.plot([0, end], [0, end], color="0.55", lw=0.8, ls=":")
        for i, (name, values) in enumerate(others.items(), start=1):
            axes.plot(first, values, ".", ms=4, color=CURVE_COLOURS[i % len(CURVE_COLOURS)], label=literal(name, 30))
        axes.set(xlim=(0, end), ylim=(0, end), box_aspect=1)
        axes.set(xlabel=f"{literal(reference, 30)}: mean error / px", ylabel="other run: mean error / px")
        figure.legend(loc="outside lower center", ncols=2)
    return figure
