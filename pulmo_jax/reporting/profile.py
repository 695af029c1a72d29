"""Which operations of the compiled programs took the time: a trace of jax.profiler as a table and a figure."""

import csv
import gzip
import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from pulmo_jax.reporting import figures

SHOWN_KINDS = 12


@dataclass(frozen=True)
class Operation:
    """One instruction of one compiled program: how often it ran, and its own time without what it called, ms."""

    program: str
    name: str
    calls: int
    ms: float

    @property
    def kind(self) -> str:
        """Instructions are numbered: dot.3 and dot.17 are both products of matrices."""
        return re.sub(r"[.\d]+$", "", self.name)


def read_operations(folder: Path) -> list[Operation]:
    """From the newest trace below the folder that `jax.profiler.start_trace` was given; the slowest first."""
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
        callers: list[tuple[float, tuple[str, str]]] = []  # (end, what) of those that are still running
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            what, end = (event["args"]["hlo_module"], event["args"]["hlo_op"]), event["ts"] + event["dur"]
            while callers and callers[-1][0] <= event["ts"]:
                callers.pop()
            if callers:
                own_us[callers[-1][1]] -= event["dur"]
            calls[what] += 1
            own_us[what] += event["dur"]
            callers.append((end, what))
    found = [Operation(*what, calls[what], us / 1000) for what, us in own_us.items()]
    return sorted(found, key=lambda operation: -operation.ms)


def operations_csv(operations: Sequence[Operation], steps: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["program", "operation", "calls_per_step", "ms_per_step"])
    for o in operations:
        writer.writerow([o.program, o.name, o.calls / steps, round(o.ms / steps, 4)])
    return text.getvalue()


def operations_figure(operations: Sequence[Operation], steps: int, wall_ms: float) -> Figure:
    """Time of a step by kind of operation, summed over the threads that worked at once.

    wall_ms: how long a step took, by the clock.
    """
    by_kind: dict[str, float] = defaultdict(float)
    for operation in operations:
        by_kind[operation.kind] += operation.ms / steps
    kinds = sorted(by_kind, key=lambda kind: -by_kind[kind])
    rest = sum(by_kind[kind] for kind in kinds[SHOWN_KINDS:])
    bars = [(kind, by_kind[kind]) for kind in kinds[:SHOWN_KINDS]] + ([("all others", rest)] if rest else [])
    total = sum(by_kind.values())
    with figures.style():
        figure = Figure(figsize=(figures.TEXT_WIDTH_IN * 0.7, 0.5 + 0.19 * len(bars)), layout="constrained")
        axes = figure.subplots()
        names, values = zip(*bars, strict=True)
        drawn = axes.barh(range(len(bars)), values, color=figures.BLUE)
        axes.bar_label(drawn, [f"{value / total:.0%}" for value in values], padding=2, fontsize=6)
        axes.set_yticks(range(len(bars)), [figures.literal(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel(f"ms of all threads in a step ({wall_ms:.1f} ms by the clock, {total:.1f} ms of work)")
    return figure
