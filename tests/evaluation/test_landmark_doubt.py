"""Variance that is added in images unlike the training images, against brute force and simulations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pulmo_jax.evaluation.landmark_degraded import degraded
from pulmo_jax.evaluation.landmark_doubt import Doubt, added_variance, fit_doubt, required_variance
from pulmo_jax.evaluation.landmark_metrics import squared_distance

LIMIT = stats.chi2.ppf(0.95, 2)


def predictions(n, k=4, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, k, 2, 2)) * 0.4 + np.eye(2)
    return rng.uniform(0, 60, (n, k, 2)), root @ root.swapaxes(-1, -2), rng


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([0.1, 3.0, 100.0]))
def test_the_required_variance_is_the_smallest_whose_region_holds_the_truth(seed, size):
    points, covariance, rng = predictions(5, seed=seed)
    truth = points + size * rng.normal(size=points.shape)
    variance = required_variance(points, covariance, truth)
    inside = squared_distance(points, covariance, truth) <= LIMIT
    np.testing.assert_array_equal(variance[inside], 0)
    assert (variance[~inside] > 0).all()
    for factor, holds in ((1.001, True), (0.999, False)):
        wider = covariance + factor * variance[..., None, None] * np.eye(2)
        assert ((squared_distance(points, wider, truth) <= LIMIT)[~inside] == holds).all()


def test_a_landmark_without_a_truth_requires_nothing():
    points, covariance, _ = predictions(2)
    truth = points.copy()
    truth[0, 1] = np.nan
    assert np.isnan(required_variance(points, covariance, truth)).sum() == 1


def simulated(n, seed):
    """Errors that grow with the surprise beyond 100 nats, unknown to the stated covariance of 1 px^2."""
    rng = np.random.default_rng(seed)
    surprise = rng.uniform(0, 400, n)
    sd = np.sqrt(1 + (np.maximum(surprise - 100, 0) / 20) ** 2)
    truth = rng.uniform(0, 60, (n, 6, 2))
    points = truth + sd[:, None, None] * rng.normal(size=truth.shape)
    return surprise, points, np.broadcast_to(np.eye(2), (n, 6, 2, 2)).copy(), truth


def test_regions_of_new_images_hold_the_truth_at_every_surprise():
    doubt = fit_doubt(*simulated(600, 1), usual=100.0)
    surprise, points, covariance, truth = simulated(3000, 2)
    before = squared_distance(points, covariance, truth) <= LIMIT
    wider = covariance + added_variance(doubt, surprise)[:, None, None, None] * np.eye(2)
    after = squared_distance(points, wider, truth) <= LIMIT
    for low, high in ((150, 230), (230, 310), (310, 400)):
        part = (surprise > low) & (surprise <= high)
        assert before[part].mean() < 0.25
        assert 0.9 < after[part].mean() < 0.99
    np.testing.assert_array_equal(after[surprise <= 100], before[surprise <= 100])


def test_the_function_starts_at_nothing_and_never_falls():
    doubt = fit_doubt(*simulated(600, 3), usual=100.0)
    assert (doubt.surprise[0], doubt.variance[0]) == (100.0, 0.0)
    assert (np.diff(doubt.surprise) > 0).all()
    assert (np.diff(doubt.variance) >= 0).all()
    last = doubt.variance[-1]
    assert added_variance(doubt, np.array([0.0, 100.0, 1e6, np.inf, np.nan])).tolist() == [0, 0, last, last, last]


@pytest.mark.parametrize("surprise", [np.full(30, 5.0), np.full(30, np.inf)])
def test_without_unusual_images_nothing_is_added(surprise):
    points, covariance, _ = predictions(30)
    doubt = fit_doubt(surprise, points, covariance, points, usual=9.0)
    assert doubt == Doubt((), ())
    assert added_variance(doubt, np.array([1e9])).tolist() == [0]


def test_landmarks_of_degraded_images_lie_where_they_lay():
    """A bright spot at each landmark stays the brightest place about it."""
    side, points = 64, np.array([[[20.0, 24.0], [40.0, 30.0], [28.0, 44.0]]])
    y, x = np.mgrid[:side, :side]
    spots = sum(np.exp(-((y - p) ** 2 + (x - q) ** 2) / 8) for p, q in points[0])
    image = (10 + 90 * spots)[None].astype(np.float32)
    kinds = dict(degraded(image, points, seed=0))
    assert len(kinds) == 16
    for name, (pixels, moved) in kinds.items():
        assert pixels.shape == image.shape
        assert not np.array_equal(pixels, image)
        for p, q in moved[0]:
            if not (3 < p < side - 4 and 3 < q < side - 4) or (name == "half covered" and p >= side // 2):
                continue
            at = pixels[0, round(p) - 2 : round(p) + 3, round(q) - 2 : round(q) + 3].mean()
            level = np.median(pixels)
            assert at < level if name == "inverted" else at > level
        if name.startswith("turned"):
            angle = np.deg2rad(float(name.split()[2]))
            legs = [p[1] - p[0] for p in (points[0], moved[0])]
            cosine = legs[0] @ legs[1] / (legs[0] @ legs[0])
            assert cosine == pytest.approx(np.cos(angle), abs=1e-4)
    again = dict(degraded(image, points, seed=0))
    np.testing.assert_array_equal(kinds["noise of 1 sd"].images, again["noise of 1 sd"].images)
