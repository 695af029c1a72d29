"""Group-wise stratified folds for cross-validation."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped
from sklearn.model_selection import StratifiedGroupKFold

from pulmo_jax.types import InputError

Rows = Int[np.ndarray, "_"]
Classes = Shaped[np.ndarray, "N"]  # class name or class index of each image


class Fold(NamedTuple):
    """Row indices of the images of one fold.

    Attributes:
        training: Images to train on.
        validation: Images for model selection and calibration.
        test: Held-out images.
    """

    training: Rows
    validation: Rows
    test: Rows


def grouped_folds(
    labels: Classes,
    groups: Sequence[str],
    count: int,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> list[Fold]:
    """Split images into stratified folds that never separate a group.

    Every image is tested exactly once. Part of each fold's training groups becomes its validation set.

    Args:
        labels: Class of each image (N,).
        groups: Group of each image, such as the patient, N of them.
        count: Number of folds; 1 gives a single fold that tests about `test_fraction` of the images.
        val_fraction: Fraction of the training images used for validation.
        test_fraction: Fraction of the images used for testing if `count` is 1.
        seed: Seed of the shuffling.

    Returns:
        The folds.

    Raises:
        InputError: A class has too few groups to be present in every part of every fold.
    """
    group_ids = np.unique(np.array(groups), return_inverse=True)[1]
    for label in np.unique(labels):
        if np.unique(group_ids[labels == label]).size <= max(count, 2):
            raise _too_few_groups(label, labels, group_ids, count)
    rows = np.arange(len(labels))
    if count == 1:
        outer = [held_out(rows, labels, group_ids, test_fraction, seed)]
    else:
        outer = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(rows, labels, group_ids)
    folds = [Fold(*held_out(rest, labels, group_ids, val_fraction, seed), test) for rest, test in outer]
    for part in (rows for fold in folds for rows in fold):
        for label in np.setdiff1d(labels, labels[part]):
            raise _too_few_groups(label, labels, group_ids, count)
    return folds


def _too_few_groups(label: object, labels: Classes, group_ids: Rows, count: int) -> InputError:
    available = np.unique(group_ids[labels == label]).size
    fewer = " or lower trainer.folds" if count > 1 else ""
    return InputError(
        f"class {label} has {available} groups of images, too few for trainer.folds={count}: every fold needs at "
        f"least one group for training, validation and test each; give more images{fewer}"
    )


def held_out(rows: Rows, labels: Classes, group_ids: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Hold out a stratified fraction of the images, in whole groups.

    Args:
        rows: Row indices to split.
        labels: Class of each image (N,).
        group_ids: Group index of each image (N,).
        fraction: Fraction of `rows` to hold out, rounded to 1 / k for an integer k.
        seed: Seed of the shuffling.

    Returns:
        (kept, held out); nothing is held out if some class has only one group.
    """
    parts = max(2, round(1 / fraction))
    fewest = min(np.unique(group_ids[rows][labels[rows] == label]).size for label in np.unique(labels[rows]))
    if fewest < 2:
        return rows, rows[:0]
    splitter = StratifiedGroupKFold(min(parts, fewest), shuffle=True, random_state=seed)
    kept, out = next(splitter.split(rows, labels[rows], group_ids[rows]))
    return rows[kept], rows[out]
