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
    """training.py: from data to a calibrated run."""

    def check(self, config: Any) -> None:
        """Validates the `_target_` nodes without building them. Raises InputError."""
        ...

    def prepare(self, config: Any, place: "Place") -> tuple[Any, str]:
        """The config with its data (sample data, those of a resumed run, a base run), and the citation they ask for."""
        ...

    def read(self, config: Any, place: "Place") -> Any:
        """Lists, splits and reads the data."""
        ...

    def learning(self, config: Any, data: Any, place: "Place") -> "Learning":
        """What the loop needs: state, step, batches, validation."""
        ...

    def records(self, config: Any, data: Any) -> Mapping[str, Any]:
        """JSON files, by name, that describe what the run is made with."""
        ...

    def finish(self, config: Any, data: Any, learned: "Learned", place: "Place") -> Any:
        """Calibrates, and writes the files that the run is opened from; returns what `assess` needs of it."""
        ...

    def assess(self, outcome: Any, data: Any, learned: "Learned", place: "Place") -> "Findings":
        """The report of the training that has just ended."""
        ...


@runtime_checkable
class Runs(Protocol):
    """run.py: a run directory, opened."""

    SEALED: Sequence[str]
    """Files, beside the checkpoint, that a finished run is opened from."""

    def open_run(self, path: Path, plugins: tuple[str, ...] = ()) -> OpenRun:
        """Raises InputError if it is not finished, or not as training wrote it."""
        ...


@runtime_checkable
class Prediction(Protocol):
    """prediction.py: results for new images, a record for each."""

    def read(self, run: Any, config: Any, place: "Place") -> tuple[Sequence["Item"], Sequence["Skipped"]]:
        """The items to predict, and the files that cannot be read."""
        ...

    def predict(
        self, run: Any, items: Sequence["Item"], config: Any, place: "Place"
    ) -> Iterator[tuple["Item", "Record | Skipped"]]:
        """Writes the outputs of every item; yields its record, or why there is none."""
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
        """The tables of all finished items together."""
        ...


@runtime_checkable
class Assessment(Protocol):
    """assessment.py: a run on labelled images."""

    def read_test(self, run: Any, config: Any, place: "Place") -> Any: ...

    def assess(self, run: Any, data: Any, config: Any, place: "Place") -> "Findings": ...


@runtime_checkable
class Detection(Protocol):
    """detection.py: a search that needs no training."""

    def detect(self, config: Any, place: "Place") -> int:
        """Writes maps, tables and the report; returns the number of sources found."""
        ...

    def detect_arrays(
        self, given: Mapping[str, Any], compose: Callable[[dict[str, str]], Any], console: "Console"
    ) -> Any:
        """Searches a stack of arrays; writes nothing."""
        ...


class Task:
    """The parts of a task, each imported on first use.

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
        """The typed config of a verb.

        Raises:
            InputError: The task has no such verb.
        """
        sections = self.config.SECTIONS
        if verb not in sections:
            raise InputError(f"task={self.name}: has no {verb}; it has {', '.join(sections)}")
        return sections[verb]

    def _part(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


def find_task(name: str, plugins: Sequence[str] = ()) -> Task:
    """The task called `name`: ours, or that of a plugin, `PLUGIN.tasks.NAME` or a plugin of that name itself.

    Raises:
        InputError: No such task is there.
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
    except ModuleNotFoundError:  # of a parent package
        return False


def task_names() -> list[str]:
    """The tasks of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(TASKS).__path__))
