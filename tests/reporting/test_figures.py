"""Figures hold what they say, and come as PNG and PDF."""

import numpy as np
import pytest
from PIL import Image

from pulmo_jax.reporting import figures
from pulmo_jax.reporting.callbacks import patch_grid
from pulmo_jax.reporting.examples import Example, reconstructions, score_maps, view

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
    found = figure.findobj(lambda artist: type(artist).__name__ == "Text")
    return " | ".join(artist.get_text() for artist in found)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("truth", [True, False])
def test_score_maps_of_any_bands_with_and_without_truth(tmp_path, channels, truth):
    figure = score_maps([view(example(channels, truth)), view(example(channels, truth))], "Worst misses")
    figures.save(figure, tmp_path, "maps")
    assert "Worst misses" in texts(figure)
    assert "threshold" in texts(figure)


def test_score_maps_of_one_tiny_image(tmp_path):
    assert figures.save(score_maps([view(example(size=(9, 9), foreground=False))], "One"), tmp_path, "one").exists()


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


def test_false_alarm_figure_draws_observed_against_nominal():
    nominal = np.array([1e-3, 1e-2, 1e-1])
    figure = figures.p_value_calibration(nominal, nominal * 2, nominal, nominal * 3)
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == 3]
    np.testing.assert_allclose(drawn[0], nominal * 2)


def test_figures_are_written_as_png_and_pdf_with_embedded_fonts(tmp_path):
    path = figures.save(
        patch_grid(RNG.random((3, 8, 8, 1)), RNG.random((3, 8, 8, 1)), "step 5"), tmp_path / "f", "grid"
    )
    with Image.open(path) as image:
        assert image.format == "PNG"
    pdf = path.with_suffix(".pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf  # TrueType, embedded
    assert sorted(p.name for p in path.parent.iterdir()) == ["grid.pdf", "grid.png"]
