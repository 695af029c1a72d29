"""PatchCore against loops, and what must hold for any images: bounded memory, a uniform sample, the order of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import patch_gaussian as windows
from references import patchcore as reference

from pulmo_jax.methods.base import Accumulated, Condensed, Method
from pulmo_jax.methods.patchcore import PatchCore, sampled
from pulmo_jax.models.identity import Identity
from pulmo_jax.types import InputError

SIDE = 8


def method(**options) -> PatchCore:
    network = Identity(patch_size=SIDE, channels=2, rngs=nnx.Rngs(0))
    small = {"window_px": 3, "stride_px": 2, "pool_px": 1, "smooth_px": 0.0, "memory_mb": 1, "bank_size": 100}
    return PatchCore(network=network, **small | {"bank_fraction": 1.0, "neighbours": 4} | options)


def texture(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, SIDE, SIDE, 2)).astype(np.float32)


def learn(method: PatchCore, batches: list[np.ndarray], inside: np.ndarray | None = None):
    params, update = method.init(), jax.jit(method.update)
    for batch in batches:
        params = update(params, batch, np.ones(batch.shape[:3], bool) if inside is None else inside)
    return jax.jit(method.condense)(params)


def vectors(patches: np.ndarray, pool: int = 1) -> np.ndarray:
    return np.array([[v for _, _, v in windows.windows(reference.pooled(p, pool), 3, 2)] for p in patches])


def test_it_is_a_method_of_one_pass_that_is_condensed():
    assert all(isinstance(method(), protocol) for protocol in (Method, Accumulated, Condensed))


@pytest.mark.parametrize(("pool", "neighbours"), [(1, 4), (3, 1)])
def test_scores_are_those_of_loops_over_the_bank(pool, neighbours):
    core, images, test = method(pool_px=pool, neighbours=neighbours), texture(6), texture(2, seed=9)
    params = learn(core, [images[:4], images[4:]])
    bank = vectors(images, pool).reshape(-1, 18)
    assert int(params["bank"].number[0]) == int(params["bank"].seen[0]) == len(bank)
    distance, weight = core.distances(core.finish(params), jnp.asarray(test))
    expected = [[reference.score(v, bank, neighbours) for v in of_patch] for of_patch in vectors(test, pool)]
    np.testing.assert_allclose((distance * weight).reshape(2, -1), expected, rtol=1e-4)


def test_the_bank_is_the_greedy_coreset():
    core, images = method(bank_fraction=0.3), texture(8)
    params = learn(core, [images])
    every = vectors(images).reshape(-1, 18)
    chosen, radius = reference.greedy(every, int(np.ceil(0.3 * len(every))))
    count = int(params["bank"].number[0])
    assert count == len(chosen)
    np.testing.assert_allclose(params["bank"].vectors[0, :count], every[chosen], rtol=1e-6)
    np.testing.assert_allclose(params["bank"].radius[0], radius, rtol=1e-3)


def test_every_location_has_its_own_bank():
    core, images, test = method(locations="each", neighbours=1), texture(6), texture(1, seed=9)
    params = learn(core, [images])
    distance, _ = core.distances(params, jnp.asarray(test))
    seen, own = vectors(images), vectors(test)[0]
    expected = [reference.score(v, seen[:, place], 1) for place, v in enumerate(own)]
    np.testing.assert_allclose(np.asarray(distance).ravel(), expected, rtol=1e-4)


def test_only_complete_windows_inside_count():
    inside = np.ones((5, SIDE, SIDE), bool)
    inside[:, :, :4] = False
    inside[3:] = False  # patches that pad the batch
    params = learn(method(), [texture(5)], inside)
    windows_right = 3 * 3  # of the columns 0, 2 and 4 only the last is inside
    assert int(params["bank"].seen[0]) == windows_right


def test_a_complete_collection_is_a_uniform_sample():
    size, total = 20, 200
    rows = jnp.arange(total, dtype=jnp.float32)[:, None]

    def once(key):
        collected, seen = jnp.zeros((size, 1)), jnp.int32(0)
        for i, part in enumerate(jnp.split(rows, 8)):
            collected, seen = sampled(collected, seen, part, jnp.ones(25, bool), jax.random.fold_in(key, i))
        return collected[:, 0], seen

    kept, seen = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(0), 500))
    assert (np.asarray(seen) == total).all()
    assert all(len(set(row)) == size for row in np.asarray(kept))
    counts = np.bincount(np.asarray(kept, int).ravel(), minlength=total)
    expected = 500 * size / total
    assert abs(counts.mean() - expected) < 1e-9
    assert counts.std() < 1.3 * np.sqrt(expected)
    assert abs(counts[:25].mean() - expected) < 4 * np.sqrt(expected / 25)  # the first are as likely as the last
    assert abs(counts[-25:].mean() - expected) < 4 * np.sqrt(expected / 25)


def test_more_windows_than_memory_are_said():
    core = method(bank_size=50, bank_fraction=0.01)
    assert core.capacity * core.bytes_of_vector + 50 * core.bytes_of_vector <= 2**20
    batches = [texture(400, seed=s) for s in range(3)]
    params = learn(core, batches)
    assert int(params["bank"].seen[0]) == 1200 * 9 > core.capacity
    (said,) = core.caveats(params)
    assert f"{core.capacity} of 10800 windows" in said
    assert params["bank"].vectors.shape == (1, 50, 18)


def test_what_cannot_be_modelled_is_refused():
    with pytest.raises(InputError, match=r"method.bank_size=20000: .* more than method.memory_mb=1; give a smaller"):
        method(bank_size=20_000)
    with pytest.raises(InputError, match="3 vectors for each of 9 locations"):
        method(bank_size=30, locations="each")
    with pytest.raises(InputError, match="give an odd number"):
        method(pool_px=2)
    core = method()
    with pytest.raises(InputError, match="no window of 3 px lies completely in the foreground"):
        core.caveats(learn(core, [texture(2)], np.zeros((2, SIDE, SIDE), bool)))
    with pytest.raises(InputError, match="no normal variation"):
        core.caveats(learn(core, [np.ones((2, SIDE, SIDE, 2), np.float32)]))


def test_what_is_abnormal_is_far_from_the_bank():
    core = method(smooth_px=0.0)
    params = learn(core, [texture(30)])
    image = texture(1, seed=3)
    odd = image.copy()
    odd[0, 4:7, 4:7] += 8  # the last window of the second row and column
    one, two = (np.asarray(core.score_map(core.residual(params, jnp.asarray(x))[0], jnp.ones((SIDE, SIDE), bool)))
                for x in (image, odd))  # fmt: skip
    assert two[5, 5] > 2 * one[5, 5]
    assert np.unravel_index(two.argmax(), two.shape) == (5, 5)
