"""Figures of a point-source search draw the numbers that they are given, with none of their words on another."""

import math
from functools import partial

import matplotlib
import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.contour import QuadContourSet
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from references.drawn import assert_words_apart, line, point_source, points, texts
from references.pictures import ink
from scipy import stats

from pulmo_jax.reporting import figures
from pulmo_jax.tasks.point_sources import drawing, null_figures
from pulmo_jax.tasks.point_sources import figures as adi_figures
from pulmo_jax.tasks.point_sources.drawing import Sky

pytestmark = pytest.mark.draws
SCALE = 0.02719
RADIUS = np.arange(6.0, 46, 4)
CENTRE = (30.0, 35.5)
TRUTH = [(20.0, 60.5, 7.0), (40.0, 12.0, 9.0)]


source = partial(point_source, centre=CENTRE)


def maps(height=61, width=72, seed=0):
    snr, flux = np.random.default_rng(seed).normal(size=(2, height, width))
    snr[:4], flux[:4] = np.nan, np.nan
    return snr, 30 * flux


SKY = Sky(CENTRE, SCALE)


@pytest.mark.parametrize("calibrated", [False, True])
def test_maps_show_their_values_with_sources_truth_and_star(calibrated):
    snr, flux = maps()
    sources = [source(), source(2, 45.0, 15.5)]
    figure = adi_figures.detection_maps(snr, flux, sources, SKY, TRUTH, snr / 2 if calibrated else None)
    panels = [axes for axes in figure.axes if axes.get_xlabel() == "ΔRA (arcsec)"]
    for axes, values in zip(panels, [snr, *([snr / 2] if calibrated else []), flux], strict=True):
        drawn = axes.images[0].get_array()
        np.testing.assert_array_equal(drawn.filled(np.nan), values)
        assert drawn.mask[:4].all()
        assert axes.get_ylim() == (-0.5, 60.5)
        assert axes.images[0].norm.vmin == -axes.images[0].norm.vmax
        assert points(axes, "o") == [(60.3, 20.2), (15.5, 45.0)]
        assert points(axes, "s") == [(60.5, 20.0), (12.0, 40.0)]
        assert points(axes, "+") == [(35.5, 30.0)]
        assert {text.get_text() for text in axes.texts} >= {"1", "2"}
    assert "injected" in texts(figure)
    assert "one-pass flux\n(PSF units)" in texts(figure)
    assert "theoretical SNR\n$b/\\sqrt{a}$" in texts(figure)
    assert ("calibrated SNR\n(empirical null, Student t)" in texts(figure)) == calibrated
    assert_words_apart(figure)


def test_five_is_in_full_colour_and_a_bright_source_changes_little():
    snr, flux = maps()
    for peak, limit in ((0.0, 5.0), (100.0, 6.0)):
        snr[20:24, 20:24] = peak
        image = adi_figures.detection_maps(snr, flux, [], Sky(CENTRE)).axes[0].images[0]
        assert image.get_clim() == (-limit, limit)
        red, green, blue, _ = image.to_rgba(np.array([[5.0]]))[0, 0]
        assert (red - green, red - blue) > (0.4, 0.4)


def test_colours_of_the_flux_end_at_a_rounded_robust_limit():
    snr, flux = maps()
    flux[30, 30] = 1e9
    image = adi_figures.detection_maps(snr, flux, [], Sky(CENTRE)).axes[1].images[0]
    percentile = np.nanpercentile(np.abs(flux), adi_figures.ROBUST_PERCENT)
    assert percentile <= image.get_clim()[1] < 1.1 * percentile


def compass(axes):
    """Unit vectors (x, y) on the drawn page toward the letters, from the foot of the arrows."""
    axes.figure.draw_without_rendering()
    arrows = [text for text in axes.texts if text.arrow_patch is not None]
    ways = {}
    for letter, arrow in zip("NE", arrows, strict=True):
        tip, foot = (arrow.xycoords.transform(at) for at in (arrow.xy, arrow.get_position()))
        ways[letter] = (tip - foot) / np.hypot(*(tip - foot))
        named = next(text for text in axes.texts if text.get_text() == letter)
        away = named.xycoords.transform(named.xy) - foot
        np.testing.assert_allclose(away / np.hypot(*away), ways[letter], atol=1e-6)
    return ways


