"""Calibration of pixels, with second opinions: scikit-learn, direct thresholding, and simulation."""

import numpy as np
import pytest
from scipy.special import expit, logit, softmax
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.evaluation.class_calibration import Scaling
from pulmo_jax.evaluation.segmentation_calibration import (
    best_threshold,
    calibration_error,
    dice_curves,
    fit_pixel_scaling,
    logits,
    middle_of_highest,
    pool,
    reliability,
    sample_pixels,
)
from pulmo_jax.evaluation.segmentation_metrics import BINS, score_image

ONE, TWO = Classes(("lung",), (1,)), Classes(("lung", "lesion"), (1, 2))
BOTH = Classes(("lung", "lesion"), (1, 2), overlapping=True)
REPLICATES = 200


def calibrated(probabilities, scaling, overlapping):
    """softmax(scale * log p + offsets), or sigmoid(scale * logit p + offsets) of overlapping classes."""
    scaled = scaling.scale * logits(probabilities, overlapping) + np.array(scaling.offsets)
    return expit(scaled) if overlapping else softmax(scaled, axis=-1)


def image(seed, size=(40, 50), sharpness=1.0):
    """Probabilities of one class, calibrated if the sharpness is 1, and codes."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1 + rng.normal(0, 0.3), 2, size)
    codes = (rng.random(size) < expit(z)).astype(np.uint8)
    return expit(sharpness * z).astype(np.float32)[..., None], codes


def scored(images, classes=ONE):
    return [score_image(p, p > 0.5, codes, classes) for p, codes in images]


def test_dice_at_every_threshold_equals_scikit_learns():
    images = [image(seed) for seed in range(3)]
    curves = dice_curves(scored(images), 0)
    for i, (p, codes) in enumerate(images):
        for j in range(0, BINS, 13):
            above = p[..., 0].astype(np.float64) >= j / BINS
            assert curves[i, j] == pytest.approx(f1_score(codes.ravel(), above.ravel(), zero_division=0))


def test_dice_of_an_image_without_the_class():
    p, codes = np.full((4, 5, 1), 0.31, np.float32), np.zeros((4, 5), np.uint8)
    curve = dice_curves(scored([(p, codes)]), 0)[0]
    np.testing.assert_equal(curve[:63], 0)  # predicted, but not there
    np.testing.assert_equal(curve[63:], np.nan)


def test_the_threshold_has_the_highest_mean_dice():
    images = [image(seed) for seed in range(8)]
    groups = [f"patient {i // 2}" for i in range(8)]
    best = best_threshold(scored(images), 0, groups, REPLICATES, 0)

    def mean_dice(t):
        return np.mean([f1_score(codes.ravel(), (p[..., 0] >= t).ravel(), zero_division=0) for p, codes in images])

    assert mean_dice(best.value) >= max(mean_dice(j / BINS) for j in range(1, BINS, 3)) - 1e-9
    assert best.low <= best.value <= best.high
    assert 0.01 < best.high - best.low < 0.2


def test_the_threshold_follows_a_distortion_of_the_probabilities():
    planted = [image(seed) for seed in range(6)]
    groups = [str(i) for i in range(6)]
    plain = best_threshold(scored(planted), 0, groups, REPLICATES, 0).value
    squared = best_threshold(scored([(p**2, codes) for p, codes in planted]), 0, groups, REPLICATES, 0).value
    assert squared == pytest.approx(plain**2, abs=0.02)


def test_the_threshold_rises_for_images_without_the_class():
    """An image without the class has a Dice of 0 until nothing is predicted in it; it then leaves the mean."""
    p = np.full((10, 10, 1), 0.05, np.float32)
    p[:5] = 0.6
    codes = np.zeros((10, 10), np.uint8)
    codes[:5] = 1
    absent = np.full((10, 10, 1), 0.45, np.float32), np.zeros((10, 10), np.uint8)
    alone = best_threshold(scored([(p, codes)]), 0, ["a"], REPLICATES, 0)
    assert alone.value == pytest.approx((0.055 + 0.6) / 2, abs=0.005)  # the middle of all equally good ones
    assert best_threshold(scored([(p, codes), absent]), 0, ["a", "b"], REPLICATES, 0).value > 0.45


def test_no_threshold_without_the_class():
    p, codes = np.full((4, 5, 1), 0.3, np.float32), np.zeros((4, 5), np.uint8)
    best = best_threshold(scored([(p, codes)]), 0, ["a"], REPLICATES, 0)
    assert best.value is None
    assert "no validation image" in best.reason


def test_the_middle_of_the_highest():
    mean = np.array([[0.1, 0.3, 0.3, 0.3, 0.2], [0.5, 0.1, 0.5, 0.5, 0.5], [np.nan] * 5, [0.0, np.nan, 0.0, 0.7, 0.7]])
    np.testing.assert_allclose(middle_of_highest(mean) * BINS, [3, 1, np.nan, 4.5])


def test_reliability_equals_scikit_learns():
    images = [image(seed, sharpness=2.0) for seed in range(4)]
    groups = ["a", "a", "b", "c"]
    ours = reliability(scored(images), 0, groups, REPLICATES, 0)
    p, codes = np.concatenate([p.ravel() for p, _ in images]), np.concatenate([c.ravel() for _, c in images])
    frequency, probability = calibration_curve(codes, p, n_bins=10)
    np.testing.assert_allclose([e.value for e in ours.frequency], frequency, atol=1e-9)
    np.testing.assert_allclose(ours.probability, probability, atol=1e-6)
    fraction = np.histogram(p, 10, (0, 1))[0] / p.size
    np.testing.assert_allclose(ours.fraction, fraction, atol=1e-12)
    assert ours.ece.value == pytest.approx(np.sum(fraction * np.abs(frequency - probability)), abs=1e-6)
    assert ours.ece.low <= ours.ece.value <= ours.ece.high
    assert all(e.low <= e.value <= e.high for e in ours.frequency)


def test_images_have_the_same_weight_whatever_their_size():
    small, large = image(0, (10, 10)), image(1, (80, 90), sharpness=3.0)
    joint = calibration_error(scored([small, large]), 0, ["a", "b"], REPLICATES, 0).value
    stretched = tuple(np.repeat(np.repeat(a, 8, 0), 9, 1) for a in small)
    assert joint == pytest.approx(calibration_error(scored([stretched, large]), 0, ["a", "b"], REPLICATES, 0).value)


def test_calibrated_probabilities_have_a_small_error_and_sharpened_ones_a_large_one():
    groups = [str(i) for i in range(10)]
    true, sharp = (
        calibration_error(scored([image(i, sharpness=s) for i in range(10)]), 0, groups, REPLICATES, 0)
        for s in (1.0, 3.0)
    )
    assert true.value < 0.03
    assert sharp.low > 0.03
    assert sharp.low > true.value


def test_an_image_without_labels_does_not_change_the_error():
    images = [image(i, sharpness=2.0) for i in range(3)]
    unlabelled = images[0][0], np.full_like(images[0][1], UNLABELLED)
    expected = calibration_error(scored(images), 0, ["a", "b", "c"], REPLICATES, 0)
    assert calibration_error(scored([*images, unlabelled]), 0, ["a", "b", "c", "d"], REPLICATES, 0) == expected
    assert calibration_error(scored([unlabelled]), 0, ["d"], REPLICATES, 0).value is None


def draw(classes, n, seed):
    """Calibrated probabilities of all outputs, and codes drawn from them."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, classes.n_outputs))
    if classes.overlapping:
        p = expit(z - 1)
        return p, ((rng.random(p.shape) < p) * 2 ** np.arange(len(classes))).sum(1).astype(np.uint8)
    p = softmax(z, axis=1)
    return p, (rng.random((n, 1)) > np.cumsum(p, 1)).sum(1).astype(np.uint8)


