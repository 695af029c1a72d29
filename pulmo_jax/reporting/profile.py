"""Table and figure of the time spent in each operation of the compiled programs, from a trace of `jax.profiler`."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from pulmo_jax.host.tables import csv_text
from pulmo_jax.reporting import figures

SHOWN_KINDS = 12


@dataclass(frozen=True)
class Operation:
    """An instruction of a compiled program.

    Attributes:
        program: Name of the program (HLO module).
        name: Name of the instruction (HLO operation).
        calls: Number of executions.
        ms: Time spent in the instruction itself, without nested instructions, in ms.
    """

    program: str
    name: str
    calls: int
    ms: float

    @property
    def kind(self) -> str:
        """Name without its number: dot.3 and dot.17 are both matrix products."""
        return re.sub(r"[.\d]+$", "", self.name)


def read_operations(folder: Path) -> list[Operation]:
    """Read the newest trace in a folder.

    Args:
        folder: Folder that was passed to `jax.profiler.start_trace`.

    Returns:
        Operations, the slowest first.
    """
    trace = max(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime_ns)
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    threads = defaultdict(list)
    for event in events:
        if "hlo_op" in event.get("args", {}) and "dur" in event:
            threads[event["pid"], event["tid"]].append(event)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    own_us: dict[tuple[str, str], float] = defaultdict(float)
    for thread in threads.values():
        callers: list[tuple[float, tuple[str, str]]] = []  # (end, operation) of enclosing operations
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            operation, end = (event["args"]["hlo_module"], event["args"]["hlo_op"]), event["ts"] + event["dur"]
            while callers and callers[-1][0] <= event["ts"]:
                callers.pop()
            if callers:
                own_us[callers[-1][1]] -= event["dur"]
            calls[operation] += 1
            own_us[operation] += event["dur"]
            callers.append((end, operation))
    operations = [Operation(*operation, calls[operation], us / 1000) for operation, us in own_us.items()]
    return sorted(operations, key=lambda operation: -operation.ms)


def operations_csv(operations: Sequence[Operation], steps: int) -> str:
    """Format operations as CSV.

    Args:
        operations: Operations of the trace.
        steps: Number of training steps in the trace.

    Returns:
        CSV text with calls and time per step.
    """
    columns = ["program", "operation", "calls_per_step", "ms_per_step"]
    return csv_text(columns, ((o.program, o.name, o.calls / steps, round(o.ms / steps, 4)) for o in operations))


def operations_figure(operations: Sequence[Operation], steps: int, wall_ms: float) -> Figure:
    """Bar chart of the time per step by kind of operation, summed over concurrent threads.

    Args:
        operations: Operations of the trace.
        steps: Number of training steps in the trace.
        wall_ms: Wall-clock time of a step in ms.

    Returns:
        The figure.
    """
    by_kind: dict[str, float] = defaultdict(float)
    for operation in operations:
        by_kind[operation.kind] += operation.ms / steps
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind])
    other_ms = sum(by_kind[kind] for kind in kinds[SHOWN_KINDS:])
    bars = [(kind, by_kind[kind]) for kind in kinds[:SHOWN_KINDS]] + ([("other", other_ms)] if other_ms else [])
    total = sum(by_kind.values())
    with figures.style():
        figure = Figure(figsize=(figures.TEXT_WIDTH_IN * 0.7, 0.5 + 0.19 * len(bars)), layout="constrained")
        axes = figure.subplots()
        names, values = zip(*bars, strict=True)
        bar_container = axes.barh(range(len(bars)), values, color=figures.BLUE)
        axes.bar_label(bar_container, [f"{value / total:.0%}" for value in values], padding=2, fontsize=6)
        axes.set_yticks(range(len(bars)), [figures.literal(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel(f"time per step / ms (wall clock {wall_ms:.1f} ms, sum over threads {total:.1f} ms)")
    return figure
