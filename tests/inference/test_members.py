"""What several networks make of images, in batches of one shape."""

import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.inference.members import AT_ONCE, all_the_same, at_rows, each_its_own, of_all

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
