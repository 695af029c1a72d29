"""Figures hold what they say, and come as PNG and PDF."""

import dataclasses
import html

import matplotlib
import numpy as np
import pytest
from matplotlib.contour import ContourSet
from PIL import Image
from references.pictures import ink
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from pulmo_jax.host.console import printable
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.notebook import figure_html
from pulmo_jax.tasks.anomalies.figures import DETECTED, TRUTH, Example, patch_grid, reconstructions, score_maps, view
from pulmo_jax.tasks.anomalies.units import Intensity

pytestmark = pytest.mark.draws
RNG = np.random.default_rng(0)


def example(channels=1, truth=True, foreground=True, size=(40, 56), title="image_$1.tif"):
    image = RNG.random((*size, channels), np.float32)
    score = RNG.random(size, np.float32)
    if foreground:
        score[:, :8] = np.nan
    mask = np.zeros(size, bool)
    mask[10:20, 20:30] = True
    return Example(title, image, image * 0.9, score, mask if truth else None, score > 0.9, 0.7, 0.9, truth or None)


def texts(figure):
    found = figure.findobj(matplotlib.text.Text)
    return " | ".join(artist.get_text() for artist in found)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_score_maps_of_any_bands_with_and_without_truth(tmp_path, channels):
    figure = score_maps([view(example(channels, truth)) for truth in (True, False)], "Worst misses")
    figures.save(figure, tmp_path, "maps")
    assert "Worst misses" in texts(figure)
    assert "threshold" in texts(figure)


def test_score_maps_of_one_tiny_image(tmp_path):
    figure = score_maps([view(example(size=(9, 9), foreground=False))], "One")
    assert [axes.images[0].get_array().shape[:2] for axes in figure.axes[:4]] == [(9, 9), (5, 5)] * 2
    assert ink(figures.save(figure, tmp_path, "one")) > 0.1


def test_every_example_is_a_row_of_aligned_panels_however_long_its_name():
    views = [view(example(3, size=size, title="long_" * 30)) for size in ((40, 56), (20, 56))]
    figure = score_maps(views, "Mixed shapes")
    figure.draw_without_rendering()
    boxes = np.array([axes.get_position().bounds for axes in figure.axes[:8]]).reshape(2, 4, 4)
    width = boxes[0, 0, 2]
    np.testing.assert_allclose(boxes[:, :, 2], width, rtol=1e-3)
    np.testing.assert_allclose(np.diff(boxes[:, :, 0], axis=1), width, rtol=0.05)  # side by side
    np.testing.assert_allclose(np.ptp(boxes[:, :, 1], axis=1), 0, atol=1e-6)  # on one line
    assert width > 0.23


def test_contours_run_along_the_edges_of_truth_and_detections():
    shown = example()
    shown.detected[:] = False
    shown.detected[25:31, 0:12] = True  # up to the image's edge
    whole, detail, whole_score, detail_score = score_maps([view(shown)], "Contours").axes[:4]

    def outlines(axes):
        sets = axes.findobj(ContourSet)
        return {matplotlib.colors.to_hex(c.get_edgecolor()[0]): c.get_paths()[0].get_extents().bounds for c in sets}

    assert outlines(whole) == {
        TRUTH.lower(): pytest.approx((19.5, 9.5, 10, 10)),
        DETECTED.lower(): pytest.approx((-0.5, 24.5, 12, 6)),
    }
    assert set(outlines(whole_score)) == set(outlines(detail_score)) == {TRUTH.lower()}
    assert TRUTH.lower() in outlines(detail)


def test_scores_share_one_scale_that_marks_the_threshold():
    figure = score_maps([view(example()), view(example(size=(30, 30)))], "Scale")
    images = [axes.images[0] for i in (2, 3, 6, 7) for axes in [figure.axes[i]]]
    np.testing.assert_allclose([image.get_clim() for image in images], [(0, 2.7)] * 4)
    marks = [line.get_xdata() for axes in figure.axes for line in axes.findobj(matplotlib.lines.Line2D)
             if line.get_marker() == "v"]  # fmt: skip
    assert [list(mark) for mark in marks] == [[0.9]]


