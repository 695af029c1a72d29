"""SIGINT and SIGTERM ask for a stop after the current step, instead of tearing it apart."""

import signal
from types import FrameType


class Interrupt:
    """While entered, the first signal is only remembered in `signum`; a second one acts as usual."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self.__exit__()

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}
