"""Command line of every verb: Hydra composes the config, `config` validates it; errors are one message.

Exit statuses: 0 success; 1 internal error, with a traceback; 2 invalid input or no result; 3 some files or jobs failed;
128 + signal number if stopped by a signal (130 SIGINT, 138 SIGUSR1, 143 SIGTERM).
"""

import gc
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pulmo_jax import __version__
from pulmo_jax.host.cache import provide_home
from pulmo_jax.host.calls import called
from pulmo_jax.host.calls import command_line as as_typed
from pulmo_jax.host.console import SOME_FAILED, complain, make_console
from pulmo_jax.host.files import write_text
from pulmo_jax.host.lock import in_use
from pulmo_jax.host.outputs import adding, joined, output_folder
from pulmo_jax.host.signals import Stopped, stepping_down, stoppable
from pulmo_jax.host.streams import guard_streams, reader_left
from pulmo_jax.runs.older import is_unrecorded, record_files
from pulmo_jax.shell.arguments import POSITIONAL, accepted
from pulmo_jax.shell.combinations import check_sweep
from pulmo_jax.shell.composing import (
    Command,
    checked,
    command_line,
    command_of,
    defaults_of,
    explain,
    foreign_experiment,
    package_configs,
)
from pulmo_jax.shell.help import print_help
from pulmo_jax.shell.placing import check_hydra, check_place, prepare_folders
from pulmo_jax.shell.sweep import (
    RECORD,
    STOP,
    TRACEBACK,
    Request,
    bury,
    collect,
    run_job,
    unwritable,
)
from pulmo_jax.shell.sweep_pages import write_pages, write_tables
from pulmo_jax.types import InputError, OutputError

BROKEN_PIPE = 141
PATIENCE_S = 60.0  # time for stopped jobs in other processes to finish their step
QUIET_S = 10.0  # time without a running job after which no further job is expected
PAGES_EVERY_S = 30.0  # the figure takes about a second
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "SUBMITIT_LOCAL_GLOBALID")
RESUME_HINTS = {
    "train": "resume with resume=true hydra.run.dir={run}",
    "predict": "repeat the command to resume",
}


@dataclass
class Sweep:
    """The sweep of this process.

    Attributes:
        folder: Folder of the sweep; None before it has begun.
        held: Lock of the folder.
        resume_keys: Keys that resume the sweep.
        written: Time at which the pages were last written.
        queued: Jobs wait in the queue of a scheduler, invisible to this process.
    """

    folder: Path | None
    held: ExitStack
    resume_keys: str = ""
    written: float = 0.0
    queued: bool = False


SWEEP = Sweep(None, ExitStack())  # begun by a Hydra callback, ended by `main`


def main(verb: str, task: Callable[[Any, Path], Any], examples: str) -> None:
    """Run a verb for the command line. Exits with a status unless it succeeds.

    Args:
        verb: Name of the verb.
        task: Function of the verb: `task(config, run_dir)`.
        examples: Text for --help.
    """
    guard_streams()
    provide_home()
    try:
        with stoppable(stop_jobs):
            status = run(verb, task, examples)
    except Stopped as stop:
        name = signal.Signals(stop.signum).name
        complain("interrupted" if stop.signum == signal.SIGINT else f"stopped by {name}")
        status = 128 + stop.signum
    except KeyboardInterrupt:
        complain("interrupted")
        status = 128 + signal.SIGINT
    if status:
        sys.exit(status)


def run(verb: str, task: Callable[[Any, Path], Any], examples: str) -> int:
    """Run a verb.

    Args:
        verb: Name of the verb.
        task: Function of the verb.
        examples: Text for --help.

    Returns:
        Exit status. Internal errors and signals are raised.
    """
    with called(as_typed(verb, sys.argv[1:])):
        return run_called(verb, task, examples)


