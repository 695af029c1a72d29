"""No group on both sides, whatever the images."""

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.splits import split_by_group
from pulmo_jax.types import InputError

fractions = st.floats(0.001, 0.999)
seeds = st.integers(0, 2**31 - 1)
names = st.text("abé/1", min_size=1, max_size=4)
group_lists = st.lists(names, min_size=2, max_size=40)


def refs_of(groups: list[str]) -> list[ImageRef]:
    return [ImageRef(Path(f"d/{i}"), str(i), 0, 1, (8, 8, 1), "uint8", group) for i, group in enumerate(groups)]


@given(group_lists, fractions, seeds)
@settings(deadline=None)
def test_groups_stay_together_and_both_sides_have_one(groups, fraction, seed):
    assume(len(set(groups)) > 1)
    refs = refs_of(groups)
    training, held_out = split_by_group(refs, fraction, seed)
    sides = {r.group for r in training}, {r.group for r in held_out}
    assert not sides[0] & sides[1]
    assert sides[0] and sides[1]  # noqa: PT018
    assert sorted(training + held_out, key=refs.index) == refs
    assert training == sorted(training, key=refs.index)
    wanted = min(max(fraction * len(set(groups)), 1), len(set(groups)) - 1)
    assert abs(len(sides[1]) - wanted) <= 0.5


@given(group_lists, fractions, seeds, st.randoms())
@settings(deadline=None)
def test_only_group_names_and_the_seed_decide(groups, fraction, seed, random):
    """Not the order of the files, nor how many there are of each group."""
    assume(len(set(groups)) > 1)
    _, held_out = split_by_group(refs_of(groups), fraction, seed)
    others = groups + random.choices(groups, k=5)
    random.shuffle(others)
    _, again = split_by_group(refs_of(others), fraction, seed)
    assert {r.group for r in held_out} == {r.group for r in again}


@given(st.sets(names, min_size=2, max_size=40), fractions, seeds)
@settings(deadline=None)
def test_a_new_group_moves_at_most_one_other(groups, fraction, seed):
    many = groups | {"a new one"}
    before, after = ({r.group for r in split_by_group(refs_of(sorted(g)), fraction, seed)[1]} for g in (groups, many))
    assert len(before ^ (after - {"a new one"})) <= 1


def test_the_split_is_the_same_on_every_machine_and_differs_by_seed():
    refs = refs_of(list("abcdefghij"))
    held_out = ["".join(r.group for r in split_by_group(refs, 0.3, seed)[1]) for seed in range(3)]
    assert held_out == ["cfg", "dgj", "acf"]


@pytest.mark.parametrize("count", [1, 3])
def test_one_group_cannot_be_split(count):
    with pytest.raises(InputError, match=rf"all {count} images belong to one group \(p1\)"):
        split_by_group(refs_of(["p1"] * count), 0.5, 0)
