"""The shell of every verb: Hydra composes, `config` judges, errors are one message and an exit status.

Exit statuses: 0 done, 1 a fault of the program (with a traceback), 2 something given cannot be used or nothing came of
it, 3 some files or jobs failed, 128 and the signal's number (130 SIGINT, 138 SIGUSR1, 143 SIGTERM) stopped by it.
"""

import gc
import importlib
import os
import re
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
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pulmo_jax import __version__
from pulmo_jax.host.console import SOME_FAILED, make_console
from pulmo_jax.host.lock import claim, in_use
from pulmo_jax.host.signals import Stopped, stepping_down, stoppable
from pulmo_jax.shell.composing import (
    Command,
    checked,
    command_line,
    command_of,
    defaults_of,
    explain,
    foreign_experiment,
    package_configs,
    print_help,
)
from pulmo_jax.shell.sweep import (
    JOB_LOCK,
    RECORD,
    STOP,
    TRACEBACK,
    Request,
    bury,
    collect,
    disk_full,
    run_job,
    write_pages,
    write_tables,
)
from pulmo_jax.types import InputError

BROKEN_PIPE = 141
PATIENCE_S = 60.0  # for jobs in other processes, that were asked to stop, to end their step
QUIET_S = 10.0  # without a running job, after which none is about to begin either
PAGES_EVERY_S = 30.0  # the figure takes a second, which some jobs take too
CHECKED_AHEAD = 64  # combinations of a sweep that are judged before the first job begins
RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "SUBMITIT_LOCAL_GLOBALID")
GO_ON = {
    "train": "resume with resume=true hydra.run.dir={run}",
    "predict": "repeat the command to resume",
}


@dataclass
class Sweep:
    """The sweep that this process has begun: its folder, the hold on it, and what it is gone on with by."""

    folder: Path | None
    held: ExitStack
    go_on: str = ""
    written: float = 0.0  # when, of the pages
    queued: bool = False  # jobs wait in a scheduler's queue, where this process does not see them


SWEEP = Sweep(None, ExitStack())  # Hydra builds the callback that begins it, and `main` ends it


def main(verb: str, task: Callable[[Any, Path], Any], examples: str) -> None:
    """Run `task(config, run_dir)` for the command line; does not return unless all went well."""
    try:
        with stoppable(stop_jobs):
            status = run(verb, task, examples)
    except Stopped as stop:
        name = signal.Signals(stop.signum).name
        print("interrupted" if stop.signum == signal.SIGINT else f"stopped by {name}", file=sys.stderr)
        status = 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    if status:
        sys.exit(status)


def run(verb: str, task: Callable[[Any, Path], Any], examples: str) -> int:
    """The exit status. Faults of the program are raised, and whatever is no Exception."""
    job = Job(verb, task, call=f"{time.time_ns()}-{os.getpid()}", parent=os.getpid())
    if "--version" in sys.argv[1:]:
        print(__version__)
        return 0
    if any(argument.startswith("--e") for argument in sys.argv[1:]):  # Hydra takes abbreviations
        return fail(
            "--experimental-rerun is not allowed, because unpickling a file may execute any code; give the keys again"
        )
    if (foreign := foreign_experiment(verb, sys.argv[1:])) is not None:
        return fail(foreign)
    sys.argv[1:] = [re.sub(r"^output\.aligned=", "aligned=", argument) for argument in sys.argv[1:]]
    try:
        command = command_line(verb, sys.argv[1:])
    except InputError as error:
        return fail(str(error))
    ConfigStore.instance().store(name=f"{command.primary}_defaults", node=defaults_of(command.schema))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and this module alone decides what a person sees
    with ExitStack() as SWEEP.held:
        SWEEP.folder = None
        try:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print_help(command, examples)
            else:
                launch(command.primary, job)
            sys.stdout.flush()
            return end_sweep(None) if SWEEP.folder else fail(job.failures[-1]) if job.failures else 0
        except Exception as error:
            return end_sweep(error) if SWEEP.folder else status_of(error, job, command)
        except BaseException:
            if SWEEP.folder and write_pages(SWEEP.folder):
                print(f"resume with the same command and {SWEEP.go_on}", file=sys.stderr)
            raise


def launch(primary: str, job: "Job") -> None:
    """Call Hydra; and again, for the rest of a sweep, if its launcher gave up over a job that was killed."""
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
            print(f"killed: jobs {', '.join(killed)}; continuing with the other jobs", file=sys.stderr)
            folder = str(SWEEP.folder).replace("\\", "\\\\").replace("'", "\\'")
            sys.argv = [*arguments, f"hydra.sweep.dir='{folder}'"]
        finally:
            sys.argv = arguments


