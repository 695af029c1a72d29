"""Piecewise-affine warps: every triangle of a mesh goes to its counterpart by its own affine map.

One mesh of triangles serves both directions: `locate` a point among the vertices of one side, `place` it among those
of the other. The mesh is Delaunay's of the side that does not change; the other side may be one for each image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.spatial import Delaunay, QhullError

from pulmo_jax.types import InputError


class Location(NamedTuple):
    """Where points lie in a mesh: the triangle, and the weights of its three corners, which sum to 1."""

    triangle: Int[Array, "*P"]
    weights: Float[Array, "*P 3"]


def triangulate(vertices: Float[np.ndarray, "V 2"]) -> Int[np.ndarray, "T 3"]:
    """Delaunay's triangles, all turning the same way.

    Raises InputError for vertices of which no triangle can be made, or some that no triangle uses.
    """
    try:
        mesh = Delaunay(vertices)
    except (QhullError, ValueError) as error:
        raise InputError(
            f"{len(vertices)} points make no triangles: they coincide, lie on one line or are not finite; "
            "check the order and the values of the landmarks"
        ) from error
    if len(mesh.coplanar):
        twins = [f"{vertex + 1} and {near + 1}" for vertex, _, near in sorted(mesh.coplanar.tolist())]
        raise InputError(f"landmarks {', '.join(twins)} have the same place; leave one of them out")
    corners = vertices[mesh.simplices]
    turn = np.linalg.det(corners[:, 1:] - corners[:, :1])
    return np.where(turn[:, None] > 0, mesh.simplices, mesh.simplices[:, ::-1]).astype(np.int32)


def surrounding(low: float, high: float) -> Float[np.ndarray, "8 2"]:
    """Corners and middles of the sides of a square."""
    steps = np.linspace(low, high, 3)
    every = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.delete(every, 4, axis=0)


def locate(points: Float[Array, "*P 2"], vertices: Float[Array, "V 2"], triangles: Int[Array, "T 3"]) -> Location:
    """The triangle that holds each point; differentiable in points and vertices.

    A point beyond the mesh gets the triangle that it is least far out of, by its smallest weight. Of triangles that
    overlap, where the mesh is folded, the one that holds it deepest. Triangles without area hold nothing.
    """
    fixed = jax.lax.stop_gradient((points, vertices))
    depth = _barycentric(fixed[0][..., None, :], fixed[1][triangles]).min(-1)
    flat = _double_area(fixed[1][triangles]) == 0
    triangle = jnp.argmax(jnp.where(flat, -jnp.inf, depth), axis=-1).astype(jnp.int32)
    return Location(triangle, _barycentric(points, vertices[triangles[triangle]]))


def place(location: Location, vertices: Float[Array, "V 2"], triangles: Int[Array, "T 3"]) -> Float[Array, "*P 2"]:
    """The points of these weights among other vertices; linear in them."""
    corners = vertices[triangles][location.triangle]
    return (location.weights[..., None] * corners).sum(-2)


def flipped(vertices: Float[Array, "V 2"], triangles: Int[Array, "T 3"]) -> Bool[Array, "T"]:
    """The triangles that are turned over or have no area: where they are, the warp folds and has no inverse."""
    return _double_area(vertices[triangles]) <= 0


def _double_area(corners: Array) -> Array:
    return _cross(corners[..., 1, :] - corners[..., 0, :], corners[..., 2, :] - corners[..., 0, :])


def _barycentric(points: Array, corners: Array) -> Array:
    """(..., 3); of a triangle without area, those of its first corner."""
    a, b, c = (corners[..., i, :] for i in range(3))
    area = _cross(b - a, c - a)
    scale = jnp.where(area == 0, 0, 1 / jnp.where(area == 0, 1, area))
    v, w = _cross(points - a, c - a) * scale, _cross(b - a, points - a) * scale
    return jnp.stack([1 - v - w, v, w], axis=-1)


def _cross(a: Array, b: Array) -> Array:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
