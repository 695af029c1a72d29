"""Figures of classified images hold what they say, and overlays have the sizes and pixels that they should."""

from typing import NamedTuple

import numpy as np
import pytest
from matplotlib.cbook import STEP_LOOKUP_MAP
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from pulmo_jax.evaluation.metrics import Estimate
from pulmo_jax.reporting import figures
from pulmo_jax.tasks.classification import figures as classes

pytestmark = pytest.mark.draws
N = 60


class Bins(NamedTuple):
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    low: np.ndarray
    high: np.ndarray


def predictions(repeats, missing=0, digits=2):
    """Labels, and scores with ties."""
    rng = np.random.default_rng(0)
    labels = (np.arange(N) % 3 == 0).astype(int)
    scores = (labels + rng.normal(size=(repeats, N))).round(digits)
    for row in scores:
        row[rng.choice(N, missing, replace=False)] = np.nan
    return labels, scores


def example(size=(60, 80), title="odd_$name.png", note="true: yes, predicted: $no$ (0.83)"):
    saliency = np.zeros(size)
    saliency[: size[0] // 2] = 0.02
    return classes.ClassExample(title, np.full(size, 90, np.uint8), saliency, note)


def texts(where):
    return [artist.get_text() for artist in where.findobj(Text) if artist.get_text()]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(("repeats", "missing", "digits"), [(1, 0, 8), (1, 0, 0), (5, 0, 1), (4, 11, 8), (3, 20, 1)])
def test_the_areas_under_mean_curves_are_the_mean_areas(repeats, missing, digits):
    labels, scores = predictions(repeats, missing, digits)
    figure = classes.roc_curves({"net": (labels, scores)}, "tumour $")
    figure.draw_without_rendering()
    pairs = [(labels[~np.isnan(row)], row[~np.isnan(row)]) for row in scores]
    roc, pr = (axes.lines[0] for axes in figure.axes)
    mean_auroc = np.mean([roc_auc_score(*pair) for pair in pairs])
    assert np.trapezoid(roc.get_ydata(), roc.get_xdata()) == pytest.approx(mean_auroc)
    mean_ap = np.mean([average_precision_score(*pair) for pair in pairs])
    recall, precision = pr.get_data()
    assert pr.get_drawstyle() == "steps-pre"
    assert np.diff(recall) @ precision[1:] == pytest.approx(mean_ap)
    assert (roc.get_label(), pr.get_label()) == (f"net, AUROC {mean_auroc:.3f}", f"net, AP {mean_ap:.3f}")
    assert r"Positive class: tumour \$" in texts(figure)


def slow_rates(labels, scores):
    """False-positive rates half-way between steps and true-positive rates; such recalls and precisions: by counting."""
    positive, negative = (np.sort(scores[labels == kind])[::-1] for kind in (1, 0))
    roc = [((k + 0.5) / negative.size, np.mean(positive > score)) for k, score in enumerate(negative)]
    hits = np.arange(1, positive.size + 1)
    precision = [k / (k + np.sum(negative >= score)) for k, score in zip(hits, positive, strict=True)]
    return np.array(roc).T, np.array([(hits - 0.5) / positive.size, precision])


def test_band_of_the_first_method_runs_from_the_lowest_to_the_highest_repeat():
    labels, scores = predictions(5, digits=8)
    figure = classes.roc_curves({"net": (labels, scores), "metadata": (labels, scores[:2])}, "yes")
    by_panel = zip(*(slow_rates(labels, row) for row in scores), strict=True)
    for axes, rates in zip(figure.axes, by_panel, strict=True):
        (band,) = axes.findobj(FillBetweenPolyCollection)
        assert band.get_label() == "lowest to highest of 5 repeats"
        assert band.get_label() in [text.get_text() for text in axes.get_legend().get_texts()]
        lower, upper = np.split(band.get_paths()[0].vertices[:-1], 2)  # there and back
        x, values = rates[0][0], np.array([y for _, y in rates])
        np.testing.assert_allclose(np.interp(x, *lower[1:].T), values.min(0))
        np.testing.assert_allclose(np.interp(x, *upper[:0:-1].T), values.max(0))
        drawn_x, drawn_y = axes.lines[0].get_data()
        steps = STEP_LOOKUP_MAP[axes.lines[0].get_drawstyle()](drawn_x, drawn_y)
        np.testing.assert_allclose(np.interp(x, *steps), values.mean(0))
    net, metadata = figure.axes[0].lines[:2]
    assert (net.get_linestyle(), metadata.get_linestyle()) == ("-", "--")
    assert net.get_linewidth() > metadata.get_linewidth()


def test_one_repeat_has_no_band_and_one_class_no_curve():
    labels, scores = predictions(2)
    scores[0, labels == 1] = np.nan
    one = classes.roc_curves({"net": (labels, scores), "none": (labels, scores[:1])}, "yes")
    one.draw_without_rendering()
    assert not one.findobj(FillBetweenPolyCollection)
    net, none = one.axes[0].lines[:2]
    assert net.get_label() == f"net, AUROC {roc_auc_score(labels, scores[1]):.3f}"
    assert none.get_label() == "none: undefined"
    assert np.isnan(none.get_ydata()).all()
    nothing = classes.roc_curves({"none": (labels, scores[:1])}, "yes")
    nothing.draw_without_rendering()


def test_curves_of_many_images_have_a_bounded_number_of_points():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 20_000)
    scores = labels + rng.normal(size=(2, labels.size))
    figure = classes.roc_curves({"net": (labels, scores)}, "yes")
    roc, pr = (axes.lines[0] for axes in figure.axes)
    assert max(roc.get_xdata().size / 2, pr.get_xdata().size) <= classes.MOST_POINTS
    auroc = np.mean([roc_auc_score(labels, row) for row in scores])
    assert np.trapezoid(roc.get_ydata(), roc.get_xdata()) == pytest.approx(auroc, abs=1e-3)


