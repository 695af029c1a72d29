"""The landmark network's losses, moments and averages against NumPy; what mirroring must do; and a little training."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pulmo_jax.core.shape_model import fit_shape_model
from pulmo_jax.methods import landmark_losses as losses
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.landmark_net import (
    LandmarkNetwork,
    mirror_permutation,
    moments,
    pooled,
    shaped,
)
from pulmo_jax.methods.located import Located, Locator, Trained
from pulmo_jax.models.landmark_net import LandmarkNet
from pulmo_jax.types import InputError

SIDE = 32
TABLE = Path(__file__).parents[3] / "shared/data/chest_landmarks/landmarks_train.csv"
SMALL = partial(LandmarkNet, stem_stride=2, widths=(8, 8, 8))
STILL = dict.fromkeys(("rotation_deg", "scale", "aspect", "shear", "shift", "flip", "gamma", "shading", "noise"), 0.0)


def small(**options) -> LandmarkNetwork:
    given = {"n_landmarks": 3, "mirror": (1, 0, 2), "shapes": None, "shape_prior": False}
    options = given | {"size": SIDE, "network": SMALL, "members": 2} | options
    return LandmarkNetwork(**options)


@cache
def blobs(count: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Images of two equal spots side by side and a larger one below, and where they are."""
    random = np.random.default_rng(seed)
    points = np.array([[10, 9], [10, 22], [22, 16]]) + random.uniform(-4, 4, (count, 3, 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    squared = (y - points[..., 0, None, None]) ** 2 + (x - points[..., 1, None, None]) ** 2
    images = np.exp(-squared / np.array([4.0, 4.0, 18.0])[:, None, None]).sum(1)
    noisy = 1000 * images + random.normal(0, 20, images.shape)
    return jnp.asarray(noisy, jnp.float32), jnp.asarray(points, jnp.float32)


@cache
def locate(members: int = 2, flip_average: bool = True) -> Callable[..., Located]:
    return jax.jit(small(members=members, flip_average=flip_average).locate)


@cache
def initial(members: int = 2, seed: int = 0) -> Params:
    return small(members=members, seed=seed).init()


@cache
def found(members: int = 2, flip_average: bool = True) -> Located:
    return locate(members, flip_average)(initial(members), blobs(4)[0])


def test_it_is_what_a_landmark_job_trains():
    assert isinstance(small(), Locator)
    assert isinstance(small(), Trained)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 36}, "method.size=36: this model needs a multiple of 8"),
        ({"mirror": (1, 1, 2)}, r"mirror=\[1, 1, 2\].*0 to 2"),
        ({"mirror": (1, 0)}, r"mirror=\[1, 0\]"),
    ],
)
def test_what_does_not_fit_is_named(options, words):
    with pytest.raises(InputError, match=words):
        small(**options)


# --- which point becomes which


def test_pairs_swap_and_points_on_the_axis_stay():
    half = np.array([[2.0, 3.0], [8.0, 1.0], [12.0, 6.0]])
    axis = np.array([[1.0, 10.0], [14.0, 10.0]])
    shape = np.concatenate([half, axis, half * [1, -1] + [0, 20]])
    noise = np.random.default_rng(0).normal(0, 0.5, (50, *shape.shape))
    np.testing.assert_array_equal(mirror_permutation(shape + noise), [5, 6, 7, 3, 4, 0, 1, 2])


@pytest.mark.skipif(not TABLE.exists(), reason="the landmark data are not here")
def test_the_chest_landmarks_are_paired_by_side():
    table = np.genfromtxt(TABLE, delimiter=",", skip_header=1)[:, 1:]
    mirror = mirror_permutation(table.reshape(len(table), -1, 2)[..., ::-1])
    pairs = {(3, 4), (5, 6), (7, 8), (12, 13), (14, 15)}  # numbered from 1, as in the table
    axis = {1, 2, 9, 10, 11}
    assert {(k + 1, m + 1) for k, m in enumerate(mirror) if k < m} == pairs
    assert {k + 1 for k, m in enumerate(mirror) if k == m} == axis


