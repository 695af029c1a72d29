"""Figures of a search for point sources: maps, detection limits, frames, patch statistics, likelihood.

Maps are drawn as they are stored, with y upwards; a compass shows north and east. NaN is light grey in images, and
omitted from curves and statistics.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from scipy import stats

from pulmo_jax.reporting.figures import BLUE, COLUMN_WIDTH_IN, GREEN, VERMILLION, style
from pulmo_jax.tasks.point_sources.drawing import (
    BACKGROUND,
    CALIBRATED,
    THEORETICAL,
    TICKS_IN,
    Number,
    Sky,
    add_colour_bar,
    add_compass,
    image_panels,
    label_map_axes,
    percentile,
    show_image,
    signed_scale,
    write_labels,
)
from pulmo_jax.types import PointSource

CYAN = "#00E5FF"
SNR_LIMITS = (5.0, 6.0)  # range of the colour limit of SNR maps, so that an SNR of 5 has nearly full colour
ROBUST_PERCENT = 99.5
ONE_PASS_FLUX, ONE_PASS_CONTRAST = "one-pass flux\n(PSF units)", "one-pass contrast\n(source / star)"
DETECTION: dict[str, Any] = {"marker": "o", "ms": 9, "mfc": "none", "mec": "black", "mew": 0.9, "ls": "none"}
INJECTED: dict[str, Any] = {"marker": "s", "ms": 12, "mfc": "none", "mec": GREEN, "mew": 1.2, "ls": "none"}
STAR: dict[str, Any] = {"marker": "+", "ms": 6, "mec": "black", "mew": 1.0, "ls": "none"}
STAR_ON_DARK: dict[str, Any] = STAR | {"mec": "white"}
SOURCE_ON_DARK: dict[str, Any] = DETECTION | {"mec": CYAN}


def detection_maps(
    snr: Float[np.ndarray, "H W"],
    flux: Float[np.ndarray, "H W"],
    sources: Sequence[PointSource],
    sky: Sky,
    truth: Sequence[tuple[Number, Number, Number]] = (),
    snr_calibrated: Float[np.ndarray, "H W"] | None = None,
    flux_name: str = ONE_PASS_FLUX,
) -> Figure:
    """Draw the maps of SNR and flux with detected and injected sources.

    Args:
        snr: Map of the theoretical SNR b / sqrt(a).
        flux: Flux map, in the unit that `flux_name` states.
        sources: Detected sources.
        sky: Position of the star, pixel scale, and direction of north.
        truth: Injected sources (y, x, flux).
        snr_calibrated: Map of the calibrated SNR, drawn on the scale of the SNR map.
        flux_name: Label of the flux map, with the unit.

    Returns:
        The figure.
    """
    height, width = snr.shape
    snr_limit = _snr_limit([snr] if snr_calibrated is None else [snr, snr_calibrated])
    maps = [(THEORETICAL.replace("SNR ", "SNR\n"), snr, snr_limit)]
    if snr_calibrated is not None:
        maps.append((CALIBRATED.replace("calibrated ", "calibrated SNR\n"), snr_calibrated, snr_limit))
    maps.append((flux_name, flux, _flux_limit(flux)))
    marks = [sky.centre, *((s.y, s.x) for s in sources), *((y, x) for y, x, _ in truth)]
    with style():
        figure, panels, panel_in = image_panels(len(maps), height / width, 1.3)
        for axes, (name, values, limit) in zip(panels, maps, strict=True):
            image = show_image(axes, values, signed_scale(limit), origin="lower")
            add_colour_bar(figure, axes, image, name, signed=True)
            _mark(axes, sources, sky.centre, truth, (panel_in - TICKS_IN) * 72)
        label_map_axes(panels, sky)
        add_compass(panels[0], sky, marks)
        looks = {"detection": DETECTION, "injected source": INJECTED, "star": STAR}
        shown = {"star"} | ({"detection"} if sources else set()) | ({"injected source"} if truth else set())
        handles = [Line2D([], [], label=name, **look) for name, look in looks.items() if name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _snr_limit(maps: Sequence[np.ndarray]) -> float:
    high = percentile(np.abs(np.concatenate([values.ravel() for values in maps])), 99.9)
    return math.ceil(2 * float(np.clip(high, *SNR_LIMITS))) / 2


def _flux_limit(flux: np.ndarray) -> float:
    """Colour limit of a flux map, rounded up to two digits."""
    limit = percentile(np.abs(flux), ROBUST_PERCENT)
    if limit == 0:
        return 1.0
    digit = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return math.ceil(limit / digit) * digit


def _mark(
    axes: Axes,
    sources: Sequence[PointSource],
    centre: tuple[Number, Number],
    truth: Sequence[tuple[Number, Number, Number]],
    width_pt: float,
) -> None:
    """Mark star, injected and detected sources; width_pt is the approximate panel width, for label placement."""
    white = [patheffects.withStroke(linewidth=2.2, foreground="white")]
    star, injected, found = [(centre[1], centre[0])], [(x, y) for y, x, _ in truth], [(s.x, s.y) for s in sources]
    for places, look in ((star, STAR), (injected, INJECTED), (found, DETECTION)):
        (line,) = axes.plot(*np.reshape(places, (-1, 2)).T, **look, path_effects=white, clip_on=False)
        line.set_in_layout(False)  # the layout would place an empty line at the corner of the figure
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    size_pt = (width_pt, width_pt * (top - bottom) / (right - left))
    write_labels(axes, found, [str(s.label) for s in sources], injected + star, size_pt)


def patch_statistics(
    mean: Float[np.ndarray, "h w"],
    covariance: Float[np.ndarray, "P P"],
    shrunk: Float[np.ndarray, "P P"],
    shrinkage: Number,
    offsets: Int[np.ndarray, "P 2"],
) -> Figure:
    """Draw the statistics of one patch: its mean, and its sample and shrunk covariance as correlations.

    Args:
        mean: Mean on the bounding box of the patch.
        covariance: Sample covariance.
        shrunk: Shrunk covariance.
        shrinkage: Weight of the diagonal.
        offsets: Offsets (dy, dx) of the pixels from the centre of the patch.

    Returns:
        The figure.

    Raises:
        ValueError: If the mean does not fit the offsets.
    """
    low, high = offsets.min(axis=0), offsets.max(axis=0)
    if mean.shape != tuple(high - low + 1):
        raise ValueError(f"The mean is {mean.shape}, but its footprint spans {tuple(int(n) for n in high - low + 1)}")
    patch = np.full(mean.shape, np.nan)
    rows, columns = (offsets - low).T
    patch[rows, columns] = mean[rows, columns]
    with style():
        figure, (left, *others), _ = image_panels(3, 1.0, 1.2)
        viridis = colormaps["viridis"].with_extremes(bad=BACKGROUND)
        scale = ScalarMappable(Normalize(*_limits(patch, 0.0, 100.0)), viridis)
        extent = (low[1] - 0.5, high[1] + 0.5, low[0] - 0.5, high[0] + 0.5)
        add_colour_bar(figure, left, show_image(left, patch, scale, origin="lower", extent=extent), "pixel value")
        left.set(title="mean $m$", xlabel="dx (px)", ylabel="dy (px)")
        names = ("sample covariance $S$", f"shrunk covariance $C$, $\\hat\\rho$ = {shrinkage:.3g}")
        for axes, matrix, name in zip(others, (covariance, shrunk), names, strict=True):
            image = show_image(axes, _correlation(matrix), signed_scale(1.0))
            add_colour_bar(figure, axes, image, "correlation", signed=True)
            axes.set(title=name, xlabel="pixel of the patch")
        others[1].tick_params(labelleft=False)
    return figure


def _correlation(covariance: np.ndarray) -> Float[np.ndarray, "P P"]:
    """Correlation matrix; NaN for constant pixels."""
    variance = np.diag(covariance)
    std = np.sqrt(np.where(variance > 0, variance, np.nan))
    return covariance / std[:, None] / std


def _limits(values: np.ndarray, low_percent: float, high_percent: float) -> tuple[float, float]:
    low, high = percentile(values, low_percent), percentile(values, high_percent)
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def likelihood_surface(
    y: Float[np.ndarray, "n"], x: Float[np.ndarray, "m"], surface: Float[np.ndarray, "n m"], source: PointSource
) -> Figure:
    """Draw the log-likelihood of the position of a source, confidence regions, and the errors of the estimate.

    The k-sigma region has the coverage of k standard deviations of a normal parameter; for two parameters its boundary
    is at -chi2.ppf(coverage, 2) / 2 (Wilks, Ann. Math. Stat. 9, 1938).

    Args:
        y: Ascending positions, px.
        x: Ascending positions, px.
        surface: Log-likelihood relative to its maximum.
        source: The estimate.

    Returns:
        The figure.
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
    """Draw the estimate with its errors; drop is the decrease of the log-likelihood at the ellipse."""
    bars: dict[str, Any] = {"fmt": "o", "ms": 3.5, "color": VERMILLION, "elinewidth": 1, "capsize": 2, "zorder": 4}
    axes.errorbar(source.x, source.y, source.y_std, source.x_std, label="estimate ± 1 std of each", **bars)
    width, height = (2 * math.sqrt(2 * drop) * std for std in (source.x_std, source.y_std))
    look: dict[str, Any] = {"color": VERMILLION, "lw": 0.9, "ls": "-."}
    axes.add_patch(Ellipse((source.x, source.y), width, height, fill=False, zorder=4, **look))
    axes.plot([], [], label="1 σ region of these errors", **look)


