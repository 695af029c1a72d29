"""A method with low-rank adapters: what it begins as, what it leaves alone, and what it refuses."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pulmo_jax.config.lora import LoraConfig
from pulmo_jax.methods.adapted import Adapted
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.ensemble import Ensemble
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.models.identity import Identity
from pulmo_jax.types import InputError

NO_NETWORK = Identity(patch_size=16, channels=1, rngs=nnx.Rngs(0))
LORA = LoraConfig(rank=2, alpha=4.0, share=0.5)


@pytest.fixture(scope="module")
def base():
    return Autoencoder(ConvAutoencoder(patch_size=16, channels=1, width=4, latent=8, rngs=nnx.Rngs(0)))


def test_it_begins_as_its_base_and_a_changed_adapter_acts_as_the_merged_network(base):
    params, patches = base.init(), jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    method = Adapted(NO_NETWORK, LORA, base, params)
    adapter, key = method.init(), jax.random.key(1)
    np.testing.assert_array_equal(method.residual(adapter, patches), base.residual(params, patches))
    changed = {name: pair._replace(up=pair.up + 0.1) for name, pair in adapter.items()}
    merged = method.merged(changed)
    np.testing.assert_array_equal(method.reconstruct(changed, patches), base.reconstruct(merged, patches))
    assert float(method.train_loss(changed, patches, key)) == float(base.train_loss(merged, patches, key))
    assert not np.allclose(method.residual(changed, patches), base.residual(params, patches))


@dataclass(frozen=True)
class WithCodebook:
    """A method with an entry that no gradient changes."""

    frozen: ClassVar[tuple[str, ...]] = ("book",)

    def init(self):
        return {"book": {"kernel": jnp.ones((20, 20))}, "network": {"kernel": jnp.ones((20, 20))}}


def test_frozen_entries_get_no_adapter():
    assert list(Adapted(NO_NETWORK, LORA, WithCodebook()).init()) == ["network.kernel"]


def test_an_ensemble_is_refused(base):
    with pytest.raises(InputError, match="is an ensemble of 2 networks, and adapters are for one"):
        Adapted(NO_NETWORK, LORA, Ensemble((base, base)))
