"""What happens beside the steps: logs, progress, figures, early stopping.

A callback is any object with the methods of `Callback`; a run's are listed in its config by `_target_`, so a user's own
needs no change here.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.state import TrainState


@dataclass(frozen=True)
class Start:
    """A run about to step.

    step: where it begins, above 0 when resumed; val_losses: those up to there. identity: stored with each checkpoint,
    must agree on resuming. draw: what a state makes of some validation data.
    files_of: the files that the batch of a step was cut from. unit: what batch_size counts.
    """

    run_dir: Path
    step: int
    steps: int
    batch_size: int
    console: Console
    checkpoints: Checkpoints
    identity: Mapping[str, Any]
    draw: Callable[[TrainState], Figure]
    val_losses: Sequence[float] = ()
    files_of: Callable[[int], list[str]] = lambda step: []
    unit: str = "patches"


@dataclass(frozen=True)
class Event:
    """After a step, which may still be computing where it is not logged.

    metrics: {"train/loss": ..., ...} on a logged step, with "val/loss" when validated; else empty.
    checked_state: what `state` calls. last: no step follows; stopped: because a callback had this reason, None where it
    is a signal or the last step of all.
    """

    step: int
    metrics: dict[str, float]
    checked_state: Callable[[], TrainState]
    last: bool
    stopped: str | None = None

    @property
    def state(self) -> TrainState:
        """The state after the step. Valid during the call only, because the next step reuses its memory.

        Reading it waits for the step.

        Raises:
            InputError: Loss or gradient of the step are not finite.
        """
        return self.checked_state()


@runtime_checkable
class Callback(Protocol):
    """Called on the host, in the order of the config; `on_end` in reverse order, after an error too.

    `on_start` and `on_event` may return why the run should stop; the next step is then the last. Of several processes
    each has its callbacks, with a folder of its own; the first one's is the run's.
    """

    def on_start(self, start: Start) -> str | None: ...

    def on_event(self, event: Event) -> str | None: ...

    def on_end(self) -> None: ...


class Checkpoint:
    """Saves the state every `every` steps, when a validation loss is the lowest so far, and at the end."""

    def __init__(self, every: Annotated[int, Field(ge=1, description="steps between checkpoints")] = 200):
        self.every = every

    def on_start(self, start: Start) -> None:
        self._start, self._losses = start, list(start.val_losses)

    def on_event(self, event: Event) -> None:
        loss = event.metrics.get("val/loss")
        best = loss is not None and loss < min(self._losses, default=math.inf)
        self._losses += [] if loss is None else [loss]
        if event.last or best or event.step % self.every == 0:
            self._start.checkpoints.save(event.state, loss, self._start.identity, self._losses, event.stopped)

    def on_end(self) -> None:
        self._start.checkpoints.wait()


class JsonLines:
    """metrics.jsonl: one object for each logged step. Resuming drops what a lost run wrote beyond its checkpoint."""

    def on_start(self, start: Start) -> None:
        path = start.run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start.step] if start.step else []
        whole = path.with_name(f".{path.name}")  # a kill leaves the old file or the new one
        whole.write_text("".join(json.dumps(row) + "\n" for row in kept))
        whole.replace(path)
        self._file = path.open("a", buffering=1)

    def on_event(self, event: Event) -> None:
        if event.metrics:
            self._file.write(json.dumps({"step": event.step, **event.metrics}) + "\n")

    def on_end(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for `tensorboard --logdir RUN/tensorboard`."""

    def on_start(self, start: Start) -> None:
        # hides what a lost run wrote beyond its checkpoint: all from purge_step on
        self._writer = SummaryWriter(str(start.run_dir / "tensorboard"), purge_step=start.step + 1)

    def on_event(self, event: Event) -> None:
        for name, value in event.metrics.items():
            self._writer.add_scalar(name, value, event.step)

    def on_end(self) -> None:
        self._writer.close()


class ProgressBar:
    """Steps done, patches or images per second, time left; plain lines where the output is not a terminal."""

    def __init__(
        self,
        line_every_s: Annotated[
            float, Field(gt=0, description="seconds between progress lines without a terminal")
        ] = 10.0,
    ):
        self.line_every_s = line_every_s

    def on_start(self, start: Start) -> None:
        self._start, self._began, self._last_line, self._losses = (
            start,
            time.monotonic(),
            time.monotonic(),
            {},
        )
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=start.console,
            disable=not start.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=start.steps, completed=start.step, note="compiling")
        self._bar.start()

    def on_event(self, event: Event) -> None:
        self._losses |= {k: v for k, v in event.metrics.items() if k.endswith("/loss")}
        elapsed, done = time.monotonic() - self._began, event.step - self._start.step
        rate = done / elapsed
        losses = "  ".join(f"{name} {value:.3g}" for name, value in self._losses.items())
        note = f"{rate * self._start.batch_size:.0f} {self._start.unit}/s  {losses}"
        self._bar.update(self._task, completed=event.step, note=note)
        if self._bar.disable and time.monotonic() - self._last_line > self.line_every_s:
            self._last_line = time.monotonic()
            left_s = (self._start.steps - event.step) / rate
            self._start.console.print(
                f"step {event.step}/{self._start.steps}  {note}  {left_s:.0f} s left", highlight=False
            )

    def on_end(self) -> None:
        self._bar.stop()


class EarlyStopping:
    """Stops when the validation loss has not fallen by `min_fraction` in `patience` validations."""

    def __init__(
        self,
        patience: Annotated[
            int, Field(ge=1, description="number of validations without improvement before training stops")
        ] = 10,
        min_fraction: Annotated[float, Field(ge=0, description="minimum relative improvement")] = 0.001,
    ):
        self.patience, self.min_fraction = patience, min_fraction

    def on_start(self, start: Start) -> str | None:
        """A resumed run judges by what it found before."""
        self._best, self._waited = math.inf, 0
        for loss in start.val_losses:
            self._judge(loss)
        return self._reason()

    def on_event(self, event: Event) -> str | None:
        if "val/loss" not in event.metrics:
            return None
        self._judge(event.metrics["val/loss"])
        return self._reason()

    def _reason(self) -> str | None:
        if self._waited < self.patience:
            return None
        return f"validation loss has not improved in {self._waited} validations (best {self._best:.3g})"

    def _judge(self, loss: float) -> None:
        needed = self.min_fraction * abs(self._best) if math.isfinite(self._best) else 0.0
        improved = loss < self._best - needed
        self._best, self._waited = (loss, 0) if improved else (self._best, self._waited + 1)

    def on_end(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
