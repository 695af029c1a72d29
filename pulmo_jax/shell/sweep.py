"""The jobs of a sweep: each writes job.json in its folder, and the folders alone are what a sweep is read from.

So it is the same for every launcher, and after any kind of end: nothing is kept in the process that started the jobs.
"""

import csv
import hashlib
import io
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.host.lock import claim, in_use
from pulmo_jax.host.resources import is_disk_full
from pulmo_jax.reporting.tables import UNDEFINED, Table, headline
from pulmo_jax.types import InputError

if TYPE_CHECKING:
    from pulmo_jax.reporting.report import CaptionedFigure

RECORD, REFUSED, TRACEBACK = "job.json", "refused.json", "traceback.txt"
JOB_LOCK = "job.lock"  # held while the job runs, so that a job that was killed is told from one that runs
STOP = ".stop"  # in the sweep's folder: jobs that were queued when it was stopped do not begin


@dataclass(frozen=True)
class Request:
    """One job of one call of a sweep.

    overrides: as Hydra has them; config: the config behind them, as text. call: names the call, so that a job which a
    scheduler starts again goes on by itself. resume: the user asked to go on. replay: what failed in the middle of a
    search is not tried again, as the search went on from there.
    """

    folder: Path
    overrides: tuple[str, ...]
    config: str
    call: str
    resume: bool
    replay: bool


@dataclass(frozen=True)
class Row:
    """What a job's folder says of it. measures: figures of merit from its metrics.json."""

    folder: Path
    status: str
    objective: float | None
    reason: str
    seconds: float | None
    overrides: dict[str, str]
    measures: dict[str, float]
    pid: int | None
    host: str


def run_job(request: Request, work: Callable[[bool], Any], say: Callable[[str], object]) -> float | None:
    """The objective that `work(resume)` returns, or that it returned in an earlier call; None if there is none.

    Whatever goes wrong in the job is recorded in its folder and said, and the sweep goes on: that is why nothing but
    signals and exits passes through here. `work` returns a float for an objective, anything else for none.
    """
    try:
        with claim(request.folder, JOB_LOCK):
            return _in_own_folder(request, work, say)
    except InputError as error:  # another process has the folder, or another job
        write_json(request.folder / REFUSED, {"reason": str(error), "overrides": own(request.overrides)})
        say(f"job {request.folder.name} was not started: {error}")
        return None


def _in_own_folder(request: Request, work: Callable[[bool], Any], say: Callable[[str], object]) -> float | None:
    folder, stored = request.folder, read_record(request.folder)
    (folder / REFUSED).unlink(missing_ok=True)
    if stored is not None:
        require_same(request, stored)
        if stored["status"] == "done":
            say(f"job {folder.name} has already finished; objective {stored['objective']}")
            return stored["objective"]
        if stored["status"] == "failed" and stored["call"] == request.call:  # which goes on after a job was killed
            return None
        if stored["status"] == "failed" and request.replay and later_job_done(folder):
            reason = stored["reason"]
            say(f"job {folder.name} failed earlier and is not repeated, because the search continued: {reason}")
            return None
    (folder / TRACEBACK).unlink(missing_ok=True)
    began = time.monotonic()
    write_record(request, "running", 0.0)
    try:
        objective = objective_of(work(stored is not None))
    except InputError as error:
        reason = str(error)
        say(f"job {folder.name} failed: {reason}")
    except Exception as error:
        reason = disk_full(error, folder) or f"{type(error).__name__}: {error}"
        with suppress(OSError):
            write_text(folder / TRACEBACK, traceback.format_exc())
        say(f"job {folder.name} failed: {reason.splitlines()[0]}; see {folder / TRACEBACK}")
    except BaseException as error:  # a signal, or the exit that the training loop makes of it
        reason = reason_of(error)
        if not isinstance(error, SystemExit) or is_signal(error.code):
            write_record(request, "interrupted", time.monotonic() - began, reason=reason)
            raise
        say(f"job {folder.name} failed: {reason}")
    else:
        write_record(request, "done", time.monotonic() - began, objective=objective)
        return objective
    write_record(request, "failed", time.monotonic() - began, reason=reason)
    return None


def objective_of(result: Any) -> float | None:
    """Raises InputError if it is not finite."""
    if not isinstance(result, float):
        return None
    if not math.isfinite(result):
        raise InputError(f"the objective is {result}")
    return result


def reason_of(error: BaseException) -> str:
    """In words, where a signal's number stands in the exception or in the exit status."""
    if isinstance(error, SystemExit):
        if not is_signal(error.code):
            return f"exit status {error.code}"
        return f"stopped by {signal.Signals(error.code - 128).name}"
    return f"stopped by {signal.Signals(next(iter(error.args), signal.SIGINT)).name}"


