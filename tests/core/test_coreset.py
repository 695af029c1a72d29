"""The coreset and the nearest neighbours in blocks against loops over all points."""

import jax.numpy as jnp
import numpy as np
import pytest
from references import patchcore as reference

from pulmo_jax.core import coreset, neighbours
from pulmo_jax.core.coreset import greedy_coreset
from pulmo_jax.core.neighbours import nearest, nearest_one


@pytest.fixture
def small_blocks(monkeypatch):
    for module, name, size in ((coreset, "POOL", 16), (coreset, "BATCH", 4), (coreset, "BLOCK", 33)):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(neighbours, "BLOCK", 33)


def points(count: int, dimensions: int, seed: int = 0) -> np.ndarray:
    clusters = 3 * np.random.default_rng(seed).normal(size=(count, 1))
    return (clusters + np.random.default_rng(seed + 1).normal(size=(count, dimensions))).astype(np.float32)


@pytest.mark.parametrize(("count", "wanted"), [(101, 40), (9, 9)])
def test_the_coreset_is_the_one_of_a_loop(small_blocks, count, wanted):
    x = points(count, 5)
    found = greedy_coreset(x, count, wanted, wanted)
    chosen, radius = reference.greedy(x.astype(float), wanted)
    np.testing.assert_array_equal(found.chosen, chosen)
    np.testing.assert_allclose(found.radius, radius, atol=2e-3)


def test_points_that_are_not_there_are_not_chosen(small_blocks):
    x = points(80, 4)
    found = greedy_coreset(jnp.where(np.arange(80)[:, None] < 50, x, 1e3), 50, 30, 12)
    chosen, radius = reference.greedy(x[:50].astype(float), 12)
    assert int(found.number) == 12
    np.testing.assert_array_equal(found.chosen[:12], chosen)
    assert (np.asarray(found.chosen[12:]) == 0).all()
    np.testing.assert_allclose(found.radius, radius, rtol=1e-4)


def test_copies_are_chosen_once(small_blocks):
    x = np.repeat(10 * np.eye(4, dtype=np.float32), 20, axis=0)
    found = greedy_coreset(x, 80, 10, 10)
    assert len({tuple(x[i]) for i in np.asarray(found.chosen[: int(found.number)])}) == 4
    assert float(found.radius) < 1e-2


def test_neighbours_are_those_of_all_distances(small_blocks):
    queries, bank, usable = points(20, 6, 5), points(100, 6), np.arange(100) < 70
    distance, index = nearest(queries, bank, usable, 4)
    every = np.linalg.norm(queries[:, None].astype(float) - bank[:70], axis=-1)
    np.testing.assert_array_equal(index, np.argsort(every, 1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(every, 1)[:, :4], rtol=1e-5)
    distance, index = nearest_one(*map(jnp.asarray, (queries, bank, usable)))
    np.testing.assert_array_equal(index, every.argmin(1))
    np.testing.assert_allclose(distance, every.min(1), rtol=1e-5)


def test_a_small_distance_far_from_the_origin_is_exact():
    bank = (1e3 + points(50, 3)).astype(np.float32)
    query = bank[7:8] + np.float32(1e-3)
    distance, index = nearest_one(jnp.asarray(query), jnp.asarray(bank), jnp.ones(50, bool))
    assert int(index[0]) == 7
    np.testing.assert_allclose(distance[0], np.linalg.norm(query.astype(float) - bank[7]), rtol=1e-5)


def test_fewer_points_than_neighbours_give_infinite_distances():
    distance, _ = nearest(points(3, 2), points(10, 2), np.arange(10) < 2, 4)
    assert np.isfinite(distance[:, :2]).all()
    assert np.isinf(distance[:, 2:]).all()
