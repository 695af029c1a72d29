"""The trivial scores are what they say, on any pixels that a file may hold."""

import numpy as np
import pytest
from references import image_operations
from references.preprocessing import preprocessing

from pulmo_jax.inference.baselines import BASELINES, baseline_image_score, intensity, local_intensity, z_score

HOW = preprocessing(channels=2, mean=(10.0, -3.0), std=(2.0, 0.5))


def image(dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(pixels (12, 15, 2), foreground)"""
    rng = np.random.default_rng(0)
    return rng.normal(50, 20, (12, 15, 2)).astype(dtype), rng.random((12, 15)) > 0.3


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_intensity_is_the_mean_of_the_bands(dtype):
    pixels, _ = image(dtype)
    np.testing.assert_allclose(intensity(pixels, None, HOW), pixels.astype(np.float64).mean(axis=-1), rtol=1e-6)


def test_local_intensity_is_smoothed_within_the_foreground():
    pixels, foreground = image()
    expected = image_operations.smooth_within(pixels.mean(axis=-1), foreground, 4.0)
    np.testing.assert_allclose(local_intensity(pixels, foreground, HOW), expected, rtol=1e-5)


def test_z_score_is_the_distance_in_standard_deviations_of_training():
    pixels, _ = image()
    expected = (abs(pixels[..., 0] - 10) / 2 + abs(pixels[..., 1] + 3) / 0.5) / 2
    np.testing.assert_allclose(z_score(pixels, None, HOW), expected, rtol=1e-5)


def test_z_score_of_a_band_without_deviation_is_finite():
    """An alpha channel is 255 throughout training, and 0 somewhere in a new image."""
    pixels = np.array([[[10, 255], [10, 0]]], np.uint8)
    how = preprocessing(channels=2, mean=(10.0, 255.0), std=(2.0, 0.0))
    np.testing.assert_allclose(z_score(pixels, None, how), [[0, 127.5]])


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_numbers_in_the_foreground_alone(name):
    pixels, foreground = image(np.float64)
    pixels[3, 4, 0], pixels[5, 6, 1], pixels[7, 8] = np.nan, np.inf, (-np.inf, np.inf)
    pixels[9, 9, 0] = 1e300  # beyond float32, as some writers mark missing pixels
    valid = np.isfinite(pixels).all(axis=-1) & (pixels < 1e300).all(axis=-1)
    for inside, mask in ((valid, None), (valid & foreground, foreground)):
        found = BASELINES[name](pixels, mask, HOW)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.isfinite(found), inside)
        np.testing.assert_array_equal(np.isnan(found), ~inside)


def test_the_image_score_is_the_mean_of_the_map():
    scores = np.array([[1.0, np.nan], [np.nan, 4.0]], np.float32)
    assert baseline_image_score(scores) == 2.5
    assert np.isnan(baseline_image_score(np.full((2, 2), np.nan, np.float32)))
