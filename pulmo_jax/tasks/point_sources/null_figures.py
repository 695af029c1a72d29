"""Figures of the null map: its distribution, and its standard deviation by separation."""

import math

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from pulmo_jax.reporting.figures import BLUE, COLUMN_WIDTH_IN, TEXT_WIDTH_IN, VERMILLION, literal, style
from pulmo_jax.tasks.point_sources.drawing import (
    Number,
    add_arcsec_axis,
)

BIN_WIDTH = 0.25  # in SNR
HISTOGRAM_LIMITS = (5.0, 10.0)  # range of the upper end of the histogram of the null
MAX_QUANTILES = 1000


def null_distribution(
    null_snr: Float[np.ndarray, "N"],
    snr: Float[np.ndarray, "M"] | None,
    title: str = "",
    n_independent: int | None = None,
) -> Figure:
    """Compare the SNR of the null map with the standard normal distribution: histogram and quantiles.

    Args:
        null_snr: SNR of the null map (reversed angles); NaN is ignored.
        snr: SNR of the map itself, for comparison.
        title: Title of the figure.
        n_independent: Effective number of independent values, for a 95 % band of the quantiles; None: no band.

    Returns:
        The figure.
    """
    null = null_snr[np.isfinite(null_snr)]
    mean, std = (float(null.mean()), float(null.std(ddof=1))) if null.size > 1 else (math.nan, math.nan)
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN * 0.86, 3.7), layout="constrained")
        if title:
            figure.suptitle(literal(title))
        counts, quantiles = figure.subplots(1, 2)
        _null_counts(counts, null, None if snr is None else snr[np.isfinite(snr)], (mean, std))
        _null_quantiles(quantiles, null, (mean, std), n_independent)
        for axes in (counts, quantiles):
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), markerscale=2)
    return figure


def _null_counts(axes: Axes, null: np.ndarray, snr: np.ndarray | None, moments: tuple[float, float]) -> None:
    """Histogram; the outer bins include the values beyond."""
    values = null if snr is None else np.concatenate([null, snr])
    ends = [BIN_WIDTH * math.ceil(np.clip(end, *HISTOGRAM_LIMITS) / BIN_WIDTH) for end in _reach(values)]
    edges = np.linspace(-ends[0], ends[1], round(sum(ends) / BIN_WIDTH) + 1)
    beyond_3 = f"{np.mean(null > 3):.2g}" if null.size else "undefined"
    label = f"null, {null.size:,} positions: P(> 3) = {beyond_3} (nominal {stats.norm.sf(3):.3g})"
    axes.set(yscale="log", ylim=(0.5, max(values.size, 2)))  # before zero counts are drawn
    n_null = np.histogram(np.clip(null, edges[0], edges[-1]), edges)[0]
    axes.stairs(n_null, edges, fill=True, color=BLUE, alpha=0.35, label=label)
    if snr is not None:
        n_snr = np.histogram(np.clip(snr, edges[0], edges[-1]), edges)[0]
        axes.stairs(n_snr, edges, color=VERMILLION, lw=1, label=f"SNR map, {snr.size:,} positions")
    x = np.linspace(edges[0], edges[-1], 401)
    expected = null.size * BIN_WIDTH
    axes.plot(x, expected * stats.norm.pdf(x), color="black", lw=0.9, label="standard normal")
    if moments[1] > 0:
        fitted = expected * stats.norm.pdf(x, *moments)
        axes.plot(x, fitted, color="black", lw=0.9, ls="--", label=_normal(moments))
    note = " (outer bins include overflow)" if (np.array(_reach(values)) > ends).any() else ""
    axes.set(xlabel=f"SNR{note}", ylabel=f"positions per bin of {BIN_WIDTH}", xlim=(edges[0], edges[-1]))


def _reach(values: np.ndarray) -> tuple[float, float]:
    """Largest distances of the values below and above 0."""
    return float((-values).max(initial=0)), float(values.max(initial=0))


