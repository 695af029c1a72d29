"""U-Net: shapes, rearrangements, the encoder as a part, and invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pulmo_jax.models.blocks import convolve
from pulmo_jax.models.unet import (
    ConvEncoder,
    Encoder,
    UNet,
    block_kernel,
    blocks_to_features,
    depth_for,
    features_to_blocks,
    upsample,
)


def make(patch_size=32, channels=2, n_classes=3, **options):
    return UNet(patch_size=patch_size, channels=channels, n_classes=n_classes, rngs=nnx.Rngs(0), width=8, **options)


def small_encoder(**options):
    return lambda **given: ConvEncoder(**given, width=8, layers=1, **options)


@pytest.mark.parametrize("stem", [1, 2, 4])
def test_logits_have_the_size_of_the_image(stem):
    network = make(encoder=small_encoder(stem=stem))
    assert network(jnp.zeros((2, 32, 32, 2))).shape == (2, 32, 32, 3)
    assert network(jnp.zeros((1, 64, 32, 2))).shape == (1, 64, 32, 3)  # fully convolutional


def test_depth_follows_from_the_patch_size():
    assert [depth_for(size, 2) for size in (16, 32, 64, 96, 192, 256)] == [1, 2, 3, 4, 5, 5]
    assert depth_for(48, 1) == 4


def test_deep_supervision_adds_logits_of_the_next_scales():
    network = make(encoder=small_encoder(stem=2, depth=4), deep_supervision=2)
    assert [logits.shape for logits in network.scales(jnp.zeros((1, 32, 32, 2)))] == [
        (1, 32, 32, 3), (1, 8, 8, 3), (1, 4, 4, 3),
    ]  # fmt: skip
    np.testing.assert_array_equal(network.scales(jnp.ones((1, 32, 32, 2)))[0], network(jnp.ones((1, 32, 32, 2))))


def test_rearrangements_are_inverse_and_keep_neighbours():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    features = blocks_to_features(x, 2)
    assert features.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(features[0, 0, 0].reshape(2, 2, 3), x[0, :2, :2])
    np.testing.assert_array_equal(features_to_blocks(features, 2), x)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_convolution_of_blocks_is_that_of_their_pixels(side):
    pixels = jax.random.normal(jax.random.key(0), (2, 4 * side, 3 * side, 5))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 5, 2))
    blocks = convolve(1, blocks_to_features(pixels, side), block_kernel(kernel, side))
    np.testing.assert_allclose(features_to_blocks(blocks, side), convolve(1, pixels, kernel), atol=1e-4)


def test_upsampling_is_bilinear():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    twice = jax.image.resize(x, (2, 6, 10, 4), "linear")
    np.testing.assert_allclose(upsample(x, 2), twice, atol=1e-6)
    np.testing.assert_allclose(upsample(x, 4), jax.image.resize(twice, (2, 12, 20, 4), "linear"), atol=1e-6)
    np.testing.assert_array_equal(upsample(x, 1), x)


class Pyramid(nnx.Module):
    """An encoder of means of blocks, as a stand-in for a pretrained one; its strides start at 4."""

    channels = (16, 24)
    strides = (4, 8)

    def __init__(self, *, patch_size, channels, rngs):
        self.linear = nnx.List([nnx.Linear(channels, c, rngs=rngs) for c in self.channels])

    def __call__(self, x):
        def mean(side):
            return x.reshape(len(x), x.shape[1] // side, side, x.shape[2] // side, side, -1).mean((2, 4))

        return [linear(mean(side)) for linear, side in zip(self.linear, self.strides, strict=True)]


@pytest.mark.slow
def test_any_encoder_of_features_at_several_scales_fits():
    network = make(encoder=Pyramid)
    assert isinstance(network.encoder, Encoder)
    assert network(jnp.ones((1, 32, 32, 2))).shape == (1, 32, 32, 3)
    _, params = nnx.split(network, nnx.Param)
    gradients = jax.grad(lambda p: nnx.merge(nnx.graphdef(network), p)(jnp.ones((1, 32, 32, 2))).sum())(params)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradients["encoder"]))


@pytest.mark.parametrize("options", [{"norm": "none"}, {"residual": False}, {"dtype": "bfloat16"}])
def test_options_give_finite_logits_in_float32(options):
    logits = make(**options)(jax.random.normal(jax.random.key(0), (1, 32, 32, 2)))
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


def test_logits_shift_with_the_image():
    """Away from the border, a shift by the coarsest stride shifts the logits: nothing depends on the position."""
    network = make(patch_size=64, encoder=small_encoder(stem=2, depth=2, norm="none"), norm="none")
    image = jax.random.normal(jax.random.key(1), (1, 128, 128, 2))
    moved = jnp.roll(image, (4, 8), (1, 2))
    expected = jnp.roll(network(image), (4, 8), (1, 2))
    np.testing.assert_allclose(network(moved)[0, 48:80, 48:80], expected[0, 48:80, 48:80], rtol=1e-4, atol=1e-5)