# --- arithmetic


def test_moments_of_a_heat_map():
    heat = np.random.default_rng(0).dirichlet(np.ones(64), (2, 3)).transpose(0, 2, 1)  # (B, N, K)
    result = moments(jnp.asarray(heat, jnp.float32), SIDE)
    cells = np.array([(4 * i + 1.5, 4 * j + 1.5) for i in range(8) for j in range(8)])
    for b in range(2):
        for k in range(3):
            np.testing.assert_allclose(result.points[b, k], np.average(cells, axis=0, weights=heat[b, :, k]), atol=1e-4)
            expected = np.cov(cells.T, aweights=heat[b, :, k], ddof=0)
            np.testing.assert_allclose(result.covariance[b, k], expected, rtol=1e-4, atol=1e-3)


def test_a_heat_map_of_one_cell_is_sure():
    heat = np.zeros((1, 64, 1), np.float32)
    heat[0, 8 * 2 + 5] = 1
    result = moments(jnp.asarray(heat), SIDE)
    np.testing.assert_allclose(result.points[0, 0], [2 * 4 + 1.5, 5 * 4 + 1.5])
    np.testing.assert_array_equal(result.covariance, 0)


def test_the_covariance_of_a_mixture():
    """By drawing: a member at random, then a point of its Gaussian."""
    random = np.random.default_rng(0)
    points = random.normal(0, 2, (3, 1, 1, 2)).astype(np.float32)
    roots = random.normal(0, 1, (3, 1, 1, 2, 2)).astype(np.float32)
    members = Located(jnp.asarray(points), jnp.asarray(roots @ roots.swapaxes(-1, -2)))
    draws = [p[0, 0] + random.normal(size=(100_000, 2)) @ r[0, 0].T for p, r in zip(points, roots, strict=True)]
    result = pooled(members)
    np.testing.assert_allclose(result.points[0, 0], np.concatenate(draws).mean(0), atol=0.03)
    np.testing.assert_allclose(result.covariance[0, 0], np.cov(np.concatenate(draws).T), rtol=0.03, atol=0.03)


