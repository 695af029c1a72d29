"""AdamW with its schedule, clipping and accumulation against a float64 transcription of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references.linear_method import LinearMethod, batch_of

from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import init_state, make_step


def learning_rate(update: int, updates: int, peak: float, final: float, warmup: float) -> float:
    """Of update 0, 1, ...: linear from 0 in the first share of the updates, then half a cosine down to the end."""
    rising = round(warmup * updates)
    if update < rising:
        return peak * update / rising
    falling = max(updates, rising + 1) - rising
    half_cosine = 0.5 * (1 + np.cos(np.pi * min(1.0, (update - rising) / falling)))
    return peak * (final + (1 - final) * half_cosine)


def adamw_by_hand(gradients: np.ndarray, start: np.ndarray, rates: list[float], decay: float, clip: float):
    """Loshchilov & Hutter 2019, algorithm 2, on gradients clipped by their norm; the parameters after each update."""
    theta, m, v = start.astype(np.float64), np.zeros_like(start), np.zeros_like(start)
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = gradient * min(1.0, clip / np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - rate * ((m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * theta)
        yield theta


def parameters_after_each(optimizer: optax.GradientTransformation, gradients: np.ndarray, start: np.ndarray):
    def move(carry, gradient):
        theta, opt_state = carry
        updates, opt_state = optimizer.update(gradient, opt_state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, opt_state), theta

    theta = jnp.asarray(start, jnp.float32)
    return jax.jit(lambda g: jax.lax.scan(move, (theta, optimizer.init(theta)), g)[1])(jnp.asarray(gradients))


@pytest.mark.parametrize(
    ("updates", "warmup", "final"), [(40, 0.25, 0.1), (33, 0.0, 0.0), (20, 1.0, 0.5), (1, 0.05, 0.0)]
)
def test_updates_are_those_of_the_paper(updates, warmup, final):
    rng = np.random.default_rng(0)
    norms = np.geomspace(0.01, 1000, updates)[:, None]  # some are clipped, some not
    gradients = (rng.normal(size=(updates, 3)) * norms).astype(np.float32)
    start = np.array([1.0, -2.0, 0.5])
    options = {"final_fraction": final, "warmup_fraction": warmup, "weight_decay": 0.1, "clip_norm": 2.0}
    found = parameters_after_each(adamw(steps=updates, learning_rate=0.05, **options), gradients, start)
    rates = [learning_rate(i, updates, 0.05, final, warmup) for i in range(updates)]
    expected = np.stack(list(adamw_by_hand(gradients, start, rates, decay=0.1, clip=2.0)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("updates", [10, 400])
def test_schedule_warms_up_to_the_peak_and_decays_to_its_final_fraction(updates):
    """Adam's answer to a constant gradient is a move by the learning rate."""
    optimizer = adamw(steps=updates, learning_rate=0.01, final_fraction=0.2, warmup_fraction=0.1, weight_decay=0.0)
    theta = parameters_after_each(optimizer, np.full((updates + 1, 1), 0.5, np.float32), np.zeros(1))[:, 0]
    rates = -np.diff(theta, prepend=0)
    peak = updates // 10
    assert rates[0] == 0
    assert np.all(np.diff(rates[: peak + 1]) > 0)
    np.testing.assert_allclose(rates[peak], 0.01, rtol=1e-3)
    assert np.all(np.diff(rates[peak:]) < 1e-8)
    np.testing.assert_allclose(rates[updates], 0.002, rtol=1e-2)


def test_a_longer_gradient_than_clip_norm_counts_as_one_of_that_norm():
    gradients = np.array([[3.0, 4.0], [0.3, -0.4], [30.0, 40.0]], np.float32)
    clipped = np.array([[0.6, 0.8], [0.3, -0.4], [0.6, 0.8]], np.float32)
    options = {"steps": 3, "warmup_fraction": 0.0, "learning_rate": 0.1}
    found = parameters_after_each(adamw(**options, clip_norm=1.0), gradients, np.zeros(2))
    expected = parameters_after_each(adamw(**options, clip_norm=1e9), clipped, np.zeros(2))
    unclipped = parameters_after_each(adamw(**options, clip_norm=1e9), gradients, np.zeros(2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(found - unclipped).max() > 1e-3


def test_accumulated_batches_are_one_large_batch():
    k, updates = 3, 6
    options = {"learning_rate": 0.1, "warmup_fraction": 0.2, "clip_norm": 0.5}
    small, large = adamw(steps=k * updates, accumulate=k, **options), adamw(steps=updates, **options)
    one_by_one, at_once = init_state(LinearMethod(), small), init_state(LinearMethod(), large)
    step_small, step_large = (make_step(LinearMethod(), optimizer, 0.9, 0) for optimizer in (small, large))
    for update in range(updates):
        batches = [batch_of(k * update + i) for i in range(k)]
        for i, batch in enumerate(batches):
            before = jax.tree.map(np.array, one_by_one.params)
            one_by_one, _ = step_small(one_by_one, batch)
            moved = not np.array_equal(before["gain"], one_by_one.params["gain"])
            assert moved == (i == k - 1 and update > 0)  # the first learning rate is 0
        at_once, _ = step_large(at_once, np.concatenate(batches))
        for name in ("gain", "offset"):
            np.testing.assert_allclose(one_by_one.params[name], at_once.params[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@given(
    steps=st.integers(1, 50),
    accumulate=st.integers(1, 60),
    warmup_fraction=st.floats(0, 1),
    final_fraction=st.floats(0, 1),
)
@settings(deadline=None, max_examples=30)
def test_any_schedule_that_a_config_allows_can_be_built(steps, accumulate, warmup_fraction, final_fraction):
    """And its first update is no larger than the learning rate allows."""
    options = {"warmup_fraction": warmup_fraction, "final_fraction": final_fraction, "learning_rate": 0.1}
    optimizer = adamw(steps=steps, accumulate=accumulate, weight_decay=0.5, **options)
    theta = jnp.array([1.0, -2.0, 0.5])
    update, _ = optimizer.update(jnp.array([1e-3, 3.0, -100.0]), optimizer.init(theta), theta)
    assert (abs(update) <= 0.1 * (1 + 0.5 * abs(theta)) * (1 + 1e-6)).all()
