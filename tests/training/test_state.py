"""The training step: pure, against closed forms and NumPy recursions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references.linear_method import LinearMethod, batch_of

from pulmo_jax.training.state import TrainState, init_state, make_step

SGD = optax.sgd(0.1)


def copied(state: TrainState) -> TrainState:
    """A step's own, whose buffers it may take."""
    return jax.tree.map(jnp.copy, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def gradient_by_hand(params: dict, batch: np.ndarray) -> tuple[float, float]:
    """Of mean((gain x + offset - x)^2), in float64."""
    x = batch.astype(np.float64)
    error = params["gain"] * x + params["offset"] - x
    return 2 * (error * x).mean(), 2 * error.mean()


def test_same_state_and_batch_give_the_same_result_bit_for_bit():
    method = LinearMethod(noise=0.3)
    optimizer = optax.adam(0.1)
    step = make_step(method, optimizer, 0.9, seed=3)
    state, _ = step(init_state(method, optimizer), batch_of(0))
    first, again = step(copied(state), batch_of(1)), step(copied(state), batch_of(1))
    assert_same(first, again)
    rebuilt = make_step(method, optimizer, 0.9, seed=3)(copied(state), batch_of(1))
    assert_same(first, rebuilt)


def test_noise_is_a_function_of_seed_and_step():
    method = LinearMethod(noise=0.3)
    start = init_state(method, SGD).replace(params={"gain": jnp.ones(1), "offset": jnp.zeros(())})

    steps = {seed: make_step(method, SGD, 0.9, seed) for seed in (0, 1)}

    def loss(seed: int, number: int) -> float:
        state = copied(start).replace(step=jnp.asarray(number, jnp.int32))
        return float(steps[seed](state, batch_of(0))[1]["loss"])

    losses = [loss(0, 0), loss(0, 1), loss(1, 0)]
    assert len(set(losses)) == 3
    assert loss(0, 1) == losses[1]


def test_one_step_is_the_gradient_step_by_hand():
    state = init_state(LinearMethod(), SGD).replace(params={"gain": jnp.full(1, 0.5), "offset": jnp.asarray(-0.25)})
    before = jax.tree.map(np.array, state.params)
    gain, offset = gradient_by_hand(before, batch_of(0))
    after, metrics = make_step(LinearMethod(), SGD, 0.9, 0)(state, batch_of(0))
    np.testing.assert_allclose(after.params["gain"], before["gain"] - 0.1 * gain, rtol=1e-6)
    np.testing.assert_allclose(after.params["offset"], before["offset"] - 0.1 * offset, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], np.hypot(gain, offset), rtol=1e-6)
    x = batch_of(0).astype(np.float64)
    np.testing.assert_allclose(metrics["loss"], ((0.5 * x - 0.25 - x) ** 2).mean(), rtol=1e-6)
    assert int(after.step) == 1


@pytest.mark.parametrize("ema_decay", [0.0, 0.5, 0.99])
def test_average_is_the_recursion_in_numpy(ema_decay):
    """decay = min(ema_decay, (1 + n) / (10 + n)) before batch n, from the initial parameters on."""
    state = init_state(LinearMethod(), SGD)
    step = make_step(LinearMethod(), SGD, ema_decay, 0)
    expected = np.zeros(2)
    for n in range(40):
        state, _ = step(state, batch_of(n))
        decay = min(ema_decay, (1 + n) / (10 + n))
        params = np.array([float(state.params["gain"][0]), float(state.params["offset"])])
        expected = decay * expected + (1 - decay) * params
        ema = [float(state.ema["gain"][0]), float(state.ema["offset"])]
        np.testing.assert_allclose(ema, expected, rtol=1e-5, atol=1e-7)
    if ema_decay == 0.99:  # 0.89 to 0.82 in these steps: the average trails, but is not stuck at the start
        assert 0.5 < ema[0] < params[0]


def test_average_starts_as_a_copy_with_a_memory_of_its_own():
    state = init_state(LinearMethod(), SGD)
    assert_same(state.ema, state.params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.ema))]
    assert len(set(pointers)) == 4


def test_memory_of_the_state_is_used_again():
    before = init_state(LinearMethod(), SGD)
    make_step(LinearMethod(), SGD, 0.9, 0)(before, batch_of(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.ema)))


def test_one_compilation_serves_all_steps():
    state, step = init_state(LinearMethod(), SGD), make_step(LinearMethod(), SGD, 0.9, 0)
    for n in range(3):
        state, _ = step(state, batch_of(n))
    assert step._cache_size() == 1
