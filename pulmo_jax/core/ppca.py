"""Probabilistic principal component analysis (PPCA): a Gaussian with low-rank covariance plus isotropic noise.

Reference:
    M. E. Tipping and C. M. Bishop, "Probabilistic principal component analysis", J. R. Statist. Soc. B 61 (1999) 611;
    cited as "TB".
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6  # lower bound of all variances, relative to the mean variance of a coordinate


class PPCA(NamedTuple):
    """Parameters of a fitted PPCA model.

    Attributes:
        mean: Mean vector.
        components: Orthonormal principal axes, one per row.
        variance: Variance along each principal axis.
        noise: Variance in every direction orthogonal to the principal axes.
    """

    mean: Float[Array, "P"]
    components: Float[Array, "M P"]
    variance: Float[Array, "M"]
    noise: Float[Array, ""]


def fit(vectors: Float[Array, "N P"], n_components: int) -> PPCA:
    """Maximum-likelihood estimate of the PPCA parameters.

    Args:
        vectors: N samples of P coordinates.
        n_components: Number of principal axes M, 0 < M < min(N, P).

    Returns:
        The fitted model. Variances are bounded from below by `EPS` times the mean variance of a coordinate.

    Raises:
        ValueError: If `n_components` is out of range.

    Reference:
        TB, Eqs. 7 and 8.
    """
    n, p = vectors.shape
    if not 0 < n_components < min(n, p):
        raise ValueError(
            f"n_components={n_components}: for {n} vectors of length {p} it must be between 1 and {min(n, p) - 1}"
        )
    mean = vectors.mean(0)
    _, singular, directions = jnp.linalg.svd(vectors - mean, full_matrices=False)
    variance = singular**2 / n
    noise = variance[n_components:].sum() / (p - n_components)
    floor = EPS * variance.sum() / p
    retained = jnp.maximum(variance[:n_components], floor)
    return PPCA(mean, directions[:n_components], retained, jnp.maximum(noise, floor))


def negative_log_likelihood(model: PPCA, vectors: Float[Array, "N P"]) -> Float[Array, "N"]:
    """Negative log-likelihood -ln p(x) under N(mean, C) with C = W W' + sigma^2 I.

    The components are eigenvectors of C, so no linear system has to be solved.

    Args:
        model: Fitted PPCA model.
        vectors: N samples of P coordinates.

    Returns:
        Negative log-likelihood of each sample, in nats.

    Reference:
        TB, Eq. 4.
    """
    deviation = vectors - model.mean
    projection = deviation @ model.components.T
    residual = deviation - projection @ model.components
    distance = (projection**2 / model.variance).sum(1) + (residual**2).sum(1) / model.noise
    m, p = model.components.shape
    log_determinant = jnp.log(model.variance).sum() + (p - m) * jnp.log(model.noise)
    return 0.5 * (p * jnp.log(2 * jnp.pi) + log_determinant + distance)
