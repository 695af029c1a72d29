"""Figures and calibration of class probabilities against scikit-learn, loops and simulations with a known answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import norm
from sklearn import metrics as sk

from pulmo_jax.core.histogram import group_weights
from pulmo_jax.evaluation.class_calibration import (
    Scaling,
    calibration_gaps,
    expected_calibration_error,
    fit_scaling,
    reliability,
)
from pulmo_jax.evaluation.class_metrics import FIGURES, class_figures, confusion, figure_difference

N, REPLICATES = 60, 40


def simulated(n=N, k=2, repeats=3, seed=0, separation=1.0, ties=False):
    """Probabilities that know something of the labels, a little different in each repeat; every class has images."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    logits = separation * np.eye(k)[labels] + rng.normal(size=(n, k)) + 0.5 * rng.normal(size=(repeats, n, k))
    return softmax(np.round(logits) if ties else logits, axis=-1), labels


def images(n=N):
    return [f"image {i}" for i in range(n)]


def figures(probabilities, labels, groups=None, positive=None, replicates=REPLICATES, seed=0):
    return class_figures(probabilities, labels, groups or images(labels.size), positive, replicates, seed)


def slow_calibration_error(p, labels, weight, bins=10):
    gap = 0.0
    for m in range(bins):
        inside = [i for i in range(len(p)) if m / bins < max(p[i]) <= (m + 1) / bins]
        mass = sum(weight[i] for i in inside)
        if mass:
            accuracy = sum(weight[i] * (np.argmax(p[i]) == labels[i]) for i in inside) / mass
            confidence = sum(weight[i] * max(p[i]) for i in inside) / mass
            gap += mass / sum(weight) * abs(accuracy - confidence)
    return gap


def reference(p, labels, weight, positive):
    """The figures of one repeat as scikit-learn has them."""
    called = p.argmax(1)
    classes = range(p.shape[1]) if positive is None else [positive]
    against_rest = lambda figure: np.mean([figure(labels == k, p[:, k], sample_weight=weight) for k in classes])  # noqa: E731
    recall = lambda of: np.mean([sk.recall_score(of(labels, k), of(called, k), sample_weight=weight) for k in classes])  # noqa: E731
    return {
        "accuracy": sk.accuracy_score(labels, called, sample_weight=weight),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, called, sample_weight=weight),
        "auroc": against_rest(sk.roc_auc_score),
        "ap": against_rest(sk.average_precision_score),
        "sensitivity": recall(np.equal),
        "specificity": recall(np.not_equal),
        "ece": slow_calibration_error(p, labels, weight),
        "log_loss": sk.log_loss(labels, p, sample_weight=weight),
    }


@pytest.mark.parametrize(("k", "positive", "ties"), [(2, 1, False), (2, 0, True), (3, None, True)])
def test_figures_and_their_bootstrap_are_those_of_scikit_learn(k, positive, ties):
    probabilities, labels = simulated(k=k, repeats=2, ties=ties)
    groups = [f"patient {i // 2}" for i in range(N)]
    estimates = figures(probabilities, labels, groups, positive, replicates=20)
    assert tuple(estimates) == FIGURES
    weights = [np.ones(N), *np.stack([group_weights(group, 20, 0) for group in groups], axis=1).astype(float)]
    rows = [[reference(p, labels, weight, positive) for p in probabilities] for weight in weights]
    for name in FIGURES:
        main, *others = [np.mean([repeat[name] for repeat in row]) for row in rows]
        estimate = estimates[name]
        assert estimate.value == pytest.approx(main, rel=1e-9)
        limits = np.percentile(others, [2.5, 97.5])
        if name == "ece":
            apart = [np.mean([slow_deviation(p, labels, weight) for p in probabilities]) for weight in weights[1:]]
            limits = np.clip(main + np.array([-1, 1]) * np.percentile(apart, 95), 0, 1)
        assert [estimate.low, estimate.high] == pytest.approx(limits, rel=1e-9)
        assert (estimate.reason, estimate.skipped) == ("", 0)


def slow_deviation(p, labels, weight, bins=10):
    """Summed absolute change of the weighted mean gap of each bin."""
    total = 0.0
    for b in range(bins):
        change = 0.0
        for row, label, w in zip(p, labels, weight, strict=True):
            sure = row.max()
            if b / bins < sure <= (b + 1) / bins or (b == 0 and sure == 0):
                change += (float(row.argmax() == label) - sure) * (w / weight.sum() - 1 / len(labels))
        total += abs(change)
    return total


