"""Surface distances, with second opinions: the package surface-distance, and the distances of all pairs of corners."""

import numpy as np
import pytest
import surface_distance
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from pulmo_jax.evaluation.surface_distance import surface_figures

SPACINGS = [(1.0, 1.0), (0.7, 2.5)]


def blob(seed, shape=(37, 52), threshold=0.02):
    return gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3) > threshold


def everywhere(mask):
    return np.ones_like(mask)


@pytest.mark.filterwarnings("ignore:Please import .* from the `scipy.ndimage` namespace:DeprecationWarning")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_those_of_deepminds_surface_distance(seed, spacing):
    truth, predicted = blob(seed), blob(seed, threshold=0.06) ^ blob(seed + 100, threshold=0.15)
    assert truth[0].any()  # a mask that reaches the edge of the image
    distances = surface_distance.compute_surface_distances(truth, predicted, spacing)
    to_predicted, to_truth = surface_distance.compute_average_surface_distance(distances)
    lengths = distances["surfel_areas_gt"].sum(), distances["surfel_areas_pred"].sum()
    ours = surface_figures(truth, predicted, everywhere(truth), spacing, tolerance=1.5)
    np.testing.assert_allclose(ours.mean, np.average([to_predicted, to_truth], weights=lengths), rtol=1e-12)
    assert ours.percentile == surface_distance.compute_robust_hausdorff(distances, 95)
    expected = surface_distance.compute_surface_dice_at_tolerance(distances, 1.5)
    np.testing.assert_allclose(ours.dice, expected, rtol=1e-12)


def corners(mask, labelled):
    """Corners (y, x) of mixed 2 x 2 neighbourhoods with their contour length, without unlabelled neighbours; loops."""
    found = {}
    for y in range(mask.shape[0] + 1):
        for x in range(mask.shape[1] + 1):
            four = [(i, j) for i in (y - 1, y) for j in (x - 1, x)]
            inside = [0 <= i < mask.shape[0] and 0 <= j < mask.shape[1] for i, j in four]
            if not all(labelled[at] for at, known in zip(four, inside, strict=True) if known):
                continue
            n, (a, b, c, d) = 0, (bool(mask[at]) if known else False for at, known in zip(four, inside, strict=True))
            n = a + b + c + d
            if n in (1, 3):
                found[y, x] = np.sqrt(0.5)
            elif n == 2:
                found[y, x] = np.sqrt(2) if a == d else 1.0
    return np.array(list(found), float).reshape(-1, 2), np.array(list(found.values()))


@pytest.mark.parametrize("seed", range(4))
def test_figures_inside_a_labelled_area_equal_those_of_all_pairs_of_corners(seed):
    truth, predicted, labelled = blob(seed), blob(seed, threshold=0.07), blob(seed + 50, threshold=-0.05)
    (at, length), (other, other_length) = corners(truth, labelled), corners(predicted, labelled)
    pairs = cdist(at, other)
    distance, weight = np.concatenate([pairs.min(1), pairs.min(0)]), np.concatenate([length, other_length])
    ours = surface_figures(truth, predicted, labelled, tolerance=1.0)
    np.testing.assert_allclose(ours.mean, np.average(distance, weights=weight), rtol=1e-12)
    np.testing.assert_allclose(ours.dice, weight[distance <= 1].sum() / weight.sum(), rtol=1e-12)
    directed = [
        np.repeat(pairs.min(axis), np.round(w * 1e4).astype(int)) for axis, w in ((1, length), (0, other_length))
    ]
    assert ours.percentile == max(np.percentile(d, 95, method="inverted_cdf") for d in directed)


def test_unlabelled_pixels_do_not_matter():
    truth, predicted, labelled = blob(1), blob(1, threshold=0.07), blob(51, threshold=-0.05)
    noise = np.random.default_rng(0).random(truth.shape) < 0.5
    changed = [np.where(labelled, mask, noise) for mask in (truth, predicted)]
    assert surface_figures(*changed, labelled) == surface_figures(truth, predicted, labelled)


def test_a_shifted_square_and_its_units():
    truth = np.zeros((40, 50), bool)
    truth[10:20, 10:20] = True
    predicted = np.roll(truth, 3, axis=1)
    px = surface_figures(truth, predicted, everywhere(truth), tolerance=3.0)
    mm = surface_figures(truth, predicted, everywhere(truth), (0.5, 0.5), tolerance=1.5)
    assert px.percentile == 3
    assert px.dice == 1
    assert mm.mean == pytest.approx(px.mean / 2)
    assert mm.percentile == 1.5
    assert mm.dice == 1
    assert surface_figures(truth, predicted, everywhere(truth), tolerance=2.9).dice < 1
    assert surface_figures(truth, truth, everywhere(truth)) == (0, 0, 1)


def test_empty_masks():
    mask, none = blob(0), np.zeros((37, 52), bool)
    assert np.isnan(surface_figures(none, none, everywhere(none))).all()
    assert np.isnan(surface_figures(mask, mask, none)).all()  # nothing is labelled
    diagonal = pytest.approx(np.hypot(37 * 2, 52 * 3))
    assert surface_figures(mask, none, everywhere(none), (2.0, 3.0)) == (diagonal, diagonal, 0)
    assert surface_figures(none, mask, everywhere(none), (2.0, 3.0)) == (diagonal, diagonal, 0)


def test_a_contour_that_only_one_mask_has_inside_the_labelled_area():
    truth, predicted, labelled = (np.zeros((30, 30), bool) for _ in range(3))
    labelled[:, :15] = True
    truth[5:10, 5:10], predicted[5:10, 20:25] = True, True
    assert surface_figures(truth, predicted, labelled).dice == 0
    assert surface_figures(truth, predicted, labelled).mean == pytest.approx(np.hypot(30, 30))
