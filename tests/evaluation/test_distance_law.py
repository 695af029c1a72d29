"""p-values of Mahalanobis distances against simulation, and Hotelling's T^2 from scipy's own law."""

import numpy as np
import pytest
from scipy import stats

from pulmo_jax.evaluation.distance_law import chi_squared_p_value, hotelling_p_value

D, N = 4, 15


def distances(n: int | None, seed: int = 0) -> np.ndarray:
    """Of new samples, from n others' mean and population covariance; None: from the truth."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(3000):
        new = rng.normal(size=(20, D))
        if n is None:
            found.append((new**2).sum(1))
            continue
        seen = rng.normal(size=(n, D))
        deviations = new - seen.mean(0)
        found.append(np.einsum("id,de,ie->i", deviations, np.linalg.inv(np.cov(seen.T, bias=True)), deviations))
    return np.concatenate(found)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.01])
def test_the_share_of_small_p_values_is_their_level(rate):
    known = (chi_squared_p_value(distances(None), D) <= rate).mean()
    learnt = (hotelling_p_value(distances(N), D, N) <= rate).mean()
    np.testing.assert_allclose([known, learnt], rate, rtol=0.08)


def test_chi_squared_promises_too_few_false_alarms_where_samples_are_few():
    assert (chi_squared_p_value(distances(N), D) <= 0.01).mean() > 0.05


def test_with_many_samples_both_agree():
    d = np.linspace(0.1, 30, 20)
    np.testing.assert_allclose(hotelling_p_value(d, D, 1e7), chi_squared_p_value(d, D), rtol=1e-4)
    np.testing.assert_allclose(chi_squared_p_value(d, 2), np.exp(-d / 2), rtol=1e-12)
    np.testing.assert_allclose(hotelling_p_value(np.array([3.0]), 1, 10), 2 * stats.t.sf(np.sqrt(3 * 9 / 11), 9))


@pytest.mark.parametrize("n", [1, D])
def test_too_few_samples_are_refused(n):
    with pytest.raises(ValueError, match="give a singular covariance in 4 dimensions"):
        hotelling_p_value(np.ones(2), D, n)
