"""A known template in Gaussian noise: the likelihood terms a and b, and what follows from them.

Flasseur et al. 2018 (A&A 618, A138), "F18": a = h' C^-1 h and b = h' C^-1 (r - m), summed over frames, give the flux
b / a with the standard deviation 1 / sqrt(a), and the signal-to-noise ratio b / sqrt(a). With the template unknown, the
maximum over it is Mahalanobis' distance (r - m)' C^-1 (r - m).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float


class Filter(NamedTuple):
    """J templates whitened against one covariance: weights = C^-1 H, and the Gram matrix H' C^-1 H."""

    weights: Float[Array, "P J"]
    gram: Float[Array, "J J"]


def matched_filter(templates: Float[Array, "J P"], lower: Float[Array, "P P"]) -> Filter:
    """From Cholesky's factor of the covariance; the rows of `templates` are combined linearly by the caller."""
    weights = cho_solve((lower, True), templates.T)
    return Filter(weights, templates @ weights)


def whiten(deviation: Float[Array, "*batch P"], lower: Float[Array, "P P"]) -> Float[Array, "*batch P"]:
    """L^-1 d, of unit covariance where d has C = L L'."""
    flat = deviation.reshape(-1, deviation.shape[-1])
    return solve_triangular(lower, flat.T, lower=True).T.reshape(deviation.shape)


def mahalanobis(deviation: Float[Array, "*batch P"], lower: Float[Array, "P P"]) -> Float[Array, "*batch"]:
    """d' C^-1 d, chi-squared with P degrees of freedom for Gaussian d."""
    return (whiten(deviation, lower) ** 2).sum(-1)


def terms(
    template: Float[Array, "P"], deviation: Float[Array, "P"], lower: Float[Array, "P P"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """a and b of one patch (F18 eq. 14)."""
    whitened = whiten(jnp.stack([template, deviation]), lower)
    return whitened[0] @ whitened[0], whitened[0] @ whitened[1]


def snr(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """b / sqrt(a), standard normal without a source; NaN where a is not above 0."""
    return jnp.where(a > 0, b / jnp.sqrt(jnp.where(a > 0, a, 1)), jnp.nan)


def flux(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """b / a, the most likely one (F18 eq. 15); NaN where a is not above 0."""
    return jnp.where(a > 0, b / jnp.where(a > 0, a, 1), jnp.nan)


def flux_std(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / sqrt(a); NaN where a is not above 0."""
    return jnp.where(a > 0, 1 / jnp.sqrt(jnp.where(a > 0, a, 1)), jnp.nan)
