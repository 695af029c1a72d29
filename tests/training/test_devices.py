"""One batch over four simulated devices: the losses of one device, within rounding."""

import jax
import numpy as np
import pytest
from references import child

from pulmo_jax.training import devices
from pulmo_jax.types import InputError

COMMON = """
from functools import partial
import jax, numpy as np
from flax import nnx
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.landmark_net import LandmarkNetwork
from pulmo_jax.models.landmark_net import LandmarkNet
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.training import devices
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import init_state, make_step
from pulmo_jax.types import InputError

assert len(jax.devices()) == 4
method = Autoencoder(ConvAutoencoder(patch_size=16, channels=1, rngs=nnx.Rngs(0), width=8))
optimizer = adamw(steps=6)
mesh = devices.all_devices(8)

def patches(rng):
    return rng.random((8, 16, 16, 1), np.float32)

def losses(method, draw, place, rows, sharding):
    state, step, found = place(init_state(method, optimizer)), make_step(method, optimizer, 0.9, 0, sharding), []
    for number in range(6):
        batch = rows(draw(np.random.default_rng(number)))
        state, info = step(state, batch)
        found.append([float(info["loss"]), float(info["gradient_norm"])])
    return state, batch, found

ALONE = (lambda state: state, lambda rows: rows, None)
SHARED = (lambda state: devices.on_all(state, mesh), lambda rows: devices.divided(rows, mesh), devices.everywhere(mesh))
"""
PATCHES = """
alone, _, expected = losses(method, patches, *ALONE)
shared, batch, found = losses(method, patches, *SHARED)
np.testing.assert_allclose(found, expected, rtol=2e-6)
assert len(batch.sharding.device_set) == 4 and batch.addressable_shards[0].data.shape == (2, 16, 16, 1)
for leaf, other in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
    assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 4
    assert len(devices.here(leaf).sharding.device_set) == 1
    np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)
try:
    devices.all_devices(6)
except InputError as error:
    print(error)
"""
LANDMARKS = """
model = partial(LandmarkNet, stem_stride=2, widths=(8, 8, 8))
network = LandmarkNetwork(3, (1, 0, 2), None, model, size=32, members=2, shape_prior=False)

def images_and_points(rng):
    return rng.random((8, 32, 32), np.float32), rng.uniform(4, 28, (8, 3, 2)).astype(np.float32)

*_, expected = losses(network, images_and_points, *ALONE)
_, (images, points), found = losses(network, images_and_points, *SHARED)
np.testing.assert_allclose(found, expected, rtol=1e-4)
assert images.addressable_shards[0].data.shape == (2, 32, 32) and points.addressable_shards[0].data.shape == (2, 3, 2)
"""


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the other devices are simulated on a CPU")
@pytest.mark.parametrize(
    "program", [PATCHES, pytest.param(LANDMARKS, marks=pytest.mark.slow)], ids=["patches", "landmarks"]
)
def test_batch_divided_among_four_devices_gives_the_losses_of_one(program):
    done = child.run_program(COMMON + program, XLA_FLAGS=child.FOUR_DEVICES, JAX_PLATFORMS="cpu")
    if program is PATCHES:
        assert "trainer.batch_size=6 cannot be divided by the 4 devices; give a multiple of 4" in done.stdout


def test_one_process_agrees_with_itself():
    agreed = devices.agreement(devices.all_devices(4))
    assert [agreed(signum) for signum in (None, 15, None)] == [None, 15, None]
    assert devices.is_first()
    with devices.first_then_others():
        devices.require_same(3, "the step")
    devices.disconnect()


def test_copy_on_all_devices_has_a_memory_of_its_own():
    value = np.arange(4.0, dtype=np.float32)
    placed = devices.on_all({"a": value}, devices.all_devices(4))
    value[0] = 9
    np.testing.assert_array_equal(placed["a"], [0, 1, 2, 3])
    assert isinstance(devices.here(placed)["a"], jax.Array)


def test_coordinator_that_cannot_be_reached_is_an_error_that_names_the_keys(monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("Unable to connect\nto anything")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(InputError, match=r"cluster.coordinator=h:1 cluster.processes=2 .* \(Unable to connect\)"):
        devices.connect("h:1", 2, 0)
    devices.connect(None, None, None)