def test_reliability_diagram_holds_the_bins_that_are_not_empty():
    none = np.nan
    bins = Bins(
        np.array([none, 0.55, 0.75, 1.0]),
        np.array([none, 0.0, 0.7, 1.0]),
        np.array([0, 1, 30, 200]),
        np.array([none, 0.0, 0.5, 0.98]),
        np.array([none, 0.8, 0.8, 1.0 - 1e-12]),  # as intervals round
    )
    figure = classes.reliability_diagram({"as trained": (bins, 0.0456), "scaled by $T$": (bins, 0.01)})
    figure.draw_without_rendering()
    upper, lower = figure.axes
    containers = [container for container in upper.containers if container.has_yerr]
    (line, _, (bars,)) = containers[0].lines
    np.testing.assert_array_equal(line.get_xdata(), bins.confidence[1:])
    np.testing.assert_array_equal(line.get_ydata(), bins.accuracy[1:])
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, np.stack([bins.low, bins.high], 1)[1:])
    assert [container.get_label() for container in containers] == [
        "as trained, ECE 0.046",
        r"scaled by \$T\$, ECE 0.010",
    ]
    for stairs in lower.patches:
        np.testing.assert_array_equal(stairs.get_data().values, bins.count)
        np.testing.assert_array_equal(stairs.get_data().edges, [0, 0.25, 0.5, 0.75, 1])


def test_reliability_without_any_image_is_drawn():
    none = np.full(3, np.nan)
    empty = Bins(none, none, np.zeros(3, int), none, none)
    figure = classes.reliability_diagram({"none": (empty, np.nan)})
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["perfectly calibrated", "none, ECE nan"]
    assert all(bar.get_segments() == [] for bar in figure.axes[0].collections)


def test_every_cell_of_a_confusion_matrix_holds_its_number_and_its_share_of_the_row():
    counts = np.array([[1200, 300.0], [2.5, 7.5]])
    axes = classes.confusion_matrix(counts, ["no", "yes_$"]).axes[0]
    cells = {text.get_position(): text for text in axes.texts}
    assert {place: text.get_text() for place, text in cells.items()} == {
        (0, 0): "1,200\n80%",
        (1, 0): "300\n20%",
        (0, 1): "2.5\n25%",
        (1, 1): "7.5\n75%",
    }
    assert [cells[x, 0].get_color() for x in (0, 1)] == ["white", "black"]
    np.testing.assert_allclose(axes.collections[0].get_array(), [[0.8, 0.2], [0.25, 0.75]])
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["no", r"yes_\$"]


