"""Joint training of several independent networks in one program: folds, repeats, seeds.

Every array has a leading axis over the M networks, divided into chunks; `vmap` over a chunk gives one compiled program.
Each network has its own batches, noise, gradient, gradient clipping and moving average, as in separate training.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, UInt32

from pulmo_jax.methods.base import Params
from pulmo_jax.methods.classes import Trained
from pulmo_jax.methods.networks import members_of
from pulmo_jax.methods.segmenter import Segmenter
from pulmo_jax.training.program import Program, temporary_bytes
from pulmo_jax.training.state import Metrics, TrainState, make_update

Chunk = tuple[Params, Params, optax.OptState]  # parameters, their moving average, and the optimizer's state


def chunk_sizes(count: int, at_once: int) -> list[int]:
    """Divide the networks into chunks of nearly equal size.

    The sizes are all equal, so that a single program serves all chunks, if less than twice the minimum number of chunks
    makes that possible.

    Args:
        count: Number of networks.
        at_once: Maximum number of networks in a chunk.

    Returns:
        Number of networks in each chunk.
    """
    least = -(-count // at_once)
    chunks = next((n for n in range(least, 2 * least + 1) if count % n == 0), least)
    return [len(part) for part in np.array_split(np.arange(count), chunks)]


def seed_of(*parts: object) -> int:
    """Derive a 32-bit seed from identifiers; different identifiers give independent seeds."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def init_members(
    method: Trained | Segmenter, optimizer: optax.GradientTransformation, keys: Key[Array, "M"], sizes: Sequence[int]
) -> TrainState:
    """Initialise the training state of all networks.

    Args:
        method: Method that initialises one network.
        optimizer: Optimizer.
        keys: Random key of each network.
        sizes: Number of networks in each chunk.

    Returns:
        State whose params, ema and opt_state are lists of chunks.
    """
    first = np.cumsum([0, *sizes[:-1]])
    params = [jax.vmap(method.init)(keys[start : start + size]) for start, size in zip(first, sizes, strict=True)]
    copies = jax.tree.map(jnp.copy, params)  # shared buffers could not be donated
    return TrainState(jnp.zeros((), jnp.int32), params, copies, [jax.vmap(optimizer.init)(part) for part in params])


@dataclass(frozen=True)
class MemberStep:
    """Training step of all networks; it calls one program for each chunk. The buffers of the state are donated.

    Attributes:
        advance: Jitted (step number, chunk, batch, key data, index of the chunk's first network) -> (chunk, metrics).
        summarize: (step number, metrics of all chunks) -> (next step number, means over the networks).
        key_data: Data of the random key of each network, from which all of its random numbers derive.
    """

    advance: Any
    summarize: Callable[[jax.Array, list[Metrics]], tuple[jax.Array, Metrics]]
    key_data: UInt32[np.ndarray, "M W"]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """A step with arrays (B, M, ...), such as images (B, M, S, S) and labels (B, M)."""
        advanced = [
            self.advance(state.step, chunk, tuple(batch), self.key_data, first) for first, chunk in chunks_of(state)
        ]
        number, means = self.summarize(state.step, [metrics for _, metrics in advanced])
        params, ema, opt_state = (list(column) for column in zip(*(chunk for chunk, _ in advanced), strict=True))
        return TrainState(number, params, ema, opt_state), means

    def compiled(self, state: TrainState, batch: Any) -> Program:
        """Compile one program for each chunk size.

        Args:
            state: State with the shapes and shardings of the training.
            batch: Batch with the shapes and shardings of the training.

        Returns:
            Compiled step, and the largest working memory of its programs.
        """
        programs: dict[int, Any] = {}
        for first, chunk in chunks_of(state):
            if (size := members_of(chunk[0])) not in programs:
                lowered = self.advance.lower(state.step, chunk, tuple(batch), self.key_data, first)
                programs[size] = lowered.compile()

        def advance(step: jax.Array, chunk: Chunk, *rest: Any) -> tuple[Chunk, Metrics]:
            return programs[members_of(chunk[0])](step, chunk, *rest)

        return Program(replace(self, advance=advance), max(map(temporary_bytes, programs.values())))


def make_member_step(
    method: Trained | Segmenter,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    keys: Key[Array, "M"],
    sharding: jax.sharding.Sharding | None = None,
) -> MemberStep:
    """Make the training step (state, batch) -> (state, metrics) of all networks.

    Args:
        method: Method that computes the loss of a batch of one network.
        optimizer: Optimizer.
        ema_decay: Maximum decay of the moving average (see `state.make_update`).
        keys: Random key of each network.
        sharding: Sharding of the new state on several devices; the rows of a batch may be divided among them.

    Returns:
        Step for a batch of arrays (B, M, ...), such as images and labels; its metrics are means over the networks.
    """
    by_member = TrainState(None, 0, 0, 0)
    update = jax.vmap(make_update(method, optimizer, ema_decay), in_axes=(by_member, 1, 0), out_axes=(by_member, 0))

    @partial(jax.jit, donate_argnums=1, out_shardings=sharding)
    def advance(
        step: jax.Array, chunk: Chunk, batch: Any, key_data: jax.Array, first: jax.Array
    ) -> tuple[Chunk, Metrics]:
        count = members_of(chunk[0])
        columns = [jax.lax.dynamic_slice_in_dim(array, first, count, axis=1) for array in batch]
        own_keys = jax.random.wrap_key_data(jax.lax.dynamic_slice_in_dim(key_data, first, count))
        state, metrics = update(TrainState(step, *chunk), tuple(columns), own_keys)
        return (state.params, state.ema, state.opt_state), metrics

    @partial(jax.jit, out_shardings=sharding)
    def summarize(step: jax.Array, metrics: list[Metrics]) -> tuple[jax.Array, Metrics]:
        return step + 1, jax.tree.map(lambda *values: jnp.concatenate(values).mean(), *metrics)

    return MemberStep(advance, summarize, np.asarray(jax.random.key_data(keys)))


def chunks_of(state: TrainState) -> list[tuple[np.int32, Chunk]]:
    """Chunks of a state, each with the index of its first network."""
    optimizer_states: Any = state.opt_state
    chunks = list(zip(state.params, state.ema, optimizer_states, strict=True))
    firsts = np.cumsum([0, *(members_of(chunk[0]) for chunk in chunks[:-1])], dtype=np.int32)
    return list(zip(firsts, chunks, strict=True))
