"""Tasks and the Protocols that their modules implement.

A task is a package that defines `TASK`. It lies in `pulmo_jax.tasks` or in a package listed in `plugins`. `find_task`
finds it by name; its modules are imported on first use. Each verb calls the functions of one Protocol below in the
order of the data flow, and is independent of the task. Arguments that the functions share:

- `config`: typed config of the verb; after `Training.prepare`, the completed one.
- `place`: output folder and console.
- `run`: the opened run.
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
    import numpy as np

    from pulmo_jax.data.images import Skipped
    from pulmo_jax.evaluation.paired import Scored
    from pulmo_jax.host.console import Console
    from pulmo_jax.runs.comparison import EvaluatedImage
    from pulmo_jax.runs.place import Place
    from pulmo_jax.runs.records import Item, Outputs, Record
    from pulmo_jax.runs.report import Findings
    from pulmo_jax.runs.training import Learned, Learning

TASKS = "pulmo_jax.tasks"


@runtime_checkable
class TaskConfig(Protocol):
    """Interface of config.py: typed configs of the verbs. The module must not import JAX."""

    SECTIONS: Mapping[str, type[Section]]
    """The typed config of each verb that the task has: train, predict, evaluate, sample, detect, prepare."""

    CHOICES: Mapping[str, Sequence[str]]
    """The choices of config groups that are for this task, where not all are."""


@runtime_checkable
class OpenRun(Protocol):
    """A finished run that is loaded for inference."""

    @property
    def path(self) -> Path:
        """Run directory."""
        ...

    @property
    def config(self) -> Any:
        """Typed config of the training."""
        ...

    @property
    def step(self) -> int:
        """Step of the checkpoint that the calibration belongs to."""
        ...

    @property
    def weights(self) -> Sequence[Any]:
        """Parameters of each network, or of the one model that was fitted: trees of arrays."""
        ...

    def predict(self, image: Any) -> Any:
        """Predict one image.

        Args:
            image: Array (H, W[, C]) or path of an image file.

        Returns:
            The prediction, of a type defined by the task.
        """
        ...


@runtime_checkable
class Training(Protocol):
    """Interface of training.py: from the data to a calibrated run. The verb calls the functions in this order."""

    def check(self, config: Any) -> None:
        """Validate the `_target_` nodes of a config without building them.

        Raises:
            InputError: If a node is invalid.
        """
        ...

    def prepare(self, config: Any, place: "Place") -> tuple[Any, str]:
        """Complete the config from the sample data, the run to resume or the base run.

        Returns:
            Completed config, and the citation of the data or "".
        """
        ...

    def read(self, config: Any, place: "Place") -> Any:
        """List, split and read the data.

        Returns:
            The data, of a type defined by the task.
        """
        ...

    def learning(self, config: Any, data: Any, place: "Place") -> "Learning":
        """Build the input of the training loop: initial state, step, batches and validation loss.

        Args:
            data: Result of `read`.

        Returns:
            Input of the training loop.
        """
        ...

    def records(self, config: Any, data: Any) -> Mapping[str, Any]:
        """Describe the data of the run, such as its split, in JSON files.

        Args:
            data: Result of `read`.

        Returns:
            Content by file name.
        """
        ...

    def finish(self, config: Any, data: Any, learned: "Learned", place: "Place") -> Any:
        """Calibrate the trained model and write the files that `open_run` reads.

        Args:
            data: Result of `read`.
            learned: Outcome of the training loop.

        Returns:
            Input of `assess`.
        """
        ...

    def assess(self, outcome: Any, data: Any, learned: "Learned", place: "Place") -> "Findings":
        """Assess the calibrated model on the validation data.

        Args:
            outcome: Result of `finish`.
            data: Result of `read`.
            learned: Outcome of the training loop.

        Returns:
            Content of the training report.
        """
        ...


@runtime_checkable
class Runs(Protocol):
    """Interface of run.py: opens run directories."""

    SEALED: Sequence[str]
    """Files that are read on opening, in addition to the checkpoint."""

    def open_run(self, path: Path, plugins: tuple[str, ...] = ()) -> OpenRun:
        """Load a finished run for inference.

        Args:
            path: Run directory.
            plugins: Packages that may be imported.

        Returns:
            The opened run.

        Raises:
            InputError: If the run is not finished or has changed since training.
        """
        ...


@runtime_checkable
class Prediction(Protocol):
    """Interface of prediction.py: predictions and one record for each new image."""

    def read(self, run: Any, config: Any, place: "Place") -> tuple[Sequence["Item"], Sequence["Skipped"]]:
        """List the items to predict.

        Returns:
            Items, and the files that cannot be read.
        """
        ...

    def predict(
        self, run: Any, items: Sequence["Item"], config: Any, place: "Place"
    ) -> Iterator[tuple["Item", "Record | Skipped"]]:
        """Predict items and write their output files.

        Args:
            items: Items without an up-to-date record.

        Yields:
            Each item with its record, or with the reason of its failure.
        """
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
        """Compile the tables and the summary of all finished items.

        Args:
            items: Finished items.
            records: Their records, in the same order.
            failed: Failed files.

        Returns:
            Tables, summary.json and console message.
        """
        ...


@runtime_checkable
class Assessment(Protocol):
    """Interface of assessment.py: evaluation on labelled test images."""

    def read_test(self, run: Any, config: Any, place: "Place") -> Any:
        """Read the labelled test images.

        Returns:
            The test data, of a type defined by the task.
        """
        ...

    def assess(self, run: Any, data: Any, config: Any, place: "Place") -> "Findings":
        """Evaluate a run on the test data.

        Args:
            data: Result of `read_test`.

        Returns:
            Content of the evaluation report.
        """
        ...


@runtime_checkable
class Comparison(Protocol):
    """Interface of comparison.py, which a task may lack: the results that evaluations stored, for comparisons."""

    TITLES: Mapping[str, str]
    """Figures of merit in the order in which they are shown, with their titles."""

    def scored(
        self, results: Mapping[str, Any], images: "Sequence[EvaluatedImage]", rows: "np.ndarray"
    ) -> "Mapping[str, Scored]":
        """Results of each method for some images.

        Args:
            results: Results that the assessment stored, from evaluated_images.json.
            images: All images of the evaluation.
            rows: The images to be compared.

        Returns:
            Results by method, the run first, then trivial baselines.
        """
        ...


@runtime_checkable
class Detection(Protocol):
    """Interface of detection.py: source detection without training."""

    def detect(self, config: Any, place: "Place") -> int:
        """Search the images of the config; write maps, tables and report.

        Returns:
            Number of sources.
        """
        ...

    def detect_arrays(
        self, given: Mapping[str, Any], compose: Callable[[dict[str, str]], Any], console: "Console"
    ) -> Any:
        """Search a stack given as arrays or paths, without output files.

        Args:
            given: Arrays, paths or None, by name.
            compose: Composes the typed config from overrides (key to path).
            console: For progress.

        Returns:
            The result, of a type defined by the task.
        """
        ...


@runtime_checkable
class Preparation(Protocol):
    """Interface of preparation.py, which a task may lack: makes raw data ready for `detect`."""

    def prepare(self, config: Any, place: "Place") -> None:
        """Read, correct and write the data, with tables and report."""
        ...


@runtime_checkable
class Sampling(Protocol):
    """Interface of sampling.py, which a task may lack: draws images from a model of normal images."""

    def sample(self, run: Any, config: Any, place: "Place") -> None:
        """Draw images, and write them with a report.

        Raises:
            InputError: If the method of the run cannot draw images.
        """
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
        """Name of the task: the last part of the package name."""
        return self.package.rpartition(".")[2]

    @property
    def config(self) -> TaskConfig:
        """Module config.py of the task."""
        return cast(TaskConfig, self._part("config"))

    @property
    def training(self) -> Training:
        """Module training.py of the task."""
        return cast(Training, self._part("training"))

    @property
    def runs(self) -> Runs:
        """Module run.py of the task."""
        return cast(Runs, self._part("run"))

    @property
    def prediction(self) -> Prediction:
        """Module prediction.py of the task."""
        return cast(Prediction, self._part("prediction"))

    @property
    def assessment(self) -> Assessment:
        """Module assessment.py of the task."""
        return cast(Assessment, self._part("assessment"))

    @property
    def comparison(self) -> Comparison:
        """Module comparison.py of the task. Raises InputError if there is none."""
        if not is_package(f"{self.package}.comparison"):
            raise InputError(f"task={self.name}: its runs cannot be compared")
        return cast(Comparison, self._part("comparison"))

    @property
    def detection(self) -> Detection:
        """Module detection.py of the task."""
        return cast(Detection, self._part("detection"))

    @property
    def preparation(self) -> Preparation:
        """Module preparation.py of the task."""
        return cast(Preparation, self._part("preparation"))

    @property
    def sampling(self) -> Sampling:
        """Module sampling.py of the task."""
        return cast(Sampling, self._part("sampling"))

    def open_run(self, path: Path, plugins: tuple[str, ...] = ()) -> OpenRun:
        """Load a finished run for inference (`Runs.open_run`).

        Args:
            path: Run directory.
            plugins: Packages that may be imported.

        Returns:
            The opened run.

        Raises:
            InputError: If the run cannot be opened; the message names the version that made it, if it is another one.
        """
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
        """Import a module of the task's package."""
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
    """Whether a module or package of this name can be found."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package does not exist
        return False


def task_names() -> list[str]:
    """Names of the tasks in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(TASKS).__path__))
