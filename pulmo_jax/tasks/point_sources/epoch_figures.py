"""Figures of combined epochs: maps, SNR by epoch, tracks on the sky, and the noise.

Maps are drawn as they are stored, with y upwards; a compass shows north and east. Tracks are drawn with north up and
east to the left.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pulmo_jax.evaluation.field_threshold import FieldThreshold
from pulmo_jax.reporting.figures import (
    BLUE,
    COLUMN_WIDTH_IN,
    CURVE_COLOURS,
    ORANGE,
    SKY,
    TEXT_WIDTH_IN,
    literal,
    style,
)
from pulmo_jax.tasks.point_sources.drawing import (
    BACKGROUND,
    Number,
    Sky,
    add_compass,
    label_map_axes,
    write_labels,
)

MAX_COLUMNS = 5
SNR_LIMIT = 5.0
SHOWN_SAMPLES = 60
PANEL_PT = 120.0  # approximate side of a map, to place the numbers
EPOCH_TICKS = 4
LEGEND_IN = 0.8
MARKERS = ("o", "s", "^", "D", "v")  # as many as colours less one, so that both together rarely repeat
WHITE = [patheffects.withStroke(linewidth=2.2, foreground="white")]
MARK: dict[str, Any] = {"marker": "o", "ms": 9, "mfc": "none", "mec": "black", "mew": 0.9, "ls": "none"}
STAR: dict[str, Any] = {"marker": "+", "ms": 6, "mec": "black", "mew": 1.0, "ls": "none"}


def combined_maps(
    criterion: Float[np.ndarray, "H W"],
    snr_combined: Float[np.ndarray, "H W"],
    threshold: float,
    sky: Sky,
    places: Float[np.ndarray, "N 2"],
    names: tuple[str, str],
) -> Figure:
    """Draw the criterion and the SNR for a constant flux.

    Args:
        criterion: Map of the criterion.
        snr_combined: Map of the SNR for a constant flux.
        threshold: Threshold of the criterion.
        sky: Position of the star, pixel scale, and direction of north.
        places: Positions (y, x) of the sources, px, in the order of their numbers.
        names: Labels of the two maps.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN * 0.86, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        grey = {"bad": BACKGROUND}
        top = max(threshold, float(np.nanmax(criterion, initial=0)))
        image = left.imshow(
            criterion,
            origin="lower",
            interpolation="nearest",
            vmin=0,
            vmax=top,
            cmap=colormaps["viridis"].with_extremes(**grey),
        )
        bar = figure.colorbar(image, ax=left, location="bottom", label=names[0], shrink=0.85)
        bar.ax.axvline(threshold, color="white", lw=1.5)
        bar.ax.plot(threshold, 1.0, "v", color="black", ms=4, clip_on=False, transform=bar.ax.get_xaxis_transform())
        limit = max(SNR_LIMIT, math.ceil(float(np.nanmax(abs(snr_combined), initial=0))))
        image = right.imshow(
            snr_combined,
            origin="lower",
            interpolation="nearest",
            vmin=-limit,
            vmax=limit,
            cmap=colormaps["RdBu_r"].with_extremes(**grey),
        )
        figure.colorbar(image, ax=right, location="bottom", label=names[1], shrink=0.85)
        for axes in (left, right):
            _mark_map(axes, sky, places)
        label_map_axes([left, right], sky)
        add_compass(left, sky, [sky.centre, *((y, x) for y, x in places)])
    return figure


def _mark_map(axes: Axes, sky: Sky, places: Float[np.ndarray, "N 2"]) -> None:
    """Mark the star, and the sources with their numbers."""
    axes.autoscale(False)
    _mark(axes, [(sky.centre[1], sky.centre[0])], STAR)
    found = [(x, y) for y, x in places]
    _mark(axes, found, MARK)
    labels = [str(i + 1) for i in range(len(found))]
    write_labels(axes, found, labels, [(sky.centre[1], sky.centre[0])], (PANEL_PT, PANEL_PT))


def _mark(axes: Axes, points: Sequence[tuple[Number, Number]], look: dict[str, Any]) -> None:
    axes.plot(*np.reshape(points, (-1, 2)).T, **look, path_effects=WHITE)


