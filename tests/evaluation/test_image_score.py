"""The combined image score: p-values, rates of false alarms by simulation, and what it sees."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pulmo_jax.evaluation.calibration import Calibration, Calibrator
from pulmo_jax.evaluation.image_score import (
    WEIGHTS,
    NormalLaw,
    NormalStatistics,
    combined_score,
    left_out_scores,
    score_of_statistics,
)
from pulmo_jax.evaluation.image_statistics import STATISTICS, image_statistics
from pulmo_jax.types import InputError

K = len(WEIGHTS)


def law_of(values) -> NormalLaw:
    return NormalLaw.of(np.sort(np.asarray(values, np.float64)))


def test_every_statistic_has_a_weight():
    assert set(WEIGHTS) == set(STATISTICS)
    assert sum(WEIGHTS.values()) == pytest.approx(1)


def test_p_values_of_normal_values_are_their_ranks():
    values = np.random.default_rng(0).permutation(np.arange(10.0))
    p = np.exp(law_of(values).log_p(values))
    np.testing.assert_allclose(p, (10 - values + 0.5) / 11)


def test_p_values_decrease_strictly_inside_and_beyond_the_normal_values():
    values = np.random.default_rng(1).normal(size=30)
    at = np.linspace(values.min() - 5, values.max() + 500, 4001)
    log_p = law_of(values).log_p(at)
    assert (np.diff(log_p) < 0).all()
    assert log_p[0] < 0
    assert np.isfinite(law_of(values).log_p(np.array([-1e30, 1e30]))).all()


def test_p_values_are_continuous_at_the_ends():
    values = np.random.default_rng(2).normal(size=20)
    low, high = values.min(), values.max()
    law = law_of(values)
    ends = np.array([low, high])
    np.testing.assert_allclose(law.log_p(ends - 1e-9), law.log_p(ends + 1e-9), atol=1e-6)


def test_the_tail_of_exponential_values_is_that_of_their_law():
    """An exponential law has a survival function of exp(-x): its tail is recovered far beyond the values."""
    laws = [law_of(np.random.default_rng(seed).exponential(size=2000)) for seed in range(20)]
    log_p = np.mean([law.log_p(np.array([10.0, 20.0])) for law in laws], axis=0)
    assert log_p[0] == pytest.approx(-10, abs=1)  # the p-value of the highest value is 1.5 / (n + 1), a little high
    assert log_p[1] - log_p[0] == pytest.approx(-10, rel=0.1)


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0, 0.0], [1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 5e-324]])
def test_constant_and_tied_values_give_finite_p_values(values):
    law = law_of(values)
    log_p = law.log_p(np.array([-2.0, min(values), max(values), max(values) + 1, 50.0]))
    assert np.isfinite(law.log_p(np.array([-3e38, 3e38]))).all()
    assert np.isfinite(log_p).all()
    assert (np.diff(log_p) <= 0).all()
    assert log_p[-1] < log_p[2]


def test_the_combination_is_the_weighted_harmonic_mean():
    normal = np.sort(np.random.default_rng(3).normal(size=(K, 25)), axis=1)
    value = np.linspace(-1, 1.5, K)
    p = np.array([np.exp(NormalLaw.of(row).log_p(value[[k]])[0]) for k, row in enumerate(normal)])
    weights = np.array(list(WEIGHTS.values()))
    assert combined_score(value[:, None], laws_of(normal))[0] == pytest.approx(-np.log10(1 / np.sum(weights / p)))


@pytest.mark.parametrize("name", STATISTICS)
def test_the_score_increases_with_every_statistic(name):
    rng = np.random.default_rng(4)
    normal = NormalStatistics(tuple(range(20)), {key: tuple(rng.normal(size=20).tolist()) for key in WEIGHTS})
    base = dict.fromkeys(WEIGHTS, 0.0)
    scores = [score_of_statistics({**base, name: value}, normal) for value in np.linspace(-3, 100, 200)]
    assert (np.diff(scores) > 0).all()


def test_an_image_without_scored_pixels_has_no_score():
    normal = NormalStatistics((0, 1), dict.fromkeys(WEIGHTS, (0.0, 1.0)))
    assert np.isnan(score_of_statistics(dict.fromkeys(WEIGHTS, float("nan")), normal))


def test_left_out_scores_leave_out_the_whole_group():
    rng = np.random.default_rng(5)
    table = rng.normal(size=(K, 12))
    groups = (0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7)
    normal = NormalStatistics(groups, dict(zip(WEIGHTS, map(tuple, table.tolist()), strict=True)))
    got = left_out_scores(normal)
    for i, group in enumerate(groups):
        others = table[:, np.array(groups) != group]
        assert got[i] == pytest.approx(combined_score(table[:, [i]], laws_of(others))[0])


@pytest.mark.parametrize("groups", [(0,), (0, 0, 0)])
def test_one_group_or_one_image_can_be_scored(groups):
    values = {name: tuple(float(i) for i in range(len(groups))) for name in WEIGHTS}
    assert np.isfinite(left_out_scores(NormalStatistics(groups, values))).all()


def laws_of(table: np.ndarray) -> list[NormalLaw]:
    return [NormalLaw.of(np.sort(row)) for row in table]


def correlated(rng: np.random.Generator, n: int, law: str) -> np.ndarray:
    """Statistics (K, n) with a correlation of 0.6, each of another scale; "exp" has heavy tails."""
    values = np.sqrt(0.6) * rng.normal(size=n) + np.sqrt(0.4) * rng.normal(size=(K, n))
    values = np.exp(values) if law == "exp" else values
    return values * np.geomspace(1e-3, 1e3, K)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("law", ["normal", "exp"])
@pytest.mark.parametrize(("n", "rate", "repeats"), [(12, 0.1, 120), (50, 0.05, 50), (200, 0.05, 15)])
def test_correlated_statistics_keep_the_false_alarm_rate(n, rate, repeats, law):
    """The mean rate over calibrations is at most the conformal one, and not far below it.

    It is somewhat lower for few images: each normal image is compared with one image less than a new one.
    """
    rng, rates = np.random.default_rng([n, len(law)]), []
    expected = np.floor((n + 1) * rate) / (n + 1)
    for _ in range(repeats):
        table, fresh = correlated(rng, n, law), correlated(rng, 400, law)
        normal = NormalStatistics(tuple(range(n)), dict(zip(WEIGHTS, map(tuple, table.tolist()), strict=True)))
        rank = n + 1 - int(np.floor((n + 1) * rate))
        threshold = np.sort(left_out_scores(normal))[rank - 1]
        rates.append(np.mean(combined_score(fresh, laws_of(table)) > threshold))
    error = np.std(rates) / np.sqrt(repeats)
    assert np.mean(rates) < expected + 4 * error
    assert np.mean(rates) > expected * (0.5 if n < 50 else 0.75) - 4 * error


@pytest.mark.parametrize("images", [1, 3])
def test_images_of_one_patient_do_not_multiply_false_alarms(images):
    """40 normal patients; a fraction 0.5 of the variance is common to the images of a patient."""
    rng, rates, patients, rate = np.random.default_rng(images), [], 40, 0.05
    n = patients * images
    groups = tuple(np.repeat(np.arange(patients), images).tolist())
    for _ in range(40):
        common = np.repeat(rng.normal(size=(K, patients)), images, axis=1)
        table = np.sqrt(0.5) * (common + rng.normal(size=(K, n)))
        fresh = rng.normal(size=(K, 2000))
        normal = NormalStatistics(groups, dict(zip(WEIGHTS, map(tuple, table.tolist()), strict=True)))
        threshold = np.sort(left_out_scores(normal))[n - int(np.floor((n + 1) * rate))]
        rates.append(np.mean(combined_score(fresh, laws_of(table)) > threshold))
    error = np.std(rates) / np.sqrt(len(rates))
    assert 0.5 * rate < np.mean(rates) < 1.25 * rate + 3 * error


def texture(rng: np.random.Generator) -> np.ndarray:
    """A smooth positive map whose level differs between images."""
    field = gaussian_filter(rng.standard_normal((48, 48)), 1.5, mode="wrap")
    return (np.exp(0.1 * rng.normal()) * (field / field.std()) ** 2).astype(np.float32)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    rng, calibrator = np.random.default_rng(6), Calibrator()
    for i in range(40):
        calibrator = calibrator.add(texture(rng), None, None, f"patient {i}", statistics=True)
    return calibrator.finish(0.001, 0.05, "combined")


def sensitivity(calibration: Calibration, statistic: str, images: list[np.ndarray]) -> float:
    one = calibration.by_statistic(statistic)
    assert one.normal_statistics is not None
    found = [image_statistics(image, one.pixel_threshold.value) for image in images]
    scores = [score_of_statistics(f, one.normal_statistics) if statistic == "combined" else f[statistic] for f in found]
    return float(np.mean(np.array(scores) > one.image_threshold.value))


def test_the_score_sees_a_small_bright_spot_and_a_diffuse_change(calibration):
    rng = np.random.default_rng(7)
    spots, diffuse = ([texture(rng) for _ in range(60)] for _ in range(2))
    for image in spots:
        image[20:23, 30:33] += 35
    diffuse = [image + np.float32(0.6) for image in diffuse]
    for single, blind_to in (("mean", spots), ("max", diffuse)):
        assert sensitivity(calibration, single, blind_to) < 0.4
    for images in (spots, diffuse):
        assert sensitivity(calibration, "combined", images) > 0.9


def test_single_statistics_have_the_thresholds_of_a_calibration_by_them(calibration):
    rng, calibrator = np.random.default_rng(6), Calibrator()
    maps = [texture(rng) for _ in range(40)]
    for i, scores in enumerate(maps):
        calibrator = calibrator.add(scores, None, float(scores.mean(dtype=np.float64)), f"patient {i}")
    expected, got = calibrator.finish(0.001, 0.05), calibration.by_statistic("mean")
    assert got.image_threshold.value == pytest.approx(expected.image_threshold.value)
    np.testing.assert_allclose(got.normal_image_scores, expected.normal_image_scores)
    assert got.image_statistic == "mean"
    assert got.pixel_threshold == calibration.pixel_threshold
    assert got.by_statistic("combined").normal_image_scores == calibration.normal_image_scores
    values = image_statistics(maps[0], 0.0)
    assert got.statistic_p_values(values)["mean"] == got.image_p_value(values["mean"])


def test_areas_come_from_the_threshold_of_the_other_groups():
    """One patient with many high pixels raises the pixel threshold of all, but not that of its own images."""
    rng, calibrator = np.random.default_rng(8), Calibrator()
    maps = [rng.exponential(size=(50, 50)).astype(np.float32) * (3 if i < 2 else 1) for i in range(12)]
    groups = [0, 0, *range(1, 11)]
    for scores, group in zip(maps, groups, strict=True):
        calibrator = calibrator.add(scores, None, None, str(group), statistics=True)
    normal = calibrator.finish(0.01, 0.1, "area").normal_statistics
    assert normal is not None
    assert normal.groups == tuple(groups)
    for i, group in enumerate(groups):
        others = np.concatenate([m.ravel() for m, other in zip(maps, groups, strict=True) if other != group])
        exact = np.mean(maps[i] > np.quantile(others, 0.99))
        assert normal.values["area"][i] == pytest.approx(exact, rel=0.05, abs=2 / 2500)


def test_a_calibration_without_statistics_names_the_reason():
    calibration = Calibrator().add(np.ones((4, 4), np.float32), None, 1.0, "a").finish(0.01, 0.05)
    with pytest.raises(InputError, match="image_statistic=mean: calibration.json of this run does not hold"):
        calibration.by_statistic("mean")
    assert calibration.statistic_p_values(dict.fromkeys(STATISTICS, 0.0)) == {}
