"""Nearest patches, against a search over all pairs in float64."""

import numpy as np
import pytest

from pulmo_jax.evaluation.nearest_patch import inverse, nearest_patch, symmetry

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(5, 4, 4, 2)).astype(np.float32)
PATCHES = RNG.normal(size=(30, 4, 4, 2)).astype(np.float32)


@pytest.mark.parametrize("symmetries", [False, True])
def test_distance_is_the_smallest_of_all_pairs(symmetries):
    near = nearest_patch(IMAGES, PATCHES, symmetries)
    codes = range(8 if symmetries else 1)
    for image, distance, index, patch in zip(IMAGES, *near, strict=True):
        turned = np.stack([symmetry(PATCHES, code) for code in codes]).astype(np.float64)
        every = np.sqrt(((turned - image) ** 2).mean((2, 3, 4)))
        assert distance == pytest.approx(every.min(), rel=1e-5)
        assert every[:, index].min() == every.min()
        assert np.sqrt(((patch - image) ** 2).mean()) == pytest.approx(every.min(), rel=1e-5)


@pytest.mark.parametrize("code", range(8))
def test_a_turned_copy_is_found_at_a_distance_of_0(code):
    copy = symmetry(PATCHES[7:8], code)
    near = nearest_patch(copy, PATCHES, symmetries=True)
    assert (near.distance[0], near.position[0]) == (0, 7)
    np.testing.assert_array_equal(near.patch, copy)
    np.testing.assert_array_equal(inverse(copy[0], code), PATCHES[7])
    assert (nearest_patch(copy, PATCHES).distance[0] == 0) == (code == 0)


def test_the_symmetries_are_those_of_the_square():
    image = np.arange(4.0).reshape(1, 2, 2, 1)
    assert len({symmetry(image, code).tobytes() for code in range(8)}) == 8
