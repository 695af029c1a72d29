"""Errors, intervals and calibration of landmarks against loops, SciPy and simulations with a known answer."""

import numpy as np
import pytest
from scipy import stats

from pulmo_jax.evaluation import landmark_metrics as metrics
from pulmo_jax.types import InputError

RNG = np.random.default_rng(0)
N, K = 40, 5


def simulated(n=N, k=K, scale=1.0, image_spread=0.0, rng=RNG):
    """Predictions whose errors have `scale` times the predicted covariance, and a common factor per image."""
    root = rng.normal(size=(n, k, 2, 2)) * 0.3 + np.eye(2) * 2
    covariance = root @ root.swapaxes(-1, -2)
    factor = np.sqrt(scale) * np.exp(image_spread * rng.normal(size=(n, 1, 1)))
    errors = (np.linalg.cholesky(covariance) @ rng.normal(size=(n, k, 2, 1)))[..., 0] * factor
    truth = rng.uniform(0, 200, (n, k, 2))
    return truth + errors, covariance, truth


def test_errors_and_units_are_those_of_a_loop():
    points, _, truth = simulated()
    sizes = RNG.integers(100, 500, (N, 2))
    errors = metrics.radial_errors(points, truth)
    for i in range(0, N, 7):
        for k in range(K):
            distance = np.sqrt(sum((points[i, k, c] - truth[i, k, c]) ** 2 for c in range(2)))
            assert errors[i, k] == pytest.approx(distance)
            h, w = sizes[i]
            for unit, expected in (
                ("px", 1),
                ("px_at_224", 224 / max(h, w)),
                ("percent_of_diagonal", 100 / np.hypot(h, w)),
            ):
                assert metrics.convert_unit(errors, sizes, unit)[i, k] == pytest.approx(distance * expected)


def test_unknown_truths_count_nowhere():
    points, covariance, truth = simulated()
    truth[3], truth[:, 2], truth[5, 1] = np.nan, np.nan, np.nan
    errors = metrics.radial_errors(points, truth)
    known = errors[~np.isnan(errors)]
    figures = metrics.error_figures(errors, 50)
    assert figures.mean.value == pytest.approx(known.mean())
    assert figures.median.value == pytest.approx(np.median(known))
    assert metrics.error_figures(errors[:, [2]], 50).mean.value is None
    assert 3 not in metrics.failures(errors, N)
    assert len(metrics.failures(errors, N)) == N - 1
    squared = metrics.squared_distance(points, covariance, truth)
    assert metrics.coverage(squared, (0.95,), 50)[0].value == pytest.approx(
        np.mean(squared[~np.isnan(squared)] <= stats.chi2.ppf(0.95, 2))
    )
    assert metrics.cumulative_error(errors)[0].size == known.size