def status_of(error: Exception, job: "Job", command: Command) -> int:
    """What a run that is no sweep ends with; a fault of the program is raised again."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return fail(explain(error, command))
    if isinstance(error, BrokenPipeError) and not job.composed:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains on leaving
        return BROKEN_PIPE
    if not job.composed and (full := disk_full(error, Path())):
        return fail(full)
    if not job.composed and isinstance(error, OSError):
        return fail(f"{error.filename}: cannot be written ({error.strerror}); give another hydra.run.dir")
    if not job.composed and isinstance(error, ValueError):
        return fail(explain(error, command))  # what Hydra raises for a group set to null
    raise error


class Job:
    """What Hydra calls with the config of a run, here or, for a job of a sweep, in another process.

    call names the call of the program, parent its process.
    """

    def __init__(self, verb: str, task: Callable[[Any, Path], Any], call: str, parent: int):
        self.verb, self.task, self.call, self.parent = verb, task, call, parent
        self.composed, self.failures = False, []

    def __reduce__(self) -> tuple[Any, ...]:
        return Job._elsewhere, (self.verb, self.call, self.parent)

    @staticmethod
    def _elsewhere(verb: str, call: str, parent: int) -> "Job":
        """Launchers pickle jobs. The verb's module is __main__ where it was started, and has a name elsewhere."""
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
            full = disk_full(error, run_dir)
            if full is None:
                raise
            hint = GO_ON.get(self.verb, "repeat the command").format(run=run_dir)
            self.failures.append(f"{full}; finished results are kept. Free disk space, then {hint}")
        return None

    def in_sweep(self, raw: DictConfig, folder: Path) -> float | None:
        command, hydra_config = command_of(self.verb, raw), HydraConfig.get()
        sweep = Path(hydra_config.sweep.dir).absolute()

        def work(resume: bool) -> Any:
            config = checked(raw, command)
            again = resume and can_resume(command)
            return self.task(config.model_copy(update={"resume": True}) if again else config, folder)

        def say(text: str) -> None:
            make_console().print(text, highlight=False, markup=False)

        if any(int(os.environ.get(name, 0)) for name in RANKS):  # of one job's processes the first keeps the record
            return work((folder / RECORD).exists())
        request = Request(
            folder=folder,
            overrides=tuple(hydra_config.overrides.task),
            config=OmegaConf.to_yaml(OmegaConf.masked_copy(raw, [str(k) for k in raw if k not in ("hydra", "resume")])),
            call=self.call,
            resume=bool(raw.get("resume", False)),
            replay="basic_sweeper" not in hydra_config.sweeper._target_,
        )
        if os.getpid() == self.parent:
            objective = run_job(request, work, say)
            if time.monotonic() < SWEEP.written + PAGES_EVERY_S:
                write_tables(sweep)
            else:
                write_pages(sweep)
                SWEEP.written = time.monotonic()
            gc.collect()  # what a failed job held on the device goes before the next one comes
            return objective
        if (sweep / STOP).exists():
            raise Stopped(signal.SIGTERM)
        with stoppable(), stepping_down():
            objective = run_job(request, work, say)
        write_tables(sweep)
        return objective


def can_resume(command: Command) -> bool:
    return "resume" in command.schema.model_fields


def stop_jobs(signum: int) -> None:
    """Pass a signal on to the sweep's jobs in other processes of this machine, and wait until they have ended."""
    if SWEEP.folder is None:
        return
    (SWEEP.folder / STOP).touch()  # for those that have not begun
    here = [row for row in collect(SWEEP.folder) if row.status == "running" and row.host == socket.gethostname()]
    jobs = {row.folder: row.pid for row in here if row.pid is not None and row.pid != os.getpid()}
    if jobs:
        print(
            f"stopping {len(jobs)} jobs after their current step; interrupt again to stop them at once", file=sys.stderr
        )
    for pid in jobs.values() if not (signum == signal.SIGINT and in_foreground()) else ():
        os.kill(pid, signum)
    deadline = time.monotonic() + PATIENCE_S
    while any(in_use(folder, JOB_LOCK) for folder in jobs) and time.monotonic() < deadline:
        time.sleep(0.1)


def in_foreground() -> bool:
    """Whether a Ctrl-C of the terminal reaches the jobs by itself."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def end_sweep(error: Exception | None) -> int:
    """The tables of the whole sweep, and its exit status from what the jobs' folders say."""
    assert SWEEP.folder is not None
    rows = collect(SWEEP.folder)
    if error is not None and (not rows or any(row.status != "failed" for row in rows)):  # not the jobs' own failures
        first = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')} (see {SWEEP.folder / TRACEBACK})"
        with suppress(OSError):
            (SWEEP.folder / TRACEBACK).write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        fail(f"the sweep was aborted: {disk_full(error, SWEEP.folder) or first}")
    if not (rows := write_pages(SWEEP.folder)):
        return 2
    done = sum(row.status == "done" for row in rows)
    make_console().print(f"{done} of {len(rows)} jobs finished; see {SWEEP.folder / 'sweep.html'}", highlight=False)
    if done == len(rows) and error is None:
        return 0
    for row in rows:
        if row.status != "done":
            fail(f"job {row.folder.name} {row.status}: {row.reason.splitlines()[0] if row.reason else ''}")
    print(f"repeat these with the same command and {SWEEP.go_on}", file=sys.stderr)
    return SOME_FAILED if done else 2


