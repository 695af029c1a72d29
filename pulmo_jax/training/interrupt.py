"""SIGINT, SIGTERM and a scheduler's warning ask for a stop after the current step, instead of tearing it apart."""

import signal
import threading
import time
from types import FrameType

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
