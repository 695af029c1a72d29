"""Exclusive use of a folder by one process, with a lock file that the kernel releases when the process ends."""

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pulmo_jax.host.console import complain
from pulmo_jax.types import InputError

NAME = "run.lock"  # of a run directory
LOCK_START = b'{"host": "'
MAX_BYTES = 1000  # of a lock file
PATIENCE_S = 0.5  # waiting time for the lock, longer than `in_use` holds it
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # on some network file systems


@contextmanager
def claim(folder: Path, name: str = NAME) -> Iterator[bool]:
    """Hold the lock of a folder during a `with` block.

    The kernel releases the lock when the process ends, even after SIGKILL, so a stale lock file does no harm. Processes
    started by exec do not inherit the lock.

    Args:
        folder: The folder, which is created if necessary.
        name: Name of the lock file.

    Yields:
        Whether a killed process has left its lock.

    Raises:
        InputError: Another process holds the lock, or the file is not a lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, before = _acquire(folder / name)
    try:
        yield bool(before)
    finally:
        if before == b"":
            os.ftruncate(descriptor, 0)
        else:
            with suppress(OSError):  # on a disk that has become read-only; the kernel releases the lock
                (folder / name).unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for forked children, which share the descriptor
        os.close(descriptor)


def in_use(folder: Path, name: str = NAME) -> str | None:
    """Check whether a process holds the lock of a folder, without writing anything.

    Args:
        folder: The folder.
        name: Name of the lock file.

    Returns:
        An error message that names the process, or None if the folder is free.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY)
    except OSError:  # missing or not readable; `claim` reports the latter
        return None
    try:
        return None if _lock(descriptor, fcntl.LOCK_SH) else _holder_message(folder, descriptor)
    finally:
        os.close(descriptor)


def holder_is_dead(folder: Path, name: str = NAME) -> bool:
    """Whether the process that made the lock file of a folder ran on this machine and has ended, as by SIGKILL.

    Args:
        folder: The folder.
        name: Name of the lock file.

    Returns:
        False if it runs, or if that cannot be known.
    """
    try:
        holder = json.loads((folder / name).read_bytes()[:MAX_BYTES])
        if holder["host"] != socket.gethostname():
            return False
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def _acquire(path: Path) -> tuple[int, bytes | None]:
    """Descriptor of the locked file, and its content before; an empty file may be the user's, and is left so."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        before = _require_lock_file(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(descriptor, fcntl.LOCK_EX, warn=True):
            if _is_at(descriptor, path):
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode(), 0)
                return descriptor, before
        elif time.monotonic() > deadline:
            message = _holder_message(path.parent, descriptor)
            os.close(descriptor)
            raise InputError(message)
        os.close(descriptor)
        time.sleep(0.02)


def _require_lock_file(path: Path) -> bytes | None:
    """Content of a lock file, if any. Raises InputError for a file of the user's, which would be overwritten."""
    try:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size < MAX_BYTES else b"-"
    except FileNotFoundError:
        return None
    if content and not _names_holder(content):
        raise InputError(f"{path}: exists and is not a lock of pulmo_jax; move it away")
    return content


def _names_holder(content: bytes) -> bool:
    """Whether the content of a file is that of a lock file, possibly cut off by a kill."""
    try:
        holder = json.loads(content)
    except ValueError:
        return LOCK_START.startswith(content[: len(LOCK_START)]) and not content.endswith(b"}")
    return isinstance(holder, dict) and list(holder) == ["host", "pid", "started"]


def _lock(descriptor: int, kind: int, *, warn: bool = False) -> bool:
    """Whether the lock was acquired. On a file system without locks it always is, optionally with a warning."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if warn:
            complain("note: this file system has no locks; run only one process per folder")
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still refers to the locked file, which its previous holder may have removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder_message(folder: Path, descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, MAX_BYTES, 0))
        process = f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        process = "another process"
    return f"{folder} is in use by {process}; wait for it or stop it, or give another folder"
