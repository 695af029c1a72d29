"""Callbacks of the training loop: checkpoints, logs, progress, early stopping.

A callback is any object with the methods of `Callback`. Every training has `JsonLines` and `Checkpoint`; the config
lists further callbacks as `_target_` nodes, so user-defined callbacks need no change here.
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from tensorboardX import SummaryWriter

from pulmo_jax.host.console import Console, Words
from pulmo_jax.host.files import write_text
from pulmo_jax.host.places import naming_place
from pulmo_jax.host.reading import parse_json, read_bytes
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.training.state import TrainState
from pulmo_jax.types import InputError

METRICS_BYTES = 2**30


@dataclass(frozen=True)
class Start:
    """State of a run before its first step.

    Attributes:
        run_dir: Folder for the outputs of callbacks.
        step: Number of completed steps; above 0 for a resumed run.
        steps: Total number of steps.
        batch_size: Examples per batch.
        console: For progress.
        checkpoints: Checkpoints of the run.
        identity: Description of config and data, stored with each checkpoint; must be equal on resuming.
        draw: Draws a figure of a state on validation data.
        val_losses: Validation losses so far.
        files_of: Names of the files in the batch of a step.
        unit: Name of the examples, such as patches.
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
    """Event after a training step, which may still be running unless the step is logged.

    Attributes:
        step: Number of completed steps.
        metrics: {"train/loss": ..., ...} on a logged step, with "val/loss" after a validation; otherwise empty.
        checked_state: Function called by `state`.
        last: Whether this is the last step.
        stopped: Reason of a callback for stopping here; None for a signal or the regular last step.
    """

    step: int
    metrics: dict[str, float]
    checked_state: Callable[[], TrainState]
    last: bool
    stopped: str | None = None

    @property
    def state(self) -> TrainState:
        """State after the step; reading it waits for the step.

        It is valid during the call only, because the next step reuses its memory.

        Raises:
            InputError: If loss or gradient of the step are not finite.
        """
        return self.checked_state()


@runtime_checkable
class Callback(Protocol):
    """Interface of callbacks, called in the order of the config; `on_end` in reverse order, also after errors.

    `on_start` and `on_event` may return a reason to stop; the next step is then the last one. In training with several
    processes, each process has its own callbacks and folder; that of the first process is the run directory.
    """

    def on_start(self, start: Start) -> str | None:
        """Prepare for the first step.

        Args:
            start: State of the run.

        Returns:
            Reason to stop, or None.
        """
        ...

    def on_event(self, event: Event) -> str | None:
        """Handle a completed step.

        Args:
            event: The step; its metrics are empty unless the step is logged.

        Returns:
            Reason to stop, or None.
        """
        ...

    def on_end(self) -> None:
        """Finish: wait for outputs and close files."""
        ...


class Checkpoint:
    """Save the state every `every` steps, at the lowest validation loss so far, and at the end."""

    def __init__(self, every: Annotated[int, Field(ge=1, description="steps between checkpoints")] = 200):
        self.every = every

    def on_start(self, start: Start) -> None:
        """Take over the validation losses of a resumed run."""
        self._start, self._losses = start, list(start.val_losses)

    def on_event(self, event: Event) -> None:
        """Save the state if the step requires it."""
        loss = event.metrics.get("val/loss")
        best = loss is not None and loss < min(self._losses, default=math.inf)
        self._losses += [] if loss is None else [loss]
        if event.last or best or event.step % self.every == 0:
            self._start.checkpoints.save(event.state, loss, self._start.identity, self._losses, event.stopped)

    def on_end(self) -> None:
        """Wait until the last checkpoint has been written."""
        self._start.checkpoints.wait()