def test_the_interval_of_the_majority_class_holds_its_calibration_error():
    """Its gap is nearly zero, and that of every replicate larger."""
    labels = (np.arange(160) % 8 < 5).astype(int)
    share = np.tile([0.37501, 0.62499], (160, 1))
    (error,) = (figures(share[None], labels, images(160), positive=1)["ece"],)
    assert error.value == pytest.approx(1e-5)
    assert error.low == 0
    assert 0.05 < error.high < 0.12  # two standard deviations of a share of 160 images are 0.077


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_interval_of_the_calibration_error_covers_the_true_one(temperature):
    """Of a model whose probabilities are right, and of one that is too sure of itself, in 100 sets of 120 images."""
    rng = np.random.default_rng(5)
    wide = rng.normal(size=200_000) * 2
    truth, at = calibration_of(wide, temperature), []
    for seed in range(100):
        rng = np.random.default_rng([6, seed])
        z = rng.normal(size=120) * 2
        labels = (rng.random(120) < 1 / (1 + np.exp(-z))).astype(int)
        said = 1 / (1 + np.exp(-z / temperature))
        error = figures(np.stack([1 - said, said], -1)[None], labels, images(120), 1, replicates=200)["ece"]
        at.append((error.low <= truth <= error.high, error.high - error.low))
    covered, width = np.mean(at, axis=0)
    assert covered > 0.9  # 0.93 and 1.00
    assert width < 0.35


def calibration_of(z, temperature):
    """Calibration error in the limit of many images."""
    right, said = 1 / (1 + np.exp(-np.abs(z))), 1 / (1 + np.exp(-np.abs(z) / temperature))
    part = np.ceil(said * 10)
    return sum(abs((right - said)[part == b].sum()) for b in np.unique(part)) / z.size


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(6, 50),
    k=st.integers(2, 4),
    sharpness=st.sampled_from([1e-3, 0.5, 4.0]),
    copies=st.integers(1, 4),
)
def test_every_interval_holds_its_value(seed, n, k, sharpness, copies):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    p = softmax(sharpness * rng.normal(size=(2, n, k)) + rng.choice([0, 2]) * np.eye(k)[labels], axis=-1)
    groups = [f"g{i // copies}" for i in range(n)]
    positive = 1 if k == 2 else None
    estimates = [*figures(p, labels, groups, positive, replicates=60, seed=seed).values()]
    estimates += [figure_difference(p[:1], p[1:], labels, groups, positive, 60, seed, name) for name in FIGURES]
    for estimate in estimates:
        if estimate.low is None:
            assert estimate.reason.startswith(("no interval: ", "there are no images of class"))
        else:
            assert estimate.low <= estimate.value <= estimate.high


def test_a_figure_is_the_mean_of_the_repeats():
    probabilities, labels = simulated()
    together = figures(probabilities, labels, positive=1)
    for name in FIGURES:
        alone = [figures(repeat[None], labels, positive=1)[name].value for repeat in probabilities]
        assert together[name].value == pytest.approx(np.mean(alone))
    twice = figures(np.concatenate([probabilities] * 2), labels, positive=1)
    assert [twice[name].low for name in FIGURES] == pytest.approx([together[name].low for name in FIGURES])


def test_images_without_a_prediction_are_left_out_of_their_repeat():
    probabilities, labels = simulated(k=3)
    gone = np.random.default_rng(1).random(probabilities.shape[:2]) < 0.3
    partial = np.where(gone[..., None], np.nan, probabilities)
    got = figures(partial, labels)
    for name in FIGURES:
        kept = [figures(p[None, ~out], labels[~out])[name].value for p, out in zip(probabilities, gone, strict=True)]
        assert got[name].value == pytest.approx(np.mean(kept))
    counts = [confusion(p[None, ~out], labels[~out]) for p, out in zip(probabilities, gone, strict=True)]
    np.testing.assert_allclose(confusion(partial, labels), np.mean(counts, axis=0))
    rows = np.concatenate([p[~out] for p, out in zip(probabilities, gone, strict=True)])
    truth = np.concatenate([labels[~out] for out in gone])
    pooled = partial.reshape(-1, 3), np.tile(labels, 3)
    assert expected_calibration_error(*pooled) == pytest.approx(expected_calibration_error(rows, truth))
    np.testing.assert_array_equal(reliability(*pooled), reliability(rows, truth))


