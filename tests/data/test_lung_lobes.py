import itertools

import numpy as np

from pulmo_jax.data import lung_ct, lung_lobes


def test_blocks_are_apart_and_free_of_doubtful_slices():
    slices = [set(block) for _, _, block in lung_lobes.blocks()]
    for one, other in itertools.combinations(slices, 2):
        assert min(abs(a - b) for a in one for b in other) - 1 >= lung_lobes.GAP_SLICES
    used = set().union(*slices)
    assert not used & {65, 66, 67, 75, 76, 77, 94}
    assert sum(map(len, slices)) == len(used) == 75


def test_training_and_test_slices_show_the_nodule():
    parts = {part: set() for part in lung_lobes.SPLIT}
    for part, _, slices in lung_lobes.blocks():
        parts[part] |= set(slices) & set(range(86, 94))
    assert parts == {"train": {86, 87, 88}, "val": set(), "test": {92, 93}}


def test_blocks_have_their_names_and_ascend():
    names = [name for _, name, _ in lung_lobes.blocks()]
    assert names[:2] == ["slices 022-036", "slices 040-043"]
    assert names == sorted(set(names))
    assert dict(zip(names, lung_lobes.blocks(), strict=True))["slices 092-097"][2] == [92, 93, 95, 96, 97]


def test_nodule_is_painted_over_the_lobes_and_other_labels_are_background():
    labels = np.array([[0, 9, 10, 11], [12, 13, 14, 15]], np.uint8)
    nodule = np.array([[1, 0, 0, 1], [0, 0, 0, 0]], bool)
    numbers = lung_lobes.class_numbers(labels, nodule)
    assert numbers.dtype == np.uint8
    assert numbers.tolist() == [[20, 0, 10, 20], [12, 13, 14, 0]]


def test_every_lobe_has_a_name():
    assert set(lung_lobes.CLASSES.values()) == {*lung_ct.LUNG_LABELS, 20}