@pytest.mark.parametrize("k", [1, 3, 12])
def test_texts_of_many_classes_stay_in_their_cells_and_a_missing_class_has_no_shares(k):
    counts = np.full((k, k), 888.0)
    counts[-1] = 0
    figure = classes.confusion_matrix(counts, [f"a_class_with_a_long_name_{i}" for i in range(k)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts[-k:]] == ["0"] * k
    cell = axes.get_window_extent().width / k
    assert max(text.get_window_extent().width for text in axes.texts) < 0.9 * cell
    assert max(text.get_window_extent().height for text in axes.texts) < 0.9 * cell
    assert figure.get_figwidth() <= figures.TEXT_WIDTH_IN


def test_gallery_of_validation_images_says_what_the_network_says_and_what_is_true():
    images = np.random.default_rng(0).random((5, 12, 12), np.float32)
    probabilities = np.array([[0.9, 0.1], [0.25, 0.75], [0.4, 0.6], [0.5, 0.5], [1, 0]], np.float32)
    figure = classes.validation_gallery(images, probabilities, np.array([0, 1, 0, 1, 0]), ["no", "a $1 tumour_$"], 250)
    figure.draw_without_rendering()
    assert "Validation images, step 250" in texts(figure)
    shown = [axes for axes in figure.axes if axes.images]
    np.testing.assert_array_equal([axes.images[0].get_array() for axes in shown], images)
    assert shown[0].get_title() == "no 0.90, is no"
    assert shown[2].get_title().replace("\\", "") == "a $1 tumour_$ 0.60, is no"
    assert not any(axes.axison for axes in figure.axes)


def test_comparison_has_a_dot_and_an_interval_for_every_estimate():
    rows = {
        "classifier, split by group": {"auroc": Estimate(0.91, 0.87, 0.95), "balanced_accuracy": Estimate(0.8)},
        "file_$metadata": {"auroc": Estimate(None, reason="one class"), "balanced_accuracy": Estimate(0.7, 0.6, 0.75)},
        "a very long name of what was compared with it, in a table": {"auroc": Estimate(0.5, 0.5, 0.5)},
    }
    figure = classes.comparison(rows, ["auroc", "balanced_accuracy"])
    figure.draw_without_rendering()
    auroc, accuracy = figure.axes
    assert (auroc.get_xlabel(), accuracy.get_xlabel()) == ("AUROC", "balanced accuracy")
    drawn = [[tuple(np.array(line.get_data()).T.ravel()) for line in axes.lines] for axes in (auroc, accuracy)]
    assert drawn[0] == [(0.87, 0, 0.95, 0), (0.91, 0), (0.5, 2, 0.5, 2), (0.5, 2)]
    assert drawn[1] == [(0.8, 0, 0.8, 0), (0.8, 0), (0.6, 1, 0.75, 1), (0.7, 1)]
    assert [text.get_text() for text in auroc.texts] == ["0.910", "undefined", "0.500"]
    assert [text.get_text() for text in accuracy.texts] == ["0.800", "0.700", "undefined"]
    assert [label.get_text().replace("\n", " ") for label in auroc.get_yticklabels()][:2] == [
        "classifier, split by group",
        r"file_\$metadata",
    ]
    assert auroc.yaxis_inverted()


@pytest.mark.parametrize(("n", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_comparison_of_many_figures_goes_over_lines(n, shape):
    names = [f"figure_{i}" for i in range(n)]
    figure = classes.comparison({"a": dict.fromkeys(names, Estimate(0.5)), "b": {}}, names)
    figure.draw_without_rendering()
    assert len(figure.axes) == n
    grid = figure.axes[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == shape


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((128, 128), (384, 384)),
        ((200, 150), (400, 300)),
        ((384, 500), (384, 500)),
        ((1024, 700), (1024, 700)),
        ((150, 400), (300, 800)),  # no side above 1024
        ((2048, 1000), (1024, 500)),
        ((4, 5000), (1, 1024)),
        ((1, 1), (384, 384)),
    ],
)
def test_pairs_are_large_enough_to_see_and_small_enough_to_keep(size, shown):
    pair = classes.beside_saliency(np.full(size, 90, np.uint8), np.zeros(size))
    assert pair.shape == (shown[0], 2 * shown[1] + classes.GAP_PX, 3)
    assert (pair[:, : shown[1]] == 90).all()
    assert (pair[:, -shown[1] :] == 90).all()  # no saliency anywhere


def test_saliency_colours_its_place_and_nothing_else():
    image = np.random.default_rng(0).integers(0, 256, (400, 400), dtype=np.uint8)
    saliency = np.full((400, 400), 1e-5)
    saliency[100:200, 50:100] = 3e-4
    saliency[0, 0] = np.nan
    pair = classes.beside_saliency(image, saliency)
    left, right = pair[:, :400], pair[:, -400:].astype(int)
    np.testing.assert_array_equal(left, np.repeat(image[..., None], 3, -1))
    hot = saliency > 1e-4
    np.testing.assert_array_equal(right[~hot], left[~hot])
    shade = 0.75 * classes.SHADES[-1]
    np.testing.assert_allclose(right[hot], 0.25 * left[hot].astype(float) + shade, atol=0.51)
    np.testing.assert_array_equal(pair, classes.beside_saliency(image, saliency.astype(np.float32) * 1000))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_gallery_shows_each_pair_with_its_title_and_note(n):
    examples = [example((60, 80 + i), title=f"{i}_$" + "long_" * 30) for i in range(n)]
    figure = classes.saliency_gallery(examples, "Worst $ mistakes")
    figure.draw_without_rendering()
    assert r"Worst \$ mistakes" in texts(figure)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == n
    for i, (axes, one) in enumerate(zip(shown, examples, strict=True)):
        pair = classes.beside_saliency(one.image, one.saliency)
        np.testing.assert_array_equal(axes.images[0].get_array(), pair)
        assert axes.get_title() == figures.literal(one.title, 48)
        assert axes.get_title().startswith(rf"{i}_\$long")
        assert axes.get_xlabel() == r"true: yes, predicted: \$no\$ (0.83)"
    assert {"none", "most of the image"} <= set(texts(figure))


def test_texts_of_a_gallery_do_not_overlap():
    figure = classes.saliency_gallery([example((60 + 30 * i, 80), title="long_" * 30) for i in range(4)], "Four")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_overlay_is_the_pair_above_its_text(tmp_path):
    one = example((400, 300))
    path = tmp_path / "folder" / "overlay.png"
    classes.write_saliency_overlay(path, one.image, one.saliency, ["$x_1$ 肺.png", "yes 0.93"])
    picture = pixels(path)
    pair = classes.beside_saliency(one.image, one.saliency)
    height, width = pair.shape[:2]
    np.testing.assert_array_equal(picture[:height, :width], pair)
    assert picture.shape[1] == 768
    strip = picture[height:]
    assert 40 < len(strip) < 70
    dark = np.flatnonzero((strip < 100).all(-1).any(1))
    assert dark.min() > 0
    assert dark.max() < len(strip) - 1
    assert [child.name for child in path.parent.iterdir()] == ["overlay.png"]


def test_lines_of_text_stay_in_the_picture_whatever_is_in_them(tmp_path):
    one = example((128, 128))
    path = tmp_path / "overlay.png"
    classes.write_saliency_overlay(path, one.image, one.saliency, ["W" * 300, "two\nlines", "", "\udcff"])
    strip = pixels(path)[384:]
    assert (strip[:, -4:] == 255).all()
    dark = (strip < 100).all(-1)
    assert np.flatnonzero(dark.any(0)).max() > 0.9 * strip.shape[1]
    classes.write_saliency_overlay(path, one.image, one.saliency, [])
    assert pixels(path).shape == (384, 2 * 384 + classes.GAP_PX, 3)
