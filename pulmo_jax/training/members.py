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
from pulmo_jax.training.state import Metrics, TrainState


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
    """The training step (state, batch) -> (state, metrics); the state's buffers are donated.

    batch: images (B, M, S, S) and labels (B, M); rows may be divided among devices. keys: of the networks, from which
    all that is random in their training comes. metrics: means over the networks.
    """

    def one(step: jax.Array, params: Params, ema: Params, opt_state: Any, batch: Any, key: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(method.train_loss)(params, batch, jax.random.fold_in(key, step))
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(ema_decay, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        return params, ema, opt_state, {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}

    @partial(jax.jit, donate_argnums=(1, 2, 3), out_shardings=sharding)
    def chunk(step: jax.Array, params: Params, ema: Params, opt_state: Any, batch: Any, key: jax.Array) -> Any:
        return jax.vmap(one, in_axes=(None, 0, 0, 0, 1, 0))(step, params, ema, opt_state, batch, key)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        done, first = [], 0
        chunks: Any = state.params, state.ema, state.opt_state
        for part in zip(*chunks, strict=True):
            members = slice(first, first + members_of(part[0]))
            done.append(chunk(state.step, *part, tuple(array[:, members] for array in batch), keys[members]))
            first = members.stop
        params, ema, opt_state, metrics = (list(column) for column in zip(*done, strict=True))
        means = {name: jnp.concatenate([m[name] for m in metrics]).mean() for name in metrics[0]}
        return TrainState(state.step + 1, params, ema, opt_state), means

    return step


def members_of(chunk: Params) -> int:
    return len(jax.tree.leaves(chunk)[0])
