"""Cubic splines against SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from pulmo_jax.core import spline


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


coefficients_of = jax.jit(spline.coefficients)


def random(*shape: int, dtype=np.float64) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (3, 5), (40, 17), (2, 3, 8, 6)])
def test_coefficients_are_scipy_s_for_images_mirrored_at_their_edges(shape):
    images = random(*shape)
    expected = [ndimage.spline_filter(image, 3, mode="mirror") for image in images.reshape(-1, *shape[-2:])]
    found = coefficients_of(jnp.asarray(images)).reshape(-1, *shape[-2:])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_coefficients_in_float32():
    image = random(20, 24, dtype=np.float32)
    with jax.enable_x64(False):
        found = coefficients_of(jnp.asarray(image))
        assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, ndimage.spline_filter(image.astype(float), 3, mode="mirror"), atol=5e-6)


@given(st.floats(0, 1, exclude_max=True))
def test_weights_are_the_b_spline_and_sum_to_one(fraction):
    found = np.array(spline.weights(jnp.asarray(fraction)))
    distance = abs(fraction - np.arange(-1, 3))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clip(0) ** 3 / 6
    np.testing.assert_allclose(found, np.where(distance < 1, near, far), atol=1e-15)
    assert found.sum() == pytest.approx(1, abs=1e-15)


def test_interpolation_is_scipy_s():
    image = random(15, 18)
    y, x = np.random.default_rng(1).uniform([[1], [1]], [[13], [16]], size=(2, 50))
    coefficients = np.asarray(coefficients_of(jnp.asarray(image)))
    along_y, along_x = (np.array(spline.weights(jnp.asarray(c - np.floor(c)))) for c in (y, x))
    row, column = (np.floor(c).astype(int) + np.arange(-1, 3)[:, None] for c in (y, x))
    found = np.einsum("in,jn,ijn->n", along_y, along_x, coefficients[row[:, None], column])
    np.testing.assert_allclose(found, ndimage.map_coordinates(image, [y, x], order=3, mode="mirror"), atol=1e-12)


def test_splines_pass_through_every_pixel():
    image = random(9, 9)
    coefficients = np.asarray(coefficients_of(jnp.asarray(image)))
    at_pixel = np.array(spline.weights(jnp.zeros(())))[:3]  # the fourth is 0
    assert spline.weights(jnp.zeros(()))[3] == 0
    found = ndimage.correlate(coefficients, np.outer(at_pixel, at_pixel), mode="mirror")
    np.testing.assert_allclose(found, image, atol=1e-13)


def test_gradient_of_an_interpolated_value_is_what_a_pixel_adds_to_it():
    """Interpolation is linear in the image."""
    image, at = random(15, 18), np.zeros((15, 18))
    at[6, 7] = 1
    slope = jax.jit(jax.grad(lambda image: spline.coefficients(image)[5, 9]))(jnp.asarray(image))
    assert float(slope[6, 7]) == pytest.approx(ndimage.spline_filter(at, 3, mode="mirror")[5, 9], rel=1e-12)
    assert float((slope * image).sum()) == pytest.approx(float(coefficients_of(jnp.asarray(image))[5, 9]), rel=1e-12)
