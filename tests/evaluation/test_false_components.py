"""Lesions and false components, with second opinions: loops, and simulation of the conformal guarantee."""

import numpy as np
import pytest
from scipy.stats import poisson

from pulmo_jax.core.histogram import group_weights
from pulmo_jax.evaluation.false_components import (
    conformal_threshold,
    expected_false,
    false_peaks,
    lesions_by_size,
)
from pulmo_jax.evaluation.segmentation_metrics import ImageScores

REPLICATES = 200


def images(seed, n=10):
    """Scores of n images with random lesions and false components."""
    rng = np.random.default_rng(seed)

    def components():
        count = rng.integers(0, 6)
        return np.stack([rng.integers(1, 300, count), rng.random(count)], axis=1)

    def one():
        lesions = components()
        lesions[::2, 1] = 0  # not found at any threshold
        return ImageScores(np.ones((1, 4)), np.ones((1, 3)), np.ones((1, 3, 2)), (lesions,), (components(),))

    return [one() for _ in range(n)], [f"patient {i // 2}" for i in range(n)]


def test_lesions_by_size_equal_loops():
    scores, groups = images(0)
    rows = lesions_by_size(scores, 0, groups, (50, 200), REPLICATES, 3, limit=0.4)
    assert [(r.min_area_px, r.max_area_px) for r in rows] == [(0, 50), (50, 200), (200, None)]
    weights = np.stack([group_weights(g, REPLICATES, 3) for g in groups], axis=1)
    for row in rows:
        high = row.max_area_px or np.inf
        lesions, found, false = np.zeros((3, len(scores)))
        for i, s in enumerate(scores):
            for area, peak in s.lesions[0]:
                lesions[i] += row.min_area_px <= area < high
                found[i] += row.min_area_px <= area < high and peak >= 0.4
            for area, peak in s.false[0]:
                false[i] += row.min_area_px <= area < high and peak >= 0.4
        assert (row.n_lesions, row.n_found, row.n_false) == (lesions.sum(), found.sum(), false.sum())
        assert row.recall.value == pytest.approx(found.sum() / lesions.sum())
        assert row.false_per_image.value == pytest.approx(false.mean())
        recall = [w @ found / (w @ lesions) for w in weights if w @ lesions > 0]
        assert [row.recall.low, row.recall.high] == pytest.approx(np.percentile(recall, [2.5, 97.5]))
        per_image = [w @ false / w.sum() for w in weights if w.sum() > 0]
        assert [row.false_per_image.low, row.false_per_image.high] == pytest.approx(
            np.percentile(per_image, [2.5, 97.5])
        )


def test_no_lesions_of_a_size():
    scores, groups = images(0)
    row = lesions_by_size(scores, 0, groups, (1000,), REPLICATES, 0)[1]
    assert (row.n_lesions, row.recall.value) == (0, None)
    assert row.false_per_image.value == 0


def test_the_expected_number_falls_with_the_threshold():
    scores, groups = images(1, 40)
    peaks = false_peaks(scores, [0])
    values = [expected_false(peaks, groups, t, REPLICATES, 0) for t in (0.0, 0.3, 0.6, 1.1)]
    assert values[0].value == np.mean([len(s.false[0]) for s in scores])
    assert values[1].value == np.mean([(s.false[0][:, 1] >= 0.3).sum() for s in scores])
    assert sorted((e.value for e in values), reverse=True) == [e.value for e in values]
    assert values[3].value == 0
    assert values[1].low < values[1].value < values[1].high


def test_classes_share_a_threshold():
    scores, _ = images(1, 3)
    twice = [ImageScores(s.counts, s.surface, s.histogram, s.lesions * 2, s.false * 2) for s in scores]
    assert [len(p) for p in false_peaks(twice, [0, 1])] == [2 * len(s.false[0]) for s in scores]


