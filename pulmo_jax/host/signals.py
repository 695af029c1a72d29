"""Signals: inside the training loop they wait for the step at hand, outside they end the program in good order."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ONE_STOP_S = 2.0  # one Ctrl-C may arrive twice, from the terminal and from whoever started the job


class Interrupt:
    """While entered, the first signal is only remembered in `signum`; one that comes later acts as usual.

    Outside the main thread, where Python hands out no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._when = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._remember) for s in SIGNALS}
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._when = signum, time.monotonic()
        elif time.monotonic() > self._when + ONE_STOP_S:
            self.__exit__()
            signal.raise_signal(signum)

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}


class Stopped(KeyboardInterrupt):
    """A signal asked for the end. It passes every `except Exception`, as Ctrl-C does."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@contextmanager
def stoppable(before: Callable[[int], object] = lambda signum: None) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 raise Stopped, after `before(signum)`; a second one does not wait for that."""

    def stop_now(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    def stop(signum: int, frame: FrameType | None) -> None:
        for other in taken:
            signal.signal(other, stop_now)
        before(signum)
        raise Stopped(signum)

    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    # what is ignored stays so: of a job in the background of a shell that is SIGINT
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
    """submitit's warning (SIGUSR2) first ends the step at hand, with a checkpoint; then submitit sends the job again.

    Its own handler alone would tear the step apart. Where nobody waits for the signal, nothing is changed.
    """
    again: Any = signal.getsignal(signal.SIGUSR2)
    warned: list[int] = []

    def warn(signum: int, frame: FrameType | None) -> None:
        warned.append(signum)
        os.kill(os.getpid(), signal.SIGUSR1)

    if not callable(again):
        yield
        return
    signal.signal(signal.SIGUSR2, warn)
    try:
        yield
    except (Stopped, SystemExit):
        if warned:
            again(signal.SIGUSR2, None)
        raise
    finally:
        signal.signal(signal.SIGUSR2, again)
