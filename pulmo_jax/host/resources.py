"""What a run may run out of, memory and room on the disk: known before or after the fact, and said in words."""

import ctypes
import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pulmo_jax.types import InputError

GIB = 2**30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 2**20  # glibc's malloc.h; allocations from this size on are mapped
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 2**23  # of a heap's free end, for the next image
CONTROL_GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes() -> int | None:
    """What this process may still take of the device's memory, or None where that is not known."""
    import jax  # here, so that the command line can read this module without it

    device = jax.local_devices()[0]
    if device.platform != "cpu":
        found = device.memory_stats() or {}
        return found["bytes_limit"] - found["bytes_in_use"] if "bytes_limit" in found else None
    limits = [_meminfo("MemAvailable"), _control_group()]
    return min((limit for limit in limits if limit is not None), default=None)


def require(needed_bytes: int, what: str, remedy: str) -> None:
    """Raises InputError where it cannot work: on a CPU the system would kill the process without a word."""
    available = available_bytes()
    if available is not None and needed_bytes > available:
        raise InputError(
            f"{what} needs {needed_bytes / GIB:.1f} GiB of memory, {available / GIB:.1f} GiB are free; {remedy}"
        )


@contextmanager
def running_out_names(what: str, remedy: str) -> Iterator[None]:
    """Turns JAX's and Python's errors on a lack of memory into an InputError with the remedy."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"out of memory in {what}; {remedy}") from error
    except RuntimeError as error:  # JaxRuntimeError is one
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"out of memory in {what} ({reason:.120}); {remedy}") from error


def give_back_freed_memory() -> None:
    """From now on large arrays are mapped, and go back to the system when they are freed.

    Of itself glibc soon takes all below 32 MiB from its heaps; decoded images that come to lie between what a compiled
    step has freed hold it there, and memory grows with the set. It costs nothing where a step computes much for each
    byte; the autoencoder's steps took 1.7 times as long. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether that, or what it came from, is a full disk: libraries wrap it, and hide its number in a text."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if getattr(error, "errno", None) in DISK_FULL or any(os.strerror(n) in str(error) for n in DISK_FULL):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _control_group() -> int | None:
    """The limit of a container or of a scheduler's job (control groups, version 2), less what is in use for good."""
    try:
        folder = CONTROL_GROUPS / OWN_GROUP.read_text().strip().rpartition("::/")[2]
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
        return limit - used + int(cached)
    except (OSError, ValueError, KeyError):  # no such limit: "max" is no number
        return None