def test_the_wing_is_a_logarithm_and_then_straight():
    x, width, curve = np.stack([np.linspace(-12, 12, 241), np.zeros(241)], -1), 5.0, 1.0
    constant = width - width * np.log(1 + width / curve)
    inner = width * np.log(1 + abs(x[:, 0]) / curve)
    expected = np.where(abs(x[:, 0]) < width, inner, abs(x[:, 0]) - constant)
    found = losses.wing(jnp.asarray(x, jnp.float32), jnp.zeros((241, 2, 2)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jumps = np.abs(np.diff(np.asarray(found)))
    assert jumps.max() < 0.1 * width / curve + 1e-3


@pytest.mark.parametrize("covariance", [[[1.0, 0.0], [0.0, 1.0]], [[4.0, 1.0], [1.0, 0.5]]], ids=["round", "long"])
def test_the_laplacian_is_a_density_with_that_covariance(covariance):
    step = 0.05
    d = np.stack(np.meshgrid(*2 * [np.arange(-30, 30, step)], indexing="ij"), -1)
    spread = jnp.broadcast_to(jnp.asarray(covariance), (*d.shape, 2))
    density = np.exp(-np.asarray(losses.laplace(jnp.asarray(d, jnp.float32), spread, 0.0), np.float64)) * step**2
    assert density.sum() == pytest.approx(2 * np.pi / 3, rel=0.01)
    second = np.einsum("yx,yxi,yxj->ij", density / density.sum(), d, d)
    np.testing.assert_allclose(second, covariance, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("loss", "of"), [(losses.l1, np.abs), (losses.l2, np.square)])
def test_plain_losses_are_sums_over_the_coordinates(loss, of):
    displacement = np.random.default_rng(0).normal(0, 3, (2, 3, 2)).astype(np.float32)
    found = loss(jnp.asarray(displacement), jnp.zeros((2, 3, 2, 2)))
    np.testing.assert_allclose(found, of(displacement).sum(-1), rtol=1e-5)


@pytest.mark.slow
def test_the_loss_is_of_percents_of_the_side_and_counts_what_is_inside():
    seen = {}

    def loss(displacement, covariance):
        seen.update(displacement=displacement, covariance=covariance)
        return losses.l2(displacement, covariance)

    method, (images, points) = small(loss=loss, members=1, **STILL), blobs(2)
    params = initial(1)
    points = points.at[0, 0].set(jnp.array([-5.0, 3.0]))  # outside the image
    value = method.train_loss(params, (images, points), jax.random.key(0))
    heat = method._heat(jax.tree.map(lambda leaf: leaf[0], params), images)
    apart = np.asarray((heat.points - points) * 100 / SIDE, np.float64)
    assert set(seen) == {"displacement", "covariance"}
    assert float(value) == pytest.approx((apart**2).sum(-1).ravel()[1:].mean(), rel=1e-4)


@pytest.mark.parametrize("loss", [losses.laplace, losses.wing, losses.l1, losses.l2])
def test_every_loss_pulls_towards_the_point(loss):
    spread = jnp.broadcast_to(4 * jnp.eye(2), (1, 1, 2, 2))

    def of(point: jax.Array) -> jax.Array:
        return loss(point - 10.0, spread).sum()

    for start in (5.0, 9.5, 18.0):
        gradient = jax.grad(of)(jnp.full((1, 1, 2), start))
        np.testing.assert_array_equal(np.sign(gradient), np.sign(start - 10))


# --- locating


@pytest.mark.slow
def test_the_answer_for_a_mirrored_image_is_mirrored():
    mirrored = locate()(initial(), blobs(4)[0][..., ::-1])
    here, order = found(), jnp.array(small().mirror)
    np.testing.assert_allclose(mirrored.points[..., 0], here.points[:, order, 0], atol=1e-3)
    np.testing.assert_allclose(mirrored.points[..., 1], SIDE - 1 - here.points[:, order, 1], atol=1e-3)
    signs = np.array([[1, -1], [-1, 1]])
    np.testing.assert_allclose(mirrored.covariance, here.covariance[:, order] * signs, rtol=1e-3, atol=1e-2)
    alone = found(flip_average=False)
    assert float(jnp.abs(alone.points - here.points).max()) > 1e-3


@pytest.mark.slow
def test_the_ensemble_is_the_mixture_of_its_members():
    members = [jax.tree.map(lambda p, i=i: p[i : i + 1], initial()) for i in range(2)]
    alone = [locate(1, False)(params, blobs(4)[0]) for params in members]
    expected = pooled(jax.tree.map(lambda *a: jnp.stack(a), *alone))
    together = found(flip_average=False)
    np.testing.assert_allclose(together.points, expected.points, atol=1e-3)
    np.testing.assert_allclose(together.covariance, expected.covariance, rtol=1e-3, atol=1e-2)
    assert float(jnp.abs(alone[0].points - alone[1].points).max()) > 1e-2


@pytest.mark.slow
def test_covariances_are_positive_and_symmetric():
    covariance = np.asarray(found().covariance)
    assert (np.linalg.eigvalsh(covariance) > 0).all()
    np.testing.assert_array_equal(covariance, covariance.swapaxes(-1, -2))


def test_members_and_seeds_start_differently():
    one, other = (jax.tree.leaves(initial(seed=seed)) for seed in (0, 1))
    kernels = [(a, b) for a, b in zip(one, other, strict=True) if a.ndim > 3]
    assert len(kernels) > 5
    for a, b in kernels:
        assert float(jnp.abs(a[0] - a[1]).max()) > 0.01
        assert float(jnp.abs(a - b).max()) > 0.01


def test_with_a_shape_the_answer_is_the_product_of_two_gaussians():
    random = np.random.default_rng(0)
    shapes = (
        np.array([[10, 9], [10, 22], [22, 16]]) + random.normal(0, 1, (50, 1, 2)) + random.normal(0, 0.3, (50, 3, 2))
    )
    model = fit_shape_model(shapes.astype(np.float32))
    here = found()
    covariance = np.asarray(model.lower, np.float64) @ np.asarray(model.lower, np.float64).T
    result = shaped(here, model)
    for b in range(4):
        seen = np.zeros((6, 6))
        for k in range(3):
            seen[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = here.covariance[b, k]
        precision = np.linalg.inv(covariance) + np.linalg.inv(seen)
        weighted = np.linalg.solve(covariance, np.ravel(model.mean)) + np.linalg.solve(seen, np.ravel(here.points[b]))
        np.testing.assert_allclose(result.points[b].ravel(), np.linalg.solve(precision, weighted), atol=1e-2)
        posterior = np.linalg.inv(precision)
        for k in range(3):
            block = posterior[2 * k : 2 * k + 2, 2 * k : 2 * k + 2]
            np.testing.assert_allclose(result.covariance[b, k], block, rtol=1e-2, atol=1e-2)
    whole = jax.jit(small(shapes=model, shape_prior=True).locate)(initial(), blobs(4)[0])
    np.testing.assert_allclose(whole.points, result.points, atol=1e-3)


# --- learning


@pytest.fixture(scope="module")
def still_loss() -> Callable[..., jax.Array]:
    method = small(flip_average=False, members=1, loss=losses.l1, **STILL)
    loss = jax.jit(method.train_loss)
    return lambda *batch: loss(initial(1), batch, jax.random.key(0))


@pytest.mark.slow
def test_the_loss_of_still_images_is_that_of_the_points_located(still_loss):
    images, points = blobs(4)
    expected = np.abs(np.asarray(found(1, False).points - points)).sum(-1).mean() * 100 / SIDE
    assert float(still_loss(images, points)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_points_out_of_the_image_do_not_count(still_loss):
    images, points = blobs(4)
    each = np.abs(np.asarray(found(1, False).points - points)).sum(-1) * 100 / SIDE
    counted = np.ones((4, 3), bool)
    counted[:2, 1] = False
    assert float(still_loss(images, points.at[:2, 1].set(-20.0))) == pytest.approx(each[counted].mean(), rel=1e-3)
    assert float(still_loss(images, points - 100)) == 0


@pytest.mark.slow
def test_jitter_is_decided_by_the_key_and_moves_points_with_the_image():
    jitter, (images, points) = jax.jit(small(flip=1.0).jittered), blobs(6)
    one, again, other = (jitter((images, points), jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one[0], again[0])
    assert float(jnp.abs(one[1] - other[1]).max()) > 1
    rows, columns = (np.rint(np.asarray(one[1])).astype(int)[..., i].clip(0, SIDE - 1) for i in (0, 1))
    at_points = np.asarray(one[0])[np.arange(6)[:, None], rows, columns]
    assert (at_points[:, 2] > np.quantile(one[0], 0.9, axis=(1, 2))).all()  # the large spot, wherever it went
    assert (one[1][:, 0, 1] < one[1][:, 1, 1]).all()  # mirrored, and the left one is still the left one


@pytest.mark.slow
def test_training_finds_the_spots():
    method = small(scale=0.03, rotation_deg=3.0, shift=0.02)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, batch, key):
        gradient = jax.grad(method.train_loss)(params, batch, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    images, points = blobs(64)
    params = initial()
    state = optimizer.init(params)
    for i in range(80):
        rows = jnp.arange(16) + 16 * (i % 4)
        params, state = step(params, state, (images[rows], points[rows]), jax.random.key(i))

    unseen, truth = blobs(32, seed=1)
    result = locate()(params, unseen)
    errors = np.linalg.norm(result.points - truth, axis=-1)
    baseline = np.linalg.norm(points.mean(0) - truth, axis=-1)
    assert errors.mean() < 0.4 * baseline.mean()
