"""The figure of detection limits: ranges, gaps, sources, units, and none of its words on another."""

import math
from functools import partial

import matplotlib
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from references.drawn import assert_words_apart, line, point_source, texts
from references.pictures import ink

from pulmo_jax.inference.contrast import Contrast
from pulmo_jax.reporting import figures
from pulmo_jax.tasks.point_sources.contrast_figure import contrast_curve
from pulmo_jax.tasks.point_sources.units import FluxScale

pytestmark = pytest.mark.draws
SCALE = 0.02719
RADIUS = np.arange(6.0, 46, 4)
PSF_UNITS = FluxScale("PSF units", None, relative=False, magnitudes=False)
STAR = np.array([2e5])
source = partial(point_source, centre=(30.0, 35.5))


def limits(**changed: np.ndarray) -> Contrast:
    ones = np.ones(RADIUS.size)
    half = changed.get("half_low", 600 / RADIUS)
    values = {
        "separation_px": RADIUS, "threshold": 5 * ones, "limit": 300 / RADIUS, "half_low": half,
        "half_high": 1e4 * half, "most_low": 1.5 * half, "most_high": 100 * half, "tested_high": 1e4 * half,
        "flux_throughput": np.linspace(0.3, 0.7, RADIUS.size), "flux_throughput_std": 0.05 * ones, "n": 8 * ones,
    }  # fmt: skip
    return Contrast(**(values | changed))


def drawn(contrast=None, sources=(), fluxes=PSF_UNITS, pixel_scale=SCALE, **options):
    return contrast_curve(limits() if contrast is None else contrast, sources, fluxes, pixel_scale, **options)


def bands(axes) -> list[np.ndarray]:
    """Vertices (N, 2) of every filled range, empty ones left out."""
    paths = [np.concatenate([path.vertices for path in one.get_paths()] or [np.zeros((0, 2))])
             for one in axes.collections if one.get_facecolor().size]  # fmt: skip
    return [path for path in paths if len(path)]


def test_limits_ranges_throughput_and_detections_are_drawn():
    bright = source(flux_debiased=80.0)
    faint = source(2, 50.0, 30.0, flux_debiased=3.0, flux_debiased_std_empirical=5.0)
    figure = drawn(sources=[bright, faint])
    assert_words_apart(figure)
    upper, lower = figure.axes
    expected = limits()
    for label, values in (
        ("5σ limit in half", expected.half_low),
        ("5σ limit in 95 %", expected.most_low),
        ("5σ limit without self-subtraction", expected.limit),
    ):
        np.testing.assert_allclose(line(upper, label).get_ydata(), values)
    half, most = bands(upper)[:2]
    for band, low, high in (
        (half, expected.half_low, expected.half_high),
        (most, expected.most_low, expected.most_high),
    ):
        assert (band[:, 1].min(), band[:, 1].max()) == (pytest.approx(low.min()), pytest.approx(high.max()))
    np.testing.assert_allclose(line(lower, "flux throughput").get_ydata(), expected.flux_throughput)
    at = line(upper, "detection").get_xydata()
    np.testing.assert_allclose(at, [(bright.separation_px, 80), (faint.separation_px, 3)])
    (bars,) = (c for c in upper.containers if isinstance(c, ErrorbarContainer))
    ends = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [(77.5, 82.5), (0.03, 8)])  # an error above the flux ends at 1 % of it
    assert {text.get_text() for text in upper.texts} == {"1", "2"}
    assert upper.get_yscale() == "log"
    low, high = upper.get_ylim()
    assert low <= 1
    assert 100 * expected.most_low.max() < high < expected.half_high.max()
    assert upper.get_ylabel() == "flux (PSF units)"
    np.testing.assert_allclose(upper.child_axes[0].get_xlim(), np.array(upper.get_xlim()) * SCALE)


def test_separations_without_a_limit_are_gaps():
    gap = (RADIUS > 12) & (RADIUS < 20)  # between others; a limit in 95 % of the directions only beyond
    half, most = np.where(gap, np.nan, 600 / RADIUS), np.where(RADIUS < 20, np.nan, 900 / RADIUS)
    contrast = limits(half_low=half, half_high=1e4 * half, most_low=most, most_high=100 * most)
    upper = drawn(contrast).axes[0]
    assert_words_apart(drawn(contrast))
    np.testing.assert_array_equal(np.isnan(line(upper, "5σ limit in half").get_ydata()), gap)
    np.testing.assert_array_equal(np.isnan(line(upper, "5σ limit in 95 %").get_ydata()), RADIUS < 20)
    first, second = bands(upper)[:2]
    missing = RADIUS[gap]
    assert not ((first[:, 0] >= missing.min()) & (first[:, 0] <= missing.max())).any()
    assert {*first[:, 0]} == {*RADIUS[~gap]}
    assert second[:, 0].min() == RADIUS[RADIUS >= 20].min()


