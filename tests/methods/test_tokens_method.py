"""Likelihood, resampling, thresholds, score and drawing of the transformer over codes, on a base of known codes."""

import functools
import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from references.transformer import logits_of

from pulmo_jax.methods import tokens
from pulmo_jax.methods.base import Detailed, Generative, Iterative, Method, Tuned
from pulmo_jax.methods.token_orders import token_orders
from pulmo_jax.methods.tokens import Coding, Tokens, drawn, replaced, surprise
from pulmo_jax.models.identity import Identity
from pulmo_jax.models.token_transformer import TokenTransformer
from pulmo_jax.training.state import init_state, make_step
from pulmo_jax.types import InputError

PATCH, SIDE, CODES = 8, 4, 5


@dataclass(frozen=True)
class Levels:
    """The codes are the mean intensities of cells of 2 x 2 px, rounded; a code decodes to its intensity."""

    n_codes: int = CODES
    code_side: int = SIDE
    cell_px: int = PATCH // SIDE

    def init(self):
        return {"scale": jnp.ones(())}

    def encode_codes(self, params, patches):
        cells = patches[..., 0].reshape(-1, self.code_side, self.cell_px, self.code_side, self.cell_px).mean((2, 4))
        return jnp.clip(jnp.round(cells / params["scale"]), 0, self.n_codes - 1).astype(jnp.int32)

    def decode_codes(self, params, codes):
        return params["scale"] * codes.repeat(self.cell_px, 1).repeat(self.cell_px, 2)[..., None].astype(jnp.float32)


LEVELS = Levels()


@functools.cache  # initialising a network takes a second
def network(codes: int, side: int, seed: int) -> TokenTransformer:
    sizes = {"codes": codes, "code_side": side, "width": 16, "layers": 1, "heads": 2}
    return TokenTransformer(patch_size=PATCH, channels=1, rngs=nnx.Rngs(seed), **sizes)


def method(base: Levels = LEVELS, rngs: int = 0, **options) -> Tokens:
    return Tokens(network(base.n_codes, base.code_side, rngs), base=base, **options)


def patches_of(count: int, seed: int = 0) -> jax.Array:
    """Normal patches: all cells have the same code."""
    level = np.random.default_rng(seed).integers(0, CODES, count)
    return jnp.broadcast_to(jnp.asarray(level, jnp.float32)[:, None, None, None], (count, PATCH, PATCH, 1))


@pytest.fixture(scope="module")
def trained():
    """Method, parameters after a little training on normal patches, and the losses."""
    one, optimizer = method(temperature=0.0), optax.adam(1e-2)
    state, step = init_state(one, optimizer), make_step(one, optimizer, 0.5, 0)
    losses = []
    for i in range(100):
        state, metrics = step(state, patches_of(32, seed=i))
        losses.append(float(metrics["loss"]))
    tuned = jax.jit(one.tune)(state.ema, patches_of(100, seed=999))
    return one, {**state.ema, "tuned": tuned}, losses


def test_is_a_method_with_these_abilities():
    for protocol in (Method, Detailed, Tuned, Generative, Iterative):
        assert isinstance(method(), protocol)
    assert isinstance(Levels(), Coding)


def test_learns_the_codes_of_normal_patches(trained):
    """All cells but the first are certain: the mean surprise tends to log(5) / 16 = 0.1."""
    _, _, losses = trained
    assert losses[0] > 1.3
    assert np.mean(losses[-10:]) < 0.2


def random_codes(count: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, CODES, (count, SIDE**2)), jnp.int32)


