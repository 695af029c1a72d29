import itertools
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.draw import polygon2mask

from pulmo_jax.data import lung_ct

SHAPE = (3, 40, 48)
STEPS = [(0, 1), (1, 1), (1, 0), (1, -1)]  # E, SE, S, SW; their opposites close the octagon


def octagon(y, x, sides):
    """The pixels (y, x) of a closed outline of unit steps, as readers draw them."""
    moves = [step for step, n in zip(STEPS, sides, strict=True) for _ in range(n)]
    moves += [(-dy, -dx) for dy, dx in moves]
    return [tuple(p) for p in np.cumsum([(y, x), *moves[:-1]], axis=0).tolist()]


octagons = st.builds(
    octagon,
    st.integers(0, 15),
    st.integers(12, 20),
    st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(1, 6), st.integers(0, 6)),
)


def roi(z, outline, inclusion="TRUE"):
    points = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for y, x in outline)
    return f"<roi><imageZposition>{z}</imageZposition><inclusion>{inclusion}</inclusion>{points}</roi>"


def readings(*readers, non_nodule=""):
    """An LIDC reading file; each reader is a text of rois."""
    sessions = "".join(
        f"<readingSession><unblindedReadNodule>{rois}</unblindedReadNodule>{non_nodule}</readingSession>"
        for rois in readers
    )
    return ET.fromstring(f'<LidcReadMessage xmlns="http://www.nih.gov">{sessions}</LidcReadMessage>')


def test_sets_of_the_split_are_apart_and_free_of_doubtful_slices():
    slices = {name: lung_ct.slices_of(name) for name in lung_ct.SPLIT}
    for one, other in itertools.combinations(slices.values(), 2):
        between = min(abs(a - b) for a in one for b in other) - 1
        assert between >= lung_ct.GAP_SLICES
    used = set().union(*slices.values())
    assert not used & {65, 66, 67, 75, 76, 77, 94}
    assert not set(range(86, 94)) & (set(slices["train"]) | set(slices["val"]))
    assert sum(map(len, slices.values())) == len(used) == 69


def test_orientation_is_that_of_the_dicom_files():
    dicom = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    depth, height, width = SHAPE
    nifti = np.empty((width, height, depth), dicom.dtype)
    for z, row, column in np.ndindex(SHAPE):
        nifti[column, height - 1 - row, z] = dicom[z, row, column]
    np.testing.assert_array_equal(lung_ct.dicom_orientation(nifti), dicom)


def test_stored_values_keep_every_hounsfield_unit_from_the_offset_up():
    hu = np.array([-2048, -1025, -1024, -1023, 0, 3071], np.int16)
    assert lung_ct.stored_ct(hu).tolist() == [0, 0, 0, 1, 1024, 4095]


@given(st.lists(octagons, min_size=4, max_size=4))
def test_nodule_is_where_two_of_four_readers_agree(outlines):
    mask = lung_ct.nodule_mask(readings(*(roi(1, outline) for outline in outlines)), SHAPE, round)
    votes = sum(polygon2mask(SHAPE[1:], outline).astype(int) for outline in outlines)
    np.testing.assert_array_equal(mask[1], votes >= 2)
    assert not mask[[0, 2]].any()


def test_excluded_regions_are_holes_and_outlines_of_one_reader_add_up():
    outer, inner = octagon(5, 15, (6, 6, 6, 6)), octagon(12, 18, (1, 1, 1, 1))
    apart = octagon(30, 40, (2, 0, 2, 0))
    rois = roi(2, outer) + roi(2, apart) + roi(2, inner, "FALSE")
    expected = polygon2mask(SHAPE[1:], outer) | polygon2mask(SHAPE[1:], apart)
    expected &= ~polygon2mask(SHAPE[1:], inner)
    mask = lung_ct.nodule_mask(readings(rois, rois, "", ""), SHAPE, round)
    np.testing.assert_array_equal(mask[2], expected)


def test_single_points_are_listed_and_not_drawn():
    non_nodule = "<nonNodule><imageZposition>7.5</imageZposition></nonNodule>"
    root = readings(*[roi(2.5, [(3, 4)])] * 4, non_nodule=non_nodule)

    def z_of(position_mm):
        return round(position_mm / 2.5)

    assert not lung_ct.nodule_mask(root, SHAPE, z_of).any()
    assert lung_ct.marked_slices(root, z_of) == {"small_nodules": [1], "non_nodules": [3]}


@pytest.mark.parametrize("z", [-340.0, -125.0, -10.0])
def test_outline_falls_on_the_slice_at_its_position(z):
    root = readings(*[roi(z, octagon(5, 15, (2, 1, 2, 1)))] * 2)
    mask = lung_ct.nodule_mask(root, (133, 40, 48), lambda position_mm: round((position_mm + 340) / 2.5))
    assert np.flatnonzero(mask.any(axis=(1, 2))).tolist() == [(z + 340) / 2.5]
