"""The shape model against plain linear algebra in float64, and its posterior on grids against sums over all of them."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.core import shape_model
from pulmo_jax.types import InputError

CORNERS = np.array([[10.0, 10.0], [10.0, 30.0], [25.0, 20.0]])


def shapes(count: int = 200, seed: int = 0) -> np.ndarray:
    """A triangle that shifts, stretches and whose points tremble."""
    rng = np.random.default_rng(seed)
    shift, stretch = rng.normal(size=(count, 1, 2)) * 2, 1 + 0.05 * rng.normal(size=(count, 1, 1))
    return CORNERS * stretch + shift + 0.7 * rng.normal(size=(count, 3, 2))


def dense_covariance(model: shape_model.ShapeModel) -> np.ndarray:
    lower = np.asarray(model.lower, np.float64)
    return lower @ lower.T


def test_mean_covariance_and_modes_are_the_samples():
    x = shapes(4000)
    model = shape_model.fit_shape_model(x, least_px=0.0)
    c = dense_covariance(model)
    np.testing.assert_allclose(model.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(c, np.cov(x.reshape(len(x), -1).T, bias=True), atol=0.02)  # hardly shrunk
    modes = np.asarray(model.modes)
    np.testing.assert_allclose((modes.T * np.asarray(model.variances)) @ modes, c, atol=1e-3)
    assert (np.diff(model.variances) <= 0).all()


def test_few_shapes_are_shrunk_toward_their_variances():
    x = shapes(5)
    c = dense_covariance(shape_model.fit_shape_model(x, least_px=0.0))
    sample = np.cov(x.reshape(5, -1).T, bias=True)
    np.testing.assert_allclose(np.diag(c), np.diag(sample), rtol=1e-4)
    away = ~np.eye(6, dtype=bool)
    ratio = c[away] / sample[away]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    assert 0 < ratio[0] < 0.99


def test_a_free_pose_adds_variance_to_poses_and_to_nothing_else():
    x = shapes()
    fixed, free = (dense_covariance(shape_model.fit_shape_model(x, pose_px)) for pose_px in (0.0, 5.0))
    added = free - fixed
    directions = shape_model.pose_directions(x.mean(0))
    np.testing.assert_allclose(directions @ directions.T, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(added, 25 * 3 * directions.T @ directions, atol=1e-3)
    # a rotation by a small angle moves the points along the fourth direction
    centred = x.mean(0) - x.mean((0, 1))
    turn = np.array([[np.cos(1e-5), -np.sin(1e-5)], [np.sin(1e-5), np.cos(1e-5)]])
    move = (centred @ turn.T - centred).ravel()
    assert abs(move @ directions[3]) / np.linalg.norm(move) == pytest.approx(1, abs=1e-6)


def test_with_gaussians_is_the_product_of_gaussians():
    model, rng = shape_model.fit_shape_model(shapes()), np.random.default_rng(3)
    seen = CORNERS + rng.normal(size=(3, 2))
    roots = rng.normal(size=(3, 2, 2))
    covariances = roots @ roots.swapaxes(1, 2) + np.eye(2)
    found = jax.jit(shape_model.posterior_from_gaussians)(model, jnp.asarray(seen), jnp.asarray(covariances))
    precision = np.linalg.inv(dense_covariance(model))
    likelihood = np.zeros((6, 6))
    for k in range(3):
        likelihood[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = np.linalg.inv(covariances[k])
    expected = np.linalg.inv(precision + likelihood)
    mean = expected @ (precision @ np.asarray(model.mean).ravel() + likelihood @ seen.ravel())
    np.testing.assert_allclose(found.points.ravel(), mean, rtol=1e-4)
    np.testing.assert_allclose(found.covariance, expected, atol=1e-4)
    blocks = np.asarray(shape_model.point_covariances(found.covariance))
    np.testing.assert_allclose(blocks[1], expected[2:4, 2:4], atol=1e-4)


def test_a_point_of_no_precision_is_told_by_the_others():
    model = shape_model.fit_shape_model(shapes(4000))
    truth = shapes(1, seed=9)[0]
    precisions = jnp.asarray(np.stack([np.eye(2) * 1e3, np.eye(2) * 1e3, np.zeros((2, 2))]))
    found = shape_model.posterior_from_precisions(model, jnp.asarray(truth), precisions)
    c, mean = dense_covariance(model), np.asarray(model.mean).ravel()
    given = c[4:, :4] @ np.linalg.inv(c[:4, :4])
    np.testing.assert_allclose(found.points[2], mean[4:] + given @ (truth.ravel() - mean)[:4], atol=0.02)
    np.testing.assert_allclose(found.covariance[4:, 4:], c[4:, 4:] - given @ c[:4, 4:], atol=0.02)


def test_shape_projection_keeps_what_its_modes_make():
    model = shape_model.fit_shape_model(shapes())
    made = model.mean + (2 * model.modes[0] - model.modes[1]).reshape(3, 2)
    np.testing.assert_allclose(shape_model.project_shape(model, made, 2), made, atol=1e-4)
    once = shape_model.project_shape(model, model.mean + model.modes[4].reshape(3, 2), 2)
    np.testing.assert_allclose(once, model.mean, atol=1e-4)


def gaussian_maps(model, centres: np.ndarray, sigma: float, reach: int = 12) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(-reach, reach + 1)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    places = np.round(centres)[:, None] + grid
    return -((places - centres[:, None]) ** 2).sum(-1) / (2 * sigma**2), places


def test_maps_that_are_gaussians_give_the_product_of_gaussians():
    model = shape_model.fit_shape_model(shapes())
    centres = CORNERS + np.array([[1.3, -0.8], [0.4, 0.6], [-1.1, 0.2]])
    logits, places = gaussian_maps(model, centres, 1.5)
    how = jax.jit(lambda logits, places: shape_model.posterior_from_maps(model, logits, places, 0.0, 30))
    found = how(jnp.asarray(logits), jnp.asarray(places))
    expected = shape_model.posterior_from_gaussians(
        model, jnp.asarray(centres), jnp.asarray(np.tile(1.5**2 * np.eye(2), (3, 1, 1)))
    )
    np.testing.assert_allclose(found.points, expected.points, atol=0.02)
    np.testing.assert_allclose(found.covariance, expected.covariance, atol=0.05)


def test_two_maxima_are_told_apart_by_the_other_points():
    """Against the sum over all combinations of anchors."""
    model = shape_model.fit_shape_model(shapes())
    rng = np.random.default_rng(4)
    places = np.round(CORNERS)[:, None] + rng.integers(-6, 7, size=(3, 12, 2))
    logits = rng.normal(size=(3, 12))
    found = shape_model.posterior_from_maps(model, jnp.asarray(logits), jnp.asarray(places), 0.0, 60, 0.3)
    precision, mean = np.linalg.inv(dense_covariance(model)), np.asarray(model.mean).ravel()
    total, first = 0.0, np.zeros(6)
    for combination in product(range(12), repeat=3):
        points = np.concatenate([places[k, a] for k, a in enumerate(combination)])
        weight = np.exp(
            sum(logits[k, a] for k, a in enumerate(combination)) - (points - mean) @ precision @ (points - mean) / 2
        )
        total, first = total + weight, first + weight * points
    alone = shape_model.discrete_moments(jnp.asarray(logits), jnp.asarray(places), 0.0).mean
    error = np.abs(np.asarray(found.points).ravel() - first / total).max()
    assert error < 0.5
    assert error < 0.25 * np.abs(np.asarray(alone).ravel() - first / total).max()


def test_anchors_that_cannot_be_do_not_count():
    model = shape_model.fit_shape_model(shapes())
    logits, places = gaussian_maps(model, CORNERS, 2.0, 3)
    more = np.concatenate([places, places + 1000], 1)
    cannot = np.concatenate([logits, np.full(logits.shape, -np.inf)], 1)
    one = shape_model.posterior_from_maps(model, jnp.asarray(logits), jnp.asarray(places), 1.0)
    other = shape_model.posterior_from_maps(model, jnp.asarray(cannot), jnp.asarray(more), 1.0)
    np.testing.assert_allclose(other.points, one.points, atol=1e-3)
    assert np.isfinite(other.covariance).all()


def test_matrices_of_two_by_two_are_those_of_numpy():
    rng = np.random.default_rng(5)
    m = rng.normal(size=(20, 2, 2))
    m = m + m.swapaxes(1, 2)
    np.testing.assert_allclose(shape_model.inverse_2x2(jnp.asarray(m)), np.linalg.inv(m), rtol=1e-2)
    values, vectors = np.linalg.eigh(m)
    expected = (vectors * np.maximum(values, 0.1)[:, None]) @ vectors.swapaxes(1, 2)
    np.testing.assert_allclose(shape_model.positive_2x2(jnp.asarray(m), 0.1), expected, atol=1e-5)
    assert (values.min(1) < 0).any()


def test_shapes_that_cannot_be_used_are_named():
    with pytest.raises(InputError, match=r"1 shape\(s\)"):
        shape_model.fit_shape_model(CORNERS[None])
    with pytest.raises(InputError, match="non-finite"):
        shape_model.fit_shape_model(np.where(np.eye(3, 2) > 0, np.nan, shapes()))
