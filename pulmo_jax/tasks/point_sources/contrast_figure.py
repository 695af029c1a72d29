"""Figure of the fluxes that a search detects, by separation."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pulmo_jax.evaluation.photometry import delta_magnitude
from pulmo_jax.inference.contrast import Contrast
from pulmo_jax.reporting.figures import BLUE, GREEN, TEXT_WIDTH_IN, VERMILLION, style
from pulmo_jax.tasks.point_sources.drawing import add_arcsec_axis, write_labels
from pulmo_jax.tasks.point_sources.units import FluxScale
from pulmo_jax.types import PointSource


def contrast_curve(
    contrast: Contrast,
    sources: Sequence[PointSource],
    fluxes: FluxScale,
    pixel_scale: float | None,
    threshold: float = 5,
    calibrated: bool = True,
) -> Figure:
    """Draw the range of fluxes that injections are detected in, the detected sources, and the throughput.

    Args:
        contrast: Fluxes that are detected.
        sources: Detected sources.
        fluxes: Unit of the fluxes.
        pixel_scale: Pixel scale, arcsec per pixel, if known.
        threshold: Threshold, standard deviations.
        calibrated: Whether it applies to the significance in the empirical null, or to the theoretical SNR.

    Returns:
        The figure.
    """
    shown = shown_as(fluxes)
    r, sigma = contrast.separation_px, f"{threshold:g}σ"
    with style():
        figure = Figure(figsize=(TEXT_WIDTH_IN * 0.7, 4.8), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.8, 1])
        half, most = "half of the directions", "95 % of the directions"
        look: dict[str, Any] = {"color": BLUE, "lw": 0}
        upper.fill_between(r, shown(contrast.half_low), shown(contrast.half_high), alpha=0.13, **look)
        upper.fill_between(r, shown(contrast.most_low), shown(contrast.most_high), alpha=0.13, **look)
        upper.plot(r, shown(contrast.half_low), "o-", ms=2.5, color=BLUE, label=f"{sigma} limit in {half}")
        upper.plot(r, shown(contrast.most_low), "o--", ms=2.5, color=BLUE, label=f"{sigma} limit in {most}")
        upper.plot(
            r, shown(contrast.limit), color="black", lw=0.8, ls=":", label=f"{sigma} limit without self-subtraction"
        )
        flux_axis(upper, contrast, sources, shown, fluxes.magnitudes)
        plot_fluxes(upper, sources, shown)
        upper.set_ylabel("magnitude difference (mag)" if fluxes.magnitudes else fluxes.name)
        add_arcsec_axis(upper, pixel_scale)
        plot_throughput(lower, r, contrast.flux_throughput, contrast.flux_throughput_std)
        figure.align_ylabels([upper, lower])
        kind = "calibrated SNR (empirical null, Student's t)" if calibrated else "theoretical SNR, b / sqrt(a)"
        figure.legend(loc="outside lower center", ncols=2, title=f"{sigma}: {kind}", title_fontsize="medium")
    return figure


def shown_as(fluxes: FluxScale) -> Any:
    """Function from fluxes in units of the PSF to the values that are drawn."""

    def shown(flux: Any) -> np.ndarray:
        relative = np.asarray(np.asarray(flux, float) / fluxes.divisor)
        return delta_magnitude(relative) if fluxes.magnitudes else relative

    return shown


def flux_axis(axes: Axes, contrast: Contrast, sources: Sequence[PointSource], shown: Any, magnitudes: bool) -> None:
    """Scale the axis to the limits and the sources; the ranges extend to 100 times the highest limit at most."""
    flux, errors = np.array([(s.flux_debiased, longest_bar(s)) for s in sources]).reshape(-1, 2).T
    curves = np.concatenate([contrast.limit, contrast.half_low, contrast.most_low])
    known = curves[np.isfinite(curves) & (curves > 0)]
    top = [100 * known.max()] if known.size else []
    values = np.concatenate([known, top, flux + errors, np.maximum(flux - errors, flux / 3)])
    values = values[np.isfinite(values) & (values > 0)]
    farthest = np.nanmax([*contrast.separation_px, *(s.separation_px for s in sources), 1.0])
    axes.set_xlim(0, 1.04 * farthest)
    if values.size:
        if not magnitudes:
            axes.set_yscale("log")
        low, high = values.min() / 1.5, values.max() * 1.5
        axes.set_ylim(float(shown(low)), float(shown(high)))  # magnitudes decrease upwards
        if not magnitudes and high / low < 30:  # few powers of ten are visible
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())


def longest_bar(source: PointSource) -> float:
    errors = [source.flux_debiased_std, source.flux_debiased_std_empirical]
    return max((error for error in errors if math.isfinite(error)), default=0.0)


def plot_fluxes(axes: Axes, sources: Sequence[PointSource], shown: Any) -> None:
    """Draw the fluxes of the sources with their empirical errors; a flux that is not positive is marked at the edge."""
    positive = [s for s in sources if s.flux_debiased > 0]
    others = [s.separation_px for s in sources if not s.flux_debiased > 0]
    if positive:
        x = [s.separation_px for s in positive]
        flux = np.array([s.flux_debiased for s in positive])
        std = np.nan_to_num([s.flux_debiased_std_empirical for s in positive])
        ends = np.sort([shown(np.maximum(flux - std, flux / 100)), shown(flux + std)], axis=0)
        values = shown(flux)
        bars = np.abs(ends - values)
        axes.plot(x, values, "o", color=VERMILLION, ms=4.5, mec="white", mew=0.5, zorder=4, label="detection")
        axes.errorbar(
            x, values, yerr=bars, fmt="none", ecolor=VERMILLION, elinewidth=1, capsize=2, zorder=3,
            label="standard deviation, empirical",
        )  # fmt: skip
        places = list(zip(x, values.tolist(), strict=True))
        write_labels(axes, places, [str(s.label) for s in positive], [], (300.0, 130.0))
    if others:
        edge: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 4}
        label = "detection, flux not positive"
        axes.plot(others, [0] * len(others), "v", color=VERMILLION, mfc="white", label=label, **edge)


def plot_throughput(axes: Axes, separation_px: np.ndarray, throughput: np.ndarray, std: np.ndarray) -> None:
    axes.plot(separation_px, throughput, color=GREEN, label="flux throughput of one pass")
    axes.fill_between(
        separation_px, throughput - std, throughput + std, color=GREEN, alpha=0.2, lw=0, label="its scatter (1 std)"
    )
    axes.axhline(1, color="black", lw=0.8, ls=":")
    highest = (throughput + std)[np.isfinite(throughput + std)].max(initial=1)
    axes.set(xlabel="separation (px)", ylabel="throughput", ylim=(0, 1.08 * highest))
