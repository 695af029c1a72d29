"""Training state, and the pure functions that update it."""

from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from pulmo_jax.methods import classes
from pulmo_jax.methods.base import Accumulated, Condensed, Method, Params, PartlyFrozen, TracksStatistics
from pulmo_jax.methods.ensemble import Ensemble
from pulmo_jax.methods.located import Trained
from pulmo_jax.methods.segmenter import Segmenter

Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Training state; with the seed, it determines all further steps: batches and noise are functions of (seed, step).

    Attributes:
        step: Number of completed steps, an int32 scalar (or its shape and dtype during compilation).
        params: Parameters.
        ema: Exponential moving average of the parameters, used by all inference; empty without gradient descent.
        opt_state: State of the optimizer; empty without gradient descent.
    """

    step: Any
    params: Params
    ema: Params
    opt_state: optax.OptState


def init_state(method: Method | Trained, optimizer: optax.GradientTransformation) -> TrainState:
    """Initialise the training state.

    Args:
        method: Method that initialises the parameters.
        optimizer: Optimizer; unused for an accumulated method.

    Returns:
        State after 0 steps.
    """
    params = method.init()
    if isinstance(method, Accumulated):
        return TrainState(jnp.zeros((), jnp.int32), params, (), ())
    if isinstance(method, Ensemble):
        opt_state = jax.vmap(optimizer.init)(divided(method.member, params)[0])
    else:
        opt_state = optimizer.init(divided(method, params)[0])
    # Copies: shared buffers could not be donated.
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), opt_state)


def fitted_state(params: Params, step: int = 1) -> TrainState:
    """State of a method fitted in a single step, without moving average and optimizer state."""
    return TrainState(jnp.asarray(step, jnp.int32), params, (), ())


def averaged_state(params: Params) -> TrainState:
    """State that contains the moving average only, for inference."""
    return TrainState((), (), params, ())


def inference_state(method: Method) -> TrainState:
    """Initial state of the structure that inference restores: the moving average, or the sums of an accumulated method.

    Args:
        method: Method of the run.

    Returns:
        The state.
    """
    params = method.init()
    if isinstance(method, Condensed):
        params = method.condense(params)
    return TrainState((), params, (), ()) if isinstance(method, Accumulated) else averaged_state(params)


def make_update(
    method: Method | Trained | classes.Trained | Segmenter, optimizer: optax.GradientTransformation, ema_decay: float
) -> Callable[[TrainState, Any, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Make the gradient step of one network: pure, not compiled.

    Args:
        method: Method that computes the loss of a batch.
        optimizer: Optimizer.
        ema_decay: Maximum decay of the moving average. The decay is min(ema_decay, (1 + step) / (10 + step)), which
            reduces the weight of the random initialisation (as in TensorFlow's ExponentialMovingAverage).

    Returns:
        (state, batch, key) -> (state, metrics). The noise is a function of the key and `state.step`.
    """

    def update(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        trained, frozen = divided(method, state.params)

        def loss_of(trained: Params) -> tuple[jax.Array, Any]:
            params = joined(trained, frozen)
            if isinstance(method, TracksStatistics):
                return method.loss_and_statistics(params, batch, key)
            return method.train_loss(params, batch, key), None

        (loss, seen), gradient = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
        params = joined(cast(Params, optax.apply_updates(trained, updates)), frozen)
        if isinstance(method, TracksStatistics):
            params = method.update_statistics(params, seen)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        average, (trained, frozen) = divided(method, state.ema)[0], divided(method, params)
        ema = joined(jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, trained), frozen)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        if isinstance(method, TracksStatistics):
            metrics |= seen.get("metrics", {})
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return update


def divided(method: Any, params: Params) -> tuple[Params, Params]:
    """Divide parameters into those that gradient descent trains and those that it leaves as they are.

    Args:
        method: Method.
        params: Parameters.

    Returns:
        Trained and frozen parameters; the latter are None if the method trains all.
    """
    if not isinstance(method, PartlyFrozen):
        return params, None
    frozen = {name: params[name] for name in method.frozen}
    return {name: part for name, part in params.items() if name not in frozen}, frozen


def joined(trained: Params, frozen: Params) -> Params:
    """Join the parts of `divided`."""
    return trained if frozen is None else {**trained, **frozen}


def make_step(
    method: Method | Trained | classes.Trained | Segmenter,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Make the jitted training step; the buffers of the state are donated.

    Args:
        method: Method that computes the loss of a batch.
        optimizer: Optimizer.
        ema_decay: Maximum decay of the moving average (see `make_update`).
        seed: Seed of the noise.
        sharding: Sharding of the new state on several devices; the rows of a batch may be divided among them.

    Returns:
        (state, batch) -> (state, metrics).
    """
    count = method.count if isinstance(method, Ensemble) else None
    update = make_update(method.member if isinstance(method, Ensemble) else method, optimizer, ema_decay)
    by_network = TrainState(None, 0, 0, 0)
    each = jax.vmap(update, in_axes=(by_network, None, 0), out_axes=(by_network, 0))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.key(seed)
        if count is None:
            return update(state, batch, key)
        state, metrics = each(state, batch, jax.random.split(key, count))
        return state, jax.tree.map(jnp.mean, metrics)

    return jax.jit(step, donate_argnums=0, out_shardings=sharding)


def make_pass(
    method: Accumulated, sharding: jax.sharding.Sharding | None = None
) -> Callable[[TrainState, tuple[Float[Array, "B P P C"], Bool[Array, "B P P"]]], tuple[TrainState, Metrics]]:
    """Make the jitted step that adds a batch to the sums of an accumulated method; the state's buffers are donated.

    Args:
        method: Accumulated method.
        sharding: Sharding of the new state on several devices; the rows of a batch may be divided among them.

    Returns:
        (state, (patches, foreground mask)) -> (state, metrics).
    """

    def step(state: TrainState, batch: tuple[jax.Array, jax.Array]) -> tuple[TrainState, Metrics]:
        patches, inside = batch
        params = method.update(state.params, patches, inside)
        return state.replace(step=state.step + 1, params=params), {"foreground": inside.mean()}

    return jax.jit(step, donate_argnums=0, out_shardings=sharding)


def make_condensation(
    method: Condensed, sharding: jax.sharding.Sharding | None = None
) -> Callable[[TrainState], TrainState]:
    """Make the jitted function that condenses what a method has accumulated.

    Args:
        method: Accumulated method.
        sharding: Sharding of the new state on several devices.

    Returns:
        state -> state.
    """
    return jax.jit(lambda state: state.replace(params=method.condense(state.params)), out_shardings=sharding)


def learnt(method: Method, state: TrainState) -> Params:
    """Parameters for inference: the moving average, or the result computed from the sums of an accumulated method.

    Args:
        method: Method of the run.
        state: Training state.

    Returns:
        Parameters.
    """
    return method.finish(state.params) if isinstance(method, Accumulated) else state.ema
