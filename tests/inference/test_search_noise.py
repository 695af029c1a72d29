"""Noise of a search: significance, the SNR of one, empirical errors, and probabilities of false alarms."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from pulmo_jax.evaluation.null_field import FALSE_ALARM_FLOOR, NullProfile, field_false_alarm
from pulmo_jax.inference.search_noise import Noise, theoretical
from pulmo_jax.methods.paco import LikelihoodMaps

R, STD, N = np.array([5.0, 10.0, 20.0]), np.array([1.5, 1.2, 0.9]), np.array([12.0, 40.0, 100.0])
PROFILE = NullProfile(R, 0 * R, STD, 0.8 * STD, 1.2 * STD, N)
FIELD = np.random.default_rng(0).normal(size=(40, 40))


def noise(trials: float = 1.0) -> Noise:
    maps = LikelihoodMaps(*[FIELD] * 5, np.full(FIELD.shape, 9), FIELD, FIELD > 9, 0.0, 0.0, ())
    return Noise(maps, PROFILE, FIELD, trials)


def test_significance_by_hand():
    """Between rings standard deviation and number of values are interpolated: at 15 px 1.05 of 70."""
    t = 7 / 1.05 / np.sqrt(1 + 1 / 70)
    assert float(noise().significance(7.0, 15.0)) == pytest.approx(norm.isf(student.sf(t, 69)), rel=1e-9)
    closest = 7 / 1.5 / np.sqrt(1 + 1 / 12)
    for separation in (0.0, 5.0):
        assert float(noise().significance(7.0, separation)) == pytest.approx(
            norm.isf(student.sf(closest, 11)), rel=1e-9
        )
    both = noise().significance(np.array([[7.0, 7.0]]), np.array([[15.0, 5.0]]))
    assert both.shape == (1, 2)
    assert both[0, 1] < both[0, 0]


@pytest.mark.parametrize("separation", [3.0, 7.5, 30.0])
def test_snr_of_a_significance_is_its_inverse(separation):
    for level in (1.0, 3.0, 5.0, 8.0):
        snr = noise().ratio_at(level, separation)
        assert float(noise().significance(snr, separation)) == pytest.approx(level, rel=1e-6)


def test_factor_of_errors():
    assert noise().factor(10.0) == pytest.approx(1.2 * np.sqrt(1 + 1 / 40))


def test_theoretical_noise_has_unit_variance_and_no_student_tail():
    known = theoretical(noise())
    for separation in (2.0, 12.0, 50.0):
        assert float(known.significance(6.3, separation)) == pytest.approx(6.3, rel=1e-6)
        assert known.ratio_at(6.3, separation) == pytest.approx(6.3, rel=1e-6)
        assert known.factor(separation) == pytest.approx(1)


def test_false_alarms_have_a_floor_and_count_the_trials():
    for level in (3.0, 4.0, 5.0):
        single = float(field_false_alarm(level, FIELD))
        assert noise().false_alarm(level) == pytest.approx(max(single, FALSE_ALARM_FLOOR))
        assert noise(3.0).false_alarm(level) == pytest.approx(1 - (1 - single) ** 3, rel=1e-6)
    assert float(field_false_alarm(9.0, FIELD)) < FALSE_ALARM_FLOOR
    assert noise().false_alarm(9.0) == noise(5.0).false_alarm(40.0) == FALSE_ALARM_FLOOR
    assert noise().false_alarm(0.5) == pytest.approx(1)
