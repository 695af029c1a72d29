"""Contrast against loops over pixels, scikit-image where it is comparable, and what must hold for any image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import eigenpatch as reference
from scipy.ndimage import gaussian_filter
from skimage.exposure import equalize_adapthist

from pulmo_jax.core import contrast


def scenes(count: int = 3, side: int = 32) -> np.ndarray:
    """A slope of brightness with a fine texture; skewed."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 1, side)[:, None] ** 2
    return (200 * slope + 30 * rng.gamma(0.5, size=(count, side, side))).astype(np.float32)


def levels_of(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * (image - image.min()) / (image.max() - image.min()))


def test_sahs_is_that_of_a_loop_over_pixels():
    images = scenes()
    found = np.asarray(jax.jit(contrast.sahs)(jnp.asarray(images)))
    expected = np.array([reference.sahs(image) for image in images])
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert (expected == 255).any()  # the limits do cut


@pytest.mark.parametrize("unit", [1e-30, 1.0, 65535.0, 1e15, 3e37])
def test_intensities_lose_their_units(unit):
    images = np.random.default_rng(0).gamma(2, 1, (2, 8, 8))
    expected = (images - images.mean((1, 2), keepdims=True)) / images.std((1, 2), keepdims=True)
    np.testing.assert_allclose(contrast.zscore(jnp.asarray(images * unit, jnp.float32)), expected, atol=1e-4)
    levels = contrast.clahe(jnp.asarray(images, jnp.float32))
    found = contrast.clahe(jnp.asarray(images * unit, jnp.float32))
    assert np.mean(np.abs(found - levels) > 1) < 0.02  # a level at a rounding edge may fall to the other side


def test_a_constant_image_becomes_zero():
    np.testing.assert_array_equal(contrast.zscore(jnp.full((1, 8, 8), 7.0)), 0)
    for level in (0.1, 7.3, 1e-30, 3e38):  # whatever the mean is rounded to
        np.testing.assert_array_equal(jax.jit(contrast.zscore)(jnp.full((2, 149, 149), level)), 0)


@pytest.mark.parametrize("sigma", [2.0, 5.5])
def test_local_zscore_is_that_of_filters(sigma):
    images = scenes()
    found = np.asarray(jax.jit(contrast.local_zscore, static_argnums=1)(jnp.asarray(images), sigma))
    for image, result in zip(images.astype(float), found, strict=True):
        whole = (image - image.mean()) / image.std()
        step = whole - gaussian_filter(whole, sigma, mode="nearest")
        local = np.sqrt(gaussian_filter(step**2, sigma, mode="nearest") + contrast.LEAST_LOCAL_SD**2)
        np.testing.assert_allclose(result, step / local, atol=1e-4)
    np.testing.assert_array_equal(contrast.local_zscore(jnp.full((1, 8, 8), 7.0), sigma), 0)


@pytest.mark.parametrize("name", ["sahs", "zscore", "clahe"])
def test_neither_unit_nor_level_of_an_image_matters(name):
    images = scenes()
    make = jax.jit(getattr(contrast, name))
    there, here = make(jnp.asarray(images)), make(jnp.asarray(4 * images + 256))
    limit = 1e-3 * float(there.max() - there.min())
    share = np.mean(np.abs(np.asarray(there - here)) > limit)
    assert share < (0.01 if name == "clahe" else 1e-9)  # a level at a rounding edge may fall to the other side


@pytest.mark.parametrize("name", ["sahs", "zscore", "clahe"])
def test_an_image_of_one_level_stays_finite(name):
    found = np.asarray(getattr(contrast, name)(jnp.full((1, 32, 32), 7.0)))
    assert np.isfinite(found).all()
    assert np.ptp(found) == 0


def test_zscore_has_mean_0_and_deviation_1():
    found = np.asarray(contrast.zscore(jnp.asarray(scenes())))
    np.testing.assert_allclose(found.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(found.std((1, 2)), 1, rtol=1e-5)


@pytest.mark.parametrize("clip", [2.0, 8.0])
def test_clahe_is_that_of_a_loop_over_pixels(clip):
    images = scenes(2, 64)
    found = np.asarray(jax.jit(lambda images: contrast.clahe(images, 4, clip))(jnp.asarray(images)))
    expected = [reference.clahe(levels_of(image), 4, clip) for image in images]
    # float32 and float64 may round a table's entry at a half to neighbouring levels
    np.testing.assert_allclose(found, expected, atol=1.01)
    assert np.abs(found - expected).mean() < 0.01


def test_clahe_does_what_scikit_images_does():
    """Its limit is a share of the tile's pixels and its tiles are placed a little otherwise, so it is alike only."""
    image = scenes(1, 128)[0]
    ours = np.asarray(contrast.clahe(jnp.asarray(image[None]), 4, 2.0))[0]
    theirs = equalize_adapthist(levels_of(image).astype(np.uint8), kernel_size=32, clip_limit=2 / 256)
    plain = np.corrcoef(image.ravel(), theirs.ravel())[0, 1]
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > max(0.98, plain)
    np.testing.assert_allclose(ours / 255, theirs, atol=0.15)


def test_clahe_of_a_side_that_the_tiles_do_not_divide():
    found = np.asarray(contrast.clahe(jnp.asarray(scenes(1, 30)), 4))
    assert found.shape == (1, 30, 30)
    assert 0 <= found.min() < found.max() <= 255


def test_a_symmetric_image_has_no_asymmetry_and_a_spot_has_its_own_on_both_sides():
    half = np.random.default_rng(0).normal(size=(1, 32, 16)).astype(np.float32)
    even = jnp.asarray(np.concatenate([half, half[..., ::-1]], axis=-1))
    assert float(contrast.asymmetry(even, 1.5).max()) < 1e-5
    spotted = even.at[0, 10, 5].add(3.0)
    found = contrast.asymmetry(spotted, 0.0)
    np.testing.assert_allclose(found[0, 10, [5, 26]], 3.0, rtol=1e-5)
    assert float(found.sum()) == pytest.approx(6.0, rel=1e-4)
    np.testing.assert_allclose(found, found[..., ::-1], atol=1e-6)


@pytest.mark.parametrize("sigma_px", [0.0, 0.7, 3.0])
def test_blurring_is_scipys(sigma_px):
    images = np.random.default_rng(1).normal(size=(2, 24, 24)).astype(np.float32)
    expected = gaussian_filter(images, (0, sigma_px, sigma_px), mode="nearest")
    np.testing.assert_allclose(contrast.blurred(jnp.asarray(images), sigma_px), expected, atol=1e-5)
