"""Models of the normal class that tell it from another one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pulmo_jax.methods.anomaly_classifier import AutoencoderAnomaly, GaussianAnomaly, image_logits
from pulmo_jax.methods.classes import ClosedForm, Trained
from pulmo_jax.types import InputError


def textures(count, seed=0, spot=False):
    """Smooth noise; with a spot of rough noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 16, 16)).repeat(2, 1).repeat(2, 2).astype(np.float32)
    if spot:
        for image in x:
            y, z = rng.integers(0, 24, 2)
            image[y : y + 8, z : z + 8] = 3 * rng.normal(size=(8, 8))
    return jnp.asarray(x)


def test_they_are_what_the_jobs_ask_for():
    assert issubclass(AutoencoderAnomaly, Trained)
    assert issubclass(GaussianAnomaly, ClosedForm)
    assert AutoencoderAnomaly(2, 0).normal_alone()
    assert GaussianAnomaly(2, 1).normal_alone()


@pytest.mark.parametrize("made", [AutoencoderAnomaly, GaussianAnomaly])
def test_more_than_two_classes_are_refused(made):
    with pytest.raises(InputError, match="an anomaly method needs two classes, but there are 3"):
        made(3, 0)


@pytest.mark.parametrize("normal", [0, 1])
def test_the_score_is_of_the_other_class(normal):
    maps = jnp.ones((2, 32, 32)).at[1, 3, 4:14].set(jnp.e**2)
    logits = np.asarray(image_logits(maps, normal))
    np.testing.assert_allclose(logits[:, normal], 0)
    np.testing.assert_allclose(logits[:, 1 - normal], [0, 2], atol=1e-6)  # 1 % of 1024 px are ten


@pytest.mark.parametrize("locations", ["pooled", "each"])
def test_a_gaussian_of_patches_finds_what_is_rough(locations):
    method = GaussianAnomaly(2, 0, size=32, window_px=4, locations=locations)
    params = method.fit([textures(40, 1), textures(24, 2)])
    score = jax.jit(method.logits)
    plain, rough = (np.asarray(score(params, textures(12, 3, spot)))[:, 1] for spot in (False, True))
    assert rough.min() > plain.max()
    where = np.asarray(method.saliency(params, textures(1, 3, True), jnp.array([1])))
    assert where.shape == (1, 32, 32)
    assert (where >= 0).all()


def test_images_that_do_not_vary_are_refused():
    with pytest.raises(InputError, match="are constant"):
        GaussianAnomaly(2, 0, size=32, window_px=4).fit([jnp.ones((8, 32, 32))])


def test_an_autoencoder_learns_its_class():
    method = AutoencoderAnomaly(2, 0, size=32, latent=4, width=8, noise_sigma=0.0)
    flat = textures(16, 1) * 0 + jnp.linspace(0, 1, 32)
    batch, optimizer = (flat, jnp.zeros(16, int)), optax.adam(1e-2)
    params = jax.jit(method.init)(jax.random.key(0))
    state = optimizer.init(params)
    losses = jax.jit(method.validation_losses)
    before = float(losses(params, batch).mean())

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        updates, state = optimizer.update(jax.grad(method.train_loss)(params, batch, key), state)
        return optax.apply_updates(params, updates), state

    for key in jax.random.split(jax.random.key(1), 60):
        params, state = step(params, state, key)
    assert float(losses(params, batch).mean()) < 0.5 * before
    score = np.asarray(jax.jit(method.logits)(params, jnp.concatenate([flat[:2], textures(2, 5)])))[:, 1]
    assert score[2:].min() > score[:2].max()


@pytest.mark.parametrize("locations", ["pooled", "each"])
def test_one_compilation_serves_all_networks_and_short_batches_count_no_image_twice(locations):
    method = GaussianAnomaly(2, 0, size=32, window_px=4, locations=locations)
    images = textures(21, 1)
    found = [method.fit(images[i : i + 8] for i in range(0, 21, 8)) for _ in range(3)]
    assert [program._cache_size() for program in method.compiled] == [1, 1]
    expected = GaussianAnomaly(2, 0, size=32, window_px=4, locations=locations).fit([images])
    for params in found:
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("locations", ["pooled", "each"])
def test_the_skeleton_is_that_of_fitted_parameters(locations):
    method = GaussianAnomaly(2, 0, size=32, window_px=4, stride_px=8, locations=locations)
    skeleton, fitted = method.skeleton(), method.fit([textures(20, 1)])
    assert jax.tree.structure(skeleton) == jax.tree.structure(fitted)
    for expected, found in zip(jax.tree.leaves(skeleton), jax.tree.leaves(fitted), strict=True):
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype)
