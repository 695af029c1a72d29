"""A small subset of points that is near all of them: greedy k-centre, exact and in blocks.

Greedy selection takes the point that is farthest from those selected (Gonzalez 1985, Theor. Comput. Sci. 38:293), which
is at most twice as far from any point as the best subset of the same size. Selected one by one, each point costs a pass
over all others. Here the distances are upper bounds that are renewed by matrix products: within a pool of the points
that may be farthest, the selection goes on until one outside could be farther. The selection is the same.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

POOL = 4096  # points among which the farthest is looked for
BATCH = 512  # selected points between two renewals of all distances
BLOCK = 8192  # points whose distances are renewed at once
SELECTED = -1.0  # in the place of the squared distance of a selected point


class Coreset(NamedTuple):
    """Selected points.

    Attributes:
        chosen: Indices in the order of selection; those after the last one repeat the first.
        number: Number of selected points.
        radius: Largest distance of a point from the nearest selected one.
    """

    chosen: Int[Array, "K"]
    number: Int[Array, ""]
    radius: Float[Array, ""]


class State(NamedTuple):
    """Selection so far: squared distances are from the points selected before `known`."""

    chosen: Int[Array, "K"]
    number: Int[Array, ""]
    known: Int[Array, ""]
    squared: Float[Array, "N"]


@partial(jax.jit, static_argnames="size")
def greedy_coreset(
    points: Float[Array, "N D"], usable: Bool[Array, "N"], size: int, wanted: Int[Array, ""] | int
) -> Coreset:
    """Select points one after the other, each the farthest from those before; the first is the first usable one.

    Args:
        points: Points.
        usable: Points that exist; at least one.
        size: Largest number K of points to select.
        wanted: Number of points to select, at most `size`; fewer if all are selected, or the others are copies.

    Returns:
        The selected points.
    """
    count = len(points)
    block, pool, batch = min(BLOCK, count), min(POOL, count), min(BATCH, size)
    blocks = -(-count // block)
    padding = ((0, blocks * block - count), (0, 0))
    points = points - jnp.where(usable[:, None], points, 0).sum(0) / jnp.maximum(usable.sum(), 1)
    in_blocks = jnp.pad(points, padding).reshape(blocks, block, -1)
    wanted = jnp.minimum(jnp.asarray(wanted), jnp.minimum(size, usable.sum()))

    def renewed(state: State) -> Float[Array, "N"]:
        """Squared distances from all selected points."""
        places = state.known + jnp.arange(batch)
        centres = points[state.chosen[jnp.minimum(places, size - 1)]]
        outside = jnp.where(places < state.number, 0, jnp.inf)

        def of_block(some: Float[Array, "n D"]) -> Float[Array, "n"]:
            return (squared_distances(some, centres) + outside).min(1)

        least = lax.map(of_block, in_blocks).reshape(-1)[:count]
        return jnp.minimum(state.squared, jnp.maximum(least, 0))

    def select(state: State) -> State:
        """Select from the pool of the farthest points until one outside could be farther."""
        squared = renewed(state)
        bounds, pooled = lax.top_k(squared, pool)
        beyond = bounds[-1] if pool < count else jnp.asarray(SELECTED)
        members = points[pooled]

        def more(carry: tuple[State, Float[Array, "M"], Int[Array, ""]]) -> Bool[Array, ""]:
            state, bounds, found = carry
            return (bounds.max() >= beyond) & (bounds.max() > 0) & (found < batch) & (state.number < wanted)

        def take(
            carry: tuple[State, Float[Array, "M"], Int[Array, ""]],
        ) -> tuple[State, Float[Array, "M"], Int[Array, ""]]:
            state, bounds, found = carry
            best = bounds.argmax()
            bounds = jnp.minimum(bounds, ((members - members[best]) ** 2).sum(1)).at[best].set(SELECTED)
            chosen = state.chosen.at[state.number].set(pooled[best])
            return state._replace(chosen=chosen, number=state.number + 1), bounds, found + 1

        before = state.number
        state, bounds, _ = lax.while_loop(more, take, (state, bounds, jnp.int32(0)))
        return state._replace(known=before, squared=squared.at[pooled].set(bounds))

    first = usable.argmax()
    start = State(
        jnp.full(size, first, jnp.int32),
        jnp.int32(1),
        jnp.int32(0),
        jnp.where(usable, jnp.inf, SELECTED).at[first].set(SELECTED),
    )

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.number < wanted) & (state.squared.max() > 0)

    end = lax.while_loop(unfinished, select, start)
    return Coreset(end.chosen, end.number, jnp.sqrt(jnp.maximum(renewed(end).max(), 0)))


def squared_distances(points: Float[Array, "N D"], others: Float[Array, "K D"]) -> Float[Array, "N K"]:
    """Squared distances by a matrix product; accurate to rounding errors of the squared norms."""
    return (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)
