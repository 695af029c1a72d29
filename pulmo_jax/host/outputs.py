"""Output folders. Nothing of the user's is replaced or removed in them: only files that our own record lists.

An output folder is new, empty, or has the file MARK (see `marks`), which an earlier call of the same kind wrote. A path
is recorded before its file is created, so files that a killed process leaves are known, too. `pulmo_jax.host.files`
records every file.
"""

import errno
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath

from pulmo_jax.host.lock import NAME as LOCK
from pulmo_jax.host.lock import claim, holder_is_dead, in_use
from pulmo_jax.host.marks import (
    MARK,
    TEMPORARY,
    UNFINISHED,
    absolute,
    check_kind,
    is_ours,
    is_unfinished,
    kind_of,
    read_mark,
    write_mark,
)
from pulmo_jax.host.places import naming_place
from pulmo_jax.types import InputError, OutputError

SHOWN = 3  # foreign files in a message


class Output:
    """An output folder that this process writes to.

    Args:
        folder: The folder.
        kind: What the folder holds, such as "predict".

    Attributes:
        listed: Paths in the record, relative to the folder.
        current: Those that this process wrote.
    """

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = absolute(folder), kind
        self.listed = set(read_mark(self.folder, kind))
        self.current: set[str] = set()
        self._lock, self._real = threading.Lock(), {self.folder}

    def add(self, *paths: Path) -> None:
        """Record files before they are created.

        Args:
            *paths: Files in the folder.

        Raises:
            InputError: A file exists and is not in the record, or lies behind a link.
        """
        with self._lock:
            names = [self._name(path) for path in paths]
            new = [name for name in names if name not in self.listed]
            existing = [name for name in new if os.path.lexists(self.folder / name)]
            if existing:
                self.reread()
                if (foreign := next((name for name in existing if name not in self.listed), None)) is not None:
                    raise InputError(f"{self.folder / foreign}: exists and was not written by pulmo_jax; move it away")
            if new:
                self._append(new)
            self.listed.update(new)
            self.current.update(names)

    def reread(self) -> None:
        """Take over what other processes of a sweep have recorded meanwhile (see `joined`)."""
        with suppress(InputError):
            self.listed.update(read_mark(self.folder, self.kind))

    def _name(self, path: Path) -> str:
        path = absolute(path)
        for parent in reversed(path.parents):
            if parent.is_relative_to(self.folder) and parent not in self._real:
                if parent.is_symlink():
                    raise InputError(f"{parent}: is a link; results are not written through links, move it away")
                self._real.add(parent)
        return path.relative_to(self.folder).as_posix()

    def _append(self, names: Iterable[str]) -> None:
        lines = "".join(f"\n{json.dumps(name)}" for name in names) + "\n"  # also ends a line that a kill truncated
        with naming_place(self.folder / MARK):
            if not (self.folder / MARK).exists():
                write_mark(self.folder, self.kind, [])
            with (self.folder / MARK).open("ab", buffering=0) as file:
                if file.write(lines.encode()) < len(lines):  # json.dumps gives ASCII
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def below(self, folder: Path) -> list[Path]:
        """The recorded files below a folder, in the order of their names.

        Args:
            folder: The output folder, or a folder in it.

        Returns:
            Files that exist.
        """
        paths = (self.folder / name for name in sorted(self.listed))
        return [path for path in paths if path.is_relative_to(absolute(folder)) and is_ours(path, self.folder)]

    def clear(self) -> None:
        """Remove the results of earlier calls; the report, which marks finished ones, goes first."""
        for path in sorted(self.below(self.folder), key=lambda path: path.suffix != ".html"):
            if path.relative_to(self.folder).as_posix() not in self.current:
                remove(path)

    def close(self) -> None:
        """Remove unfinished files, and sort the record, so that it does not depend on interruptions."""
        self.reread()
        self.remove_unfinished()
        names = [path.relative_to(self.folder).as_posix() for path in self.below(self.folder)]
        if not names:
            self.remove_empty_folders()
            with suppress(OSError):  # on a read-only disk
                (self.folder / MARK).unlink(missing_ok=True)
            return
        with suppress(InputError, OutputError):  # on a full disk, the unsorted record stays
            write_mark(self.folder, self.kind, names)

    def remove_empty_folders(self) -> None:
        """Remove the folders of recorded files that do not exist, if they are empty."""
        parents = {parent for name in self.listed for parent in PurePosixPath(name).parents if parent.parts}
        for parent in sorted(parents, key=lambda parent: -len(parent.parts)):
            with suppress(OSError):
                (self.folder / parent).rmdir()

    def remove_unfinished(self) -> None:
        """Remove files under temporary names, which a killed process left."""
        if is_unfinished(self.folder / UNFINISHED):
            remove(self.folder / UNFINISHED)
        for path in self.below(self.folder):
            if path.name.endswith(TEMPORARY):
                remove(path)


