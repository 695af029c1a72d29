"""Exact nearest neighbours in blocks: matrix products, and memory that does not grow with the bank."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core.coreset import squared_distances

BLOCK = 1024  # points of the bank at once
GROUP = 16  # points of the bank of which only the smallest distance is kept at first


def nearest_one(
    queries: Float[Array, "N D"], bank: Float[Array, "K D"], usable: Bool[Array, "K"]
) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """Find the nearest point of a bank.

    Args:
        queries: Points.
        bank: Points among which the nearest is; at least one is usable.
        usable: Points of the bank that exist.

    Returns:
        Distances, and indices into the bank.
    """
    middle, parts, outside = in_blocks(bank, usable, -(-min(BLOCK, len(bank)) // GROUP) * GROUP)
    turned = (queries - middle).T

    def of_block(part: tuple[Array, Array]) -> Float[Array, "g N"]:
        points, missing = part
        squared = ((points**2).sum(1) + missing)[:, None] - 2 * points @ turned  # up to the norm of the query
        return squared.reshape(-1, GROUP, len(queries)).min(1)

    least = lax.map(of_block, (parts, outside))
    group = least.reshape(-1, len(queries)).argmin(0)
    index = jnp.minimum(group[:, None] * GROUP + jnp.arange(GROUP), len(bank) - 1)
    squared = ((queries[:, None] - bank[index]) ** 2).sum(-1)  # products alone lose small distances
    squared = jnp.where(usable[index], squared, jnp.inf)
    best = squared.argmin(1)[:, None]
    return jnp.sqrt(jnp.take_along_axis(squared, best, 1)[:, 0]), jnp.take_along_axis(index, best, 1)[:, 0]


@partial(jax.jit, static_argnames="count")
def nearest(
    queries: Float[Array, "N D"], bank: Float[Array, "K D"], usable: Bool[Array, "K"], count: int
) -> tuple[Float[Array, "N n"], Int[Array, "N n"]]:
    """Find several nearest points of a bank.

    Args:
        queries: Points.
        bank: Points among which the neighbours are.
        usable: Points of the bank that exist.
        count: Number n of neighbours, at most K.

    Returns:
        Distances, in ascending order, infinite beyond the usable points; and indices into the bank.
    """
    block = max(count, min(BLOCK, len(bank)))
    middle, parts, outside = in_blocks(bank, usable, block)
    from_middle = queries - middle

    def look(found: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        points, missing, start = part
        squared = squared_distances(from_middle, points) + missing
        both = jnp.concatenate([found[0], squared], 1)
        places = jnp.concatenate([found[1], jnp.broadcast_to(start + jnp.arange(block), squared.shape)], 1)
        negative, best = lax.top_k(-both, count)
        return (-negative, jnp.take_along_axis(places, best, 1)), None

    start = jnp.full((len(queries), count), jnp.inf, queries.dtype), jnp.zeros((len(queries), count), jnp.int32)
    (squared, index), _ = lax.scan(look, start, (parts, outside, jnp.arange(len(parts), dtype=jnp.int32) * block))
    exact = jnp.sqrt(((queries[:, None] - bank[index]) ** 2).sum(-1))  # products alone lose small distances
    return jnp.where(jnp.isinf(squared), jnp.inf, exact), index


def in_blocks(
    bank: Float[Array, "K D"], usable: Bool[Array, "K"], block: int
) -> tuple[Float[Array, "D"], Float[Array, "b B D"], Float[Array, "b B"]]:
    """Divide a bank into blocks of points relative to their mean, whose small norms keep rounding errors small.

    Args:
        bank: Points.
        usable: Points of the bank that exist.
        block: Number B of points in a block.

    Returns:
        Mean of the usable points; deviations from it, padded to whole blocks; and 0 for usable points, infinity for
        others.
    """
    middle = jnp.where(usable[:, None], bank, 0).sum(0) / jnp.maximum(usable.sum(), 1)
    padding = -len(bank) % block
    parts = jnp.pad(bank - middle, ((0, padding), (0, 0))).reshape(-1, block, bank.shape[1])
    return middle, parts, jnp.where(jnp.pad(usable, (0, padding)), 0, jnp.inf).reshape(-1, block)
