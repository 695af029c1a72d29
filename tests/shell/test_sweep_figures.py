"""Every measure against every swept key."""

import numpy as np
import pytest

from pulmo_jax.shell.sweep_figures import axis_of, layout, series_of, sweep_figure

LATENT = ["16", "16", "256", "256"]
SEED = ["0", "1", "0", "1"]


def lines_with_errors(axes):
    return [container for container in axes.containers if container.has_yerr]


def test_means_and_standard_deviations_over_seeds():
    figure = sweep_figure({"model.latent": LATENT, "seed": SEED}, {"objective": [1.0, 3.0, 5.0, 6.0]})
    [axes] = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("model.latent", "objective")
    [bars] = lines_with_errors(axes)
    np.testing.assert_allclose(bars.lines[0].get_xydata(), [[16, 2], [256, 5.5]])
    spans = [segment[1, 1] - segment[0, 1] for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(spans, [2 * np.sqrt(2), 2 * np.sqrt(0.5)])
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["16", "256"]


def test_best_job_and_failed_ones_are_marked():
    figure = sweep_figure({"model.latent": LATENT, "seed": SEED}, {"objective": [1.0, None, 0.5, 6.0]})
    marks = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(marks["lowest"].get_xydata(), [[256, 0.5]])
    np.testing.assert_allclose(marks["not finished"].get_xdata(), [16])


def test_other_keys_are_lines_of_their_own_and_the_seed_is_none():
    swept = {"a.x": ["1", "1", "2", "2"], "b.y": ["u", "v", "u", "v"], "seed": ["0"] * 4}
    assert series_of("a.x", swept) == ["y=u", "y=v", "y=u", "y=v"]
    figure = sweep_figure(swept, {"objective": [1.0, 2.0, 3.0, 4.0], "image AUROC": [0.5, 0.6, 0.7, None]})
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        ("a.x", "objective"), ("b.y", "objective"), ("a.x", "image AUROC"), ("b.y", "image AUROC"),
    ]  # fmt: skip
    assert [len(lines_with_errors(axes)) for axes in figure.axes] == [2, 2, 2, 2]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["lowest", "y=u", "y=v"]


def test_search_over_numbers_has_dots_alone():
    rng = np.random.default_rng(0)
    swept = {key: [repr(float(v)) for v in rng.uniform(0.1, 0.3, 20)] for key in ("a", "b")}
    figure = sweep_figure(swept, {"objective": list(rng.normal(size=20))})
    assert [len(lines_with_errors(axes)) for axes in figure.axes] == [0, 0]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [float(v) for v in swept["a"]])


def test_seeds_alone_have_a_mean_and_a_band():
    figure = sweep_figure({"seed": ["0", "1", "2"]}, {"objective": [1.0, 2.0, None]})
    [axes] = figure.axes
    assert axes.get_xlabel() == "seed"
    assert any(np.allclose(line.get_ydata(), 1.5) and len(line.get_ydata()) == 2 for line in axes.lines)


@pytest.mark.parametrize(
    ("values", "x", "log"),
    [(["1", "8"], [1, 8], True), (["1", "4"], [1, 4], False), (["0", "8"], [0, 8], False),
     (["b", "a", "b"], [0, 1, 0], False), (["null", "3"], [0, 1], False)],
)  # fmt: skip
def test_axis_is_of_numbers_where_all_are(values, x, log):
    axis = axis_of("key", values)
    assert (axis.x, axis.log) == (x, log)


def test_layout_stays_within_the_page():
    panels = [(name, key) for name in "mno" for key in "abcde"]
    assert [len(line) for line in layout(panels, 5)] == [4, 1, 4, 1, 4, 1]
    assert [len(line) for line in layout([(name, "a") for name in "mnopq"], 1)] == [3, 2]
    assert max(figure_width(2), figure_width(5)) <= 7.01


def figure_width(keys):
    swept = {f"key{i}": ["1", "2"] for i in range(keys)}
    return sweep_figure(swept, {"objective": [1.0, 2.0]}).get_size_inches()[0]
