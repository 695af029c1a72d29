"""Baselines against scikit-learn's estimators with the same choices, and on points that pixels do tell."""

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from pulmo_jax.methods import landmark_baselines
from pulmo_jax.methods.landmark_baselines import fit_baselines, normalised_pixels
from pulmo_jax.types import InputError


def spots(count: int, side: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A wide bright spot at the first point; the second stands beside it. Each image in units of its own."""
    rng = np.random.default_rng(seed)
    first = side / 2 + rng.uniform(-6, 6, size=(count, 2))
    y, x = np.mgrid[:side, :side]
    square = (y - first[:, 0, None, None]) ** 2 + (x - first[:, 1, None, None]) ** 2
    images = np.exp(-square / 128) + 0.02 * rng.normal(size=(count, side, side))
    units = rng.uniform(10, 1000, size=(count, 1, 1))
    points = np.stack([first, first + np.array([3.0, -4.0])], 1)
    return (images * units + 5 * units).astype(np.float32), points.astype(np.float32)


def error(points: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(points - truth, axis=-1).mean())


def test_pixels_tell_more_than_the_mean_shape():
    images, points = spots(80)
    tests, truth = spots(40, seed=1)
    found = fit_baselines(images, points, 0).locate(tests)
    assert list(found) == ["mean shape", "ridge", "kernel ridge"]
    np.testing.assert_allclose(found["mean shape"], np.tile(points.mean(0), (40, 1, 1)), rtol=1e-6)
    errors = {name: error(at, truth) for name, at in found.items()}
    assert errors["ridge"] < 0.5 * errors["mean shape"]
    assert errors["kernel ridge"] < 0.5 * errors["mean shape"]


def test_they_are_scikit_learns(monkeypatch):
    monkeypatch.setattr(landmark_baselines, "RIDGE_ALPHAS", (0.01,))
    monkeypatch.setattr(landmark_baselines, "RBF_ALPHAS", (0.02,))
    monkeypatch.setattr(landmark_baselines, "RBF_WIDTHS", (2.0,))
    (images, points), (tests, _) = spots(40), spots(10, seed=1)
    baselines = fit_baselines(images, points, 0)
    found, x, y = baselines.locate(tests), normalised_pixels(images), normalised_pixels(tests)
    scale = ((x - x.mean(0)) ** 2).sum(1).mean()
    flat, mean = points.reshape(40, -1), points.mean(0)
    ridge = Ridge(alpha=0.01 * scale).fit(x.astype(np.float64), flat)
    np.testing.assert_allclose(found["ridge"].reshape(10, -1), ridge.predict(y), atol=0.01)
    kernel = KernelRidge(alpha=0.02, kernel="rbf", gamma=1 / float(baselines.width))
    expected = kernel.fit(x.astype(np.float64), flat - mean.ravel()).predict(y) + mean.ravel()
    np.testing.assert_allclose(found["kernel ridge"].reshape(10, -1), expected, atol=0.02)


def test_the_best_of_the_training_folds_is_chosen():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 3))
    points = (features @ rng.normal(size=(3, 4))).reshape(60, 2, 2)
    useful, useless = features @ features.T, np.eye(60)
    folds = [(np.flatnonzero(np.arange(60) % 3 != i), np.flatnonzero(np.arange(60) % 3 == i)) for i in range(3)]
    for order in ({1.0: useless, 2.0: useful}, {1.0: useful, 2.0: useless}):
        kernel, alpha = landmark_baselines.best_kernel(order, (100.0, 1e-3), points, folds)
        assert kernel is useful
        assert alpha == 1e-3


def test_a_seed_gives_the_same_and_arrays_are_all_there_is():
    images, points = spots(30)
    one, other = (fit_baselines(images, points, 3) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.float32
    back = landmark_baselines.Baselines(**{name: np.array(value) for name, value in one._asdict().items()})
    np.testing.assert_array_equal(back.locate(images)["ridge"], one.locate(images)["ridge"])


def test_images_that_are_all_alike_give_the_mean_shape():
    points = spots(10)[1]
    found = fit_baselines(np.ones((10, 32, 32), np.float32), points, 0).locate(np.ones((2, 32, 32), np.float32))
    for at in found.values():
        np.testing.assert_allclose(at, np.tile(points.mean(0), (2, 1, 1)), atol=1e-3)


def test_fewer_images_than_folds_are_named():
    images, points = spots(4)
    with pytest.raises(InputError, match=r"4 training image\(s\) in 4 group\(s\) given; at least 5"):
        fit_baselines(images, points, 0)


def test_copies_in_other_folds_would_choose_to_learn_by_heart():
    """Noisy points, and every image four times: by group the choice is that of each image once."""
    images, points = spots(40)
    points = points + np.random.default_rng(1).normal(0, 6, points.shape).astype(np.float32)
    tests, truth = spots(40, seed=2)
    four, names = [np.tile(a, (4,) + (1,) * (a.ndim - 1)) for a in (images, points)], [str(i) for i in range(40)] * 4
    grouped, each, once = (
        error(fit_baselines(*given).locate(tests)["kernel ridge"], truth)
        for given in ((*four, 0, names), (*four, 0), (images, points, 0))
    )
    assert grouped < 0.8 * each
    assert grouped < 1.3 * once
    with pytest.raises(InputError, match=r"8 training image\(s\) in 2 group\(s\) given"):
        fit_baselines(images[:8], points[:8], 0, ["a"] * 4 + ["b"] * 4)
