"""Landmarks of many images: batches of one shape, compiled once, images on the host or kept on the device."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.inference.locate import AT_ONCE, in_batches, locating, locator
from pulmo_jax.inference.transfers import keep, read_behind
from pulmo_jax.methods.located import Located


@dataclass(frozen=True)
class Brightest:
    """One landmark, at the brightest pixel and `params` below it; counts how often it is traced."""

    size: int = 6
    traces: list = field(default_factory=list)

    def locate(self, params, images) -> Located:
        self.traces.append(images.shape)
        place = images.reshape(len(images), -1).argmax(-1)
        points = jnp.stack([place // self.size + params, place % self.size], -1)[:, None].astype(jnp.float32)
        return Located(points, jnp.ones((len(images), 1, 2, 2)))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).random((count, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("where", ["host", "device"])
def test_one_compilation_serves_any_number_of_images_and_parameters(where):
    method = Brightest()
    locate = locating(method)
    for count, shift in ((1, 0.0), (AT_ONCE, 1.0), (2 * AT_ONCE + 3, 2.0)):
        pixels = images(count)
        found = locate(jnp.float32(shift), keep(pixels) if where == "device" else pixels)
        place = pixels.reshape(count, -1).argmax(-1)
        np.testing.assert_array_equal(found.points[:, 0], np.stack([place // 6 + shift, place % 6], -1))
        assert found.covariance.shape == (count, 1, 2, 2)
    assert method.traces == [(AT_ONCE, 6, 6)]


def test_a_locator_has_its_parameters():
    pixels = images(3)
    expected = locating(Brightest())(jnp.float32(2), pixels)
    np.testing.assert_array_equal(locator(Brightest(), jnp.float32(2))(pixels).points, expected.points)


def test_batches_are_dispatched_before_earlier_results_are_read():
    order = []

    class Noted:
        def __init__(self, number):
            self.number = number

        def __array__(self, dtype=None, copy=None):
            order.append(("read", self.number))
            return np.full(AT_ONCE, self.number)

    def function(batch):
        order.append(("dispatched", len(order)))
        return Noted(sum(kind == "dispatched" for kind, _ in order) - 1)

    found = in_batches(function, images(4 * AT_ONCE - 1))
    np.testing.assert_array_equal(found, np.repeat(range(4), AT_ONCE)[:-1])
    kinds = [kind for kind, _ in order]
    assert kinds == ["dispatched"] * 3 + ["read", "dispatched"] + ["read"] * 3


def test_results_are_read_in_order_as_trees():
    results = ({"a": jnp.full(2, i), "b": (jnp.ones(i),)} for i in range(5))
    found = list(read_behind(results, ahead=1))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert [int(one["a"][0]) for one in found] == list(range(5))
    assert [one["b"][0].shape for one in found] == [(i,) for i in range(5)]
