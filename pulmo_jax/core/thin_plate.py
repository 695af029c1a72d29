"""Thin-plate splines: the smoothest warp that takes given points to given points (Bookstein 1989, IEEE TPAMI 11:567).

f(q) = a + A q + sum_k w_k U(|q - c_k|), U(r) = r^2 log r^2, with w orthogonal to affine maps. All coefficients are
linear in the targets, so that f(q) = sum_k weights_k(q) target_k with weights that the centres c alone decide: they
are solved for once, in float64, and each image costs one product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.types import InputError

WORST_CONDITION = 1e13
LONGEST_STEP = 0.5  # of Newton's, in units of the centres' spread
LEAST_DETERMINANT = 1e-3  # of the map's Jacobian over its square: below it, where the map folds, steps are shortened


class ThinPlate(NamedTuple):
    """The spline of centres (y, x), solved.

    middle, spread: the centres' mean and root-mean-square distance to it, by which coordinates are normalised.
    solution: what multiplies the targets to give the K weights w and then a and A.
    """

    centres: Float[np.ndarray, "K 2"]
    middle: Float[np.ndarray, "2"]
    spread: Float[np.ndarray, ""]
    solution: Float[np.ndarray, "K+3 K"]


def fit(centres: Float[np.ndarray, "K 2"], stiffness: float = 0.0) -> ThinPlate:
    """Solves Bookstein's L = [[U + stiffness 1, P], [P', 0]], P = [1, c], in normalised coordinates.

    stiffness: 0 takes every centre exactly to its target; more takes it near, by a smoother map; towards infinity
    the map is the least-squares affine one (Wahba 1990, Spline Models, sec. 2.4).
    Raises InputError for centres that coincide or lie on one line.
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
            f"{n} points make no thin-plate spline: some coincide, all lie on one line, or they are not finite; "
            "check the order and the values of the landmarks"
        )
    return ThinPlate(centres, middle, np.asarray(spread), np.linalg.solve(system, np.eye(n + 3, n)))


def weights(points: Float[Array, "*P 2"], plate: ThinPlate) -> Float[Array, "*P K"]:
    """Of every target at these points; they sum to 1."""
    middle, spread = jnp.asarray(plate.middle), jnp.asarray(plate.spread)
    q, c = (points - middle) / spread, (jnp.asarray(plate.centres) - middle) / spread
    square = ((q[..., None, :] - c) ** 2).sum(-1)
    bending = jnp.where(square > 0, square * jnp.log(jnp.where(square > 0, square, 1)), 0)
    basis = jnp.concatenate([bending, jnp.ones_like(q[..., :1]), q], axis=-1)
    return jnp.matmul(basis, jnp.asarray(plate.solution), precision="highest")


def warp(points: Float[Array, "*P 2"], plate: ThinPlate, targets: Float[Array, "K 2"]) -> Float[Array, "*P 2"]:
    return jnp.matmul(weights(points, plate), targets, precision="highest")


def inverse(
    points: Float[Array, "*P 2"],
    plate: ThinPlate,
    targets: Float[Array, "K 2"],
    start: Float[Array, "*P 2"],
    steps: int = 6,
) -> Float[Array, "*P 2"]:
    """The q with warp(q) = points, by Newton's method from `start`; differentiable in points and targets.

    Steps are no longer than half the centres' spread. Where the warp folds there may be several q or none: what comes
    back is finite, and to warp it again tells whether it is one. Derivatives are those of the implicit function: the
    last step's, its start and its Jacobian held.
    """
    longest = LONGEST_STEP * jnp.asarray(plate.spread)
    fixed = jax.lax.stop_gradient(targets)

    def newton(q: Array, points: Array, targets: Array) -> Array:
        _, along = jax.linearize(lambda q: warp(q, plate, fixed), q)
        slope = [along(jnp.broadcast_to(unit, q.shape)) for unit in jnp.eye(2, dtype=q.dtype)]
        step = _solve(jnp.stack(slope, -1), points - warp(q, plate, targets))
        square = (step**2).sum(-1, keepdims=True)
        return q + step * jnp.where(square > longest**2, longest / jnp.sqrt(jnp.maximum(square, longest**2)), 1)

    goal = jax.lax.stop_gradient(points)
    q = jax.lax.fori_loop(0, steps - 1, lambda _, q: newton(q, goal, fixed), jax.lax.stop_gradient(start))
    return newton(jax.lax.stop_gradient(q), points, targets)


def _solve(matrix: Array, right: Array) -> Array:
    """2 x 2; a determinant near 0 is held off it."""
    (a, b), (c, d) = jnp.moveaxis(matrix, (-2, -1), (0, 1))
    determinant = a * d - b * c
    least = LEAST_DETERMINANT * (matrix**2).sum((-2, -1)) + jnp.finfo(matrix.dtype).tiny
    safe = jnp.maximum(abs(determinant), least) * jnp.where(determinant < 0, -1, 1)
    y, x = right[..., 0], right[..., 1]
    return jnp.stack([d * y - b * x, a * x - c * y], axis=-1) / safe[..., None]
