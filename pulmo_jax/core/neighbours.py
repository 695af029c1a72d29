"""Exact nearest neighbours in blocks: one matrix product per block, and memory that does not grow with the bank."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core.coreset import squared_distances

BLOCK = 1024  # points of the bank at once


@partial(jax.jit, static_argnames="count")
def nearest(
    queries: Float[Array, "N D"], bank: Float[Array, "K D"], usable: Bool[Array, "K"], count: int = 1
) -> tuple[Float[Array, "N n"], Int[Array, "N n"]]:
    """Find the nearest points of a bank.

    Args:
        queries: Points.
        bank: Points among which the neighbours are.
        usable: Points of the bank that exist.
        count: Number n of neighbours, at most K.

    Returns:
        Distances, in ascending order, infinite beyond the usable points; and indices into the bank.
    """
    block = max(count, min(BLOCK, len(bank)))
    blocks = -(-len(bank) // block)
    padding = blocks * block - len(bank)
    middle = jnp.where(usable[:, None], bank, 0).sum(0) / jnp.maximum(usable.sum(), 1)  # small norms: small errors
    from_middle = queries - middle
    parts = jnp.pad(bank - middle, ((0, padding), (0, 0))).reshape(blocks, block, -1)
    outside = jnp.where(jnp.pad(usable, (0, padding)), 0, jnp.inf).reshape(blocks, block)

    def look(found: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        points, missing, start = part
        squared = squared_distances(from_middle, points) + missing
        if count == 1:
            place = squared.argmin(1)
            least = jnp.take_along_axis(squared, place[:, None], 1)
            nearer = least < found[0]
            return (jnp.where(nearer, least, found[0]), jnp.where(nearer, start + place[:, None], found[1])), None
        both = jnp.concatenate([found[0], squared], 1)
        places = jnp.concatenate([found[1], jnp.broadcast_to(start + jnp.arange(block), squared.shape)], 1)
        negative, best = lax.top_k(-both, count)
        return (-negative, jnp.take_along_axis(places, best, 1)), None

    start = jnp.full((len(queries), count), jnp.inf, queries.dtype), jnp.zeros((len(queries), count), jnp.int32)
    (squared, index), _ = lax.scan(look, start, (parts, outside, jnp.arange(blocks, dtype=jnp.int32) * block))
    exact = jnp.sqrt(((queries[:, None] - bank[index]) ** 2).sum(-1))  # products alone lose small distances
    return jnp.where(jnp.isinf(squared), jnp.inf, exact), index
