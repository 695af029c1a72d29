"""Shapes laid over each other: rotation, similarity, and the mean of many (Gower 1975, Psychometrika 40:33).

Everything works on one shape (K, 2); `vmap` makes it many. In the plane the best rotation has a closed form (Dryden &
Mardia, Statistical Shape Analysis, 2nd ed., sec. 8.2): its cosine and sine are proportional to sum a.b and sum a x b.
It never is a reflection, and needs no SVD.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Similarity(NamedTuple):
    """The map p -> linear p + shift of points (y, x); linear is a rotation times a scale."""

    linear: Float[Array, "2 2"]
    shift: Float[Array, "2"]


class Alignment(NamedTuple):
    """What generalised Procrustes finds.

    mean: centred, of norm 1, as upright as the shapes are on average. shapes: centred, of norm 1, each turned onto the
    mean. distance: by iteration, see `generalised_procrustes`.
    """

    mean: Float[Array, "K 2"]
    shapes: Float[Array, "N K 2"]
    distance: Float[Array, "iterations"]


def rotation(source: Float[Array, "K 2"], target: Float[Array, "K 2"]) -> Float[Array, "2 2"]:
    """R with the smallest |source R' - target| among rotations about the origin; identity where none is better."""
    turn = _inner_and_cross(source, target)
    square = (turn**2).sum()
    length = jnp.sqrt(jnp.where(square > 0, square, 1))
    return _turn(jnp.where(square > 0, turn / length, jnp.asarray([1, 0], turn.dtype)))


def similarity(source: Float[Array, "K 2"], target: Float[Array, "K 2"]) -> Similarity:
    """The similarity that brings source nearest to target in the least-squares sense; linear in the target.

    A source whose points coincide is not scaled or turned, only moved. Targets that coincide give a scale of 0.
    """
    middle, to = source.mean(0), target.mean(0)
    a = source - middle
    square = (a**2).sum()
    turn = _inner_and_cross(a, target - to) / jnp.where(square > 0, square, 1)
    linear = jnp.where(square > 0, _turn(turn), jnp.eye(2, dtype=turn.dtype))
    return Similarity(linear, to - turned(middle, linear))


def apply(transform: Similarity, points: Float[Array, "*P 2"]) -> Float[Array, "*P 2"]:
    return turned(points, transform.linear) + transform.shift


def turned(points: Float[Array, "*P 2"], linear: Float[Array, "2 2"]) -> Float[Array, "*P 2"]:
    """linear p of every p; a GPU's TF32 would round it to three digits."""
    return jnp.matmul(points, linear.T, precision="highest")


def inverse(transform: Similarity) -> Similarity:
    """Its inverse; of scale 0 there is none, and everything goes to the origin."""
    square = (transform.linear[0] ** 2).sum()
    back = transform.linear.T / jnp.where(square > 0, square, 1)
    return Similarity(back, -turned(transform.shift, back))


def unit(shape: Float[Array, "K 2"]) -> Float[Array, "K 2"]:
    """Centred, and scaled to norm 1; zeros where all points coincide."""
    centred = shape - shape.mean(0)
    square = (centred**2).sum()
    return centred / jnp.sqrt(jnp.where(square > 0, square, 1))


def generalised_procrustes(shapes: Float[Array, "N K 2"], iterations: int = 10) -> Alignment:
    """The mean of shapes that are centred, of norm 1 and turned onto it; starts from the first shape.

    distance: before each iteration's update, the mean over shapes of the Frobenius norm |turned shape - mean|; the
    first is the one to the first shape. Three iterations are enough for shapes that resemble each other (lungs: 0.108,
    0.0793, 0.0793). Partial Procrustes: sizes stay 1. A shape whose points coincide counts as zeros. No gradient flows
    through the distance.
    """
    units = jax.vmap(unit)(shapes)

    def onto(mean: Array) -> Array:
        return jax.vmap(lambda one: turned(one, rotation(one, mean)))(units)

    def update(mean: Array, _: None) -> tuple[Array, Array]:
        shapes = onto(mean)
        distance = jnp.sqrt(jax.lax.stop_gradient(((shapes - mean) ** 2).sum((1, 2)))).mean()
        return unit(shapes.mean(0)), distance

    mean, distance = jax.lax.scan(update, units[0], length=iterations)
    mean = turned(mean, rotation(mean, units.mean(0)))
    return Alignment(mean, onto(mean), distance)


def _inner_and_cross(a: Array, b: Array) -> Array:
    return jnp.stack([(a * b).sum(), (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()])


def _turn(cos_sin: Array) -> Array:
    cos, sin = cos_sin
    return jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
