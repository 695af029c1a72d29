"""Figures of spectra of detected sources."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pulmo_jax.inference.point_sources import SourceSpectrum
from pulmo_jax.reporting.figures import BLUE, SKY, TEXT_WIDTH_IN, VERMILLION, style

COLUMNS = 3
PANEL_HEIGHT_IN = 1.9
MOST = 12  # maximum number of sources shown
TRUTH: dict[str, Any] = {"color": VERMILLION, "lw": 1.0, "ls": "--"}


def spectra(spectra: Sequence[SourceSpectrum], truth: Sequence[np.ndarray | None] = ()) -> Figure:
    """Draw flux against wavelength for the first 12 sources.

    Args:
        spectra: Spectra; thick bars show the error of the likelihood, thin bars the empirical error.
        truth: True flux of each source in each channel, if known.

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
        for axes, spectrum, known in zip(panels, shown, [*truth, *[None] * len(shown)], strict=False):
            draw(axes, spectrum, known)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(shown) - n_columns) : len(shown)]:
            axes.set_xlabel("wavelength (in the stack's unit)")
        for axes in panels[::n_columns]:
            axes.set_ylabel("flux (psf)")
        handles = [
            Line2D([], [], color=SKY, lw=4.0, label="error of the likelihood"),
            Line2D([], [], color=BLUE, lw=0.8, marker="o", ms=3, label="flux, with its empirical error"),
        ]
        if any(known is not None for known in truth):
            handles.append(Line2D([], [], label="injected", **TRUTH))
        figure.legend(handles=handles, loc="outside lower center", ncols=3 if n_columns > 1 else 1)
    return figure


def draw(axes: Axes, spectrum: SourceSpectrum, known: np.ndarray | None) -> None:
    """Draw the spectrum of one source; non-finite values are omitted."""
    at, flux = spectrum.wavelengths, spectrum.flux
    if known is not None:
        axes.plot(at, known, **TRUTH)
    looks = ((spectrum.flux_std, SKY, 4.0), (spectrum.flux_std_empirical, BLUE, 0.8))
    for error, colour, line in looks:
        sound = np.isfinite(flux) & np.isfinite(error)
        axes.errorbar(at[sound], flux[sound], error[sound], fmt="none", ecolor=colour, elinewidth=line, capsize=0)
    sound = np.isfinite(flux)
    axes.plot(at[sound], flux[sound], "o", color=BLUE, ms=3)
    axes.axhline(0, color="0.6", lw=0.6, zorder=0)
    axes.set_title(f"source {spectrum.label}", loc="left")
