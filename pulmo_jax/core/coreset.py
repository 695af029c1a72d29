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
BLOCK = 4096  # points whose distances are renewed at once
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
    points: Float[Array, "N D"], count: Int[Array, ""] | int, size: int, wanted: Int[Array, ""] | int
) -> Coreset:
    """Select points one after the other, each the farthest from those before; the first one is the first point.

    Args:
        points: Points, of which the first `count` exist.
        count: Number of points, at least one.
        size: Largest number K of points to select.
        wanted: Number of points to select, at most `size`; fewer if all are selected, or the others are copies.

    Returns:
        The selected points.
    """
    length = len(points)
    block, pool, batch = min(BLOCK, length), min(POOL, length), min(BATCH, size)
    exists = jnp.arange(length) < count
    middle = jnp.where(exists[:, None], points, 0).sum(0) / count  # small norms: small errors
    wanted = jnp.minimum(jnp.asarray(wanted), jnp.minimum(size, count))

    def renewed(state: State) -> Float[Array, "N"]:
        """Squared distances from all selected points."""
        places = state.known + jnp.arange(batch)
        centres = points[state.chosen[jnp.minimum(places, size - 1)]] - middle
        outside = jnp.where(places < state.number, 0, jnp.inf)

        def of_block(i: Int[Array, ""], squared: Float[Array, "N"]) -> Float[Array, "N"]:
            start = jnp.minimum(i * block, length - block)
            some = lax.dynamic_slice_in_dim(points, start, block) - middle
            least = jnp.maximum((squared_distances(some, centres) + outside).min(1), 0)
            before = lax.dynamic_slice_in_dim(squared, start, block)
            return lax.dynamic_update_slice_in_dim(squared, jnp.minimum(before, least), start, 0)

        return lax.fori_loop(0, (count + block - 1) // block, of_block, state.squared)

    def select(state: State) -> State:
        """Select from the pool of the farthest points until one outside could be farther."""
        squared = renewed(state)
        bounds, pooled = lax.top_k(squared, pool)
        beyond = bounds[-1] if pool < length else jnp.asarray(SELECTED)
        members = points[pooled] - middle
        norms = (members**2).sum(1)

        def goes_on(carry: tuple[State, Float[Array, "M"], Int[Array, ""]]) -> Bool[Array, ""]:
            state, bounds, found = carry
            return (bounds.max() >= beyond) & (bounds.max() > 0) & (found < batch) & (state.number < wanted)

        def take(
            carry: tuple[State, Float[Array, "M"], Int[Array, ""]],
        ) -> tuple[State, Float[Array, "M"], Int[Array, ""]]:
            state, bounds, found = carry
            best = bounds.argmax()
            to_best = norms - 2 * members @ members[best] + norms[best]
            bounds = jnp.minimum(bounds, jnp.maximum(to_best, 0)).at[best].set(SELECTED)
            chosen = state.chosen.at[state.number].set(pooled[best])
            return state._replace(chosen=chosen, number=state.number + 1), bounds, found + 1

        before = state.number
        state, bounds, _ = lax.while_loop(goes_on, take, (state, bounds, jnp.int32(0)))
        return state._replace(known=before, squared=squared.at[pooled].set(bounds))

    start = State(
        jnp.zeros(size, jnp.int32),
        jnp.int32(1),
        jnp.int32(0),
        jnp.where(exists, jnp.inf, SELECTED).at[0].set(SELECTED),
    )

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.number < wanted) & (state.squared.max() > 0)

    end = lax.while_loop(unfinished, select, start)
    return Coreset(end.chosen, end.number, jnp.sqrt(jnp.maximum(renewed(end).max(), 0)))


def squared_distances(points: Float[Array, "N D"], others: Float[Array, "K D"]) -> Float[Array, "N K"]:
    """Squared distances by a matrix product; accurate to rounding errors of the squared norms."""
    return (points**2).sum(1)[:, None] - 2 * points @ others.T + (others**2).sum(1)
