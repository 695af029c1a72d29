"""Piecewise-affine warps against scikit-image's, and what must hold of every mesh."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.transform import PiecewiseAffineTransform

from pulmo_jax.core import piecewise_affine as pa
from pulmo_jax.types import InputError


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def random_mesh(seed: int = 0, noise: float = 2.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, the same moved a little, triangles."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid([10, 35, 60], [5, 30, 55, 80], indexing="ij"), -1).reshape(-1, 2)
    vertices = np.concatenate([grid + rng.uniform(-5, 5, grid.shape), pa.surrounding(-60, 150)])
    moved = vertices @ [[0.9, 0.3], [-0.2, 1.2]] + [4, -7] + noise * rng.normal(size=vertices.shape)
    return vertices, moved, pa.triangulate(vertices)


def inner_points(n: int = 300) -> np.ndarray:
    return np.random.default_rng(5).uniform(-50, 140, (n, 2))


flipped = jax.jit(pa.flipped)


@jax.jit
def mapped(points, source, target, triangles):
    return pa.place(pa.locate(points, source, triangles), target, triangles)


@jax.jit
def slopes(points, source, target, triangles):
    """Of a weighted sum of what `mapped` gives."""
    weight = jnp.arange(points.size, dtype=points.dtype).reshape(points.shape)
    return jax.grad(lambda *v: (mapped(*v, triangles) * weight).sum(), (0, 1, 2))(points, source, target)


def test_it_is_scikit_image_s():
    source, target, triangles = random_mesh()
    points = inner_points()
    theirs = PiecewiseAffineTransform()
    with warnings.catch_warnings():  # newer versions have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        assert theirs.estimate(source, target)
    found = mapped(*map(jnp.asarray, (points, source, target, triangles)))
    np.testing.assert_allclose(found, theirs(points), atol=1e-9)


def test_there_and_back_is_the_identity():
    source, target, triangles = map(jnp.asarray, random_mesh())
    points = jnp.asarray(inner_points())
    assert not flipped(target, triangles).any()
    np.testing.assert_allclose(
        mapped(mapped(points, source, target, triangles), target, source, triangles), points, atol=1e-9
    )


def test_affine_maps_are_exact_beyond_the_mesh_too():
    source, target, triangles = random_mesh(noise=0)
    points = np.random.default_rng(3).uniform(-400, 500, (200, 2))
    found = mapped(*map(jnp.asarray, (points, source, target, triangles)))
    np.testing.assert_allclose(found, points @ [[0.9, 0.3], [-0.2, 1.2]] + [4, -7], atol=1e-8)


def test_weights_are_barycentric_and_name_the_vertices():
    source, _, triangles = random_mesh()
    at_vertices = jax.jit(pa.locate)(jnp.asarray(source), jnp.asarray(source), jnp.asarray(triangles))
    np.testing.assert_allclose(np.sort(at_vertices.weights, axis=-1), np.tile([0, 0, 1], (len(source), 1)), atol=1e-9)
    corner = np.take_along_axis(triangles[at_vertices.triangle], np.argmax(at_vertices.weights, -1)[:, None], 1)[:, 0]
    np.testing.assert_array_equal(corner, np.arange(len(source)))


def test_triangles_cover_the_hull_once_and_turn_one_way():
    source, _, triangles = random_mesh()
    corners = source[triangles]
    areas = np.linalg.det(corners[:, 1:] - corners[:, :1]) / 2
    assert (areas > 0).all()
    assert areas.sum() == pytest.approx(210**2)
    mirrored = jnp.asarray(source * [1, -1])
    assert flipped(mirrored, jnp.asarray(triangles)).all()
    assert not flipped(jnp.asarray(source), jnp.asarray(triangles)).any()


def test_gradients_are_those_of_differences():
    source, target, triangles = map(jnp.asarray, random_mesh())
    points = jnp.asarray(inner_points(50))

    def loss(points, source, target):
        return (mapped(points, source, target, triangles) * jnp.arange(100.0).reshape(50, 2)).sum()

    values = (points, source, target)
    rng = np.random.default_rng(1)
    for which, slope in enumerate(slopes(*values, triangles)):
        way = 1e-6 * jnp.asarray(rng.normal(size=slope.shape))
        ahead, behind = ([v + s * way if i == which else v for i, v in enumerate(values)] for s in (1, -1))
        assert float((slope * way).sum()) == pytest.approx(float(loss(*ahead) - loss(*behind)) / 2, rel=1e-5)


@pytest.mark.parametrize("kind", ["one place", "one line", "two together"])
def test_degenerate_vertices_give_numbers_and_gradients(kind):
    source, _, triangles = random_mesh()
    squeezed = {
        "one place": np.full_like(source, 3.0),
        "one line": source[:, :1] @ [[1.0, 2.0]],
        "two together": np.where(np.arange(len(source))[:, None] == 1, source[0], source),
    }[kind]
    points, source, squeezed, triangles = map(jnp.asarray, (inner_points(50), source, squeezed, triangles))
    assert flipped(squeezed, triangles).any()
    for way in ((source, squeezed), (squeezed, source)):
        assert jnp.isfinite(mapped(points, *way, triangles)).all()
        assert all(jnp.isfinite(slope).all() for slope in slopes(points, *way, triangles))


def test_vertices_without_triangles_are_refused():
    line = np.arange(10.0)[:, None] @ [[1.0, 2.0]]
    for vertices in (line, np.ones((5, 2)), np.full((5, 2), np.nan), line[:2]):
        with pytest.raises(InputError, match="points cannot be triangulated"):
            pa.triangulate(vertices)


def test_landmarks_at_one_place_are_named():
    source, _, _ = random_mesh()
    source[4] = source[1]
    with pytest.raises(InputError, match=r"landmarks (5 and 2|2 and 5) coincide"):
        pa.triangulate(source)
