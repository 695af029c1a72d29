"""Orders in which the cells of a square grid of codes are predicted.

An autoregressive model sees only the cells before the predicted one. Orders in opposite directions together show it all
sides of a cell (Pinaya et al. 2022, Medical Image Analysis 79:102475, Sec. 2.3).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

TokenOrder = Literal[
    "raster", "raster_reversed", "columns", "columns_reversed", "hilbert", "hilbert_reversed", "random"
]
SEED = 0  # of the random order, which is the same in every run


def token_orders(names: Sequence[TokenOrder], side: int) -> Int[np.ndarray, "N T"]:
    """Compute orders by name.

    Args:
        names: Names of the orders. raster: row by row from the top left; columns: column by column; hilbert: along a
            space-filling curve, so that consecutive cells are neighbours; random: one fixed permutation.
        side: Side of the grid.

    Returns:
        Cell row * side + column of each step, one row of T = side^2 steps per order.
    """
    raster = np.arange(side**2)
    forward = {
        "raster": raster,
        "columns": raster.reshape(side, side).T.ravel(),
        "hilbert": hilbert_curve(side),
        "random": np.random.default_rng(SEED).permutation(side**2),
    }
    reverse = {f"{name}_reversed": order[::-1] for name, order in forward.items()}
    return np.stack([(forward | reverse)[name] for name in names]).astype(np.int32)


def hilbert_curve(side: int) -> Int[np.ndarray, "T"]:
    """Order the cells along a Hilbert curve.

    Args:
        side: Side of the grid. If it is no power of two, the curve of the next one is cut to the grid, and a few
            consecutive cells are not neighbours.

    Returns:
        Cell row * side + column of each step.
    """
    rows, columns = np.zeros(1, int), np.zeros(1, int)
    size = 1
    while size < side:  # four copies of the curve; the first and the last are mirrored at a diagonal
        rows, columns = (
            np.concatenate([columns, rows, rows + size, 2 * size - 1 - columns]),
            np.concatenate([rows, columns + size, columns + size, size - 1 - rows]),
        )
        size *= 2
    inside = (rows < side) & (columns < side)
    return (rows * side + columns)[inside]
