"""The figure of spectra: every source, every finite flux, both errors, and what was injected."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from pulmo_jax.inference.point_sources import SourceSpectrum
from pulmo_jax.tasks.point_sources import spectral_figures

pytestmark = pytest.mark.draws
WAVELENGTHS = np.array([1.0, 1.2, 1.5])


def spectrum(label: int, flux=(10.0, 20.0, 30.0), std=(1.0, 2.0, 3.0), empirical=(2.0, 4.0, 6.0)) -> SourceSpectrum:
    return SourceSpectrum(label, WAVELENGTHS, *(np.array(v) for v in (flux, std, empirical)), 0, 1.0)


def bars(figure: Figure, panel: int = 0) -> list[np.ndarray]:
    """(N, 2): lower and upper end of each error bar."""
    return [np.array([segment[:, 1] for segment in lines.get_segments()]) for lines in figure.axes[panel].collections]


def points(figure: Figure, panel: int = 0) -> np.ndarray:
    return next(line.get_xydata() for line in figure.axes[panel].lines if line.get_marker() == "o")


def test_fluxes_stand_at_their_wavelengths_with_both_errors():
    figure = spectral_figures.spectra([spectrum(1)])
    np.testing.assert_allclose(points(figure), np.stack([WAVELENGTHS, [10, 20, 30]], -1))
    formal, empirical = bars(figure)
    np.testing.assert_allclose(formal, [(9, 11), (18, 22), (27, 33)])
    np.testing.assert_allclose(empirical, [(8, 12), (16, 24), (24, 36)])


def test_what_is_not_known_is_left_out():
    figure = spectral_figures.spectra([spectrum(1, (10.0, np.nan, 30.0), empirical=(np.nan, np.nan, 6.0))])
    assert len(points(figure)) == 2
    formal, empirical = bars(figure)
    assert (len(formal), len(empirical)) == (2, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 14])
def test_every_source_has_a_panel_up_to_twelve(n, tmp_path):
    figure = spectral_figures.spectra([spectrum(i + 1) for i in range(n)], [np.array([9.0, 20, 31])] + [None] * (n - 1))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [f"source {i + 1}" for i in range(min(n, 12))]
    assert sum(any(line.get_linestyle() == "--" for line in axes.lines) for axes in shown) == 1
    figure.savefig(tmp_path / "figure.png", dpi=40)
