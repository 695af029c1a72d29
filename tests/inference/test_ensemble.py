"""Stretch moves: moments of a known density, and how many samples a chain is worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.inference.ensemble import independent_samples, stretch_moves


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_moments_of_a_correlated_gaussian_cut_at_zero():
    """The half plane x > 0 of a Gaussian: half-normal in x, y = 2 x + unit noise."""

    def log_density(p):
        return jnp.where(p[0] > 0, -(p[0] ** 2) / 2 - (p[1] - 2 * p[0]) ** 2 / 2, -jnp.inf)

    start = jnp.abs(jax.random.normal(jax.random.key(0), (40, 2)))
    chain = jax.jit(lambda s, k: stretch_moves(log_density, s, 4000, k))(start, jax.random.key(1))
    x, y = np.asarray(chain.samples)[500:].reshape(-1, 2).T
    assert x.min() > 0
    assert x.mean() == pytest.approx(np.sqrt(2 / np.pi), abs=0.03)
    assert x.var() == pytest.approx(1 - 2 / np.pi, abs=0.03)
    assert (y - 2 * x).mean() == pytest.approx(0, abs=0.05)
    assert (y - 2 * x).std() == pytest.approx(1, abs=0.04)
    assert 0.3 < float(chain.accepted) < 0.9


def test_worth_of_a_chain_of_known_correlation():
    rng, phi = np.random.default_rng(0), 0.9
    chain = np.zeros((4000, 20, 1))
    for t in range(1, 4000):
        chain[t] = phi * chain[t - 1] + np.sqrt(1 - phi**2) * rng.normal(size=(20, 1))
    assert independent_samples(chain) == pytest.approx(80000 * (1 - phi) / (1 + phi), rel=0.15)
    assert independent_samples(rng.normal(size=(2000, 10, 3))) == pytest.approx(20000, rel=0.15)
