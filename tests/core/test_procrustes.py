"""Rotations, similarities and mean shapes against SciPy's, least squares and a loop of SVDs."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial

from pulmo_jax.core import procrustes

rotation, similarity, apply, inverse, unit_of = map(
    jax.jit, (procrustes.rotation, procrustes.similarity, procrustes.apply, procrustes.inverse, procrustes.normalise)
)
generalised = jax.jit(procrustes.generalised_procrustes, static_argnames="iterations")
LABELS = Path("../shared/data/chest_landmarks/landmarks_train.csv")


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def turn(angle_deg: float) -> np.ndarray:
    angle = np.deg2rad(angle_deg)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def random_shapes(n: int, k: int = 7, spread: float = 0.1, angle_deg: float = 70.0, seed: int = 0) -> np.ndarray:
    """One shape, each time with other noise, angle, size and place."""
    rng = np.random.default_rng(seed)
    shape = rng.normal(size=(k, 2))
    turns = [turn(angle) for angle in rng.uniform(-angle_deg, angle_deg, n)]
    noisy = shape + spread * rng.normal(size=(n, k, 2))
    scale, place = rng.uniform(0.5, 20, (n, 1, 1)), rng.uniform(-90, 90, (n, 1, 2))
    return np.stack([one @ r.T for one, r in zip(noisy, turns, strict=True)]) * scale + place


def unit(shape: np.ndarray) -> np.ndarray:
    centred = shape - shape.mean(0)
    return centred / np.linalg.norm(centred)


def best_rotation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of rows: a @ R is nearest to b (Kabsch 1976)."""
    u, _, vt = np.linalg.svd(a.T @ b)
    return u @ np.diag([1, np.linalg.det(u @ vt)]) @ vt


def mean_by_svd(shapes: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float]]:
    units = [unit(shape) for shape in shapes]
    mean, distances = units[0], []
    for _ in range(iterations):
        turned = [one @ best_rotation(one, mean) for one in units]
        distances.append(float(np.mean([np.linalg.norm(one - mean) for one in turned])))
        mean = unit(np.mean(turned, axis=0))
    return mean @ best_rotation(mean, np.mean(units, axis=0)), distances


