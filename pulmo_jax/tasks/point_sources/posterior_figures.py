"""Figure of the posterior of position and flux of a source."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.ndimage import gaussian_filter
from scipy.stats import norm

from pulmo_jax.methods.paco.posterior import Posterior
from pulmo_jax.reporting.figures import BLUE, COLUMN_WIDTH_IN, SKY, VERMILLION, style
from pulmo_jax.types import PointSource

NAMES = ("y (px)", "x (px)", "flux (PSF units)")
BINS = 40
LEVELS = (0.95, 0.68)  # enclosed probability of the contours
SMOOTHING_BINS = 1.5


def corner(posterior: Posterior, source: PointSource | None = None, truth: Sequence[float] | None = None) -> Figure:
    """Draw histograms of y, x and flux, and contours of each pair that enclose 68 and 95 % of the samples.

    Args:
        posterior: The samples.
        source: The fitted source; its values and empirical errors are drawn as normal distributions.
        truth: True (y, x, flux), if known.

    Returns:
        The figure.
    """
    samples = posterior.flat
    low, high = np.quantile(samples, [0.002, 0.998], axis=0)
    fit = None
    if source is not None:
        values = np.array([source.y, source.x, source.flux_debiased])
        empirical = source.flux_debiased_std_empirical
        flux_std = empirical if np.isfinite(empirical) else source.flux_debiased_std
        fit = values, np.array([source.y_std, source.x_std, flux_std])
    with style():
        side = COLUMN_WIDTH_IN * 1.35
        figure = Figure(figsize=(side, side), layout="constrained")
        panels = figure.subplots(3, 3, sharex="col")
        for row in range(3):
            for column in range(3):
                axes = panels[row, column]
                axes.set_xlim(low[column], high[column])
                if column > row:
                    axes.set_visible(False)
                elif column == row:
                    draw_histogram(axes, samples[:, row], None if fit is None else (fit[0][row], fit[1][row]))
                else:
                    draw_contours(axes, samples[:, column], samples[:, row])
                    axes.set_ylim(low[row], high[row])
                mark_truth(axes, truth, row, column)
                axes.tick_params(labelleft=column == 0 and row > 0, labelbottom=row == 2)
                axes.locator_params(nbins=3)
        for k in range(3):
            panels[2, k].set_xlabel(NAMES[k])
        for k in (1, 2):
            panels[k, 0].set_ylabel(NAMES[k])
        handles = [Line2D([], [], color=BLUE, label="posterior, 68 and 95 %")]
        if fit is not None:
            handles.append(Line2D([], [], color="0.3", ls="--", lw=1.0, label="fit, with empirical errors"))
        if truth is not None:
            handles.append(Line2D([], [], color=VERMILLION, lw=1.0, label="injected"))
        figure.legend(handles=handles, loc="outside upper right")
    return figure


def draw_histogram(axes: Axes, values: np.ndarray, fit: tuple[float, float] | None) -> None:
    """Draw the density of one parameter, and the normal distribution of its fit (value, standard deviation)."""
    axes.hist(values, BINS, density=True, color=SKY, histtype="stepfilled")
    axes.set_yticks([])
    if fit is not None and np.isfinite(fit[1]) and fit[1] > 0:
        low, high = axes.get_xlim()
        at = np.linspace(low, high, 200)
        axes.plot(at, norm.pdf(at, *fit), color="0.3", ls="--")


def draw_contours(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Draw contours of the smoothed histogram of two parameters that enclose the `LEVELS` of the samples."""
    counts, x_edges, y_edges = np.histogram2d(x, y, BINS)
    density = gaussian_filter(counts, SMOOTHING_BINS, mode="constant")
    ordered = np.sort(density.ravel())[::-1]
    enclosed = np.cumsum(ordered) / ordered.sum()
    levels = [ordered[np.searchsorted(enclosed, level)] for level in LEVELS]
    middles = [(edges[1:] + edges[:-1]) / 2 for edges in (x_edges, y_edges)]
    axes.plot(x, y, ".", color=SKY, ms=1, alpha=0.3, rasterized=True)
    axes.contour(*middles, density.T, levels=levels, colors=BLUE, linewidths=1.0)


def mark_truth(axes: Axes, truth: Sequence[float] | None, row: int, column: int) -> None:
    """Mark the true parameters with lines."""
    if truth is None or column > row:
        return
    axes.axvline(truth[column], color=VERMILLION, lw=1.0)
    if column < row:
        axes.axhline(truth[row], color=VERMILLION, lw=1.0)
