"""Results of several networks, in batches of one shape, and what stays on the device between calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.inference import transfers
from pulmo_jax.inference.members import all_the_same, at_once, at_rows, each_its_own, kept, of_all
from pulmo_jax.methods.networks import SHARED

AT_ONCE = at_once()

CHUNK = jnp.array([1.0, 10.0, 100.0])  # three networks that multiply
DATA = np.arange(100, dtype=np.float32)


def stack(rows):
    return DATA[rows]


def test_each_network_gets_rows_of_its_own_however_many():
    rows = [np.array([3, 1, 2]), np.array([], int), np.arange(AT_ONCE + 5)]
    found = at_rows(each_its_own(lambda scale, x: scale * x), CHUNK, rows, stack)
    for scale, own, result in zip((1, 10, 100), rows, found, strict=True):
        np.testing.assert_array_equal(result, scale * DATA[own])


def test_further_arrays_come_along():
    rows = [np.array([3, 1]), np.array([5, 6]), np.array([7, 8])]
    found = at_rows(each_its_own(lambda scale, x, y: scale * x + y), CHUNK, rows, stack, lambda at: at)
    np.testing.assert_array_equal(found[2], 100 * DATA[[7, 8]] + [7, 8])


def test_no_rows_at_all():
    found = at_rows(each_its_own(lambda scale, x: scale * x), CHUNK, [np.array([], int)] * 3, stack)
    assert [len(of_one) for of_one in found] == [0, 0, 0]


@pytest.mark.parametrize("count", [1, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE])
def test_all_networks_see_all_images(count):
    images = np.random.default_rng(0).normal(size=(count, 4, 4)).astype(np.float32)
    found = of_all(all_the_same(lambda scale, x: scale * x.sum((1, 2))), [CHUNK, CHUNK[:1]], images)
    assert found.shape == (4, count)
    np.testing.assert_allclose(found[1], 10 * images.sum((1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[3], images.sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_networks_have_a_part_in_common():
    """Without an axis over the networks, which is therefore computed once for images that all of them see."""
    chunk = {SHARED: jnp.array([2.0]), "factor": CHUNK}

    def scaled(params, x):
        return params["factor"] * params[SHARED][0] * x.sum((1, 2))

    images = np.ones((3, 4, 4), np.float32)
    found = of_all(all_the_same(scaled), [chunk], images)
    np.testing.assert_allclose(found[:, 0], [32, 320, 3200])
    rows = [np.array([3, 1]), np.array([5]), np.array([7, 8])]
    own = at_rows(each_its_own(lambda params, x: params["factor"] * params[SHARED][0] * x), chunk, rows, stack)
    np.testing.assert_allclose(own[2], 200 * DATA[[7, 8]])


def test_one_compilation_serves_lists_of_any_length():
    function = each_its_own(lambda scale, x: scale * x)
    for lengths in ((3, 0, 5), (AT_ONCE + 1, 2, 1), (1, 1, 3 * AT_ONCE)):
        rows = [np.arange(length) for length in lengths]
        found = at_rows(function, CHUNK, rows, stack)
        assert [len(one) for one in found] == list(lengths)
    assert function._cache_size() == 1


def test_kept_rows_are_read_once_and_stay_on_the_device():
    seen = []

    def reading(rows):
        seen.append(rows)
        return DATA[rows]

    rows = [np.array([7, 3, 3]), np.array([], int), np.arange(50, 50 + AT_ONCE + 2)]
    stay, function = kept(reading, rows), each_its_own(lambda scale, x: scale * x)
    assert sum(map(len, seen)) == 1  # to see how large it is
    for _ in range(3):
        found = at_rows(function, CHUNK, rows, stay)
        for scale, own, result in zip((1, 10, 100), rows, found, strict=True):
            np.testing.assert_array_equal(result, scale * DATA[own])
    assert isinstance(stay(np.array([3])), jax.Array)
    assert sorted(np.concatenate(seen[1:])) == sorted({7, 3, *range(50, 50 + AT_ONCE + 2)})


def test_rows_beyond_the_bound_are_not_kept(monkeypatch):
    monkeypatch.setattr(transfers, "kept_bytes", lambda: 8)
    monkeypatch.setattr("pulmo_jax.inference.members.kept_bytes", transfers.kept_bytes)
    assert kept(stack, [np.arange(3)]) is stack
    assert kept(stack, [np.array([], int)]) is stack
    assert kept(stack, [np.arange(2)]) is not stack
    assert isinstance(transfers.keep(DATA[:3]), np.ndarray)
    assert isinstance(transfers.keep(DATA[:2]), jax.Array)