def wait_for_jobs(sweep: Path) -> None:
    """Until those end that a launcher has left running by giving up on another one."""
    quiet = time.monotonic()
    while collect(sweep) and time.monotonic() < quiet + QUIET_S:
        if any(row.status == "running" for row in collect(sweep)):
            quiet = time.monotonic()
        time.sleep(0.5)


class CheckFirst(HydraCallback):
    """Judges the config before Hydra makes the run directory, so that a typo leaves nothing behind.

    Hydra turns what a callback raises into a warning, all but SystemExit.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with refusing():
            checked(config, command_of(config.hydra.job.name, config))
            alone = (
                OmegaConf.select(config, "cluster.coordinator", default=None) is None
            )  # else helpers join a live run
            if alone and (sentence := in_use(Path(config.hydra.run.dir))) is not None:
                raise InputError(sentence)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if OmegaConf.select(config, "hydra.sweeper.sampler.seed", default=0) is None:
            config.hydra.sweeper.sampler.seed = 0  # or a search could not be gone on with
        if SWEEP.folder is None:
            with refusing():
                command = command_of(config.hydra.job.name, config)
                for warning in judge_sweep(config, command):
                    print(f"warning: {warning}", file=sys.stderr)
                begin_sweep(config, command)


@contextmanager
def refusing() -> Iterator[None]:
    """What is wrong with the command ends the program, with its message and status."""
    try:
        yield
    except InputError as error:
        sys.exit(fail(str(error)))
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(fail(explain(error)))
    except OSError as error:
        sys.exit(fail(f"{error.filename}: cannot be written ({error.strerror})"))


def judge_sweep(config: DictConfig, command: Command) -> list[str]:
    """What is wrong with some of the combinations. Raises what is wrong with all of them, before any job begins."""
    loader, faults = GlobalHydra.instance().config_loader(), []
    combinations, whole = examples_of(config)
    for overrides in combinations:
        try:
            checked(loader.load_sweep_config(config, list(overrides)), command)
        except (InputError, HydraException, OmegaConfBaseException) as error:
            text = str(error) if isinstance(error, InputError) else explain(error, command)
            faults.append((" ".join(overrides), text, error))
    if faults and (len(faults) == len(combinations) or not isinstance(faults[0][2], InputError)):
        raise InputError(faults[0][1]) from faults[0][2]
    return [f"{overrides}: {text.splitlines()[0]}" for overrides, text, _ in faults] if whole else []


def examples_of(config: DictConfig) -> tuple[list[list[str]], bool]:
    """Combinations that the sweep will come to, and whether they are all; else the two corners of its space."""
    params = config.hydra.sweeper.get("params") or {}
    overrides = OverridesParser.create().parse_overrides(
        [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    )
    if config.hydra.sweeper._target_ == BasicSweeperConf._target_:
        combinations = [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
        return combinations[:CHECKED_AHEAD], len(combinations) <= CHECKED_AHEAD
    return [[corner(override, last) for override in overrides] for last in (False, True)], False


def corner(override: Override, last: bool) -> str:
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.end if last else value.start}"
    if override.is_sweep_override():
        return f"{override.get_key_element()}={list(override.sweep_string_iterator())[-1 if last else 0]}"
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def begin_sweep(config: DictConfig, command: Command) -> None:
    """Hold the sweep's folder. Raises InputError if it is taken, or holds jobs that must not be gone on with."""
    folder = Path(config.hydra.sweep.dir).absolute()
    if any(folder.glob(f"*/{RECORD}")) and not config.get("resume", False):
        hint = "resume=true continues it, " if can_resume(command) else ""
        raise InputError(f"{folder} already contains a sweep; {hint}hydra.sweep.dir=DIR starts a new one elsewhere")
    SWEEP.held.enter_context(claim(folder))
    (folder / STOP).unlink(missing_ok=True)
    SWEEP.written = time.monotonic()
    SWEEP.folder, SWEEP.queued = folder, "slurm" in config.hydra.launcher._target_.lower()
    SWEEP.go_on = f"hydra.sweep.dir={folder} resume=true" if can_resume(command) else "another hydra.sweep.dir"


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
