"""Landmark figures hold what they say, and overlays show marks where the points are."""

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.text import Text
from PIL import Image
from references.pictures import ink
from scipy.stats import chi2

from pulmo_jax.evaluation import landmark_metrics as metrics
from pulmo_jax.reporting import figures
from pulmo_jax.tasks.landmarks import figures as landmarks

pytestmark = pytest.mark.draws
RNG = np.random.default_rng(0)
N, K = 12, 6


def example(size=(60, 80), channels=None, **changes):
    points = np.array([[10.0, 20], [30, 60], [50, 40], [5, 5], [40, 10], [20, 70]])
    shape = size if channels is None else (*size, channels)
    content = {
        "title": "odd_$name.png",
        "image": np.full(shape, 90, np.uint8),
        "points": points * np.array(size) / (60, 80),
        "covariance": np.tile(np.array([[4.0, 1], [1, 2]]), (K, 1, 1)),
        "truth": points + 2,
        "doubtful": np.arange(K) == 3,
    }
    return landmarks.LandmarkExample(**content | changes)


def texts(figure):
    return " | ".join(artist.get_text() for artist in figure.findobj(Text))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_ellipses_are_the_border_of_the_region_that_holds_95_percent():
    shown = example()
    border = landmarks.ellipses(shown.points, shown.covariance) - shown.points[:, None]
    squared = np.einsum("kei,kij,kej->ke", border, np.linalg.inv(shown.covariance), border)
    np.testing.assert_allclose(squared, chi2.ppf(0.95, 2))


@pytest.mark.parametrize(
    "shown",
    [
        example(),
        example(channels=3),
        example(covariance=None, truth=None, doubtful=None),
        example(truth=np.full((K, 2), np.nan), doubtful=np.ones(K, bool)),
    ],
)
def test_gallery_and_overlay_of_any_example(tmp_path, shown):
    figure = landmarks.gallery([shown] * 5, "Worst images")
    assert ink(figures.save(figure, tmp_path, "gallery")) > 0.1
    assert "Worst images" in texts(figure)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("predicted, low quality" in legend) == (shown.doubtful is not None)
    assert ("95 % region" in legend) == (shown.covariance is not None)
    landmarks.write_overlay(tmp_path / "overlay.png", shown)
    assert pixels(tmp_path / "overlay.png").shape == (60 * 7, 80 * 7, 3)


def test_gallery_draws_every_ellipse_about_its_point():
    shown = example()
    (axes, *_) = landmarks.gallery([shown], "One").axes
    (regions,) = axes.findobj(PolyCollection)
    centres = np.array([path.vertices[:-1].mean(0) for path in regions.get_paths()])
    np.testing.assert_allclose(centres, shown.points[:, ::-1], atol=1e-6)


def test_overlay_marks_the_pixels_of_the_points(tmp_path):
    plain = example(covariance=None, truth=None)
    landmarks.write_overlay(tmp_path / "overlay.png", plain)
    picture = pixels(tmp_path / "overlay.png")
    places = np.rint((plain.points + 0.5) * 7 - 0.5).astype(int)
    found = picture[tuple(places.T)]
    orange, vermillion = (
        np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (figures.ORANGE, figures.VERMILLION)
    )
    np.testing.assert_array_equal(found, np.where(plain.doubtful[:, None], vermillion, orange))
    assert (picture[200, 0] == 90).all()  # far from any mark the image is as it was


def test_overlay_of_a_large_image_is_thinned_out_and_of_points_outside_whole(tmp_path):
    shown = example(size=(3000, 4200))
    outside = example(size=(3000, 4200), points=shown.points - 500, truth=None)
    for number, one in enumerate((shown, outside)):
        landmarks.write_overlay(tmp_path / f"{number}.png", one)
        assert max(pixels(tmp_path / f"{number}.png").shape) <= 2048
    step = 3
    found = pixels(tmp_path / "0.png")[tuple(np.rint((shown.points[0] + 0.5) / step - 0.5).astype(int))]
    assert found.tolist() == [230, 159, 0]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0.png", "1.png"]


