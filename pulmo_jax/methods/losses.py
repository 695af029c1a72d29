"""Training losses of images: functions of an image and its reconstruction with a value per pixel and channel."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from pulmo_jax.core.ssim import ms_ssim_map, ssim_map

ImageLoss = Callable[..., Float[Array, "B H W C"]]  # called with image=, reconstruction=


def l2(image: Float[Array, "B H W C"], reconstruction: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Compute the squared difference per pixel and channel."""
    return (image - reconstruction) ** 2


def l1(image: Float[Array, "B H W C"], reconstruction: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Compute the absolute difference per pixel and channel."""
    return jnp.abs(image - reconstruction)


def ssim(image: Float[Array, "B H W C"], reconstruction: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Compute 1 - SSIM (Wang et al. 2004) per pixel and channel, for a data range of 1."""
    return 1 - ssim_map(image, reconstruction)


def ms_ssim(image: Float[Array, "B H W C"], reconstruction: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Compute 1 - multi-scale SSIM (Wang et al. 2003) per pixel and channel, for a data range of 1."""
    return 1 - ms_ssim_map(image, reconstruction)
