"""Output folder and console of a run."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pulmo_jax.config.nodes import build
from pulmo_jax.data.sources.formats import Format, check_formats
from pulmo_jax.host.console import Console, make_console
from pulmo_jax.host.marks import MARK
from pulmo_jax.host.outputs import output_folder, output_of
from pulmo_jax.runs.older import is_unrecorded, record_files
from pulmo_jax.runs.paths import input_paths
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

    def clear(self) -> None:
        """Remove the results of an earlier call, the last written ones first, as report.html marks finished results."""
        if (output := output_of(self.folder / MARK)) is not None:
            output.clear()

    def note(self, text: str) -> None:
        """Print a line of plain text."""
        self.console.print(text)


@contextmanager
def workplace(folder: Path, kind: str, config: Any, run_dir: Path | None = None) -> Iterator[Place]:
    """Open and lock the output folder of a verb.

    All processes of a training except the first get a temporary folder and a silent console.

    Args:
        folder: Output folder.
        kind: What it holds: the name of the verb.
        config: Typed config of the verb.
        run_dir: Run that the verb reads; None: the output folder is the run directory.

    Yields:
        Output folder and console.

    Raises:
        InputError: If the folder holds anything else, is in use, or an input lies in it.
        OutputError: If the folder cannot be written.
    """
    formats = build_formats(config)
    if devices.is_first():
        if kind == "train" and config.resume and is_unrecorded(folder):
            record_files(folder, kind)
        with output_folder(folder, kind, input_paths(config)):
            yield Place(run_dir or folder, folder, make_console(), formats)
    else:
        with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nowhere:
            yield Place(run_dir or folder, Path(own), Console(file=nowhere), formats)


def build_formats(config: Any) -> tuple[Format, ...]:
    """Build the image formats that the config lists in `sources`.

    Args:
        config: Typed config, with `sources` and `plugins`.

    Returns:
        Image formats.

    Raises:
        InputError: If a node is invalid.
    """
    nodes = getattr(config, "sources", {})  # `detect` reads arrays, not images
    return check_formats(build(node, f"sources.{name}", config.plugins) for name, node in nodes.items())


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
