"""Thresholds and p-values: coverage by simulation, the formula by brute force, and the file."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from references.evaluation import group_bootstrap

from pulmo_jax.core.histogram import ScoreHistogram
from pulmo_jax.evaluation.calibration import Calibration, Calibrator, read_calibration, write_calibration
from pulmo_jax.types import InputError


def calibrator_of(maps: list[np.ndarray], groups: list[str] | None = None, replicates: int = 200) -> Calibrator:
    calibrator = Calibrator(ScoreHistogram.empty(replicates))
    for i, score in enumerate(maps):
        group = groups[i] if groups else str(i)
        calibrator = calibrator.add(score.astype(np.float32), None, float(score.max()), group)
    return calibrator


@pytest.fixture(scope="module")
def normal_maps() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((60, 50)).astype(np.float32) for _ in range(30)]


@pytest.fixture(scope="module")
def calibration(normal_maps) -> Calibration:
    return calibrator_of(normal_maps).finish(pixel_rate=0.01, image_rate=0.05)


def test_fresh_normal_pixels_exceed_the_threshold_at_the_nominal_rate(calibration):
    fresh = np.random.default_rng(2).standard_normal(300_000).astype(np.float32)
    # The standard error has two parts: of 300,000 fresh pixels and of the 90,000 that set the threshold.
    error = np.sqrt(0.01 * 0.99 * (1 / 300_000 + 1 / 90_000))
    assert np.mean(fresh > calibration.pixel_threshold.value) == pytest.approx(0.01, abs=4 * error)


def test_p_values_of_fresh_normal_pixels_are_uniform(calibration):
    p = calibration.pixel_p_value(np.random.default_rng(3).standard_normal(300_000).astype(np.float32))
    for level in (0.001, 0.01, 0.1, 0.5, 0.9):
        error = np.sqrt(level * (1 - level) * (1 / 300_000 + 1 / 90_000))
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * error)


def test_pixel_p_value_is_the_formula_to_3_percent_or_one_pixel(calibration, normal_maps):
    null = np.sort(np.concatenate([m.ravel() for m in normal_maps]))
    scores = np.float32([*np.linspace(-5, 5, 500), null[0], null[-1], null[-2], null[-40]])
    exact = (1 + null.size - np.searchsorted(null, scores)) / (1 + null.size)
    p = calibration.pixel_p_value(scores)
    np.testing.assert_allclose(p, exact, rtol=0.03, atol=1 / null.size)
    assert (np.diff(p[:500]) <= 0).all()
    assert len(calibration.normal_pixel_scores) <= 1001
    beyond = calibration.pixel_p_value(np.float32([null[-1], null[-1] + 1e-3, 1e9, null[0], -1e9]))
    np.testing.assert_allclose(beyond * (1 + null.size), [2, 1, 1, 1 + null.size, 1 + null.size], rtol=1e-5)


def test_pixel_p_value_of_few_distinct_scores_is_exact():
    null = np.random.default_rng(4).integers(-100, 100, (50, 80))
    p = calibrator_of([null]).finish(0.01, 0.5).pixel_p_value(np.arange(-101, 102, dtype=np.float32))
    exact = [(1 + np.sum(null >= v)) / (1 + null.size) for v in range(-101, 102)]
    np.testing.assert_allclose(p, exact, rtol=1e-6)


def test_pixel_p_value_keeps_shape_and_missing_scores(calibration):
    p = calibration.pixel_p_value(np.float32([[0, np.nan, 1], [np.inf, -np.inf, 2]]))
    assert p.shape == (2, 3)
    assert p.dtype == np.float32
    assert np.argwhere(np.isnan(p)).tolist() == [[0, 1]]
    assert p[1, 1] == 1


def test_image_and_peak_p_values_count_normal_images(calibration, normal_maps):
    peaks = np.array([m.max() for m in normal_maps])
    for score in (-9.0, float(np.median(peaks)), float(peaks.min()), float(peaks.max()), 99.0):
        exact = (1 + np.sum(peaks >= score)) / 31
        assert calibration.peak_p_value(score) == calibration.image_p_value(score) == pytest.approx(exact)


def test_image_threshold_has_the_conformal_coverage():
    """With 39 uniform scores and a rate of 0.1 the threshold's false-alarm rate is 4/40 on average."""
    rng = np.random.default_rng(5)
    rates = []
    for _ in range(80):
        maps = [np.full((1, 1), value) for value in rng.random(39)]
        threshold = calibrator_of(maps, replicates=1).finish(0.1, 0.1).image_threshold
        assert threshold.attainable_rate == pytest.approx(0.1)
        rates.append(1 - threshold.value)
    assert np.mean(rates) == pytest.approx(0.1, abs=4 * np.std(rates) / np.sqrt(80))


@pytest.mark.parametrize(
    ("n", "rate", "rank", "attainable"),
    [(19, 0.05, 19, 1 / 20), (99, 0.01, 99, 1 / 100), (100, 0.05, 96, 5 / 101), (99, 0.29, 71, 0.29)],
)
def test_image_threshold_is_the_conformal_order_statistic(n, rate, rank, attainable):
    maps = [np.full((1, 1), value) for value in np.random.default_rng(6).permutation(np.arange(1, n + 1))]
    threshold = calibrator_of(maps).finish(0.5, rate).image_threshold
    assert threshold.value == rank
    assert threshold.attainable_rate == pytest.approx(attainable)
    assert threshold.attainable_rate <= rate + 1e-12
    assert (threshold.n_scores, threshold.n_groups, threshold.warning) == (n, n, "")


