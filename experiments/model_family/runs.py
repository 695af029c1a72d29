"""Run directories of the study, and the cost of the commands that fill them."""

import json
import os
import subprocess
import time
from pathlib import Path

PARTS = ("ct", "chest", "chest_aligned", "brain")


def folder_of(work: Path, part: str, name: str, seed: int) -> Path:
    """Run directory of a method and seed."""
    return work / part / "runs" / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"


def cost_file(folder: Path) -> Path:
    """File with the cost of a run, beside its directory; written when the run has ended."""
    return folder.parent / f"{folder.name}_cost.json"


def measure(command: list[str], folder: Path) -> None:
    """Run a command; write its CPU time (user and system), wall time and peak memory beside the run."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\nended with status {child.returncode}; see {log.name}")
    cost = {
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "wall_s": round(time.monotonic() - began, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
        "load": os.getloadavg()[0],
    }
    cost_file(folder).write_text(json.dumps(cost) + "\n")
    print(f"{folder.name}: {cost['cpu_s']} CPU s, {cost['peak_mib']} MiB", flush=True)


def is_finished(folder: Path) -> bool:
    """Whether a run has ended and its cost is known."""
    return (folder / "report.html").is_file() and cost_file(folder).is_file()
