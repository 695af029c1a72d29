"""Signal handling: in the training loop, signals take effect after the current step; elsewhere they end the program."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ONE_STOP_S = 2.0  # signals within this time count as one: a Ctrl-C may arrive twice, also from a parent process


class Interrupt:
    """Defers the first signal during a `with` block; a later one acts as usual.

    It has no effect outside the main thread, where Python delivers no signals.

    Attributes:
        signum: Number of the first signal; None if there was none.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._received_s = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._remember) for s in SIGNALS}
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._received_s = signum, time.monotonic()
        elif time.monotonic() > self._received_s + ONE_STOP_S:
            self.__exit__()
            signal.raise_signal(signum)

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}


class Stopped(KeyboardInterrupt):
    """Raised when a signal ends the program. Like Ctrl-C, `except Exception` does not catch it.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@contextmanager
def stoppable(before: Callable[[int], object] = lambda signum: None) -> Iterator[None]:
    """Raise `Stopped` on SIGINT, SIGTERM and SIGUSR1 during a `with` block.

    Args:
        before: Called with the signal number first; a second signal raises `Stopped` immediately.
    """

    def stop_now(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    def stop(signum: int, frame: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, stop_now)
        before(signum)
        raise Stopped(signum)

    if threading.current_thread() is not threading.main_thread():  # other threads get no signals
        yield
        return
    # Ignored signals stay ignored, such as SIGINT in a background job of a shell.
    taken = {s: h for s in SIGNALS if (h := signal.getsignal(s)) is not signal.SIG_IGN}
    for signum in taken:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in taken.items():
            signal.signal(signum, handler)


@contextmanager
def stepping_down() -> Iterator[None]:
    """Finish the current step and save a checkpoint before submitit requeues the job, on its warning signal SIGUSR2.

    submitit's own handler would interrupt the step. Without such a handler, nothing is changed.
    """
    requeue: Any = signal.getsignal(signal.SIGUSR2)
    warned: list[int] = []

    def warn(signum: int, frame: FrameType | None) -> None:
        warned.append(signum)
        os.kill(os.getpid(), signal.SIGUSR1)

    if not callable(requeue):
        yield
        return
    signal.signal(signal.SIGUSR2, warn)
    try:
        yield
    except (Stopped, SystemExit):
        if warned:
            requeue(signal.SIGUSR2, None)
        raise
    finally:
        signal.signal(signal.SIGUSR2, requeue)