def test_intervals_are_scipys_percentile_bootstrap_over_images():
    errors = metrics.radial_errors(*simulated(image_spread=0.5)[::2])
    ours = metrics.error_figures(errors, 4000).mean
    other = stats.bootstrap(
        (errors.mean(1),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = other.high - other.low
    assert ours.low == pytest.approx(other.low, abs=0.05 * width)
    assert ours.high == pytest.approx(other.high, abs=0.05 * width)


def test_intervals_hold_the_true_mean_as_often_as_they_say_when_images_differ():
    """Over points they would be far too narrow here."""
    hits = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        errors = np.exp(0.6 * rng.normal(size=(40, 1))) * np.ones((1, 5))
        estimate = metrics.error_figures(errors, 200, seed).mean
        hits.append(estimate.low <= np.exp(0.18) <= estimate.high)
    assert 0.83 <= np.mean(hits) <= 1


def test_one_image_has_no_interval():
    estimate = metrics.error_figures(np.ones((1, 3))).mean
    assert (estimate.value, estimate.low, estimate.high) == (1, None, None)
    assert "two groups" in estimate.reason


def test_classes_are_told_apart():
    errors = metrics.radial_errors(*simulated()[::2])
    labels = ["Normal"] * 25 + ["COVID"] * 15
    errors[25:] += 2
    shift = metrics.class_shift(errors, labels, "Normal")["COVID"]
    assert shift.difference.value == pytest.approx(errors[25:].mean() - errors[:25].mean())
    assert 0 < shift.difference.low < shift.difference.value < shift.difference.high
    assert shift.p_value < 0.01
    with pytest.raises(InputError, match=r"'Healthy'.*'COVID', 'Normal'"):
        metrics.class_shift(errors, labels, "Healthy")


def test_permutation_p_value_is_scipys_and_uniform_without_a_shift():
    rng = np.random.default_rng(3)
    errors = rng.gamma(2, size=(30, 4))
    labels = ["a"] * 12 + ["b"] * 18
    ours = metrics.class_shift(errors, labels, "a", 4000)["b"].p_value
    of_image = errors.mean(1)
    other = stats.permutation_test(
        (of_image[12:], of_image[:12]), lambda x, y: np.mean(x) - np.mean(y), n_resamples=4000, rng=rng
    )
    assert ours == pytest.approx(other.pvalue, abs=0.04)
    p_values = [metrics.class_shift(rng.gamma(2, size=(30, 4)), labels, "a", 99)["b"].p_value for _ in range(100)]
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_single_image_of_a_class_has_a_difference_alone():
    shift = metrics.class_shift(np.array([[1.0], [2.0], [5.0]]), ["a", "a", "b"], "a")["b"]
    assert shift.difference.value == pytest.approx(3.5)
    assert (shift.difference.low, shift.p_value) == (None, None)


def test_cumulative_error_is_scipys_distribution_function():
    errors = RNG.gamma(2, size=(N, K))
    value, share = metrics.cumulative_error(errors)
    other = stats.ecdf(errors.ravel()).cdf
    np.testing.assert_allclose(share, other.evaluate(value))


def test_failures_are_the_worst_images_first():
    assert metrics.failures(np.array([[1.0, 2], [9, 9], [3, 5]]), 2).tolist() == [1, 2]


def test_squared_distance_is_a_solve():
    points, covariance, truth = simulated()
    d = (points - truth)[..., None]
    expected = (d.swapaxes(-1, -2) @ np.linalg.solve(covariance, d))[..., 0, 0]
    np.testing.assert_allclose(metrics.squared_distance(points, covariance, truth), expected)


@pytest.mark.parametrize("bad", [np.zeros((2, 2)), -np.eye(2), np.full((2, 2), np.nan), np.array([[1.0, 2], [2, 1]])])
def test_impossible_covariance_is_named(bad):
    points, covariance, truth = simulated()
    covariance[4, 2] = bad
    with pytest.raises(InputError, match="landmark 3 of image 4"):
        metrics.squared_distance(points, covariance, truth)


@pytest.mark.parametrize("scale", [0.04, 1.0, 25.0])
def test_scale_brings_covariances_to_the_size_of_the_errors(scale):
    points, covariance, truth = simulated(2000, scale=scale)
    assert metrics.scale_covariance(points, covariance, truth) == pytest.approx(scale, rel=0.05)


def test_calibrated_regions_cover_at_least_their_level_on_new_images():
    """Few images that differ by much: without the finite-sample correction the mean coverage would fall short."""
    rng = np.random.default_rng(0)
    shares, short = [], []
    for _ in range(400):
        points, covariance, truth = simulated(25, image_spread=0.5, rng=rng)
        squared = metrics.squared_distance(points, covariance, truth)
        factor = metrics.scale_covariance(points[:-1], covariance[:-1], truth[:-1])
        limit = stats.chi2.ppf(0.95, 2)
        shares.append(np.mean(squared[-1] <= factor * limit))
        short.append(np.mean(squared[-1] <= np.quantile(squared[:-1], 0.95)))
    assert 0.95 <= np.mean(shares) <= 0.995
    assert np.mean(short) < np.mean(shares)


def test_calibration_without_truth_is_refused():
    points, covariance, truth = simulated()
    with pytest.raises(InputError, match="no validation image"):
        metrics.scale_covariance(points, covariance, truth * np.nan)


def test_coverage_of_right_covariances_is_nominal():
    points, covariance, truth = simulated(400)
    levels = (0.1, 0.68, 0.95)
    for level, estimate in zip(
        levels, metrics.coverage(metrics.squared_distance(points, covariance, truth), levels, 200), strict=True
    ):
        assert estimate.value == pytest.approx(level, abs=0.03)
        assert estimate.low < estimate.value < estimate.high


def test_summary_holds_every_unit():
    errors = RNG.gamma(2, size=(N, K))
    figures = metrics.summary(errors, np.full((N, 2), 299), 20)
    assert figures["px_at_224"].mean.value == pytest.approx(errors.mean() * 224 / 299)
    assert figures["percent_of_diagonal"].median.value == pytest.approx(np.median(errors) * 100 / np.hypot(299, 299))


# --- groups


def test_copies_of_an_image_in_its_group_tell_nothing_new():
    errors, names = RNG.gamma(2, size=(12, K)), [f"patient {i}" for i in range(12)]
    alone = metrics.error_figures(errors, 300, groups=names).mean
    copied = metrics.error_figures(np.concatenate([errors, errors]), 300, groups=names * 2).mean
    as_if_new = metrics.error_figures(np.concatenate([errors, errors]), 300).mean
    np.testing.assert_allclose((copied.value, copied.low, copied.high), (alone.value, alone.low, alone.high))
    assert as_if_new.high - as_if_new.low < 0.85 * (alone.high - alone.low)


def test_copies_do_not_make_a_shift_significant():
    errors, labels = RNG.gamma(2, size=(10, K)), ["a", "b"] * 5
    names = [f"patient {i}" for i in range(10)]
    alone = metrics.class_shift(errors, labels, "a", 400, groups=names)["b"]
    copied = metrics.class_shift(np.repeat(errors, 8, 0), np.repeat(labels, 8).tolist(), "a", 400,
                                 groups=np.repeat(names, 8).tolist())["b"]  # fmt: skip
    assert copied.p_value == pytest.approx(alone.p_value)
    assert copied.difference.value == pytest.approx(alone.difference.value)
    assert (copied.difference.low, copied.difference.high) == pytest.approx(
        (alone.difference.low, alone.difference.high)
    )


def test_held_out_coverage_is_that_of_the_level_whatever_the_scale():
    truth = RNG.normal(size=(400, K, 2))
    covariance = np.broadcast_to(np.diag([4.0, 0.25]), (400, K, 2, 2))
    points = truth + RNG.normal(size=truth.shape) * [2.0, 0.5]
    names = [str(i // 2) for i in range(400)]
    for scale in (0.01, 1, 100):
        assert metrics.held_out_coverage(points, covariance * scale, truth, names) == pytest.approx(0.95, abs=0.01)


def test_held_out_coverage_by_hand():
    """Five images, of which the last is three times as far off: judged by the others it is outside, and they inside."""
    truth = np.zeros((5, 1, 2))
    points = np.array([1, 1, 1, 1, 3.0])[:, None, None] * [0.0, 1.0]
    covariance = np.broadcast_to(np.eye(2), (5, 1, 2, 2))
    assert metrics.held_out_coverage(points, covariance, truth, list("abcde")) == pytest.approx(0.8)
    assert metrics.held_out_coverage(points, covariance, truth, list("abcdd")) is None


def test_labels_of_a_coarse_grid_have_a_floor():
    rng = np.random.default_rng(0)
    fine = rng.uniform(0, 299, (300, 5, 2))
    step = 299 / 64
    coarse = np.rint(np.floor(fine / step) * step)  # stored as whole px
    expected = np.hypot(*((rng.uniform(-step / 2, step / 2, (200_000, 2))).T)).mean()
    assert metrics.label_floor_px(coarse) == pytest.approx(expected, rel=0.01)
    assert expected == pytest.approx(1.79, abs=0.01)
    assert metrics.label_floor_px(fine) == 0
    assert metrics.label_floor_px(np.full((3, 5, 2), np.nan)) == 0
