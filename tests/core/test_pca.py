"""Principal components against eigenvectors in float64, energies of windows against a loop over anchors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import eigenpatch as reference
from scipy.signal import correlate2d

from pulmo_jax.core import pca
from pulmo_jax.types import InputError


def samples(count: int = 60, size: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(size, size)) * 0.6 ** np.arange(size)[:, None]
    return (50 + rng.normal(size=(count, size)) @ mixing).astype(np.float32)


@pytest.mark.parametrize("kept", [0.5, 0.95, 0.999])
def test_components_are_the_eigenvectors_of_the_covariance(kept):
    x = samples()
    of, (mean, components, variances) = pca.fit(x, kept), reference.principal_components(x.astype(np.float64), kept)
    np.testing.assert_allclose(of.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(of.variances, variances, rtol=1e-4)
    signs = np.sign((np.asarray(of.components) * components).sum(1))
    np.testing.assert_allclose(np.asarray(of.components), components * signs[:, None], atol=2e-3)
    total = ((x - mean) ** 2).sum() / len(x)
    np.testing.assert_allclose(float(of.rest) * (12 - len(components)), total - variances.sum(), rtol=1e-2, atol=1e-3)


def test_residual_energy_is_that_of_the_reconstruction():
    x, of = samples(), pca.fit(samples(), 0.8)
    back = pca.reconstruct(of, pca.project(of, jnp.asarray(x)))
    expected = ((x - np.asarray(back)) ** 2).sum(1)
    np.testing.assert_allclose(pca.residual_energy(of, jnp.asarray(x)), expected, rtol=1e-3, atol=1e-3)
    assert expected.mean() > 0.1


def test_what_the_components_can_make_leaves_no_energy():
    of = pca.fit(samples(), 0.9)
    made = pca.reconstruct(of, 3 * jnp.ones((2, len(of.components))))
    np.testing.assert_allclose(pca.residual_energy(of, made), 0, atol=1e-3)


@pytest.mark.parametrize(("side", "width"), [((9, 12), 5), ((9, 11), 11), ((6, 8), 1)])
def test_correlation_is_that_of_scipy(side, width):
    rng = np.random.default_rng(1)
    images, templates = rng.normal(size=(3, *side)), rng.normal(size=(2, 4, width))
    found = np.asarray(jax.jit(pca.correlate)(*(jnp.asarray(a, jnp.float32) for a in (images, templates))))
    expected = [[correlate2d(image, template, "valid") for template in templates] for image in images]
    np.testing.assert_allclose(found.transpose(1, 3, 2, 0), expected, atol=2e-5)


def test_energies_of_windows_are_those_of_a_loop_over_anchors():
    rng = np.random.default_rng(2)
    images = (1000 + 10 * rng.normal(size=(4, 16, 18))).astype(np.float32)
    of = pca.fit((1000 + 10 * rng.normal(size=(40, 7 * 9))).astype(np.float32), 0.6)
    found = jax.jit(lambda of, images: pca.window_energies(of, images, 7))(of, jnp.asarray(images))
    for at_once in (1, 3, 8):
        alone = pca.window_residuals(of, jnp.asarray(images), 7, at_once)
        np.testing.assert_allclose(alone, found.residual, rtol=1e-4)
    mean, components = (np.asarray(a, np.float64) for a in (of.mean, of.components))
    for b, image in enumerate(images):
        expected = reference.residual_map(image.astype(np.float64), mean.reshape(7, 9), components)
        np.testing.assert_allclose(found.residual[b], expected, rtol=1e-4)
    window = images[1, 3:10, 5:14].ravel() - mean
    within = ((components @ window) ** 2 / np.asarray(of.variances)).sum()
    np.testing.assert_allclose(found.within[1, 3, 5], within, rtol=1e-3)


def test_stacked_subspaces_give_what_each_gives():
    parts = [pca.fit(samples(), kept) for kept in (0.5, 0.95)]
    assert len(parts[0].components) < len(parts[1].components)
    image = jnp.asarray(samples(8, 9)[None])
    both = jax.vmap(lambda of: pca.window_energies(of, image, 3))(pca.stack(parts))
    for i, part in enumerate(parts):
        for found, expected in zip(both, pca.window_energies(part, image, 3), strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-2)


def test_samples_without_variance_are_named():
    with pytest.raises(InputError, match="all samples are identical"):
        pca.fit(np.ones((5, 4), np.float32), 0.95)
    with pytest.raises(InputError, match=r"1 sample\(s\) given"):
        pca.fit(np.ones((1, 4), np.float32), 0.95)
