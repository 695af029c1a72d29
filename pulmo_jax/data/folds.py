"""Folds for cross-validation: every image is tested once, and groups are never taken apart."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Shaped
from sklearn.model_selection import StratifiedGroupKFold

from pulmo_jax.types import InputError

Rows = Int[np.ndarray, "_"]
Classes = Shaped[np.ndarray, "N"]  # of each image the name of its class, or its number


class Fold(NamedTuple):
    """Rows of the images that one network learns from, that choose and calibrate it, and that test it."""

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
    """Stratified by class; a share of each fold's training groups validates.

    count: 1 gives a single fold, with about `test_fraction` of the images to test. Raises InputError where a class has
    too few groups for every part to get one.
    """
    of = np.unique(np.array(groups), return_inverse=True)[1]
    for label in np.unique(labels):
        if np.unique(of[labels == label]).size <= max(count, 2):
            raise too_few(label, labels, of, count)
    everything = np.arange(len(labels))
    if count == 1:
        outer = [held_out(everything, labels, of, test_fraction, seed)]
    else:
        outer = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(everything, labels, of)
    folds = [Fold(*held_out(rest, labels, of, val_fraction, seed), test) for rest, test in outer]
    for part in (rows for fold in folds for rows in fold):
        for label in np.setdiff1d(labels, labels[part]):
            raise too_few(label, labels, of, count)
    return folds


def too_few(label: object, labels: Classes, of: Rows, count: int) -> InputError:
    there = np.unique(of[labels == label]).size
    fewer = " or lower trainer.folds" if count > 1 else ""
    return InputError(
        f"class {label} has {there} groups of images, too few for trainer.folds={count} with one of them "
        f"to learn from, one to validate and one to test in each; give more images{fewer}"
    )


def held_out(rows: Rows, labels: Classes, of: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """(kept, held out) of some rows: the latter one part of about 1 / share, stratified, groups whole; none where a
    class has one group alone."""
    parts = max(2, round(1 / share))
    fewest = min(np.unique(of[rows][labels[rows] == label]).size for label in np.unique(labels[rows]))
    if fewest < 2:
        return rows, rows[:0]
    splitter = StratifiedGroupKFold(min(parts, fewest), shuffle=True, random_state=seed)
    kept, out = next(splitter.split(rows, labels[rows], of[rows]))
    return rows[kept], rows[out]