@pytest.mark.parametrize("classes", [ONE, TWO, BOTH])
def test_a_planted_distortion_is_undone(classes):
    p, codes = draw(classes, 60000, 0)
    offsets = np.array([0, 0.8, -0.5][: classes.n_outputs])
    z = logit(p) if classes.overlapping else np.log(p)
    distorted = 2.5 * z + offsets
    distorted = expit(distorted) if classes.overlapping else softmax(distorted, axis=1)
    sample = sample_pixels(distorted, codes, 60000, 0)
    fitted = fit_pixel_scaling(sample, classes, effective_pixels=60000)
    assert fitted.scale == pytest.approx(1 / 2.5, rel=0.05)
    np.testing.assert_allclose(calibrated(distorted, fitted, classes.overlapping), p, atol=0.03)


def test_the_fit_of_one_class_is_a_logistic_regression():
    p, codes = draw(ONE, 5000, 1)
    p = np.clip(p**2 / (p**2).sum(1, keepdims=True), 1e-5, 1 - 1e-5)
    fitted = fit_pixel_scaling(sample_pixels(p, codes, 5000, 0), ONE, effective_pixels=1e9)  # no prior
    reference = LogisticRegression(C=np.inf, tol=1e-8).fit(logit(p[:, 1:]), codes)
    assert fitted.scale == pytest.approx(reference.coef_.item(), rel=1e-3)
    assert fitted.offsets == pytest.approx((0, reference.intercept_.item()), abs=1e-3)


def test_images_count_once_and_priors_hold_a_small_sample():
    (p, codes), (q, other) = draw(TWO, 400, 2), draw(TWO, 4000, 3)
    q = softmax(3 * np.log(q), axis=1)
    joint = fit_pixel_scaling(pool([sample_pixels(p, codes, 10**6, 0), sample_pixels(q, other, 10**6, 0)]), TWO)
    repeated = np.tile(p, (10, 1)), np.tile(codes, 10)
    again = fit_pixel_scaling(pool([sample_pixels(*repeated, 10**6, 0), sample_pixels(q, other, 10**6, 0)]), TWO)
    assert joint.scale == pytest.approx(again.scale, rel=1e-4)
    separated = np.array([[0.99, 0.01], [0.01, 0.99]]), np.array([0, 1], np.uint8)
    assert 1 < fit_pixel_scaling(sample_pixels(*separated, 10, 0), ONE).scale < 3
    none = sample_pixels(*separated, 10, 0)
    nothing = type(none)(none.probabilities[:0], none.codes[:0], none.weights[:0])
    assert fit_pixel_scaling(nothing, ONE) == Scaling(1.0, (0.0, 0.0))
    assert fit_pixel_scaling(nothing, BOTH) == Scaling(1.0, (0.0, 0.0))


def test_certain_probabilities_stay_finite():
    p = np.array([[1.0, 0.0], [0.0, 1.0]])
    for overlapping in (False, True):
        assert np.isfinite(calibrated(p, Scaling(5.0, (0.0, 1.0)), overlapping)).all()
    np.testing.assert_allclose(calibrated(p, Scaling(1.0, (0.0, 0.0)), False), p, atol=1e-5)


def test_samples_hold_labelled_pixels_only():
    p, codes = draw(TWO, 1200, 4)
    p, codes = p.reshape(30, 40, 3), codes.reshape(30, 40)
    codes[:10], p[20:22] = UNLABELLED, np.nan
    sample = sample_pixels(p, codes, 200, 0)
    assert len(sample.codes) == 200
    assert sample.weights.sum() == pytest.approx(1)
    assert (sample.codes != UNLABELLED).all()
    assert np.isfinite(sample.probabilities).all()
    assert len(sample_pixels(p, codes, 10**6, 0).codes) == 18 * 40
    rows = {tuple(row) for row in p.reshape(-1, 3)}
    assert all(tuple(row) in rows for row in sample.probabilities)
    assert len(sample_pixels(p, np.full_like(codes, UNLABELLED), 10, 0).codes) == 0
