"""Procrustes analysis of landmark shapes: rotation, similarity, and generalised Procrustes analysis (Gower 1975,
Psychometrika 40:33).

Functions handle a single shape (K, 2) and are vectorised with `vmap`. In the plane the optimal rotation has a closed
form (Dryden and Mardia, Statistical Shape Analysis, 2nd ed., Section 8.2): its cosine and sine are proportional to sum
a.b and sum a x b. The result is never a reflection, and no SVD is needed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Similarity(NamedTuple):
    """Similarity transform p -> linear p + shift of points (y, x).

    Attributes:
        linear: Rotation matrix times scale.
        shift: Translation.
    """

    linear: Float[Array, "2 2"]
    shift: Float[Array, "2"]


class Alignment(NamedTuple):
    """Result of generalised Procrustes analysis.

    Attributes:
        mean: Mean shape, centred, of norm 1, in the mean orientation of the input shapes.
        shapes: Input shapes, centred, of norm 1, rotated onto the mean.
        distance: Mean distance to the mean shape before each iteration, see `generalised_procrustes`.
    """

    mean: Float[Array, "K 2"]
    shapes: Float[Array, "N K 2"]
    distance: Float[Array, "iterations"]


def rotation(source: Float[Array, "K 2"], target: Float[Array, "K 2"]) -> Float[Array, "2 2"]:
    """Rotation about the origin that minimises |source R' - target|.

    Args:
        source: Shape to be rotated.
        target: Shape to be matched.

    Returns:
        Rotation matrix R; the identity if no rotation is better than any other.
    """
    turn = _inner_and_cross(source, target)
    square = (turn**2).sum()
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    return _turn(jnp.where(square > 0, turn / length, jnp.asarray([1, 0], turn.dtype)))


def similarity(source: Float[Array, "K 2"], target: Float[Array, "K 2"]) -> Similarity:
    """Least-squares similarity transform from source to target; linear in the target.

    Args:
        source: Shape to be transformed. If all its points coincide, the transform is a pure translation.
        target: Shape to be matched. If all its points coincide, the scale is 0.

    Returns:
        The similarity transform.

    Example:
        >>> square = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
        >>> moved = similarity(square, 2 * square + jnp.array([3.0, 5.0]))
        >>> (moved.linear @ jnp.ones(2)).round(5).tolist(), moved.shift.round(5).tolist()
        ([2.0, 2.0], [3.0, 5.0])
    """
    source_mean, target_mean = source.mean(0), target.mean(0)
    centred = source - source_mean
    square = (centred**2).sum()
    turn = _inner_and_cross(centred, target - target_mean) / jnp.where(square > 0, square, 1)
    linear = jnp.where(square > 0, _turn(turn), jnp.eye(2, dtype=turn.dtype))
    return Similarity(linear, target_mean - apply_linear(source_mean, linear))


def apply(transform: Similarity, points: Float[Array, "*P 2"]) -> Float[Array, "*P 2"]:
    """Apply a similarity transform to points.

    Args:
        transform: Similarity transform.
        points: Points (y, x).

    Returns:
        Transformed points.
    """
    return apply_linear(points, transform.linear) + transform.shift


def apply_linear(points: Float[Array, "*P 2"], linear: Float[Array, "2 2"]) -> Float[Array, "*P 2"]:
    """Apply a linear map to each point.

    Full precision is requested, because TF32 on a GPU would keep only three digits.

    Args:
        points: Points (y, x).
        linear: 2 x 2 matrix.

    Returns:
        Transformed points.
    """
    return jnp.matmul(points, linear.T, precision="highest")


def inverse(transform: Similarity) -> Similarity:
    """Inverse of a similarity transform.

    Args:
        transform: Similarity transform.

    Returns:
        The inverse. A transform of scale 0 has none; its result maps every point to the origin.
    """
    square = (transform.linear[0] ** 2).sum()
    back = transform.linear.T / jnp.where(square > 0, square, 1)
    return Similarity(back, -apply_linear(transform.shift, back))


def normalise(shape: Float[Array, "K 2"]) -> Float[Array, "K 2"]:
    """Centre a shape and scale it to norm 1.

    Args:
        shape: Landmarks of one shape.

    Returns:
        The normalised shape; zeros if all points coincide.
    """
    centred = shape - shape.mean(0)
    square = (centred**2).sum()
    return centred / jnp.sqrt(jnp.where(square > 0, square, 1))


def generalised_procrustes(shapes: Float[Array, "N K 2"], iterations: int = 10) -> Alignment:
    """Mean shape of a set of shapes by generalised Procrustes analysis.

    Shapes are centred, scaled to norm 1 and iteratively rotated onto their mean (partial Procrustes: the scale stays
    fixed). The iteration starts from the first shape. Three iterations suffice for shapes that resemble each other; for
    lungs the distances are 0.108, 0.0793 and 0.0793. A shape whose points coincide is set to 0. No gradient flows
    through the distance.

    Args:
        shapes: N shapes of K landmarks.
        iterations: Number of iterations.

    Returns:
        Mean shape, aligned shapes, and for each iteration the mean Frobenius distance |aligned shape - mean| before its
        update. The first entry is the distance to the first shape.
    """
    units = jax.vmap(normalise)(shapes)

    def align_to(mean: Array) -> Array:
        return jax.vmap(lambda shape: apply_linear(shape, rotation(shape, mean)))(units)

    def update(mean: Array, _: None) -> tuple[Array, Array]:
        shapes = align_to(mean)
        distance = jnp.sqrt(jax.lax.stop_gradient(((shapes - mean) ** 2).sum((1, 2)))).mean()
        return normalise(shapes.mean(0)), distance

    mean, distance = jax.lax.scan(update, units[0], length=iterations)
    mean = apply_linear(mean, rotation(mean, units.mean(0)))
    return Alignment(mean, align_to(mean), distance)


def _inner_and_cross(a: Array, b: Array) -> Array:
    return jnp.stack([(a * b).sum(), (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()])


def _turn(cos_sin: Array) -> Array:
    cos, sin = cos_sin
    return jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
