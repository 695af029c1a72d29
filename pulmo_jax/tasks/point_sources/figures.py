"""Figures of a search for point sources in a rotating stack: maps, the null, limits, and the method's inner parts.

Maps are drawn with y upwards. What is NaN is light grey in pictures, and left out of curves and statistics.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats

from pulmo_jax.reporting.figures import BLUE, COLUMN_WIDTH_IN, GREEN, TEXT_WIDTH_IN, VERMILLION, literal, style
from pulmo_jax.types import PointSource

BACKGROUND = "0.85"  # where there is no value
CYAN = "#00E5FF"
MAX_HEIGHT_IN = 8.0
MIN_PANEL_IN, MAX_PANEL_IN = 1.5, 2.9
TICKS_IN = 0.4  # beside a picture
SNR_LIMITS = (5.0, 6.0)  # between which the colours of an SNR map end: 5 is in full colour, or close to it
ROBUST_PERCENT = 99.5
BIN_WIDTH = 0.25  # of SNR
HISTOGRAM_LIMITS = (5.0, 10.0)  # between which the histogram of the null ends
MAX_QUANTILES = 1000
LABEL_PT, BESIDE_PT = 6.5, (9.0, 15.0)  # size of a source's number, and how far from the source it may stand

Number = float | int
DETECTION: dict[str, Any] = {"marker": "o", "ms": 9, "mfc": "none", "mec": "black", "mew": 0.9, "ls": "none"}
INJECTED: dict[str, Any] = {"marker": "s", "ms": 12, "mfc": "none", "mec": GREEN, "mew": 1.2, "ls": "none"}
STAR: dict[str, Any] = {"marker": "+", "ms": 6, "mec": "black", "mew": 1.0, "ls": "none"}
STAR_ON_DARK: dict[str, Any] = STAR | {"mec": "white"}
SOURCE_ON_DARK: dict[str, Any] = DETECTION | {"mec": CYAN}


def detection_maps(
    snr: Float[np.ndarray, "H W"],
    flux: Float[np.ndarray, "H W"],
    sources: Sequence[PointSource],
    centre: tuple[Number, Number],
    pixel_scale: Number | None,
    truth: Sequence[tuple[Number, Number, Number]] = (),
    snr_calibrated: Float[np.ndarray, "H W"] | None = None,
) -> Figure:
    """The maps of SNR and flux, and of calibrated SNR if given, with what was found and what had been injected.

    centre: (y, x) of the star. pixel_scale: arcsec per pixel, None if unknown. truth: (y, x, flux) of injected sources.
    Both maps of SNR are on one scale.
    """
    height, width = snr.shape
    snr_limit = _snr_limit([snr] if snr_calibrated is None else [snr, snr_calibrated])
    maps = [("SNR", snr, snr_limit), ("flux", flux, _flux_limit(flux))]
    if snr_calibrated is not None:
        maps.append(("calibrated SNR", snr_calibrated, snr_limit))
    with style():
        figure, panels, panel_in = _pictures(len(maps), height / width, 1.2)
        for axes, (name, values, limit) in zip(panels, maps, strict=True):
            image = _show(axes, values, _signed(limit), origin="lower")
            _colour_bar(figure, axes, image, name, signed=True)
            axes.set_xlabel("x (px)")
            _mark(axes, sources, centre, truth, (panel_in - TICKS_IN) * 72)
        _name_rows(panels)
        _scale_bar(panels[0], pixel_scale, [(s.y, s.x) for s in sources] + [(y, x) for y, x, _ in truth])
        looks = {"detection": DETECTION, "injected source": INJECTED, "star": STAR}
        shown = {"star"} | ({"detection"} if sources else set()) | ({"injected source"} if truth else set())
        handles = [Line2D([], [], label=name, **look) for name, look in looks.items() if name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _snr_limit(maps: Sequence[np.ndarray]) -> float:
    high = _percentile(np.abs(np.concatenate([values.ravel() for values in maps])), 99.9)
    return math.ceil(2 * float(np.clip(high, *SNR_LIMITS))) / 2


def _flux_limit(flux: np.ndarray) -> float:
    """Rounded up to two digits."""
    limit = _percentile(np.abs(flux), ROBUST_PERCENT)
    if limit == 0:
        return 1.0
    digit = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return math.ceil(limit / digit) * digit


def _percentile(values: np.ndarray, percent: float) -> float:
    """Of what is finite; 0 if nothing is."""
    kept = values[np.isfinite(values)]
    return float(np.percentile(kept, percent)) if kept.size else 0.0


def _signed(limit: float) -> ScalarMappable:
    return ScalarMappable(Normalize(-limit, limit), colormaps["RdBu_r"].with_extremes(bad=BACKGROUND))


def _pictures(n_panels: int, aspect: float, rest_in: float) -> tuple[Figure, list[Axes], float]:
    """Pictures in a row, or below each other if they are wide, and about how wide each is, with its labels.

    aspect: height / width of a picture; rest_in: the height that labels, bars and legends take.
    """
    in_a_row = aspect > 0.4
    n_rows, n_columns = (1, n_panels) if in_a_row else (n_panels, 1)
    widest = min(TEXT_WIDTH_IN / n_columns, MAX_PANEL_IN if in_a_row else TEXT_WIDTH_IN)
    panel_in = min(widest, max((MAX_HEIGHT_IN / n_rows - rest_in) / aspect + TICKS_IN, MIN_PANEL_IN))
    height_in = min(n_rows * ((panel_in - TICKS_IN) * aspect + rest_in), MAX_HEIGHT_IN)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.0, compress=True)
    figure = Figure(figsize=(n_columns * panel_in, height_in), layout=layout)
    return figure, list(figure.subplots(n_rows, n_columns, squeeze=False).flat), panel_in


def _name_rows(panels: Sequence[Axes]) -> None:
    """On the left alone."""
    for axes in panels:
        first = cast(SubplotSpec, axes.get_subplotspec()).is_first_col()
        axes.tick_params(labelleft=first)
        axes.set_ylabel("y (px)" if first else "")


def _show(axes: Axes, values: np.ndarray, scale: ScalarMappable, **how: Any) -> ScalarMappable:
    image = axes.imshow(values, norm=cast(Normalize, scale.norm), cmap=scale.cmap, **how)
    axes.autoscale(False)
    return image


def _colour_bar(
    figure: Figure, axes: Axes | Sequence[Axes], image: ScalarMappable, label: str, signed: bool = False
) -> None:
    """Pointed where values lie beyond the colours; of a signed scale both ends are named."""
    values = np.ma.masked_invalid(cast(np.ndarray, image.get_array())).compressed()
    low, high = image.get_clim()
    rounding = 1e-6 * (high - low)
    below, above = bool((values < low - rounding).any()), bool((values > high + rounding).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    shape: dict[str, Any] = {"aspect": 28, "pad": 0.02} if isinstance(axes, Axes) else {"aspect": 50, "pad": 0.05}
    where: dict[str, Any] = {"location": "bottom", "shrink": 0.85, "extend": extend} | shape
    bar = figure.colorbar(image, ax=axes, label=label, **where)
    if signed:
        bar.set_ticks([low, 0, high], labels=[f"−{high:.3g}", "0", f"{high:.3g}"])
        bar.set_ticks([low / 2, high / 2], minor=True)
    elif isinstance(image.norm, AsinhNorm):  # whose own ticks crowd around 0
        values = [float(f"{value:.2g}") for value in image.norm.inverse(np.linspace(0.02, 0.98, 5))]
        bar.set_ticks(values, labels=[f"{value:g}".replace("-", "−") for value in values])
        bar.minorticks_off()
    cast(Any, bar.outline).set_visible(False)


def _mark(
    axes: Axes,
    sources: Sequence[PointSource],
    centre: tuple[Number, Number],
    truth: Sequence[tuple[Number, Number, Number]],
    width_pt: float,
) -> None:
    """width_pt: about that of the panel, to place the labels by."""
    white = [patheffects.withStroke(linewidth=2.2, foreground="white")]
    star, injected, found = [(centre[1], centre[0])], [(x, y) for y, x, _ in truth], [(s.x, s.y) for s in sources]
    for places, look in ((star, STAR), (injected, INJECTED), (found, DETECTION)):
        (line,) = axes.plot(*np.reshape(places, (-1, 2)).T, **look, path_effects=white, clip_on=False)
        line.set_in_layout(False)  # which takes one without points to be at the figure's corner
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    size_pt = (width_pt, width_pt * (top - bottom) / (right - left))
    _write_labels(axes, found, [str(s.label) for s in sources], injected + star, size_pt)


def _write_labels(
    axes: Axes,
    places: Sequence[tuple[float, float]],
    labels: Sequence[str],
    others: Sequence[tuple[Number, Number]],
    size_pt: tuple[float, float],
) -> None:
    """Beside the places, clear of the others, on axes whose limits are set. All as (x, y)."""
    white = [patheffects.withStroke(linewidth=1.8, foreground="white")]
    how: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "path_effects": white}
    points = np.reshape([*places, *others], (-1, 2)).astype(float)
    points_pt = (axes.transScale + axes.transLimits).transform(points) * size_pt
    for place, label, offset in zip(places, labels, _label_offsets(points_pt, labels, size_pt), strict=True):
        axes.annotate(label, place, xytext=tuple(offset), fontsize=LABEL_PT, weight="bold", **how)


def _label_offsets(
    points: Float[np.ndarray, "M 2"], labels: Sequence[str], size: tuple[float, float]
) -> Float[np.ndarray, "N 2"]:
    """Where to write the labels of the first N of M points, from each: away from points, other labels and the edge.

    All in typographic points, from the lower left corner of a panel of this size.
    """
    angles = np.radians(np.arange(45, 405, 45))
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    taken, offsets = points, np.zeros((len(labels), 2))
    for i, label in enumerate(labels):
        longer = np.sign(ring.round(3)) * (LABEL_PT * 0.35 * (len(label) - 1), 0)
        candidates = np.concatenate([distance * ring + longer for distance in BESIDE_PT])
        places = points[i] + candidates
        others = np.delete(taken, i, axis=0)
        apart = np.hypot(*(places[:, None] - others[None]).T).min(axis=0, initial=np.inf)
        room = np.minimum(places, np.array(size) - places).min(axis=1)
        # Beyond some distance all are equally good, and the first is taken.
        best = np.argmax(np.minimum(apart, 1.8 * LABEL_PT) + 4 * np.minimum(room - LABEL_PT, 0))
        offsets[i] = candidates[best]
        taken = np.concatenate([taken, places[best : best + 1]])
    return offsets


def _scale_bar(axes: Axes, pixel_scale: Number | None, marks: Sequence[tuple[float, float]]) -> None:
    """In the corner that is farthest from any mark, (y, x)."""
    width, height = (abs(high - low) for low, high in (axes.get_xlim(), axes.get_ylim()))
    scale, unit = (1, "px") if pixel_scale is None else (pixel_scale, "arcsec")
    length = _round_length(width * scale / 3.5)
    share = length / scale / width
    middles = [(x, y) for y in (0.05, 0.9) for x in (0.05 + share / 2, 0.95 - share / 2)]
    at = np.array([(x / width, y / height) for y, x in marks]).reshape(-1, 2)
    apart = [np.hypot(*(at - middle).T).min(initial=np.inf) for middle in middles]
    x, y = middles[int(np.argmax(np.minimum(apart, 0.35)))]
    white = [patheffects.withStroke(linewidth=3, foreground="white")]
    line: dict[str, Any] = {"color": "black", "lw": 1.5, "solid_capstyle": "butt", "transform": axes.transAxes}
    axes.plot([x - share / 2, x + share / 2], [y, y], **line, path_effects=white)
    above: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 6}
    axes.annotate(f"{length:g} {unit}", (x, y), xycoords="axes fraction", **above, path_effects=white)


def _round_length(longest: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not longer."""
    power = 10.0 ** math.floor(math.log10(longest))
    return power * max(digit for digit in (1, 2, 5) if digit * power <= longest * (1 + 1e-9))


