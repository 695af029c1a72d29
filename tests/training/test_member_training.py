"""Networks that are trained together become what each becomes alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import child

from pulmo_jax.methods.classifier import ClassifierNetwork
from pulmo_jax.models.classifier import ClassifierNet
from pulmo_jax.training.members import chunk_sizes, init_members, make_member_step
from pulmo_jax.training.state import TrainState, make_step

NETWORK = partial(ClassifierNet, widths=(8, 8))
METHOD = ClassifierNetwork(2, (1.0, 1.0), NETWORK, size=32, asymmetry=(), mixup=0.0)
SEEDS = [3, 5, 8]


class Linear(ClassifierNetwork):
    """Soon compiled."""

    def init(self, key):
        return {"weights": 0.1 * jax.random.normal(key, (32 * 32, 2))}

    def train_loss(self, params, batch, key):
        images, labels = batch
        noisy = images + 0.5 * jax.random.normal(key, images.shape)
        logits = noisy.reshape(len(images), -1) @ params["weights"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


SIMPLE = Linear(2, (1.0, 1.0))


def keys(seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))


def batches(count, members, rows=4):
    rng = np.random.default_rng(0)
    for _ in range(count):
        images = rng.normal(size=(rows, members, 32, 32)).astype(np.float32)
        yield jnp.asarray(images), jnp.asarray(rng.integers(2, size=(rows, members)))


def trained(seeds, sizes, which=slice(None), steps=4, method=SIMPLE):
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.3, 0.9))  # Adam would enlarge roundings
    state = init_members(method, optimizer, keys(seeds), sizes)
    step = make_member_step(method, optimizer, 0.9, keys(seeds))
    for images, labels in batches(steps, len(SEEDS)):
        state, metrics = step(state, (images[:, which], labels[:, which]))
    return state, metrics


def stacked(chunks):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)


@pytest.fixture(scope="module")
def together():
    state, metrics = trained(SEEDS, [2, 1])
    assert int(state.step) == 4
    assert np.isfinite(float(metrics["loss"]))
    return stacked(state.params), stacked(state.ema)


def test_a_network_among_others_is_what_it_is_alone(together):
    member = 1
    alone, _ = trained(SEEDS[member : member + 1], [1], slice(member, member + 1))
    for mine, all_of_them in zip((alone.params, alone.ema), together, strict=True):
        pairs = zip(jax.tree.leaves(stacked(mine)), jax.tree.leaves(all_of_them), strict=True)
        for one, many in pairs:
            np.testing.assert_allclose(one[0], many[member], rtol=2e-4, atol=2e-5)


def test_a_network_takes_the_steps_that_it_takes_by_itself():
    """The update of one network alone, without members, from the same start and key."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.3, 0.9))
    params = SIMPLE.init(jax.random.key(SEEDS[1]))
    alone = TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    step = make_step(SIMPLE, optimizer, 0.9, seed=SEEDS[1])
    for images, labels in batches(4, len(SEEDS)):
        alone, metrics = step(alone, (images[:, 1], labels[:, 1]))
    members, means = trained(SEEDS[1:2], [1], slice(1, 2))
    assert int(members.step) == int(alone.step) == 4
    found, expected = (jax.tree.leaves((state.params, state.ema)) for state in (members, alone))
    for many, one in zip(found, expected, strict=True):
        np.testing.assert_allclose(many[0], one, rtol=1e-5, atol=1e-6)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(means[name], metrics[name], rtol=1e-5)


@pytest.mark.slow
def test_a_classifier_beside_another_is_what_it_is_alone():
    both, _ = trained(SEEDS[:2], [2], slice(0, 2), method=METHOD)
    alone, _ = trained(SEEDS[1:2], [1], slice(1, 2), method=METHOD)
    for many, one in zip(jax.tree.leaves(both.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(one[0], many[1], rtol=2e-4, atol=2e-5)


def test_the_compiled_step_is_the_step_and_tells_its_memory():
    optimizer = optax.sgd(0.3, 0.9)
    step = make_member_step(SIMPLE, optimizer, 0.9, keys(SEEDS))
    (batch,) = batches(1, len(SEEDS))
    program = step.compiled(init_members(SIMPLE, optimizer, keys(SEEDS), [2, 1]), batch)
    assert program.temporary_bytes > 0
    expected, _ = step(init_members(SIMPLE, optimizer, keys(SEEDS), [2, 1]), batch)
    found, metrics = program.step(init_members(SIMPLE, optimizer, keys(SEEDS), [2, 1]), batch)
    assert np.isfinite(float(metrics["loss"]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(TypeError, match="float32"):  # of another shape than it was compiled for
        program.step(init_members(SIMPLE, optimizer, keys(SEEDS), [2, 1]), (batch[0][:2], batch[1][:2]))


def test_networks_of_other_seeds_differ(together):
    weights = together[0]["weights"]
    assert all(not np.allclose(weights[0], other) for other in weights[1:])


def test_chunks_are_even():
    assert chunk_sizes(20, 8) == [5, 5, 5, 5]
    assert chunk_sizes(13, 4) == [4, 3, 3, 3]
    assert chunk_sizes(5, 8) == [5]
    assert chunk_sizes(16, 8) == [8, 8]


PROGRAM = """
from functools import partial
import jax, numpy as np
from training.test_member_training import METHOD, SEEDS, batches, keys
import optax
from pulmo_jax.training import devices
from pulmo_jax.training.members import init_members, make_member_step
assert len(jax.devices()) == 4
optimizer = optax.adamw(1e-2)
losses = []
for mesh in (devices.all_devices(4), None):
    state = init_members(METHOD, optimizer, keys(SEEDS[:2]), [2])
    where = None if mesh is None else devices.everywhere(mesh)
    step = make_member_step(METHOD, optimizer, 0.9, keys(SEEDS[:2]), where)
    if mesh is not None:
        state = devices.on_all(state, mesh)
        step = step.compiled(state, devices.described(next(batches(1, 2)), mesh)).step
    for batch in batches(3, 2):
        if mesh is not None:
            batch = devices.divided(tuple(map(np.asarray, batch)), mesh)
            assert len(batch[0].sharding.device_set) == 4 and batch[0].addressable_shards[0].data.shape[0] == 1
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-4)
print("same losses")
"""


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the other devices are simulated on a CPU")
def test_batches_divided_among_four_devices_give_the_losses_of_one():
    done = child.run_program(PROGRAM, XLA_FLAGS=child.FOUR_DEVICES, JAX_PLATFORMS="cpu")
    assert "same losses" in done.stdout
