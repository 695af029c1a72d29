"""Jobs of a sweep. Each job writes job.json to its folder; the state of a sweep is read from these files alone.

It therefore works with all launchers and can be resumed after any kind of failure.
"""

import hashlib
import json
import math
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pulmo_jax.host.files import write_json, write_text
from pulmo_jax.host.lock import in_use
from pulmo_jax.host.outputs import check_output, output_folder
from pulmo_jax.host.places import is_full, number_of, sentence
from pulmo_jax.reporting.tables import headline
from pulmo_jax.runs.older import is_unrecorded, record_files
from pulmo_jax.types import InputError, OutputError

RECORD, REFUSED, TRACEBACK = "job.json", "refused.json", "traceback.txt"
STOP = ".stop"  # in the folder of the sweep: queued jobs do not start


@dataclass(frozen=True)
class Request:
    """A job of a sweep.

    Attributes:
        folder: Folder of the job.
        overrides: Overrides in Hydra syntax.
        config: Composed config as text.
        call: Identifier of the call of the program, so that a requeued job resumes.
        resume: The user asked to resume.
        replay: Do not repeat a failed job of a search that has continued since.
        kind: Name of the verb.
    """

    folder: Path
    overrides: tuple[str, ...]
    config: str
    call: str
    resume: bool
    replay: bool
    kind: str


@dataclass(frozen=True)
class Row:
    """State of a job.

    Attributes:
        folder: Folder of the job.
        status: done, failed, running, interrupted or unfinished.
        objective: Objective, if finished.
        reason: Reason of a failure.
        seconds: Duration.
        overrides: Overrides by key.
        measures: Figures of merit from metrics.json.
        pid: Process ID.
        host: Host name.
        sample: Line on sample data from metrics.json; empty for a user's own data.
    """

    folder: Path
    status: str
    objective: float | None
    reason: str
    seconds: float | None
    overrides: dict[str, str]
    measures: dict[str, float]
    pid: int | None
    host: str
    sample: str = ""


def run_job(request: Request, work: Callable[[bool], Any], say: Callable[[str], object]) -> float | None:
    """Run a job, or return the result of an earlier call.

    Errors are recorded in the folder of the job and printed, and the sweep continues; only signals and exits are
    raised.

    Args:
        request: The job.
        work: Function `work(resume)` that runs the job; returns the objective as a float, or anything else.
        say: Prints a message.

    Returns:
        The objective, if any.
    """
    try:
        if request.resume and is_unrecorded(request.folder):
            record_files(request.folder, request.kind)
        check_output(request.folder, request.kind)
    except InputError as error:
        raise InputError(f"job {request.folder.name} cannot be started: {error}") from error
    try:
        with output_folder(request.folder, request.kind):  # locked while the job runs, unlike that of a killed job
            return _in_own_folder(request, work, say)
    except InputError as error:  # the folder is in use, or belongs to another job
        write_json(request.folder / REFUSED, {"reason": str(error), "overrides": own(request.overrides)})
        say(f"job {request.folder.name} was not started: {error}")
        return None


def _in_own_folder(request: Request, work: Callable[[bool], Any], say: Callable[[str], object]) -> float | None:
    """Run the job of `run_job` while its folder is locked."""
    folder, stored = request.folder, read_record(request.folder)
    (folder / REFUSED).unlink(missing_ok=True)
    if stored is not None:
        require_same(request, stored)
        if stored["status"] == "done":
            say(f"job {folder.name} has already finished; objective {stored['objective']}")
            return stored["objective"]
        if (
            stored["status"] == "failed" and stored["call"] == request.call
        ):  # a call that continues after a job was killed
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
    except (InputError, OutputError) as error:
        reason = str(error)
        say(f"job {folder.name} failed: {reason}")
    except Exception as error:
        reason = unwritable(error, folder) or f"{type(error).__name__}: {error}"
        with suppress(InputError, OutputError):
            write_text(folder / TRACEBACK, traceback.format_exc())
        say(f"job {folder.name} failed: {reason.splitlines()[0]}; see {folder / TRACEBACK}")
    except BaseException as error:  # a signal, or the resulting exit of the training loop
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
    """Extract the objective from the result of a job.

    Args:
        result: Result of the job.

    Returns:
        The objective; None if the result is not a float.

    Raises:
        InputError: If the objective is not finite.
    """
    if not isinstance(result, float):
        return None
    if not math.isfinite(result):
        raise InputError(f"the objective is {result}")
    return result


