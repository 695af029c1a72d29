"""Several spectra: the number of trials, the threshold that accounts for them, and the noise of each."""

import numpy as np
import pytest
from scipy.stats import norm

from pulmo_jax.evaluation.null_field import null_profile, separation_map
from pulmo_jax.inference.spectral_trials import effective_trials, inner_spread, trials_threshold, with_spread
from pulmo_jax.methods.paco import LikelihoodMaps
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.spectral import Combination, independent

N = 200_000


def fields(correlation: np.ndarray, seed: int = 0, n: int = N) -> np.ndarray:
    return np.linalg.cholesky(correlation) @ np.random.default_rng(seed).standard_normal((len(correlation), n))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.99])
def test_trials_are_those_of_a_direct_count(rho):
    """At 2.5 sigma a simulation has enough exceedances to count."""
    correlation = (1 - rho) * np.eye(4) + rho
    values = fields(correlation, n=2_000_000)
    expected = (values.max(0) > 2.5).mean() / norm.sf(2.5)
    assert effective_trials(values[:, :N], 2.5) == pytest.approx(expected, rel=0.05)


def test_trials_are_bounded_and_grow_with_the_threshold():
    values = fields(0.3 * np.eye(5) + 0.7)
    low, high = (effective_trials(values, t) for t in (2.0, 6.0))
    assert 1 < low < high <= 5
    assert effective_trials(fields(np.eye(5))) == pytest.approx(5, abs=0.01)
    assert effective_trials(np.repeat(fields(np.eye(1)), 3, 0)) == pytest.approx(1, abs=0.02)
    assert effective_trials(fields(np.eye(1))) == 1


def test_spectra_without_a_value_and_missing_positions_do_not_count():
    values = fields(np.eye(3))
    values[1] = np.nan
    values[:, :50] = np.nan
    assert effective_trials(values) == pytest.approx(2, abs=0.01)


def test_threshold_keeps_the_false_alarms():
    raised = trials_threshold(3.0, 7.5)
    assert 7.5 * norm.sf(raised) == pytest.approx(norm.sf(3.0))
    assert trials_threshold(5.0, 1.0) == 5.0
    noise = fields(np.eye(8))
    assert (noise.max(0) > trials_threshold(2.0, effective_trials(noise, 2.0))).mean() == pytest.approx(
        norm.sf(2), rel=0.1
    )


SHAPE, CENTRE, FWHM_PX = (60, 60), (30.0, 30.0), 4.0


def maps_of(snr: np.ndarray) -> LikelihoodMaps:
    zeros = np.zeros(SHAPE)
    return LikelihoodMaps(
        zeros + 1, snr, snr, snr, zeros + 1, np.ones(SHAPE, int), zeros, np.zeros(SHAPE, bool), 0.0, 0.0, ()
    )


class Star(Channels):
    """Channels with a FWHM and no observation."""

    @property
    def fwhm_px(self) -> float:
        return FWHM_PX


def test_spectra_with_less_noise_than_supposed_are_divided_by_it():
    """Two channels of correlation .9, taken as .5."""
    values = fields(np.array([[1, 0.9], [0.9, 1]]), n=3600).reshape(2, *SHAPE)
    r = np.array([[1, 0.5], [0.5, 1]])
    star = Star((), np.ones(2), np.ones(2), SHAPE, CENTRE, np.ones(2, bool))
    using = Combination(np.zeros(1), r[None], np.array([[1.0, 1.0], [2.0, 0.0]]))
    found = with_spread([maps_of(v) for v in values], star, using)
    flat, alone = np.sqrt(0.95 / 0.75), np.sqrt((1 + 0.25 - 0.9) / (1 - 0.25))  # sd of w' z for these weights w
    assert found.spread_px is not None
    assert found.spread is not None
    ring = (found.spread_px > 12) & (found.spread_px < 26)
    np.testing.assert_allclose((found.spread[1] / found.spread[0])[ring], alone / flat, rtol=0.1)
    assert found.spread_at(20.0)[1] == pytest.approx(alone / flat, rel=0.1)
    assert found.only(1).spread_at(20.0) == found.spread_at(20.0)[1]
    single = independent(np.ones((1, 2)))
    assert with_spread([maps_of(v) for v in values], star, single) is single


def test_noise_close_to_the_star_is_measured_there():
    snr = np.random.default_rng(0).standard_normal(SHAPE)
    separation = separation_map(SHAPE, CENTRE)
    snr[separation < 3] *= 6
    profile = null_profile(np.where(separation > 4, snr, np.nan), CENTRE, FWHM_PX)
    at = np.arange(1.0, 40.0)
    found = inner_spread(snr, separation, profile, at, FWHM_PX)
    assert found[1] > 4
    np.testing.assert_array_equal(
        found[at >= profile.separation_px[0]], profile.std_at(at)[at >= profile.separation_px[0]]
    )
    assert (found >= profile.std_at(at)).all()