def null_distribution(
    null_snr: Float[np.ndarray, "N"],
    snr: Float[np.ndarray, "M"] | None,
    title: str = "",
    n_independent: int | None = None,
) -> Figure:
    """The SNR where there is no source (angles reversed) beside the standard normal: counts, and quantiles.

    snr: that of the map itself, for comparison. n_independent: how many independent values the null is worth, for a
    95 % band of what as many standard normal values give at each quantile; None for no band.
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
    """Counts in bins; the outer ones hold what lies beyond."""
    values = null if snr is None else np.concatenate([null, snr])
    ends = [BIN_WIDTH * math.ceil(np.clip(end, *HISTOGRAM_LIMITS) / BIN_WIDTH) for end in _reach(values)]
    edges = np.linspace(-ends[0], ends[1], round(sum(ends) / BIN_WIDTH) + 1)
    beyond_3 = f"{np.mean(null > 3):.2g}" if null.size else "undefined"
    label = f"null, {null.size:,} positions: P(> 3) = {beyond_3} (nominal {stats.norm.sf(3):.3g})"
    axes.set(yscale="log", ylim=(0.5, max(values.size, 2)))  # before there is anything that has no logarithm
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
    """How far they go below and above 0."""
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
    """All in the tails, and as many as can be told apart between them."""
    if n <= MAX_QUANTILES:
        return np.arange(n)
    tail = MAX_QUANTILES // 4
    body = np.linspace(tail, n - tail - 1, MAX_QUANTILES - 2 * tail).round().astype(int)
    return np.concatenate([np.arange(tail), body, np.arange(n - tail, n)])


def _quantile_band(n: int, edge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Between the 2.5 and 97.5 % quantiles of the order statistics of n standard normal values, as far as they reach.

    The k-th of n uniform values is Beta(k, n + 1 - k) (David & Nagaraja, Order Statistics, 2003, eq. 2.1.5), here
    with k between integers too: k = n p + 1/2 at the share p.
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
    """The standard deviation of the null SNR by separation, which is 1 where the method's own noise is right.

    low, high: 95 % interval of it; NaN for none.
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
        _arcsec_axis(axes, pixel_scale)
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _arcsec_axis(axes: Axes, pixel_scale: Number | None) -> None:
    """Above the panel."""
    if pixel_scale is not None:
        both_ways = (lambda px: np.multiply(px, pixel_scale), lambda arcsec: np.divide(arcsec, pixel_scale))
        above = axes.secondary_xaxis("top", functions=both_ways)
        above.set_xlabel("separation (arcsec)")


