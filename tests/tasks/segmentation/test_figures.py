"""Figures of segmentations: which part is shown in detail, what the contours and curves are, and that words fit."""

import numpy as np
import pytest
from matplotlib.contour import QuadContourSet
from references.drawn import assert_words_apart, texts

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.tasks.segmentation import figures
from pulmo_jax.tasks.segmentation.figures import Example

pytestmark = pytest.mark.draws
NAMES = ("left upper lobe", "left lower lobe", "right upper lobe", "right middle lobe", "right lower lobe", "nodule")


def square(shape, y, x, side):
    mask = np.zeros(shape, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def example(truth, predicted, labelled=None):
    shape = truth.shape[:2]
    image = np.linspace(0, 1, shape[0] * shape[1], dtype=np.float32).reshape(*shape, 1)
    return Example(
        "slice.tif: Dice 0.5", image, truth, predicted, np.ones(shape, bool) if labelled is None else labelled
    )


def two_classes(side=256):
    """A large class with a thin rim of errors, and a small one that is missed."""
    shape = (side, side)
    truth = np.stack([square(shape, 10, 10, 120), square(shape, 200, 200, 6)], -1)
    predicted = np.stack([square(shape, 11, 11, 120), np.zeros(shape, bool)], -1)
    return example(truth, predicted)


def test_the_detail_shows_a_missed_small_class_rather_than_the_rim_of_a_large_one():
    y, x, height, width = figures.detail_window(two_classes())
    assert (height, width) == (64, 64)
    assert y <= 200 <= y + height - 6
    assert x <= 200 <= x + width - 6


def test_the_detail_shows_the_classes_where_nothing_differs():
    truth = square((200, 300), 150, 250, 20)[..., None]
    y, x, height, width = figures.detail_window(example(truth, truth))
    assert (height, width) == (50, 75)
    assert y <= 150 < y + height
    assert x <= 250 < x + width


def test_unlabelled_pixels_are_no_difference():
    truth = square((200, 200), 20, 20, 20)[..., None]
    labelled = ~square((200, 200), 120, 120, 80)
    predicted = truth | square((200, 200), 150, 150, 40)[..., None]
    y, x, *_ = figures.detail_window(example(truth, predicted, labelled))
    assert max(y, x) <= 20


@pytest.mark.parametrize("shape", [(10, 10), (1, 40), (64, 30)])
def test_a_small_image_is_its_own_detail(shape):
    truth = np.ones((*shape, 1), bool)
    assert figures.detail_window(example(truth, ~truth)) == (0, 0, *shape)


def test_large_images_are_reduced_and_keep_small_regions():
    truth = square((2500, 1500), 1700, 900, 1)[..., None]
    view = figures.view(example(truth, ~truth & False))
    assert view.whole.truth.shape == (834, 500, 1)
    assert view.whole.truth.sum() == 1
    assert view.detail.truth.shape[0] <= figures.MAX_SIDE_PX
    np.testing.assert_allclose(view.window * 3, figures.detail_window(example(truth, ~truth & False)))


def contours_in(axes):
    return [artist for artist in axes.get_children() if isinstance(artist, QuadContourSet)]


def test_contours_of_truth_and_prediction_in_the_whole_and_in_the_detail():
    figure = figures.contours([figures.view(two_classes())] * 2, ("lung", "lesion"), "Lowest Dice")
    image, whole, detail = figure.axes[:3]
    assert [len(contours_in(axes)) for axes in (image, whole, detail)] == [0, 3, 1]  # truth and prediction; truth alone
    solid, dashed, missed = contours_in(whole)
    assert (solid.linestyles, missed.linestyles) == (None, None)
    assert dashed.linestyles is not None
    words = texts(figure)
    assert "slice.tif: Dice 0.5" in words
    assert "lung: ground truth" in words
    assert "unlabelled" not in words


def test_a_contour_ends_at_the_edge_of_a_detail_and_is_closed_at_that_of_an_image():
    truth = square((256, 256), 0, 0, 256)[..., None]
    predicted = truth & ~square((256, 256), 100, 100, 8)[..., None]
    figure = figures.contours([figures.view(example(truth, predicted))], ("tissue",), "")
    _, whole, detail = figure.axes
    assert [len(contours_in(axes)) for axes in (whole, detail)] == [2, 1]  # no line round the detail


def test_scattered_labels_are_a_layer_and_no_contours():
    rng = np.random.default_rng(0)
    labelled = rng.random((128, 128)) < 0.1
    truth = labelled[..., None] & square((128, 128), 20, 20, 80)[..., None]
    figure = figures.contours(
        [figures.view(example(truth, square((128, 128), 20, 20, 80)[..., None], labelled))], ("a",), ""
    )
    _, whole, _ = figure.axes
    assert len(contours_in(whole)) == 1  # of the prediction
    assert len(whole.images) == 3  # image, unlabelled pixels, truth
    assert "unlabelled" in texts(figure)


def test_classes_have_different_colours_however_many():
    for count in (1, 2, 7, 8, 50):
        assert len(set(figures.class_colours(count))) == count


def test_dice_by_size_states_the_mean_of_the_table():
    area, dice = np.array([[100.0, 0], [1000, 0], [0, 0]]), np.array([[0.5, np.nan], [0.7, 0.0], [0.0, np.nan]])
    figure = figures.dice_by_size(area, dice, ("lung", "lesion"))
    assert figure.axes[0].get_title() == "lung: mean 0.400\n1 image with false pixels only"
    assert figure.axes[1].get_title() == "lesion: mean 0.000\n1 image with false pixels only"
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[100, 0.5], [1000, 0.7]]
    empty = figures.dice_by_size(np.zeros((2, 1)), np.full((2, 1), np.nan), ("lung",))
    assert empty.axes[0].get_title() == "lung: in no image"


