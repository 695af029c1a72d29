"""Memory: checks before use, and error messages when it runs out."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pulmo_jax.types import InputError

GIB = 2**30
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 2**20  # glibc's malloc.h; allocations of at least this size are mapped
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 2**23  # free memory kept at the end of a heap, for the next image
M_MMAP_MAX = -4  # largest number of mapped allocations
MOST_KEPT_BYTES = 2**31 - 1  # the largest value that mallopt takes
CONTROL_GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes() -> int | None:
    """Memory in bytes that this process can still allocate on the first device; None if unknown."""
    import jax  # on demand, so that the command line can import this module without JAX

    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    return host_memory_bytes()


def host_memory_bytes() -> int | None:
    """Host memory in bytes that this process can still allocate; None if unknown."""
    limits = [_meminfo("MemAvailable"), _control_group()]
    return min((limit for limit in limits if limit is not None), default=None)


def require(needed_bytes: int, operation: str, remedy: str) -> None:
    """Check that there is enough memory: on a CPU, the system would kill the process without a message.

    Args:
        needed_bytes: Required memory in bytes.
        operation: What needs the memory, for the error message.
        remedy: What the user can do, for the error message.

    Raises:
        InputError: Less memory is available.
    """
    available = available_bytes()
    if available is not None and needed_bytes > available:
        raise InputError(
            f"{operation} needs {needed_bytes / GIB:.1f} GiB of memory, {available / GIB:.1f} GiB are free; {remedy}"
        )


@contextmanager
def explain_out_of_memory(operation: str, remedy: str) -> Iterator[None]:
    """Convert out-of-memory errors of JAX and Python to an InputError with a remedy.

    Args:
        operation: What runs in the `with` block, for the error message.
        remedy: What the user can do, for the error message.

    Raises:
        InputError: The block runs out of memory.
    """
    try:
        yield
    except MemoryError as error:
        raise InputError(f"out of memory in {operation}; {remedy}") from error
    except RuntimeError as error:  # the base class of JaxRuntimeError
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"out of memory in {operation} ({reason:.120}); {remedy}") from error


def give_back_freed_memory() -> None:
    """Make glibc map large arrays, so that their memory returns to the system when they are freed.

    By default, glibc soon allocates everything below 32 MiB on its heaps. There, decoded images between the freed
    buffers of compiled steps fragment the heap, and memory use grows with the data set. Mapping costs no time if a
    step computes much per byte, but made the steps of the autoencoder 1.7 times slower. Other C libraries are not
    changed.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later arrays instead of returning it to the system.

    By default, glibc maps every array above 32 MiB and unmaps it when it is freed. The working memory of a training
    step of the U-Net is such an array: the page faults of mapping it again took 15 % of the CPU time of each step.
    Other C libraries are not changed.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT_BYTES)


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _control_group() -> int | None:
    """Memory limit of a container or batch job (control groups, version 2), minus memory that cannot be reclaimed."""
    try:
        folder = CONTROL_GROUPS / OWN_GROUP.read_text().strip().rpartition("::/")[2]
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
        return limit - used + int(cached)
    except (OSError, ValueError, KeyError):  # no limit: "max" is not a number
        return None
