"""Structural similarity (SSIM; Wang, Bovik, Sheikh and Simoncelli 2004, IEEE TIP 13:600), differentiable."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

WINDOW_PX, WINDOW_SIGMA_PX = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim_map(
    a: Float[Array, "B H W C"], b: Float[Array, "B H W C"], data_range: float = 1.0
) -> Float[Array, "B H W C"]:
    """Structural similarity of two images at every pixel.

    The window is a Gaussian of 11 x 11 pixels with sigma 1.5; edges are padded by reflection. Moments are population
    moments, as in the paper: the result equals scikit-image with `gaussian_weights=True` and
    `use_sample_covariance=False`.

    Args:
        a: First image.
        b: Second image.
        data_range: Intensity range of the images.

    Returns:
        SSIM of each pixel and channel.

    Reference:
        Eq. 13.
    """
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return luminance * structure


def _blur(x: jax.Array) -> jax.Array:
    """Separable Gaussian blur as two small matrix products; for 64 px on two cores 9 times faster than shifted sums.

    Uses full precision: the variance is a small difference of two blurs, and TF32 (10 mantissa bits), the default on
    GPUs, changes SSIM by up to 0.7 in bright images of low contrast.
    """
    rows, columns = (jnp.asarray(blur_matrix(size), x.dtype) for size in x.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)


def blur_matrix(size: int) -> Float[np.ndarray, "size size"]:
    """Matrix of the Gaussian window along one axis; edges are padded by reflection that includes the edge pixel.

    Args:
        size: Length of the axis in pixels.

    Returns:
        Blur matrix.
    """
    offset = np.arange(WINDOW_PX) - WINDOW_PX // 2
    kernel = np.exp(-0.5 * (offset / WINDOW_SIGMA_PX) ** 2)
    source = np.pad(np.arange(size), WINDOW_PX // 2, mode="symmetric")
    matrix = np.zeros((size, size))
    for k, weight in enumerate(kernel / kernel.sum()):
        np.add.at(matrix, (np.arange(size), source[k : k + size]), weight)
    return matrix
