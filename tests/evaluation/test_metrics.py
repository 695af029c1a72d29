"""Figures of merit against scikit-learn and slow references on the full arrays."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from references.evaluation import best_dice, dice, group_bootstrap, region_overlap_area
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from pulmo_jax.evaluation.metrics import (
    IMAGE_FIGURES,
    PIXEL_FIGURES,
    PixelMetrics,
    bootstrap_estimate,
    image_metrics,
)

THRESHOLD = 0.8


def phantoms(n: int, seed: int = 0, size: int = 40) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Signed scores and truths with lesions of many sizes; every fourth image has none."""
    rng = np.random.default_rng(seed)
    scores, truths = [], []
    for i in range(n):
        blobs = ndimage.gaussian_filter(rng.standard_normal((size, size)), 2)
        truth = (blobs > 0.22) & (i % 4 != 3)
        score = rng.standard_normal((size, size)) + 1.2 * truth * rng.uniform(0.3, 1.5) + rng.normal(0, 0.3)
        scores.append(score.astype(np.float32))
        truths.append(truth)
    return scores, truths


def measured(scores, truths, groups=None, foreground=None, **keywords) -> PixelMetrics:
    metrics = PixelMetrics.empty(THRESHOLD, **keywords)
    for i, (score, truth) in enumerate(zip(scores, truths, strict=True)):
        metrics = metrics.add(score, truth, foreground, groups[i] if groups else str(i))
    return metrics


@pytest.fixture(scope="module")
def data():
    return phantoms(8)


@pytest.fixture(scope="module")
def flat(data):
    return tuple(np.concatenate([a.ravel() for a in arrays]) for arrays in data)


@pytest.fixture(scope="module")
def estimates(data):
    return measured(*data).estimates()


def test_auroc_and_ap_are_those_of_scikit_learn(flat, estimates):
    scores, truth = flat
    assert estimates["auroc"].value == pytest.approx(roc_auc_score(truth, scores), abs=1e-4)
    assert estimates["ap"].value == pytest.approx(average_precision_score(truth, scores), abs=1e-3)


def test_figures_at_the_threshold_are_those_of_the_mask(flat, estimates):
    scores, truth = flat
    assert estimates["dice"].value == pytest.approx(dice(scores > THRESHOLD, truth), abs=1e-3)
    assert estimates["false_alarm_rate"].value == pytest.approx(np.mean(scores[~truth] > THRESHOLD), abs=1e-3)


def test_best_dice_and_its_threshold(flat, estimates):
    scores, truth = flat
    assert estimates["best_dice"].value == pytest.approx(best_dice(scores, truth), abs=1e-3)
    called = scores > np.float32(estimates["best_dice_threshold"].value)
    assert dice(called, truth) == pytest.approx(estimates["best_dice"].value, abs=1e-3)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_that_of_the_definition(data, limit):
    scores, truths = ([a[:20, :20] for a in arrays[:4]] for arrays in data)
    got = measured(scores, truths, fpr_limit=limit, replicates=2).estimates()["aupro"].value
    assert got == pytest.approx(region_overlap_area(scores, truths, limit), abs=1e-3)


def test_scores_of_few_values_are_exact(flat, data):
    """Ties between the classes and atoms at the threshold, as in an intensity baseline of 8 bits."""
    scores, truths = data
    steps = [(np.round(score * 5) / 5).astype(np.float32) for score in scores]
    figures = measured(steps, truths, replicates=2).estimates()
    pooled, truth = np.concatenate([s.ravel() for s in steps]), flat[1]
    assert figures["auroc"].value == pytest.approx(roc_auc_score(truth, pooled), rel=1e-9)
    assert figures["ap"].value == pytest.approx(average_precision_score(truth, pooled), rel=1e-9)
    assert figures["best_dice"].value == pytest.approx(best_dice(pooled, truth), rel=1e-9)
    called = pooled > np.float32(figures["best_dice_threshold"].value)
    assert dice(called, truth) == pytest.approx(figures["best_dice"].value, rel=1e-9)
    assert figures["dice"].value == pytest.approx(dice(pooled > np.float32(THRESHOLD), truth), rel=1e-9)
    small = [[a[:15, :15] for a in arrays[:3]] for arrays in (steps, truths)]
    got = measured(*small, replicates=2).estimates()["aupro"].value
    assert got == pytest.approx(region_overlap_area(*small, 0.3), rel=1e-9)


