"""Orders of the cells of a grid."""

import typing

import numpy as np
import pytest

from pulmo_jax.methods.token_orders import TokenOrder, hilbert_curve, token_orders

NAMES = typing.get_args(TokenOrder)


@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_every_order_visits_every_cell_once(side):
    orders = token_orders(NAMES, side)
    assert orders.shape == (len(NAMES), side**2)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(side**2), (len(NAMES), 1)))


def test_orders_of_a_small_grid():
    found = token_orders(["raster", "columns_reversed", "hilbert", "raster_reversed", "columns"], 2)
    np.testing.assert_array_equal(found, [[0, 1, 2, 3], [3, 1, 2, 0], [0, 1, 3, 2], [3, 2, 1, 0], [0, 2, 1, 3]])


def test_orders_differ():
    orders = token_orders(NAMES, 4)
    assert len({tuple(order) for order in orders}) == len(NAMES)


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_consecutive_cells_of_a_hilbert_curve_are_neighbours(side):
    rows, columns = np.divmod(hilbert_curve(side), side)
    np.testing.assert_array_equal(np.abs(np.diff(rows)) + np.abs(np.diff(columns)), 1)
