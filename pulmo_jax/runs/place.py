"""Where a run works: its directory and its console."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pulmo_jax.host.console import make_console
from pulmo_jax.host.lock import claim
from pulmo_jax.training import devices


@dataclass(frozen=True)
class Place:
    """Where a run works.

    Attributes:
        run_dir: The run directory, which all processes of a training read.
        folder: Where this process writes: the run directory, or a temporary folder in all processes but the first.
        console: Where progress and results are printed.
    """

    run_dir: Path
    folder: Path
    console: Console

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


@contextmanager
def workplace(run_dir: Path) -> Iterator[Place]:
    """The run directory, locked against other runs; in the other processes of a training, a temporary folder."""
    if devices.is_first():
        with claim(run_dir):
            yield Place(run_dir, run_dir, make_console())
    else:
        with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nowhere:
            yield Place(run_dir, Path(own), Console(file=nowhere))