def test_a_map_without_any_score_is_drawn(tmp_path):
    empty = example()
    empty.score[:] = np.nan
    empty.detected[:] = False
    maps, pairs = score_maps([view(empty)], "Nothing scored"), reconstructions([view(empty)])
    assert all(np.ma.getmaskarray(axes.images[0].get_array()).all() for axes in maps.axes[2:4])
    assert ink(figures.save(maps, tmp_path, "empty")) > 0.1
    assert ink(figures.save(pairs, tmp_path, "empty_pairs")) > 0.1


def test_difference_is_signed_on_symmetric_limits():
    left, middle, right = reconstructions([view(example())]).axes[:3]
    image, rebuilt, difference = (axes.images[0].get_array() for axes in (left, middle, right))
    np.testing.assert_allclose(difference[:, 8:], (image - rebuilt)[:, 8:], atol=1e-6)
    assert difference.mask[:, :8].all()
    assert right.images[0].norm.vmin == -right.images[0].norm.vmax


def test_detail_shows_the_truth_else_the_highest_score():
    score = RNG.random((400, 600)).astype(np.float32)
    score[300, 500] = 2
    truth = np.zeros((400, 600), bool)
    truth[5:9, 5:9] = True
    image = RNG.random((400, 600, 1), np.float32)
    for mask, (y, x) in ((truth, (7, 7)), (None, (300, 500))):
        window = view(Example("", image, None, score, mask, score > 1.5, 2.0, 1.5, None)).window
        assert window.y <= y < window.y + window.height
        assert window.x <= x < window.x + window.width
        assert window.height < 100


def test_any_file_name_is_drawn_as_it_is(tmp_path):
    names = ("a$b$c_^{.tif", "$", "肺_结节.tif")  # TeX to matplotlib; glyphs that its font lacks
    figure = reconstructions([view(example(title=name)) for name in names])
    figures.save(figure, tmp_path, "names")
    for name in names:
        assert name in texts(figure).replace(r"\$", "$")


def test_settings_of_matplotlib_stay_as_they_were(tmp_path):
    before = dict(matplotlib.rcParams)
    figures.save(score_maps([view(example())], "Settings"), tmp_path, "settings")
    assert dict(matplotlib.rcParams) == before


def test_reconstructions_show_image_output_and_difference(tmp_path):
    figure = reconstructions([view(example())])
    figures.save(figure, tmp_path, "pairs")
    for name in ("image", "reconstruction", "difference"):
        assert name in texts(figure)


def test_view_of_a_large_image_is_small():
    large = view(example(size=(3000, 2500)))
    assert max(large.whole.image.shape) <= 1024
    assert large.whole.truth.any()  # what is small is kept when shrunk


def test_loss_curves_draw_every_logged_number():
    rows = [{"step": s, "train/loss": 1 / s, **({"val/loss": 2 / s} if s % 2 == 0 else {})} for s in range(1, 9)]
    axes = figures.loss_curves(rows).axes[0]
    drawn = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) > 1}
    assert drawn[tuple(range(1, 9))] == pytest.approx([1 / s for s in range(1, 9)])
    assert drawn[(2, 4, 6, 8)] == pytest.approx([2 / s for s in (2, 4, 6, 8)])


@pytest.mark.parametrize("interval", [None, (0.8, 1.3)])
def test_histogram_marks_the_threshold(interval):
    normal, abnormal = RNG.random(50) + 0.1, RNG.random(20) + 1
    figure = figures.score_histogram(normal, abnormal, 1.1, interval, "image")
    lines = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert 1.1 in [pytest.approx(x) for x in lines]
    assert "50 images" in texts(figure)
    assert ("95 %" in texts(figure)) == (interval is not None)


def test_histogram_of_counted_scores_equals_that_of_the_scores():
    scores = np.array([0.2, 0.2, 0.5, 0.9])
    counted = (np.array([0.2, 0.5, 0.9]), np.array([2.0, 1.0, 1.0]))
    values = [
        figures.score_histogram(s, None, 0.6, None, "pixel").axes[0].patches[0].get_data().values
        for s in (scores, counted)
    ]
    np.testing.assert_allclose(*values)
    assert values[0].sum() == pytest.approx(1)