def run_called(verb: str, task: Callable[[Any, Path], Any], examples: str) -> int:
    """Run a verb whose call has been noted; see `run`."""
    job = Job(verb, task, call=f"{time.time_ns()}-{os.getpid()}", parent=os.getpid())
    if "--version" in sys.argv[1:]:
        print(__version__)
        return 0
    if any(argument.startswith("--e") for argument in sys.argv[1:]):  # Hydra accepts abbreviations
        return fail(
            "--experimental-rerun is not allowed, because unpickling a file may execute any code; give the keys again"
        )
    try:
        sys.argv[1:] = accepted(sys.argv[1:], POSITIONAL.get(verb))
        if (foreign := foreign_experiment(verb, sys.argv[1:])) is not None:
            return fail(foreign)
        command = command_line(verb, sys.argv[1:])
    except InputError as error:
        return fail(str(error))
    ConfigStore.instance().store(name=f"{command.primary}_defaults", node=defaults_of(command.schema))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors, which this module reports
    with ExitStack() as SWEEP.held:
        SWEEP.folder = None
        try:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print_help(command, examples)
                sys.stdout.flush()
                return BROKEN_PIPE if reader_left() else 0  # --help | head
            launch(command.primary, job)
            sys.stdout.flush()
            return end_sweep(None) if SWEEP.folder else fail(job.failures[-1]) if job.failures else 0
        except Exception as error:
            return end_sweep(error) if SWEEP.folder else status_of(error, job, command)
        except BaseException:
            if SWEEP.folder and write_pages(SWEEP.folder):
                complain(f"resume with the same command and {SWEEP.resume_keys}")
            raise


def launch(primary: str, job: "Job") -> None:
    """Call Hydra, again for the rest of a sweep if the launcher aborted because a job was killed."""
    arguments = sys.argv
    while True:
        try:
            hydra.main(version_base="1.3", config_path=str(package_configs().absolute()), config_name=primary)(job)()
            return
        except Exception:
            if SWEEP.folder is None:
                raise
            wait_for_jobs(SWEEP.folder)
            killed = bury(SWEEP.folder, job.call)
            if not killed or SWEEP.queued:
                raise
            complain(f"killed: jobs {', '.join(killed)}; continuing with the other jobs")
            folder = str(SWEEP.folder).replace("\\", "\\\\").replace("'", "\\'")
            sys.argv = [*arguments, f"hydra.sweep.dir='{folder}'"]
        finally:
            sys.argv = arguments


