"""The scale of a single image: percentiles of a regular grid, whatever the blocks in which it is read."""

import numpy as np
import pytest

from pulmo_jax.data.image_scale import SAMPLED_PX, for_image, image_scale
from pulmo_jax.data.transforms import Preprocessing, preprocess

HOW = Preprocessing(2, "uint16", 32, False, (0.0, 0.0), (1.0, 1.0), (0.5, 0.5), (0.5, 0.5), (0.2, 0.2), (-1.0, 2.0))


@pytest.mark.parametrize("shape", [(50, 70, 2), (1000, 700, 1), (3, 5000, 3), (5000, 3, 1), (1, 1, 1)])
def test_percentiles_of_a_regular_grid(shape):
    pixels = np.random.default_rng(0).gamma(2.0, 100.0, shape).astype("f4")
    step = int(np.ceil(np.sqrt(shape[0] * shape[1] / SAMPLED_PX)))
    grid = pixels[::step, ::step].reshape(-1, shape[2]).astype(float)
    offset, scale = image_scale(pixels, (1.0, 99.0))
    low, high = np.percentile(grid, (1.0, 99.0), axis=0)
    np.testing.assert_allclose(offset, low)
    np.testing.assert_allclose(scale, np.where(high > low, high - low, 1))


def test_missing_and_constant_pixels():
    pixels = np.full((40, 40, 1), np.nan, "f4")
    assert [values.tolist() for values in image_scale(pixels, (1.0, 99.0))] == [[0.0], [1.0]]
    pixels[10:20, 10:20] = 7
    assert [values.tolist() for values in image_scale(pixels, (1.0, 99.0))] == [[7.0], [1.0]]
    large = np.full((2000, 2000, 1), np.nan, "f4")
    large[1, 1], large[1, 2] = 3, 5  # between the pixels of the grid
    assert image_scale(large, (0.0, 100.0))[0].tolist() == [3.0]


def test_only_slices_of_rows_are_read():
    pixels = np.random.default_rng(0).integers(0, 999, (700, 900, 2)).astype("u2")
    rows = []

    class Rows:
        shape = pixels.shape

        def __getitem__(self, some):
            assert isinstance(some, slice)
            rows.append(some.stop - some.start)
            return pixels[some]

    np.testing.assert_array_equal(image_scale(Rows(), (1.0, 99.0)), image_scale(pixels, (1.0, 99.0)))
    assert max(rows) <= 256


def test_an_image_is_normalised_to_its_own_range():
    from dataclasses import replace

    pixels = np.random.default_rng(0).normal([100, 3000], [5, 200], (64, 64, 2))
    assert for_image(HOW, pixels) is HOW
    how = replace(HOW, percentiles=(1.0, 99.0))
    values = preprocess(pixels, None, for_image(how, pixels))
    np.testing.assert_allclose(np.percentile(values, (1, 99), axis=(0, 1)), [[0, 0], [1, 1]], atol=1e-5)
    scaled = preprocess(pixels * 7 - 50, None, for_image(how, pixels * 7 - 50))
    np.testing.assert_allclose(scaled, values, atol=1e-4)
