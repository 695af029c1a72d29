"""Fluxes of sources that are known because they exceeded a threshold, corrected: against simulated detections."""

import numpy as np
import pytest

from pulmo_jax.evaluation.selection_bias import without_selection

EDGE, STD = 5.0, 3.0


def corrected_of(measured: np.ndarray) -> np.ndarray:
    """(N, 2): corrected flux and standard deviation, interpolated from 60 exact ones; in standard deviations."""
    grid = np.linspace(EDGE, measured.max(), 60)
    table = np.array([without_selection(STD * value, STD, STD * EDGE) for value in grid]) / STD
    return np.stack([np.interp(measured, grid, column) for column in table.T], -1)


@pytest.mark.parametrize("true", [4.0, 5.0, 6.0, 8.0])
def test_corrected_fluxes_are_unbiased_to_six_percent(true):
    """The measured ones are up to 43 % too high."""
    measured = true + np.random.default_rng(int(10 * true)).standard_normal(400_000)
    measured = measured[measured >= EDGE]
    found, _ = corrected_of(measured).T
    assert found.mean() / true == pytest.approx(1, abs=0.06)
    assert measured.mean() / true > (1.1 if true < 5.5 else 1)


@pytest.mark.parametrize("true", [5.0, 6.0, 8.0])
def test_its_error_is_the_scatter_of_corrected_fluxes(true):
    measured = true + np.random.default_rng(1).standard_normal(400_000)
    found, std = corrected_of(measured[measured >= EDGE]).T
    assert np.sqrt((std**2).mean()) == pytest.approx(np.sqrt(((found - true) ** 2).mean()), rel=0.3)


def test_far_above_the_threshold_nothing_changes():
    assert without_selection(100.0, 5.0, 20.0) == (100.0, 5.0)
    flux, std = without_selection(20 + 7.9 * 5, 5.0, 20.0)
    assert flux == pytest.approx(59.5, rel=1e-4)
    assert std == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize("given", [(np.nan, 1.0, 5.0), (6.0, np.nan, 5.0), (6.0, 1.0, np.nan), (6.0, 0.0, 5.0)])
def test_what_is_not_known_is_not_corrected(given):
    found = without_selection(*given)
    assert found[0] is given[0]
    assert found[1] is given[1]


def test_correction_grows_towards_the_threshold_and_never_raises():
    fluxes = np.linspace(EDGE, EDGE + 6, 40)
    found = np.array([without_selection(flux, 1.0, EDGE)[0] for flux in fluxes])
    assert (np.diff(found) > 0).all()
    assert (found < fluxes).all()
    assert (fluxes - found)[0] > 1.5 > 0.05 > (fluxes - found)[-1]
    assert without_selection(4.9, 1.0, EDGE)[0] == pytest.approx(found[0], abs=0.1)  # judged with another noise
    assert (found > 0).all()