def is_signal(code: object) -> TypeGuard[int]:
    """Of an exit status: 128 and the signal's number."""
    return isinstance(code, int) and code > 128


def write_record(
    request: Request, status: str, seconds: float, objective: float | None = None, reason: str = ""
) -> None:
    """job.json. A full disk stops a job from beginning, but does not hide what became of it."""
    record = {
        "status": status,
        "objective": objective,
        "reason": reason,
        "overrides": own(request.overrides),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - seconds)),
        "seconds": round(seconds, 3),
        "config": digest(request.config),
        "call": request.call,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    try:
        write_json(request.folder / RECORD, record)
    except OSError as error:
        if status == "running" or not is_disk_full(error):
            raise


def require_same(request: Request, stored: dict[str, Any]) -> None:
    """Raises InputError where the folder holds another job, or one that must not be gone on with."""
    now, before = own(request.overrides), stored["overrides"]
    if now != before:
        there, here = (" ".join(o for o in one if o not in other) for one, other in ((before, now), (now, before)))
        raise InputError(
            f"{request.folder} contains another job (there: {there or 'not given'}; now: {here or 'not given'}); give "
            "the same keys as before, or another hydra.sweep.dir, or remove this folder"
        )
    if stored["config"] != digest(request.config):
        raise InputError(
            f"{request.folder} contains a job of the same command, but its config files have changed; undo the change, "
            "or give another hydra.sweep.dir"
        )
    if not request.resume and stored["call"] != request.call:
        raise InputError(f"{request.folder} already contains a job; resume=true continues it")


def bury(sweep: Path, call: str) -> list[str]:
    """Record what a call's killed jobs could not: that they failed. Returns their names."""
    killed = []
    for row in collect(sweep):
        record = _load(row.folder / RECORD)
        if row.status == "unfinished" and record.get("call") == call:
            write_json(row.folder / RECORD, {**record, "status": "failed", "reason": row.reason})
            killed.append(row.folder.name)
    return killed


def own(overrides: Sequence[str]) -> list[str]:
    """Those that make the job what it is."""
    return sorted(o for o in overrides if key_of(o) != "resume" and not key_of(o).startswith("hydra."))


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """job.json, or None if there is none. Raises InputError if it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if not {"status", "objective", "reason", "overrides", "seconds", "config", "call"} <= set(record):
            raise ValueError("keys are missing")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / RECORD}: cannot be read ({error}); remove it to run the job again") from error
    return record


def later_job_done(folder: Path) -> bool:
    rows = collect(folder.parent)
    names = [row.folder.name for row in rows if row.status == "done"]
    return any(name.isdigit() and folder.name.isdigit() and int(name) > int(folder.name) for name in names)


def disk_full(error: BaseException, folder: Path) -> str | None:
    """What to say if that is a full disk, with the file that could not be written where it is known."""
    if not is_disk_full(error):
        return None
    return f"the disk is full: {getattr(error, 'filename', None) or folder} could not be written"


def collect(sweep: Path) -> list[Row]:
    """Every job that left a record in the sweep's folder, in order."""
    folders = {path.parent for name in (RECORD, REFUSED) for path in sweep.glob(f"*/{name}")}
    return [read_row(folder) for folder in sorted(folders, key=lambda f: (not f.name.isdigit(), len(f.name), f.name))]


