"""Training loop: runs the steps; callbacks do everything else."""

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
    """Seconds by activity of the loop.

    Attributes:
        seconds: Total duration by activity, in seconds.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Add the duration of the block to an activity."""
        began = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began


@dataclass(frozen=True)
class Outcome:
    """Outcome of the training loop.

    Attributes:
        state: State after the last step.
        seconds: Seconds by activity: "steps", "waiting for batches" (while a step runs), "validation", "callbacks".
        stopped: Reason of a stop before the last step, if any.
        signum: Signal that requested the stop, if any.
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
    """Run the training steps from `state.step` to `start.steps`.

    The loop reads the metrics of a step while the next step runs, so that the device does not wait for the host.
    Exceptions are the last step, logged and validated steps, and steps whose state a callback reads. A state is
    used only after the metrics of its step have been found finite.

    If a callback returns a reason to stop, the loop runs and validates one more step, which is the last. After a
    signal, the current step (or the next one, if the signal arrives between steps) is the last, without an additional
    validation: the log and the best checkpoint remain those of an uninterrupted run. In both cases, every callback
    receives a last event.

    Args:
        state: Initial state; its buffers are donated to the steps.
        step: Compiled (state, batch) -> (state, metrics).
        batches: One batch for each step. The next batch is requested while a step runs, so that its transfer to the
            device overlaps with the computation.
        validate: Validation loss of a state.
        callbacks: Callbacks.
        start: Description of the run for the callbacks.
        log_every: Number of steps between logged steps.
        validate_every: Number of steps between validations.
        agreed: Maps the signal received by this process to the signal that all processes act on.

    Returns:
        Final state and durations.

    Raises:
        InputError: If loss, gradient or validation loss of a step are not finite; the message names the step's files.
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
                with clock("waiting for batches"):  # the step runs meanwhile
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
    """Start the transfer of a step's metrics to the host.

    Args:
        info: Metrics on the device.
        number: Number of the step, from 1.
        files_of: Names of the files in the batch of a step.

    Returns:
        Function that waits for the metrics and returns them; it raises InputError if they are not finite.
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
    """Return the state after its metrics have been found finite."""
    read()
    return state


def _require_finite(metrics: Mapping[str, float], number: int, files_of: Callable[[int], list[str]]) -> None:
    """Raise InputError, which names the files of the step, if a metric is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            files = files_of(number)
            more = f" and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else ""
            where = "" if name.startswith("val/") else f", on patches of {', '.join(files[:SHOWN_FILES])}{more}"
            raise InputError(
                f"{name} is {value} at step {number}{where}; the last checkpoint is kept. Lower "
                "optimizer.learning_rate, or look at these images' value range"
            )