def status_of(error: Exception, job: "Job", command: Command) -> int:
    """Report the error of a single run and return the exit status; internal errors are raised again."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return fail(explain(error, command))
    if isinstance(error, InputError | OutputError):
        return fail(str(error))
    if not job.composed and isinstance(error, OSError):
        return fail(unwritable(error, Path()) or f"{error.filename}: {error.strerror}; give another hydra.run.dir")
    if not job.composed and isinstance(error, ValueError):
        return fail(explain(error, command))  # raised by Hydra for a group set to null
    raise error


class Job:
    """Function called by Hydra with the config of a run, possibly in another process for a job of a sweep.

    Args:
        verb: Name of the verb.
        task: Function of the verb.
        call: Identifier of this call of the program.
        parent: Process ID of the program.
    """

    def __init__(self, verb: str, task: Callable[[Any, Path], Any], call: str, parent: int):
        self.verb, self.task, self.call, self.parent = verb, task, call, parent
        self.composed, self.failures = False, []

    def __reduce__(self) -> tuple[Any, ...]:
        return Job._elsewhere, (self.verb, self.call, self.parent)

    @staticmethod
    def _elsewhere(verb: str, call: str, parent: int) -> "Job":
        """Restore a pickled job; the module of the verb is __main__ only in the original process."""
        guard_streams()
        return Job(verb, getattr(importlib.import_module(f"pulmo_jax.{verb}"), verb), call, parent)

    def __call__(self, raw: DictConfig) -> Any:
        self.composed = True
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return self.in_sweep(raw, run_dir)
        try:
            return self.task(checked(raw, command_of(self.verb, raw)), run_dir)
        except InputError as error:
            self.failures.append(str(error))
        except Exception as error:
            reason = unwritable(error, run_dir)
            if reason is None:
                raise
            hint = RESUME_HINTS.get(self.verb, "repeat the command").format(run=run_dir)
            self.failures.append(f"{reason}; finished results are kept. Make room or give another place, then {hint}")
        return None

    def in_sweep(self, raw: DictConfig, folder: Path) -> float | None:
        command, hydra_config = command_of(self.verb, raw), HydraConfig.get()
        sweep = Path(hydra_config.sweep.dir).absolute()

        def work(resume: bool) -> Any:
            config = checked(raw, command)
            again = resume and can_resume(command)
            with called(command_of_job(self.verb, hydra_config)):
                return self.task(config.model_copy(update={"resume": True}) if again else config, folder)

        def say(text: str) -> None:
            make_console().print(text)

        if any(int(os.environ.get(name, 0)) for name in RANKS):  # only the first process of a job writes the record
            return work((folder / RECORD).exists())
        request = Request(
            folder=folder,
            overrides=tuple(hydra_config.overrides.task),
            config=OmegaConf.to_yaml(OmegaConf.masked_copy(raw, [str(k) for k in raw if k not in ("hydra", "resume")])),
            call=self.call,
            resume=bool(raw.get("resume", False)),
            replay="basic_sweeper" not in hydra_config.sweeper._target_,
            kind=self.verb,
        )
        if os.getpid() == self.parent:
            objective = run_job(request, work, say)
            if time.monotonic() < SWEEP.written + PAGES_EVERY_S:
                write_tables(sweep)
            else:
                write_pages(sweep)
                SWEEP.written = time.monotonic()
            gc.collect()  # releases device memory of a failed job before the next one
            return objective
        if (sweep / STOP).exists():
            raise Stopped(signal.SIGTERM)
        with stoppable(), stepping_down(), joined(sweep):
            objective = run_job(request, work, say)
            write_tables(sweep)
        return objective


def command_of_job(verb: str, hydra_config: Any) -> str:
    """Command line that runs a job of a sweep alone."""
    own = [source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"]
    return as_typed(verb, [*(f"--config-dir={path}" for path in own), *hydra_config.overrides.task])


def can_resume(command: Command) -> bool:
    return "resume" in command.schema.model_fields


def stop_jobs(signum: int) -> None:
    """Forward a signal to the jobs of a sweep on this machine, and wait at most `PATIENCE_S` for them to end."""
    if SWEEP.folder is None:
        return
    (SWEEP.folder / STOP).touch()  # for jobs that have not started
    here = [row for row in collect(SWEEP.folder) if row.status == "running" and row.host == socket.gethostname()]
    jobs = {row.folder: row.pid for row in here if row.pid is not None and row.pid != os.getpid()}
    if jobs:
        complain(f"stopping {len(jobs)} jobs after their current step; interrupt again to stop them at once")
    for pid in jobs.values() if not (signum == signal.SIGINT and in_foreground()) else ():
        os.kill(pid, signum)
    deadline = time.monotonic() + PATIENCE_S
    while any(in_use(folder) for folder in jobs) and time.monotonic() < deadline:
        time.sleep(0.1)


def in_foreground() -> bool:
    """Whether the terminal sends Ctrl-C to the jobs directly."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def end_sweep(error: Exception | None) -> int:
    """Write the tables of a sweep, print failed jobs, and return the exit status."""
    assert SWEEP.folder is not None
    rows = collect(SWEEP.folder)
    if error is not None and (
        not rows or any(row.status != "failed" for row in rows)
    ):  # an error of the sweep, not of its jobs
        first = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')} (see {SWEEP.folder / TRACEBACK})"
        if isinstance(error, InputError | OutputError):
            first = str(error)
        else:
            with suppress(InputError, OutputError):
                write_text(SWEEP.folder / TRACEBACK, "".join(traceback.format_exception(error)))
        fail(f"the sweep was aborted: {unwritable(error, SWEEP.folder) or first}")
    if not (rows := write_pages(SWEEP.folder)):
        return 2
    done = sum(row.status == "done" for row in rows)
    make_console().print(f"{done} of {len(rows)} jobs finished; see {SWEEP.folder / 'sweep.html'}")
    if done == len(rows) and error is None:
        return 0
    for row in rows:
        if row.status != "done":
            fail(f"job {row.folder.name} {row.status}: {row.reason.splitlines()[0] if row.reason else ''}")
    complain(f"repeat these with the same command and {SWEEP.resume_keys}")
    return SOME_FAILED if done else 2


