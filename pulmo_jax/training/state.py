"""What training carries, and the one pure step that moves it on."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from pulmo_jax.methods import classes
from pulmo_jax.methods.base import Accumulated, Method, Params
from pulmo_jax.methods.located import Trained

Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """step: batches seen, an int32 scalar (while JAX compiles, what describes one). ema: exponential moving average of
    params, which all inference uses; empty, as is opt_state, for methods that are not trained by gradient descent.

    Nothing else decides how training goes on: batches and noise are functions of (seed, step).
    """

    step: Any
    params: Params
    ema: Params
    opt_state: optax.OptState


def init_state(method: Method | Trained, optimizer: optax.GradientTransformation) -> TrainState:
    params = method.init()
    if isinstance(method, Accumulated):
        return TrainState(jnp.zeros((), jnp.int32), params, (), ())
    # Copies: shared buffers could not be donated.
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def fitted_state(params: Params, step: int = 1) -> TrainState:
    """The state of a method that is fitted in a single step: no moving average, no optimizer."""
    return TrainState(jnp.asarray(step, jnp.int32), params, (), ())


def averaged_state(params: Params) -> TrainState:
    """A state that holds the moving average alone, which is what inference uses."""
    return TrainState((), (), params, ())


def inference_state(method: Method) -> TrainState:
    """The structure of what inference restores of a state: the moving average, or the sums of an accumulated method."""
    params = jax.eval_shape(method.init)
    return TrainState((), params, (), ()) if isinstance(method, Accumulated) else averaged_state(params)


def make_update(
    method: Method | Trained | classes.Trained, optimizer: optax.GradientTransformation, ema_decay: float
) -> Callable[[TrainState, Any, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """One gradient step of one network, pure and not compiled.

    Args:
        method: Gives the loss of a batch.
        optimizer: Makes updates of gradients.
        ema_decay: Largest decay of the moving average. It is min(ema_decay, (1 + step) / (10 + step)), so that the
            average forgets the random start (as in TensorFlow's ExponentialMovingAverage).

    Returns:
        (state, batch, key) -> (state, metrics); the noise is a function of key and `state.step`.
    """

    def update(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        loss, gradient = jax.value_and_grad(method.train_loss)(state.params, batch, key)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return update


def make_step(
    method: Method | Trained | classes.Trained,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The jitted training step (state, batch) -> (state, metrics); the state's buffers are donated.

    Args:
        method: Gives the loss of a batch.
        optimizer: Makes updates of gradients.
        ema_decay: Largest decay of the moving average (see `make_update`).
        seed: Of the noise.
        sharding: Of the new state, if it is on several devices; the batch's rows may be divided among them.
    """
    update = make_update(method, optimizer, ema_decay)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return update(state, batch, jax.random.key(seed))

    return jax.jit(step, donate_argnums=0, out_shardings=sharding)


def make_pass(
    method: Accumulated, sharding: jax.sharding.Sharding | None = None
) -> Callable[[TrainState, tuple[Float[Array, "B P P C"], Bool[Array, "B P P"]]], tuple[TrainState, Metrics]]:
    """The jitted step that adds a batch to the sums: (state, (batch, inside)) -> (state, metrics)."""

    def step(state: TrainState, batch: tuple[jax.Array, jax.Array]) -> tuple[TrainState, Metrics]:
        patches, inside = batch
        params = method.update(state.params, patches, inside)
        return state.replace(step=state.step + 1, params=params), {"foreground": inside.mean()}

    return jax.jit(step, donate_argnums=0, out_shardings=sharding)


def learnt(method: Method, state: TrainState) -> Params:
    """The parameters for inference: the averaged ones, or those computed from the sums of an accumulated method."""
    return method.finish(state.params) if isinstance(method, Accumulated) else state.ema
