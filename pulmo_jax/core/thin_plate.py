"""Thin-plate splines: the smoothest warp that maps given points to given points (Bookstein 1989, IEEE TPAMI 11:567).

f(q) = a + A q + sum_k w_k U(|q - c_k|), U(r) = r^2 log r^2, with w orthogonal to affine maps. All coefficients are
linear in the targets, so f(q) = sum_k weights_k(q) target_k with weights that depend on the centres c alone. The system
is solved once in float64, and each image costs a single product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.types import InputError

WORST_CONDITION = 1e13
LONGEST_STEP = 0.5  # of a Newton step, in units of the spread of the centres
LEAST_DETERMINANT = 1e-3  # of the Jacobian, relative to its squared norm; damps Newton steps where the map folds


class ThinPlate(NamedTuple):
    """Factorised thin-plate spline.

    Attributes:
        centres: Control points (y, x).
        middle: Mean of the centres, used to normalise coordinates.
        spread: Root-mean-square distance of the centres from their mean, used to normalise coordinates.
        solution: Matrix that maps the targets to the K weights w followed by a and A.
    """

    centres: Float[np.ndarray, "K 2"]
    middle: Float[np.ndarray, "2"]
    spread: Float[np.ndarray, ""]
    solution: Float[np.ndarray, "K+3 K"]


def fit(centres: Float[np.ndarray, "K 2"], stiffness: float = 0.0) -> ThinPlate:
    """Solve for the spline coefficients in normalised coordinates.

    Args:
        centres: Control points (y, x).
        stiffness: Smoothing parameter. 0 interpolates the targets exactly, larger values give a smoother approximation,
            and the limit is the least-squares affine map.

    Returns:
        The spline.

    Raises:
        InputError: If the centres coincide or are collinear.

    Reference:
        Bookstein 1989, L = [[U + stiffness 1, P], [P', 0]] with P = [1, c]; Wahba 1990, Spline Models, Section 2.4, for
        the stiffness.
    """
    n, middle = len(centres), centres.mean(0)
    spread = np.sqrt(((centres - middle) ** 2).sum(-1).mean())
    c = (centres - middle) / (spread or 1)
    square = ((c[:, None] - c) ** 2).sum(-1)
    bending = square * np.log(np.where(square > 0, square, 1)) + stiffness * np.eye(n)
    affine = np.concatenate([np.ones((n, 1)), c], axis=1)
    system = np.block([[bending, affine], [affine.T, np.zeros((3, 3))]])
    if not np.isfinite(system).all() or np.linalg.cond(system) > WORST_CONDITION:
        raise InputError(
            f"{n} points do not define a thin-plate spline: some coincide, all are collinear, or some are not finite; "
            "check the order and the values of the landmarks"
        )
    return ThinPlate(centres, middle, np.asarray(spread), np.linalg.solve(system, np.eye(n + 3, n)))


def weights(points: Float[Array, "*P 2"], plate: ThinPlate) -> Float[Array, "*P K"]:
    """Weight of each target at given points.

    Args:
        points: Points (y, x).
        plate: Thin-plate spline.

    Returns:
        Weights; they sum to 1.
    """
    middle, spread = jnp.asarray(plate.middle), jnp.asarray(plate.spread)
    q, c = (points - middle) / spread, (jnp.asarray(plate.centres) - middle) / spread
    square = ((q[..., None, :] - c) ** 2).sum(-1)
    bending = jnp.where(square > 0, square * jnp.log(jnp.where(square > 0, square, 1)), 0)
    basis = jnp.concatenate([bending, jnp.ones_like(q[..., :1]), q], axis=-1)
    return jnp.matmul(basis, jnp.asarray(plate.solution), precision="highest")


def warp(points: Float[Array, "*P 2"], plate: ThinPlate, targets: Float[Array, "K 2"]) -> Float[Array, "*P 2"]:
    """Map points by the spline that takes its centres to the targets.

    Args:
        points: Points (y, x).
        plate: Thin-plate spline.
        targets: Target (y, x) of each centre.

    Returns:
        Mapped points.
    """
    return jnp.matmul(weights(points, plate), targets, precision="highest")


def inverse(
    points: Float[Array, "*P 2"],
    plate: ThinPlate,
    targets: Float[Array, "K 2"],
    start: Float[Array, "*P 2"],
    steps: int = 6,
) -> Float[Array, "*P 2"]:
    """Invert the warp: find q with warp(q) = points by Newton's method; differentiable in points and targets.

    Steps are limited to half the spread of the centres. Where the warp folds there may be several solutions or none;
    the result is finite, and applying the warp to it shows whether it is a solution. Derivatives follow from the
    implicit function theorem: they are those of the last step with its start and Jacobian held fixed.

    Args:
        points: Points (y, x) to be mapped back.
        plate: Thin-plate spline.
        targets: Target (y, x) of each centre.
        start: Initial guess.
        steps: Number of Newton steps.

    Returns:
        Points q.
    """
    longest = LONGEST_STEP * jnp.asarray(plate.spread)
    fixed = jax.lax.stop_gradient(targets)

    def newton(q: Array, points: Array, targets: Array) -> Array:
        _, tangent = jax.linearize(lambda q: warp(q, plate, fixed), q)
        columns = [tangent(jnp.broadcast_to(unit, q.shape)) for unit in jnp.eye(2, dtype=q.dtype)]
        step = _solve(jnp.stack(columns, -1), points - warp(q, plate, targets))
        square = (step**2).sum(-1, keepdims=True)
        return q + step * jnp.where(square > longest**2, longest / jnp.sqrt(jnp.maximum(square, longest**2)), 1)

    fixed_points = jax.lax.stop_gradient(points)
    q = jax.lax.fori_loop(0, steps - 1, lambda _, q: newton(q, fixed_points, fixed), jax.lax.stop_gradient(start))
    return newton(jax.lax.stop_gradient(q), points, targets)


def _solve(matrix: Array, right: Array) -> Array:
    """Solve 2 x 2 systems; determinants near 0 are replaced by a small value of the same sign."""
    (a, b), (c, d) = jnp.moveaxis(matrix, (-2, -1), (0, 1))
    determinant = a * d - b * c
    smallest = LEAST_DETERMINANT * (matrix**2).sum((-2, -1)) + jnp.finfo(matrix.dtype).tiny
    safe = jnp.maximum(abs(determinant), smallest) * jnp.where(determinant < 0, -1, 1)
    y, x = right[..., 0], right[..., 1]
    return jnp.stack([d * y - b * x, a * x - c * y], axis=-1) / safe[..., None]
