"""Console output: messages and progress bars."""

import sys
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.progress import track as rich_track

FILE_COLUMNS = 120
SOME_FAILED = 3  # exit status if some files or jobs failed and the others succeeded


def make_console() -> Console:
    """Make a console on standard output; a file gets lines of FILE_COLUMNS characters for tables."""
    terminal = sys.stdout.isatty()  # rich would treat a notebook as a terminal
    return Console(soft_wrap=True, force_terminal=terminal, width=None if terminal else FILE_COLUMNS)


def tracker(console: Console, label: str) -> Callable[[Iterable, int], Iterable]:
    """Make a progress bar, or a line of text if the output is not a terminal.

    Args:
        console: Where to show it.
        label: Description of the items.

    Returns:
        Wraps an iterable and its length, and yields its items.
    """

    def track(items: Iterable, total: int) -> Iterable:
        if not console.is_terminal:
            console.print(f"{label}: {total}", highlight=False)
            return items
        return rich_track(items, label, total, console=console)

    return track
