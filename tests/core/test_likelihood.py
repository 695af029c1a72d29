"""A template in Gaussian noise: the likelihood's terms against explicit inverses, and what follows from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.core import likelihood

SIZE = 7


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def noise(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """A covariance, its inverse, and more random numbers."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(SIZE, 3 * SIZE))
    c = mixed @ mixed.T / (3 * SIZE)
    return c, np.linalg.inv(c), rng


def test_matched_filters_and_their_gram_matrix():
    c, inverse, rng = noise()
    templates = rng.normal(size=(3, SIZE))
    weights, gram = likelihood.matched_filter(jnp.asarray(templates), jnp.linalg.cholesky(c))
    np.testing.assert_allclose(weights, inverse @ templates.T, rtol=1e-11)
    np.testing.assert_allclose(gram, templates @ inverse @ templates.T, rtol=1e-11)


def test_terms_are_quadratic_and_linear_forms_of_the_inverse():
    c, inverse, rng = noise()
    h, d = rng.normal(size=(2, SIZE))
    a, b = likelihood.terms(jnp.asarray(h), jnp.asarray(d), jnp.linalg.cholesky(c))
    np.testing.assert_allclose([a, b], [h @ inverse @ h, h @ inverse @ d], rtol=1e-11)


def test_a_source_without_noise_has_its_own_flux_and_snr():
    c, inverse, rng = noise()
    h = rng.normal(size=SIZE)
    a, b = likelihood.terms(jnp.asarray(h), jnp.asarray(3.5 * h), jnp.linalg.cholesky(c))
    assert float(likelihood.flux(a, b)) == pytest.approx(3.5, rel=1e-12)
    assert float(likelihood.flux_std(a)) == pytest.approx((h @ inverse @ h) ** -0.5, rel=1e-11)
    assert float(likelihood.snr(a, b)) == pytest.approx(3.5 * (h @ inverse @ h) ** 0.5, rel=1e-11)


def test_maps_of_the_terms():
    a, b = np.random.default_rng(0).normal(size=(2, 5, 6)) ** 2 * [[[1]], [[-1]]]
    np.testing.assert_allclose(likelihood.snr(jnp.asarray(a), jnp.asarray(b)), b / np.sqrt(a), rtol=1e-14)
    np.testing.assert_allclose(likelihood.flux(jnp.asarray(a), jnp.asarray(b)), b / a, rtol=1e-14)
    np.testing.assert_allclose(likelihood.flux_std(jnp.asarray(a)), a**-0.5, rtol=1e-14)


@pytest.mark.parametrize("a", [0.0, -1.0, np.nan])
def test_without_information_there_is_no_value_and_no_infinite_gradient(a):
    a, b = jnp.array([a, 4.0]), jnp.array([2.0, 2.0])
    for values, expected in (
        (likelihood.snr(a, b), 1.0),
        (likelihood.flux(a, b), 0.5),
        (likelihood.flux_std(a), 0.5),
    ):
        np.testing.assert_array_equal(values, [np.nan, expected])
    of_defined = jax.grad(lambda a, b: jnp.nansum(likelihood.snr(a, b) + likelihood.flux(a, b)), (0, 1))
    (da, db) = of_defined(a, b)
    np.testing.assert_allclose(da, [0, -0.5 * 2 / 8 - 2 / 16], rtol=1e-14)
    np.testing.assert_allclose(db, [0, 0.5 + 0.25], rtol=1e-14)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_mahalanobis_distance_and_whitened_deviations(batch):
    c, inverse, rng = noise()
    d = rng.normal(size=(*batch, SIZE))
    lower = jnp.linalg.cholesky(c)
    np.testing.assert_allclose(
        likelihood.mahalanobis(jnp.asarray(d), lower), np.einsum("...i,ij,...j", d, inverse, d), rtol=1e-11
    )
    whitened = likelihood.whiten(jnp.asarray(d), lower)
    assert whitened.shape == d.shape
    np.testing.assert_allclose(whitened @ lower.T, d, atol=1e-12)


def test_whitened_samples_have_unit_covariance():
    _, _, rng = noise()
    samples = rng.normal(size=(50, SIZE)) @ rng.normal(size=(SIZE, SIZE))
    samples -= samples.mean(0)
    whitened = likelihood.whiten(jnp.asarray(samples), jnp.linalg.cholesky(samples.T @ samples / 50))
    np.testing.assert_allclose(whitened.T @ whitened / 50, np.eye(SIZE), atol=1e-11)


def test_the_mahalanobis_distance_is_the_best_snr_of_all_templates():
    c, _, rng = noise()
    d, others = rng.normal(size=SIZE), rng.normal(size=(200, SIZE))
    lower = jnp.linalg.cholesky(c)
    best = likelihood.snr(*likelihood.terms(jnp.asarray(d), jnp.asarray(d), lower))
    distance = float(likelihood.mahalanobis(jnp.asarray(d), lower))
    assert float(best) ** 2 == pytest.approx(distance, rel=1e-11)
    a, b = jax.vmap(likelihood.terms, (0, None, None))(jnp.asarray(others), jnp.asarray(d), lower)
    assert (likelihood.snr(a, b) ** 2 <= distance * (1 + 1e-12)).all()


def test_snr_of_noise_is_standard_normal():
    """4000 draws: the mean within 4 / sqrt(4000), the spread within 4 / sqrt(8000)."""
    c, _, rng = noise()
    lower = jnp.linalg.cholesky(c)
    d = jnp.asarray(rng.normal(size=(4000, SIZE)) @ np.asarray(lower).T)
    h = jnp.asarray(rng.normal(size=SIZE))
    snr = likelihood.snr(*jax.vmap(likelihood.terms, (None, 0, None))(h, d, lower))
    assert abs(snr.mean()) < 0.064
    assert abs(snr.std() - 1) < 0.045
    assert float(likelihood.mahalanobis(d, lower).mean()) == pytest.approx(SIZE, abs=4 * (2 * SIZE / 4000) ** 0.5)


def test_float32_is_as_good_as_its_rounding():
    c, inverse, rng = noise()
    h, d = rng.normal(size=(2, SIZE)).astype(np.float32)
    with jax.enable_x64(False):
        a, b = likelihood.terms(jnp.asarray(h), jnp.asarray(d), jnp.linalg.cholesky(jnp.asarray(c, jnp.float32)))
        assert (a.dtype, b.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose([a, b], [h @ inverse @ h, h @ inverse @ d], rtol=1e-4)