def reason_of(error: BaseException) -> str:
    """Describe a signal or exit status.

    Args:
        error: SystemExit, or KeyboardInterrupt with the signal number as its argument.

    Returns:
        The description.
    """
    if isinstance(error, SystemExit):
        if not is_signal(error.code):
            return f"exit status {error.code}"
        return f"stopped by {signal.Signals(error.code - 128).name}"
    return f"stopped by {signal.Signals(next(iter(error.args), signal.SIGINT)).name}"


def is_signal(code: object) -> TypeGuard[int]:
    """Whether an exit status is 128 + signal number."""
    return isinstance(code, int) and code > 128


def write_record(
    request: Request, status: str, seconds: float, objective: float | None = None, reason: str = ""
) -> None:
    """Write job.json; a full disk is an error at the start of a job and ignored at its end.

    Args:
        request: The job.
        status: running, done, failed or interrupted.
        seconds: Duration so far, s.
        objective: Objective, if finished.
        reason: Reason of a failure.

    Raises:
        OutputError: If the file cannot be written.
    """
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
    except OutputError as error:
        if status == "running" or not is_full(error):
            raise


def require_same(request: Request, stored: dict[str, Any]) -> None:
    """Check that a folder contains the same job and may be resumed.

    Args:
        request: The job.
        stored: Content of job.json.

    Raises:
        InputError: If the overrides or the composed config differ, or the user did not ask to resume.
    """
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
    """Record killed jobs of a call as failed.

    Args:
        sweep: Folder of the sweep.
        call: Identifier of the call of the program.

    Returns:
        Folder names of the killed jobs.
    """
    killed = []
    for row in collect(sweep):
        record = _load(row.folder / RECORD)
        if row.status == "unfinished" and record.get("call") == call:
            write_json(row.folder / RECORD, {**record, "status": "failed", "reason": row.reason})
            killed.append(row.folder.name)
    return killed


def own(overrides: Sequence[str]) -> list[str]:
    """Overrides that define the job, without resume and hydra.*."""
    return sorted(o for o in overrides if key_of(o) != "resume" and not key_of(o).startswith("hydra."))


def key_of(override: str) -> str:
    """Key of an override in Hydra syntax."""
    return override.partition("=")[0].lstrip("+~")


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read job.json.

    Args:
        folder: Folder of the job.

    Returns:
        Content of the file; None if there is none.

    Raises:
        InputError: If the file is damaged.
    """
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
    """Whether a job with a higher number has finished, so that a search has continued."""
    rows = collect(folder.parent)
    names = [row.folder.name for row in rows if row.status == "done"]
    return any(name.isdigit() and folder.name.isdigit() and int(name) > int(folder.name) for name in names)


def unwritable(error: BaseException, folder: Path) -> str | None:
    """Error message for a place that is full, read-only or forbidden.

    Args:
        error: The error.
        folder: Folder to name if the error names no file.

    Returns:
        The message; None for other errors.
    """
    if isinstance(error, OutputError):
        return str(error)
    number = number_of(error)
    place = getattr(error, "filename", None) or folder
    return None if number is None else sentence(place, number)


def collect(sweep: Path) -> list[Row]:
    """Read the state of all jobs of a sweep.

    Args:
        sweep: Folder of the sweep.

    Returns:
        States of the jobs, ordered by number.
    """
    folders = {path.parent for name in (RECORD, REFUSED) for path in sweep.glob(f"*/{name}")}
    return [read_row(folder) for folder in sorted(folders, key=lambda f: (not f.name.isdigit(), len(f.name), f.name))]


def read_row(folder: Path) -> Row:
    """Read the state of a job from its files; a running job whose lock is free is unfinished."""
    refused = _load(folder / REFUSED)
    record = {"status": "failed", **refused} if refused else _load(folder / RECORD)
    status, reason = record.get("status", "failed"), record.get("reason", "")
    if not record:
        reason = f"{folder / RECORD}: cannot be read"
    if status == "running" and in_use(folder) is None:
        status, reason = "unfinished", "its process ended without a message: killed, out of memory, or the disk is full"
    metrics = _load(folder / "metrics.json") if status == "done" else {}
    return Row(
        folder=folder,
        status=status,
        objective=record.get("objective"),
        reason=reason,
        seconds=record.get("seconds"),
        overrides={key_of(o): o.partition("=")[2] for o in record.get("overrides", [])},
        measures=headline(metrics),
        pid=record.get("pid"),
        host=record.get("host", ""),
        sample=str(metrics.get("sample", "")),
    )


def _load(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
