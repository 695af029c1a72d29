"""One process at a time in a folder: a lock file that the kernel releases with the process that holds it."""

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
PATIENCE_S = 0.5  # longer than anybody's look at the lock (`in_use`) takes
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # some network file systems


@contextmanager
def claim(folder: Path, name: str = NAME) -> Iterator[None]:
    """Hold the folder for the length of a `with` block. Raises InputError if a live process holds it.

    The kernel drops the lock with the process, also after kill -9, so a stale file is no obstacle; it is removed on
    leaving. Processes that are started meanwhile by exec do not inherit it.
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
    """Who holds the folder, in a sentence, or None. Writes nothing."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY)
    except OSError:  # not there, or not to be read: then `claim` will say so
        return None
    try:
        return None if _lock(descriptor, fcntl.LOCK_SH) else _sentence(folder, descriptor)
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(descriptor, fcntl.LOCK_EX, aloud=True):
            if _is_at(descriptor, path):
                me = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(me).encode(), 0)
                return descriptor
        elif time.monotonic() > deadline:
            sentence = _sentence(path.parent, descriptor)
            os.close(descriptor)
            raise InputError(sentence)
        os.close(descriptor)
        time.sleep(0.02)


def _lock(descriptor: int, kind: int, *, aloud: bool = False) -> bool:
    """False if another holds it. On a file system without locks everybody gets in."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if aloud:
            print("note: this file system has no locks; start no second process in this folder", file=sys.stderr)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the file that was locked: its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sentence(folder: Path, descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        who = f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"{folder} is in use by {who}; wait for it or stop it, or give another hydra.run.dir"
