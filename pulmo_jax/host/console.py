"""Console output: messages and progress bars. Text is shown as it is: no markup, no control characters."""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import rich.console
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.protocol import is_renderable
from rich.status import Status
from rich.text import Text

FILE_COLUMNS = 120
SOME_FAILED = 3  # exit status if some files or jobs failed and the others succeeded


def printable(text: Path | str, keep: str = "\n") -> str:
    """Escape characters that are not printable, and bytes of a name that are not UTF-8, as Python's repr does.

    Args:
        text: Text or path.
        keep: Characters that are not escaped; "" gives a single line.

    Returns:
        Text without control characters, invisible characters and changes of the writing direction.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def complain(text: str) -> None:
    """Print a message on standard error; its lines are kept, other control characters are escaped.

    Args:
        text: The message.
    """
    print(printable(text), file=sys.stderr)


class Console(rich.console.Console):
    """A console that shows text as it is: never as markup, emoji codes or control characters.

    Use `rich.text.Text` for styles.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, such as a message or the cell of a table, to literal text."""
        options |= {"markup": False, "emoji": False, "highlight": False}
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; those that rich cannot render, such as paths, as their text."""
        super().print(*(item if is_renderable(item) else str(item) for item in objects), **options)

    def status(self, status: rich.console.RenderableType, **options: Any) -> Status:
        """Show a spinner with a message."""
        return super().status(Text(printable(status)) if isinstance(status, str) else status, **options)

    def on_broken_pipe(self) -> None:
        """Continue without output if the reader has closed the pipe, instead of ending the program."""
        self.quiet = True


class Words(TextColumn):
    """A column of a progress bar that shows its text as it is."""

    def render(self, task: Task) -> Text:
        """Format the text for a task."""
        return Text(printable(self.text_format.format(task=task), keep=""), style=self.style, justify=self.justify)


def make_console(stderr: bool = False) -> Console:
    """Make a console on standard output or error; a file gets lines of FILE_COLUMNS characters for tables.

    Args:
        stderr: Whether to write on standard error.

    Returns:
        The console.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()  # rich would treat a notebook as a terminal
    width = None if terminal else FILE_COLUMNS
    return Console(soft_wrap=True, force_terminal=terminal, width=width, stderr=stderr)


def tracker(console: rich.console.Console, label: str) -> Callable[[Iterable, int], Iterable]:
    """Make a progress bar, or a line of text if the output is not a terminal.

    Args:
        console: Where to show it.
        label: Description of the items.

    Returns:
        Wraps an iterable and its length, and yields its items.
    """

    def track(items: Iterable, total: int) -> Iterable:
        if not console.is_terminal:
            console.print(f"{label}: {total}")
            return items
        return bar(items, total)

    def bar(items: Iterable, total: int) -> Iterator:
        columns = Words("{task.description}"), BarColumn(), TaskProgressColumn()
        with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as progress:
            yield from progress.track(items, total, description=label)

    return track
