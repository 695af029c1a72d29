"""Detections against scikit-image's regions, and at the edges of the definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.measure import label, regionprops

from pulmo_jax.evaluation.calibration import Calibration, Calibrator
from pulmo_jax.evaluation.detection import find_detections


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Of normal scores 0, 0.001 ... 0.999 in each of 20 images: the threshold for 1 % is 0.989."""
    rng, calibrator = np.random.default_rng(0), Calibrator()
    for i in range(20):
        scores = rng.permutation(np.arange(1000, dtype=np.float32) / 1000).reshape(20, 50)
        calibrator = calibrator.add(scores, None, 0.0, str(i))
    return calibrator.finish(pixel_rate=0.01, image_rate=0.1)


@given(seed=st.integers(0, 2**32 - 1), min_area_px=st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_regions_are_those_of_skimage(calibration, seed, min_area_px):
    rng = np.random.default_rng(seed)
    score = ndimage.gaussian_filter(rng.standard_normal((60, 45)), 1.2).astype(np.float32) * 3
    foreground = rng.random((60, 45)) > 0.1
    detections, mask = find_detections(score, calibration, foreground, min_area_px)

    above = (score > calibration.pixel_threshold.value) & foreground
    expected = [r for r in regionprops(label(above, connectivity=2), intensity_image=score) if r.area >= min_area_px]
    expected.sort(key=lambda r: -r.intensity_max)
    assert [d.label for d in detections] == list(range(1, len(expected) + 1))
    assert mask.sum() == sum(r.area for r in expected)
    for d, r in zip(detections, expected, strict=True):
        y0, x0, y1, x1 = r.bbox
        assert d.box == (y0, x0, y1 - y0, x1 - x0)
        assert d.area_px == r.area
        assert d.peak_score == score[d.y, d.x] == r.intensity_max
        assert d.mean_score == pytest.approx(r.intensity_mean, rel=1e-6)
        assert mask[tuple(r.coords.T)].all()


@given(hnp.arrays(bool, (7, 7)))
@settings(deadline=None)
def test_no_region_is_split_merged_or_lost(calibration, above):
    detections, mask = find_detections(np.where(above, 2, 0).astype(np.float32), calibration)
    assert np.array_equal(mask, above)
    assert len(detections) == label(above, connectivity=2).max()


def test_what_equals_the_threshold_is_normal(calibration):
    threshold = np.float32(calibration.pixel_threshold.value)
    score = np.zeros((5, 5), np.float32)
    score[1, 1], score[3, 3] = threshold, np.nextafter(threshold, np.float32(9))
    detections, mask = find_detections(score, calibration)
    assert [(d.y, d.x) for d in detections] == [(3, 3)]
    assert mask.sum() == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_detection(calibration, value):
    score = np.full((6, 6), value, np.float32)
    score[2, 3] = 5
    detections, mask = find_detections(score, calibration)
    assert [(d.y, d.x, d.area_px) for d in detections] == [(2, 3, 1)]
    assert np.argwhere(mask).tolist() == [[2, 3]]


def test_nothing_above_the_threshold_is_an_empty_list(calibration):
    detections, mask = find_detections(np.zeros((4, 9), np.float32), calibration)
    assert detections == []
    assert not mask.any()
    detections, mask = find_detections(np.ones((4, 9), np.float32) * 9, calibration, np.zeros((4, 9), dtype=bool))
    assert detections == []
    assert not mask.any()


def test_p_values_are_the_shares_of_normal_pixels_and_images(calibration):
    score = np.zeros((9, 9), np.float32)
    score[1, 1], score[5, 5] = 0.995, 7
    far, near = find_detections(score, calibration)[0]
    assert far.p_value == pytest.approx(1 / 20_001, rel=1e-6)  # higher than all 20,000 normal pixels
    assert far.p_value_image == 1 / 21
    assert near.p_value == pytest.approx((1 + 20 * 5) / 20_001, rel=1e-6)
    assert near.p_value_image == 1  # every normal image has a pixel of 0.999
