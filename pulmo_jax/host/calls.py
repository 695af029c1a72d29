"""The call that this process executes: its command, its start, and the commit of the code. Reports state them."""

import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIT_S = 5.0  # longest time for git, for example on a slow network disk
CODE = ("pulmo_jax", "configs")  # folders whose local changes are mentioned


@dataclass(frozen=True)
class Call:
    """A call of a verb.

    Attributes:
        command: What was typed: a command line, or a call from Python; "" if unknown.
        date: Time of the start.
        began: The same on the monotonic clock, s.
    """

    command: str = ""
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began


CALL: ContextVar[Call] = ContextVar("CALL", default=Call())  # noqa: B039  # immutable; the start of the process


@contextmanager
def called(command: str) -> Iterator[Call]:
    """Set the call of the `with` block.

    Args:
        command: What was typed.

    Yields:
        The call, which starts now.
    """
    token = CALL.set(Call(command))
    try:
        yield CALL.get()
    finally:
        CALL.reset(token)


def command_line(verb: str, arguments: Sequence[str]) -> str:
    """Command line that can be pasted into a shell. The home directory, which contains the user's name, becomes `~`.

    Args:
        verb: Name of the verb.
        arguments: Arguments as typed.

    Returns:
        The quoted command line.
    """
    return shlex.join(["python", "-m", f"pulmo_jax.{verb}", *map(without_home, arguments)])


def without_home(text: str) -> str:
    """Replace the home directory by `~`, which the keys of all verbs accept."""
    with suppress(RuntimeError):  # no home
        home = str(Path.home())
        if len(home) > 1:
            return re.sub(rf"{re.escape(home)}(?=[/'\",\]]|$)", "~", text)
    return text


def commit_of(root: Path = ROOT) -> str | None:
    """Commit of a clone.

    Args:
        root: Folder that contains the package.

    Returns:
        Abbreviated hash, with a note of local changes of code or configs; None for an installed package or without git.
    """
    if not (root / ".git").exists():
        return None
    try:
        head = git(root, "rev-parse", "--short=12", "HEAD").strip()
        changed = git(root, "status", "--porcelain", "--", *CODE)
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head} with local changes" if changed else head


def git(root: Path, *arguments: str) -> str:
    """Output of git in a clone, which is only read."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=GIT_S, text=True, errors="replace").stdout