class JsonLines:
    """Write metrics.jsonl, one object per logged step; resuming removes steps after the checkpoint."""

    def on_start(self, start: Start) -> None:
        """Open the file; remove the rows after the checkpoint of a resumed run."""
        path = start.run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start.step] if start.step else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path, self._file = path, path.open("a", encoding="utf-8", buffering=1)

    def on_event(self, event: Event) -> None:
        """Write the metrics of a logged step."""
        if event.metrics:
            with naming_place(self._path):
                self._file.write(json.dumps({"step": event.step, **event.metrics}) + "\n")

    def on_end(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Write scalars for `tensorboard --logdir RUN/tensorboard`."""

    def on_start(self, start: Start) -> None:
        """Open the event file."""
        # purge_step hides steps that an interrupted run logged after its checkpoint
        self._writer = SummaryWriter(str(start.run_dir / "tensorboard"), purge_step=start.step + 1)

    def on_event(self, event: Event) -> None:
        """Write the metrics of a logged step."""
        for name, value in event.metrics.items():
            self._writer.add_scalar(name, value, event.step)

    def on_end(self) -> None:
        """Close the event file."""
        self._writer.close()


class ProgressBar:
    """Show completed steps, examples per second and remaining time; plain lines without a terminal."""

    def __init__(
        self,
        line_every_s: Annotated[
            float, Field(gt=0, description="seconds between progress lines without a terminal")
        ] = 10.0,
    ):
        self.line_every_s = line_every_s

    def on_start(self, start: Start) -> None:
        """Show the bar."""
        self._start, self._began, self._last_line, self._losses = (
            start,
            time.monotonic(),
            time.monotonic(),
            {},
        )
        self._bar = Progress(
            Words("training"),
            BarColumn(),
            MofNCompleteColumn(),
            Words("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=start.console,
            disable=not start.console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=start.steps, completed=start.step, note="compiling")
        self._bar.start()

    def on_event(self, event: Event) -> None:
        """Update the bar, or print a line if there is no terminal."""
        self._losses |= {k: v for k, v in event.metrics.items() if k.endswith("/loss")}
        elapsed, done = time.monotonic() - self._began, event.step - self._start.step
        rate = done / elapsed
        losses = "  ".join(f"{name} {value:.3g}" for name, value in self._losses.items())
        note = f"{rate * self._start.batch_size:.0f} {self._start.unit}/s  {losses}"
        self._bar.update(self._task, completed=event.step, note=note)
        if self._bar.disable and time.monotonic() - self._last_line > self.line_every_s:
            self._last_line = time.monotonic()
            left_s = (self._start.steps - event.step) / rate
            self._start.console.print(f"step {event.step}/{self._start.steps}  {note}  {left_s:.0f} s left")

    def on_end(self) -> None:
        """Remove the bar from the terminal."""
        self._bar.stop()


class EarlyStopping:
    """Stop if the validation loss has not decreased by the fraction `min_fraction` in `patience` validations."""

    def __init__(
        self,
        patience: Annotated[
            int, Field(ge=1, description="number of validations without improvement before training stops")
        ] = 10,
        min_fraction: Annotated[float, Field(ge=0, description="minimum relative improvement")] = 0.001,
    ):
        self.patience, self.min_fraction = patience, min_fraction

    def on_start(self, start: Start) -> str | None:
        """Restore the counter of a resumed run from its validation losses."""
        self._best, self._waited = math.inf, 0
        for loss in start.val_losses:
            self._judge(loss)
        return self._reason()

    def on_event(self, event: Event) -> str | None:
        """Update the counter after a validation; return a reason to stop once it reaches `patience`."""
        if "val/loss" not in event.metrics:
            return None
        self._judge(event.metrics["val/loss"])
        return self._reason()

    def _reason(self) -> str | None:
        """Reason to stop, or None."""
        if self._waited < self.patience:
            return None
        return f"validation loss has not improved in {self._waited} validations (best {self._best:.3g})"

    def _judge(self, loss: float) -> None:
        """Update the lowest validation loss and the number of validations without improvement."""
        needed = self.min_fraction * abs(self._best) if math.isfinite(self._best) else 0.0
        improved = loss < self._best - needed
        self._best, self._waited = (loss, 0) if improved else (self._best, self._waited + 1)

    def on_end(self) -> None:
        """Do nothing."""
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl.

    Args:
        path: The file.

    Returns:
        Rows; a truncated last line is ignored. Empty if there is no file.
    """
    rows = []
    for line in read_bytes(path, METRICS_BYTES, path.parent).splitlines() if path.exists() else []:
        try:
            row = parse_json(line, path, nan=True)
        except InputError:
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows
