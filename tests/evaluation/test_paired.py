"""Paired comparison, with second opinions: scikit-learn, double loops, exact enumeration, simulation."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from pulmo_jax.core.histogram import group_weights
from pulmo_jax.evaluation import paired
from pulmo_jax.evaluation.paired import (
    Scored,
    auroc_p_value,
    clustered_variance,
    difference,
    error_p_value,
    estimate,
    fewest_groups,
    placements,
    resampled,
)


def images(seed=0, n=40, per_group=1, ties=False):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.4
    positive[:2] = True, False
    scores = rng.normal(size=(2, n)) + positive
    groups = [f"g{i // per_group}" for i in range(n)]
    return np.round(scores, 1) if ties else scores, positive, groups


def ranked(scores, positive):
    def figures(weights):
        return {
            "auroc": np.array([
                roc_auc_score(positive, scores, sample_weight=w) if len(set(positive[w > 0])) == 2 else np.nan
                for w in weights
            ])
        }  # fmt: skip

    return Scored(figures, scores=scores[None], positive=positive)


def delong(a, b, positive):
    """By its definition: a double loop over pairs of images, and covariances of NumPy."""

    def kernel(x, y):
        return 1.0 if x > y else 0.5 if x == y else 0.0

    def parts(s):
        table = np.array([[kernel(x, y) for y in s[~positive]] for x in s[positive]])
        return table.mean(1), table.mean(0)

    (a10, a01), (b10, b01) = parts(a), parts(b)
    s10, s01 = np.cov(a10, b10), np.cov(a01, b01)
    covariance = s10 / a10.size + s01 / a01.size
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    return a10.mean() - b10.mean(), variance


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_test_of_single_images_is_that_of_delong(seed, ties):
    (a, b), positive, groups = images(seed, ties=ties)
    delta, variance = delong(a, b, positive)
    expected = 2 * norm.sf(abs(delta) / np.sqrt(variance))
    assert auroc_p_value(ranked(a, positive), ranked(b, positive), groups) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_placements_average_to_the_auroc_in_both_classes(ties):
    (a, b), positive, _ = images(ties=ties)
    for scores in (a, b):
        found = placements(scores[None], positive)
        assert found[positive].mean() == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
        assert found[~positive].mean() == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    both = placements(np.stack([a, b]), positive)
    assert both[positive].mean() == pytest.approx(
        (roc_auc_score(positive, a) + roc_auc_score(positive, b)) / 2, abs=1e-12
    )


def test_the_clustered_variance_is_that_of_the_formula():
    """Equations 3 to 5 of Obuchowski (1997), with loops over clusters."""
    (a, _), positive, groups = images(3, n=60, per_group=3)
    names = np.array(groups)
    v, auc = placements(a[None], positive), roc_auc_score(positive, a)
    m, n = positive.sum(), (~positive).sum()
    clusters = sorted(set(groups))
    i10 = sum(positive[names == c].any() for c in clusters)
    i01 = sum((~positive[names == c]).any() for c in clusters)
    s10 = s01 = s11 = 0.0
    for c in clusters:
        x, y = v[(names == c) & positive], v[(names == c) & ~positive]
        s10 += (x.sum() - x.size * auc) ** 2
        s01 += (y.sum() - y.size * auc) ** 2
        s11 += (x.sum() - x.size * auc) * (y.sum() - y.size * auc)
    s10 *= i10 / ((i10 - 1) * m)
    s01 *= i01 / ((i01 - 1) * n)
    s11 *= len(clusters) / (len(clusters) - 1)
    expected = s10 / m + s01 / n + 2 * s11 / (m * n)
    assert clustered_variance(v - auc, positive, names) == pytest.approx(expected, rel=1e-12)


def test_p_values_of_equal_methods_are_uniform_with_correlated_images():
    """The three images of a patient share an effect; a test for independent images would reject too often."""
    rng, p = np.random.default_rng(7), []
    for _ in range(400):
        patients, per = 40, 3
        effect = np.repeat(rng.normal(size=(2, patients)), per, axis=1)
        positive = np.repeat(rng.random(patients) < 0.5, per)
        scores = effect + 0.3 * rng.normal(size=effect.shape) + positive
        groups = [str(i // per) for i in range(patients * per)]
        p.append(auroc_p_value(ranked(scores[0], positive), ranked(scores[1], positive), groups))
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09
    assert 0.4 < np.mean(np.array(p) < 0.5) < 0.6


def test_differences_are_those_of_the_same_resampled_groups():
    (a, b), positive, groups = images(1, n=30, per_group=2)
    values = [resampled(ranked(s, positive), groups, 50, 3)["auroc"] for s in (a, b)]
    weights = np.stack([group_weights(group, 50, 3) for group in groups], axis=1)
    expected = [
        roc_auc_score(positive, a, sample_weight=w) - roc_auc_score(positive, b, sample_weight=w) for w in weights
    ]
    found = difference(*values, fewest_groups(positive.astype(str).tolist(), groups))
    assert found.value == pytest.approx(roc_auc_score(positive, a) - roc_auc_score(positive, b), abs=1e-12)
    np.testing.assert_allclose([found.low, found.high], np.percentile(expected, [2.5, 97.5]), atol=1e-12)


def test_a_method_is_equal_to_itself_and_swapping_changes_the_sign():
    (a, b), positive, groups = images(2)
    one, other = ranked(a, positive), ranked(b, positive)
    x, y = (resampled(s, groups, 100, 0)["auroc"] for s in (one, other))
    same = difference(x, x, 10)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert auroc_p_value(one, one, groups) == 1.0
    forth, back = difference(x, y, 10), difference(y, x, 10)
    assert forth.value == -back.value
    np.testing.assert_allclose([forth.low, forth.high], [-back.high, -back.low], atol=1e-15)
    assert auroc_p_value(one, other, groups) == auroc_p_value(other, one, groups)
    errors = np.abs(a)
    assert error_p_value(errors, errors, groups, 0) == 1.0
    assert error_p_value(errors, np.abs(b), groups, 0) == error_p_value(np.abs(b), errors, groups, 0)


def test_the_sign_flips_agree_with_all_sign_flips():
    rng = np.random.default_rng(4)
    a, b, groups = rng.normal(size=16) + 0.5, rng.normal(size=16), [f"{i // 2}" for i in range(16)]
    sums = (a - b).reshape(8, 2).sum(1)
    every = np.array([np.dot(signs, sums) for signs in itertools.product([-1, 1], repeat=8)])
    exact = np.mean(np.abs(every) >= abs(sums.sum()) - 1e-12)
    assert error_p_value(a, b, groups, 0) == pytest.approx(exact, abs=0.015)


def test_what_cannot_be_computed_is_said():
    (a, b), positive, groups = images()
    assert auroc_p_value(Scored(dict), ranked(b, positive), groups) is None
    assert auroc_p_value(ranked(a, positive), ranked(b, positive), ["one"] * 40) is None
    missing = replace(ranked(a, positive), scores=np.where(np.arange(40) == 3, np.nan, a)[None])
    assert auroc_p_value(missing, ranked(b, positive), groups) is None
    perfect, constant = ranked(1.0 * positive, positive), ranked(np.full(40, 0.4), positive)
    assert auroc_p_value(perfect, constant, groups) is None
    assert auroc_p_value(constant, perfect, groups) is None
    assert auroc_p_value(constant, constant, groups) is None
    assert error_p_value(a, b, ["one"] * 40, 0) is None
    assert error_p_value(a * np.nan, b, groups, 0) is None
    assert estimate(np.array([np.nan, 1.0]), 5).reason == "undefined for these images"
    assert estimate(np.array([1.0, 1.0, 2.0]), 1).reason.startswith("no interval")
    assert "different numbers of replicates" in difference(np.zeros(3), np.zeros(5), 5).reason


def test_figures_that_were_drawn_elsewhere_are_taken_over():
    (a, _), positive, groups = images()
    scored = replace(ranked(a, positive), drawn={"pixel_auroc": np.arange(11.0)})
    found = resampled(scored, groups, 10, 0)
    np.testing.assert_array_equal(found["pixel_auroc"], np.arange(11.0))
    assert found["auroc"].shape == (11,)


def test_weights_in_blocks_are_those_at_once(monkeypatch):
    (a, _), positive, groups = images(per_group=3)
    whole = resampled(ranked(a, positive), groups, 20, 0)["auroc"]
    monkeypatch.setattr(paired, "BLOCK", 130)
    np.testing.assert_array_equal(resampled(ranked(a, positive), groups, 20, 0)["auroc"], whole)
