"""Detection of a known template in Gaussian noise: the likelihood terms a and b, and the statistics derived from them.

Flasseur et al. 2018 (A&A 618, A138), cited as "F18": a = h' C^-1 h and b = h' C^-1 (r - m), summed over frames. The
flux estimate is b / a with standard deviation 1 / sqrt(a), and the signal-to-noise ratio is b / sqrt(a). For an unknown
template, maximising over it gives the squared Mahalanobis distance (r - m)' C^-1 (r - m).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Float


class Filter(NamedTuple):
    """Matched filters for J templates and one covariance.

    Attributes:
        weights: C^-1 H for the templates H.
        gram: Gram matrix H' C^-1 H.
    """

    weights: Float[Array, "P J"]
    gram: Float[Array, "J J"]


def matched_filter(templates: Float[Array, "J P"], lower: Float[Array, "P P"]) -> Filter:
    """Compute matched filters from the Cholesky factor of the covariance.

    Args:
        templates: J templates of P pixels; callers use linear combinations of them.
        lower: Lower Cholesky factor of the covariance.

    Returns:
        Filter weights and Gram matrix.
    """
    weights = cho_solve((lower, True), templates.T)
    return Filter(weights, templates @ weights)


def whiten(deviation: Float[Array, "*batch P"], lower: Float[Array, "P P"]) -> Float[Array, "*batch P"]:
    """Whiten deviations: L^-1 d has unit covariance if d has covariance C = L L'.

    Args:
        deviation: Deviations from the mean.
        lower: Lower Cholesky factor L of the covariance.

    Returns:
        Whitened deviations.
    """
    flat = deviation.reshape(-1, deviation.shape[-1])
    return solve_triangular(lower, flat.T, lower=True).T.reshape(deviation.shape)


def mahalanobis(deviation: Float[Array, "*batch P"], lower: Float[Array, "P P"]) -> Float[Array, "*batch"]:
    """Squared Mahalanobis distance d' C^-1 d; chi-squared with P degrees of freedom for Gaussian d.

    Args:
        deviation: Deviations from the mean.
        lower: Lower Cholesky factor of the covariance.

    Returns:
        Squared distances.

    Example:
        >>> lower = jnp.linalg.cholesky(jnp.diag(jnp.array([4.0, 1.0])))  # variances 4 and 1
        >>> mahalanobis(jnp.array([2.0, 3.0]), lower).tolist()
        10.0
    """
    return (whiten(deviation, lower) ** 2).sum(-1)


def terms(
    template: Float[Array, "P"], deviation: Float[Array, "P"], lower: Float[Array, "P P"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Likelihood terms a and b of a single patch.

    Args:
        template: Expected signal for unit flux.
        deviation: Deviation of the patch from the mean.
        lower: Lower Cholesky factor of the covariance.

    Returns:
        a = h' C^-1 h and b = h' C^-1 d.

    Reference:
        F18, Eq. 14.
    """
    whitened = whiten(jnp.stack([template, deviation]), lower)
    return whitened[0] @ whitened[0], whitened[0] @ whitened[1]


def snr(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Signal-to-noise ratio b / sqrt(a), standard normal in the absence of a source.

    Args:
        a: Likelihood term a.
        b: Likelihood term b.

    Returns:
        Signal-to-noise ratio; NaN where a <= 0.
    """
    return jnp.where(a > 0, b / jnp.sqrt(jnp.where(a > 0, a, 1)), jnp.nan)


def flux(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Maximum-likelihood flux b / a.

    Args:
        a: Likelihood term a.
        b: Likelihood term b.

    Returns:
        Flux in units of the template; NaN where a <= 0.

    Reference:
        F18, Eq. 15.
    """
    return jnp.where(a > 0, b / jnp.where(a > 0, a, 1), jnp.nan)


def flux_std(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Standard deviation of the flux, 1 / sqrt(a).

    Args:
        a: Likelihood term a.

    Returns:
        Standard deviation in units of the template; NaN where a <= 0.
    """
    return jnp.where(a > 0, 1 / jnp.sqrt(jnp.where(a > 0, a, 1)), jnp.nan)
