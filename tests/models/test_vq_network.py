"""Network of the vector-quantised autoencoder: shapes, precision, locality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.residuals import kept_mib

from pulmo_jax.methods.vq_autoencoder import LatentGrid
from pulmo_jax.models.vq_autoencoder import VqNetwork


def make(patch_size=16, channels=2, **options):
    return VqNetwork(patch_size=patch_size, channels=channels, rngs=nnx.Rngs(0), width=8, blocks=1, **options)


@pytest.mark.parametrize("code_px", [2, 4, 8])
def test_latent_vectors_form_a_grid_of_blocks(code_px):
    network = make(code_px=code_px, code_features=5)
    x = jax.random.normal(jax.random.key(0), (3, 16, 16, 2))
    z = network.encode(x)
    assert isinstance(network, LatentGrid)
    assert z.shape == (3, 16 // code_px, 16 // code_px, 5) == (3, network.code_side, network.code_side, 5)
    assert network.decode(z).shape == x.shape
    np.testing.assert_array_equal(network(x), network.decode(z))


def test_patch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="^data.patch_size=20: must be a multiple of model.code_px=8$"):
        make(patch_size=20, code_px=8)


def test_bfloat16_is_close_to_float32_and_returns_float32():
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 2))
    full, half = make()(x), make(dtype="bfloat16")(x)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - full).max() < 0.1 * np.abs(full).max()


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 2))

    def gradient(remat):
        graph, state = nnx.split(make(remat=remat))
        return jax.grad(lambda s: (nnx.merge(graph, s)(x) ** 2).mean())(state)

    for a, b in zip(jax.tree.leaves(gradient(True)), jax.tree.leaves(gradient(False)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rematerialisation_keeps_the_inputs_of_the_blocks_only():
    x = jax.random.normal(jax.random.key(0), (8, 64, 64, 2))
    plain, remat = (kept_mib(make(patch_size=64, remat=remat), x) for remat in (False, True))
    assert remat < 0.3 * plain


def test_images_of_a_batch_do_not_influence_each_other():
    network = make()
    x = jax.random.normal(jax.random.key(0), (3, 16, 16, 2))
    np.testing.assert_allclose(network(x)[1:2], network(x[1:2]), atol=1e-5)
