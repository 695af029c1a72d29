"""What an evaluation stores for comparisons (evaluated_images.json), and which images several evaluations share."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import TypeAdapter, ValidationError

from pulmo_jax.data.contents import content_of
from pulmo_jax.data.images import ImageRef
from pulmo_jax.host.console import printable
from pulmo_jax.host.reading import read_json
from pulmo_jax.types import InputError

STORED = "evaluated_images.json"
FORMAT = 1
SHOWN = 3  # images in a message
POINT_PX = 0.05  # largest difference in a coordinate of the same point: that of a table in px with one decimal


@dataclass(frozen=True)
class EvaluatedImage:
    """A labelled image of an evaluation.

    Attributes:
        name: File name relative to its folder, with the page if there are several.
        content: SHA-256 of the file.
        label: Class.
        truth: SHA-256 of further ground truth, such as a mask or landmarks; "" if there is none.
        group: Group, such as the patient.
        points: True landmarks (y, x), px; None where unknown; empty for other tasks and in files of older versions.
    """

    name: str
    content: str
    label: str
    truth: str
    group: str
    points: tuple[tuple[float | None, float | None], ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Content of evaluated_images.json.

    Attributes:
        format: Version of the format.
        task: Name of the task.
        name: Name of the run (config: name).
        run: Run directory.
        seconds_per_image: Time to read and predict an image, with the trivial baselines, s.
        images: Images that were evaluated.
        results: Results by image, of a form defined by the task.
        sample: First line of a report on sample data; "" for other data.
    """

    format: Literal[1]
    task: str
    name: str
    run: Path
    seconds_per_image: float | None
    images: tuple[EvaluatedImage, ...]
    results: dict[str, Any]
    sample: str = ""

    def as_json(self) -> dict[str, Any]:
        """Content of the file."""
        return {**asdict(self), "run": str(self.run)}


def describe_evaluation(
    run: Any, images: Sequence[EvaluatedImage], results: Mapping[str, Any], seconds: float | None
) -> Evaluation:
    """Describe an evaluation for later comparisons.

    Args:
        run: Opened run.
        images: Images that were evaluated.
        results: Results by image, JSON values.
        seconds: Time for reading and predicting all images, s; None if unknown.

    Returns:
        Content of evaluated_images.json.
    """
    each = None if seconds is None else round(seconds / max(len(images), 1), 6)
    return Evaluation(FORMAT, run.config.task, run.config.name, run.path.absolute(), each, tuple(images), dict(results))


def json_values(array: Float[np.ndarray, "..."]) -> Any:
    """Nested lists of numbers; None where undefined, as JSON has no NaN."""
    return np.where(np.isfinite(array), array.astype(object), np.array(None, object)).tolist()


def contents_of(refs: Sequence[ImageRef]) -> list[str]:
    """SHA-256 of the file of each image; each file is read once."""
    digests = {path: content_of(path) for path in dict.fromkeys(ref.path for ref in refs)}
    return [str((digests[ref.path] or [0, ""])[1]) for ref in refs]


def read_evaluation(folder: Path) -> Evaluation:
    """Read the results of an evaluation.

    Args:
        folder: Folder that `evaluate` wrote, or the directory of a run that was trained with labelled images.

    Returns:
        Content of evaluated_images.json.

    Raises:
        InputError: If there are no such results, or they are not valid.
    """
    try:
        content = read_json(folder / STORED, inside=folder)
    except OSError:
        raise InputError(f"{folder}: has no {STORED}; {advice(folder)}") from None
    try:
        return TypeAdapter(Evaluation).validate_python(content, strict=False)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{folder / STORED}: is not valid ({where}); evaluate the run again") from None


@dataclass(frozen=True)
class Matched:
    """Evaluations of the same task, and the images that are compared.

    Attributes:
        evaluations: The evaluations.
        rows: For each evaluation, the rows of the compared images, in the order of the first evaluation.
        notes: Notes for the report.
    """

    evaluations: list[Evaluation]
    rows: list[Int[np.ndarray, "M"]]
    notes: list[str]

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.evaluations[0].task


def read_matched(folders: Sequence[Path], which: Literal["same", "common"]) -> Matched:
    """Read several evaluations of a task and match their images.

    Args:
        folders: Folders of the evaluations.
        which: See `common_rows`.

    Returns:
        The evaluations.

    Raises:
        InputError: If one cannot be read, the tasks differ, or the images do.
    """
    evaluations = [read_evaluation(folder) for folder in folders]
    first = evaluations[0].task
    for folder, evaluation in zip(folders, evaluations, strict=True):
        if evaluation.task != first:
            raise InputError(
                f"{folder} is of task={evaluation.task:.40}, {folders[0]} of task={first:.40}; only runs of the same "
                "task can be compared"
            )
    return Matched(evaluations, *common_rows(folders, evaluations, which))


