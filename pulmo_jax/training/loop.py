"""The loop: batches in, state out, everything else in callbacks."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pulmo_jax.training.callbacks import Callback, Event, Start
from pulmo_jax.training.interrupt import Interrupt
from pulmo_jax.training.state import Metrics, TrainState
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class Outcome:
    """The state at the end; `stopped` says why before the last step, `signum` which signal asked for it."""

    state: TrainState
    stopped: str | None = None
    signum: int | None = None


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Iterator[np.ndarray],
    validate: Callable[[TrainState], float],
    callbacks: Sequence[Callback],
    start: Start,
    *,
    log_every: int,
    validate_every: int,
) -> Outcome:
    """Step from `state.step` to `start.steps`. Raises InputError when the loss is not finite any more."""
    stopped = None
    for callback in callbacks:
        callback.on_start(start)
    try:
        with Interrupt() as interrupt:
            for number in range(int(state.step) + 1, start.steps + 1):
                state, info = step(state, next(batches))
                loss = float(info["loss"])
                if not math.isfinite(loss):
                    raise InputError(
                        f"training loss is {loss} at step {number}; the last checkpoint is kept. Lower "
                        "optimizer.learning_rate, or look at the images' value range"
                    )
                last = number == start.steps or interrupt.signum is not None
                validates = last or number % validate_every == 0
                metrics = {}
                if validates or number % log_every == 0:
                    metrics = {f"train/{name}": float(value) for name, value in info.items()}
                if validates:
                    metrics["val/loss"] = validate(state)
                event = Event(number, metrics, state, last)
                reasons = [callback.on_event(event) for callback in callbacks]
                stopped = next((reason for reason in reasons if reason), None)
                if stopped or interrupt.signum is not None:
                    break
    finally:
        for callback in callbacks:
            callback.on_end()
    if interrupt.signum is not None and int(state.step) < start.steps:
        return Outcome(state, f"stopped by signal {interrupt.signum} after step {int(state.step)}", interrupt.signum)
    return Outcome(state, stopped)