def smallest_threshold(peaks, groups, limit, bound):
    """By its definition: the inequality at every candidate, from below."""
    names = sorted(set(groups))
    n = len(names)
    for t in sorted({0.0, *(np.nextafter(p, 2) for of_image in peaks for p in of_image)}):
        losses = []
        for name in names:
            own = [p for p, g in zip(peaks, groups, strict=True) if g == name]
            losses.append(np.mean([min((p >= t).sum(), bound) for p in own]))
        if n / (n + 1) * np.mean(losses) + bound / (n + 1) <= limit:
            return t
    return np.inf


@pytest.mark.parametrize("limit", [0.2, 0.5, 1.0, 2.5, 10.0])
def test_the_conformal_threshold_is_the_smallest_that_satisfies_the_inequality(limit):
    scores, groups = images(2, 30)
    peaks = false_peaks(scores, [0])
    found = conformal_threshold(peaks, groups, limit, 4, REPLICATES, 0)
    assert found.threshold == smallest_threshold(peaks, groups, limit, 4)
    assert found.n_groups == 15
    if np.isfinite(found.threshold):
        assert found.expected == expected_false(peaks, groups, found.threshold, REPLICATES, 0)
        assert found.reason == ""
    else:
        assert "needs at least 19" in found.reason  # 4 / (19 + 1) = 0.2


def draw(rng, n):
    """False components of n patients with a rate of their own, and one or two images each."""
    peaks, groups = [], []
    for patient in range(n):
        rate = rng.gamma(1.0, 2.0)
        for _ in range(rng.integers(1, 3)):
            peaks.append(rng.beta(2, 2, min(rng.poisson(rate), 40)))
            groups.append(str(patient))
    return peaks, groups


def true_risks(thresholds, bound):
    """Expected loss of a new patient at each threshold, from many patients."""
    peaks, groups = draw(np.random.default_rng(10**6), 10000)
    counts = np.array([[min((p >= t).sum(), bound) for t in thresholds] for p in peaks], float)
    member = np.unique(groups, return_inverse=True)[1]
    return np.mean([np.bincount(member, c) / np.bincount(member) for c in counts.T], axis=1)


def test_the_expected_number_of_false_components_stays_below_the_limit():
    """Over calibration sets and new patients; the same rule without its correction exceeds the limit."""
    limit, bound, n = 0.6, 5, 12
    grid = np.linspace(0, 1, 21)
    risk = true_risks(grid, bound)
    controlled, uncorrected = [], []
    rng = np.random.default_rng(0)
    for _ in range(300):
        peaks, groups = draw(rng, n)
        found = conformal_threshold(peaks, groups, limit, bound, 2, 0)
        controlled.append(np.interp(min(found.threshold, 1), grid, risk))
        plain = conformal_threshold(peaks, groups, (n * limit + bound) / (n + 1), bound, 2, 0)  # R(t) <= limit
        uncorrected.append(np.interp(min(plain.threshold, 1), grid, risk))
    standard_error = np.std(controlled) / np.sqrt(300)
    assert np.mean(controlled) <= limit + 2 * standard_error
    assert np.mean(controlled) >= limit - 2 * bound / (n + 1)  # the bound of Angelopoulos et al., Theorem 2
    assert np.mean(uncorrected) > np.mean(controlled) + 5 * standard_error
    assert np.mean(uncorrected) > limit


def test_too_few_groups_cannot_guarantee_the_limit():
    found = conformal_threshold([np.array([0.9])] * 4, ["a", "b", "c", "d"], 0.5, 5, REPLICATES, 0)
    assert found.threshold == np.inf
    assert "4 calibration groups" in found.reason
    assert "at least 9" in found.reason
    enough = [np.array([])] * 9
    assert conformal_threshold(enough, [str(i) for i in range(9)], 0.5, 5, REPLICATES, 0).threshold == 0


def test_the_bootstrap_interval_holds_a_poisson_rate():
    rng = np.random.default_rng(0)
    held = []
    for seed in range(200):
        peaks = [np.full(poisson.rvs(1.5, random_state=rng), 0.9) for _ in range(40)]
        estimate = expected_false(peaks, [str(i) for i in range(40)], 0.5, REPLICATES, seed)
        held.append(estimate.low <= 1.5 <= estimate.high)
    assert 0.88 <= np.mean(held) <= 0.99
