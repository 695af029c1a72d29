"""The loop: batches in, state out, everything else in callbacks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
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
    """Step from `state.step` to `start.steps`. Raises InputError when loss or gradient are not finite any more.

    Whoever asks for a stop, a signal or a callback, every callback still gets a last event, with a validation: that of
    the step at hand if the signal came during it, else that of the next step.
    """
    stopped = None
    with ExitStack() as ends:
        for callback in callbacks:
            callback.on_start(start)
            ends.callback(callback.on_end)
        with Interrupt() as interrupt:
            for number in range(int(state.step) + 1, start.steps + 1):
                state, info = step(state, next(batches))
                metrics = {f"train/{name}": float(value) for name, value in info.items()}
                _require_finite(metrics, number)
                last = number == start.steps or stopped is not None or interrupt.signum is not None
                validates = last or number % validate_every == 0
                if validates:
                    metrics["val/loss"] = validate(state)
                    _require_finite(metrics, number)
                logs = validates or number % log_every == 0
                event = Event(number, metrics if logs else {}, state, last)
                reasons = [callback.on_event(event) for callback in callbacks]
                stopped = stopped or next((reason for reason in reasons if reason), None)
                if last:
                    break
    done = int(state.step)
    if done >= start.steps:
        return Outcome(state)
    if interrupt.signum is not None:
        return Outcome(state, f"stopped by signal {interrupt.signum} after step {done}", interrupt.signum)
    return Outcome(state, stopped)


def _require_finite(metrics: Mapping[str, float], number: int) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise InputError(
                f"{name} is {value} at step {number}; the last checkpoint is kept. Lower optimizer.learning_rate, or "
                "look at the images' value range"
            )