def test_magnitudes_have_brighter_sources_above():
    fluxes = FluxScale("PSF units", STAR, relative=True, magnitudes=True)
    found = source(flux_debiased=80.0)
    figure = drawn(sources=[found], fluxes=fluxes)
    assert_words_apart(figure)
    upper = figure.axes[0]
    assert upper.get_ylabel() == "magnitude difference (mag)"
    assert upper.get_yscale() == "linear"
    bottom, top = upper.get_ylim()
    assert bottom > top  # a small magnitude difference, a bright source, is above
    expected = limits()
    np.testing.assert_allclose(
        line(upper, "5σ limit in half").get_ydata(), -2.5 * np.log10(expected.half_low / STAR[0]), rtol=1e-6
    )
    (at,) = line(upper, "detection").get_xydata()
    np.testing.assert_allclose(at, (found.separation_px, -2.5 * np.log10(80 / STAR[0])))
    (bars,) = (c for c in upper.containers if isinstance(c, ErrorbarContainer))
    ((one,),) = [bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(sorted(one[:, 1]), sorted(-2.5 * np.log10(np.array([77.5, 82.5]) / STAR[0])))


def test_contrasts_are_fluxes_over_that_of_the_star():
    upper = drawn(fluxes=FluxScale("PSF units", STAR, relative=True, magnitudes=False)).axes[0]
    assert upper.get_ylabel() == "contrast (source / star)"
    assert upper.get_yscale() == "log"
    np.testing.assert_allclose(line(upper, "5σ limit in half").get_ydata(), limits().half_low / STAR[0])


@pytest.mark.parametrize("magnitudes", [False, True])
def test_a_flux_that_has_no_logarithm_is_marked_at_its_separation(magnitudes):
    sources = [source(flux_debiased=-3.0), source(2, 50.0, 30.0, flux_debiased=math.nan)]
    figure = drawn(sources=sources, fluxes=FluxScale("PSF units", STAR, relative=magnitudes, magnitudes=magnitudes))
    assert_words_apart(figure)
    marks = line(figure.axes[0], "detection, flux not positive")
    np.testing.assert_allclose(marks.get_xdata(), [found.separation_px for found in sources])
    assert np.isfinite(figure.axes[0].get_ylim()).all()


def test_unknown_errors_and_values():
    unknown = source(flux_debiased_std=math.nan, flux_debiased_std_empirical=math.nan)
    assert_words_apart(drawn(sources=[unknown]))
    nothing = np.full(RADIUS.size, np.nan)
    names = ("limit", "half_low", "half_high", "most_low", "most_high", "tested_high", "flux_throughput")
    figure = drawn(limits(**dict.fromkeys(names, nothing)), pixel_scale=None, threshold=3.5)
    assert_words_apart(figure)
    assert "3.5σ" in texts(figure)


@pytest.mark.parametrize(
    ("calibrated", "name"),
    [(True, "4σ: calibrated SNR (empirical null, Student's t)"), (False, "4σ: theoretical SNR, b / sqrt(a)")],
)
def test_legend_names_the_snr_of_the_threshold(calibrated, name):
    figure = drawn(threshold=4, calibrated=calibrated)
    assert_words_apart(figure)
    assert figure.legends[0].get_title().get_text() == name


def test_less_than_two_decades_have_numbers_on_their_axis():
    """With 100 times the limit above, the axis has at least the powers of ten that it crosses."""
    flat = 300 + 2 * RADIUS
    figure = drawn(limits(limit=flat, half_low=flat, most_low=flat))
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    assert len([tick for tick in figure.axes[0].get_yticks() if low < tick < high]) >= 2


def test_settings_of_matplotlib_stay_as_they_were():
    before = dict(matplotlib.rcParams)
    drawn(sources=[source()])
    assert dict(matplotlib.rcParams) == before


def test_figure_is_written_for_paper_and_screen(tmp_path):
    path = figures.save(drawn(sources=[source()]), tmp_path, "limits")
    assert ink(path) > 0.01
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
