"""Low-rank adapters of every kind of network: merged equals unmerged, their share of the weights, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pulmo_jax.methods.lora import Factors, adapted_kernels, init_adapter, merged
from pulmo_jax.methods.networks import initial_params, with_params
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.models.classifier import ClassifierNet
from pulmo_jax.models.efficientnet_lite import EfficientNetLite0
from pulmo_jax.models.landmark_net import LandmarkNet
from pulmo_jax.types import InputError

NETWORKS = {
    "autoencoder": lambda: ConvAutoencoder(patch_size=64, channels=1, rngs=nnx.Rngs(0)),
    "classifier": lambda: ClassifierNet(n_classes=2, channels=1, rngs=nnx.Rngs(0)),
    "landmark_net": lambda: LandmarkNet(n_landmarks=3, channels=1, rngs=nnx.Rngs(0)),
    "encoder": lambda: EfficientNetLite0(channels=3, rngs=nnx.Rngs(0)),
}


def count(tree) -> int:
    return sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def filled(adapter, seed: int = 0):
    """The adapter with second factors other than zero."""
    rng = np.random.default_rng(seed)
    return {name: f._replace(up=jnp.asarray(rng.normal(size=f.up.shape), jnp.float32)) for name, f in adapter.items()}


@pytest.mark.parametrize(
    "name", ["autoencoder", "classifier", "landmark_net", pytest.param("encoder", marks=pytest.mark.slow)]
)
def test_adapters_of_any_network_are_a_small_share_of_it_and_begin_as_the_network(name):
    params = initial_params(NETWORKS[name]())
    adapter = init_adapter(params, 4, 0.02, jax.random.key(0))
    assert len(adapter) >= 2
    assert 0 < count(adapter) <= 0.02 * count(params)
    jax.tree.map(np.testing.assert_array_equal, merged(params, adapter, 8.0), params)
    changed = merged(params, filled(adapter), 8.0)
    different = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, changed)), strict=True)]
    assert sum(different) == len(adapter)


def test_a_merged_dense_layer_is_the_layer_beside_its_adapter():
    layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    params = initial_params(layer)
    adapter = filled({"kernel": Factors(jax.random.normal(jax.random.key(1), (6, 2)), jnp.zeros((2, 5)))})
    x = jax.random.normal(jax.random.key(2), (3, 6))
    beside = layer(x) + (7.0 / 2) * (x @ adapter["kernel"].down) @ adapter["kernel"].up
    np.testing.assert_allclose(with_params(layer, merged(params, adapter, 7.0))(x), beside, rtol=1e-5, atol=1e-5)


def test_a_merged_convolution_is_the_convolution_beside_its_adapter():
    layer = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
    params = initial_params(layer)
    adapter = filled({"kernel": Factors(jax.random.normal(jax.random.key(1), (27, 2)), jnp.zeros((2, 8)))})
    narrow, wide = nnx.Conv(3, 2, (3, 3), use_bias=False, rngs=nnx.Rngs(0)), nnx.Linear(2, 8, rngs=nnx.Rngs(0))
    narrow.kernel[...], wide.kernel[...] = adapter["kernel"].down.reshape(3, 3, 3, 2), adapter["kernel"].up
    x = jax.random.normal(jax.random.key(2), (2, 9, 9, 3))
    beside = layer(x) + (4.0 / 2) * (wide(narrow(x)))
    np.testing.assert_allclose(with_params(layer, merged(params, adapter, 4.0))(x), beside, rtol=1e-4, atol=1e-4)


def test_the_smallest_adapters_are_chosen_first_and_none_larger_than_its_kernel():
    params = {"a": {"kernel": jnp.ones((100, 100)), "bias": jnp.ones(100)}, "b": {"kernel": jnp.ones((10, 10))},
              "c": {"kernel": jnp.ones((2, 2))}}  # fmt: skip
    assert adapted_kernels(params, 2, 1.0) == ("b.kernel", "a.kernel")
    assert adapted_kernels(params, 2, 0.01) == ("b.kernel",)
    with pytest.raises(
        InputError, match=r"lora.rank=4: the smallest adapter has 80 parameters, more than lora.share=0.001"
    ):
        adapted_kernels(params, 4, 0.001)


def test_adapters_of_another_network_are_refused():
    params = {"a": {"kernel": jnp.ones((6, 5))}}
    for name, inputs in (("a.kernel", 7), ("b.kernel", 6)):
        with pytest.raises(InputError, match=f"the adapter of {name} is for {inputs} inputs and 5 outputs, but the"):
            merged(params, {name: Factors(jnp.ones((inputs, 2)), jnp.ones((2, 5)))}, 1.0)