_open: dict[Path, Output] = {}


@contextmanager
def output_folder(folder: Path, kind: str, inputs: Iterable[tuple[str, Path]] = ()) -> Iterator[Output]:
    """Use a folder for results, exclusively, during a `with` block. It may be nested for the same folder and kind.

    Args:
        folder: The folder, which is created if necessary, and removed again if nothing was written.
        kind: What the folder holds; only results of the same kind may be in it.
        inputs: Key and path of all inputs.

    Yields:
        The output folder.

    Raises:
        InputError: The folder holds other files, is in use, or an input lies in it. Nothing has been changed then.
        OutputError: The folder cannot be written.
    """
    folder = absolute(folder)
    if folder in _open:
        check_kind(folder, _open[folder].kind, kind)
        yield _open[folder]
        return
    check_output(folder, kind, inputs)
    with ExitStack() as stack:
        stack.enter_context(removing_empty(folder))
        with naming_place(folder):
            stack.enter_context(claim(folder))
            check_output(folder, kind)  # again, as another process may have used it until now
            output = Output(folder, kind)
            stack.callback(output.close)
            _open[folder] = output
            stack.callback(_open.pop, folder)
            output.remove_unfinished()
            clean_siblings(folder)
        yield output


def check_output(folder: Path, kind: str, inputs: Iterable[tuple[str, Path]] = ()) -> None:
    """Check that results may be written to a folder, without changing anything.

    Args:
        folder: The folder.
        kind: What it is to hold.
        inputs: Key and path of all inputs.

    Raises:
        InputError: The folder holds other files, or an input lies in it.
    """
    folder = absolute(folder)
    real = Path(os.path.realpath(folder))
    for key, path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(real):
            raise InputError(
                f"{key}={path}: lies in the output folder {folder}, where results could replace it; give another "
                "output folder"
            )
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; give another output folder")
    if os.path.lexists(folder / MARK):
        read_mark(folder, kind)
        return
    with naming_place(folder):
        own = {LOCK, *([UNFINISHED] if is_unfinished(folder / UNFINISHED) else [])}  # of a process killed at its start
        others = sorted(set(os.listdir(folder)) - own)
    if others:
        shown = ", ".join(others[:SHOWN]) + (f" and {len(others) - SHOWN} more" if len(others) > SHOWN else "")
        raise InputError(
            f"{folder}: holds files that are not results of pulmo_jax ({shown}), and nothing has been changed; give a "
            "new or empty folder"
        )


def adding(*paths: Path) -> None:
    """Record files before they are created, if they lie in an output folder of this process.

    Args:
        *paths: Files in one folder.

    Raises:
        InputError: A file exists and is not ours.
    """
    output = output_of(paths[0])
    if output is not None:
        output.add(*paths)


def output_of(path: Path) -> Output | None:
    """The innermost output folder of this process that contains a path, or one in it, such as that of a job.

    Args:
        path: The path.

    Returns:
        The output folder; None if there is none.
    """
    parents = absolute(path).parents
    root = next((parent for parent in parents if parent in _open), None)
    if root is None:
        return None
    inner = next(parent for parent in parents if parent == root or (parent / MARK).is_file())
    return _open[root] if inner == root else Output(inner, kind_of(inner))


def recorded_below(folder: Path) -> list[Path]:
    """The recorded files below a folder that lies in an output folder of this process; empty elsewhere."""
    output = output_of(folder / MARK)
    return [] if output is None else output.below(folder)


@contextmanager
def joined(folder: Path) -> Iterator[None]:
    """Record files in an output folder that another process has opened, such as the folder of a sweep.

    Args:
        folder: The output folder.
    """
    folder = absolute(folder)
    if folder in _open or not (folder / MARK).is_file():
        yield
        return
    _open[folder] = Output(folder, kind_of(folder))
    try:
        yield
    finally:
        del _open[folder]  # the other process sorts the record


def remove(path: Path) -> None:
    """Remove a recorded file. A recorded folder stays, as does a file on a disk that has become read-only."""
    with suppress(OSError):
        path.unlink()


@contextmanager
def removing_empty(folder: Path) -> Iterator[None]:
    """Remove a folder and its parents after the `with` block, if they did not exist before and hold nothing.

    Args:
        folder: The folder.
    """
    created = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()


def clean_siblings(folder: Path) -> None:
    """Remove unfinished files that killed processes left in the folders beside this one, as runs named by their time.

    Such a folder has the lock of a process of this machine that does not exist any more.
    """
    with suppress(OSError):
        for sibling in folder.parent.iterdir():
            killed = sibling != folder and (sibling / LOCK).is_file() and (sibling / MARK).is_file()
            if killed and holder_is_dead(sibling) and in_use(sibling) is None:
                with suppress(InputError, OSError), claim(sibling):
                    Output(sibling, kind_of(sibling)).close()