def read_row(folder: Path) -> Row:
    refused = _load(folder / REFUSED)
    record = {"status": "failed", **refused} if refused else _load(folder / RECORD)
    status, reason = record.get("status", "failed"), record.get("reason", "")
    if not record:
        reason = f"{folder / RECORD}: cannot be read"
    if status == "running" and in_use(folder, JOB_LOCK) is None:
        status, reason = "unfinished", "its process ended without a message: killed, out of memory, or the disk is full"
    return Row(
        folder=folder,
        status=status,
        objective=record.get("objective"),
        reason=reason,
        seconds=record.get("seconds"),
        overrides={key_of(o): o.partition("=")[2] for o in record.get("overrides", [])},
        measures=headline(_load(folder / "metrics.json")) if status == "done" else {},
        pid=record.get("pid"),
        host=record.get("host", ""),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_tables(sweep: Path) -> list[Row]:
    """sweep.csv, from the folders as they are now."""
    rows = collect(sweep)
    with bearing_full_disk(sweep):
        if rows:
            write_text(sweep / "sweep.csv", as_csv(rows))
    return rows


def write_pages(sweep: Path) -> list[Row]:
    """sweep.csv, figures/sweep.png and .pdf, and sweep.html."""
    from pulmo_jax.reporting.report import Section, write_report  # here and below: matplotlib takes half a second

    rows = write_tables(sweep)
    swept, measures = swept_keys(rows), measures_of(rows)
    with bearing_full_disk(sweep):
        if rows:
            shown = swept and any(value is not None for values in measures.values() for value in values)
            figures = [comparison_figure(rows, swept, measures, sweep)] if shown else []
            sections = [
                Section("Jobs", tables=[jobs_table(rows, swept, measures)]),
                Section("Unfinished jobs", tables=failed_tables(rows, swept)),
                Section("Comparison", figures=figures),
            ]
            write_report(sweep / "sweep.html", f"Sweep {sweep.name}", summary_of(rows, sweep), sections, [], [])
    return rows


def comparison_figure(
    rows: list[Row], swept: dict[str, list[str]], measures: dict[str, list[float | None]], sweep: Path
) -> "CaptionedFigure":
    from pulmo_jax.reporting.figures import save
    from pulmo_jax.reporting.report import CaptionedFigure
    from pulmo_jax.shell.sweep_figures import sweep_figure

    path = save(sweep_figure(swept, measures), sweep / "figures", "sweep")
    caption = (
        f"Results of {len(rows)} jobs against each swept key. Dots: jobs; lines: means over seeds; bars: one standard "
        "deviation over seeds. Differences smaller than the bars are not meaningful."
    )
    return CaptionedFigure(path, caption)


@contextmanager
def bearing_full_disk(sweep: Path) -> Iterator[None]:
    """A table that cannot be written ends no job and hides no message."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        print(f"error: the disk is full: the tables of {sweep} are not up to date", file=sys.stderr)


def as_csv(rows: list[Row]) -> str:
    """One row a job; numbers in full."""
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    measures = list(dict.fromkeys(name for row in rows for name in row.measures))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", "status", "objective", "reason", "seconds", *keys, *measures])
    for row in rows:
        fixed = [row.folder.name, row.status, row.objective, row.reason, row.seconds]
        writer.writerow([*fixed, *map(row.overrides.get, keys), *map(row.measures.get, measures)])
    return text.getvalue()


def swept_keys(rows: list[Row]) -> dict[str, list[str]]:
    """The keys that differ between jobs, and their values."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides)
    values = {key: [row.overrides.get(key, "default") for row in rows] for key in keys}
    return {key: column for key, column in values.items() if len(set(column)) > 1}


def measures_of(rows: list[Row]) -> dict[str, list[float | None]]:
    """The objective, where there is one, and what was found in testing."""
    names = dict.fromkeys(name for row in rows for name in row.measures)
    tested: dict[str, list[float | None]] = {name: [row.measures.get(name) for row in rows] for name in names}
    objective = [row.objective if row.status == "done" else None for row in rows]
    return ({"objective": objective} if any(o is not None for o in objective) or not tested else {}) | tested


def jobs_table(rows: list[Row], swept: dict[str, list[str]], measures: dict[str, list[float | None]]) -> Table:
    """Lowest objective first, then what is not finished."""
    order = sorted(range(len(rows)), key=lambda job: (rows[job].status != "done", rows[job].objective or math.inf, job))
    cells = [
        [
            rows[job].folder.name,
            rows[job].status,
            *(column[job] for column in swept.values()),
            *(text_of(column[job]) for column in measures.values()),
            text_of(rows[job].seconds),
        ]
        for job in order
    ]
    return Table("All jobs by increasing objective", ["job", "status", *swept, *measures, "seconds"], cells, [])


def failed_tables(rows: list[Row], swept: dict[str, list[str]]) -> list[Table]:
    cells = [
        [row.folder.name, row.status, " ".join(f"{key}={values[job]}" for key, values in swept.items()), row.reason]
        for job, row in enumerate(rows)
        if row.status != "done"
    ]
    return [Table("Reasons", ["job", "status", "keys", "reason"], cells, [])] if cells else []


def text_of(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.4g}"


def summary_of(rows: list[Row], sweep: Path) -> dict[str, str]:
    counts = {status: sum(row.status == status for row in rows) for status in dict.fromkeys(r.status for r in rows)}
    common = {k: v for k, v in rows[0].overrides.items() if k not in swept_keys(rows)}
    finished = [row for row in rows if row.status == "done" and row.objective is not None]
    best = min(finished, key=lambda row: row.objective or 0.0, default=None)
    return {
        "jobs": ", ".join(f"{n} {status}" for status, n in counts.items()),
        "lowest objective": "" if best is None else f"{text_of(best.objective)}, job {best.folder.name}",
        "keys of all jobs": " ".join(f"{key}={value}" for key, value in common.items()),
        "folder": str(sweep),
    }