def test_shapes_are_shown_as_given_and_laid_over_each_other(tmp_path):
    given = RNG.uniform(0, 100, (N, K, 2))
    aligned = given / 100 - 0.5
    figure = landmarks.shape_clouds(given, aligned, aligned.mean(0))
    figures.save(figure, tmp_path, "shapes")
    for axes, points in zip(figure.axes, (given, aligned), strict=True):
        for k, line in enumerate(axes.get_lines()[:K]):
            np.testing.assert_array_equal(np.stack([line.get_ydata(), line.get_xdata()], -1), points[:, k])
    np.testing.assert_array_equal(figure.axes[1].get_lines()[K].get_xdata(), aligned.mean(0)[:, 1])


def test_cumulative_curves_hold_the_shares(tmp_path):
    errors = {
        name: metrics.cumulative_error(RNG.gamma(2, s, (N, K)))[0] for name, s in (("net", 1), ("mean $ shape", 3))
    }
    figure = landmarks.cumulative_errors(errors, "px")
    figures.save(figure, tmp_path, "curve")
    line = figure.axes[0].get_lines()[0]
    for x, y in zip(line.get_xdata()[::9], line.get_ydata()[::9], strict=True):
        assert y == pytest.approx(np.mean(errors["net"] <= x))
    assert f"net, median {np.median(errors['net']):.3g}" in texts(figure)
    alone = landmarks.cumulative_errors({"alone": errors["net"]}, "px")
    np.testing.assert_array_equal(alone.axes[0].get_lines()[0].get_ydata(), line.get_ydata())


def by_class(errors, labels, replicates):
    of = np.array(labels)
    return {name: metrics.error_figures(errors[of == name], replicates) for name in sorted(set(labels))}


def test_boxes_by_landmark_and_class_hold_medians_and_means(tmp_path):
    errors = RNG.gamma(2, size=(N, K))
    errors[:, 2] = np.nan
    figure = landmarks.error_by_landmark(
        errors, [metrics.error_figures(column[:, None], 50) for column in errors.T], "px"
    )
    figures.save(figure, tmp_path, "landmarks")
    lines = [np.unique(line.get_ydata()) for line in figure.axes[0].get_lines()]
    horizontal = [y[0] for y in lines if y.size == 1]
    for column in np.delete(errors, 2, axis=1).T:
        assert np.isclose(horizontal, np.median(column)).any()
    labels = ["Normal"] * 8 + ["COVID_$1"] * 4
    known = np.delete(errors, 2, axis=1)
    of_image = {name: known[np.array(labels) == name].mean(1) for name in set(labels)}
    figure = landmarks.class_comparison(of_image, by_class(known, labels, 50), "px")
    figures.save(figure, tmp_path, "classes")
    assert "8 images" in texts(figure)


def test_class_of_one_image_is_drawn_without_interval(tmp_path):
    errors = np.array([[1.0, 2], [3, 4], [9, 9]])
    labels = ["a", "a", "b"]
    of_image = {"a": errors[:2].mean(1), "b": errors[2:].mean(1)}
    figure = landmarks.class_comparison(of_image, by_class(errors, labels, 20), "px")
    assert ink(figures.save(figure, tmp_path, "one")) > 0.01  # drawn, which sets the labels
    assert "2 images" in texts(figure)
    assert "1 image" in texts(figure)


def test_coverage_figure_holds_the_shares(tmp_path):
    nominal = np.array([0.1, 0.5, 0.68, 0.95])
    observed = metrics.coverage(RNG.chisquare(2, (N, K)), nominal.tolist(), 50)
    figure = landmarks.coverage_calibration(nominal, observed)
    figures.save(figure, tmp_path, "coverage")
    drawn = next(line for line in figure.axes[0].get_lines() if line.get_label() == "landmarks")
    np.testing.assert_allclose(drawn.get_ydata(), [estimate.value for estimate in observed])
    single = metrics.coverage(RNG.chisquare(2, (1, K)), nominal.tolist(), 50)
    figure = landmarks.coverage_calibration(nominal, single, "One $ image")
    assert "One $ image" in texts(figure).replace("\\$", "$")
    assert ink(figures.save(figure, tmp_path, "single")) > 0.01