def test_float32_probabilities_give_the_same_figures():
    probabilities, labels = simulated()
    got, expected = (figures(p, labels, positive=1) for p in (probabilities.astype(np.float32), probabilities))
    for name in FIGURES:
        assert got[name].value == pytest.approx(expected[name].value, rel=1e-5)


def test_copies_of_an_image_in_one_group_are_no_new_evidence():
    probabilities, labels = simulated()
    once = figures(probabilities, labels, positive=1, replicates=400)
    copied, truth = np.repeat(probabilities, 4, axis=1), np.repeat(labels, 4)
    grouped = figures(copied, truth, [name for name in images() for _ in range(4)], positive=1, replicates=400)
    by_image = figures(copied, truth, positive=1, replicates=400)
    for name in FIGURES:
        assert [grouped[name].value, grouped[name].low, grouped[name].high] == pytest.approx(
            [once[name].value, once[name].low, once[name].high]
        )
        assert by_image[name].value == pytest.approx(once[name].value)
        width = [estimate[name].high - estimate[name].value for estimate in (grouped, by_image)]
        assert 1.5 < width[0] / width[1] < 2.7  # sqrt(4)


def test_a_missing_class_leaves_its_figures_undefined():
    probabilities, labels = simulated()
    normal = figures(probabilities, np.zeros_like(labels), positive=1)
    assert {name for name in FIGURES if normal[name].value is None} == {
        "balanced_accuracy",
        "auroc",
        "ap",
        "sensitivity",
    }
    assert normal["auroc"].reason == "there are no images of class 1 with a prediction in every repeat"
    assert normal["specificity"].low is not None
    in_one = probabilities.copy()
    in_one[1, labels == 1] = np.nan
    assert figures(in_one, labels, positive=1)["ap"].value is None
    assert figure_difference(probabilities, in_one, labels, images(), 1, REPLICATES, 0, "ap").value is None
    nothing = figures(np.full_like(probabilities, np.nan), labels, positive=1)
    assert all(nothing[name].value is None for name in FIGURES)
    assert nothing["ece"].reason == "there are no images with a prediction in every repeat"
    empty = figures(probabilities[:, :0], labels[:0], positive=1)
    assert all(empty[name].value is None for name in FIGURES)


def test_an_interval_takes_two_groups_of_every_class_that_the_figure_needs():
    probabilities, labels = simulated()
    groups = [f"patient {i}" if label else "the only healthy one" for i, label in enumerate(labels)]
    estimates = figures(probabilities, labels, groups, positive=1)
    without = {name for name in FIGURES if estimates[name].low is None}
    assert without == {"balanced_accuracy", "auroc", "ap", "specificity"}
    assert all(estimates[name].value is not None for name in FIGURES)
    wanted = "no interval: requires two groups with images of class 0"
    assert estimates["specificity"].reason == wanted
    assert estimates["auroc"].reason == f"{wanted} and two with images of class 1"
    assert estimates["auroc"].skipped > 0  # replicates in which the healthy one weighs 0


@pytest.mark.parametrize("name", FIGURES)
def test_a_model_does_not_differ_from_itself(name):
    probabilities, labels = simulated()
    same = figure_difference(probabilities, probabilities, labels, images(), 1, REPLICATES, 0, name)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_difference_is_paired():
    a, labels = simulated(n=200, repeats=2)
    b = softmax(np.log(a) * 0.8 + 0.1 * np.random.default_rng(5).normal(size=a.shape), axis=-1)[:1]
    arguments = labels, images(200), 1, 300, 0
    one, other = (class_figures(model, *arguments)["log_loss"] for model in (a, b))
    difference = figure_difference(a, b, *arguments, "log_loss")
    swapped = figure_difference(b, a, *arguments, "log_loss")
    assert difference.value == pytest.approx(one.value - other.value)
    assert [difference.low, difference.high] == pytest.approx([-swapped.high, -swapped.low])
    assert difference.high - difference.low < 0.5 * (one.high - one.low)


