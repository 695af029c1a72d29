"""Robust mean and covariance of a patch with frame-dependent noise level: r_t ~ N(m, s_t^2 C).

Flasseur, Denis, Thiébaut and Langlois 2020 (A&A 634, A2), cited as "F20". The scales s_t of the frames, the mean and
the covariance depend on each other and are iterated to a fixed point. This is Tyler's estimator (1987, Annals of
Statistics 15:234) with a mean and shrinkage. Functions handle a single location and are vectorised with `vmap`.

Only the product s_t^2 C is identifiable: doubling all s_t and dividing C by four describes the same frames. The scales
are normalised so that the mean of s_t^-2 is 1. C is then the covariance of the frames divided by their s_t, as in F20,
and its variances do not depend on the shrinkage. This departs from F20: the s_t^2 computed from a shrunk C are
systematically too small, so that iterating the equations of F20 as printed drives s_t to zero and C to infinity.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core.covariance import Factor, Shrinkage, factorise, sample_covariance, shrink
from pulmo_jax.core.likelihood import mahalanobis

LEAST_SCALE = 0.1  # lower bound of s_t^2, relative to the median
MAX_ITERATIONS = 200
SOLVE_ROUNDINGS = 10  # accuracy of the derivative of the fixed point, in roundings of its largest element


class Statistics(NamedTuple):
    """Weighted statistics of a patch.

    Attributes:
        mean: Weighted mean.
        deviations: Deviations of the frames from the mean.
        variance: Weighted variance of each pixel.
        rho: Shrinkage factor; 1 if the covariance is singular.
        factor: Cholesky factor of the shrunk covariance.
    """

    mean: Float[Array, "P"]
    deviations: Float[Array, "T P"]
    variance: Float[Array, "P"]
    rho: Float[Array, ""]
    factor: Factor


class ScaleMixture(NamedTuple):
    """Fixed point of the robust estimator.

    Attributes:
        statistics: Statistics at the fixed point.
        weights: Frame weights s_t^-2, with mean 1.
        iterations: Number of iterations.
        converged: Whether the tolerance was reached within the allowed number of iterations.
    """

    statistics: Statistics
    weights: Float[Array, "T"]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def effective_share(weights: Float[Array, "T"]) -> Float[Array, ""]:
    """Effective fraction of the frames, (sum w)^2 / (T sum w^2).

    Args:
        weights: Frame weights.

    Returns:
        Effective sample size divided by T; F20 uses the effective sample size in the shrinkage factor.

    Reference:
        Kish 1965, Survey Sampling.
    """
    return weights.sum() ** 2 / (len(weights) * (weights**2).sum())


def weighted_statistics(
    samples: Float[Array, "T P"], weights: Float[Array, "T"], n: Float[Array, ""], shrinkage: Shrinkage
) -> Statistics:
    """Mean, shrunk covariance and its factor for given frame weights.

    Pixels with zero variance are treated as independent (see `factorise`). Shrinkage estimators that use the frames
    receive them divided by their scales, so that their covariance is C.

    Args:
        samples: T frames of P pixels.
        weights: Frame weights s_t^-2.
        n: Effective number of independent frames for equal weights.
        shrinkage: Shrinkage estimator (S, deviations, n) -> rho.

    Returns:
        The weighted statistics.
    """
    mean = weights @ samples / weights.sum()
    deviations = samples - mean
    s = sample_covariance(deviations, weights)
    rescaled = deviations * jnp.sqrt(weights / weights.mean())[:, None]
    rho = shrinkage(s, rescaled, n * effective_share(weights))
    factor = factorise(shrink(s, rho), jnp.diag(s) > 0)
    return Statistics(mean, deviations, jnp.diag(s), jnp.where(factor.singular, 1, rho), factor)


def squared_scales(statistics: Statistics) -> Float[Array, "T"]:
    """Squared frame scales s_t^2 up to a common factor: (r_t - m)' C^-1 (r_t - m) / P over the pixels that vary.

    Values below `LEAST_SCALE` times the median are raised to it. Without this bound the likelihood is unbounded: a
    frame equal to the mean has s_t = 0 and takes all the weight, and the mean can move onto any nearby frame. The bound
    limits the weight of a frame to ten times that of the median frame.

    Args:
        statistics: Weighted statistics.

    Returns:
        Squared scales.
    """
    n_pixels = jnp.maximum((statistics.variance > 0).sum(), 1)
    squared = mahalanobis(statistics.deviations, statistics.factor.lower) / n_pixels
    median = jnp.median(squared)
    typical = jnp.where(median > 0, median, squared.mean())  # the median is 0 if most frames are identical
    return jnp.where(typical > 0, jnp.maximum(squared, LEAST_SCALE * typical), 1)


class _State(NamedTuple):
    """State of the fixed-point iteration: frame weights, largest relative change and number of iterations."""

    weights: Array
    change: Array
    iterations: Array


def scale_mixture(
    samples: Float[Array, "T P"],
    n: Float[Array, ""],
    shrinkage: Shrinkage,
    tolerance: float,
    max_iterations: int = MAX_ITERATIONS,
) -> ScaleMixture:
    """Iterate frame weights, mean and covariance to their fixed point, starting from equal weights.

    The fixed point w = F(w, samples) is differentiated implicitly, dw = (I - F_w)^-1 F_samples dsamples, in forward and
    reverse mode; the derivative is exact at convergence and has the relative error of `tolerance` else.

    Args:
        samples: T frames of P pixels; pixels to be ignored are 0.
        n: Effective number of independent frames for equal weights.
        shrinkage: Shrinkage estimator (S, deviations, n) -> rho.
        tolerance: Largest relative change of a frame weight at convergence.
        max_iterations: Maximum number of iterations; 0 gives equal weights, as in `sample_covariance`.

    Returns:
        The fixed point.

    Reference:
        F20, with the normalisation described in the module docstring.
    """

    end = settle(shrinkage, tolerance, max_iterations, samples, n)
    statistics = weighted_statistics(samples, end.weights, n, shrinkage)
    return ScaleMixture(statistics, end.weights, end.iterations, end.change <= tolerance)


def improve_weights(
    shrinkage: Shrinkage, weights: Float[Array, "T"], samples: Float[Array, "T P"], n: Float[Array, ""]
) -> Float[Array, "T"]:
    """One step w -> F(w) of the fixed-point iteration (see `scale_mixture`)."""
    inverse = 1 / squared_scales(weighted_statistics(samples, weights, n, shrinkage))
    return inverse / inverse.mean()


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def settle(
    shrinkage: Shrinkage, tolerance: float, max_iterations: int, samples: Float[Array, "T P"], n: Float[Array, ""]
) -> _State:
    """Iterate the frame weights to their fixed point (see `scale_mixture`)."""

    def improve(state: _State) -> _State:
        weights = improve_weights(shrinkage, state.weights, samples, n)
        change = abs(jnp.log(weights / state.weights)).max()
        return _State(weights, change, state.iterations + 1)

    start = _State(jnp.ones_like(samples[:, 0]), jnp.full_like(samples[0, 0], jnp.inf), jnp.zeros((), jnp.int32))
    return jax.lax.while_loop(lambda s: (s.change > tolerance) & (s.iterations < max_iterations), improve, start)


@settle.defjvp
def _(
    shrinkage: Shrinkage, tolerance: float, max_iterations: int, primals: tuple[Array, Array], tangents: tuple[Any, Any]
) -> tuple[_State, _State]:
    """Derivative of the fixed point w = F(w, samples, n): (I - F_w) dw = F_samples dsamples + F_n dn."""
    end = settle(shrinkage, tolerance, max_iterations, *primals)
    _, right = jax.jvp(partial(improve_weights, shrinkage, end.weights), primals, tangents)

    def operator(v: Array) -> Array:
        return v - jax.jvp(lambda w: improve_weights(shrinkage, w, *primals), (end.weights,), (v,))[1]

    dw = solve_contraction(operator, right)
    still: Any = np.zeros((), jax.dtypes.float0)  # the tangent of an integer
    return end, _State(dw, jnp.zeros_like(end.change), still)


def solve_contraction(
    operator: Callable[[Float[Array, "T"]], Float[Array, "T"]], right: Float[Array, "T"]
) -> Float[Array, "T"]:
    """Solve the linear system A v = right by v <- v + right - A v, which converges if I - A is a contraction.

    For the derivative of the fixed point w = F(w), A is I - F'(w); the iteration converges as fast as the one that
    found w. Its transpose is solved in the same way, so the result has forward and reverse derivatives of any order.

    Args:
        operator: The linear function v -> A v.
        right: Right-hand side.

    Returns:
        The solution, to `SOLVE_ROUNDINGS` roundings of its largest element.
    """
    accuracy = SOLVE_ROUNDINGS * float(jnp.finfo(right.dtype).eps)

    def solve(matvec: Callable[[Array], Array], right: Array) -> Array:
        def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            solution, _, iteration = state
            residual = right - matvec(solution)
            return solution + residual, residual, iteration + 1

        def goes_on(state: tuple[Array, Array, Array]) -> Array:
            solution, residual, iteration = state
            return (abs(residual).max() > accuracy * abs(solution).max()) & (iteration < MAX_ITERATIONS)

        return jax.lax.while_loop(goes_on, step, (right, right, jnp.zeros((), jnp.int32)))[0]

    return jax.lax.custom_linear_solve(operator, right, solve, transpose_solve=solve)