def slow_log_p(one: Tokens, sequences: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Logarithms of the predicted distributions (B, T, K), in float64 and without a cache."""
    logits = np.array(logits_of(one.network, sequences, order))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_surprise_and_its_expectation():
    p = np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    nats, excess = surprise(jnp.log(jnp.asarray(p)) + 7, jnp.asarray([1, 0]))
    np.testing.assert_allclose(nats, [np.log(4), np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(excess, [np.log(4) - (0.5 * np.log(2) + 0.5 * np.log(4)), 0], atol=1e-6)
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (1, 9)), jnp.float32)
    expected = (jax.nn.softmax(logits[0]) * surprise(logits.repeat(9, 0), jnp.arange(9))[1]).sum()
    assert float(expected) == pytest.approx(0, abs=1e-5)


def test_the_training_loss_is_the_surprise_in_one_of_the_orders():
    one = method(orders=("raster", "columns_reversed"))
    codes = random_codes(3)
    batch = one.base.decode_codes(one.base.init(), codes.reshape(-1, SIDE, SIDE))
    possible = []
    for order in token_orders(one.orders, SIDE):
        sequence = np.asarray(codes)[:, order]
        possible.append(-np.take_along_axis(slow_log_p(one, sequence, order), sequence[..., None], axis=-1).mean())
    loss = jax.jit(one.train_loss)
    losses = {float(loss(one.init(), batch, jax.random.key(i))) for i in range(12)}
    np.testing.assert_allclose(sorted(losses), sorted(possible), rtol=1e-5)


def test_the_likelihood_of_all_grids_sums_to_one_in_every_order():
    one = method(base=Levels(n_codes=3, code_side=2, cell_px=4))
    grids = jnp.asarray(list(itertools.product(range(3), repeat=4)), jnp.int32)
    for order in token_orders(("raster", "columns_reversed", "hilbert"), 2):
        nats = surprise(one.network(grids[:, order], jnp.asarray(order)), grids[:, order])[0].sum(-1)
        assert float(jnp.exp(-nats).sum()) == pytest.approx(1, abs=1e-5)


# --- replacing codes


@pytest.mark.parametrize("name", ["columns", "random"])
def test_unlikely_codes_are_replaced_given_the_restored_codes_before_them(name):
    """Against float64 probabilities of complete passes without a cache."""
    one, codes, threshold = method(), random_codes(4), 0.2
    order = token_orders((name,), SIDE)[0]
    draws = np.random.default_rng(1).random(codes.shape).astype(np.float32)
    old = np.asarray(codes)[:, order]
    new, expected = old.copy(), np.zeros(old.shape)
    for i in range(SIDE**2):
        log_p = slow_log_p(one, new, order)[:, i]
        expected[:, i] = (np.exp(log_p) * log_p).sum(-1) - np.take_along_axis(log_p, old[:, i : i + 1], axis=-1)[:, 0]
        draw = (np.cumsum(np.exp(log_p), axis=1)[:, :-1] < draws[:, i : i + 1]).sum(axis=1)
        new[:, i] = np.where(expected[:, i] > threshold, draw, old[:, i])
    found, excess = jax.jit(replaced, static_argnums=(0, 5))(
        one.network, codes, jnp.asarray(order), threshold, jnp.asarray(draws), 1.0
    )
    assert 0.2 < (expected > threshold).mean() < 0.8
    np.testing.assert_array_equal(found, new[:, np.argsort(order)])
    np.testing.assert_allclose(excess, expected[:, np.argsort(order)], atol=1e-5)


def test_without_unlikely_codes_the_excess_is_that_of_teacher_forcing():
    one, codes, order = method(), random_codes(3), token_orders(("hilbert",), SIDE)[0]
    found, excess = replaced(one.network, codes, jnp.asarray(order), jnp.inf, jnp.zeros(codes.shape), 1.0)
    np.testing.assert_array_equal(found, codes)
    parallel = surprise(one.network(codes[:, order], jnp.asarray(order)), codes[:, order])[1]
    np.testing.assert_allclose(excess[:, order], parallel, atol=1e-5)


def test_drawn_codes_have_the_probabilities_of_the_network():
    logits = jnp.log(jnp.asarray([0.5, 0.0, 0.2, 0.3]))
    draws = (jnp.arange(1000) + 0.5) / 1000
    counts = np.bincount(drawn(jnp.broadcast_to(logits, (1000, 4)), draws, 1.0), minlength=4)
    np.testing.assert_allclose(counts, [500, 0, 200, 300], atol=1)
    sharp = np.bincount(drawn(jnp.broadcast_to(logits, (1000, 4)), draws, 0.5), minlength=4)
    np.testing.assert_allclose(sharp / 1000, np.array([25, 0, 4, 9]) / 38, atol=2e-3)
    assert set(np.asarray(drawn(jnp.broadcast_to(logits, (1000, 4)), draws, 0.0))) == {0}
    np.testing.assert_array_equal(drawn(logits[None].repeat(2, 0), jnp.asarray([0.0, 0.9999999]), 1.0), [0, 3])


def test_an_anomaly_is_healed_and_normal_codes_are_kept(trained):
    one, params, _ = trained
    params = {**params, "tuned": params["tuned"] | {"threshold": jnp.float32(1)}}
    normal = patches_of(6, seed=5)
    abnormal = normal.at[:, 4:6, 2:6].add(2)  # two cells of the third row
    abnormal = jnp.where(abnormal >= CODES, abnormal - CODES, abnormal)
    reconstruct = jax.jit(one.reconstruct)
    np.testing.assert_allclose(reconstruct(params, normal), normal, atol=1e-6)
    np.testing.assert_allclose(reconstruct(params, abnormal), normal, atol=1e-6)
    residual = one.residual(params, abnormal)
    scores = jax.vmap(lambda r: one.score_map(r, jnp.ones((PATCH, PATCH), bool)))(residual)
    inside = np.asarray(abnormal != normal)[..., 0]
    assert np.isfinite(np.asarray(scores)).all()
    assert np.asarray(scores)[inside].min() > np.asarray(scores)[~inside].max() / 4 > 0


def test_nothing_is_replaced_before_the_threshold_is_set():
    one, patches = method(), patches_of(3)
    np.testing.assert_allclose(jax.jit(one.reconstruct)(one.init(), patches), patches, atol=1e-6)


def test_restored_patches_do_not_depend_on_the_batch():
    """The random numbers of a patch are a function of its content."""
    one, patches = method(seed=3), patches_of(6)
    patches += 0.01 * jnp.arange(6)[:, None, None, None]
    params = one.init()
    params["tuned"]["threshold"] = jnp.float32(-1)  # nearly everything is replaced
    together = one.reconstruct(params, patches)
    np.testing.assert_array_equal(one.reconstruct(params, patches[4:5]), together[4:5])
    np.testing.assert_array_equal(one.reconstruct(params, patches[::-1]), together[::-1])
    assert np.abs(method(seed=4).reconstruct(params, patches) - together).max() > 0.5


# --- thresholds and score


@pytest.mark.slow
def test_the_threshold_is_a_quantile_of_normal_patches_and_the_spreads_standardise():
    one = method(unlikely_rate=0.1, smooth_px=1.0, rngs=1)
    patches = jnp.asarray(np.random.default_rng(0).uniform(0, CODES - 1, (150, PATCH, PATCH, 1)), jnp.float32)
    params = one.init()
    params["tuned"] = jax.jit(one.tune)(params, patches)
    codes, above = one.base.encode_codes(params["base"], patches).reshape(150, -1), []
    for order in token_orders(one.orders, SIDE):
        excess = surprise(one.network(codes[:, order], jnp.asarray(order)), codes[:, order])[1]
        above.append(np.asarray(excess > params["tuned"]["threshold"]).mean())
    assert np.mean(above) == pytest.approx(0.1, abs=0.002)
    residual = one.residual(params, patches)
    maps = jax.vmap(lambda r: one.detail_maps(r, jnp.ones((PATCH, PATCH), bool)))(residual)
    np.testing.assert_allclose(np.sqrt((np.asarray(maps) ** 2).mean((0, 1, 2))), 1, rtol=0.01)
    assert abs(np.asarray(maps)[..., 1].mean()) < 0.01
    assert {name: value.shape for name, value in params["tuned"].items()} == dict.fromkeys(one.init()["tuned"], ())


def test_a_normal_image_may_have_no_unlikely_code(trained):
    """A quantile of the image itself would find some in every image."""
    one, params, _ = trained
    patches = patches_of(40, seed=77)
    assert np.isfinite(params["tuned"]["threshold"])
    changed = np.asarray(one.reconstruct(params, patches) != patches).any((1, 2, 3))
    assert not changed.all()


def test_each_part_of_the_score():
    rng = np.random.default_rng(0)
    residual = jnp.asarray(rng.normal(0, 1, (9, 7, 3)), jnp.float32)
    foreground = jnp.asarray(rng.random((9, 7)) > 0.3)
    parts = {
        score: np.asarray(method(score=score, smooth_px=0.0).score_map(residual, foreground))
        for score in ("both", "difference", "surprise")
    }
    inside = np.asarray(foreground)
    np.testing.assert_allclose(parts["difference"][inside], (np.asarray(residual)[..., :2] ** 2).mean(-1)[inside])
    np.testing.assert_allclose(parts["surprise"][inside], np.maximum(np.asarray(residual)[..., 2], 0)[inside] ** 2)
    np.testing.assert_allclose(parts["both"], parts["difference"] + parts["surprise"], rtol=1e-6)
    for part in parts.values():
        np.testing.assert_array_equal(np.isnan(part), ~inside)


# --- drawing


def test_drawn_patches_are_normal(trained):
    one, params, _ = trained
    drawing = replace(one, temperature=1.0)
    sample = jax.jit(drawing.sample, static_argnums=2)
    patches = sample(params, jax.random.key(0), 64)
    assert patches.shape == (64, PATCH, PATCH, 1)
    cells = np.asarray(patches)[:, ::2, ::2, 0]
    normal = (cells == cells[:, :1, :1]).all((1, 2))
    assert normal.mean() > 0.8
    assert len(np.unique(cells[normal, 0, 0])) == CODES
    np.testing.assert_array_equal(patches, sample(params, jax.random.key(0), 64))


@pytest.mark.slow
def test_probabilities_of_drawn_grids_are_those_of_the_likelihood():
    one = method(base=Levels(n_codes=2, code_side=2, cell_px=4), rngs=3)
    params = one.init()
    patches = jax.jit(one.sample, static_argnums=2)(params, jax.random.key(1), 20000)
    codes = np.asarray(one.base.encode_codes(params["base"], patches)).reshape(-1, 4)
    counts = np.bincount(codes @ [8, 4, 2, 1], minlength=16)
    grids = jnp.asarray(list(itertools.product(range(2), repeat=4)), jnp.int32)
    p = np.exp(-np.asarray(surprise(one.network(grids, jnp.arange(4)), grids)[0].sum(-1)))
    np.testing.assert_allclose(counts / 20000, p, atol=4 * np.sqrt(p.max() / 20000))


# --- costs and refusals


def test_the_network_calls():
    one = method(orders=("raster", "columns", "hilbert"))
    assert one.network_calls == 3 * SIDE**2
    assert one.sampling_calls == SIDE**2


def test_the_base_is_left_as_it_is():
    one = method()
    state = init_state(one, optax.adam(1e-2))
    before = jax.tree.map(np.asarray, state.params)
    state, _ = make_step(one, optax.adam(1e-2), 0.9, 0)(state, patches_of(4))
    for name in one.frozen:
        jax.tree.map(np.testing.assert_array_equal, state.params[name], before[name])
    moved = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != b).any()), state.params["transformer"], before["transformer"]
    )
    assert any(jax.tree.leaves(moved))


def test_unsuitable_parts_are_named():
    with pytest.raises(InputError, match=r"^model: Identity predicts no codes; give model=token_transformer$"):
        Tokens(Identity(patch_size=8, channels=1, rngs=nnx.Rngs(0)), base=Levels())
    with pytest.raises(InputError, match=r"^method.base_run=x: its method, NoneType, has no codes; give a run"):
        replace(method(), base=None, base_run="x")


def test_batches_for_tuning_are_filled_up_and_cut():
    patches = patches_of(10)
    shapes = []

    def double(batch):
        shapes.append(batch.shape)
        return 2 * batch

    np.testing.assert_array_equal(tokens.in_batches(double, patches, 4), 2 * patches)
    assert {shape[0] for shape in shapes} == {4}


@pytest.mark.slow
def test_the_batch_for_tuning_is_bounded_by_memory_and_does_not_change_the_numbers(monkeypatch):
    one, patches = method(), patches_of(10)
    params, size = one.init(), tokens.patch_bytes(network(CODES, SIDE, 0), (PATCH, PATCH, 1))
    assert size > 4 * 2 * 2 * SIDE**4  # scores and softmax of the attention, two heads
    sizes, in_batches = [], tokens.in_batches

    def recorded(function, patches, size):
        sizes.append(size)
        return in_batches(function, patches, size)

    monkeypatch.setattr(tokens, "in_batches", recorded)
    expected = one.tune(params, patches)
    for memory, most in ((3.5 * size / 2**20, 3), (size / 2**21, 1)):
        monkeypatch.setattr(tokens, "TUNING_MB", memory)
        found = one.tune(params, patches)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
        assert sizes[-2:] == [most, most]
    assert sizes[:2] == [64, 64]
