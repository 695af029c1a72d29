"""The loop: batches in, state out, everything else in callbacks."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from pulmo_jax.host.signals import Interrupt
from pulmo_jax.training.callbacks import Callback, Event, Start
from pulmo_jax.training.state import Metrics, TrainState
from pulmo_jax.types import InputError

SHOWN_FILES = 5


@dataclass
class Clock:
    """Seconds by what the loop was doing."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began


@dataclass(frozen=True)
class Outcome:
    """The state at the end; `stopped` says why before the last step, `signum` which signal asked for it.

    seconds: where the time went: "steps", "waiting for batches" (while a step computes), "validation", "callbacks".
    """

    state: TrainState
    seconds: Mapping[str, float]
    stopped: str | None = None
    signum: int | None = None


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Iterator[Any],
    validate: Callable[[TrainState], float],
    callbacks: Sequence[Callback],
    start: Start,
    *,
    log_every: int,
    validate_every: int,
    agreed: Callable[[int | None], int | None] = lambda signum: signum,
) -> Outcome:
    """Steps from `state.step` to `start.steps`.

    The metrics of a step are read while the next one computes, unless the step is logged, validated or the last, or a
    callback reads its state: the device does not wait for the host. Nothing is done with the state of a step before its
    metrics have been found to be finite.

    When a callback gives a reason, one more step is taken, validated, and is the last. After a signal the step at hand
    is the last (or, if it came between steps, the next), without a validation of its own: what is logged and what is
    held to be the best are those of a run that was never stopped. Either way every callback gets a last event.

    Args:
        state: To start from; its buffers are donated to the steps.
        step: (state, batch) -> (state, metrics), compiled.
        batches: One for each step, asked for while the step before computes. A batch of device arrays is then on its
            way to the device in time.
        validate: Validation loss of a state.
        callbacks: Told of the start, of every step and of the end.
        start: What the callbacks are told of the run.
        log_every: Steps between logged ones.
        validate_every: Steps between validated ones.
        agreed: Turns the signal that this process has received into the one that all processes act on.

    Raises:
        InputError: Loss, gradient or validation loss of a step are not finite; the step's files are named.
    """
    clock, stopped, signum = Clock(), None, None
    with ExitStack() as ends:
        for callback in callbacks:
            stopped = callback.on_start(start) or stopped
            ends.callback(callback.on_end)
        with Interrupt() as interrupt:
            numbers = range(int(state.step) + 1, start.steps + 1)
            with clock("waiting for batches"):
                batch = next(batches) if numbers else None
            read_previous: Callable[[], Any] = dict  # before the first step there is nothing to read
            for number in numbers:
                with clock("steps"):
                    state, info = step(state, batch)
                    read = reading(info, number, start.files_of)
                with clock("waiting for batches"):  # the step goes on meanwhile
                    batch = next(batches) if number < start.steps else None
                with clock("steps"):
                    read_previous()
                read_previous, signum = read, agreed(interrupt.signum)
                ends_here = number == start.steps or stopped is not None
                last = ends_here or signum is not None
                validated = ends_here or number % validate_every == 0
                logged = validated or number % log_every == 0
                with clock("steps"):
                    metrics = read() if logged or last else {}
                if validated:
                    with clock("validation"):
                        metrics = metrics | {"val/loss": validate(state)}
                    _require_finite(metrics, number, start.files_of)
                with clock("callbacks"):
                    event = Event(number, metrics if logged else {}, partial(_checked, state, read), last, stopped)
                    reasons = [callback.on_event(event) for callback in callbacks]
                stopped = stopped or next((reason for reason in reasons if reason), None)
                if last:
                    break
    done = int(state.step)
    if done >= start.steps:
        return Outcome(state, clock.seconds)
    if signum is not None:
        return Outcome(state, clock.seconds, f"stopped by signal {signum} after step {done}", signum)
    return Outcome(state, clock.seconds, stopped)


def reading(info: Metrics, number: int, files_of: Callable[[int], list[str]]) -> Callable[[], dict[str, float]]:
    """The metrics of a step, on their way to the host; calling the result waits for them.

    The result raises InputError where they are not finite.
    """
    for value in info.values():
        value.copy_to_host_async()

    @cache
    def read() -> dict[str, float]:
        metrics = {f"train/{name}": float(value) for name, value in info.items()}
        _require_finite(metrics, number, files_of)
        return metrics

    return read


def _checked(state: TrainState, read: Callable[[], dict[str, float]]) -> TrainState:
    read()
    return state


def _require_finite(metrics: Mapping[str, float], number: int, files_of: Callable[[int], list[str]]) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            files = files_of(number)
            more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
            where = "" if name.startswith("val/") else f", on patches of {', '.join(files[:SHOWN_FILES])}{more}"
            raise InputError(
                f"{name} is {value} at step {number}{where}; the last checkpoint is kept. Lower "
                "optimizer.learning_rate, or look at these images' value range"
            )