def test_many_images_take_many_blocks_of_weights(monkeypatch):
    probabilities, labels = simulated()
    expected = figures(probabilities, labels, positive=1)
    monkeypatch.setattr("pulmo_jax.evaluation.class_metrics.BLOCK", 3 * N)
    blocks = figures(probabilities, labels, positive=1)
    for name in FIGURES:
        assert [blocks[name].low, blocks[name].high] == pytest.approx([expected[name].low, expected[name].high])


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.booleans())
def test_figures_do_not_change_with_the_order_of_images_or_classes(seed, k, ties):
    probabilities, labels = simulated(n=24, k=k, repeats=2, seed=seed, ties=ties)
    groups, rng = [f"patient {i // 3}" for i in range(24)], np.random.default_rng(seed)
    expected, order = figures(probabilities, labels, groups, replicates=5), rng.permutation(24)
    shuffled = figures(probabilities[:, order], labels[order], [groups[i] for i in order], replicates=5)
    renamed = rng.permutation(k)  # of equal probabilities the first is called: only without ties is that no matter
    others = (
        [shuffled]
        if ties
        else [shuffled, figures(probabilities[..., renamed], np.argsort(renamed)[labels], groups, replicates=5)]
    )
    for name in FIGURES:
        for other in others:
            assert other[name].value == pytest.approx(expected[name].value)
            assert other[name].skipped == expected[name].skipped
            assert [other[name].low, other[name].high] == pytest.approx([expected[name].low, expected[name].high])


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 3))
def test_a_temperature_changes_no_figure_of_two_classes_but_calibration(seed, scale):
    rng, finding = np.random.default_rng(seed), np.array([0.01, 0.1, 0.4, 0.49, 0.51, 0.7, 0.99])
    scaled = finding**scale / (finding**scale + (1 - finding) ** scale)
    drawn, labels = rng.integers(0, finding.size, (2, 24)), rng.permutation(np.arange(24) % 2)
    of = [
        figures(np.stack([1 - p[drawn], p[drawn]], axis=-1), labels, positive=1, replicates=5)
        for p in (finding, scaled)
    ]
    for name in FIGURES[:-2]:
        assert of[1][name] == of[0][name]


def test_calibration_error_is_that_of_a_loop():
    rng = np.random.default_rng(3)
    probabilities, labels = simulated(n=300, k=3, repeats=1)
    weights = rng.exponential(size=300)
    for bins in (1, 7, 10, 15):
        for weight in (weights, np.ones(300)):
            expected = slow_calibration_error(probabilities[0], labels, weight, bins)
            assert expected_calibration_error(probabilities[0], labels, weight, bins) == pytest.approx(expected)
    assert expected_calibration_error(probabilities[0], labels) == pytest.approx(
        expected_calibration_error(probabilities[0], labels, np.ones(300))
    )
    assert np.isnan(expected_calibration_error(probabilities[0], labels, np.zeros(300)))
    edges = np.stack([np.arange(5, 11) / 10, 1 - np.arange(5, 11) / 10], axis=1)  # a bin holds its upper edge
    assert calibration_gaps(edges, np.zeros(6, int)).nonzero()[1].tolist() == [4, 5, 6, 7, 8]