def test_a_rate_that_too_few_images_cannot_certify_is_said():
    maps = [np.full((1, 1), value) for value in (3.0, 8.0, 1.0)]
    threshold = calibrator_of(maps).finish(0.5, 0.01).image_threshold
    assert threshold.value == 8
    assert (threshold.false_alarm_rate, threshold.attainable_rate) == (0.01, 0.25)
    assert "0.01 per image cannot be guaranteed with 3 normal images" in threshold.warning


def test_intervals_agree_with_a_bootstrap_of_groups():
    """25 patients of four images that share the patient's level."""
    rng = np.random.default_rng(7)
    levels = np.repeat(rng.normal(0, 1, 25), 4)
    maps = [level + rng.standard_normal((10, 10)) for level in levels]
    groups = [f"patient {i // 4}" for i in range(100)]
    calibration = calibrator_of(maps, groups, replicates=2000).finish(0.05, 0.2)

    pixels = [np.stack(maps[i : i + 4]).ravel() for i in range(0, 100, 4)]
    low, high = group_bootstrap(pixels, lambda s: float(np.quantile(s, 0.95)), 2000, rng)
    got = calibration.pixel_threshold
    np.testing.assert_allclose([got.low, got.high], [low, high], atol=0.15 * (high - low))

    peaks = [np.array([m.max() for m in maps[i : i + 4]]) for i in range(0, 100, 4)]
    low, high = group_bootstrap(peaks, lambda s: float(np.sort(s)[int(np.ceil(101 * 0.8)) - 1]), 2000, rng)
    got = calibration.image_threshold
    np.testing.assert_allclose([got.low, got.high], [low, high], atol=0.15 * (high - low))
    assert (got.n_scores, got.n_groups) == (100, 25)


def test_one_group_gives_thresholds_without_intervals(normal_maps):
    calibration = calibrator_of(normal_maps, groups=["p"] * 30).finish(0.01, 0.05)
    for threshold in (calibration.pixel_threshold, calibration.image_threshold):
        assert (threshold.low, threshold.high, threshold.n_groups) == (None, None, 1)


def test_one_constant_image_has_no_false_alarm():
    score = np.full((8, 8), 0.3, np.float32)
    calibration = calibrator_of([score]).finish(0.01, 0.05)
    assert calibration.pixel_threshold.value == np.float32(0.3)
    assert not (score > calibration.pixel_threshold.value).any()
    assert calibration.pixel_p_value(score).min() == 1


def test_only_scored_pixels_of_the_foreground_count():
    score = np.arange(100, dtype=np.float32).reshape(10, 10)
    score[0, 0] = np.nan
    foreground = score < 50  # leaves out the NaN too
    calibration = Calibrator().add(score, foreground, 0.0, "a").finish(0.01, 0.5)
    assert calibration.pixel_threshold.n_scores == 49
    assert calibration.normal_image_peaks == (49.0,)
    assert Calibrator().add(score, None, 0.0, "a").pixels.n == 99


def test_images_without_foreground_are_counted_and_not_enough():
    score, nothing = np.ones((4, 4), np.float32), np.zeros((4, 4), dtype=bool)
    calibrator = Calibrator().add(score, nothing, 0.0, "a")
    with pytest.raises(InputError, match="none of the 1 normal validation images"):
        calibrator.finish(0.01, 0.05)
    calibration = calibrator.add(score, None, 1.0, "b").finish(0.01, 0.05)
    assert calibration.n_images_without_foreground == 1
    assert calibration.image_threshold.n_scores == 1


def test_the_file_gives_back_the_very_same_calibration(tmp_path, calibration):
    path = tmp_path / "calibration.json"
    write_calibration(path, calibration)
    assert read_calibration(path) == calibration
    assert Calibration.from_json(calibration.to_json(), path) == calibration
    content = json.loads(path.read_text())
    assert content["pixel_threshold"]["false_alarm_rate"] == 0.01
    assert content["image_threshold"]["n_groups"] == 30


def broken(calibration: Calibration, **changes) -> str:
    return json.dumps(dataclasses.asdict(calibration) | changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixel_threshold": None}, "pixel_threshold: Input should be"),
        ({"normal_image_scores": []}, "normal_image_scores"),
        ({"normal_image_scores": [2.0, 1.0]}, "out of order"),
        ({"normal_image_peaks": [float("nan")]}, "NaN is not a number in JSON"),
        ({"normal_pixel_scores": [[1.0, 5], [2.0, 6]]}, "out of order"),
        ({"normal_pixel_scores": [[1.0, "many"]]}, "normal_pixel_scores"),
    ],
)
def test_bad_content_is_refused_by_the_name_of_the_file(tmp_path, calibration, change, said):
    path = tmp_path / "calibration.json"
    path.write_text(broken(calibration, **change))
    with pytest.raises(InputError, match=said) as error:
        read_calibration(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff"])
def test_what_is_no_json_is_refused_by_the_name_of_the_file(tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_calibration(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"no-such-run.calibration\.json cannot be read"):
        read_calibration(Path("no-such-run/calibration.json"))