def reliable(name):
    middle = np.arange(10) / 10 + 0.05
    count = np.append(np.geomspace(1e6, 1e3, 9), 0)
    nan = np.where(count > 0, 0, np.nan)
    return figures.Reliable(name, middle + nan, middle**1.2 + nan, middle - 0.1 + nan, middle + 0.1 + nan, count, 0.034)


def curve(name):
    threshold = np.arange(1, 100) / 100
    dice = 0.9 - (threshold - 0.4) ** 2
    return figures.ThresholdCurve(name, threshold, dice, dice - 0.05, dice + 0.05, 0.42, (0.3, 0.5))


def drawn(names):
    n = len(names)
    rng = np.random.default_rng(0)
    return {
        "reliability": figures.reliability([reliable(name) for name in names]),
        "dice_by_threshold": figures.dice_by_threshold([curve(name) for name in names]),
        "dice_by_size": figures.dice_by_size(np.exp(rng.normal(9, 1, (40, n))), rng.random((40, n)), names),
        "free_response": figures.free_response(
            [figures.Components(name, np.arange(5.0), np.arange(5) / 5, (1.0, 0.2)) for name in names]
        ),
    }


@pytest.mark.parametrize("names", [("lung",), NAMES[:2], NAMES])
def test_words_do_not_overlap(names):
    for figure in drawn(names).values():
        assert_words_apart(figure)


def test_empty_bins_are_not_drawn():
    upper = figures.reliability([reliable("lung")]).axes[0]
    points = next(line for line in upper.lines if line.get_label() == "calibrated")
    assert len(points.get_xdata()) == 9


def test_thresholds_are_marked():
    axes = figures.dice_by_threshold([curve("lung")]).axes[0]
    assert axes.get_title() == "lung: 0.42"
    assert any(line.get_xdata() == [0.42, 0.42] for line in axes.lines if len(line.get_xdata()) == 2)


def test_validation_images_are_drawn_with_overlapping_and_exclusive_classes():
    images = np.zeros((5, 32, 32, 1), np.float32)
    codes = np.zeros((5, 32, 32), np.uint8)
    codes[:, :8, :8], codes[:, 20:, 20:] = 3, UNLABELLED
    p = np.zeros((5, 32, 32, 2), np.float32)
    p[:, :8, :8] = 0.7
    overlapping = figures.validation_gallery(images, codes, p, Classes(("a", "b"), (1, 2), True), 7)
    assert "step 7" in texts(overlapping)
    assert len(contours_in(overlapping.axes[0])) == 4  # both classes hold code 3
    exclusive = figures.validation_gallery(images, codes, p[..., [0, 0, 1]], Classes(("a", "b", "c"), (1, 2, 3)), 7)
    assert len(contours_in(exclusive.axes[0])) == 4  # class 3 is true, all three are predicted
