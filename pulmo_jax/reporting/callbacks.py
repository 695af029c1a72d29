"""Training callbacks that draw figures."""

import time
from pathlib import Path
from typing import Annotated

import jax
from pydantic import Field

from pulmo_jax.host.files import write_text
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.profile import operations_csv, operations_figure, read_operations
from pulmo_jax.training.callbacks import Event, Start

PROFILE_FIGURE = "profile"  # file name of the profile figure


class ProgressFigures:
    """Save figures of the model on validation data during training, as figures/training/step_N.png.

    The task draws them, such as patches with their reconstructions.

    Args:
        every: Number of steps between figures.
    """

    def __init__(self, every: Annotated[int, Field(ge=1, description="steps between figures")] = 500):
        self.every = every

    def on_start(self, start: Start) -> None:
        """Store the drawing function and the run directory.

        Args:
            start: Start of the training.
        """
        self._start = start

    def on_event(self, event: Event) -> None:
        """Save a figure every `every` steps and after the last step.

        Args:
            event: Step of the training.
        """
        if event.last or event.step % self.every == 0:
            figure = self._start.draw(event.state)
            figures.save(figure, self._start.run_dir / "figures" / "training", f"step_{event.step:06d}")

    def on_end(self) -> None:
        """Nothing to finish."""


class Profile:
    """Trace some training steps with `jax.profiler`.

    Writes the trace to profile/ (for TensorBoard or ui.perfetto.dev), a table of operations, and a figure for the
    report. The first steps, which include compilation, are not traced.

    Args:
        after: Number of steps before the trace.
        steps: Number of steps in the trace.
    """

    def __init__(
        self,
        after: Annotated[int, Field(ge=1, description="steps before the trace")] = 20,
        steps: Annotated[int, Field(ge=1, description="steps in the trace")] = 10,
    ):
        self.after, self.steps = after, steps

    def on_start(self, start: Start) -> None:
        """Determine the first step of the trace.

        Args:
            start: Start of the training.
        """
        self._run_dir, self._first, self._tracing = start.run_dir, start.step + self.after, False

    def on_event(self, event: Event) -> None:
        """Start the trace, or stop it and write table and figure.

        Args:
            event: Step of the training.
        """
        if self._tracing and (event.last or event.step == self._first + self.steps):
            jax.block_until_ready(event.state.step)  # the trace contains complete steps only
            jax.profiler.stop_trace()
            self._tracing = False
            self._report(event.step - self._first, 1000 * (time.perf_counter() - self._began))
        elif event.step == self._first and not event.last:
            jax.block_until_ready(event.state.step)
            jax.profiler.start_trace(self._folder)
            self._began, self._tracing = time.perf_counter(), True

    def _report(self, steps: int, wall_ms: float) -> None:
        operations = read_operations(self._folder)
        write_text(self._folder / "operations.csv", operations_csv(operations, steps))
        if operations:
            figure = operations_figure(operations, steps, wall_ms / steps)
            figures.save(figure, self._run_dir / "figures", PROFILE_FIGURE)

    @property
    def _folder(self) -> Path:
        return self._run_dir / "profile"

    def on_end(self) -> None:
        """Stop the trace if training ended early."""
        if self._tracing:
            jax.profiler.stop_trace()
