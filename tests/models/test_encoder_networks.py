"""Networks on the encoder: shapes, what is trained and how fast, and the stages of the classifier."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pulmo_jax.methods.windows import FeatureNetwork
from pulmo_jax.models.classifier import ClassifierNet
from pulmo_jax.models.efficientnet_lite import EfficientNetLite0, pretrained_encoder
from pulmo_jax.models.encoder_networks import efficientnet_lite0, efficientnet_lite0_features
from pulmo_jax.models.on_encoder import name_of
from pulmo_jax.models.unet import Encoder, UNet
from pulmo_jax.training.layer_rates import Rated, with_layer_rates

IMAGES = jax.random.normal(jax.random.key(0), (2, 64, 64, 2))


def network(**options):
    return efficientnet_lite0(channels=2, rngs=nnx.Rngs(0), weights=None, **options)


def test_the_encoder_has_features_at_five_scales():
    encoder = EfficientNetLite0(channels=2, rngs=nnx.Rngs(0))
    assert isinstance(encoder, Encoder)
    assert encoder.strides == (2, 4, 8, 16, 32)
    shapes = [(2, 64 // s, 64 // s, c) for s, c in zip(encoder.strides, encoder.channels, strict=True)]
    assert [x.shape for x in jax.eval_shape(encoder, IMAGES)] == shapes
    assert encoder.channels == (16, 24, 40, 112, 320)


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_heat_maps_have_the_stride_that_is_asked_for(stride):
    model = network(n_landmarks=5, heat_stride=stride)
    assert model.stride == 32
    assert jax.eval_shape(model, IMAGES).shape == (2, 64 // stride, 64 // stride, 5)


@pytest.mark.slow
def test_the_stages_of_the_classifier_halve_the_resolution_as_those_of_the_small_network():
    model, small = (
        network(n_classes=3),
        ClassifierNet(n_classes=3, channels=2, rngs=nnx.Rngs(0), widths=(8, 8, 8, 8, 8)),
    )
    for last in range(1, 6):
        one, two = (jax.eval_shape(partial(m.features, last=last), IMAGES).shape for m in (model, small))
        assert one[:3] == two[:3]
    whole = model.features(IMAGES)
    np.testing.assert_allclose(model.features(model.features(IMAGES, last=2), first=2), whole, atol=1e-5)
    assert model(IMAGES[:, :48, :48]).shape == (2, 3)  # the default size of the task is no multiple of 32
    assert model.stride == 1


@pytest.mark.slow
@pytest.mark.parametrize(("train_from", "first"), [("all", -1), ("block3", 3), ("none", 16)])
def test_what_is_not_trained_keeps_its_value_in_spite_of_weight_decay(train_from, first):
    model = network(n_landmarks=2, heat_stride=16, train_from=train_from, rate_decay=0.5)
    assert isinstance(model.encoder, Rated)
    params = nnx.state(model, nnx.Param)
    gradient = jax.tree.map(jnp.ones_like, params)
    plain = optax.adamw(0.1, weight_decay=0.5)
    rated = with_layer_rates(plain, SimpleNamespace(skeleton=model))
    (full, _), (updates, _) = (
        optimizer.update(gradient, optimizer.init(params), params) for optimizer in (plain, rated)
    )
    seen = set()
    for (path, update), whole in zip(jax.tree.flatten_with_path(updates)[0], jax.tree.leaves(full), strict=True):
        name = name_of(path)
        place = 16 if not name.startswith("encoder.") else -1 if "stem" in name else int(name.split(".")[2])
        seen.add(place)
        np.testing.assert_allclose(update, whole * (0 if place < first else 0.5 ** (16 - place)), rtol=1e-6)
    assert seen == set(range(-1, 17))


@pytest.mark.slow
def test_no_gradient_is_computed_before_the_first_block_that_is_trained():
    graph, params = nnx.split(network(n_landmarks=2, heat_stride=16, train_from="block14"), nnx.Param)
    gradient = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(IMAGES) ** 2).sum()))(params)
    largest = {name_of(path): float(jnp.abs(g).max()) for path, g in jax.tree.flatten_with_path(gradient)[0]}
    assert largest["encoder.blocks.13.project.kernel"] == largest["encoder.stem.kernel"] == 0
    assert min(largest["encoder.blocks.14.project.kernel"], largest["lateral.0.kernel"]) > 0


def test_a_unet_has_the_encoder_and_logits_at_the_resolution_of_the_image():
    model = UNet(patch_size=64, channels=2, n_classes=3, rngs=nnx.Rngs(0), encoder=pretrained_encoder, dtype="bfloat16")
    assert model.stride == 32
    found = jax.eval_shape(model, IMAGES)
    assert (found.shape, found.dtype) == ((2, 64, 64, 3), jnp.float32)
    assert {x.dtype for x in jax.eval_shape(model.encoder, IMAGES.astype(jnp.bfloat16))} == {jnp.dtype(jnp.bfloat16)}


def test_parameters_have_names():
    names = [name_of(path) for path, _ in jax.tree.flatten_with_path(nnx.state(network(n_classes=2), nnx.Param))[0]]
    assert {"encoder.stem.kernel", "encoder.blocks.1.expand.0.scale", "head.bias"} <= set(names)
    assert len(set(names)) == len(names)


def test_features_are_those_of_the_encoder_and_are_not_trained():
    model = efficientnet_lite0_features(patch_size=64, channels=2, rngs=nnx.Rngs(0), weights=None, blocks=(2, 10))
    assert isinstance(model, FeatureNetwork)
    for found, expected in zip(model.feature_maps(IMAGES), model.encoder.taps(IMAGES, (2, 10)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert model.encoder.first_trained == 16
    np.testing.assert_array_equal(model(IMAGES), IMAGES)


def test_cells_that_do_not_divide_the_patches_are_refused():
    def of(patch_size, blocks):
        return efficientnet_lite0_features(
            patch_size=patch_size, channels=1, rngs=nnx.Rngs(0), weights=None, blocks=blocks
        )

    assert of(48, (4, 10)).patch_size == 48
    with pytest.raises(ValueError, match="features of block 11 have cells of 32 px; give a multiple of 32"):
        of(48, (4, 11))
    with pytest.raises(ValueError, match=r"model.blocks=\[4, 2\]: give each block once, in ascending order"):
        of(64, (4, 2))