def advice(folder: Path) -> str:
    """What to give instead of a folder without results."""
    found = sorted(path.parent for path in folder.glob(f"evaluation/*/{STORED}"))
    if found:
        return f"give an evaluation of this run, such as {found[-1]}"
    if (folder / "config.yaml").is_file():
        return f"evaluate it first: python -m pulmo_jax.evaluate run={folder} data.test=..."
    if (folder / "metrics.json").is_file():
        return "an older version wrote this evaluation; evaluate the run again"
    return "give folders that evaluate wrote, or directories of runs that were trained with labelled images"


def common_rows(
    folders: Sequence[Path], evaluations: Sequence[Evaluation], which: Literal["same", "common"]
) -> tuple[list[Int[np.ndarray, "M"]], list[str]]:
    """Match the images of several evaluations.

    Args:
        folders: Their folders, for messages.
        evaluations: The evaluations.
        which: "same": all must have the same images; "common": only the images that all of them have are compared.

    Returns:
        For each evaluation, the rows of the compared images, in the order of the first evaluation; and notes.

    Raises:
        InputError: If images differ, or none are common.
    """
    tables = [{image.name: image for image in evaluation.images} for evaluation in evaluations]
    for folder, table, evaluation in zip(folders, tables, evaluations, strict=True):
        if len(table) != len(evaluation.images):
            raise InputError(f"{folder / STORED}: is not valid (images); evaluate the run again")
    first, *others = tables
    differing = [differences(first, other) for other in others]
    for folder, found in zip(folders[1:], differing, strict=True):
        if found and which == "same":
            raise InputError(
                f"{folder} and {folders[0]} were not evaluated on the same images: {'; '.join(found)}; evaluate both "
                "on the same images, or compare only those that agree with images=common"
            )
    names = [name for name in first if all(agree(first[name], other.get(name)) for other in others)]
    if not names:
        raise InputError("images=common: no image has the same name, content and label in all evaluations")
    notes = [f"{folder}: {'; '.join(found)}." for folder, found in zip(folders[1:], differing, strict=True) if found]
    if notes:
        notes.insert(0, f"Only the {len(names)} of {len(first)} images that agree in all evaluations are compared.")
    for folder, other in zip(folders[1:], others, strict=True):
        if any(first[name].group != other[name].group for name in names):
            notes.append(f"{folder} has other groups of images than {folders[0]}; those of the latter are used.")
    positions = [{image.name: row for row, image in enumerate(evaluation.images)} for evaluation in evaluations]
    return [np.array([position[name] for name in names]) for position in positions], notes


def agree(a: EvaluatedImage, b: EvaluatedImage | None) -> bool:
    """Whether two images have the same content and ground truth."""
    return b is not None and (a.content, a.label) == (b.content, b.label) and same_truth(a, b)


def same_truth(a: EvaluatedImage, b: EvaluatedImage) -> bool:
    """Whether two images have the same ground truth; landmarks that agree within `POINT_PX` are the same.

    A table in percent of the image and one in px hold the same points up to rounding.
    """
    if a.truth == b.truth:
        return True
    if not a.points or len(a.points) != len(b.points):
        return False
    first, second = (np.array(image.points, np.float64) for image in (a, b))
    return np.allclose(first, second, rtol=1e-6, atol=POINT_PX, equal_nan=True)


def differences(first: Mapping[str, EvaluatedImage], other: Mapping[str, EvaluatedImage]) -> list[str]:
    """Describe which images differ, by kind of difference; empty if none do."""
    both = [name for name in first if name in other]
    kinds = {
        "missing": [name for name in first if name not in other],
        "additional": [name for name in other if name not in first],
        "of other content": [name for name in both if first[name].content != other[name].content],
        "of another class": [name for name in both if first[name].label != other[name].label],
        "of other ground truth": [name for name in both if not same_truth(first[name], other[name])],
    }
    return [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names]


def listed(names: Sequence[str]) -> str:
    """The first names of a list, on one line."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return printable(", ".join(names[:SHOWN]), keep="") + more


def labels_of(folders: Sequence[Path], evaluations: Sequence[Evaluation]) -> list[str]:
    """Short names of evaluations that tell them apart: of the run, of its directory, or of the folder.

    Args:
        folders: Folders of the evaluations.
        evaluations: The evaluations.

    Returns:
        One name for each; numbered if nothing else differs.
    """
    absolute = [Path(os.path.abspath(folder)) for folder in folders]
    for names in (
        [evaluation.name for evaluation in evaluations],
        [evaluation.run.name for evaluation in evaluations],
        [f"{evaluation.name}, {folder.name}" for evaluation, folder in zip(evaluations, absolute, strict=True)],
        ["/".join(folder.parts[-3:]) for folder in absolute],
    ):
        if len(set(names)) == len(names):
            return [printable(name, keep="") for name in names]
    return [f"{number}. {printable(e.name, keep='')}" for number, e in enumerate(evaluations, start=1)]
