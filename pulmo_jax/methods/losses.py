"""Training losses of images: a function of an image and its reconstruction that returns a value per pixel and band."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from pulmo_jax.core.ssim import ssim_map

ImageLoss = Callable[..., Float[Array, "B H W C"]]  # called with image=, reconstruction=


def l2(image: Float[Array, "B H W C"], reconstruction: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Squared difference."""
    return (image - reconstruction) ** 2


def l1(image: Float[Array, "B H W C"], reconstruction: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Absolute difference."""
    return jnp.abs(image - reconstruction)


def ssim(image: Float[Array, "B H W C"], reconstruction: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """1 - SSIM (Wang et al. 2004), for values of range 1."""
    return 1 - ssim_map(image, reconstruction)