def contrast_curve(
    separation_px: Float[np.ndarray, "R"],
    limit: Float[np.ndarray, "R"],
    limit_corrected: Float[np.ndarray, "R"],
    throughput: Float[np.ndarray, "R"],
    throughput_std: Float[np.ndarray, "R"],
    sources: Sequence[PointSource],
    pixel_scale: Number | None,
    unit: str,
    threshold: Number = 5,
) -> Figure:
    """The faintest flux that the search would find, by separation, what was found, and what it keeps of a source.

    limit: threshold / sqrt(a); limit_corrected: the same divided by the throughput, the share of an injected flux that
    one pass gives back; throughput_std: its scatter between positions. unit: of all fluxes.
    """
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN * 0.7, 4.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        sigma = f"{threshold:g}σ"
        upper.plot(separation_px, limit, color=BLUE, ls="--", label=f"{sigma} limit, uncorrected")
        upper.plot(separation_px, limit_corrected, color=BLUE, label=f"{sigma} limit, divided by the throughput")
        _limit_axes(upper, separation_px, [limit, limit_corrected], sources)
        _plot_fluxes(upper, sources)
        upper.set_ylabel(f"flux ({literal(unit)})")
        _arcsec_axis(upper, pixel_scale)
        _plot_throughput(lower, separation_px, throughput, throughput_std)
        figure.align_ylabels([upper, lower])
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _limit_axes(
    axes: Axes, separation_px: np.ndarray, curves: Sequence[np.ndarray], sources: Sequence[PointSource]
) -> None:
    """Logarithmic in flux, holding all that is positive, but of an error bar no more than down to a third."""
    fluxes, errors = np.array([(s.flux_debiased, _longest_bar(s)) for s in sources]).reshape(-1, 2).T
    values = np.concatenate([*curves, fluxes + errors, np.maximum(fluxes - errors, fluxes / 3)])
    values = values[np.isfinite(values) & (values > 0)]
    axes.set_yscale("log")
    if values.size:
        low, high = values.min() / 1.5, values.max() * 1.5
        axes.set_ylim(low, high)
        if high / low < 30:  # few powers of ten are in sight
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    farthest = np.nanmax([*separation_px, *(s.separation_px for s in sources), 1.0])
    axes.set_xlim(0, 1.04 * farthest)


