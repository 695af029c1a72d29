"""Labelled images of a landmark run: listing, splitting, reading, and resizing to squares."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Float

from pulmo_jax.config.expressions import search
from pulmo_jax.data.images import ImageRef, index_images
from pulmo_jax.data.landmark_table import LandmarkTable, read_landmarks, without_row
from pulmo_jax.data.sources.formats import Format
from pulmo_jax.data.splits import split_by_group
from pulmo_jax.data.working_images import WorkingImages, read_working
from pulmo_jax.host.console import Console, tracker
from pulmo_jax.tasks.landmarks.config import LandmarkDataConfig
from pulmo_jax.types import InputError

MOST_CLASSES = 12  # with more, the names are not classes


@dataclass(frozen=True)
class Labelled:
    """Resized images with true landmarks.

    Attributes:
        working: Resized images.
        points: Landmarks (y, x), px of the original image; NaN where unknown.
        groups: Group of each image.
        classes: Class of each image.
        notes: Notes for the report.
    """

    working: WorkingImages
    points: Float[np.ndarray, "N K 2"]
    groups: tuple[str, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def refs(self) -> tuple[ImageRef, ...]:
        """References of the images."""
        return self.working.refs

    @property
    def titles(self) -> list[str]:
        """Names of the images."""
        return [ref.title for ref in self.refs]

    @property
    def square_points(self) -> Float[np.ndarray, "N K 2"]:
        """Landmarks (y, x), px of the resized images, float32."""
        return self.working.to_square(self.points).astype(np.float32)


@dataclass(frozen=True)
class LandmarkSets:
    """Data of a landmark run.

    Attributes:
        training: Training images.
        validation: Images for model selection and calibration.
        test: Test images, if any.
        notes: Notes for the report.
    """

    training: Labelled
    validation: Labelled
    test: Labelled | None
    notes: list[str]


def read_sets(
    data: LandmarkDataConfig, size: int, seed: int, console: Console, formats: Sequence[Format] = ()
) -> LandmarkSets:
    """Read all tables and images.

    Args:
        data: Data config.
        size: Side length of the resized images, px.
        seed: Random seed of the split.
        console: For progress and notes.
        formats: The user's own image formats.

    Returns:
        Training, validation and test images.

    Raises:
        InputError: If rows or images cannot be used and data.on_error is "stop", or if the tables share a group.
    """
    assert data.images is not None
    assert data.train is not None
    options = {"group_regex": data.group_regex, "max_image_mb": data.max_image_mb, "formats": formats}
    index = index_images(data.images, **options, say=console.print)
    training = read_landmarks(data.train, data.images, on_error=data.on_error, index=index, units=data.units)
    n_points = training.points.shape[1]
    others = [
        None
        if path is None
        else read_landmarks(path, data.images, n_points=n_points, on_error=data.on_error, index=index, units=data.units)
        for path in (data.val, data.test)
    ]
    tables = [("training", training), ("validation", others[0]), ("test", others[1])]
    given = [table for _, table in tables if table is not None]
    notes = [note for table in given for note in table.notes()] + without_row(given)
    for note in notes:
        console.print(f"note: {note}")
    require_apart([(name, table) for name, table in tables if table is not None], data)
    parts: dict[str, tuple[list[ImageRef], np.ndarray]] = {
        name: (list(table.refs), table.points) for name, table in tables if table is not None
    }
    if others[0] is None:
        parts |= divided(training, data.val_fraction, seed)
    sets = {name: labelled(refs, points, size, data, console, name, formats) for name, (refs, points) in parts.items()}
    return LandmarkSets(sets["training"], sets["validation"], sets.get("test"), notes)


def divided(table: LandmarkTable, share: float, seed: int) -> dict[str, tuple[list[ImageRef], np.ndarray]]:
    """Split a table into training and validation rows by group."""
    row_of = {ref: row for row, ref in enumerate(table.refs)}
    parts = zip(("training", "validation"), split_by_group(list(table.refs), share, seed), strict=True)
    return {name: (refs, table.points[[row_of[ref] for ref in refs]]) for name, refs in parts}


def require_apart(tables: list[tuple[str, LandmarkTable]], data: LandmarkDataConfig) -> None:
    """Check that no group is in two tables, which would bias the errors.

    Args:
        tables: Tables by name.
        data: Data config.

    Raises:
        InputError: If one is.
    """
    for i, (name, table) in enumerate(tables):
        for other, others in tables[i + 1 :]:
            both = sorted({ref.group for ref in table.refs} & {ref.group for ref in others.refs})
            if both:
                unit = "images" if data.group_regex is None else "groups (data.group_regex)"
                raise InputError(
                    f"{table.path} and {others.path}: {len(both)} {unit} are in both the {name} and the {other} table "
                    f"({', '.join(both[:3])}); remove them from one"
                )


def labelled(
    refs: Sequence[ImageRef],
    points: Float[np.ndarray, "N K 2"],
    size: int,
    data: LandmarkDataConfig,
    console: Console,
    name: str,
    formats: Sequence[Format] = (),
) -> Labelled:
    """Read and resize labelled images.

    Args:
        refs: Images.
        points: Landmarks (y, x), px; NaN where unknown.
        size: Side length of the resized images, px.
        data: Data config.
        console: For progress and messages.
        name: Name of the data set, for messages.
        formats: The user's own image formats.

    Returns:
        Images that can be read, with their landmarks.

    Raises:
        InputError: If an image cannot be read and data.on_error is "stop", or if none can be read.
    """
    working, skipped = read_working(
        refs, size, data.max_image_mb, data.threads, tracker(console, f"reading {name} images"), formats
    )
    if skipped and data.on_error == "stop":
        raise InputError(
            f"{skipped[0].reason}\n({len(skipped)} of {len(refs)} {name} images cannot be read; data.on_error=skip "
            "skips them)"
        )
    for file in skipped:
        console.print(f"skipped: {file.reason}")
    if not working.refs:
        raise InputError(f"none of the {len(refs)} {name} images can be read: {skipped[0].reason}")
    kept = {ref: row for row, ref in enumerate(refs)}
    rows = [kept[ref] for ref in working.refs]
    return Labelled(
        working,
        points[rows],
        tuple(ref.group for ref in working.refs),
        classes_of([ref.name for ref in working.refs], data.class_regex),
    )


def classes_of(names: Sequence[str], class_regex: str | None) -> tuple[str, ...]:
    """Class of each image from its file name or, if that gives a single class, from its folder.

    Args:
        names: Names of the images, relative to their folder.
        class_regex: Regular expression for the file name, whose first group is the class; None: no classes.

    Returns:
        Class of each image; "" for all if there is one class, or nearly as many classes as images.
    """
    if class_regex is None:
        return ("",) * len(names)
    paths = [PurePosixPath(name) for name in names]
    found = tuple(search("data.class_regex", class_regex, path.name) or "" for path in paths)
    if len(set(found)) == 1:
        folders = tuple(path.parent.name for path in paths)
        found = folders if len(set(folders)) > 1 else found
    return found if len(set(found)) <= min(MOST_CLASSES, max(1, len(names) // 2)) else ("",) * len(names)


def describe_sets(sets: LandmarkSets) -> dict[str, Any]:
    """Lists of training, validation and test images, for images.json."""
    test = {} if sets.test is None else {"test": sets.test.titles}
    return {"training": sets.training.titles, "validation": sets.validation.titles, **test, "notes": sets.notes}
