"""SSIM and multi-scale SSIM against scikit-image, edges included, and their gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references.image_operations import bilinear_weights
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from pulmo_jax.core.ssim import LEAST_STRUCTURE, SCALE_WEIGHTS, ms_ssim_map, scale_factors, scale_weights, ssim_map

ssim = jax.jit(ssim_map, static_argnames="data_range")


@jax.jit
def gradient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of the summed map in b."""
    return jax.grad(lambda x: ssim_map(a, x).sum())(b)


def scikit_image(a: np.ndarray, b: np.ndarray, data_range: float = 1.0) -> np.ndarray:
    """The map of two (H, W, C) images in float64. scikit-image reflects at the edges, as SciPy's "reflect"."""
    _, result = structural_similarity(
        a.astype(np.float64),
        b.astype(np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=data_range,
        channel_axis=-1,
        full=True,
    )
    return result


def by_definition(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Eq. 13 of Wang et al. in float64, for images below scikit-image's least size."""

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=5, mode="reflect", axes=(0, 1))

    a, b = a.astype(np.float64), b.astype(np.float64)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a**2) - ma**2, mean(b**2) - mb**2, mean(a * b) - ma * mb
    return (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))


def pair(shape: tuple[int, ...], seed: int = 0, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.uniform(0, 1, shape)
    return a.astype(np.float32), np.clip(a + noise * rng.standard_normal(shape), 0, 1).astype(np.float32)


@pytest.mark.parametrize(("shape", "data_range"), [((11, 11, 1), 1.0), ((12, 37, 3), 2.0)])
def test_equals_scikit_image_up_to_the_edges(shape, data_range):
    pairs = [pair(shape, seed) for seed in range(3)]
    a, b = (jnp.stack(side) for side in zip(*pairs, strict=True))
    for found, (one, other) in zip(ssim(a, b, data_range=data_range), pairs, strict=True):
        np.testing.assert_allclose(found, scikit_image(one, other, data_range), atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (8, 8, 1)])
def test_images_smaller_than_the_window(shape):
    a, b = pair(shape)
    np.testing.assert_allclose(ssim(a[None], b[None])[0], by_definition(a, b), atol=2e-5)


def test_bright_images_of_low_contrast_keep_their_precision():
    """At the upper clip of 2 the variance is a small difference of large float32 numbers."""
    a, b = (2 + 0.01 * (x - 0.5) for x in pair((24, 24, 1)))
    np.testing.assert_allclose(ssim(a[None], b[None])[0], scikit_image(a, b), atol=5e-3)


def test_products_are_asked_for_in_full_precision():
    """It makes no difference on a CPU, but all of it on a GPU."""
    a, b = (x[None] for x in pair((16, 16, 1)))
    products = [e for e in jax.make_jaxpr(ssim)(a, b).jaxpr.eqns[0].params["jaxpr"].eqns if "precision" in e.params]
    assert all(set(e.params["precision"]) == {jax.lax.Precision.HIGHEST} for e in products)
    assert products


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_is_symmetric_and_one_only_for_equal_images(seed, noise):
    a, b = (x[None] for x in pair((16, 16, 1), seed, noise))
    np.testing.assert_array_equal(ssim(a, b), ssim(b, a))
    assert float(ssim(a, b).max()) <= 1 + 1e-5  # float32: a variance is a small difference
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.5, 2.0])
def test_the_gradient_at_equal_images_is_zero_not_nan(value):
    """The maximum, also where a constant image has no variance."""
    a, _ = pair((16, 16, 1))
    for image in (jnp.full((1, 16, 16, 1), value), jnp.asarray(a[None])):
        np.testing.assert_allclose(gradient(image, image), 0, atol=2e-3)  # NaN is not close to 0


def test_the_gradient_is_that_of_finite_differences_of_scikit_image():
    a, b = pair((16, 16, 1))
    step = 1e-4 * np.random.default_rng(1).standard_normal(b.shape)
    ahead, behind = scikit_image(a, b + step).sum(), scikit_image(a, b - step).sum()
    change = float((gradient(a[None], b[None])[0] * step).sum())
    assert change == pytest.approx((ahead - behind) / 2, rel=1e-3)


# --- several scales


