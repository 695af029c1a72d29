"""Folds of labelled images: groups stay together, classes stay in the training set, and errors say what to do."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pulmo_jax.data.label_folds import given_fold, hold_out, label_folds, strata
from pulmo_jax.types import InputError

NAMES = ("common", "rare")


def random_set(seed: int, groups: int, images: int, rare_groups: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.arange(groups), rng.integers(0, groups, images - groups)])
    present = np.stack([rng.random(images) < 0.8, np.isin(ids, rng.permutation(groups)[:rare_groups])], axis=1)
    present[:, 0] |= True
    return present, [f"g{i}" for i in ids]


@given(st.integers(0, 100), st.integers(3, 12), st.integers(0, 20), st.integers(1, 5), st.floats(0.05, 0.6))
def test_every_fold_keeps_groups_together_and_all_classes_in_training(seed, groups, more, count, fraction):
    assume(count <= groups and (count, groups) != (2, 3))
    present, names = random_set(seed, groups, groups + more, max(3, groups // 2))
    folds = label_folds(present, names, NAMES, count, fraction, fraction, seed)
    assert len(folds) == count
    for fold in folds:
        assert sorted(np.concatenate(fold).tolist()) == list(range(len(names)))
        parts = [{names[row] for row in rows} for rows in fold]
        assert all(parts)
        assert sum(map(len, parts)) == len(set(names))
        assert present[fold.training].any(axis=0).all()
    if count > 1:
        assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(names)))


@pytest.mark.parametrize("seed", range(20))
def test_a_class_of_one_group_is_trained_on(seed):
    present, names = random_set(seed, 8, 20, 1)
    (fold,) = label_folds(present, names, NAMES, 1, 0.2, 0.2, seed)
    assert present[fold.training, 1].any()


def test_a_class_of_one_group_cannot_be_cross_validated():
    present, names = random_set(0, 8, 20, 1)
    with pytest.raises(InputError, match=r"rare: .* of 1 group ha.* this class, and the training set of fold \d of 4"):
        label_folds(present, names, NAMES, 4, 0.2, 0.2, 0)


def test_rare_classes_are_spread_over_the_folds():
    present = np.zeros((40, 2), bool)
    present[:, 0] = True
    present[:8, 1] = True
    names = [f"g{i}" for i in range(40)]
    for seed in range(5):
        folds = label_folds(present, names, NAMES, 4, 0.25, 0.2, seed)
        assert [int(present[fold.test, 1].sum()) for fold in folds] == [2, 2, 2, 2]
        assert all(present[fold.validation, 1].any() for fold in folds)


def test_the_fractions_are_respected():
    present, names = np.ones((100, 1), bool), [f"g{i}" for i in range(100)]
    (fold,) = label_folds(present, names, ("a",), 1, 0.25, 0.2, 0)
    assert [len(rows) for rows in fold] == [60, 20, 20]
    (fold,) = label_folds(present, names, ("a",), 1, 0.25, 0, 0)
    assert [len(rows) for rows in fold] == [75, 25, 0]


def test_the_same_seed_gives_the_same_folds():
    present, names = random_set(0, 10, 30, 5)
    for a, b in zip(*(label_folds(present, names, NAMES, 5, 0.2, 0.2, 3) for _ in range(2)), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    other = label_folds(present, names, NAMES, 5, 0.2, 0.2, 4)
    assert not np.array_equal(other[0].test, label_folds(present, names, NAMES, 5, 0.2, 0.2, 3)[0].test)


@pytest.mark.parametrize(
    ("images", "groups", "count", "test_fraction", "reason"),
    [
        (1, 1, 1, 0.2, r"only 1 image \(.*at least 3 are needed, for training, validation and test.*data\.groups"),
        (1, 1, 1, 0, "at least 2 are needed, for training and validation"),
        (9, 1, 1, 0.2, r"9 images of 1 group .*correct data\.group_regex or data\.groups"),
        (2, 2, 1, 0.2, r"set data\.test_fraction=0 to train without a test set"),
        (9, 4, 5, 0.2, r"9 images of 4 groups.*trainer\.folds=5 needs 5.*lower trainer\.folds to 4"),
    ],
)
def test_too_few_groups(images, groups, count, test_fraction, reason):
    names = [f"g{i % groups}" for i in range(images)]
    with pytest.raises(InputError, match=reason):
        label_folds(np.ones((images, 1), bool), names, ("a",), count, 0.2, test_fraction, 0)


def test_two_folds_of_groups_of_different_sizes():
    names = ["large"] * 30 + ["a", "b", "c"]
    folds = label_folds(np.ones((33, 1), bool), names, ("x",), 2, 0.2, 0.2, 0)
    assert all(len({names[row] for row in rows}) > 0 for fold in folds for rows in fold)
    with pytest.raises(InputError, match=r"trainer\.folds=2 needs 4.*lower trainer\.folds to 1"):
        label_folds(np.ones((32, 1), bool), names[:32], ("x",), 2, 0.2, 0.2, 0)


def test_two_groups_without_a_test_set():
    (fold,) = label_folds(np.ones((4, 1), bool), ["a", "a", "b", "b"], ("x",), 1, 0.2, 0, 0)
    assert [len(rows) for rows in fold] == [2, 2, 0]


def test_strata():
    present = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0]], bool)
    assert strata(present, np.arange(6), 1).tolist() == [0, 1, 2, -1, 1, 0]
    assert strata(present, np.arange(6), 2).tolist() == [0, 1, -1, -1, 1, 0]
    assert strata(present, np.arange(6), 3).tolist() == [-1] * 6


def test_given_parts():
    parts = ["train", "train", "train", "test"]
    present, groups = np.array([[1, 0], [1, 1], [1, 1], [1, 1]], bool), ["a", "b", "c", "d"]
    fold = given_fold(parts, present, groups, NAMES, 0.3, 0)
    assert fold.test.tolist() == [3]
    assert sorted([*fold.training, *fold.validation]) == [0, 1, 2]
    assert present[fold.training].any(axis=0).all()
    with pytest.raises(InputError, match="rare: 3 images of 3 groups have this class, and the training"):
        given_fold(["train", "val", "val", "test"], present, groups, NAMES, 0.3, 0)
    with pytest.raises(InputError, match="no image has the part val, and all images of the part train"):
        given_fold(["train", "test", "test", "test"], present, groups, NAMES, 0.3, 0)


def test_hold_out_keeps_what_it_can():
    present = np.zeros((12, 2), bool)
    present[:, 0], present[5, 1] = True, True
    for seed in range(20):
        kept, out = hold_out(np.arange(12), present, np.arange(12), 0.5, seed)
        assert 5 in kept
        assert len(out) == 6
