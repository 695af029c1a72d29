"""Logistic regression of features: the features, the fit, the choice of the penalty and the saliency by other means."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.model_selection import StratifiedGroupKFold

from pulmo_jax.core.contrast import zscore
from pulmo_jax.methods.logistic import STRENGTHS, LogisticFeatures
from pulmo_jax.methods.networks import SHARED
from pulmo_jax.models.encoder_networks import efficientnet_lite0_features
from pulmo_jax.types import InputError


class TwoLayers(nnx.Module):
    """Positive features of cells of 4 px and of 8 px."""

    def __init__(self, patch_size: int, channels: int, *, rngs: nnx.Rngs):
        self.patch_size, self.channels = patch_size, channels
        self.first = nnx.Linear(16 * channels, 3, rngs=rngs)
        self.second = nnx.Linear(4 * 3, 5, rngs=rngs)

    def feature_maps(self, x):
        first = nnx.relu(self.first(cells(x, 4)))
        return [first, nnx.relu(self.second(cells(first, 2)))]


def cells(x, side):
    count, height, width, channels = x.shape
    split = x.reshape(count, height // side, side, width // side, side, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(count, height // side, width // side, -1)


def method_of(n_classes=2, class_weights=None, **options):
    weights = class_weights or (1.0,) * n_classes
    return LogisticFeatures(n_classes, weights, partial(TwoLayers), **({"sizes": (32, 48)} | options))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).normal(100, 20, (6, 48, 48)), jnp.float32)


def shared_of(method, images):
    network = method.random()
    _, sums = method.describe(network, images, jnp.ones(len(images)))
    return method.shared(network, jax.tree.map(lambda total: total / len(images), sums))


def test_features_are_means_and_differences_to_the_mirror_image_of_every_layer_over_the_sizes(images):
    method = method_of()
    network = method.random()
    found, _ = method.describe(network, images, jnp.ones(len(images)))
    assert found.shape == (6, 2 * 3 + 2 * 5)
    module = nnx.merge(nnx.graphdef(method.extractor()), network)
    for image, of_image in zip(images, found, strict=True):
        by_size = []
        for size in (32, 48):
            small = jax.image.resize(image, (size, size), "linear")
            values = []
            for layer in module.feature_maps(zscore(small[None])[..., None]):
                layer = np.asarray(layer[0], float)
                values += [layer.mean((0, 1)), np.abs(layer - layer[:, ::-1]).mean((0, 1))]
            by_size.append(np.concatenate(values))
        np.testing.assert_allclose(of_image, np.mean(by_size, 0), rtol=1e-4, atol=1e-5)


def test_a_symmetric_image_has_no_differences(images):
    method = method_of(sizes=(48,))
    network = method.random()
    network["first"]["kernel"][...] = jnp.ones((16, 3)) / 16  # cells that look the same from both sides
    both = jnp.concatenate([images[:, :, :24], images[:, :, 23::-1]], axis=2)
    features, _ = method.describe(network, both, jnp.ones(len(both)))
    np.testing.assert_allclose(features[:, 3:6], 0, atol=1e-5)
    assert np.abs(features[:, :3]).max() > 0.01


def blobs(count, n_classes, seed=0, size=7, apart=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % n_classes
    x = rng.normal(size=(count, size)) * rng.uniform(0.1, 10, size) + 5
    x[:, :n_classes] += apart * x.std(0)[:n_classes] * np.eye(n_classes)[labels]
    return x.astype(np.float32), labels


@pytest.mark.parametrize(("n_classes", "weights"), [(2, (1.0, 1.0)), (2, (0.5, 1.5)), (3, (1.0, 0.7, 1.3))])
def test_the_fit_minimises_the_penalised_loss(n_classes, weights):
    """Against a general minimiser on the standardised features in float64, with the strength that was chosen."""
    method = method_of(n_classes, weights)
    x, labels = blobs(60, n_classes)
    groups = np.arange(60)
    params = method.fit(x, labels, groups, seed=3)
    z = (x - x.mean(0)) / x.std(0)
    left, values, _ = np.linalg.svd(z, full_matrices=False)
    strength = method.choose_strength(left * values, labels, groups, 3)

    def loss(flat):
        kernel, bias = flat[:-n_classes].reshape(-1, n_classes), flat[-n_classes:]
        kernel = kernel if n_classes > 2 else np.stack([-kernel[:, 1], kernel[:, 1]], 1) / 2
        log_p = log_softmax(z @ kernel + bias, axis=1)[np.arange(60), labels]
        norm = (kernel**2).sum() if n_classes > 2 else (4 * kernel[:, 1] ** 2).sum()
        return -(np.array(weights)[labels] * log_p).sum() * strength + norm / 2

    best = minimize(loss, np.zeros((z.shape[1] + 1) * n_classes), options={"gtol": 1e-7})
    kernel, bias = best.x[:-n_classes].reshape(-1, n_classes), best.x[-n_classes:]
    kernel = kernel if n_classes > 2 else np.stack([-kernel[:, 1], kernel[:, 1]], 1) / 2
    expected = log_softmax(z @ kernel + bias, axis=1)
    found = jax.nn.log_softmax(method.head().logits(params, jnp.asarray(x)))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    losses = method.head().validation_losses(params, (jnp.asarray(x), jnp.asarray(labels)))
    np.testing.assert_allclose(losses, -np.array(weights)[labels] * expected[np.arange(60), labels], atol=3e-3)


def test_what_separates_the_classes_gets_a_weak_penalty_and_noise_a_strong_one():
    method = method_of()
    clear, labels = blobs(80, 2, apart=6.0)
    noise = np.random.default_rng(1).normal(size=clear.shape)
    groups = np.arange(80)
    assert method.choose_strength(clear.astype(float), labels, groups, 0) > 10 * STRENGTHS[0]
    assert method.choose_strength(noise, labels, groups, 0) < 0.1


def test_copies_on_both_sides_of_a_split_do_not_choose_the_penalty():
    """Labels at random, but each image is there four times: only with its group is nothing learnt."""
    method, rng = method_of(), np.random.default_rng(2)
    x, labels = np.repeat(rng.normal(size=(20, 30)), 4, axis=0), np.repeat(np.arange(20) % 2, 4)
    apart = method.choose_strength(x, labels, np.repeat(np.arange(20), 4), 0)
    leaking = method.choose_strength(x, labels, np.arange(80), 0)
    assert apart < leaking / 10


def test_a_class_of_one_group_cannot_be_cross_validated():
    x, labels = blobs(20, 2)
    groups = np.where(labels == 1, 99, np.arange(20))
    with pytest.raises(InputError, match="fewer than 2 groups.*use method=classifier"):
        method_of().fit(x, labels, groups, 0)


def test_a_class_that_every_split_keeps_together_cannot_be_cross_validated(monkeypatch):
    x, labels = blobs(20, 2)
    ends = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    monkeypatch.setattr(StratifiedGroupKFold, "split", lambda *_: [ends, ends[::-1]])
    with pytest.raises(InputError, match="a class is missing"):
        method_of().fit(x, labels, np.arange(20), 0)


def params_of(method, images, seed=0):
    shared = shared_of(method, images)
    x, labels = blobs(40, method.n_classes, seed=seed, size=16)
    return method.fit(x, labels, np.arange(40), 0) | {SHARED: shared}


def test_the_skeleton_is_that_of_the_parameters(images):
    method = method_of()
    found, expected = method.skeleton(), params_of(method, images)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )


def test_logits_and_losses_of_images_are_those_of_their_features(images):
    method = method_of(class_weights=(0.5, 1.5))
    params, labels = params_of(method, images), jnp.arange(6) % 2
    features, _ = method.describe(params[SHARED]["network"], images, jnp.ones(6))
    np.testing.assert_allclose(method.logits(params, images), method.head().logits(params, features), atol=1e-5)
    losses = method.head().validation_losses(params, (features, labels))
    np.testing.assert_allclose(method.validation_losses(params, (images, labels)), losses, atol=1e-5)


def test_saliency_sums_to_the_logit_relative_to_the_average_image(images):
    """Relative to an average image without any features, and with weights such that every term is positive."""
    method = method_of()
    params = params_of(method, images)
    weights = jnp.abs(params["kernel"][:, 1])
    params |= {"kernel": jnp.stack([-weights, weights], 1), "bias": jnp.zeros(2)}
    params[SHARED] |= {"means": jax.tree.map(jnp.zeros_like, params[SHARED]["means"])}
    maps = method.saliency(params, images, jnp.ones(6, int))
    np.testing.assert_allclose(maps.mean((1, 2)), method.logits(params, images)[:, 1], rtol=0.02)
    np.testing.assert_array_equal(method.saliency(params, images, jnp.zeros(6, int)), 0)


def test_saliency_shows_what_no_other_image_has(images):
    method = method_of(sizes=(48,))
    params = params_of(method, images)
    weights = jnp.ones(len(params["kernel"]))
    params |= {"kernel": jnp.stack([-weights, weights], 1)}
    marked = images[:1].at[0, 8:16, 8:16].add(200)
    shown = np.asarray(method.saliency(params, marked, jnp.ones(1, int))[0])
    assert shown[8:16, 8:16].mean() > 3 * shown.mean()


def test_sizes_must_suit_the_network():
    network = partial(efficientnet_lite0_features, weights=None, blocks=(4, 15))
    with pytest.raises(InputError, match=r"^method.sizes=\[64, 80\]: the features of block 15 .* multiple of 32"):
        LogisticFeatures(2, (1.0, 1.0), network, sizes=(64, 80))
