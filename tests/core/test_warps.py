"""Bilinear sampling against SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from pulmo_jax.core import warps


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


bilinear = jax.jit(warps.bilinear)
IMAGE = np.random.default_rng(0).normal(size=(9, 13))


def points(low: float, high: float) -> np.ndarray:
    return np.random.default_rng(1).uniform(low, [high - 4, high], size=(60, 2))


def test_values_are_scipy_s_inside_and_at_the_nearest_edge_outside():
    at = points(-5, 17)
    found = bilinear(jnp.asarray(IMAGE), jnp.asarray(at))
    np.testing.assert_allclose(found, ndimage.map_coordinates(IMAGE, at.T, order=1, mode="nearest"), atol=1e-12)


def test_pixel_centres_give_the_pixels():
    grid = warps.pixel_centres(9, 13)
    assert grid.shape == (9, 13, 2)
    assert grid[4, 7].tolist() == [4, 7]
    np.testing.assert_array_equal(bilinear(jnp.asarray(IMAGE), grid), IMAGE)


def test_outside_is_beyond_the_half_pixel_around_the_centres_and_filled():
    at = jnp.array([[-0.49, 3.0], [-0.51, 3.0], [8.49, 12.49], [8.51, 0.0], [4.0, 12.51], [jnp.nan, 1.0], [4.0, 5.0]])
    expected = [True, False, True, False, False, False, True]
    assert warps.inside(at, IMAGE.shape).tolist() == expected
    found = bilinear(jnp.asarray(IMAGE), at, -7.0)
    assert (found == -7).tolist() == [not inside for inside in expected]
    np.testing.assert_allclose(found[jnp.array([0, 2, 6])], [IMAGE[0, 3], IMAGE[8, 12], IMAGE[4, 5]])


def test_gradients_are_those_of_differences():
    at, image = jnp.asarray(points(0.3, 11.8)), jnp.asarray(IMAGE)

    def loss(image, at):
        return (bilinear(image, at, 0.0) * jnp.arange(len(at))).sum()

    by_image, by_point = jax.jit(jax.grad(loss, (0, 1)))(image, at)
    rng = np.random.default_rng(2)
    for slope, move in ((by_image, lambda d: (image + d, at)), (by_point, lambda d: (image, at + d))):
        way = jnp.asarray(rng.normal(size=slope.shape)) * 1e-6
        expected = (loss(*move(way)) - loss(*move(-way))) / 2
        assert float((slope * way).sum()) == pytest.approx(float(expected), rel=1e-5)
