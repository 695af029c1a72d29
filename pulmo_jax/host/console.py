"""The console: where a run reports what it does, and its progress."""

import sys
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import track as rich_track

FILE_COLUMNS = 120
SOME_FAILED = 3  # exit status: some files or jobs failed, the others are done


def make_console() -> Console:
    """Where people are told what goes on; wide enough for the tables when it is a file."""
    terminal = sys.stdout.isatty()  # rich would take a notebook for one
    return Console(soft_wrap=True, force_terminal=terminal, width=None if terminal else FILE_COLUMNS)


def tracker(console: Console, label: str) -> Callable[[Iterable, int], Iterable]:
    """A progress bar over items; plain text where the output is not a terminal."""

    def track(items: Iterable, total: int) -> Iterable:
        if not console.is_terminal:
            console.print(f"{label}: {total}", highlight=False)
            return items
        return rich_track(items, label, total, console=console)

    return track