def snr_by_epoch(
    snr: Float[np.ndarray, "N E"],
    labels: Sequence[str],
    combined: Sequence[float],
    tracks: Sequence[str],
    name: str = "SNR",
) -> Figure:
    """Draw the SNR in each epoch along each track, and the combined SNR.

    Args:
        snr: SNR of N tracks in E epochs.
        labels: Names of the epochs.
        combined: Combined SNR of each track.
        tracks: Names of the tracks.
        name: Kind of the SNR.

    Returns:
        The figure.
    """
    n_tracks, n_epochs = snr.shape
    width = max(COLUMN_WIDTH_IN, 0.5 * n_epochs + 1.5) + LEGEND_IN
    apart = min(0.12, 0.8 / n_tracks)
    with style():
        figure = Figure(figsize=(width, max(2.4, 0.16 * n_tracks + 1.0)), layout="constrained")
        axes = figure.subplots()
        for i, (values, together) in enumerate(zip(snr, combined, strict=True)):
            at = np.arange(n_epochs) + apart * (i - (n_tracks - 1) / 2)
            colour, marker = CURVE_COLOURS[i % len(CURVE_COLOURS)], MARKERS[i % len(MARKERS)]
            axes.errorbar(
                at, values, np.where(np.isfinite(values), 1.0, np.nan), fmt=marker, color=colour, lw=0.8, capsize=2,
                label=tracks[i],
            )  # fmt: skip
            axes.axhline(together, color=colour, ls="--", lw=0.9)
        axes.plot([], [], color="black", ls="--", lw=0.9, label="all epochs")
        axes.axhline(0, color="0.6", lw=0.6)
        axes.set_xticks(range(n_epochs), [literal(label) for label in labels], rotation=30, ha="right")
        axes.set(ylabel=name, xlim=(-0.6, n_epochs - 0.4))
        axes.margins(y=0.15)
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def epoch_maps(
    snr: Sequence[Float[np.ndarray, "H W"]],
    labels: Sequence[str],
    skies: Sequence[Sky],
    places: Float[np.ndarray, "N E 2"],
    name: str = "SNR of one epoch",
) -> Figure:
    """Draw the SNR map of each epoch with the positions of the tracks.

    Args:
        snr: SNR maps.
        labels: Names of the epochs.
        skies: Position of the star, pixel scale and direction of north of each map.
        places: Position (y, x) of N tracks in E epochs, px.
        name: Label of the colour bar: the kind of the SNR.

    Returns:
        The figure.
    """
    columns = min(MAX_COLUMNS, len(snr))
    rows = -(-len(snr) // columns)
    side = min(2.2, TEXT_WIDTH_IN / columns)
    turned = len({sky.north_deg for sky in skies}) > 1  # otherwise one compass is enough
    with style():
        figure = Figure(figsize=(max(columns * side, 2.6), rows * side * 1.12 + 0.8), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        shown = colormaps["RdBu_r"].with_extremes(bad=BACKGROUND)
        image = None
        for i, axes in enumerate(panels.flat):
            if i >= len(snr):
                axes.set_visible(False)
                continue
            image = axes.imshow(
                snr[i], origin="lower", interpolation="nearest", vmin=-SNR_LIMIT, vmax=SNR_LIMIT, cmap=shown
            )
            _mark_map(axes, skies[i], places[:, i])
            axes.set_title(literal(labels[i]))
            label_map_axes([axes], skies[i], EPOCH_TICKS)
            if i + columns < len(snr):
                axes.set_xlabel("")
            if turned or i == 0:
                add_compass(axes, skies[i], [skies[i].centre, *((y, x) for y, x in places[:, i])])
        if image is not None:
            figure.colorbar(image, ax=panels, location="bottom", label=name, shrink=0.5, extend="both")
    return figure


def tracks_on_sky(
    sky: Float[np.ndarray, "E 2"],
    labels: Sequence[str],
    orbit: Float[np.ndarray, "S 2"],
    samples: Float[np.ndarray, "M S 2"],
    sample_places: Float[np.ndarray, "N E 2"],
    unit: str,
) -> Figure:
    """Draw the best orbit of a source, posterior samples, and the positions at the dates.

    Args:
        sky: Position at each date. This and the following are (north, east) in `unit`.
        labels: Names of the epochs.
        orbit: S points along the best orbit.
        samples: S points along M sampled orbits.
        sample_places: Positions of N sampled orbits at the dates.
        unit: Unit of the positions.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN * 0.7, 3.9), layout="constrained")
        axes = figure.subplots()
        for path in samples[:SHOWN_SAMPLES]:
            axes.plot(path[:, 1], path[:, 0], color="0.6", lw=0.4, alpha=0.5)
        axes.plot(orbit[:, 1], orbit[:, 0], color=BLUE, lw=1.3)
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(sky)))
        for i, label in enumerate(labels):
            axes.plot(*sample_places[:, i, ::-1].T, ".", ms=1.5, color=colours[i], alpha=0.3)
            axes.plot(
                sky[i, 1], sky[i, 0], "o", ms=5, color=colours[i], mec="white", mew=0.6, label=literal(label), zorder=4
            )
        axes.plot(0, 0, **STAR)
        reach = 1.25 * float(np.hypot(*sky.T).max())
        spread = float(np.percentile(np.hypot(*samples.reshape(-1, 2).T), 90)) if samples.size else reach
        reach = float(np.clip(spread, reach, 2 * reach))
        axes.set(xlim=(reach, -reach), ylim=(-reach, reach), aspect="equal")
        axes.set(xlabel=f"ΔRA ({unit})", ylabel=f"ΔDec ({unit})")
        lines = [Line2D([], [], color=BLUE, label="best orbit")]
        lines += [Line2D([], [], color="0.6", lw=0.6, label="posterior samples")] if len(samples) else []
        places, _ = axes.get_legend_handles_labels()
        axes.legend(handles=[*lines, *places], loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def null_maxima(
    nulls: Sequence[FieldThreshold], names: Sequence[str], threshold: float, found: Sequence[float]
) -> Figure:
    """Draw histograms of the highest criterion in noise fields, with the threshold and the detections.

    Args:
        nulls: Noise fields of each kind, with the interval of their threshold.
        names: Names of the kinds.
        threshold: The threshold that is used.
        found: Criteria of the detections, or the highest one.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN * 0.6, 2.6), layout="constrained")
        axes = figure.subplots()
        maxima = np.concatenate([null.maxima for null in nulls])
        n = max(8, int(1.5 * np.sqrt(len(nulls[0].maxima))))
        bins = np.linspace(maxima.min(), maxima.max() + 1e-9, n + 1)
        for null, name, colour in zip(nulls, names, (SKY, ORANGE), strict=False):
            axes.hist(null.maxima, bins=bins, histtype="stepfilled", color=colour, alpha=0.45, label=name)
            low, high = max(null.low, null.maxima[0]), min(null.high, null.maxima[-1])
            axes.axvspan(low, high, color=colour, alpha=0.25, lw=0)
        axes.axvline(threshold, color="black", label="threshold")
        for i, value in enumerate(found):
            axes.axvline(value, color=BLUE, ls="--", label=None if i else "detection, or highest")
        axes.set(xlabel="highest criterion in a field", ylabel=f"noise fields (of {len(nulls[0].maxima)})")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    return figure
