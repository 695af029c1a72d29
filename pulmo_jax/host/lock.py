"""Exclusive use of a folder by one process, with a lock file that the kernel releases when the process ends."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pulmo_jax.types import InputError

NAME = "run.lock"  # of a run directory
PATIENCE_S = 0.5  # waiting time for the lock, longer than `in_use` holds it
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # on some network file systems


@contextmanager
def claim(folder: Path, name: str = NAME) -> Iterator[None]:
    """Hold the lock of a folder during a `with` block.

    The kernel releases the lock when the process ends, even after SIGKILL, so a stale lock file does no harm. Processes
    started by exec do not inherit the lock.

    Args:
        folder: The folder, which is created if necessary.
        name: Name of the lock file.

    Raises:
        InputError: Another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(folder / name)
    try:
        yield
    finally:
        (folder / name).unlink(missing_ok=True)
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


def _acquire(path: Path) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(descriptor, fcntl.LOCK_EX, warn=True):
            if _is_at(descriptor, path):
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": now}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(holder).encode(), 0)
                return descriptor
        elif time.monotonic() > deadline:
            message = _holder_message(path.parent, descriptor)
            os.close(descriptor)
            raise InputError(message)
        os.close(descriptor)
        time.sleep(0.02)


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
            print("note: this file system has no locks; run only one process per folder", file=sys.stderr)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still refers to the locked file, which its previous holder may have removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder_message(folder: Path, descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        process = f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        process = "another process"
    return f"{folder} is in use by {process}; wait for it or stop it, or give another hydra.run.dir"
