"""Scores of segmented images, with second opinions: scikit-learn, scikit-image, and loops."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.measure import label, regionprops
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.evaluation.segmentation_metrics import (
    ANY,
    BINS,
    decided,
    empty_images,
    image_figures,
    lesion_counts,
    row_names,
    score_image,
)
from pulmo_jax.evaluation.surface_distance import surface_figures

ONE, TWO = Classes(("lung",), (1,)), Classes(("lung", "lesion"), (10, 20))
BOTH = Classes(("lung", "lesion"), (1, 2), overlapping=True)


def smooth(seed, *shape):
    noise = np.random.default_rng(seed).normal(size=shape)
    field = gaussian_filter(noise, (3, 3, *(0,) * (len(shape) - 2)))
    return field / field.std()


def example(classes, seed=0, shape=(45, 60), unlabelled=0.2):
    """Probabilities, decided classes and codes of an image."""
    field, noise = smooth(seed, *shape, len(classes)), smooth(seed + 1000, *shape, len(classes))
    inside = field > 0.7
    if classes.overlapping:
        codes = (inside * 2 ** np.arange(len(classes))).sum(-1)
        p = 1 / (1 + np.exp(-4 * (field + 0.6 * noise - 0.7)))
    else:
        codes = np.where(inside.any(-1), field.argmax(-1) + 1, 0)
        odds = np.exp(4 * (field + 0.6 * noise - 0.7))
        p = odds / (1 + odds.sum(-1, keepdims=True))
    codes = np.where(np.random.default_rng(seed).random(shape) < unlabelled, UNLABELLED, codes).astype(np.uint8)
    p = p.astype(np.float32)
    return p, decided(p, (0.5,) * len(classes), classes.overlapping), codes


def rows_of(classes, p, predicted, codes):
    """Probability, prediction and truth of every row, written out."""
    truth = [(codes & (1 << k)) > 0 if classes.overlapping else codes == k + 1 for k in range(len(classes))]
    rows = [(p[..., k], predicted[..., k], truth[k] & (codes != UNLABELLED)) for k in range(len(classes))]
    if len(classes) > 1:
        union = p.max(-1) if classes.overlapping else p.sum(-1)
        rows.append((union, predicted.any(-1), np.any([t for _, _, t in rows], axis=0)))
    return rows


@pytest.mark.parametrize("classes", [ONE, TWO, BOTH])
@pytest.mark.parametrize("seed", range(3))
def test_figures_of_pixels_equal_scikit_learns(classes, seed):
    p, predicted, codes = example(classes, seed)
    labelled = codes != UNLABELLED
    figures = image_figures([score_image(p, predicted, codes, classes)])
    references = {"dice": f1_score, "iou": jaccard_score, "sensitivity": recall_score, "precision": precision_score}
    for row, (_, mask, truth) in enumerate(rows_of(classes, p, predicted, codes)):
        assert truth.any()
        for name, reference in references.items():
            assert figures[name][0, row] == pytest.approx(reference(truth[labelled], mask[labelled]), abs=1e-12), name
        surface = surface_figures(truth, mask, labelled)
        names = ("surface_distance", "surface_distance_95", "surface_dice")
        np.testing.assert_equal([figures[name][0, row] for name in names], list(surface))


@pytest.mark.parametrize("classes", [ONE, TWO, BOTH])
def test_lesions_and_false_components_equal_scikit_images(classes):
    limit, min_area = 0.8, 6
    p, predicted, codes = example(classes, 3, (90, 120))
    scores = score_image(p, predicted, codes, classes, min_area_px=min_area)
    n_false = 0
    for row, (probability, mask, truth) in enumerate(rows_of(classes, p, predicted, codes)):
        regions = [r for r in regionprops(label(mask), intensity_image=probability) if r.area >= min_area]
        listed = [r for r in regions if r.intensity_max >= limit]
        on = np.zeros(mask.shape, bool)
        for r in listed:
            on[tuple(r.coords.T)] = True
        lesions = regionprops(label(truth))
        found = sum(on[tuple(r.coords.T)].any() for r in lesions)
        false = [r for r in listed if not truth[tuple(r.coords.T)].any()]
        false = [r for r in false if (codes[tuple(r.coords.T)] != UNLABELLED).any()]
        n_false += len(false)
        assert lesion_counts([scores], row, limit).tolist() == [[len(lesions), found, len(false)]]
        small = sum((codes[tuple(r.coords.T)] != UNLABELLED).sum() < 20 for r in false)
        assert lesion_counts([scores], row, limit, (0, 20))[0, 2] == small
        small = [r for r in lesions if r.area < 20]
        found = sum(on[tuple(r.coords.T)].any() for r in small)
        assert lesion_counts([scores], row, limit, (0, 20))[0, :2].tolist() == [len(small), found]
    assert n_false > 0


@pytest.mark.parametrize("classes", [ONE, TWO, BOTH])
def test_histograms_count_every_labelled_pixel(classes):
    p, predicted, codes = example(classes)
    histogram = score_image(p, predicted, codes, classes).histogram
    labelled = codes != UNLABELLED
    for row, (probability, _, truth) in enumerate(rows_of(classes, p, predicted, codes)):
        for j in (0, 57, BINS // 2, BINS - 1):
            last = j == BINS - 1
            in_bin = labelled & (probability >= j / BINS) & ((probability < (j + 1) / BINS) | last)
            expected = (in_bin & ~truth).sum(), (in_bin & truth).sum(), probability[in_bin].sum(dtype=np.float64)
            np.testing.assert_allclose(histogram[row, :, j], expected, rtol=1e-6)
        assert histogram[row, :2].sum() == labelled.sum()


@pytest.mark.parametrize("classes", [ONE, TWO, BOTH])
def test_unlabelled_and_missing_pixels_count_nowhere(classes):
    p, predicted, codes = example(classes)
    noise, labelled = np.random.default_rng(5).random(p.shape).astype(np.float32), codes != UNLABELLED
    changed = score_image(np.where(labelled[..., None], p, noise), predicted, codes, classes)
    expected = score_image(p, predicted, codes, classes)
    np.testing.assert_array_equal(changed.counts, expected.counts)
    np.testing.assert_array_equal(changed.surface, expected.surface)
    np.testing.assert_array_equal(changed.histogram, expected.histogram)
    missing = np.where(labelled[..., None], p, np.nan).astype(np.float32)
    fully_coded = np.where(labelled, codes, 0).astype(np.uint8)
    without = score_image(missing, predicted & labelled[..., None], fully_coded, classes)
    np.testing.assert_array_equal(without.counts, expected.counts)
    np.testing.assert_array_equal(without.histogram, expected.histogram)


def score(truth, predicted):
    return score_image(predicted[..., None].astype(np.float32), predicted[..., None], truth.astype(np.uint8), ONE)


def test_empty_masks():
    none, some = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    some[5:9, 5:9] = True
    scores = [score(none, none), score(none, some), score(some, none), score(some, some)]
    figures = image_figures(scores)
    np.testing.assert_equal(figures["dice"][:, 0], [np.nan, 0, 0, 1])
    np.testing.assert_equal(figures["iou"][:, 0], [np.nan, 0, 0, 1])
    np.testing.assert_equal(figures["sensitivity"][:, 0], [np.nan, np.nan, 0, 1])
    np.testing.assert_equal(figures["precision"][:, 0], [np.nan, 0, np.nan, 1])
    np.testing.assert_equal(figures["surface_dice"][:, 0], [np.nan, 0, 0, 1])
    np.testing.assert_allclose(figures["surface_distance"][:, 0], [np.nan, np.hypot(20, 30), np.hypot(20, 30), 0])
    counted = {name: values.tolist() for name, values in empty_images(scores).items()}
    assert counted == {"with_class": [2], "only_predicted": [1], "empty": [1]}
    assert lesion_counts(scores, 0).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0]]


def test_an_image_without_labels_has_no_figures():
    p, predicted, _ = example(TWO)
    scores = score_image(p, predicted, np.full(p.shape[:2], UNLABELLED, np.uint8), TWO)
    assert not scores.counts.any()
    assert not scores.histogram.any()
    assert all(np.isnan(values).all() for values in image_figures([scores]).values())


def test_a_component_below_the_smallest_area_neither_finds_a_lesion_nor_is_false():
    truth = np.zeros((20, 30), bool)
    truth[2:8, 2:8] = True
    predicted = np.zeros((20, 30), bool)
    predicted[3, 3:5], predicted[15, 20:22] = True, True
    p, codes = predicted[..., None].astype(np.float32), truth.astype(np.uint8)
    assert lesion_counts([score_image(p, predicted[..., None], codes, ONE)], 0).tolist() == [[1, 1, 1]]
    assert lesion_counts([score_image(p, predicted[..., None], codes, ONE, min_area_px=3)], 0).tolist() == [[1, 0, 0]]


def test_decisions():
    p = np.array([[0.3, 0.3], [0.5, 0.2], [0.2, 0.6], [0.1, 0.1], [np.nan, 0.9]], np.float32)
    background = 1 - np.nan_to_num(p).sum(-1)
    plain = decided(p, (0.5, 0.5), overlapping=False)
    whole = np.concatenate([background[:, None], np.nan_to_num(p)], 1).argmax(1)
    np.testing.assert_array_equal(np.where(plain.any(1), plain.argmax(1) + 1, 0)[:4], whole[:4])
    t = 0.3
    single = decided(np.linspace(0, 1, 101, dtype=np.float32)[:, None], (t,), overlapping=False)[:, 0]
    np.testing.assert_array_equal(np.delete(single, 30), np.delete(np.linspace(0, 1, 101) > t, 30))
    lower = decided(p, (0.5, 0.05), overlapping=False)  # the second class wins where it would lose at 0.5
    assert lower[0].tolist() == [False, True]
    assert lower[1].tolist() == [False, True]
    both = decided(p, (0.25, 0.25), overlapping=True)
    np.testing.assert_array_equal(both, [[1, 1], [1, 0], [0, 1], [0, 0], [0, 0]])


def test_a_missing_probability_belongs_to_no_class():
    p = np.array([[np.nan, np.nan], [np.nan, 0.9]], np.float32)
    for overlapping in (False, True):
        assert not decided(p, (0.5, 0.5), overlapping).any()


def test_rows():
    assert row_names(ONE) == ("lung",)
    assert row_names(TWO) == ("lung", "lesion", ANY)