@pytest.mark.parametrize("north_deg", [90.0, 0.0, 194.84, -30.0])
def test_compass_agrees_with_the_position_angles_of_the_table(north_deg):
    """A source toward north has position angle 0, one toward east 90 degrees, as in `source_properties.describe`."""
    axes = adi_figures.detection_maps(*maps(), [], Sky(CENTRE, SCALE, north_deg)).axes[0]
    for letter, (x, y) in compass(axes).items():
        angle = np.rad2deg(np.arctan2(y, x)) - north_deg
        assert np.cos(np.deg2rad(angle - {"N": 0, "E": 90}[letter])) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [(61, 72), (300, 60), (40, 320)])
@pytest.mark.parametrize(
    ("sky", "names"),
    [
        (Sky(CENTRE), ("x (px)", "y (px)")),
        (Sky((20.0, 40.0), SCALE), ("ΔRA (arcsec)", "ΔDec (arcsec)")),
        (Sky((150.2, 30.0), 0.0075, 194.84), ("Δx (arcsec)", "Δy (arcsec)")),
    ],
)
def test_axes_are_offsets_from_the_star_where_the_scale_is_known(sky, names, size):
    figure = adi_figures.detection_maps(*maps(*size), [], sky)
    assert_words_apart(figure)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == names
    assert axes.get_aspect() == 1
    if sky.pixel_scale is None:
        return
    sign = -1 if sky.north_up else 1
    for axis, middle, way in ((axes.xaxis, sky.centre[1], sign), (axes.yaxis, sky.centre[0], 1)):
        named = [float(text.get_text().replace("−", "-")) for text in axis.get_ticklabels()]
        assert len(named) >= 2
        np.testing.assert_allclose((axis.get_ticklocs() - middle) * sky.pixel_scale * way, named, atol=1e-9)


def test_compass_keeps_clear_of_star_and_sources():
    sources = [source(1, 2.0, 3.0), source(2, 3.0, 69.0), source(3, 58.0, 2.0)]  # all corners but the upper right
    axes = adi_figures.detection_maps(*maps(), sources, SKY).axes[0]
    axes.figure.draw_without_rendering()
    letters = [text.xycoords.transform(text.xy) for text in axes.texts if text.get_text() in ("N", "E")]
    at = axes.transAxes.inverted().transform(letters)
    assert len(letters) == 2
    assert (at > 0.5).all()
    assert (at < 1).all()


@pytest.mark.parametrize(
    ("value", "text"), [(7.46e-5, r"$7.46\times 10^{-5}$"), (-1700.0, "−1700"), (0.0123, "0.0123"), (0.0, "0")]
)
def test_numbers_of_colour_bars_have_powers_of_ten(value, text):
    assert drawing.number(value) == text


def test_maps_without_any_value_or_source():
    empty = np.full((20, 21), np.nan, np.float32)
    figure = adi_figures.detection_maps(empty, empty, [], Sky((10, 10)))
    assert_words_apart(figure)
    assert figure.axes[0].images[0].get_clim() == (-5, 5)
    assert "detection" not in texts(figure)
    assert "injected" not in texts(figure)


