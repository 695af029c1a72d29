"""Baselines of segmentation, with second opinions: scikit-learn, exhaustive search, and planted structure."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import Ridge
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.evaluation import segmentation_baselines
from pulmo_jax.evaluation.segmentation_baselines import (
    GRID,
    STRENGTHS,
    Sample,
    feature_maps,
    fit_baselines,
    fit_range,
    fit_ridge,
    highest_dice,
    reduced,
    terms,
)

ONE, TWO = Classes(("lung",), (1,)), Classes(("lung", "lesion"), (1, 2))
BOTH = Classes(("lung", "lesion"), (1, 2), overlapping=True)
SIZES = [(40, 40), (30, 50), (45, 35), (280, 260)]


@pytest.fixture(autouse=True)
def _few_pixels(monkeypatch):
    monkeypatch.setattr(segmentation_baselines, "PIXELS_PER_IMAGE", 300)


def ellipse(shape, centre=(0.5, 0.35), radius=(0.3, 0.2)):
    y, x = ((np.arange(n) + 0.5) / n for n in shape)
    return (((y - centre[0]) / radius[0]) ** 2)[:, None] + (((x - centre[1]) / radius[1]) ** 2)[None] < 1


def examples(classes, seed=0, n=8, channels=1):
    """Images of several sizes with a bright ellipse at nearly the same place, and a dark spot inside."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        shape = SIZES[i % len(SIZES)]
        lung = ellipse(shape, (0.5 + rng.normal(0, 0.03), 0.35 + rng.normal(0, 0.03)))
        spot = ellipse(shape, rng.uniform(0.4, 0.6, 2), (0.1, 0.08))
        image = gaussian_filter(rng.normal(0, 3, (*shape, channels)), (1, 1, 0))
        image[..., -1] += 100 + 20 * lung - 60 * spot
        masks = [lung, spot][: len(classes)]
        codes = (
            sum(m * 2**k for k, m in enumerate(masks))
            if classes.overlapping
            else np.maximum.reduce([(k + 1) * m for k, m in enumerate(masks)])
        )
        found.append((image, codes.astype(np.uint8)))
    return found, [f"patient {i // 2}" for i in range(n)]


def dice(baseline, image, codes, classes):
    predicted = baseline.probabilities(image) >= baseline.thresholds
    labelled = codes != UNLABELLED
    return [
        f1_score(classes.inside(codes, k)[labelled], predicted[labelled, k], zero_division=0)
        for k in range(len(classes))
    ]


@pytest.mark.parametrize(("classes", "channels"), [(ONE, 6), (TWO, 1), (BOTH, 3)])
def test_baselines_find_planted_structure_in_other_images(classes, channels):
    training, groups = examples(classes, 0, 12, channels)
    others, _ = examples(classes, 99, 4, channels)
    fitted = fit_baselines(iter(training), groups, classes, 0)
    mean = {name: np.mean([dice(b, *other, classes) for other in others], axis=0) for name, b in fitted.items()}
    for image, _ in others:
        for baseline in fitted.values():
            p = baseline.probabilities(image)
            assert p.shape == (*image.shape[:2], len(classes))
            assert p.dtype == np.float32
            assert p.min() >= 0
            assert p.max() <= 1 + 1e-6
    assert mean["mean_mask"][0] > 0.75
    assert (mean["threshold"] > 0.7).all()
    assert (mean["ridge"] > 0.7).all()
    assert mean["ridge"][0] > mean["mean_mask"][0]


def test_the_mean_mask_is_the_mean_of_the_masks():
    rng = np.random.default_rng(0)
    masks = rng.random((3, GRID, GRID)) < rng.random((GRID, GRID))
    training = [(np.zeros((GRID, GRID, 1)), m.astype(np.uint8)) for m in masks]
    fitted = fit_baselines(training, [str(i) for i in range(3)], ONE, 0)["mean_mask"]
    np.testing.assert_allclose(fitted.grid[..., 0], masks.mean(0), atol=1e-6)
    np.testing.assert_allclose(fitted.probabilities(training[0][0])[..., 0], masks.mean(0), atol=1e-6)


