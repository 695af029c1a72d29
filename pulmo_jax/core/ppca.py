"""Probabilistic principal component analysis: how likely a vector is under a Gaussian of low rank plus white noise.

Tipping & Bishop, "Probabilistic principal component analysis", J. R. Statist. Soc. B 61 (1999) 611, here "TB".
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6  # of the total variance: below it noise is none


class PPCA(NamedTuple):
    """components: orthonormal. variance: along each. noise: the variance in every other direction."""

    mean: Float[Array, "P"]
    components: Float[Array, "M P"]
    variance: Float[Array, "M"]
    noise: Float[Array, ""]


def fit(vectors: Float[Array, "N P"], n_components: int) -> PPCA:
    """The maximum of the likelihood (TB eqs. 7 and 8), for 0 < n_components < min(N, P)."""
    n, p = vectors.shape
    if not 0 < n_components < min(n, p):
        raise ValueError(f"n_components is {n_components}; of {n} vectors of {p} it must be in 1 … {min(n, p) - 1}")
    mean = vectors.mean(0)
    _, singular, directions = jnp.linalg.svd(vectors - mean, full_matrices=False)
    variance = singular**2 / n
    noise = variance[n_components:].sum() / (p - n_components)
    floor = EPS * variance.sum() / p
    kept = jnp.maximum(variance[:n_components], floor)
    return PPCA(mean, directions[:n_components], kept, jnp.maximum(noise, floor))


def negative_log_likelihood(model: PPCA, vectors: Float[Array, "N P"]) -> Float[Array, "N"]:
    """-ln p(x) with C = W W' + sigma^2 I (TB eq. 4), in nats; components are eigenvectors of C: nothing is solved."""
    deviation = vectors - model.mean
    score = deviation @ model.components.T
    rest = deviation - score @ model.components
    distance = (score**2 / model.variance).sum(1) + (rest**2).sum(1) / model.noise
    m, p = model.components.shape
    log_determinant = jnp.log(model.variance).sum() + (p - m) * jnp.log(model.noise)
    return 0.5 * (p * jnp.log(2 * jnp.pi) + log_determinant + distance)
