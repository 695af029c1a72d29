"""Folds: every image tested once, groups whole, classes in every part."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulmo_jax.data.folds import grouped_folds
from pulmo_jax.types import InputError


def made(seed: int, count: int = 60, groups: int = 40) -> tuple[np.ndarray, list[str]]:
    """Labels, and groups that are of one class each."""
    rng = np.random.default_rng(seed)
    of = np.concatenate([np.arange(groups), rng.integers(groups, size=count - groups)])
    return (of % 3 == 0).astype(int), [f"g{g}" for g in of]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(2, 6))
def test_every_image_is_tested_once_and_no_group_is_taken_apart(seed, count):
    labels, groups = made(seed)
    folds = grouped_folds(labels, groups, count, 0.2, 0.2, seed)
    assert len(folds) == count
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(len(labels)))
    for fold in folds:
        assert sorted(np.concatenate(fold).tolist()) == list(range(len(labels)))
        parts = [{groups[row] for row in rows} for rows in fold]
        assert sum(map(len, parts)) == len(set(groups))
        assert all(set(labels[rows]) == {0, 1} for rows in fold)


def test_one_fold_holds_out_the_share_that_is_asked_for():
    labels, groups = made(0, 400, 300)
    (fold,) = grouped_folds(labels, groups, 1, 0.25, 0.1, 0)
    assert len(fold.test) == pytest.approx(40, abs=8)
    assert len(fold.validation) == pytest.approx(90, abs=12)


def test_folds_are_those_of_their_seed():
    labels, groups = made(0)
    one, again, other = (grouped_folds(labels, groups, 5, 0.2, 0.2, seed) for seed in (1, 1, 2))
    assert all((a == b).all() for x, y in zip(one, again, strict=True) for a, b in zip(x, y, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(one[0], other[0], strict=True))


def test_a_class_with_too_few_groups_is_refused():
    labels = np.array([0] * 20 + [1] * 8)
    groups = [f"g{i}" for i in range(20)] + ["same"] * 8
    with pytest.raises(InputError, match="class 1 has 1 groups of images, too few for trainer.folds=5"):
        grouped_folds(labels, groups, 5, 0.2, 0.2, 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 4))
def test_of_few_and_lopsided_groups_each_part_has_every_class_or_the_class_is_named(seed, count):
    rng = np.random.default_rng(seed)
    sizes = {name: rng.choice([1, 2, 8], max(count, 2) + 1 + rng.integers(3)) for name in ("no", "yes")}
    groups = [f"{name}{g}" for name, of in sizes.items() for g, size in enumerate(of) for _ in range(size)]
    labels = np.array([group.rstrip("0123456789") for group in groups])
    try:
        folds = grouped_folds(labels, groups, count, 0.2, 0.2, seed)
    except InputError as error:
        assert str(error).startswith(("class no has", "class yes has"))
    else:
        assert all(set(labels[rows]) == {"no", "yes"} for fold in folds for rows in fold)
