"""Images of any size in a square, and points there and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulmo_jax.data.letterbox import fit_letterbox, into_square, to_gray

SIDES = st.integers(1, 300)


@given(SIDES, SIDES, st.integers(8, 128))
@settings(max_examples=60, deadline=None)
def test_the_longer_side_fills_the_square_and_points_come_back(height, width, size):
    box = fit_letterbox((height, width), size)
    points = np.random.default_rng(0).uniform(-50, 350, (5, 2))
    np.testing.assert_allclose(box.to_image(box.to_square(points)), points, atol=1e-9)
    corners = box.to_square(np.array([[-0.5, -0.5], [height - 0.5, width - 0.5]]))
    assert np.ptp(corners, axis=0).max() == pytest.approx(size)
    assert corners.min() >= -0.5 - 1e-9
    assert corners.max() <= size - 0.5 + 1e-9


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (75, 75), (50, 200)])
def test_a_spot_is_found_where_its_point_goes(shape):
    y, x = np.indices(shape)
    spot = np.array([0.3 * shape[0], 0.6 * shape[1]])
    image = np.exp(-((y - spot[0]) ** 2 + (x - spot[1]) ** 2) / (2 * 5.0**2))[..., None]
    square = into_square((1000 * image).astype(np.float32), 64)
    assert square.shape == (64, 64)
    weights = np.where(square > 50, square, 0)
    centre = np.array([(weights * grid).sum() for grid in np.indices(square.shape)]) / weights.sum()
    np.testing.assert_allclose(centre, fit_letterbox(shape, 64).to_square(spot), atol=0.25)


def test_edges_are_drawn_out_where_the_image_does_not_fill_the_square():
    image = np.linspace(0, 1, 20, dtype=np.float32)[None, :, None].repeat(10, axis=0)
    square = into_square(image, 40)
    np.testing.assert_array_equal(square[:10], np.broadcast_to(square[10], (10, 40)))


def test_gray_is_the_mean_of_the_bands_without_alpha_and_without_what_is_no_number():
    rgb = np.random.default_rng(0).integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    np.testing.assert_allclose(to_gray(rgb), rgb.mean(-1), rtol=1e-6)
    rgba = np.concatenate([rgb, np.full((4, 5, 1), 65535, np.uint16)], -1)
    np.testing.assert_array_equal(to_gray(rgba), to_gray(rgb))
    holes = rgb[..., :1].astype(np.float32)
    holes[1, 2] = np.nan
    assert to_gray(holes)[1, 2] == pytest.approx(np.nanmean(holes), rel=1e-5)