def shown_frames(n_frames: int, n_shown: int = 4) -> Int[np.ndarray, "_"]:
    """Indices of the evenly spaced frames shown by `frames_strip`."""
    return np.unique(np.linspace(0, n_frames - 1, min(n_shown, n_frames)).round().astype(int))


def frames_strip(
    cube: Float[np.ndarray, "T H W"],
    angles_deg: Float[np.ndarray, "T"],
    centre: tuple[Number, Number],
    positions: Float[np.ndarray, "n 2"] | None = None,
    n_frames: int = 4,
) -> Figure:
    """Draw some frames of a stack on a common asinh scale, with the star and a source.

    Args:
        cube: Frames.
        angles_deg: Rotation angle of each frame, degrees.
        centre: Position (y, x) of the star, px.
        positions: Position (y, x) of the source in each frame of `shown_frames(T, n_frames)`, px.
        n_frames: Maximum number of frames.

    Returns:
        The figure.

    Raises:
        ValueError: If the number of positions differs from the number of drawn frames.
    """
    shown = shown_frames(len(cube), n_frames)
    if positions is not None and len(positions) != len(shown):
        raise ValueError(f"{len(positions)} positions given for {len(shown)} frames; give one for each of {shown}")
    low, high = _limits(cube[shown], 100 - ROBUST_PERCENT, ROBUST_PERCENT)
    # The halo is a thousand times brighter than the background: linear up to the median, logarithmic above.
    typical = percentile(np.abs(cube[shown]), 50.0) or high - low
    scale = ScalarMappable(AsinhNorm(typical, low, high), colormaps["inferno"].with_extremes(bad=BACKGROUND))
    black = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    with style():
        figure, panels, _ = image_panels(len(shown), cube.shape[1] / cube.shape[2], 1.2)
        for i, axes in zip(shown, panels, strict=True):
            show_image(axes, cube[i], scale, origin="lower")
            axes.plot(centre[1], centre[0], **STAR_ON_DARK, path_effects=black)
            axes.set_title(f"frame {i}\n{angles_deg[i]:.1f}°".replace("-", "−"))
        if positions is not None:
            for axes, (y, x) in zip(panels, positions, strict=True):
                axes.plot(x, y, **SOURCE_ON_DARK, path_effects=black)
        label_map_axes(panels, Sky(centre))  # in px: bad pixels are looked up there, and north rotates
        scale.set_array(cube[shown].ravel())
        add_colour_bar(figure, panels, scale, "pixel value (asinh scale)")
    return figure