def test_order_does_not_matter(data, estimates):
    scores, truths = data
    groups = [str(i) for i in range(8)][::-1]
    reversed_ = measured(scores[::-1], truths[::-1], groups).estimates()
    for name in PIXEL_FIGURES:
        got, expected = (asdict(e[name]) for e in (reversed_, estimates))
        assert got.pop("reason") == expected.pop("reason")
        assert got == pytest.approx(expected, rel=1e-9), name


@pytest.mark.slow
def test_pixel_intervals_agree_with_a_bootstrap_of_groups():
    scores, truths = phantoms(60, seed=1, size=24)
    estimates = measured(scores, truths, groups=[str(i // 2) for i in range(60)], replicates=500).estimates()
    rows = [np.stack([s.ravel(), t.ravel()], axis=1) for s, t in zip(scores, truths, strict=True)]
    by_group = [np.concatenate(rows[i : i + 2]) for i in range(0, 60, 2)]
    statistics = {
        "auroc": lambda r: roc_auc_score(r[:, 1], r[:, 0]),
        "ap": lambda r: average_precision_score(r[:, 1], r[:, 0]),
        "dice": lambda r: dice(r[:, 0] > THRESHOLD, r[:, 1] > 0),
        "false_alarm_rate": lambda r: float(np.mean(r[r[:, 1] == 0, 0] > THRESHOLD)),
    }
    for name, statistic in statistics.items():
        low, high = group_bootstrap(by_group, statistic, 250, np.random.default_rng(2))
        got = estimates[name]
        np.testing.assert_allclose([got.low, got.high], [low, high], atol=0.25 * (high - low), err_msg=name)
    for name in ("aupro", "best_dice", "best_dice_threshold"):
        assert estimates[name].low < estimates[name].value < estimates[name].high


def test_foreground_and_missing_scores_leave_pixels_out(data):
    scores, truths = ([a.copy() for a in arrays[:3]] for arrays in data)
    foreground = np.zeros((40, 40), dtype=bool)
    foreground[5:30, 8:40] = True
    for score in scores:
        score[10:12] = np.nan
    got = measured(scores, truths, foreground=foreground, replicates=2).estimates()
    kept = foreground.copy()
    kept[10:12] = False
    expected = roc_auc_score(np.stack(truths)[:, kept].ravel(), np.stack(scores)[:, kept].ravel())
    assert got["auroc"].value == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def lesions() -> tuple[np.ndarray, np.ndarray]:
    """Areas 4 (found), 6 (missed; in two parts that touch by a corner), 100 (3 % found), 1200 (2/3 found)."""
    truth = np.zeros((100, 100), dtype=bool)
    truth[2:4, 2:4] = truth[10:12, 2:4] = truth[12, 4:6] = truth[20:30, 2:12] = truth[40:70, 40:80] = True
    score = np.full(truth.shape, -1, np.float32)
    score[2:4, 2:4] = score[20, 2:5] = score[40:60, 40:80] = 1
    return score, truth


@pytest.mark.parametrize(("min_overlap", "found"), [(0.0, [1, 1, 1]), (0.03, [1, 0, 1]), (0.7, [1, 0, 0])])
def test_recall_by_size_counts_whole_lesions(lesions, min_overlap, found):
    recall = measured(*([a] for a in lesions), min_overlap=min_overlap).recall_by_size()
    assert [(r.min_area_px, r.max_area_px) for r in recall] == [(0, 100), (100, 1000), (1000, None)]
    assert [r.n_lesions for r in recall] == [2, 1, 1]
    assert [r.n_found for r in recall] == found


def test_a_lesion_outside_the_foreground_is_missed(lesions):
    score, truth = lesions
    foreground = np.ones(truth.shape, dtype=bool)
    foreground[40:70] = False
    recall = measured([score], [truth], foreground=foreground).recall_by_size()
    assert [(r.n_found, r.n_lesions) for r in recall] == [(1, 2), (1, 1), (0, 1)]


def test_recall_has_wilsons_interval():
    metrics = PixelMetrics.empty(0.0, size_edges_px=(10,))
    truth = np.zeros((9, 9), dtype=bool)
    truth[::4, ::4] = True  # nine lesions, seven of them found
    score = np.where(truth, 1, -1).astype(np.float32)
    score[0, 0] = score[8, 8] = -1
    small, large = metrics.add(score, truth, None, "a").recall_by_size()
    p, n, z = 7 / 9, 9, 1.959963985
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert small.recall.value == pytest.approx(p)
    assert [small.recall.low, small.recall.high] == pytest.approx(expected)
    assert (large.recall.value, large.recall.reason) == (None, "there are no lesions of this size")


def test_normal_images_alone_have_only_a_false_alarm_rate(data):
    scores, _ = data
    estimates = measured(scores, [np.zeros((40, 40), dtype=bool)] * 8).estimates()
    assert estimates["false_alarm_rate"].low < estimates["false_alarm_rate"].value
    for name in set(PIXEL_FIGURES) - {"false_alarm_rate"}:
        assert (estimates[name].value, estimates[name].reason) == (None, "there are no abnormal pixels")


def test_lesions_alone_have_no_pixel_figures(data):
    estimates = measured(data[0], [np.ones((40, 40), dtype=bool)] * 8).estimates()
    assert {e.reason for e in estimates.values()} == {"there are no normal pixels"}
    assert {e.value for e in estimates.values()} == {None}


def test_an_empty_foreground_gives_no_figures(data):
    nothing = np.zeros((40, 40), dtype=bool)
    metrics = measured(*data, foreground=nothing)
    assert {e.value for e in metrics.estimates().values()} == {None}
    assert sum(r.n_found for r in metrics.recall_by_size()) == 0 < sum(metrics.n_lesions)


def test_one_group_gives_figures_without_intervals(data, estimates):
    alone = measured(*data, groups=["p"] * 8).estimates()
    for name in PIXEL_FIGURES:
        assert alone[name].value == pytest.approx(estimates[name].value)
        assert (alone[name].low, alone[name].high) == (None, None)
        assert "requires two groups" in alone[name].reason


def test_lesions_in_one_group_give_no_interval_however_many_are_normal(data):
    scores, truths = data
    only_first = [truths[0], *[np.zeros((40, 40), dtype=bool)] * 7]
    estimates = measured(scores, only_first).estimates()
    assert estimates["auroc"].low is None
    assert estimates["auroc"].value is not None
    assert estimates["false_alarm_rate"].low is not None


def test_constant_scores_are_chance(data):
    _, truths = data
    estimates = measured([np.full((40, 40), -0.3, np.float32)] * 8, truths).estimates()
    prevalence = np.mean(truths)
    assert estimates["auroc"].value == pytest.approx(0.5)
    assert estimates["ap"].value == pytest.approx(prevalence)
    assert estimates["aupro"].value == pytest.approx(0.15)
    assert estimates["best_dice"].value == pytest.approx(2 * prevalence / (1 + prevalence))
    assert (estimates["dice"].value, estimates["false_alarm_rate"].value) == (0, 0)


def test_perfect_scores_are_perfect(data):
    _, truths = data
    estimates = measured([np.where(t, 1, -1).astype(np.float32) for t in truths], truths).estimates()
    for name in ("auroc", "ap", "aupro", "dice", "best_dice"):
        assert (estimates[name].low, estimates[name].value, estimates[name].high) == (1, 1, 1)


def images(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    levels = np.repeat(rng.normal(0, 0.5, n // 2), 2)
    return rng.standard_normal(n) + labels + levels, labels, [f"patient {i // 2}" for i in range(n)]


def test_image_figures_are_those_of_the_definitions():
    scores, labels, groups = images(200)
    got = image_metrics(scores, labels, groups, threshold=1.5, replicates=20)
    assert tuple(got) == IMAGE_FIGURES
    at_95 = max(np.mean(scores[labels] >= t) for t in [*scores, np.inf] if np.mean(scores[~labels] < t) >= 0.95 - 1e-12)
    expected = {
        "auroc": roc_auc_score(labels, scores),
        "ap": average_precision_score(labels, scores),
        "sensitivity": np.mean(scores[labels] > 1.5),
        "false_alarm_rate": np.mean(scores[~labels] > 1.5),
        "sensitivity_at_95_specificity": at_95,
    }
    assert {name: estimate.value for name, estimate in got.items()} == pytest.approx(expected)


def test_image_intervals_agree_with_a_bootstrap_of_groups():
    scores, labels, groups = images(120, seed=1)
    got = image_metrics(scores, labels, groups, threshold=0.5)
    by_group = list(np.stack([scores, labels], axis=1).reshape(60, 2, 2))
    statistics = {
        "auroc": lambda r: roc_auc_score(r[:, 1], r[:, 0]),
        "sensitivity": lambda r: float(np.mean(r[r[:, 1] == 1, 0] > 0.5)),
        "false_alarm_rate": lambda r: float(np.mean(r[r[:, 1] == 0, 0] > 0.5)),
    }
    for name, statistic in statistics.items():
        low, high = group_bootstrap(by_group, statistic, 500, np.random.default_rng(3))
        np.testing.assert_allclose([got[name].low, got[name].high], [low, high], atol=0.15 * (high - low), err_msg=name)


def test_replicates_without_both_classes_are_skipped_and_counted():
    """Two groups of either class: a class is left out with probability 1 - (1 - e^-2)^2 = 0.25."""
    scores, labels = np.array([0.0, 1, 2, 3]), np.array([False, True, False, True])
    got = image_metrics(scores, labels, ["a", "b", "c", "d"], threshold=1.5, replicates=400)
    assert got["auroc"].skipped == pytest.approx(400 * 0.252, abs=4 * np.sqrt(400 * 0.252 * 0.748))
    assert got["sensitivity"].skipped == pytest.approx(400 * 0.135, abs=4 * np.sqrt(400 * 0.135 * 0.865))
    assert got["auroc"].low is not None


@pytest.mark.parametrize(
    ("label", "defined", "missing"),
    [(True, "sensitivity", "normal"), (False, "false_alarm_rate", "abnormal")],
)
def test_one_class_of_images_leaves_one_figure(label, defined, missing):
    got = image_metrics(np.array([1.0, 2, 3]), np.full(3, label), ["a", "b", "c"], threshold=1.5)
    assert got.pop(defined).value == pytest.approx(2 / 3)
    assert {(e.value, e.reason) for e in got.values()} == {(None, f"there are no {missing} images")}


def test_one_image_has_figures_without_intervals():
    got = image_metrics(np.array([2.0]), np.array([True]), ["a"], threshold=1.5)
    assert (got["sensitivity"].value, got["sensitivity"].low) == (1, None)


def test_everything_can_be_written_as_strict_json(data, lesions):
    metrics = measured(*([a] for a in lesions))
    content = {
        "pixel": {name: asdict(e) for name, e in metrics.estimates().items()},
        "recall": [asdict(r) for r in metrics.recall_by_size()],
        "image": {
            name: asdict(e)
            for name, e in image_metrics(np.array([2.0]), np.array([True]), ["a"], threshold=1.5).items()
        },
    }
    assert json.loads(json.dumps(content, allow_nan=False)) == content


@pytest.mark.parametrize("seed", range(12))
def test_every_interval_holds_its_value(seed):
    """Of few images and many ties, in figures that are extremes, too."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n := int(rng.integers(4, 30))) % 2 == 0
    scores = (rng.normal(size=n) + rng.choice([0, 1]) * labels).round(int(rng.integers(0, 3)))
    estimates = [*image_metrics(scores, labels, [f"g{i // 2}" for i in range(n)], 0.5, 60, seed).values()]
    few = phantoms(int(rng.integers(4, 7)), seed, size=16)
    estimates += measured(*few, replicates=60, seed=seed).estimates().values()
    held = [e.low <= e.value <= e.high for e in estimates if e.low is not None]
    assert len(held) >= 5
    assert all(held)
    assert all(e.reason for e in estimates if e.low is None)


def test_percentiles_that_miss_the_value_are_no_interval():
    replicates = np.linspace(0.2, 0.4, 100)
    missed = bootstrap_estimate(0.1, replicates, 9, "few")
    assert (missed.value, missed.low, missed.high) == (0.1, None, None)
    assert missed.reason.startswith("no interval: the value lies outside the percentiles")
    assert bootstrap_estimate(0.3, replicates, 9, "few").low == pytest.approx(0.205)
    assert bootstrap_estimate(0.3, replicates, 1, "few").reason == "few"
    third = bootstrap_estimate(1 / 3, np.full(9, 1 / 3 + 1e-16), 9, "few")  # the same but for rounding
    assert third.low <= third.value <= third.high
