"""Probabilistic PCA against SciPy's Gaussian and scikit-learn's fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA

from pulmo_jax.core import ppca

RNG = np.random.default_rng(0)


def vectors(n=200, p=12):
    loadings = RNG.normal(size=(3, p)) * np.array([[4.0], [2.0], [1.0]])
    return jnp.asarray(RNG.normal(size=(n, 3)) @ loadings + 0.3 * RNG.normal(size=(n, p)) + 5, jnp.float32)


@pytest.mark.parametrize("n_components", [1, 3, 6])
def test_likelihood_is_the_gaussians(n_components):
    x = vectors()
    model = ppca.fit(x, n_components)
    v, noise = np.asarray(model.components, float), float(model.noise)
    covariance = (v.T * (np.asarray(model.variance, float) - noise)) @ v + noise * np.eye(x.shape[1])
    expected = -multivariate_normal(np.asarray(x).mean(0), covariance).logpdf(np.asarray(x))
    np.testing.assert_allclose(ppca.negative_log_likelihood(model, x), expected, rtol=2e-3)


def test_fit_is_scikit_learns_maximum_likelihood():
    """scikit-learn divides by N - 1, the maximum of the likelihood is at N."""
    x = vectors()
    model, other = ppca.fit(x, 3), PCA(3).fit(np.asarray(x, float))
    np.testing.assert_allclose(model.variance, other.explained_variance_ * 199 / 200, rtol=1e-3)
    np.testing.assert_allclose(model.noise, other.noise_variance_ * 199 / 200, rtol=1e-3)
    np.testing.assert_allclose(np.abs(model.components @ other.components_.T), np.eye(3), atol=1e-2)
    np.testing.assert_allclose(ppca.negative_log_likelihood(model, x).mean(), -other.score(np.asarray(x)), rtol=1e-3)


def test_fewer_vectors_than_values_still_give_a_proper_density():
    model = ppca.fit(vectors(n=6, p=40), 4)
    assert np.isfinite(ppca.negative_log_likelihood(model, vectors(n=3, p=40))).all()


def test_vectors_without_noise_are_no_trouble():
    x = jnp.asarray(RNG.normal(size=(20, 1)) @ RNG.normal(size=(1, 5)), jnp.float32)
    model = ppca.fit(x, 2)
    assert np.isfinite(ppca.negative_log_likelihood(model, x)).all()


def test_program_is_the_same_when_compiled():
    x = vectors()
    model = ppca.fit(x, 3)
    np.testing.assert_allclose(
        jax.jit(ppca.negative_log_likelihood)(model, x), ppca.negative_log_likelihood(model, x), rtol=1e-5
    )


@pytest.mark.parametrize("n_components", [0, 12, 50])
def test_impossible_number_of_components_is_refused(n_components):
    with pytest.raises(ValueError, match=f"n_components={n_components}:"):
        ppca.fit(vectors(), n_components)
