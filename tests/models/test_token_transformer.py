"""The transformer over codes against a slow float64 reference, and its cache against teacher forcing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.transformer import logits_of

from pulmo_jax.methods.token_orders import token_orders
from pulmo_jax.models.token_transformer import TokenTransformer, before

SIDE, CODES = 4, 7


@functools.cache  # initialising a network takes a second
def network(positions: str = "rotary", seed: int = 0, **options) -> TokenTransformer:
    sizes = {"codes": CODES, "code_side": SIDE, "width": 16, "layers": 2, "heads": 2} | options
    return TokenTransformer(patch_size=8, channels=1, rngs=nnx.Rngs(seed), positions=positions, **sizes)


def codes(batch: int = 3, seed: int = 0, n: int = SIDE**2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, CODES, (batch, n)), jnp.int32)


def order(name: str) -> jax.Array:
    return jnp.asarray(token_orders([name], SIDE)[0])


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("name", ["raster", "columns_reversed", "random"])
def test_logits_are_those_of_a_slow_float64_transformer(positions, name):
    model, sequence = network(positions), codes()
    expected = logits_of(model, np.asarray(sequence), np.asarray(order(name)))
    np.testing.assert_allclose(model(sequence, order(name)), expected, atol=2e-5)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("name", ["raster", "hilbert_reversed"])
def test_cached_logits_equal_uncached_ones_at_every_position(positions, name):
    model, sequence, cells = network(positions), codes(), order(name)
    cache, token, found = model.init_cache(len(sequence)), jnp.full(len(sequence), CODES), []
    for i, (source, target) in enumerate(zip(before(cells), cells, strict=True)):
        logits, cache = model.step(token, source, target, cache)
        found.append(logits)
        token = sequence[:, i]
    assert int(cache.length) == SIDE**2
    np.testing.assert_allclose(jnp.stack(found, axis=1), model(sequence, cells), atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5, SIDE**2])
def test_a_prompt_of_any_length_fills_the_cache_as_single_steps_do(n):
    """Then steps follow, which must see the whole prompt (flax issues 1317 and 5591)."""
    model, sequence, cells = network(), codes(), order("raster")
    expected = model(sequence, cells)
    read = jnp.concatenate([jnp.full((len(sequence), 1), CODES), sequence[:, :-1]], axis=1)
    logits, cache = model.prefill(read[:, :n], before(cells)[:n], cells[:n], model.init_cache(len(sequence)))
    np.testing.assert_allclose(logits, expected[:, :n], atol=1e-5)
    for i in range(n, SIDE**2):
        logits, cache = model.step(read[:, i], before(cells)[i], cells[i], cache)
        np.testing.assert_allclose(logits, expected[:, i], atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_code_changes_the_predictions_after_it_and_no_others(positions):
    model, sequence, cells = network(positions), codes(1), order("columns")
    plain = model(sequence, cells)
    for i in range(SIDE**2):
        changed = model(sequence.at[0, i].set((sequence[0, i] + 1) % CODES), cells)
        differs = np.abs(np.asarray(changed - plain)).max(axis=-1)[0] > 1e-6
        np.testing.assert_array_equal(differs, np.arange(SIDE**2) > i)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_probabilities_of_all_grids_sum_to_one(positions):
    model = network(positions, codes=3, code_side=2)
    grids = jnp.asarray(list(itertools.product(range(3), repeat=4)), jnp.int32)
    for name in ("raster", "columns_reversed"):
        logits = model(grids, jnp.asarray(token_orders([name], 2)[0]))
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), grids[..., None], axis=-1).sum((1, 2))
        assert float(jnp.exp(log_p).sum()) == pytest.approx(1, abs=1e-5)


def test_rotary_attention_depends_on_displacements_only():
    """Cells shifted together give the same logits after the start token, whose place is fixed."""
    model, sequence = network(code_side=8), codes(n=9)
    near = jnp.asarray([8 * y + x for y in range(3) for x in range(3)])
    no_start = jnp.full(1, 0)  # the first step reads a code, not the start token

    def logits(cells):
        sources = jnp.concatenate([no_start + cells[0], cells[:-1]])
        return model.prefill(sequence, sources, cells, model.init_cache(len(sequence)))[0]

    np.testing.assert_allclose(logits(near + 8 * 4 + 5), logits(near), atol=1e-5)
    moved = network("learned", code_side=8)
    sources = jnp.concatenate([near[:1], near[:-1]])
    here, there = (
        moved.prefill(sequence, sources + shift, near + shift, moved.init_cache(len(sequence)))[0] for shift in (0, 37)
    )
    assert np.abs(here - there).max() > 1e-4


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_prediction_depends_on_the_target(positions):
    model, sequence = network(positions), codes()
    predictions = [
        model.prefill(sequence[:, :2], jnp.asarray([0, 1]), jnp.asarray([1, target]), model.init_cache(3))[0][:, 1]
        for target in (2, 9)
    ]
    assert np.abs(predictions[0] - predictions[1]).max() > 1e-4


def test_rematerialisation_changes_no_gradient():
    sequence, cells = codes(), order("raster")
    gradients = []
    for remat in (False, True):
        graph, params, rest = nnx.split(network(remat=remat), nnx.Param, ...)

        def loss(params, graph=graph, rest=rest):
            return (nnx.merge(graph, params, rest)(sequence, cells) ** 2).mean()

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert np.isfinite(a).all()
        assert np.abs(a).max() > 0


def test_bfloat16_is_near_float32_with_float32_parameters_and_logits():
    sequence, cells = codes(), order("raster")
    exact, coarse = network(), network(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(coarse, nnx.Param))} == {jnp.dtype("float32")}
    assert coarse.init_cache(2).keys[0].dtype == jnp.bfloat16
    found = coarse(sequence, cells)
    assert found.dtype == jnp.float32
    difference = np.abs(found - exact(sequence, cells))
    assert 0 < difference.max() < 0.1


def test_networks_of_an_ensemble_run_under_vmap():
    models = [network(seed=seed) for seed in (0, 1)]
    graph, _, rest = nnx.split(models[0], nnx.Param, ...)
    both = jax.tree.map(lambda *p: jnp.stack(p), *(nnx.state(model, nnx.Param) for model in models))
    found = jax.vmap(lambda p: nnx.merge(graph, p, rest)(codes(), order("raster")))(both)
    for one, model in zip(found, models, strict=True):
        np.testing.assert_allclose(one, model(codes(), order("raster")), atol=1e-5)


def test_a_width_that_the_heads_do_not_divide_is_named():
    with pytest.raises(ValueError, match=r"^model.width=20: must be a multiple of 4 model.heads = 8$"):
        network(width=20)
