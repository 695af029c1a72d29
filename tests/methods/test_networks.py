"""Parameters of several networks in one tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.methods.networks import SHARED, members_of, network_axes, stacked, unstacked

APART = [{"a": jnp.full(2, m), "b": {"c": jnp.full((3, 1), 10 * m)}} for m in range(3)]
TOGETHER = [network | {SHARED: {"d": jnp.arange(4)}} for network in APART]


@pytest.mark.parametrize("networks", [APART, TOGETHER], ids=["apart", "together"])
def test_networks_are_joined_and_taken_apart(networks):
    chunk = stacked(networks)
    assert members_of(chunk) == 3
    assert chunk["b"]["c"].shape == (3, 3, 1)
    for back, network in zip(unstacked(chunk), networks, strict=True):
        jax.tree.map(np.testing.assert_array_equal, back, network)


def test_what_they_share_has_no_axis():
    chunk = stacked(TOGETHER)
    assert chunk[SHARED]["d"].shape == (4,)
    assert network_axes(chunk) == {"a": 0, "b": 0, SHARED: None}
    assert network_axes(stacked(APART)) == 0