def test_histogram_counts_every_score_on_a_bounded_axis():
    scores = np.geomspace(1e-12, 1, 2000)
    axes = figures.score_histogram(scores, None, 0.1, (0.05, 0.2), "pixel").axes[0]
    share, edges, _ = axes.patches[0].get_data()
    assert edges[-1] / edges[0] < 2e4
    assert share.sum() == pytest.approx(1)
    assert "all lower scores" in axes.get_xlabel()
    assert axes.get_xscale() == "log"


def test_histogram_of_scores_of_either_sign_is_linear():
    axes = figures.score_histogram(RNG.normal(size=30), None, 0.5, None, "image").axes[0]
    assert axes.get_xscale() == "linear"
    assert axes.patches[0].get_data().values.sum() == pytest.approx(1)


def test_few_images_are_dots_in_a_row_for_each_class():
    normal, abnormal = np.linspace(0.1, 0.4, 12), np.linspace(0.2, 2, 40)
    axes = figures.score_histogram(normal, abnormal, 0.5, (0.4, 0.6), "image").axes[0]
    dots = {line.get_marker(): line for line in axes.lines if line.get_marker() not in (None, "None")}
    for row, (marker, scores) in enumerate((("o", normal), ("D", abnormal))):
        np.testing.assert_allclose(np.sort(dots[marker].get_xdata()), scores)
        assert np.abs(dots[marker].get_ydata() - row).max() < 0.31
        assert len(set(dots[marker].get_ydata())) == scores.size  # equal scores do not hide each other
    assert [label.get_text() for label in axes.get_yticklabels()] == ["normal\n12 images", "abnormal\n40 images"]
    assert not axes.patches or all(patch.get_label().startswith("95 %") for patch in axes.patches)


@pytest.mark.parametrize("n", [30, 200])
def test_many_images_are_histograms(n):
    axes = figures.score_histogram(RNG.random(n) + 0.1, RNG.random(30) + 1, 1.1, None, "image").axes[0]
    assert "fraction of images" in axes.get_ylabel()


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("low", [1e-4, 0.6, 3e5])
@pytest.mark.parametrize("ratio", [1.0, 1.02, 1.5, 4, 6, 40, 99, 101, 1e5])
def test_tick_labels_of_losses_do_not_overlap(name, low, ratio):
    rows = [{"step": step, f"train/{name}": value, "train/loss": value, "val/loss": value}
            for step, value in enumerate(np.geomspace(low, low * ratio, 8), start=1)]  # fmt: skip
    figure = figures.loss_curves(rows)
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            inside = [tick for tick in axis.get_ticklabels("both") if tick.get_text() and tick.get_visible()]
            low_end, high_end = axis.get_view_interval()
            at = 0 if axis is axes.xaxis else 1
            inside = [tick for tick in inside if low_end <= tick.get_position()[at] <= high_end]
            boxes = [tick.get_window_extent() for tick in inside]
            assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels() if label.get_text()]
    assert labels


def test_score_maps_have_a_scale_in_mm_and_in_the_units_of_the_file():
    known = dataclasses.replace(example(truth=True), pixel_mm=(0.5, 0.5), intensity=Intensity(-1000.0, 400.0, "HU"))
    shown = texts(score_maps([view(known)], "HU"))
    assert "mm" in shown
    assert " px" not in shown
    assert "intensity / HU" in shown
    assert "image minus reconstruction / HU" in texts(reconstructions([view(known)]))
    unknown = texts(score_maps([view(example())], "unknown"))
    assert "px" in unknown
    assert "intensity (normalised)" in unknown


def test_differences_are_in_the_units_of_the_file():
    known = dataclasses.replace(example(foreground=False), intensity=Intensity(-1000.0, 400.0, "HU"))
    drawn, plain = (
        reconstructions([view(e)]).axes[2].images[0].get_array() for e in (known, example(foreground=False))
    )
    assert np.abs(drawn).max() > 100
    assert np.abs(plain).max() < 1