def _longest_bar(source: PointSource) -> float:
    errors = [source.flux_debiased_std, source.flux_debiased_std_empirical]
    return max((error for error in errors if math.isfinite(error)), default=0.0)


def _plot_fluxes(axes: Axes, sources: Sequence[PointSource]) -> None:
    """With the error that blank positions show as a thin bar with caps on the likelihood's thick one."""
    positive = [s for s in sources if s.flux_debiased > 0]
    others = [s.separation_px for s in sources if not s.flux_debiased > 0]
    if positive:
        x, flux = [s.separation_px for s in positive], [s.flux_debiased for s in positive]
        likely, blank = [s.flux_debiased_std for s in positive], [s.flux_debiased_std_empirical for s in positive]
        bar: dict[str, Any] = {"fmt": "none", "ecolor": VERMILLION, "zorder": 3}
        axes.plot(x, flux, "o", color=VERMILLION, ms=4.5, mec="white", mew=0.5, zorder=4, label="detection")
        axes.errorbar(x, flux, yerr=likely, elinewidth=2.4, label="flux std, likelihood", **bar)
        axes.errorbar(x, flux, yerr=blank, elinewidth=0.8, capsize=2, label="flux std, blank positions", **bar)
        places = list(zip(x, flux, strict=True))
        _write_labels(axes, places, [str(s.label) for s in positive], [], (300.0, 130.0))
    if others:
        edge: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 4}
        label = "detection, flux not positive"
        axes.plot(others, [0] * len(others), "v", color=VERMILLION, mfc="white", label=label, **edge)