def wait_for_jobs(sweep: Path) -> None:
    """Wait for jobs that still run after the launcher has aborted."""
    quiet = time.monotonic()
    while collect(sweep) and time.monotonic() < quiet + QUIET_S:
        if any(row.status == "running" for row in collect(sweep)):
            quiet = time.monotonic()
        time.sleep(0.5)


class CheckFirst(HydraCallback):
    """Validate the config before Hydra creates the run directory, so that a typo leaves no files.

    Hydra converts exceptions in callbacks to warnings, except SystemExit.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with refusing():
            prepare_folders(config.hydra, "run")
            command = command_of(config.hydra.job.name, config)
            check_place(checked(config, command), command.verb, config.hydra)
            alone = (
                OmegaConf.select(config, "cluster.coordinator", default=None) is None
            )  # further processes join a running training
            if alone and (sentence := in_use(Path(config.hydra.run.dir))) is not None:
                raise InputError(sentence)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if OmegaConf.select(config, "hydra.sweeper.sampler.seed", default=0) is None:
            config.hydra.sweeper.sampler.seed = 0  # otherwise a search could not be resumed
        if SWEEP.folder is None:
            with refusing():
                prepare_folders(config.hydra, "sweep")
                command = command_of(config.hydra.job.name, config)
                for warning in check_sweep(config, command):
                    complain(f"warning: {warning}")
                begin_sweep(config, command)


@contextmanager
def refusing() -> Iterator[None]:
    """Exit with a message and status for errors in the command."""
    try:
        yield
    except InputError as error:
        sys.exit(fail(str(error)))
    except OutputError as error:
        sys.exit(fail(f"{error}; make room or give another place"))
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(fail(explain(error)))
    except OSError as error:
        sys.exit(fail(f"{error.filename}: cannot be written ({error.strerror})"))


def begin_sweep(config: DictConfig, command: Command) -> None:
    """Lock the folder of a sweep.

    Args:
        config: Composed config of the sweep.
        command: The command.

    Raises:
        InputError: If the folder is in use, or contains a sweep that is not to be resumed.
    """
    folder = Path(config.hydra.sweep.dir).absolute()
    if any(folder.glob(f"*/{RECORD}")) and not config.get("resume", False):
        hint = "resume=true continues it, " if can_resume(command) else ""
        raise InputError(f"{folder} already contains a sweep; {hint}hydra.sweep.dir=DIR starts a new one elsewhere")
    check_hydra(config.hydra)
    if config.get("resume", False) and is_unrecorded(folder):
        record_files(folder, "sweep")
    SWEEP.held.enter_context(output_folder(folder, "sweep"))
    adding(folder / "multirun.yaml", folder / STOP)  # written by Hydra and by `stop_jobs`
    (folder / STOP).unlink(missing_ok=True)
    SWEEP.written = time.monotonic()
    SWEEP.folder, SWEEP.queued = folder, "slurm" in config.hydra.launcher._target_.lower()
    SWEEP.resume_keys = f"hydra.sweep.dir={folder} resume=true" if can_resume(command) else "another hydra.sweep.dir"


def fail(message: str) -> int:
    complain(f"error: {message}")
    return 2
