"""Mean and covariance of a patch whose frames are not equally good: r_t ~ N(m, s_t^2 C).

Flasseur, Denis, Thiébaut & Langlois 2020 (A&A 634, A2), "F20": the frames' scales s_t, the mean and the covariance
each follow from the others, and are iterated to a fixed point. It is Tyler's estimator (1987, Annals of Statistics
15:234) with a mean and shrinkage. Works on one location; `vmap` makes it many.

Only s_t^2 C is determined: s_t twice as large and C a quarter describe the same frames. Here the mean of s_t^-2 is 1.
C is then the covariance of the frames over their s_t, as F20 has it, and its variances are theirs, shrunk or not. (The
s_t^2 that follow from a shrunk C in turn are too small throughout: to iterate F20's equations as they stand makes s_t
smaller and C larger without end.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core.covariance import Factor, Shrinkage, factorise, sample_covariance, shrink
from pulmo_jax.core.likelihood import mahalanobis

LEAST_SCALE = 0.1  # of the median s_t^2; a smaller one is raised to it
MAX_ITERATIONS = 200


class Statistics(NamedTuple):
    """Of frames with given weights: mean, deviations from it, their variance, weight of C's diagonal, C's factor."""

    mean: Float[Array, "P"]
    deviations: Float[Array, "T P"]
    variance: Float[Array, "P"]
    rho: Float[Array, ""]
    factor: Factor


class ScaleMixture(NamedTuple):
    """The fixed point. weights: s_t^-2, of mean 1. settled: whether it was reached within the iterations allowed."""

    statistics: Statistics
    weights: Float[Array, "T"]
    iterations: Int[Array, ""]
    settled: Bool[Array, ""]


def effective_share(weights: Float[Array, "T"]) -> Float[Array, ""]:
    """(sum w)^2 / (T sum w^2), the share of the frames that they are worth (Kish 1965; F20's T in rho, over T)."""
    return weights.sum() ** 2 / (len(weights) * (weights**2).sum())


def weighted_statistics(
    samples: Float[Array, "T P"], weights: Float[Array, "T"], n: Float[Array, ""], shrinkage: Shrinkage
) -> Statistics:
    """n: number of independent frames, if all weigh the same. Pixels that never vary stand alone (`factorise`).

    Estimators of rho that look at the frames are given them over their scales, which have C as their covariance.
    """
    mean = weights @ samples / weights.sum()
    deviations = samples - mean
    s = sample_covariance(deviations, weights)
    alike = deviations * jnp.sqrt(weights / weights.mean())[:, None]
    rho = shrinkage(s, alike, n * effective_share(weights))
    factor = factorise(shrink(s, rho), jnp.diag(s) > 0)
    return Statistics(mean, deviations, jnp.diag(s), jnp.where(factor.singular, 1, rho), factor)


def squared_scales(of: Statistics) -> Float[Array, "T"]:
    """(r_t - m)' C^-1 (r_t - m) / P over the pixels that vary, at least LEAST_SCALE of its median: s_t^2 to a factor.

    Without a floor the likelihood has no maximum: a frame equal to the mean has s_t = 0 and all of the weight, and the
    mean moves on to any frame that it is near to. A floor bounds a frame's weight to ten times the median's.
    """
    n_pixels = jnp.maximum((of.variance > 0).sum(), 1)
    squared = mahalanobis(of.deviations, of.factor.lower) / n_pixels
    median = jnp.median(squared)
    usual = jnp.where(median > 0, median, squared.mean())  # most frames may be equal to each other
    return jnp.where(usual > 0, jnp.maximum(squared, LEAST_SCALE * usual), 1)


class _State(NamedTuple):
    weights: Array
    change: Array
    iterations: Array


def scale_mixture(
    samples: Float[Array, "T P"],
    n: Float[Array, ""],
    shrinkage: Shrinkage,
    tolerance: float,
    most: int = MAX_ITERATIONS,
) -> ScaleMixture:
    """From equal weights on, until no frame's weight changes by more than `tolerance` of itself, or `most` times.

    samples: 0 at pixels that do not count. most=0: equal weights, which is what `sample_covariance` rests on.
    """

    def improve(state: _State) -> _State:
        inverse = 1 / squared_scales(weighted_statistics(samples, state.weights, n, shrinkage))
        weights = inverse / inverse.mean()
        change = abs(jnp.log(weights / state.weights)).max()
        return _State(weights, change, state.iterations + 1)

    start = _State(jnp.ones_like(samples[:, 0]), jnp.full_like(samples[0, 0], jnp.inf), jnp.zeros((), jnp.int32))
    end = jax.lax.while_loop(lambda s: (s.change > tolerance) & (s.iterations < most), improve, start)
    statistics = weighted_statistics(samples, end.weights, n, shrinkage)
    return ScaleMixture(statistics, end.weights, end.iterations, end.change <= tolerance)
