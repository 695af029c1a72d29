"""Simplex noise against a slow reference, and its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import simplex

from pulmo_jax.core.simplex import VARIANCE, one_octave, simplex_noise, unskewed


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), 6000)
    return np.asarray(jax.jit(jax.vmap(lambda key: simplex_noise(key, 24, 20, cell_px=16.0, octaves=3)))(keys))


def test_an_octave_is_the_sum_over_all_vertices_within_reach():
    rows, columns = np.linspace(-2.3, 1.9, 17), np.linspace(-1.2, 3.1, 13)
    for seed in (0, 12345, 2**32 - 1):
        found = one_octave(jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32), jnp.uint32(seed))
        np.testing.assert_allclose(found, simplex.one_octave(rows, columns, seed), atol=2e-4)


def test_the_variance_is_the_integral_over_the_lattice():
    assert pytest.approx(simplex.variance(), rel=1e-3) == VARIANCE


def test_mean_and_variance_are_the_same_at_every_pixel(draws):
    """Without the random shift, the noise would vanish at the vertices."""
    np.testing.assert_allclose(draws.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(draws.var(0), 1, atol=0.1)
    assert draws.var() == pytest.approx(1, abs=0.02)


def test_octaves_have_the_amplitudes_of_their_persistence(draws):
    """The mean square of differences over a lag is the sum of those of the octaves, weighted by their power."""

    def roughness(noise: np.ndarray) -> float:
        return float(np.mean((noise[:, :, 1:] - noise[:, :, :-1]) ** 2))

    keys = jax.random.split(jax.random.key(1), 6000)
    single = [
        roughness(np.asarray(jax.vmap(lambda key, c=cell: simplex_noise(key, 24, 20, cell_px=c, octaves=1))(keys)))
        for cell in (16.0, 8.0, 4.0)
    ]
    power = 0.8 ** (2 * np.arange(3))
    assert roughness(draws) == pytest.approx(float(np.dot(power, single) / power.sum()), rel=0.03)
    assert single[2] > 2 * single[1] > 4 * single[0]  # a finer octave is rougher


def test_noise_is_isotropic_and_smooth(draws):
    down, across = (float(np.mean(d**2)) for d in (np.diff(draws, axis=1), np.diff(draws, axis=2)))
    assert down == pytest.approx(across, rel=0.05)
    assert down < 0.5  # white noise: 2


def test_draws_are_functions_of_the_key_and_independent(draws):
    np.testing.assert_array_equal(simplex_noise(jax.random.key(3), 8, 8), simplex_noise(jax.random.key(3), 8, 8))
    correlation = np.mean(draws[1:] * draws[:-1], axis=0)
    np.testing.assert_allclose(correlation, 0, atol=0.08)


def test_shifts_cover_a_cell_of_the_lattice():
    corners = jax.vmap(unskewed)(jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    sides = np.linalg.norm(np.asarray(corners[1:] - corners[0]), axis=1)
    np.testing.assert_allclose(sides, np.sqrt(2 / 3), rtol=1e-5)  # equilateral triangles