def read_labels() -> np.ndarray:
    if not LABELS.is_file():
        pytest.skip("no chest landmarks here")
    with LABELS.open() as file:
        numbers = [[float(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]
    return np.array(numbers).reshape(len(numbers), -1, 2)[..., ::-1]


@pytest.mark.parametrize("angle_deg", [-170, -30, 0, 30, 90, 179])
def test_rotation_is_the_right_way_round(angle_deg):
    shape = random_shapes(1)[0]
    centred = shape - shape.mean(0)
    found = rotation(jnp.asarray(centred), jnp.asarray(centred @ turn(angle_deg).T))
    np.testing.assert_allclose(found, turn(angle_deg), atol=1e-12)


def test_rotation_is_scipy_s_orthogonal_procrustes():
    a, b = (unit(shape) for shape in random_shapes(2, spread=0.2))
    expected, _ = scipy.linalg.orthogonal_procrustes(a, b)
    assert np.linalg.det(expected) > 0
    np.testing.assert_allclose(rotation(jnp.asarray(a), jnp.asarray(b)).T, expected, atol=1e-12)


def test_a_mirrored_shape_is_turned_and_not_mirrored_back():
    a = unit(random_shapes(1)[0])
    mirrored = a * [1, -1]
    found = np.asarray(rotation(jnp.asarray(a), jnp.asarray(mirrored)))
    assert np.linalg.det(found) == pytest.approx(1)
    assert np.linalg.det(scipy.linalg.orthogonal_procrustes(a, mirrored)[0]) == pytest.approx(-1)
    np.testing.assert_allclose(found.T, best_rotation(a, mirrored), atol=1e-12)


def test_similarity_is_scipy_s_procrustes():
    a, b = random_shapes(2, spread=0.2)
    expected_a, expected_b, disparity = scipy.spatial.procrustes(a, b)
    one, other = unit_of(jnp.asarray(a)), unit_of(jnp.asarray(b))
    found = apply(similarity(other, one), other)
    np.testing.assert_allclose(one, expected_a, atol=1e-12)
    np.testing.assert_allclose(found, expected_b, atol=1e-12)
    assert float(((found - one) ** 2).sum()) == pytest.approx(disparity)


def test_similarity_is_the_least_squares_one():
    a, b = random_shapes(2, spread=0.3)
    y, x, one, none = a[:, 0], a[:, 1], np.ones(len(a)), np.zeros(len(a))
    design = np.concatenate([np.stack([y, -x, one, none], 1), np.stack([x, y, none, one], 1)])
    c, s, dy, dx = np.linalg.lstsq(design, b.T.ravel(), rcond=None)[0]
    found = similarity(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(found.linear, [[c, -s], [s, c]], atol=1e-10)
    np.testing.assert_allclose(found.shift, [dy, dx], atol=1e-9)


def test_inverse_undoes_it():
    a, b = map(jnp.asarray, random_shapes(2))
    there = similarity(a, b)
    back = apply(inverse(there), apply(there, a))
    np.testing.assert_allclose(back, a, atol=1e-9)


def test_coincident_points_give_numbers_and_gradients():
    a, same = jnp.asarray(random_shapes(1)[0]), jnp.full((7, 2), 3.0)
    onto_one_place = similarity(a, same)
    np.testing.assert_allclose(apply(onto_one_place, a), same, atol=1e-12)
    np.testing.assert_allclose(inverse(onto_one_place).linear, 0, atol=1e-12)
    moved = similarity(same, a)
    np.testing.assert_allclose(moved.linear, np.eye(2))
    np.testing.assert_allclose(apply(moved, same)[0], a.mean(0), atol=1e-12)
    slope = jax.jit(jax.grad(lambda p: apply(similarity(p, a), p).sum()))(same)
    assert jnp.isfinite(slope).all()
    assert jnp.isfinite(jax.jit(jax.grad(lambda p: (unit_of(p) * rotation(p, a)[0]).sum()))(same)).all()


def test_generalised_procrustes_is_a_loop_of_svds():
    shapes = random_shapes(20)
    found = generalised(jnp.asarray(shapes), iterations=6)
    mean, distances = mean_by_svd(shapes, 6)
    np.testing.assert_allclose(found.mean, mean, atol=1e-10)
    np.testing.assert_allclose(found.distance, distances, atol=1e-10)
    expected = [unit(shape) @ best_rotation(unit(shape), mean) for shape in shapes]
    np.testing.assert_allclose(found.shapes, expected, atol=1e-10)


def test_size_place_and_angle_of_a_shape_do_not_matter():
    shapes = random_shapes(12, angle_deg=0)
    scattered = np.stack([(3 + i) * one @ turn(40 * i).T + 5 * i for i, one in enumerate(shapes)])
    plain, other = (generalised(jnp.asarray(s)) for s in (shapes, scattered))
    back = other.mean @ rotation(other.mean, plain.mean).T
    np.testing.assert_allclose(back, plain.mean, atol=1e-9)
    assert float(other.distance[-1]) == pytest.approx(float(plain.distance[-1]), abs=1e-10)


def test_the_mean_is_upright_as_the_shapes_are_on_average():
    shapes = random_shapes(30, spread=0.01, angle_deg=0)
    shapes[0] = (shapes[0] - shapes[0].mean(0)) @ turn(80).T  # from which it starts
    mean = generalised(jnp.asarray(shapes)).mean
    average = np.mean([unit(shape) for shape in shapes], axis=0)
    np.testing.assert_allclose(best_rotation(np.asarray(mean), average), np.eye(2), atol=1e-9)


def test_gradient_of_the_mean_is_that_of_differences():
    shapes = jnp.asarray(random_shapes(4, k=3))

    def loss(shapes):
        return (generalised(shapes, iterations=3).mean * jnp.arange(6.0).reshape(3, 2)).sum()

    loss = jax.jit(loss)
    slope = jax.jit(jax.grad(loss))(shapes)
    step = jnp.zeros_like(shapes).at[0, 1, 0].set(1e-5)
    expected = (loss(shapes + step) - loss(shapes - step)) / 2e-5
    assert float(slope[0, 1, 0]) == pytest.approx(float(expected), rel=1e-6)
    assert jnp.isfinite(slope).all()


def test_lungs_converge_in_three_iterations():
    """To 0.079; with the rotation transposed the distance stays at 0.13."""
    shapes = read_labels()
    found = generalised(jnp.asarray(shapes), iterations=4)
    assert float(found.distance[0]) > 0.1
    np.testing.assert_allclose(found.distance[1:], 0.0793, atol=5e-5)
    assert abs(float(found.distance[2] - found.distance[1])) < 1e-6


def test_the_lungs_mean_is_nearly_the_full_procrustes_mean():
    """That one, which scales the shapes too, is the first eigenvector of sum z z* (Kent 1994, JRSS B 56:285)."""
    shapes = read_labels()
    z = np.array([unit(shape) @ [1, 1j] for shape in shapes])
    first = np.linalg.eigh(z.T @ z.conj())[1][:, -1]
    mean = np.asarray(generalised(jnp.asarray(shapes)).mean) @ [1, 1j]
    assert abs(np.vdot(first, mean)) == pytest.approx(1, abs=1e-5)