def test_reliability_is_that_of_a_loop_with_wilsons_interval():
    (probabilities,), labels = simulated(n=300, repeats=1)
    diagram, confidence = reliability(probabilities, labels), probabilities.max(1)
    assert diagram.count.sum() == 300
    assert np.isnan(diagram.accuracy[:4]).all()  # of two classes one has at least 0.5
    z = norm.ppf(0.975)
    for i in range(5, 10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        n, accuracy = inside.sum(), np.mean(probabilities.argmax(1)[inside] == labels[inside])
        centre = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
        got = [column[i] for column in diagram]
        assert got == pytest.approx([confidence[inside].mean(), accuracy, n, centre - half, centre + half])
    gap = np.nansum(diagram.count * np.abs(diagram.accuracy - diagram.confidence)) / 300
    assert gap == pytest.approx(expected_calibration_error(probabilities, labels))


def test_confusion_is_the_mean_of_scikit_learns():
    probabilities, labels = simulated(k=4)
    expected = np.mean([sk.confusion_matrix(labels, p.argmax(1)) for p in probabilities], axis=0)
    np.testing.assert_allclose(confusion(probabilities, labels), expected)


def drawn(scale, offsets, n=20_000, spread=1.0, seed=0):
    """Logits, and labels drawn from softmax(scale * logits + offsets)."""
    rng = np.random.default_rng(seed)
    logits = spread * rng.normal(size=(n, len(offsets)))
    return logits, (scale * logits + np.array(offsets) + rng.gumbel(size=logits.shape)).argmax(1)


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
def test_scaling_recovers_a_known_temperature(scale):
    logits, labels = drawn(scale, (0.0, 0.0, 0.0), spread=2.0)
    fitted = fit_scaling(logits.astype(np.float32), labels, offsets=False)
    assert fitted.scale == pytest.approx(scale, rel=0.04)
    assert fitted.offsets == (0, 0, 0)
    assert expected_calibration_error(fitted.probabilities(logits), labels) < 0.01


def test_scaling_recovers_known_offsets():
    logits, labels = drawn(0.5, (0.0, 1.0, -0.7), spread=2.0)
    fitted = fit_scaling(logits, labels, offsets=True)
    assert fitted.scale == pytest.approx(0.5, rel=0.04)
    assert fitted.offsets == pytest.approx((0, 1, -0.7), abs=0.07)
    assert fitted.offsets[0] == 0
    without = fit_scaling(logits, labels, offsets=False)
    losses = [sk.log_loss(labels, scaling.probabilities(logits)) for scaling in (fitted, without)]
    assert losses[0] < losses[1] - 0.05


@pytest.mark.parametrize("offsets", [False, True])
def test_scaling_is_the_most_likely_of_its_neighbours(offsets):
    logits, labels = drawn(2.0, (0.0, 0.5, -0.5), n=30, seed=2)
    fitted = fit_scaling(logits, labels, offsets=offsets)

    def log_posterior(log_scale, shift):
        p = softmax(np.exp(log_scale) * logits + np.array([0, *shift]), axis=1)
        prior = norm(0, 1 if offsets else 0.25).logpdf(log_scale) + norm(0, 3).logpdf(shift).sum()
        return np.log(p[np.arange(30), labels]).sum() + prior

    best = np.array([np.log(fitted.scale), *fitted.offsets[1:]])
    for i in range(3 if offsets else 1):
        for step in (-0.02, 0.02):
            moved = best + step * (np.arange(3) == i)
            assert log_posterior(moved[0], moved[1:]) < log_posterior(best[0], best[1:])


@pytest.mark.parametrize("offsets", [False, True])
def test_few_images_give_no_infinite_confidence(offsets):
    separated = fit_scaling(
        np.array([[3.0, -3.0]] * 3 + [[-3.0, 3.0]] * 3), np.array([0] * 3 + [1] * 3), offsets=offsets
    )
    assert 1 < separated.scale < 3
    one_class = fit_scaling(np.array([[1.0, 0.0]] * 5), np.zeros(5, int), offsets=offsets)
    assert np.isfinite([one_class.scale, *one_class.offsets]).all()
    assert fit_scaling(np.zeros((0, 3)), np.zeros(0, int), offsets=offsets) == Scaling(1, (0, 0, 0))
    wrong = fit_scaling(np.array([[300.0, -300.0]] * 4), np.ones(4, int), offsets=offsets)
    assert 0 < wrong.scale < 0.1
    tiny = fit_scaling(np.array([[1e-6, 0.0], [0.0, 1e-6]] * 50), np.array([0, 1] * 50), offsets=offsets)
    assert np.isfinite(tiny.scale)


def test_a_dozen_images_leave_the_logits_about_as_they_are_and_hundreds_do_not():
    few, many = (fit_scaling(*drawn(3.0, (0.0, 0.0), n=n), offsets=False).scale for n in (12, 2000))
    assert few < 1.8
    assert many == pytest.approx(3, rel=0.15)


def test_scaling_is_stable():
    scaling = Scaling(100.0, (0.0, 5.0))
    got = scaling.probabilities(np.array([[1e4, -1e4], [0.0, 0.0], [-1e4, 1e4]]))
    np.testing.assert_allclose(got, [[1, 0], [1 / (1 + np.exp(5)), 1 / (1 + np.exp(-5))], [0, 1]])
    assert scaling.probabilities(np.zeros((0, 2))).shape == (0, 2)