def test_the_mean_mask_ignores_unlabelled_pixels():
    half = np.full((GRID, GRID), 1, np.uint8)
    half[:, GRID // 2 :] = UNLABELLED
    full = np.zeros((GRID, GRID), np.uint8)
    full[:, GRID // 2 :] = 1
    image = np.zeros((GRID, GRID, 1))
    grid = fit_baselines([(image, half), (image, full)], ["a", "b"], ONE, 0)["mean_mask"].grid[..., 0]
    np.testing.assert_allclose(grid[:, : GRID // 2], 0.5)
    np.testing.assert_allclose(grid[:, GRID // 2 :], 1)


def test_thresholds_have_the_highest_mean_dice_on_the_training_images(monkeypatch):
    training, groups = examples(ONE, 1)
    monkeypatch.setattr(segmentation_baselines, "PIXELS_PER_IMAGE", 10**6)  # every pixel
    fitted = fit_baselines(training, groups, ONE, 0)["mean_mask"]
    truth = [codes == 1 for _, codes in training]
    maps = [fitted.probabilities(image)[..., 0] for image, _ in training]

    def mean_dice(t):
        return np.mean(
            [f1_score(m.ravel(), (p >= t).ravel(), zero_division=0) for m, p in zip(truth, maps, strict=True)]
        )

    assert mean_dice(fitted.thresholds[0]) >= max(mean_dice(t) for t in np.arange(0.025, 1, 0.05)) - 1e-3


def sampled(seed=0, n=600, n_images=6, n_classes=1):
    rng = np.random.default_rng(seed)
    image = np.sort(rng.integers(0, n_images, n))
    features = rng.normal(size=(n, 4)) * [1, 10, 1, 1] + [0, 50, 0, 0]
    features[:, 2:] = rng.random((n, 2))
    truth = (features[:, :1] + 0.1 * (features[:, 1:2] - 50) + rng.normal(size=(n, n_classes)) > 0).astype(float)
    return Sample(rng.random((n, 2)), features[:, :2], features, truth, rng.random(n), image)


def test_ranges_equal_an_exhaustive_search(monkeypatch):
    monkeypatch.setattr(segmentation_baselines, "LEVELS", 12)
    sample = sampled(n=80)
    fitted = fit_range(sample)

    def mean_dice(channel, low, high):
        inside = (sample.values[:, channel] >= low) & (sample.values[:, channel] < high)
        images = [sample.image == i for i in np.unique(sample.image)]
        return np.mean([
            f1_score(sample.truth[i, 0], inside[i], sample_weight=sample.weights[i], zero_division=0) for i in images
        ])  # fmt: skip

    best = 0
    for channel in (0, 1):
        edges = [-np.inf, *np.quantile(sample.values[:, channel], np.linspace(0, 1, 13)[1:-1]), np.inf]
        best = max(best, *(mean_dice(channel, a, b) for i, a in enumerate(edges) for b in edges[i + 1 :]))
    assert mean_dice(fitted.channel[0], fitted.low[0], fitted.high[0]) == pytest.approx(best)
    assert best > 0.6


def test_the_ridge_equals_scikit_learns():
    sample, groups = sampled(n_classes=2), [f"patient {i // 2}" for i in range(6)]
    ours = fit_ridge(sample, groups)
    scaler = StandardScaler().fit(sample.features, sample_weight=sample.weights)
    np.testing.assert_allclose(ours.mean, scaler.mean_)
    np.testing.assert_allclose(ours.scale, scaler.scale_)
    X = terms(sample.features, ours.mean, ours.scale)
    assert X.shape[1] == 1 + 4 + 10 + 35
    total, member = sample.weights.sum(), np.array(groups)[sample.image]
    errors = []
    for strength in STRENGTHS:
        # Each fold has less weight in total, and the penalty is relative to it.
        error = 0.0
        for train, test in GroupKFold(3).split(X, groups=member):
            alpha = strength * sample.weights[train].sum()
            fold = Ridge(alpha=alpha, tol=1e-12).fit(X[train, 1:], sample.truth[train], sample.weights[train])
            error += sample.weights[test] @ ((fold.predict(X[test, 1:]) - sample.truth[test]) ** 2).sum(1)
        errors.append(error)
    assert ours.strength == STRENGTHS[int(np.argmin(errors))]
    assert STRENGTHS[0] < ours.strength
    reference = Ridge(alpha=ours.strength * total).fit(X[:, 1:], sample.truth, sample.weights)
    np.testing.assert_allclose(ours.coefficients[1:], reference.coef_.T, atol=1e-8)
    np.testing.assert_allclose(ours.coefficients[0], reference.intercept_, atol=1e-8)
    np.testing.assert_allclose(ours.thresholds, highest_dice(np.clip(reference.predict(X[:, 1:]), 0, 1), sample))


def test_blocks_do_not_matter(monkeypatch):
    sample, groups = sampled(), [str(i) for i in range(6)]
    whole = fit_ridge(sample, groups)
    monkeypatch.setattr(segmentation_baselines, "BLOCK", 7)
    parts = fit_ridge(sample, groups)
    np.testing.assert_allclose(parts.coefficients, whole.coefficients, atol=1e-8)
    np.testing.assert_array_equal(parts.thresholds, whole.thresholds)


def test_samples_represent_every_class_with_its_true_weight():
    codes = np.zeros((100, 100), np.uint8)
    codes[:5, :5], codes[50:, :60], codes[90:] = 2, 1, UNLABELLED
    image = np.random.default_rng(0).normal(size=(100, 100, 2))
    image[60, 0] = np.nan
    labelled = (codes != UNLABELLED) & np.isfinite(image).all(-1)
    sample = segmentation_baselines._sample(image, codes, labelled, TWO, 3, 300, 0)
    assert sample.weights.sum() == pytest.approx(1)
    expected = [(codes[labelled] == k).mean() for k in (1, 2)]
    np.testing.assert_allclose(sample.weights @ sample.truth, expected)
    assert sample.truth[:, 1].sum() == 25
    y, x = (sample.place * 100 - 0.5).T.round().astype(int)
    np.testing.assert_array_equal(sample.values, image[y, x])
    np.testing.assert_array_equal(sample.truth, TWO.memberships[codes[y, x]])
    np.testing.assert_allclose(sample.features[:, -2:], sample.place)
    assert (sample.image == 3).all()


def test_labels_of_unlabelled_pixels_do_not_matter_and_missing_pixels_are_unlabelled():
    training, groups = examples(ONE, 2)
    hidden = [(image, np.where(ellipse(codes.shape, (0.2, 0.7)), UNLABELLED, codes)) for image, codes in training]
    hidden = [(image, codes.astype(np.uint8)) for image, codes in hidden]
    missing = [(np.where((codes == UNLABELLED)[..., None], np.nan, image), c) for (image, codes), (_, c) in zip(
        hidden, training, strict=True)]  # fmt: skip
    a, b = (fit_baselines(e, groups, ONE, 0) for e in (hidden, missing))
    for name in ("mean_mask", "threshold"):
        for field, value in vars(a[name]).items():
            np.testing.assert_array_equal(value, getattr(b[name], field), err_msg=field)
    assert np.isfinite(b["ridge"].probabilities(missing[0][0])).all()


def test_fits_are_reproducible():
    training, groups = examples(TWO, 3)
    a, b = (fit_baselines(training, groups, TWO, 5) for _ in range(2))
    for name in a:
        for field, value in vars(a[name]).items():
            np.testing.assert_array_equal(value, getattr(b[name], field))


def test_a_single_group_and_constant_images():
    training, _ = examples(ONE, 4, 2)
    fitted = fit_baselines(training, ["a", "a"], ONE, 0)["ridge"]
    assert fitted.strength == STRENGTHS[0]
    constant = [(np.full((20, 30, 1), 7.0), ellipse((20, 30)).astype(np.uint8))] * 2
    fitted = fit_baselines(constant, ["a", "b"], ONE, 0)
    assert all(np.isfinite(b.probabilities(constant[0][0])).all() for b in fitted.values())
    assert dice(fitted["ridge"], *constant[0], ONE)[0] > 0.9  # from the position alone


def test_no_labelled_pixel_is_an_error():
    unlabelled = [(np.zeros((9, 9, 1)), np.full((9, 9), UNLABELLED, np.uint8))]
    with pytest.raises(ValueError, match="no pixel of the training images is labelled"):
        fit_baselines(unlabelled, ["a"], ONE, 0)


def test_features_are_those_of_the_reduced_image():
    image = np.random.default_rng(0).normal(size=(500, 1000, 1)) + np.linspace(0, 9, 1000)[None, :, None]
    small = reduced(image)
    assert small.shape == (128, 256, 1)
    maps = feature_maps(small)
    assert maps.shape == (128, 256, 10)
    np.testing.assert_allclose(maps[..., 3], gaussian_filter(small[..., 0], 4, mode="nearest"), rtol=1e-5)
    window = small[40:88, 100:148, 0]
    assert maps[64, 124, 7] == pytest.approx(window.std(), rel=0.5)
    assert reduced(np.full((3, 700, 1), np.nan)).shape == (1, 256, 1)
    assert not reduced(np.full((3, 7, 1), np.nan)).any()
