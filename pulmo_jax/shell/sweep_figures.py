"""Comparison figure of a sweep: every measure against every swept key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from pulmo_jax.reporting.figures import CURVE_COLOURS, TEXT_WIDTH_IN, VERMILLION, literal, style

REPLICATE = "seed"  # the key over which means and standard deviations are taken
MOST_COLUMNS = 4
LOG_RATIO = 8  # ratio of positive values from which the axis is logarithmic
MOST_TICKS = 8
SHARES = ("AUROC", "AP")  # at most 1


@dataclass(frozen=True)
class Axis:
    """Axis of a swept key.

    Attributes:
        key: The key.
        x: Position of each job: its number or, for other values, the order of appearance.
        labels: Label of each position.
        log: Logarithmic axis.
    """

    key: str
    x: list[float]
    labels: dict[float, str]
    log: bool


def sweep_figure(swept: Mapping[str, Sequence[str]], measures: Mapping[str, Sequence[float | None]]) -> Figure:
    """Draw one row of panels per measure and one column per key.

    Dots are jobs, lines are means over seeds, and bars are one standard deviation.

    Args:
        swept: Values of each swept key in each job, as text.
        measures: Values of each measure in each job; None: unknown. The first measure is the objective, which is
            minimised; jobs without it are marked as failed.

    Returns:
        The figure.
    """
    keys = [key for key in swept if key != REPLICATE] or list(swept)
    lines = layout([(name, key) for name in measures for key in keys], len(keys))
    columns = max(map(len, lines))
    with style():
        width = TEXT_WIDTH_IN * max(0.45, min(1.0, columns / 3))
        figure = Figure(figsize=(width, 0.4 + 1.8 * len(lines)), layout="constrained")
        panels = figure.subplots(len(lines), columns, squeeze=False)
        for row, line in zip(panels, lines, strict=True):
            for axes, (name, key) in zip(row, line, strict=False):
                axis, series = axis_of(key, swept[key]), series_of(key, swept)
                first = name == next(iter(measures))
                _panel(axes, axis, series, name, measures[name], objective=first)
                if first and axes.get_legend_handles_labels()[0]:
                    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1.5)
            for axes in row[len(line) :]:
                axes.remove()
    return figure


def layout(panels: list[tuple[str, str]], keys: int) -> list[list[tuple[str, str]]]:
    """Arrange panels: rows per measure, wrapped for many keys; with one key, measures are side by side.

    Args:
        panels: (measure, key) of each panel.
        keys: Number of swept keys.

    Returns:
        Panels of each row.
    """
    size = len(panels) if keys == 1 else keys
    groups = [panels[i : i + size] for i in range(0, len(panels), size)]
    columns = MOST_COLUMNS - 1 if keys == 1 else MOST_COLUMNS
    return [group[i : i + columns] for group in groups for i in range(0, len(group), columns)]


def axis_of(key: str, values: Sequence[str]) -> Axis:
    """Make the axis of a swept key; other values than numbers are placed in order of appearance.

    Args:
        key: The key.
        values: Value in each job, as text.

    Returns:
        The axis.
    """
    try:
        x = [float(value) for value in values]
    except ValueError:
        places = {value: float(place) for place, value in enumerate(dict.fromkeys(values))}
        return Axis(key, [places[value] for value in values], {x: literal(v, 18) for v, x in places.items()}, log=False)
    log = min(x) > 0 and max(x) / min(x) >= LOG_RATIO
    return Axis(key, x, dict(sorted(zip(x, values, strict=True))), log)


def series_of(key: str, swept: Mapping[str, Sequence[str]]) -> list[str]:
    """Name the line of each job by its other swept keys, without the seed.

    Args:
        key: Key of the horizontal axis.
        swept: Values of each swept key in each job.

    Returns:
        Name for each job.
    """
    others = [other for other in swept if other not in (key, REPLICATE)]
    jobs = range(len(swept[key]))
    return [", ".join(f"{other.split('.')[-1]}={swept[other][job]}" for other in others) for job in jobs]


def _panel(
    axes: Axes, axis: Axis, series: Sequence[str], name: str, values: Sequence[float | None], objective: bool
) -> None:
    """Draw the panel of one measure against one key."""
    names = list(dict.fromkeys(series))
    few = len(names) <= len(CURVE_COLOURS) and any(series.count(one) > 1 for one in names)
    done = [job for job, value in enumerate(values) if value is not None]
    for place, one in enumerate(names if few else [""]):
        jobs = [job for job in done if series[job] == one or not few]
        x, y = np.array([axis.x[job] for job in jobs]), np.array([values[job] for job in jobs], float)
        colour = CURVE_COLOURS[place % len(CURVE_COLOURS)]
        axes.plot(x, y, "o", ms=3, mfc=colour, mec="none", alpha=0.45 if few else 0.8)
        if few and axis.key != REPLICATE:
            _means(axes, x, y, colour, literal(one, 40))
        elif axis.key == REPLICATE and len(y) > 1:
            axes.axhline(y.mean(), color=colour, lw=1)
            axes.axhspan(y.mean() - y.std(ddof=1), y.mean() + y.std(ddof=1), color=colour, alpha=0.15, lw=0)
    if objective:
        _mark(axes, axis, values, done)
    _scale(axes, axis)
    axes.set(xlabel=literal(axis.key, 30), ylabel=name)
    axes.ticklabel_format(axis="y", useOffset=False)
    bottom, top = axes.get_ylim()
    if name.endswith(SHARES) and top > 1:
        axes.set_ylim(bottom, 1 + 0.03 * (1 - bottom))


def _means(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    """Means over the jobs at each position, with one standard deviation if there are several."""
    places = np.unique(x)
    groups = [y[x == place] for place in places]
    spread = [group.std(ddof=1) if len(group) > 1 else np.nan for group in groups]
    look: dict[str, Any] = {"color": colour, "lw": 1, "marker": "o", "ms": 4, "elinewidth": 0.8, "capsize": 2}
    axes.errorbar(places, [group.mean() for group in groups], spread, label=label or None, **look)


def _mark(axes: Axes, axis: Axis, values: Sequence[float | None], done: Sequence[int]) -> None:
    """Mark the best job and the failed jobs."""
    if done:
        best = min(done, key=lambda job: values[job])  # pyright: ignore[reportArgumentType, reportCallIssue]
        ring: dict[str, Any] = {"ms": 8, "mfc": "none", "mec": "black", "mew": 0.8, "zorder": 5}
        axes.plot(axis.x[best], values[best], "o", label="lowest", **ring)  # pyright: ignore[reportArgumentType]
    failed = [axis.x[job] for job in range(len(values)) if job not in set(done)]
    if failed:
        at = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 5}
        axes.plot(failed, np.zeros(len(failed)), "x", color=VERMILLION, ms=5, label="not finished", **at)


def _scale(axes: Axes, axis: Axis) -> None:
    """Set the scale, limits and ticks of the horizontal axis."""
    places = list(axis.labels)
    if axis.log:
        axes.set_xscale("log")
        axes.set_xlim(min(places) / 1.3, max(places) * 1.3)
    elif len(places) > 1:
        margin = 0.12 * (max(places) - min(places))
        axes.set_xlim(min(places) - margin, max(places) + margin)
    if len(places) <= MOST_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(places, list(axis.labels.values()))
    if max(map(len, axis.labels.values())) > 6 and len(places) <= MOST_TICKS:
        axes.tick_params(axis="x", rotation=30)
