"""The threshold on a field's highest value: its rank, its interval, its false alarms."""

import numpy as np
import pytest
from scipy.stats import gumbel_r

from pulmo_jax.evaluation.field_threshold import SCALE_ERROR, field_threshold
from pulmo_jax.types import InputError


def test_threshold_is_the_rank_whose_p_value_is_asked_for():
    found = field_threshold(np.arange(1.0, 100.0), 0.05)  # 99 fields: p = (1 + number as high) / 100
    assert found.false_alarm(np.nextafter(found.value, 1e9)) == pytest.approx(0.05)
    assert found.false_alarm(found.value) > 0.05
    assert found.low <= found.value <= found.high


def test_too_few_fields_certify_less_than_was_asked_for():
    found = field_threshold(np.arange(10.0), 0.001)
    assert found.level == pytest.approx(1 / 11)
    assert found.value == 9
    assert found.high == np.inf
    assert found.certified == pytest.approx(1 - 0.05**0.1)
    assert found.false_alarm(100.0) == pytest.approx(1 / 11)
    with pytest.raises(InputError):
        field_threshold(np.ones(1), 0.05)


def test_false_alarms_and_intervals_are_as_often_as_promised():
    rng = np.random.default_rng(3)
    level, alarms, held = 0.1, [], []
    for _ in range(2000):
        found = field_threshold(rng.gumbel(20, 2, 59), level)
        alarms.append(gumbel_r.sf(found.value, 20, 2))
        held.append(found.low <= gumbel_r.isf(level, 20, 2) <= found.high)
    assert np.mean(alarms) == pytest.approx(level, abs=0.005)
    assert 0.94 <= np.mean(held) <= 0.995


def test_extrapolation_is_gumbels():
    found = field_threshold(np.random.default_rng(0).gumbel(20, 2, 20000), 0.05)
    assert found.extrapolated(40.0) == pytest.approx(gumbel_r.sf(40, 20, 2), rel=0.2)


@pytest.mark.parametrize(("n", "floor"), [(9, 10 ** (-3 / 1.05)), (39, 10 ** (-np.sqrt(39) / 1.05)), (200, 1e-6)])
def test_extrapolation_has_a_bound_that_the_fields_support(n, floor):
    found = field_threshold(np.random.default_rng(0).gumbel(20, 2, n), 0.05)
    assert found.floor == pytest.approx(floor)
    assert found.extrapolated(1e4) == found.floor
    assert found.extrapolated(20.0) > found.floor


def test_scale_from_few_fields_is_as_uncertain_as_the_bound_supposes():
    """The standard error of a Gumbel scale from the standard deviation of n maxima."""
    maxima = np.random.default_rng(1).gumbel(0, 1, (4000, 200))
    scale = maxima.std(1, ddof=1) * np.sqrt(6) / np.pi
    assert scale.std() * np.sqrt(200) == pytest.approx(SCALE_ERROR, rel=0.06)
