"""Callbacks that draw."""

import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from pydantic import Field

from pulmo_jax.reporting import figures
from pulmo_jax.reporting.profile import operations_csv, operations_figure, read_operations
from pulmo_jax.training.callbacks import Event, Start

PROFILE_FIGURE = "profile"  # its name among the run's figures


def patch_grid(patches: Float[np.ndarray, "B P P C"], rebuilt: Float[np.ndarray, "B P P C"], title: str) -> Figure:
    """Patches above their reconstructions, normalised 0 to 1."""
    with figures.style():
        figure = Figure(figsize=(figures.TEXT_WIDTH_IN, 2.2), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(2, len(patches), squeeze=False)
        for row, name, images in zip(panels, ("input", "output"), (patches, rebuilt), strict=True):
            row[0].set_ylabel(name)
            for axes, image in zip(row, images, strict=True):
                shown = np.clip(image if image.shape[-1] == 3 else image.mean(axis=-1), 0, 1)
                axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
    return figure


class Reconstructions:
    """figures/training/step_N.png: validation patches and their reconstructions, as training goes on."""

    def __init__(self, every: Annotated[int, Field(ge=1, description="steps between figures")] = 500):
        self.every = every

    def on_start(self, start: Start) -> None:
        self._start = start

    def on_event(self, event: Event) -> None:
        if event.last or event.step % self.every == 0:
            patches = self._start.examples
            rebuilt = np.asarray(self._start.reconstruct(event.state, patches))
            figure = patch_grid(patches, rebuilt, f"validation patches, step {event.step}")
            figures.save(figure, self._start.run_dir / "figures" / "training", f"step_{event.step:06d}")

    def on_end(self) -> None:
        pass


class Profile:
    """profile/: a trace of some steps, for TensorBoard or ui.perfetto.dev; and what it says, in the report.

    The first steps, which also fill caches, are left out.
    """

    def __init__(
        self,
        after: Annotated[int, Field(ge=1, description="steps before the trace")] = 20,
        steps: Annotated[int, Field(ge=1, description="steps in the trace")] = 10,
    ):
        self.after, self.steps = after, steps

    def on_start(self, start: Start) -> None:
        self._run_dir, self._first, self._tracing = start.run_dir, start.step + self.after, False

    def on_event(self, event: Event) -> None:
        if self._tracing and (event.last or event.step == self._first + self.steps):
            jax.profiler.stop_trace()
            self._tracing = False
            self._report(event.step - self._first, 1000 * (time.perf_counter() - self._began))
        elif event.step == self._first and not event.last:
            jax.profiler.start_trace(self._folder)
            self._began, self._tracing = time.perf_counter(), True

    def _report(self, steps: int, wall_ms: float) -> None:
        operations = read_operations(self._folder)
        (self._folder / "operations.csv").write_text(operations_csv(operations, steps))
        if operations:
            figure = operations_figure(operations, steps, wall_ms / steps)
            figures.save(figure, self._run_dir / "figures", PROFILE_FIGURE)

    @property
    def _folder(self) -> Path:
        return self._run_dir / "profile"

    def on_end(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
