"""Where a run works: its directory and its console."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pulmo_jax.config.nodes import build
from pulmo_jax.data.sources.formats import Format, check_formats
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
        formats: The user's own image formats, in addition to the built-in ones.
    """

    run_dir: Path
    folder: Path
    console: Console
    formats: Sequence[Format] = ()

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


@contextmanager
def workplace(run_dir: Path, formats: Sequence[Format] = ()) -> Iterator[Place]:
    """The run directory, locked against other runs; in the other processes of a training, a temporary folder."""
    if devices.is_first():
        with claim(run_dir):
            yield Place(run_dir, run_dir, make_console(), formats)
    else:
        with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nowhere:
            yield Place(run_dir, Path(own), Console(file=nowhere), formats)


def build_formats(config: Any) -> tuple[Format, ...]:
    """The image formats that a config's `sources` name. Raises InputError."""
    return check_formats(build(node, f"sources.{name}", config.plugins) for name, node in config.sources.items())


def formats_for(image: Any, config: Any) -> tuple[Format, ...]:
    """The image formats of a run's config for an image that is a path; arrays need none. Raises InputError."""
    return build_formats(config) if isinstance(image, Path | str) else ()