def _normal(moments: tuple[float, float]) -> str:
    mean, std = moments
    return f"normal, mean {mean:.2f}, std {std:.2f}".replace("-", "−")


def _null_quantiles(axes: Axes, null: np.ndarray, moments: tuple[float, float], n_independent: int | None) -> None:
    share = (np.arange(null.size) + 0.5) / null.size if null.size else np.array([])
    z = stats.norm.ppf(share)
    shown = _quantiles_shown(null.size)
    edge = 1.08 * np.abs(z).max(initial=3)
    line = np.array([-edge, edge])
    if n_independent is not None:
        band_z, low, high = _quantile_band(n_independent, edge)
        label = f"95 % band of {n_independent:,} independent values"
        axes.fill_between(band_z, low, high, color="0.5", alpha=0.3, lw=0, label=label)
    axes.plot(line, line, color="black", lw=0.9, label="standard normal")
    if moments[1] > 0:
        axes.plot(line, moments[0] + moments[1] * line, color="black", lw=0.9, ls="--", label=_normal(moments))
    axes.plot(z[shown], np.sort(null)[shown], ".", color=BLUE, ms=3, mew=0, label="null")
    below, above = (max(edge, 1.08 * end) for end in _reach(null))
    axes.set(xlabel="quantile of the standard normal", ylabel="quantile of the null SNR", xlim=line)
    axes.set_ylim(-below, above)


def _quantiles_shown(n: int) -> Int[np.ndarray, "_"]:
    """Indices of the drawn quantiles: all in the tails, and evenly spaced ones between them."""
    if n <= MAX_QUANTILES:
        return np.arange(n)
    tail = MAX_QUANTILES // 4
    body = np.linspace(tail, n - tail - 1, MAX_QUANTILES - 2 * tail).round().astype(int)
    return np.concatenate([np.arange(tail), body, np.arange(n - tail, n)])


def _quantile_band(n: int, edge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Band between the 2.5 and 97.5 % quantiles of the order statistics of n standard normal values.

    The k-th of n uniform values is Beta(k, n + 1 - k) (David & Nagaraja, Order Statistics, 2003, eq. 2.1.5), also used
    for non-integer k = n p + 1/2 at the fraction p.
    """
    reach = min(edge, float(stats.norm.isf(0.5 / n)))
    z = np.linspace(-reach, reach, 201)
    k = n * stats.norm.cdf(z) + 0.5
    low, high = (stats.norm.ppf(stats.beta.ppf(q, k, n + 1 - k)) for q in (0.025, 0.975))
    return z, low, high


def null_by_radius(
    radius_px: Float[np.ndarray, "R"],
    std: Float[np.ndarray, "R"],
    low: Float[np.ndarray, "R"],
    high: Float[np.ndarray, "R"],
    pixel_scale: Number | None = None,
) -> Figure:
    """Draw the standard deviation of the null SNR by separation; theory predicts 1.

    Args:
        radius_px: Separations, px.
        std: Standard deviations.
        low: Lower limits of their 95 % intervals; NaN: none.
        high: Upper limits of their 95 % intervals; NaN: none.
        pixel_scale: Pixel scale, arcsec per pixel, if known.

    Returns:
        The figure.
    """
    with style():
        figure = Figure(figsize=(COLUMN_WIDTH_IN, 2.5), layout="constrained")
        axes = figure.subplots()
        axes.axhline(1, color="black", lw=0.9, ls="--", label="theory")
        if np.isfinite(low).any():
            axes.fill_between(radius_px, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
        axes.plot(radius_px, std, color=BLUE, marker="o", ms=3, label="null")
        values = np.concatenate([std, low, high])
        highest = values[np.isfinite(values)].max(initial=1)
        axes.set(xlabel="separation (px)", ylabel="std of the null SNR", ylim=(0, 1.1 * highest))
        add_arcsec_axis(axes, pixel_scale)
        figure.legend(loc="outside lower center", ncols=3)
    return figure