def test_labels_of_close_sources_stand_apart():
    sources = [source(8 + i, 30.0 + 4 * (i // 3), 50.0 + 6 * (i % 3)) for i in range(6)]
    sources += [source(77, 0.5, 0.0), source(101, 60.0, 71.0)]
    figure = adi_figures.detection_maps(*maps(), sources, SKY, TRUTH)
    assert_words_apart(figure)
    for axes in figure.axes[:2]:
        places = axes.transData.transform(points(axes, "o"))
        labels = {text.get_text(): text.get_window_extent() for text in axes.texts}
        for found, (x, y) in zip(sources, places, strict=True):
            assert abs(labels[str(found.label)].x0 - x) < 40
            assert not any(box.contains(x, y) for box in labels.values())


def test_null_is_counted_whole_beside_the_normal():
    null = np.random.default_rng(1).normal(0.1, 0.8, 3000)
    null[:3] = np.nan, 14.0, 3.5
    snr = np.random.default_rng(2).normal(size=500)
    figure = null_figures.null_distribution(null, snr, "angles of a$1$.fits reversed", 200)
    assert_words_apart(figure)
    counts = figure.axes[0]
    n_null, n_snr = (patch.get_data() for patch in counts.patches)
    assert (n_null.values.sum(), n_snr.values.sum()) == (2999, 500)
    assert n_null.values[-1] == 1  # what lies beyond
    assert "overflow" in counts.get_xlabel()
    finite = null[np.isfinite(null)]
    normal, fitted = line(counts, "standard normal"), line(counts, "normal, mean")
    assert normal.get_ydata().max() == pytest.approx(2999 * 0.25 * stats.norm.pdf(0), rel=1e-3)
    np.testing.assert_allclose(
        fitted.get_ydata(), 2999 * 0.25 * stats.norm.pdf(fitted.get_xdata(), finite.mean(), finite.std(ddof=1))
    )
    assert f"mean {finite.mean():.2f}, std {finite.std(ddof=1):.2f}" in texts(figure)
    assert f"sd {finite.std(ddof=1):.2f}, P(> 3) = {np.mean(finite > 3):.2g}" in texts(figure)
    assert "standard normal: P(> 3) = 0.00135" in texts(figure)
    assert figure.get_suptitle().replace(r"\$", "$") == "angles of a$1$.fits reversed"


def test_both_snrs_of_the_null_are_named_with_spread_and_tail():
    null = np.random.default_rng(1).normal(0, 0.7, 4000)
    calibrated = null / null.std()
    figure = null_figures.null_distribution(null, None, "", 300, calibrated)
    assert_words_apart(figure)
    counts, quantiles = figure.axes
    labels = [text.get_text() for text in counts.get_legend().get_texts()]
    for values, name in (
        (null, r"theoretical SNR $b/\sqrt{a}$"),
        (calibrated, "calibrated (empirical null, Student t)"),
    ):
        said = f"{name}: sd {values.std(ddof=1):.2f}, P(> 3) = {np.mean(values > 3):.2g}"
        assert said in labels
        drawn = next(patch for patch in counts.patches if patch.get_label() == said)
        assert drawn.get_data().values.sum() == 4000
        assert line(quantiles, name).get_ydata().max() == values.max()


def test_quantiles_of_the_null_against_those_of_the_normal():
    null = np.random.default_rng(1).normal(size=7)
    axes = null_figures.null_distribution(null, None).axes[1]
    drawn = line(axes, "theoretical SNR")
    np.testing.assert_allclose(drawn.get_xdata(), stats.norm.ppf((np.arange(7) + 0.5) / 7))
    np.testing.assert_array_equal(drawn.get_ydata(), np.sort(null))
    identity = line(axes, "standard normal").get_xydata()
    np.testing.assert_array_equal(identity[:, 0], identity[:, 1])
    assert not axes.collections  # no band without a number of independent values


def test_many_quantiles_are_thinned_but_for_the_tails():
    null = np.random.default_rng(1).normal(size=100_000)
    y = line(null_figures.null_distribution(null, None).axes[1], "theoretical SNR").get_ydata()
    assert y.size <= null_figures.MAX_QUANTILES
    np.testing.assert_array_equal(y[:100], np.sort(null)[:100])
    np.testing.assert_array_equal(y[-100:], np.sort(null)[-100:])


def test_band_holds_95_percent_of_independent_normal_quantiles():
    n = 40
    z, low, high = null_figures._quantile_band(n, 5.0)
    at = stats.norm.ppf((np.arange(n) + 0.5) / n)
    draws = np.sort(np.random.default_rng(3).normal(size=(20_000, n)), axis=1)
    inside = (draws > np.interp(at, z, low)) & (draws < np.interp(at, z, high))
    np.testing.assert_allclose(inside.mean(axis=0), 0.95, atol=0.01)
    axes = null_figures.null_distribution(draws[0], None, n_independent=n).axes[1]
    drawn = axes.collections[0].get_paths()[0].vertices
    assert drawn[:, 1].min() == pytest.approx(low[0])
    assert drawn[:, 1].max() == pytest.approx(high[-1])


@pytest.mark.parametrize("null", [np.full(4, np.nan), np.array([0.3]), np.zeros(5)])
def test_null_of_too_few_values_is_drawn(null):
    assert_words_apart(null_figures.null_distribution(null, np.array([np.nan, 1.0]), n_independent=1))


def test_null_by_radius_draws_std_and_interval():
    std = np.linspace(0.8, 1.1, RADIUS.size)
    std[4] = np.nan
    figure = null_figures.null_by_radius(RADIUS, std, std - 0.1, std + 0.2, SCALE)
    assert_words_apart(figure)
    axes = figure.axes[0]
    np.testing.assert_array_equal(line(axes, "theoretical SNR").get_xydata(), np.stack([RADIUS, std], 1))
    band = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    assert (band[:, 1].min(), band[:, 1].max()) == (pytest.approx(0.7), pytest.approx(1.3))
    assert list(line(axes, "1: as theory predicts").get_ydata()) == [1, 1]
    (above,) = axes.child_axes
    np.testing.assert_allclose(above.get_xlim(), np.array(axes.get_xlim()) * SCALE)


def test_null_by_radius_without_an_interval_or_a_value():
    nothing = np.full(RADIUS.size, np.nan)
    figure = null_figures.null_by_radius(RADIUS, nothing, nothing, nothing)
    assert_words_apart(figure)
    assert "interval" not in texts(figure)
    assert not figure.axes[0].child_axes


FOOTPRINT = np.array([(y, x) for y in range(-2, 3) for x in range(-2, 3) if y * y + x * x <= 4])


def patch_inputs():
    rng = np.random.default_rng(5)
    covariance = np.cov(rng.normal(size=(len(FOOTPRINT), 40)))
    return rng.normal(size=(5, 5)), covariance, 0.6 * covariance + 0.4 * np.diag(np.diag(covariance))


def test_patch_shows_its_mean_and_correlations():
    mean, covariance, shrunk = patch_inputs()
    covariance[3], covariance[:, 3] = 0, 0  # a constant pixel
    figure = adi_figures.patch_statistics(mean, covariance, shrunk, 0.4, FOOTPRINT)
    assert_words_apart(figure)
    patch, before, after = (axes.images[0].get_array() for axes in figure.axes[:3])
    inside = np.zeros((5, 5), bool)
    inside[tuple((FOOTPRINT + 2).T)] = True
    np.testing.assert_array_equal(patch.mask, ~inside)
    np.testing.assert_array_equal(patch[inside], mean[inside])
    assert figure.axes[0].images[0].get_extent() == [-2.5, 2.5, -2.5, 2.5]
    assert before.mask[3].all()
    assert before.mask[:, 3].all()
    std = np.sqrt(np.diag(shrunk))
    np.testing.assert_allclose(after, shrunk / np.outer(std, std))
    assert all(axes.images[0].get_clim() == (-1, 1) for axes in figure.axes[1:3])
    assert "= 0.4" in figure.axes[2].get_title()


def test_patch_needs_a_mean_on_its_footprint():
    mean, covariance, shrunk = patch_inputs()
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(5, 5\)"):
        adi_figures.patch_statistics(mean[:4], covariance, shrunk, 0.4, FOOTPRINT)


def surface(y, x, found):
    return -(((y[:, None] - found.y) / found.y_std) ** 2 + ((x - found.x) / found.x_std) ** 2) / 2


def test_likelihood_regions_hold_what_1_2_and_3_std_hold():
    found = source()
    y, x = np.linspace(19.6, 20.8, 121), np.linspace(59.3, 61.3, 161)
    figure = adi_figures.likelihood_surface(y, x, surface(y, x, found), found)
    assert_words_apart(figure)
    axes = figure.axes[0]
    filled, *lines = axes.findobj(QuadContourSet)
    levels = [contour.levels[0] for contour in lines]
    np.testing.assert_allclose(levels, [-1.148, -3.090, -5.915], atol=1e-3)
    np.testing.assert_allclose(filled.levels, levels[::-1])
    for k, contour, level in zip((1, 2, 3), lines, levels, strict=True):
        assert math.exp(level) == pytest.approx(2 * stats.norm.sf(k))  # the tail of chi2 with two parameters
        extent = contour.get_paths()[0].get_extents()
        radius = math.sqrt(-2 * level)
        assert extent.width == pytest.approx(2 * radius * found.x_std, rel=0.01)
        assert extent.height == pytest.approx(2 * radius * found.y_std, rel=0.01)
    (ellipse,) = axes.findobj(Ellipse)
    assert ellipse.center == (60.3, 20.2)
    innermost = lines[0].get_paths()[0].get_extents()  # that of the errors, where these are the surface's own
    assert (ellipse.width, ellipse.height) == pytest.approx((innermost.width, innermost.height), rel=0.01)
    (bars,) = (c for c in axes.containers if isinstance(c, ErrorbarContainer))
    along_x, along_y = (collection.get_segments()[0] for collection in bars.lines[2])
    np.testing.assert_allclose(along_x, [(60.1, 20.2), (60.5, 20.2)])
    np.testing.assert_allclose(along_y, [(60.3, 20.1), (60.3, 20.3)])


def test_likelihood_leaves_out_regions_that_its_window_does_not_hold():
    found = source()
    y, x = np.linspace(20.19, 20.21, 5), np.linspace(60.28, 60.32, 6)
    figure = adi_figures.likelihood_surface(y, x, surface(y, x, found), found)
    assert_words_apart(figure)
    assert "3 σ" not in texts(figure)
    nothing = np.full((5, 6), np.nan)
    assert_words_apart(adi_figures.likelihood_surface(y, x, nothing, found))


def test_likelihood_with_gaps():
    found = source()
    y, x = np.linspace(19.6, 20.8, 31), np.linspace(59.3, 61.3, 41)
    values = surface(y, x, found)
    values[:, :15] = np.nan
    figure = adi_figures.likelihood_surface(y, x, values, found)
    assert_words_apart(figure)
    outer = figure.axes[0].findobj(QuadContourSet)[-1].get_paths()[0].get_extents()
    assert outer.x0 == pytest.approx(x[15])


def sequence(frames=9):
    cube = np.random.default_rng(6).exponential(size=(frames, 24, 30))
    cube[:, :2] = np.nan
    return cube, np.linspace(-20.0, 40.0, frames)


def test_frames_on_one_scale_with_the_source_circled():
    cube, angles = sequence()
    shown = adi_figures.shown_frames(9)
    assert list(shown) == [0, 3, 5, 8]
    places = np.stack([12.0 + np.arange(4), 20.0 - np.arange(4)], 1)
    places[3] = np.nan  # off the frame
    figure = adi_figures.frames_strip(cube, angles, (12, 15), places)
    assert_words_apart(figure)
    panels = figure.axes[:4]
    for i, axes, (y, x) in zip(shown, panels, places, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array().filled(np.nan), cube[i])
        assert axes.get_title().replace("−", "-") == f"frame {i}\n{angles[i]:.1f}°"
        assert points(axes, "+") == [(15, 12)]
        np.testing.assert_array_equal(points(axes, "o"), [(x, y)])
        assert axes.get_ylim() == (-0.5, 23.5)
    low, high = np.nanpercentile(cube[shown], [0.5, 99.5])
    np.testing.assert_allclose([axes.images[0].get_clim() for axes in panels], [(low, high)] * 4)


@pytest.mark.parametrize("n_frames", [1, 2, 7])
def test_any_number_of_frames_fits_the_page(n_frames):
    cube, angles = sequence()
    figure = adi_figures.frames_strip(cube, angles, (12, 15), None, n_frames)
    assert_words_apart(figure)
    assert figure.get_figwidth() <= figures.TEXT_WIDTH_IN
    assert len([axes for axes in figure.axes if axes.images]) == n_frames
    assert not figure.findobj(lambda artist: isinstance(artist, Line2D) and artist.get_marker() == "o")


@pytest.mark.parametrize("value", [np.nan, 0.0, 7.0])
def test_frames_of_one_value_are_drawn(value):
    assert_words_apart(adi_figures.frames_strip(np.full((2, 9, 9), value), np.zeros(2), (4, 4)))


def test_positions_are_one_for_each_frame_shown():
    cube, angles = sequence()
    with pytest.raises(ValueError, match="9 positions given for 4 frames"):
        adi_figures.frames_strip(cube, angles, (12, 15), np.zeros((9, 2)))
    assert list(adi_figures.shown_frames(3, 8)) == [0, 1, 2]


def test_settings_of_matplotlib_stay_as_they_were():
    before = dict(matplotlib.rcParams)
    adi_figures.detection_maps(*maps(), [source()], SKY)
    assert dict(matplotlib.rcParams) == before


def test_figures_are_written_for_paper_and_screen(tmp_path):
    path = figures.save(adi_figures.detection_maps(*maps(), [source()], SKY), tmp_path, "maps")
    assert ink(path) > 0.01
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