def _plot_throughput(axes: Axes, separation_px: np.ndarray, throughput: np.ndarray, std: np.ndarray) -> None:
    label = "scatter of the throughput (1 std)"
    axes.plot(separation_px, throughput, color=GREEN, label="throughput")
    axes.fill_between(separation_px, throughput - std, throughput + std, color=GREEN, alpha=0.2, lw=0, label=label)
    axes.axhline(1, color="black", lw=0.8, ls=":")
    highest = (throughput + std)[np.isfinite(throughput + std)].max(initial=1)
    axes.set(xlabel="separation (px)", ylabel="throughput", ylim=(0, 1.08 * highest))


def patch_statistics(
    mean: Float[np.ndarray, "h w"],
    covariance: Float[np.ndarray, "P P"],
    shrunk: Float[np.ndarray, "P P"],
    shrinkage: Number,
    offsets: Int[np.ndarray, "P 2"],
) -> Figure:
    """What is learned of one patch: its mean as a picture, and its covariances, before and after, as correlations.

    offsets: (dy, dx) of the footprint's pixels from its middle; mean: on the smallest rectangle that holds them.
    """
    low, high = offsets.min(axis=0), offsets.max(axis=0)
    if mean.shape != tuple(high - low + 1):
        raise ValueError(f"The mean is {mean.shape}, but its footprint spans {tuple(int(n) for n in high - low + 1)}")
    patch = np.full(mean.shape, np.nan)
    rows, columns = (offsets - low).T
    patch[rows, columns] = mean[rows, columns]
    with style():
        figure, (left, *others), _ = _pictures(3, 1.0, 1.2)
        viridis = colormaps["viridis"].with_extremes(bad=BACKGROUND)
        scale = ScalarMappable(Normalize(*_limits(patch, 0.0, 100.0)), viridis)
        extent = (low[1] - 0.5, high[1] + 0.5, low[0] - 0.5, high[0] + 0.5)
        _colour_bar(figure, left, _show(left, patch, scale, origin="lower", extent=extent), "pixel value")
        left.set(title="mean $m$", xlabel="dx (px)", ylabel="dy (px)")
        names = ("sample covariance $S$", f"shrunk covariance $C$, $\\hat\\rho$ = {shrinkage:.3g}")
        for axes, matrix, name in zip(others, (covariance, shrunk), names, strict=True):
            image = _show(axes, _correlation(matrix), _signed(1.0))
            _colour_bar(figure, axes, image, "correlation", signed=True)
            axes.set(title=name, xlabel="pixel of the patch")
        others[1].tick_params(labelleft=False)
    return figure


def _correlation(covariance: np.ndarray) -> Float[np.ndarray, "P P"]:
    """NaN where a pixel is constant."""
    variance = np.diag(covariance)
    std = np.sqrt(np.where(variance > 0, variance, np.nan))
    return covariance / std[:, None] / std