def test_legend_names_scores_findings_and_lesions():
    with_truth, without = (texts(score_maps([view(example(truth=truth))], "Legend")) for truth in (True, False))
    for words in ("finding: score above the pixel threshold", "window shown in detail", "not scored", "anomaly score"):
        assert words in with_truth
        assert words in without
    assert "lesion (ground truth)" in with_truth
    assert "lesion" not in without


def test_roc_and_pr_draw_curves_chance_and_operating_point():
    labels, scores = RNG.random(80) < 0.4, RNG.random(80) + 0.0
    fpr, tpr, _ = roc_curve(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores)
    curve = figures.Curve("method", fpr, tpr, precision, recall, 0.75, None, (0.2, 0.6, 0.5))
    baseline = figures.Curve("baseline", fpr, tpr, precision, recall, 0.5, 0.4)
    figure = figures.roc_and_pr([curve, baseline], "Images", 0.4)
    roc, pr = figure.axes
    assert (roc.get_xlabel(), pr.get_xlabel()) == ("false-positive rate", "recall (sensitivity)")
    lines = {line.get_label(): line for line in pr.lines}
    drawn = lines["method"]  # without an undefined AP
    np.testing.assert_array_equal(drawn.get_xdata(), recall[::-1])
    x, y = matplotlib.cbook.STEP_LOOKUP_MAP[drawn.get_drawstyle()](drawn.get_xdata(), drawn.get_ydata())
    assert np.trapezoid(y, x) == pytest.approx(average_precision_score(labels, scores))
    assert lines["baseline, AP 0.400"].get_linewidth() < drawn.get_linewidth()
    assert lines["chance (prevalence 0.4)"].get_ydata()[0] == 0.4
    assert (lines["at the threshold"].get_xdata()[0], lines["at the threshold"].get_ydata()[0]) == (0.6, 0.5)


def test_rates_that_were_not_seen_are_marked(tmp_path):
    nominal, none = np.array([1e-3, 1e-2, 1e-1]), np.full(3, np.nan)
    figure = figures.p_value_calibration(nominal, np.array([0, 0.02, 0.1]), none, none)
    figures.save(figure, tmp_path, "rates")
    assert "zero" in texts(figure)
    assert "interval" not in texts(figure)


def test_false_alarm_figure_draws_observed_against_nominal():
    nominal = np.array([1e-3, 1e-2, 1e-1])
    figure = figures.p_value_calibration(nominal, nominal * 2, nominal, nominal * 3)
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 3]
    np.testing.assert_allclose(drawn[0], nominal * 2)


def test_patches_stand_above_their_reconstructions():
    patches, rebuilt = RNG.random((3, 8, 8, 1)), RNG.random((3, 8, 8, 1)) * 3 - 1
    figure = patch_grid(patches, rebuilt, step=5)
    assert "step 5" in texts(figure)
    shown = [axes.images[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(shown[:3], patches[..., 0])
    np.testing.assert_array_equal(shown[3:], np.clip(rebuilt[..., 0], 0, 1))


def test_figures_are_written_as_png_and_pdf_with_embedded_fonts(tmp_path):
    path = figures.save(patch_grid(RNG.random((3, 8, 8, 1)), RNG.random((3, 8, 8, 1)), 5), tmp_path / "f", "grid")
    with Image.open(path) as image:
        assert image.format == "PNG"
    pdf = path.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf  # TrueType, embedded
    assert b"/Type3" not in pdf
    assert sorted(p.name for p in path.parent.iterdir()) == ["grid.pdf", "grid.png"]


NAMES = ["$x$", "$", r"\$x", "$$a", r"$\frac{", "a\nb\x00\x1b\u202e\udcff", "^_{}\\alpha", "😀 日本 \u0301", "_x", " "]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_characters_are_drawn(tmp_path, name):
    curve = figures.Curve(name, *(np.array([0.0, 1.0]),) * 4, auroc=0.5, ap=0.5)
    figure = figures.roc_and_pr([curve], name, 0.5)
    assert figures.save(figure, tmp_path, "f").stat().st_size > 1000
    assert figure_html(figure, name).endswith(f"<figcaption>{html.escape(printable(name))}</figcaption></figure>")
    assert figures.literal(name).isprintable()
    title = figure.get_suptitle()
    assert title.replace(r"\$", "$") == printable(name, keep="")
