"""Thin-plate splines against scikit-image's and SciPy's."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import RBFInterpolator
from skimage.transform import ThinPlateSplineTransform

from pulmo_jax.core import thin_plate
from pulmo_jax.types import InputError


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def random_pair(seed: int = 0, noise: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.stack(np.meshgrid([20, 90, 160], [10, 60, 110, 160]), -1).reshape(-1, 2) + rng.uniform(-9, 9, (12, 2))
    return centres, centres @ [[0.9, 0.3], [-0.2, 1.2]] + [4, -7] + noise * rng.normal(size=centres.shape)


warp, inverse = jax.jit(thin_plate.warp), jax.jit(thin_plate.inverse, static_argnames="steps")
POINTS = np.random.default_rng(9).uniform(-40, 220, (80, 2))


def test_it_is_scikit_image_s():
    centres, targets = random_pair()
    theirs = ThinPlateSplineTransform()
    with warnings.catch_warnings():  # newer versions have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        assert theirs.estimate(centres, targets)
    found = warp(jnp.asarray(POINTS), thin_plate.fit(centres), jnp.asarray(targets))
    np.testing.assert_allclose(found, theirs(POINTS), atol=1e-3)  # theirs adds something to r^2


def test_a_stiff_one_is_scipy_s_smoothing():
    centres, targets = random_pair()
    middle = centres.mean(0)
    spread = np.sqrt(((centres - middle) ** 2).sum(-1).mean())
    # SciPy's kernel is r^2 log r, half of ours.
    theirs = RBFInterpolator((centres - middle) / spread, targets, smoothing=0.15, kernel="thin_plate_spline", degree=1)
    plate = thin_plate.fit(centres, stiffness=0.3)
    found = warp(jnp.asarray(POINTS), plate, jnp.asarray(targets))
    np.testing.assert_allclose(found, theirs((POINTS - middle) / spread), atol=1e-8)


def test_stiffness_without_end_is_the_least_squares_affine_map():
    centres, targets = random_pair()
    design = np.c_[np.ones(len(centres)), centres]
    expected = np.c_[np.ones(len(POINTS)), POINTS] @ np.linalg.lstsq(design, targets, rcond=None)[0]
    plate = thin_plate.fit(centres, stiffness=1e6)
    found = warp(jnp.asarray(POINTS), plate, jnp.asarray(targets))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_centres_go_to_their_targets_and_affine_maps_are_exact():
    centres, targets = random_pair()
    plate = thin_plate.fit(centres)
    np.testing.assert_allclose(warp(jnp.asarray(centres), plate, jnp.asarray(targets)), targets, atol=1e-9)
    affine = lambda p: p @ np.array([[0.5, 0.1], [-0.4, 1.3]]) + [3, 8]  # noqa: E731
    found = warp(jnp.asarray(POINTS), plate, jnp.asarray(affine(centres)))
    np.testing.assert_allclose(found, affine(POINTS), atol=1e-8)
    np.testing.assert_allclose(jax.jit(thin_plate.weights)(jnp.asarray(POINTS), plate).sum(-1), 1, atol=1e-9)


def test_inverse_is_one():
    centres, targets = random_pair()
    plate, targets = thin_plate.fit(centres), jnp.asarray(targets)
    there = warp(jnp.asarray(POINTS), plate, targets)
    back = inverse(there, plate, targets, there)
    np.testing.assert_allclose(back, POINTS, atol=1e-8)


def test_float32_is_good_to_a_hundredth_of_a_pixel():
    centres, targets = random_pair()
    plate = thin_plate.fit(centres)
    exact = warp(jnp.asarray(POINTS), plate, jnp.asarray(targets))
    with jax.enable_x64(False):
        points, targets = jnp.asarray(POINTS), jnp.asarray(targets)
        found = warp(points, plate, targets)
        assert found.dtype == jnp.float32
        back = inverse(found, plate, targets, points + 5)
    np.testing.assert_allclose(found, exact, atol=0.01)
    np.testing.assert_allclose(back, POINTS, atol=0.02)


def test_gradients_are_those_of_differences():
    centres, targets = random_pair()
    plate, values = thin_plate.fit(centres), (jnp.asarray(POINTS), jnp.asarray(targets))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=POINTS.shape))

    def forward(points, targets):
        return (warp(points, plate, targets) * weight).sum()

    def back(points, targets):
        return (inverse(points, plate, targets, points, steps=12) * weight).sum()

    for loss in (forward, back):
        for which, slope in enumerate(jax.jit(jax.grad(loss, (0, 1)))(*values)):
            way = 1e-5 * jnp.asarray(np.random.default_rng(1).normal(size=slope.shape))
            ahead, behind = ([v + s * way if i == which else v for i, v in enumerate(values)] for s in (1, -1))
            assert float((slope * way).sum()) == pytest.approx(float(loss(*ahead) - loss(*behind)) / 2, rel=1e-4)


def test_gradient_at_a_centre_is_finite_and_right():
    centres, targets = random_pair()
    plate, targets = thin_plate.fit(centres), jnp.asarray(targets)
    slope = jax.jit(jax.jacfwd(lambda p: warp(p, plate, targets)))(jnp.asarray(centres[3]))
    step = 1e-4 * np.eye(2)
    ahead, behind = (warp(jnp.asarray(centres[3] + s * step), plate, targets) for s in (1, -1))
    np.testing.assert_allclose(slope, (np.asarray(ahead) - behind).T / 2e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["one place", "one line", "folded"])
def test_targets_that_fold_the_plate_give_numbers(target):
    centres, targets = random_pair()
    rng = np.random.default_rng(0)
    targets = jnp.asarray({
        "one place": np.full_like(targets, 5.0),
        "one line": targets[:, :1] @ [[1.0, 2.0]],
        "folded": rng.permutation(targets),
    }[target])  # fmt: skip
    plate, points = thin_plate.fit(centres), jnp.asarray(POINTS)
    assert jnp.isfinite(warp(points, plate, targets)).all()
    assert jnp.isfinite(inverse(points, plate, targets, points, steps=20)).all()
    slope = jax.jit(jax.grad(lambda t: inverse(points, plate, t, points, steps=20).sum()))(targets)
    assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("centres", [
    np.ones((4, 2)), np.arange(10.0)[:, None] @ [[1.0, 2.0]], np.array([[0.0, 0], [1, 0], [0, 1], [0, 1]]),
    np.array([[0.0, 0], [1, 0], [0, np.nan]]), np.array([[0.0, 0], [1, 0]]),
])  # fmt: skip
def test_centres_without_a_spline_are_refused(centres):
    with pytest.raises(InputError, match="do not define a thin-plate spline"):
        thin_plate.fit(centres)
