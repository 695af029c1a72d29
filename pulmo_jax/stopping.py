"""Signals outside the training loop: they end the program, and let everything on the way out put itself in order."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pulmo_jax.training.interrupt import SIGNALS


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
