"""Figures of the null map: its distribution, and its standard deviation by separation."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from pulmo_jax.reporting.figures import BLUE, COLUMN_WIDTH_IN, GREEN, TEXT_WIDTH_IN, VERMILLION, literal, style
from pulmo_jax.tasks.point_sources.drawing import CALIBRATED, THEORETICAL, Number, add_arcsec_axis

BIN_WIDTH = 0.25  # in SNR
HISTOGRAM_LIMITS = (5.0, 10.0)  # range of the upper end of the histogram of the null
MAX_QUANTILES = 1000


class Null(NamedTuple):
    """Values of a null SNR and how they are drawn.

    Attributes:
        name: Name of the SNR.
        values: Finite values.
        colour: Colour.
    """

    name: str
    values: Float[np.ndarray, "N"]
    colour: str

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation; NaN for fewer than two values."""
        if self.values.size < 2:
            return math.nan, math.nan
        return float(self.values.mean()), float(self.values.std(ddof=1))

    @property
    def label(self) -> str:
        """Name, standard deviation, and probability of a value above 3."""
        tail = f"{np.mean(self.values > 3):.2g}" if self.values.size else "undefined"
        return f"{self.name}: sd {self.moments[1]:.2f}, P(> 3) = {tail}"


def null_distribution(
    null_snr: Float[np.ndarray, "N"],
    snr: Float[np.ndarray, "M"] | None,
    title: str = "",
    n_independent: int | None = None,
    null_calibrated: Float[np.ndarray, "K"] | None = None,
) -> Figure:
    """Compare the SNR of the null map with the standard normal distribution: histogram and quantiles.

    Args:
        null_snr: Theoretical SNR of the null map (reversed angles); NaN is ignored.
        snr: SNR of the map itself, for comparison.
        title: Title of the figure.
        n_independent: Effective number of independent values, for a 95 % band of the quantiles; None: no band.
        null_calibrated: Calibrated SNR of the null map, if it is to be shown.

    Returns:
        The figure.
    """
    nulls = [Null(THEORETICAL, null_snr[np.isfinite(null_snr)], BLUE)]
    if null_calibrated is not None:
        nulls.append(Null(CALIBRATED, null_calibrated[np.isfinite(null_calibrated)], VERMILLION))
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN, 3.8), layout="constrained")
        if title:
            figure.suptitle(literal(title))
        counts, quantiles = figure.subplots(1, 2)
        _null_counts(counts, nulls, None if snr is None else snr[np.isfinite(snr)])
        _null_quantiles(quantiles, nulls, n_independent)
        for axes in (counts, quantiles):
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), markerscale=2)
    return figure


def _null_counts(axes: Axes, nulls: Sequence[Null], snr: np.ndarray | None) -> None:
    """Histogram; the outer bins include the values beyond."""
    first, values = nulls[0], np.concatenate([*(null.values for null in nulls), *([] if snr is None else [snr])])
    ends = [BIN_WIDTH * math.ceil(np.clip(end, *HISTOGRAM_LIMITS) / BIN_WIDTH) for end in _reach(values)]
    edges = np.linspace(-ends[0], ends[1], round(sum(ends) / BIN_WIDTH) + 1)
    axes.set(yscale="log", ylim=(0.5, max(values.size, 2)))  # before zero counts are drawn
    looks: list[dict[str, Any]] = [{"fill": True, "alpha": 0.35}, {"lw": 1.2}]
    for null, look in zip(nulls, looks, strict=False):
        counted = np.histogram(np.clip(null.values, edges[0], edges[-1]), edges)[0]
        axes.stairs(counted, edges, color=null.colour, label=null.label, **look)
    if snr is not None:
        n_snr = np.histogram(np.clip(snr, edges[0], edges[-1]), edges)[0]
        axes.stairs(n_snr, edges, color=GREEN, lw=1, label=f"SNR map, {snr.size:,} positions")
    x = np.linspace(edges[0], edges[-1], 401)
    expected = first.values.size * BIN_WIDTH
    label = f"standard normal: P(> 3) = {stats.norm.sf(3):.3g}"
    axes.plot(x, expected * stats.norm.pdf(x), color="black", lw=0.9, label=label)
    if first.moments[1] > 0:
        fitted = expected * stats.norm.pdf(x, *first.moments)
        axes.plot(x, fitted, color="black", lw=0.9, ls="--", label=_normal(first.moments))
    note = " (outer bins include overflow)" if (np.array(_reach(values)) > ends).any() else ""
    axes.set(xlabel=f"null SNR{note}", ylabel=f"positions (of {first.values.size:,}) per bin of {BIN_WIDTH}")
    axes.set_xlim(edges[0], edges[-1])


def _reach(values: np.ndarray) -> tuple[float, float]:
    """Largest distances of the values below and above 0."""
    return float((-values).max(initial=0)), float(values.max(initial=0))


def _normal(moments: tuple[float, float]) -> str:
    mean, std = moments
    return f"normal, mean {mean:.2f}, std {std:.2f}".replace("-", "−")


def _null_quantiles(axes: Axes, nulls: Sequence[Null], n_independent: int | None) -> None:
    first, values = nulls[0], np.concatenate([null.values for null in nulls])
    edge = max(1.08 * np.abs(_normal_quantiles(null.values.size)).max(initial=3) for null in nulls)
    line = np.array([-edge, edge])
    if n_independent is not None:
        band_z, low, high = _quantile_band(n_independent, edge)
        label = f"95 % band of {n_independent:,} independent values"
        axes.fill_between(band_z, low, high, color="0.5", alpha=0.3, lw=0, label=label)
    axes.plot(line, line, color="black", lw=0.9, label="standard normal")
    if (moments := first.moments)[1] > 0:
        axes.plot(line, moments[0] + moments[1] * line, color="black", lw=0.9, ls="--", label=_normal(moments))
    for null, marker in zip(nulls, (".", "x"), strict=False):
        shown, z = _quantiles_shown(null.values.size), _normal_quantiles(null.values.size)
        look: dict[str, Any] = {
            "color": null.colour,
            "ms": 3 if marker == "." else 2,
            "mew": 0.0 if marker == "." else 0.6,
        }
        axes.plot(z[shown], np.sort(null.values)[shown], marker, ls="none", label=null.name, **look)
    below, above = (max(edge, 1.08 * end) for end in _reach(values))
    axes.set(xlabel="quantile of the standard normal", ylabel="quantile of the null SNR", xlim=line)
    axes.set_ylim(-below, above)


def _normal_quantiles(n: int) -> Float[np.ndarray, "_"]:
    """Quantiles of the standard normal distribution at the fractions of n sorted values."""
    return stats.norm.ppf((np.arange(n) + 0.5) / n) if n else np.array([])


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
    """Draw the standard deviation of the theoretical null SNR by separation.

    Theory predicts 1. The calibrated SNR has 1 by construction, because it is relative to this curve.

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
        axes.axhline(1, color="black", lw=0.9, ls="--", label="1: as theory predicts")
        if np.isfinite(low).any():
            axes.fill_between(radius_px, low, high, color=BLUE, alpha=0.2, lw=0, label="95 % interval")
        axes.plot(radius_px, std, color=BLUE, marker="o", ms=3, label=THEORETICAL)
        values = np.concatenate([std, low, high])
        highest = values[np.isfinite(values)].max(initial=1)
        axes.set(xlabel="separation (px)", ylabel="sd of the null SNR", ylim=(0, 1.1 * highest))
        add_arcsec_axis(axes, pixel_scale)
        figure.legend(loc="outside lower center", ncols=2)
    return figure