def _limits(values: np.ndarray, low_percent: float, high_percent: float) -> tuple[float, float]:
    low, high = _percentile(values, low_percent), _percentile(values, high_percent)
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def likelihood_surface(
    y: Float[np.ndarray, "n"], x: Float[np.ndarray, "m"], surface: Float[np.ndarray, "n m"], source: PointSource
) -> Figure:
    """The log-likelihood of a source's place, less its maximum, regions of 1, 2 and 3 std, and the estimate's errors.

    y, x: in px, ascending. A region holds the true place as often as k std hold that of one normal parameter; for two
    parameters it is bounded by -chi2.ppf(that share, 2) / 2 (Wilks, Ann. Math. Stat. 9, 1938).
    """
    drops = stats.chi2.ppf(1 - 2 * stats.norm.sf([1, 2, 3]), 2) / 2
    values = np.ma.masked_invalid(surface)
    with style():
        height_in = np.clip((COLUMN_WIDTH_IN - 0.6) * np.ptp(y) / np.ptp(x), 1, 5) + 1.1
        figure = Figure(figsize=(COLUMN_WIDTH_IN, height_in), layout="constrained")
        axes = figure.subplots()
        if values.count():
            tints = [(BLUE, alpha) for alpha in (0.12, 0.28, 0.5)]
            axes.contourf(x, y, values, levels=np.sort(-drops), colors=tints, extend="max")
        for k, drop, dashes in zip((1, 2, 3), drops, ("-", "--", ":"), strict=True):
            if values.count() and values.min() < -drop < values.max():
                axes.contour(x, y, values, levels=[-drop], colors=[BLUE], linewidths=0.9, linestyles=[dashes])
                axes.plot([], [], color=BLUE, lw=0.9, ls=dashes, label=f"{k} σ, Δ ln L = −{drop:.2f}")
        _plot_estimate(axes, source, drops[0])
        axes.set(xlabel="x (px)", ylabel="y (px)", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal")
        axes.locator_params(nbins=5)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _plot_estimate(axes: Axes, source: PointSource, drop: float) -> None:
    """drop: of the log-likelihood, to the edge of the ellipse."""
    bars: dict[str, Any] = {"fmt": "o", "ms": 3.5, "color": VERMILLION, "elinewidth": 1, "capsize": 2, "zorder": 4}
    axes.errorbar(source.x, source.y, source.y_std, source.x_std, label="estimate ± 1 std of each", **bars)
    width, height = (2 * math.sqrt(2 * drop) * std for std in (source.x_std, source.y_std))
    look: dict[str, Any] = {"color": VERMILLION, "lw": 0.9, "ls": "-."}
    axes.add_patch(Ellipse((source.x, source.y), width, height, fill=False, zorder=4, **look))
    axes.plot([], [], label="1 σ region of these errors", **look)


def shown_frames(n_frames: int, n_shown: int = 4) -> Int[np.ndarray, "_"]:
    """Which frames of a sequence `frames_strip` shows: from the first to the last, evenly, all if they are fewer."""
    return np.unique(np.linspace(0, n_frames - 1, min(n_shown, n_frames)).round().astype(int))


def frames_strip(
    cube: Float[np.ndarray, "T H W"],
    angles_deg: Float[np.ndarray, "T"],
    centre: tuple[Number, Number],
    positions: Float[np.ndarray, "n 2"] | None = None,
    n_frames: int = 4,
) -> Figure:
    """Some frames of the sequence on one asinh scale, with a cross at the star and a circle where a source stands.

    positions: (y, x) of the source in each of shown_frames(T, n_frames).
    """
    shown = shown_frames(len(cube), n_frames)
    if positions is not None and len(positions) != len(shown):
        raise ValueError(f"{len(positions)} positions are given for {len(shown)} frames: one for each of {shown}")
    low, high = _limits(cube[shown], 100 - ROBUST_PERCENT, ROBUST_PERCENT)
    # A star's halo is a thousand times what surrounds it: linear up to the typical value, and logarithmic from there.
    typical = _percentile(np.abs(cube[shown]), 50.0) or high - low
    scale = ScalarMappable(AsinhNorm(typical, low, high), colormaps["inferno"].with_extremes(bad=BACKGROUND))
    black = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    with style():
        figure, panels, _ = _pictures(len(shown), cube.shape[1] / cube.shape[2], 1.2)
        for i, axes in zip(shown, panels, strict=True):
            _show(axes, cube[i], scale, origin="lower")
            axes.plot(centre[1], centre[0], **STAR_ON_DARK, path_effects=black)
            axes.set_title(f"frame {i}\n{angles_deg[i]:.1f}°".replace("-", "−"))
            axes.set_xlabel("x (px)")
        if positions is not None:
            for axes, (y, x) in zip(panels, positions, strict=True):
                axes.plot(x, y, **SOURCE_ON_DARK, path_effects=black)
        _name_rows(panels)
        scale.set_array(cube[shown].ravel())
        _colour_bar(figure, panels, scale, "pixel value (asinh scale)")
    return figure
