"""Tasks: found by name, imported when a verb first needs one of their parts.

A task is a package with a `TASK`, in `pulmo_jax.tasks` or in a package that the user lists in `plugins`. Its modules
answer the Protocols below; a verb calls them in the order in which data flows, and knows no task by name.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from pulmo_jax.config.section import Section
from pulmo_jax.runs.older import TASKS as FORMER_NAMES
from pulmo_jax.runs.older import naming_version
from pulmo_jax.types import InputError

if TYPE_CHECKING:  # JAX is not imported before the config has been validated
    from rich.console import Console

    from pulmo_jax.data.images import Skipped
    from pulmo_jax.runs.place import Place
    from pulmo_jax.runs.records import Item, Outputs, Record
    from pulmo_jax.runs.report import Findings
    from pulmo_jax.runs.training import Learned, Learning

TASKS = "pulmo_jax.tasks"


@runtime_checkable
class TaskConfig(Protocol):
    """config.py: imports no JAX."""

    SECTIONS: Mapping[str, type[Section]]
    """The typed config of each verb that the task has: train, predict, evaluate, detect."""

    CHOICES: Mapping[str, Sequence[str]]
    """The choices of config groups that are for this task, where not all are."""


@runtime_checkable
class OpenRun(Protocol):
    """A finished run, ready for use."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Any: ...

    @property
    def step(self) -> int: ...

    def predict(self, image: Any) -> Any:
        """The task's result for one image, an array (H, W[, C]) or a path."""
        ...


@runtime_checkable
class Training(Protocol):
    """Interface of training.py: from data to a calibrated run."""

    def check(self, config: Any) -> None:
        """Validate the `_target_` nodes without building them. Raises InputError."""
        ...

    def prepare(self, config: Any, place: "Place") -> tuple[Any, str]:
        """Complete the config (sample data, resumed run, base run); return it with the citation of the data."""
        ...

    def read(self, config: Any, place: "Place") -> Any:
        """List, split and read the data."""
        ...

    def learning(self, config: Any, data: Any, place: "Place") -> "Learning":
        """Input of the training loop: state, step, batches, validation."""
        ...

    def records(self, config: Any, data: Any) -> Mapping[str, Any]:
        """JSON files by name that describe the data of the run."""
        ...

    def finish(self, config: Any, data: Any, learned: "Learned", place: "Place") -> Any:
        """Calibrate, and write the files that are read on opening; return the input of `assess`."""
        ...

    def assess(self, outcome: Any, data: Any, learned: "Learned", place: "Place") -> "Findings":
        """Report of the finished training."""
        ...


@runtime_checkable
class Runs(Protocol):
    """Interface of run.py: opening of run directories."""

    SEALED: Sequence[str]
    """Files that are read on opening, in addition to the checkpoint."""

    def open_run(self, path: Path, plugins: tuple[str, ...] = ()) -> OpenRun:
        """Open a finished run. Raises InputError if it is not finished or has changed since training."""
        ...


@runtime_checkable
class Prediction(Protocol):
    """Interface of prediction.py: results and a record for each new image."""

    def read(self, run: Any, config: Any, place: "Place") -> tuple[Sequence["Item"], Sequence["Skipped"]]:
        """List the items to predict, and unreadable files."""
        ...

    def predict(
        self, run: Any, items: Sequence["Item"], config: Any, place: "Place"
    ) -> Iterator[tuple["Item", "Record | Skipped"]]:
        """Write the outputs of every item; yield its record, or the reason of its failure."""
        ...

    def collect(
        self,
        run: Any,
        items: Sequence["Item"],
        records: Sequence["Record"],
        failed: Sequence["Skipped"],
        config: Any,
        place: "Place",
    ) -> "Outputs":
        """Tables of all finished items."""
        ...


@runtime_checkable
class Assessment(Protocol):
    """Interface of assessment.py: evaluation on labelled images."""

    def read_test(self, run: Any, config: Any, place: "Place") -> Any: ...

    def assess(self, run: Any, data: Any, config: Any, place: "Place") -> "Findings": ...


@runtime_checkable
class Detection(Protocol):
    """Interface of detection.py: a search without training."""

    def detect(self, config: Any, place: "Place") -> int:
        """Search; write maps, tables and report; return the number of sources."""
        ...

    def detect_arrays(
        self, given: Mapping[str, Any], compose: Callable[[dict[str, str]], Any], console: "Console"
    ) -> Any:
        """Search a stack of arrays without output files."""
        ...


class Task:
    """A task, whose modules are imported on first use.

    Args:
        package: Dotted name of the task's package, its `__name__`.
    """

    def __init__(self, package: str):
        self.package = package

    @property
    def name(self) -> str:
        return self.package.rpartition(".")[2]

    @property
    def config(self) -> TaskConfig:
        return cast(TaskConfig, self._part("config"))

    @property
    def training(self) -> Training:
        return cast(Training, self._part("training"))

    @property
    def runs(self) -> Runs:
        return cast(Runs, self._part("run"))

    @property
    def prediction(self) -> Prediction:
        return cast(Prediction, self._part("prediction"))

    @property
    def assessment(self) -> Assessment:
        return cast(Assessment, self._part("assessment"))

    @property
    def detection(self) -> Detection:
        return cast(Detection, self._part("detection"))

    def open_run(self, path: Path, plugins: tuple[str, ...] = ()) -> OpenRun:
        """`runs.open_run`, whose errors say which version made the run, if it is another one."""
        with naming_version(path):
            return self.runs.open_run(path, plugins)

    def section(self, verb: str) -> type[Section]:
        """Typed config of a verb.

        Args:
            verb: Name of the verb.

        Returns:
            Class of the config.

        Raises:
            InputError: If the task does not support the verb.
        """
        sections = self.config.SECTIONS
        if verb not in sections:
            raise InputError(f"task={self.name}: has no {verb}; it has {', '.join(sections)}")
        return sections[verb]

    def _part(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


def find_task(name: str, plugins: Sequence[str] = ()) -> Task:
    """Find a task: `pulmo_jax.tasks.NAME`, `PLUGIN.tasks.NAME`, or a plugin called NAME.

    Args:
        name: Name of the task.
        plugins: User packages.

    Returns:
        The task.

    Raises:
        InputError: If there is no such task.
    """
    name = FORMER_NAMES.get(name, name)
    places = [f"{TASKS}.{name}", *(f"{plugin}.tasks.{name}" for plugin in plugins)]
    places += [plugin for plugin in plugins if plugin.rpartition(".")[2] == name]
    for package in places if name.isidentifier() else []:
        if is_package(package):
            task = getattr(importlib.import_module(package), "TASK", None)
            if not isinstance(task, Task):
                raise InputError(f"task={name}: {package} has no TASK = Task(__name__), of pulmo_jax.runs.task.Task")
            return task
    raise InputError(
        f"task={name}: does not exist; tasks: {', '.join(task_names())}, and those of plugins={list(plugins)}; "
        "if it is yours, add plugins=[PACKAGE]"
    )


def is_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package does not exist
        return False


def task_names() -> list[str]:
    """Names of the tasks in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(TASKS).__path__))
