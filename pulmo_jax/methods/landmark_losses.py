"""Training losses of landmarks: functions of displacements and heat-map covariances with a value per landmark.

Displacements (predicted minus true) are in % of the side length of the image, covariances in %^2.
"""

import math
from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

LandmarkLoss = Callable[..., Float[Array, "*B"]]  # called with displacement=, covariance=


def laplace(
    displacement: Float[Array, "*B 2"],
    covariance: Float[Array, "*B 2 2"],
    least_sd: Annotated[
        float, Field(gt=0, description="standard deviation added to that of the heat map, % of the side")
    ] = 0.25,
) -> Float[Array, "*B"]:
    """Compute the negative log-likelihood of a bivariate Laplacian, log|C| / 2 + sqrt(3 d' C^-1 d), up to a constant.

    It is differentiable at 0.

    Args:
        displacement: Displacements d, % of the side.
        covariance: Covariances of the heat maps, %^2.
        least_sd: Standard deviation that is added in quadrature to give C, % of the side.

    Returns:
        The losses, nats.

    Reference:
        Kumar et al. 2020, LUVLi, Eq. 9. There a separate network branch predicts the covariance.
    """
    covariance = covariance + least_sd**2 * jnp.eye(2)
    yy, yx, xx = covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]
    dy, dx = displacement[..., 0], displacement[..., 1]
    determinant = yy * xx - yx**2
    squared = (xx * dy**2 - 2 * yx * dy * dx + yy * dx**2) / determinant
    return 0.5 * jnp.log(determinant) + jnp.sqrt(3 * squared + 1e-6)


def wing(
    displacement: Float[Array, "*B 2"],
    covariance: Float[Array, "*B 2 2"],
    width: Annotated[float, Field(gt=0, description="error at which the loss becomes linear, % of the side")] = 5.0,
    curve: Annotated[float, Field(gt=0, description="curvature of the logarithmic part")] = 1.0,
) -> Float[Array, "*B"]:
    """Compute the wing loss: logarithmic for small displacements, linear for large ones.

    Args:
        displacement: Displacements, % of the side.
        covariance: Unused.
        width: Error at which the loss becomes linear, % of the side.
        curve: Curvature of the logarithmic part, % of the side.

    Returns:
        The losses, summed over both coordinates.

    Reference:
        Feng et al. 2018, "Wing loss", Eq. 5.
    """
    size = jnp.abs(displacement)
    step = width - width * math.log1p(width / curve)
    near = width * jnp.log1p(size / curve)
    return jnp.where(size < width, near, size - step).sum(-1)


def l1(displacement: Float[Array, "*B 2"], covariance: Float[Array, "*B 2 2"]) -> Float[Array, "*B"]:
    """Compute the sum of absolute displacements along y and x, % of the side; the covariance is unused."""
    return jnp.abs(displacement).sum(-1)


def l2(displacement: Float[Array, "*B 2"], covariance: Float[Array, "*B 2 2"]) -> Float[Array, "*B"]:
    """Compute the squared length of the displacements, %^2; the covariance is unused."""
    return (displacement**2).sum(-1)
