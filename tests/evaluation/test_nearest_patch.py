"""Nearest patches, against a search over all pairs in float64."""

import numpy as np
import pytest

from pulmo_jax.data.pipeline import MIRROR, UNCHANGED
from pulmo_jax.data.transforms import flip_and_turn
from pulmo_jax.evaluation.nearest_patch import nearest_patch, turned_back

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(5, 4, 4, 2)).astype(np.float32)
PATCHES = RNG.normal(size=(30, 4, 4, 2)).astype(np.float32)


@pytest.mark.parametrize("codes", [UNCHANGED, MIRROR, (1, 6), tuple(range(8))])
def test_distance_is_the_smallest_of_all_pairs(codes):
    near = nearest_patch(IMAGES, PATCHES, codes)
    for image, distance, index, patch in zip(IMAGES, *near, strict=True):
        turned = np.stack([[flip_and_turn(p, code) for p in PATCHES] for code in codes]).astype(np.float64)
        every = np.sqrt(((turned - image) ** 2).mean((2, 3, 4)))
        assert distance == pytest.approx(every.min(), rel=1e-5)
        assert every[:, index].min() == every.min()
        assert np.sqrt(((patch - image) ** 2).mean()) == pytest.approx(every.min(), rel=1e-5)


@pytest.mark.parametrize("codes", [UNCHANGED, MIRROR, tuple(range(8))])
@pytest.mark.parametrize("code", range(8))
def test_a_copy_is_found_in_the_given_symmetries_alone(code, codes):
    copy = flip_and_turn(PATCHES[7], code)[None]
    near = nearest_patch(copy, PATCHES, codes)
    assert (near.distance[0] == 0) == (code in codes)
    if code in codes:
        assert near.position[0] == 7
        np.testing.assert_array_equal(near.patch, copy)


@pytest.mark.parametrize("code", range(8))
def test_symmetries_are_inverted(code):
    turned = np.stack([flip_and_turn(image, code) for image in IMAGES])
    np.testing.assert_array_equal(turned_back(turned, code), IMAGES)
