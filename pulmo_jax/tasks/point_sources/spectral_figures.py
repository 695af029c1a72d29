"""Figures of spectra of detected sources."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pulmo_jax.inference.point_sources import SourceSpectrum
from pulmo_jax.reporting.figures import BLUE, SKY, TEXT_WIDTH_IN, VERMILLION, style

COLUMNS = 3
PANEL_HEIGHT_IN = 1.9
LONGEST_NAME = 20
MOST = 12  # maximum number of sources shown
TRUTH: dict[str, Any] = {"color": VERMILLION, "lw": 1.0, "ls": "--"}


def spectra(
    spectra: Sequence[SourceSpectrum],
    truth: Sequence[np.ndarray | None] = (),
    star_flux: Float[np.ndarray, "L"] | None = None,
    names: Sequence[str] = (),
) -> Figure:
    """Draw flux against wavelength for the first 12 sources.

    Args:
        spectra: Spectra; thick bars show the error of the likelihood, thin bars the empirical error.
        truth: True flux of each source in each channel, if known, in units of the PSF.
        star_flux: Flux of the star in each channel in units of the PSF, to draw contrasts; None: fluxes are drawn.
        names: Name of the spectrum that each source was detected with, for the titles.

    Returns:
        The figure.
    """
    shown = spectra[:MOST]
    n_columns = min(COLUMNS, len(shown))
    n_rows = -(-len(shown) // n_columns)
    width = TEXT_WIDTH_IN * max(n_columns, 1.5) / COLUMNS
    with style():
        figure = Figure(figsize=(width, PANEL_HEIGHT_IN * n_rows + 0.4), layout="constrained")
        panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
        known_or_not, titles = ([*given, *[None] * len(shown)] for given in (truth, names))
        for axes, spectrum, known, name in zip(panels, shown, known_or_not, titles, strict=False):
            draw(axes, spectrum, known, 1.0 if star_flux is None else star_flux, name)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(shown) - n_columns) : len(shown)]:
            axes.set_xlabel("wavelength (unit as given)")
        for axes in panels[::n_columns]:
            axes.set_ylabel("flux (PSF units)" if star_flux is None else "contrast (source / star)")
        handles = [
            Line2D([], [], color=SKY, lw=4.0, label="error of the likelihood"),
            Line2D([], [], color=BLUE, lw=0.8, marker="o", ms=3, label="flux, with its empirical error"),
        ]
        if any(known is not None for known in truth):
            handles.append(Line2D([], [], label="injected", **TRUTH))
        figure.legend(handles=handles, loc="outside lower center", ncols=3 if n_columns > 1 else 1)
    return figure


def draw(
    axes: Axes,
    spectrum: SourceSpectrum,
    known: np.ndarray | None,
    unit: Float[np.ndarray, "L"] | float = 1.0,
    name: str | None = None,
) -> None:
    """Draw the spectrum of one source, divided by `unit`, with the name of its template; NaN is omitted."""
    at, flux = spectrum.wavelengths, spectrum.flux / unit
    if known is not None:
        axes.plot(at, known / unit, **TRUTH)
    looks = ((spectrum.flux_std / unit, SKY, 4.0), (spectrum.flux_std_empirical / unit, BLUE, 0.8))
    for error, colour, line in looks:
        sound = np.isfinite(flux) & np.isfinite(error)
        axes.errorbar(at[sound], flux[sound], error[sound], fmt="none", ecolor=colour, elinewidth=line, capsize=0)
    sound = np.isfinite(flux)
    axes.plot(at[sound], flux[sound], "o", color=BLUE, ms=3)
    axes.axhline(0, color="0.6", lw=0.6, zorder=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
    axes.set_title(f"source {spectrum.label}" + (f": {short(name)}" if name else ""), loc="left")


def short(name: str) -> str:
    """Name of a spectrum, cut to LONGEST_NAME characters."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
