"""A callback for tests that stop a training: it waits at a step, so that the signal comes there on any machine."""

import select
import signal
import socket
from pathlib import Path
from typing import Any


class Gate:
    """Waits in the event of `step` for a signal, or until `folder`/NAME exists, NAME that of the run directory."""

    def __init__(self, step: int, folder: str) -> None:
        self.step, self.folder, self.name = step, Path(folder), ""
        self.signals, self.sender = socket.socketpair()
        self.sender.setblocking(False)

    def on_start(self, start: Any) -> None:
        self.name = start.run_dir.name
        signal.set_wakeup_fd(self.sender.fileno())  # Python writes to it whatever the signal's handler does

    def on_event(self, event: Any) -> None:
        while event.step == self.step and not (self.folder / self.name).exists():
            if select.select([self.signals], [], [], 0.02)[0]:
                break

    def on_end(self) -> None:
        signal.set_wakeup_fd(-1)
        self.signals.close()
        self.sender.close()


def gate(step: int, folder: Path) -> list[str]:
    """The overrides that add the callback to a run."""
    given = {"_target_": "references.gate.Gate", "step": step, "folder": folder}
    return ["plugins=[references]", *(f"+callbacks.gate.{name}={value}" for name, value in given.items())]
