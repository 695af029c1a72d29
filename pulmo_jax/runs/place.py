"""Output folder and console of a run."""

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
    """Output folder and console of a run.

    Attributes:
        run_dir: Run directory, which all processes of a training read.
        folder: Output folder of this process: the run directory in the first process, a temporary folder in others.
        console: For progress and results.
        formats: Image formats of the user, in addition to the built-in ones.
    """

    run_dir: Path
    folder: Path
    console: Console
    formats: Sequence[Format] = ()

    def note(self, text: str) -> None:
        """Print a line of plain text."""
        self.console.print(text, highlight=False, markup=False)


@contextmanager
def workplace(run_dir: Path, formats: Sequence[Format] = ()) -> Iterator[Place]:
    """Open and lock the run directory.

    All processes of a training except the first get a temporary folder and a silent console.

    Args:
        run_dir: Run directory.
        formats: Image formats of the user.

    Yields:
        Output folder and console.

    Raises:
        InputError: If another run uses the directory.
    """
    if devices.is_first():
        with claim(run_dir):
            yield Place(run_dir, run_dir, make_console(), formats)
    else:
        with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nowhere:
            yield Place(run_dir, Path(own), Console(file=nowhere), formats)


def build_formats(config: Any) -> tuple[Format, ...]:
    """Build the image formats that the config lists in `sources`.

    Args:
        config: Typed config, with `sources` and `plugins`.

    Returns:
        Image formats.

    Raises:
        InputError: If a node is invalid.
    """
    return check_formats(build(node, f"sources.{name}", config.plugins) for name, node in config.sources.items())


def formats_for(image: Any, config: Any) -> tuple[Format, ...]:
    """Image formats needed to read an image: those of the config for a path, none for an array.

    Args:
        image: Array or path.
        config: Typed config, with `sources` and `plugins`.

    Returns:
        Image formats.

    Raises:
        InputError: If a node is invalid.
    """
    return build_formats(config) if isinstance(image, Path | str) else ()
