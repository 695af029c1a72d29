"""Several networks that know nothing of each other, trained in one program: folds, repeats, seeds.

Networks stand along a leading axis of every array, some in each chunk; `vmap` over a chunk makes its program. Each has
batches, noise, gradient, clipping and average of its own: it becomes what it would become alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from pulmo_jax.methods.classes import Descended, Params
from pulmo_jax.training.state import Metrics, TrainState, make_update

Chunk = tuple[Params, Params, optax.OptState]  # parameters, their moving average, and the optimizer's state


def chunk_sizes(count: int, at_once: int) -> list[int]:
    """At most so many in each, all alike if few more chunks make that possible: one program then serves all."""
    least = -(-count // at_once)
    chunks = next((n for n in range(least, 2 * least + 1) if count % n == 0), least)
    return [len(part) for part in np.array_split(np.arange(count), chunks)]


def init_members(
    method: Descended, optimizer: optax.GradientTransformation, keys: Key[Array, "M"], sizes: Sequence[int]
) -> TrainState:
    """params, ema and opt_state are lists of chunks."""
    first = np.cumsum([0, *sizes[:-1]])
    params = [jax.vmap(method.init)(keys[start : start + size]) for start, size in zip(first, sizes, strict=True)]
    copies = jax.tree.map(jnp.copy, params)  # shared buffers could not be donated
    return TrainState(jnp.zeros((), jnp.int32), params, copies, [jax.vmap(optimizer.init)(part) for part in params])


def make_member_step(
    method: Descended,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    keys: Key[Array, "M"],
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The training step (state, batch) -> (state, metrics) of all networks; the state's buffers are donated.

    A chunk is one call of a compiled program, which cuts the chunk's columns out of the batch.

    Args:
        method: Gives the loss of a batch of one network.
        optimizer: Makes updates of gradients.
        ema_decay: Largest decay of the moving average (see `state.make_update`).
        keys: One for each network, from which all of its random numbers come.
        sharding: Of the new state, if it is on several devices; the batch's rows may be divided among them.

    Returns:
        A step whose batch is images (B, M, S, S) and labels (B, M), and whose metrics are means over the networks.
    """
    by_member = TrainState(None, 0, 0, 0)
    update = jax.vmap(make_update(method, optimizer, ema_decay), in_axes=(by_member, 1, 0), out_axes=(by_member, 0))

    @partial(jax.jit, donate_argnums=1, out_shardings=sharding)
    def advance(step: jax.Array, chunk: Chunk, batch: Any, keys: jax.Array, first: jax.Array) -> tuple[Chunk, Metrics]:
        count = members_of(chunk[0])
        columns = [jax.lax.dynamic_slice_in_dim(array, first, count, axis=1) for array in batch]
        own_keys = jax.lax.dynamic_slice_in_dim(keys, first, count)
        state, metrics = update(TrainState(step, *chunk), tuple(columns), own_keys)
        return (state.params, state.ema, state.opt_state), metrics

    @partial(jax.jit, out_shardings=sharding)
    def summarize(step: jax.Array, metrics: list[Metrics]) -> tuple[jax.Array, Metrics]:
        return step + 1, jax.tree.map(lambda *values: jnp.concatenate(values).mean(), *metrics)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        optimizer_states: Any = state.opt_state
        chunks = list(zip(state.params, state.ema, optimizer_states, strict=True))
        firsts = np.cumsum([0, *(members_of(chunk[0]) for chunk in chunks[:-1])], dtype=np.int32)
        advanced = [
            advance(state.step, chunk, tuple(batch), keys, first) for chunk, first in zip(chunks, firsts, strict=True)
        ]
        number, means = summarize(state.step, [metrics for _, metrics in advanced])
        params, ema, opt_state = (list(column) for column in zip(*(chunk for chunk, _ in advanced), strict=True))
        return TrainState(number, params, ema, opt_state), means

    return step


def members_of(chunk: Params) -> int:
    return len(jax.tree.leaves(chunk)[0])
