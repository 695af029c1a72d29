"""Splits of labelled images by group in which every class stays in the training set."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int
from sklearn.model_selection import StratifiedGroupKFold

from pulmo_jax.data.folds import Fold, Rows
from pulmo_jax.types import InputError

SEEDS = 8  # shufflings that are tried to keep every class in the training set

Present = Bool[np.ndarray, "N K"]  # whether an image has a class


def label_folds(
    present: Present,
    groups: Sequence[str],
    names: Sequence[str],
    count: int,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> list[Fold]:
    """Split images into folds that never separate a group, stratified by the rarest class of each image.

    Args:
        present: Which classes each image has (N, K).
        groups: Group of each image, N of them.
        names: Names of the K classes.
        count: Number of folds; 1 gives a single one that tests about `test_fraction` of the images.
        val_fraction: Fraction of the training images used for validation.
        test_fraction: Fraction of the images used for testing if `count` is 1; 0 for none.
        seed: Seed of the shuffling.

    Returns:
        The folds. A class may be absent from a validation or test set, but not from a training set.

    Raises:
        InputError: There are too few groups, or a class would be absent from a training set.
    """
    ids, rows = np.unique(np.array(groups), return_inverse=True)[1], np.arange(len(present))
    needed = {1: 2 if test_fraction == 0 else 3, 2: 4}.get(count, count)  # two for training and validation
    if (available := len(np.unique(ids))) < needed:
        raise _too_few(available, len(rows), needed, count, test_fraction)
    if count > 1:
        outer = _best_folds(rows, present, ids, count, seed)
    elif test_fraction == 0:
        outer = [(rows, rows[:0])]
    else:
        outer = [hold_out(rows, present, ids, test_fraction, seed, leave=2)]
    folds = [Fold(*hold_out(rest, present, ids, val_fraction, seed), test) for rest, test in outer]
    require_classes(folds, present, ids, names)
    return folds


def given_fold(
    parts: Sequence[str],
    present: Present,
    groups: Sequence[str],
    names: Sequence[str],
    val_fraction: float,
    seed: int,
) -> Fold:
    """The fold of a given split.

    Args:
        parts: Part of each image: train, val or test.
        present: Which classes each image has (N, K).
        groups: Group of each image, N of them.
        names: Names of the K classes.
        val_fraction: Fraction of the training images used for validation if no image has the part val.
        seed: Seed of that choice.

    Returns:
        The fold.

    Raises:
        InputError: A class is absent from the training set, or there is one training group and no validation set.
    """
    training, validation, test = (np.flatnonzero(np.array(parts) == part) for part in ("train", "val", "test"))
    ids = np.unique(np.array(groups), return_inverse=True)[1]
    if not len(validation):
        if len(np.unique(ids[training])) < 2:
            raise InputError(
                "data.groups: no image has the part val, and all images of the part train belong to one group, so none "
                "can be held out for validation; give some groups the part val"
            )
        training, validation = hold_out(training, present, ids, val_fraction, seed)
    fold = Fold(training, validation, test)
    require_classes([fold], present, ids, names)
    return fold


def hold_out(
    rows: Rows, present: Present, ids: Int[np.ndarray, "N"], fraction: float, seed: int, leave: int = 1
) -> tuple[Rows, Rows]:
    """Hold out a fraction of images in whole groups, such that as many classes as possible stay.

    Args:
        rows: Images to split, of more than `leave` groups.
        present: Which classes each image has (N, K).
        ids: Group of each image (N,).
        fraction: Fraction to hold out, rounded to 1 / k for an integer k.
        seed: Seed of the shuffling.
        leave: Smallest number of groups that stay, for which less is held out if necessary.

    Returns:
        (kept, held out). Of several splits, one with the most classes in the kept part and then in the other is chosen.
    """
    groups, present_at_all = n_groups(ids, rows), int(present[rows].any(axis=0).sum())

    def classes(split: tuple[Rows, Rows]) -> tuple[int, ...]:
        return tuple(int(present[part].any(axis=0).sum()) for part in split)

    for parts in range(min(max(2, round(1 / fraction)), groups), groups + 1):
        best: list[tuple[Rows, Rows]] = []
        for trial in range(SEEDS):
            splits = _splits(rows, present, ids, parts, seed + trial)
            best += (
                [max(allowed, key=classes)] if (allowed := [s for s in splits if n_groups(ids, s[0]) >= leave]) else []
            )
            if best and classes(best[-1]) == (present_at_all,) * 2:
                return best[-1]
        if best:
            return max(best, key=classes)
    raise AssertionError("the caller checks the number of groups")


def n_groups(ids: Int[np.ndarray, "N"], rows: Rows) -> int:
    """Number of groups of some images."""
    return len(np.unique(ids[rows]))


def _best_folds(
    rows: Rows, present: Present, ids: Int[np.ndarray, "N"], count: int, seed: int
) -> list[tuple[Rows, Rows]]:
    """Folds of which the training set with the fewest classes has the most; two groups stay in each, for validation."""

    def fewest(folds: list[tuple[Rows, Rows]]) -> int:
        return min(int(present[kept].any(axis=0).sum()) for kept, _ in folds)

    best = _splits(rows, present, ids, count, seed)
    for trial in range(1, SEEDS):
        if fewest(best) == present.shape[1]:
            break
        best = max(best, _splits(rows, present, ids, count, seed + trial), key=fewest)
    if min(n_groups(ids, kept) for kept, _ in best) >= 2:
        return best
    parts = np.array_split(np.random.default_rng(seed).permutation(np.unique(ids)), count)  # equal numbers of groups
    return [(rows[~np.isin(ids, part)], rows[np.isin(ids, part)]) for part in parts]


def _splits(rows: Rows, present: Present, ids: Int[np.ndarray, "N"], parts: int, seed: int) -> list[tuple[Rows, Rows]]:
    """All (kept, held out) of a k-fold split by group, stratified where every part can have some of a stratum."""
    for labels in (strata(present[rows], ids[rows], parts), np.zeros(len(rows), int)):
        splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed % 2**32)
        splits = [(rows[kept], rows[out]) for kept, out in splitter.split(rows, labels, ids[rows])]
        if all(len(kept) and len(out) for kept, out in splits):
            return splits
    raise AssertionError("a part without groups, although there are enough")


def strata(present: Present, ids: Int[np.ndarray, "N"], parts: int) -> Int[np.ndarray, "N"]:
    """Rarest class of each image; -1 for images without a class, and for classes with fewer groups than parts.

    Args:
        present: Which classes each image has (N, K).
        ids: Group of each image (N,).
        parts: Number of parts to split into.

    Returns:
        Stratum of each image (N,).
    """
    order = np.argsort(present.sum(axis=0), kind="stable")
    labels = np.where(present.any(axis=1), order[present[:, order].argmax(axis=1)], -1)
    for label in np.unique(labels):
        if len(np.unique(ids[labels == label])) < parts:
            labels[labels == label] = -1
    if len(np.unique(ids[labels == -1])) < parts:  # the rest joins the largest stratum
        values, counts = np.unique(labels, return_counts=True)
        labels[labels == -1] = values[counts.argmax()]
    return labels


def require_classes(folds: Sequence[Fold], present: Present, ids: Int[np.ndarray, "N"], names: Sequence[str]) -> None:
    """Check that every training set has every class.

    Args:
        folds: The folds.
        present: Which classes each image has (N, K).
        ids: Group of each image (N,).
        names: Names of the K classes.

    Raises:
        InputError: If a class is absent from a training set.
    """
    for number, fold in enumerate(folds):
        absent = np.flatnonzero(~present[fold.training].any(axis=0))
        if len(absent):
            k = int(absent[0])
            images, with_class = int(present[:, k].sum()), len(np.unique(ids[present[:, k]]))
            where = f"fold {number + 1} of {len(folds)}" if len(folds) > 1 else "the split"
            have = f"{_counted(images, 'image')} of {_counted(with_class, 'group')} {'has' if images == 1 else 'have'}"
            raise InputError(
                f"{names[k]}: {have} this class, and the training set of {where} has none; add images with this class, "
                "change trainer.folds, seed or the parts of data.groups, or remove the class from the masks"
            )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _too_few(available: int, images: int, needed: int, count: int, test_fraction: float) -> InputError:
    parts = "training and validation" if needed == 2 else "training, validation and test"
    why = f"trainer.folds={count} needs {needed}" if count > 1 else f"at least {needed} are needed, for {parts}"
    remedies = []
    if images > available:
        remedies.append("correct data.group_regex or data.groups if the images are of more patients or places")
    if count > 1 and available >= 3:
        remedies.append(f"lower trainer.folds to {available if available > 3 else 1}")
    if count == 1 and available == 2 and test_fraction > 0:
        remedies.append("set data.test_fraction=0 to train without a test set")
    if available == 1 and images == 1:
        remedies.append("cut a large image into several files with different groups in data.groups")
    extra = "; or ".join(["add images", *remedies])
    kind = "1 image" if images == 1 else f"{images} images of {_counted(available, 'group')}"
    return InputError(
        f"the data set has only {kind} (a group stays together, as do all pages of a file), and {why}: {extra}"
    )
