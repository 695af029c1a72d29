"""Piecewise-affine warps: each triangle of a mesh maps to its counterpart by a separate affine transform.

One list of triangles serves both directions: `locate` expresses a point in the mesh of one side, and `place` maps it to
the mesh of the other. The mesh is the Delaunay triangulation of the fixed side; the other side may differ from image
to image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.spatial import Delaunay, QhullError

from pulmo_jax.types import InputError


class Location(NamedTuple):
    """Positions of points in a mesh.

    Attributes:
        triangle: Index of the triangle that contains each point.
        weights: Barycentric coordinates in that triangle; they sum to 1.
    """

    triangle: Int[Array, "*P"]
    weights: Float[Array, "*P 3"]


def triangulate(vertices: Float[np.ndarray, "V 2"]) -> Int[np.ndarray, "T 3"]:
    """Delaunay triangulation with consistently oriented triangles.

    Args:
        vertices: Points (y, x).

    Returns:
        Indices of the three corners of each triangle.

    Raises:
        InputError: If the points do not span a triangle, or some of them coincide.
    """
    try:
        mesh = Delaunay(vertices)
    except (QhullError, ValueError) as error:
        raise InputError(
            f"{len(vertices)} points cannot be triangulated: they coincide, are collinear or are not finite; "
            "check the order and the values of the landmarks"
        ) from error
    if len(mesh.coplanar):
        pairs = [f"{vertex + 1} and {near + 1}" for vertex, _, near in sorted(mesh.coplanar.tolist())]
        raise InputError(f"landmarks {', '.join(pairs)} coincide; remove one of each pair")
    corners = vertices[mesh.simplices]
    turn = np.linalg.det(corners[:, 1:] - corners[:, :1])
    return np.where(turn[:, None] > 0, mesh.simplices, mesh.simplices[:, ::-1]).astype(np.int32)


def surrounding(low: float, high: float) -> Float[np.ndarray, "8 2"]:
    """Eight points around a square: its corners and the midpoints of its sides.

    Args:
        low: Lower coordinate of the square, in pixels.
        high: Upper coordinate of the square, in pixels.

    Returns:
        Points (y, x).
    """
    steps = np.linspace(low, high, 3)
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.delete(grid, 4, axis=0)


def locate(points: Float[Array, "*P 2"], vertices: Float[Array, "V 2"], triangles: Int[Array, "T 3"]) -> Location:
    """Find the triangle that contains each point; differentiable in points and vertices.

    A point outside the mesh is assigned to the triangle with the largest minimum barycentric coordinate. Where the mesh
    is folded and triangles overlap, the same rule selects one of them. Degenerate triangles contain no point.

    Args:
        points: Points (y, x).
        vertices: Vertices of the mesh.
        triangles: Triangles of the mesh.

    Returns:
        Triangle and barycentric coordinates of each point.
    """
    fixed = jax.lax.stop_gradient((points, vertices))
    depth = _barycentric(fixed[0][..., None, :], fixed[1][triangles]).min(-1)
    degenerate = _double_area(fixed[1][triangles]) == 0
    triangle = jnp.argmax(jnp.where(degenerate, -jnp.inf, depth), axis=-1).astype(jnp.int32)
    return Location(triangle, _barycentric(points, vertices[triangles[triangle]]))


def place(location: Location, vertices: Float[Array, "V 2"], triangles: Int[Array, "T 3"]) -> Float[Array, "*P 2"]:
    """Points with given barycentric coordinates among other vertices; linear in the vertices.

    Args:
        location: Triangle and barycentric coordinates of each point.
        vertices: Vertices of the mesh.
        triangles: Triangles of the mesh.

    Returns:
        Points (y, x).
    """
    corners = vertices[triangles][location.triangle]
    return (location.weights[..., None] * corners).sum(-2)


def flipped(vertices: Float[Array, "V 2"], triangles: Int[Array, "T 3"]) -> Bool[Array, "T"]:
    """Find triangles that are reversed or degenerate; the warp folds there and has no inverse.

    Args:
        vertices: Vertices of the mesh.
        triangles: Triangles of the mesh.

    Returns:
        True for each such triangle.
    """
    return _double_area(vertices[triangles]) <= 0


def _double_area(corners: Array) -> Array:
    return _cross(corners[..., 1, :] - corners[..., 0, :], corners[..., 2, :] - corners[..., 0, :])


def _barycentric(points: Array, corners: Array) -> Array:
    """Barycentric coordinates (..., 3); the first corner of a degenerate triangle."""
    a, b, c = (corners[..., i, :] for i in range(3))
    area = _cross(b - a, c - a)
    scale = jnp.where(area == 0, 0, 1 / jnp.where(area == 0, 1, area))
    v, w = _cross(points - a, c - a) * scale, _cross(b - a, points - a) * scale
    return jnp.stack([1 - v - w, v, w], axis=-1)


def _cross(a: Array, b: Array) -> Array:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