def structure_by_scikit_image(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Contrast and structure of (H, W, C) images: SSIM with a luminance constant so large that its factor is 1."""
    _, result = structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1, full=True,
        K1=1e6,
    )  # fmt: skip
    return result


def several_scales(a: np.ndarray, b: np.ndarray, n: int) -> list[np.ndarray]:
    """The factors of Eq. 7 of Wang et al. 2003 at each scale in float64, before they are averaged over the image."""
    a, b, factors = a.astype(np.float64), b.astype(np.float64), []
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:n])
    for scale in range(n):
        if scale:
            a, b = (
                np.stack(
                    [
                        [x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1)) for j in range(x.shape[1] // 2)]
                        for i in range(x.shape[0] // 2)
                    ]
                )
                for x in (a, b)
            )
        factor = np.maximum(structure_by_scikit_image(a, b), LEAST_STRUCTURE)
        if scale == n - 1:  # their product with the luminance is SSIM itself, where the structure is not limited
            factor = np.maximum(scikit_image(a, b) / structure_by_scikit_image(a, b), LEAST_STRUCTURE) * factor
        factors.append(factor ** (weights[scale] / weights.sum()))
    return factors


@pytest.mark.parametrize(("shape", "n"), [((64, 48, 1), 3), ((45, 47, 2), 3), ((12, 30, 1), 1), ((176, 176, 1), 5)])
def test_each_scale_is_that_of_scikit_image(shape, n):
    a, b = pair(shape)
    found, expected = jax.jit(scale_factors)(a[None], b[None]), several_scales(a, b, n)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[0], other, atol=1e-4)


def test_the_map_is_the_product_of_the_enlarged_scales():
    a, b = pair((45, 64, 2))
    product = np.ones(a.shape)
    for factor in several_scales(a, b, 3):
        rows, columns = (
            bilinear_weights(factor.shape[i], n) if factor.shape[i] != n else np.eye(n) for i, n in enumerate((45, 64))
        )
        product *= np.einsum("ih,hwc,jw->ijc", rows, factor, columns)
    np.testing.assert_allclose(jax.jit(ms_ssim_map)(a[None], b[None])[0], product, atol=1e-4)


@pytest.mark.parametrize(("side", "n"), [(1, 1), (8, 1), (21, 1), (22, 2), (64, 3), (175, 4), (176, 5), (5000, 5)])
def test_scales_smaller_than_the_window_are_left_out(side, n):
    weights = scale_weights(side)
    assert len(weights) == n
    assert sum(weights) == pytest.approx(1)
    np.testing.assert_allclose(np.divide(weights, weights[0]), np.divide(SCALE_WEIGHTS[:n], SCALE_WEIGHTS[0]))


def jax_pair(shape: tuple[int, ...], noise: float = 0.2) -> tuple[jax.Array, jax.Array]:
    a, b = pair(shape, noise=noise)
    return jnp.asarray(a[None]), jnp.asarray(b[None])


def test_one_scale_is_ssim_where_the_structure_is_not_limited():
    a, b = jax_pair((16, 16, 1), noise=0.05)
    np.testing.assert_allclose(ms_ssim_map(a, b), ssim(a, b), atol=3e-6)


def test_multi_scale_ssim_is_one_for_equal_images_and_its_gradient_is_finite():
    """Also where the structure is negative: an image and its negative."""
    a, b = jax_pair((32, 32, 1))
    np.testing.assert_allclose(ms_ssim_map(a, a), 1, atol=1e-5)
    slope = jax.jit(jax.grad(lambda x, a: ms_ssim_map(a, x).sum()))
    np.testing.assert_allclose(slope(a, a), 0, atol=2e-3)
    for other in (1 - a, jnp.zeros_like(a), b):
        assert np.isfinite(slope(other, a)).all()
    assert np.abs(slope(b, a)).max() > 0


def test_the_gradient_of_multi_scale_ssim_is_that_of_finite_differences():
    a, b = jax_pair((32, 32, 1), noise=0.05)
    step = 1e-3 * jax.random.normal(jax.random.key(1), b.shape)
    total = jax.jit(lambda x: ms_ssim_map(a, x).sum())
    change = float((jax.grad(total)(b) * step).sum())
    assert change == pytest.approx(float(total(b + step) - total(b - step)) / 2, rel=2e-2)
