"""The search for sources: what is found where, how bright and how sure, what is left, and what is not found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from references import paco as reference
from scipy.ndimage import gaussian_filter
from scipy.stats import norm
from scipy.stats import t as student

from pulmo_jax.data.adi import load_stack
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.evaluation.null_field import FALSE_ALARM_FLOOR, separation_map
from pulmo_jax.evaluation.selection_bias import without_selection
from pulmo_jax.inference.candidates import (
    LOW_CLOSE,
    MOST_CLOSE,
    MOST_FAR,
    Candidate,
    debiased_snr,
    fit_candidates,
    highest_near,
    is_close,
    is_close_at,
    peaks,
    ranked,
    refit_gain,
    significance_of,
    strongest,
)
from pulmo_jax.inference.point_sources import Search, find_sources
from pulmo_jax.inference.source_properties import NEAR
from pulmo_jax.methods.paco import Observation, Settings, compute_maps, observe
from pulmo_jax.methods.paco.channels import Channels, as_channels
from pulmo_jax.methods.paco.joint import SourceFit
from pulmo_jax.methods.paco.removal import without
from pulmo_jax.methods.paco.source_fit import Fit

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "adi_betapic"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="the real cubes are not beside the checkout")

FRAMES, SIDE, FWHM = 20, 40, 3.5
CENTRE = np.array([20.0, 20.0])
ANGLES = np.linspace(-50, 50, FRAMES)
SETTINGS = Settings(patch_radius_px=3.0)


def gaussian_psf(side: int = 15) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + x**2) / FWHM**2)


PSF = gaussian_psf()


def noise(seed: int) -> np.ndarray:
    """Correlated over a few pixels, on a background that stands."""
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(FRAMES, SIDE, SIDE)), (0, 1, 1))
    return 10 * smooth / smooth.std() + 500 * rng.random((SIDE, SIDE))


def at(separation: float, position_angle_deg: float) -> tuple[float, float]:
    """(y, x) by hand: north is up, that is +y, and east is left, that is -x."""
    angle = np.deg2rad(position_angle_deg)
    return CENTRE[0] + separation * np.cos(angle), CENTRE[1] - separation * np.sin(angle)


# Separation, position angle in degrees, flux; the brighter one is not the one that is written first.
TRUTH = ((8.3, 60.0, 45.0), (13.3, 315.0, 70.0))
PLANETS = [(*at(separation, angle), flux) for separation, angle, flux in TRUTH]
BRIGHTEST_FIRST = TRUTH[::-1]
LIMIT = 35.0  # flux with a significance of 5 at 6 px, and about what is found at 3.5 px


def stack(seed: int, planets: list[tuple[float, float, float]], angles: np.ndarray = ANGLES) -> Observation:
    cube = noise(seed)
    for y, x, flux in planets:
        cube = reference.inject(cube, angles, PSF, y, x, flux)
    return observe(cube, angles, PSF)


@pytest.fixture(scope="module")
def searches() -> list[Search]:
    return [find_sources(stack(seed, PLANETS), SETTINGS) for seed in range(4)]


def pulls(search: Search, truth: list[tuple[float, float, float]]) -> np.ndarray:
    """(N, 3): errors of y, x and flux over their empirical standard deviations."""
    return np.array(
        [
            ((s.y - y) / s.y_std, (s.x - x) / s.x_std, (s.flux_debiased - flux) / s.flux_debiased_std_empirical)
            for s, (y, x, flux) in zip(search.sources, truth, strict=True)
        ]
    )


# --- what is found


def test_planets_are_found_brightest_first_within_their_errors(searches):
    for search in searches:
        assert [source.label for source in search.sources] == [1, 2]
        significance = [source.snr_calibrated for source in search.sources]
        assert significance == sorted(significance, reverse=True)
        assert (abs(pulls(search, PLANETS[::-1])) < 4).all()
    everything = np.concatenate([pulls(search, PLANETS[::-1]) for search in searches])
    assert 0.4 < everything.std() < 1.8  # 24 pulls, not all of them independent


def test_separation_and_position_angle_by_hand(searches):
    for search in searches:
        for source, (separation, angle, _) in zip(search.sources, BRIGHTEST_FIRST, strict=True):
            assert abs(source.separation_px - separation) < 4 * source.separation_px_std
            assert abs(source.position_angle_deg - angle) < 4 * source.position_angle_deg_std
            assert 0.01 < source.separation_px_std < 0.5
            across = np.deg2rad(source.position_angle_deg_std) * separation
            total = np.hypot(source.y_std, source.x_std)
            assert np.hypot(across, source.separation_px_std) == pytest.approx(total, rel=0.03)


def test_numbers_of_a_source_fit_together(searches):
    for search in searches:
        for source in search.sources:
            assert source.snr == pytest.approx(source.flux / source.flux_std)
            ratio = source.snr_debiased * source.flux_debiased_std / source.flux_debiased
            assert 1 - 1e-6 < ratio < 1.3  # the error of the flux includes that of the position
            spread = float(search.profile.std_at(source.separation_px))
            n = float(np.interp(source.separation_px, search.profile.separation_px, search.profile.n))
            ratio = max(source.snr, source.snr_debiased / search.noise.refit_gain) / spread
            significance = norm.isf(student.sf(ratio / np.sqrt(1 + 1 / n), n - 1))
            assert source.snr_calibrated == pytest.approx(significance, rel=1e-6)
            factor = spread * np.sqrt(1 + 1 / n)
            assert source.flux_debiased_std_empirical == pytest.approx(factor * source.flux_debiased_std)
            assert source.flux_debiased > source.flux  # one pass subtracts a part of the source
            assert source.false_alarm_probability < 1e-3
            assert source.false_alarm_probability >= FALSE_ALARM_FLOOR
            assert source.near_threshold == (source.snr_calibrated < 5 + NEAR)
            level = student.isf(norm.sf(5), n - 1) * factor * search.noise.refit_gain * source.flux_debiased_std
            corrected = without_selection(source.flux_debiased, source.flux_debiased_std_empirical, level)
            assert (source.flux_corrected, source.flux_corrected_std) == pytest.approx(corrected)
        brightest = search.sources[0]
        y, x = round(brightest.y), round(brightest.x)
        near = np.s_[y - 1 : y + 2, x - 1 : x + 2]
        assert brightest.snr == search.maps.snr[near].max()
        separation = separation_map((SIDE, SIDE), tuple(CENTRE))
        n = np.interp(separation, search.profile.separation_px, search.profile.n)
        t = search.maps.snr / search.profile.std_at(separation) / np.sqrt(1 + 1 / n)
        known = np.isfinite(t) & (abs(t) < 10)
        expected = np.sign(t) * norm.isf(student.sf(abs(t), n - 1))
        np.testing.assert_allclose(search.snr_calibrated[known], expected[known], rtol=1e-6, atol=1e-9)
        assert search.n_patch == 29


@pytest.mark.slow
def test_a_flux_near_the_threshold_is_flagged_and_corrected_downwards(searches):
    """The same source at thresholds just below its significance and far below it."""
    source = min(searches[0].sources, key=lambda one: one.snr_calibrated)
    near = find_sources(stack(0, PLANETS), SETTINGS, threshold=source.snr_calibrated - 0.2).sources[-1]
    far = find_sources(stack(0, PLANETS), SETTINGS, threshold=source.snr_calibrated - 2.5, max_sources=2).sources[-1]
    assert near.y == pytest.approx(source.y, abs=0.01)
    assert near.near_threshold
    assert not far.near_threshold
    assert near.flux_corrected < far.flux_corrected <= far.flux_debiased
    assert near.flux_corrected_std > near.flux_debiased_std_empirical


def test_empirical_errors_are_near_those_of_the_likelihood(searches):
    ratios = [s.flux_debiased_std_empirical / s.flux_debiased_std for search in searches for s in search.sources]
    assert 0.8 < np.mean(ratios) < 2
    assert (np.array(ratios) > 0.7).all()


def test_nothing_is_left_of_what_was_found(searches):
    for search in searches:
        left = compute_maps(search.residual.each[0], SETTINGS).snr
        assert np.nanmax(left) < 5
        for y, x, _ in PLANETS:
            assert abs(left[round(y), round(x)]) < 4
        assert np.nanmax(search.null.snr) < 5


@pytest.mark.slow
def test_nothing_is_found_where_there_is_nothing():
    for seed in range(100, 105):
        search = find_sources(stack(seed, []), SETTINGS)
        assert search.sources == []
        assert search.residual.each[0].deviations.shape == (FRAMES, SIDE, SIDE)
        assert np.nanmax(search.null.snr) < 5


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, 30, 1e4])
@pytest.mark.parametrize("separation_fwhm", [1, 1.5, 2, 3])
def test_sources_of_any_flux_above_the_limit_are_found(separation_fwhm, times):
    """The SNR of the map does not show it: close to the star it falls as the flux rises."""
    flux, (y, x) = times * LIMIT, at(separation_fwhm * FWHM, 30.0)
    search = find_sources(stack(2, [(y, x, flux)]), SETTINGS)
    [source] = search.sources
    assert (abs(pulls(search, [(y, x, flux)])) < 4).all()
    assert source.flux_debiased == pytest.approx(flux, abs=15)
    assert source.near_threshold == (source.snr_calibrated < 5 + NEAR)
    if separation_fwhm == 1:
        assert source.snr < 5


def test_two_sources_one_and_a_half_fwhm_apart():
    first = at(13.3, 200.0)
    pair = [(*first, 90.0), (first[0] + 1.5 * FWHM * 0.6, first[1] + 1.5 * FWHM * 0.8, 70.0)]
    search = find_sources(stack(7, pair), SETTINGS)
    assert len(search.sources) == 2
    ordered = sorted(pair, key=lambda p: np.hypot(search.sources[0].y - p[0], search.sources[0].x - p[1]))
    assert (abs(pulls(search, ordered)) < 4).all()
    assert np.nanmax(compute_maps(search.residual.each[0], SETTINGS).snr) < 5


@pytest.mark.slow
@pytest.mark.parametrize("orientation_deg", [0.0, 90.0, 200.0])
def test_a_companion_five_times_as_faint_two_fwhm_from_a_bright_source(orientation_deg):
    y, x = at(10.0, 140.0)
    turned = np.deg2rad(140.0 + orientation_deg)
    second = y + 2 * FWHM * np.cos(turned), x - 2 * FWHM * np.sin(turned)
    pair = [(y, x, 600.0), (*second, 120.0)]
    search = find_sources(stack(8, pair), SETTINGS)
    assert len(search.sources) == 2
    assert (abs(pulls(search, pair)) < 5).all()


# --- how it is asked


@pytest.mark.slow
def test_north_can_lie_anywhere(searches):
    turned = find_sources(stack(0, PLANETS), SETTINGS, north_deg=0.0).sources
    for source, other in zip(searches[0].sources, turned, strict=True):
        assert other.position_angle_deg == pytest.approx((source.position_angle_deg + 90) % 360)
        assert 0 <= other.position_angle_deg < 360
        assert other.separation_px == source.separation_px


def test_at_most_so_many_sources(searches):
    search = find_sources(stack(0, PLANETS), SETTINGS, max_sources=1)
    assert len(search.sources) == 1
    assert search.sources[0].snr == searches[0].sources[0].snr
    assert any("stopped at 1 source" in caveat for caveat in search.caveats)
    assert not any("stopped" in caveat for caveat in searches[0].caveats)


def test_threshold_of_the_significance(searches):
    brightest, next_one = (source.snr_calibrated for source in searches[0].sources)
    assert find_sources(stack(0, PLANETS), SETTINGS, threshold=1.2 * brightest).sources == []
    between = find_sources(stack(0, PLANETS), SETTINGS, threshold=(brightest + next_one) / 2)
    assert len(between.sources) == 1


@pytest.mark.slow
def test_threshold_of_the_theoretical_snr(searches):
    """The same sources, judged without the null; what is reported is the significance in it."""
    search = find_sources(stack(0, PLANETS), SETTINGS, calibrated=False)
    assert len(search.sources) == 2
    for source, other in zip(search.sources, searches[0].sources, strict=True):
        assert source.y == pytest.approx(other.y, abs=1e-3)
        assert source.snr_calibrated == pytest.approx(other.snr_calibrated, rel=1e-3)
    highest = max(source.snr_debiased for source in search.sources)
    assert find_sources(stack(0, PLANETS), SETTINGS, threshold=1.2 * highest, calibrated=False).sources == []


def test_what_is_done_is_said():
    said = []
    find_sources(stack(0, PLANETS), SETTINGS, say=said.append)
    assert sum("a source near (y, x) = " in line for line in said) == 2


# --- its parts


def fit_of(y: float, x: float, flux: float, a: float = 1.0, throughput: float = 0.5) -> Fit:
    number = np.float64
    zero = number(0.0)
    return Fit(
        number(y), number(x), number(flux), np.eye(3), number(a), zero, number(throughput), np.int32(3)
    )  # fmt: skip


def candidate_of(y: float, x: float, snr: float, flux: float, a: float = 1.0, throughput: float = 0.5) -> Candidate:
    fit = fit_of(y, x, flux, a, throughput)
    source = SourceFit(np.array([y, x]), np.eye(2), np.array([flux]), np.ones(1), (fit,))
    return Candidate((round(y), round(x)), snr, flux, 1.0, 0, source)


@pytest.mark.parametrize(
    "planets", [PLANETS, [(1.2, 20.0, 80.0)], [(38.7, 37.9, 50.0)], [(20.0, 70.0, 50.0)]],
    ids=["inside", "at the edge", "in the corner", "outside"],
)  # fmt: skip
def test_without_sources_the_stack_is_as_if_they_had_never_been(planets):
    of, empty = stack(1, planets), stack(1, [])
    left = without(of, [fit_of(y, x, flux / of.unit) for y, x, flux in planets])
    np.testing.assert_allclose(left.deviations * left.unit, empty.deviations * empty.unit, atol=2e-3)
    np.testing.assert_allclose(left.deviations.mean(0), 0, atol=1e-6)
    assert without(of, []) is of


def test_without_sources_unusable_pixels_stay_so():
    cube = noise(1)
    cube[:, 16:20, 28:31] = np.nan
    of = observe(cube, ANGLES, PSF)
    left = without(of, [fit_of(17.0, 29.0, 5.0)])
    assert not left.usable[16:20, 28:31].any()
    np.testing.assert_array_equal(left.deviations[:, 16:20, 28:31], 0)
    assert np.isfinite(left.deviations).all()


def channels_of(seed: int = 1, angles: np.ndarray = ANGLES) -> Channels:
    return as_channels(stack(seed, [], angles))


def test_close_is_four_fwhm_of_separation_or_of_path():
    channels = channels_of()
    limit = 4 * channels.fwhm_px
    separations = np.array([0.0, 0.99 * limit, 1.01 * limit])
    assert is_close_at(separations, channels).tolist() == [True, True, False]  # the path is longer
    slow = channels_of(1, ANGLES / 4)  # 25 degrees
    arc = np.deg2rad(25)
    assert is_close_at(separations / arc, slow).tolist() == [True, True, False]
    expected = separation_map((SIDE, SIDE), tuple(CENTRE)) <= limit
    np.testing.assert_array_equal(is_close(channels), expected)


def test_peaks_by_hand():
    """Far from the star those from the threshold on, near it those from a lower one on; residuals are none."""
    channels = channels_of()
    values = np.full((SIDE, SIDE), np.nan)
    values[18:23, 18:23] = 0.2
    values[21, 22], values[16, 20] = 1.1, 0.9  # near the star
    values[5, 5], values[5, 6], values[35, 30], values[4, 30] = 7.0, 6.0, 4.9, 5.0
    dark, bright = np.zeros((SIDE, SIDE)), np.zeros((SIDE, SIDE))
    assert peaks(values, dark, channels, [], 5.0) == [(5, 5), (4, 30), (21, 22)]
    assert peaks(values, dark, channels, [candidate_of(6.0, 7.0, 9.0, 9.0)], 5.0) == [(4, 30), (21, 22)]
    assert peaks(values, dark, channels, [], 0.5) == [(5, 5), (4, 30), (35, 30), (21, 22), (16, 20)]
    assert peaks(np.full((SIDE, SIDE), np.nan), dark, channels, [], 5.0) == []
    assert LOW_CLOSE < 1.1
    # A peak of the least-squares map counts near the star, where the SNR map may have none.
    bright[19, 19], bright[21, 22], bright[5, 30], bright[22, 19] = 9.0, 4.0, 9.0, 2.9
    assert peaks(values, bright, channels, [], 5.0) == [(5, 5), (4, 30), (19, 19), (21, 22)]
    assert peaks(values, bright, channels, [candidate_of(19.0, 19.0, 9.0, 9.0)], 5.0)[2:] == [(21, 22)]


def test_so_many_peaks_at_most():
    values = np.zeros((SIDE, SIDE))
    values[::2, ::2] = 10 + np.random.default_rng(0).random((SIDE // 2, SIDE // 2))
    channels = channels_of()
    found = peaks(values, values[::-1], channels, [], 5.0)
    near = [pixel for pixel in found if is_close(channels)[pixel]]
    assert len(found) <= MOST_FAR + MOST_CLOSE
    assert len(found) - len(near) == MOST_FAR
    highest = np.sort(values[is_close(channels)])[-MOST_CLOSE * 2 // 3 :]
    assert set(highest) <= {values[pixel] for pixel in near}
    assert len(near) <= MOST_CLOSE


def test_snr_of_a_candidate_is_that_where_its_source_is():
    snr = np.zeros((6, 7))
    snr[1, 1], snr[4, 5], snr[3, 2] = 2.0, 9.0, np.nan
    assert highest_near(snr, (1, 1), np.array([3.4, 5.6])) == (4, 5)
    assert highest_near(snr, (1, 1), np.array([2.6, 2.4])) == (1, 1)
    assert highest_near(snr, (1, 1), np.array([np.nan, 2.4])) == (1, 1)
    assert highest_near(snr, (4, 5), np.array([-50.0, 99.0])) == (4, 5)


def test_significance_is_that_of_the_higher_of_two_statistics(searches):
    search = searches[0]
    channels, using = search.residual, search.combination
    unit = channels.each[0].unit
    y, x = at(9.0, 10.0)
    noise_ = replace(search.noise, refit_gain=1.25)
    for snr, debiased, expected in ((4.0, 10.0, 8.0), (9.0, 10.0, 9.0), (-2.0, 5.0, 4.0)):
        candidate = candidate_of(y, x, snr, debiased * unit, a=4.0, throughput=0.5)  # standard deviation 1 unit
        assert debiased_snr(candidate.fit, channels, using) == pytest.approx(debiased)
        found = significance_of(candidate, channels, using, noise_)
        assert found == pytest.approx(float(noise_.significance(expected, 9.0)), rel=1e-6)
    for flux, throughput in ((-3.0, 0.5), (np.nan, 0.5), (3.0, -0.1), (3.0, np.nan)):
        assert significance_of(candidate_of(y, x, 9.0, flux, 4.0, throughput), channels, using, noise_) == -np.inf


def test_strongest_is_no_residual_of_a_known_source(searches):
    search = searches[0]
    args = (search.residual, search.combination, search.noise)
    unit = search.residual.each[0].unit
    first, second = (candidate_of(*at(9.0, 10.0), 8.0, 20 * unit), candidate_of(*at(9.0, 80.0), 6.0, 12 * unit))
    assert strongest([second, first], *args, [])[0] is first
    known = candidate_of(*at(9.5, 12.0), 20.0, 50 * unit)
    assert strongest([second, first], *args, [known])[0] is second
    assert strongest([first], *args, [known]) == (None, -np.inf)
    assert strongest([], *args, []) == (None, -np.inf)


def test_gain_of_noise_peaks_is_that_of_the_noise_s_own_peaks(searches):
    """Peaks of pure noise in the map with the true angles have the ratio that those with reversed angles have."""
    ratios, gains = [], []
    for seed in (100, 101, 102):
        search = find_sources(stack(seed, []), SETTINGS, max_sources=0)
        channels, using = search.residual, search.combination
        gains.append(refit_gain(channels, SETTINGS, using, search.noise))
        close = is_close(channels) & np.isfinite(search.snr_calibrated)
        chosen = ranked(np.where(close, search.snr_calibrated, -np.inf), 2.0)[:8]
        for candidate in fit_candidates(channels, SETTINGS, search.maps, search.template, chosen):
            ratios.append(debiased_snr(candidate.fit, channels, using) / search.maps.snr[candidate.pixel])
    assert all(1 <= gain < 1.6 for gain in gains)
    assert np.nanmedian(ratios) == pytest.approx(np.mean(gains), rel=0.15)


@pytest.mark.campaign
def test_bright_sources_of_every_separation_and_flux():
    """200 injections: from the limit upwards all are found, and their places and fluxes have the errors given."""
    found, everything = [], []
    rng = np.random.default_rng(0)
    for number in range(200):
        separation, flux = FWHM * (1, 1.5, 2, 3)[number % 4], LIMIT * np.exp(rng.uniform(np.log(2), np.log(1e4)))
        planet = (*at(separation, rng.uniform(0, 360)), flux)
        search = find_sources(stack(1000 + number, [planet]), SETTINGS)
        at_it = [np.hypot(one.y - planet[0], one.x - planet[1]) < 1 for one in search.sources]
        found.append(any(at_it) and len(at_it) == 1)
        if found[-1]:
            everything.append(pulls(search, [planet])[0])
    assert np.mean(found) >= 0.97
    spread = np.array(everything).std(0)
    assert (spread > 0.7).all()
    assert (spread < 1.5).all()


@pytest.mark.campaign
def test_companions_of_bright_sources_in_speckles():
    """5 : 1 pairs 2 FWHM apart, 5 and 8 FWHM from the star of a synthetic stack; the companion at twice the limit."""
    fwhm, found = 4.6, []
    for far, limit in ((5, 120.0), (8, 36.0)):
        for orientation in (0, 90, 180):
            rng = np.random.default_rng(300 + far + orientation)
            angle = rng.uniform(0, 2 * np.pi)
            y, x = 50 + far * fwhm * np.sin(angle), 50 + far * fwhm * np.cos(angle)
            turned = angle + np.deg2rad(orientation)
            second = (y + 2 * fwhm * np.sin(turned), x + 2 * fwhm * np.cos(turned), 2 * limit)
            made = rotating_stack(300, 60, 100, 60.0, planets=((y, x, 10 * limit), second)).stack
            sources = find_sources(observe(made.cube, made.angles_deg, made.psf), Settings()).sources
            found.append(min(np.hypot(one.y - second[0], one.x - second[1]) for one in sources) < 1)
    assert np.mean(found) >= 5 / 6


# --- the real cubes


def real(name: str, angles: str) -> Observation:
    loaded = load_stack(REAL / f"{name}.fits", REAL / f"{angles}.fits", REAL / "psf.fits")
    return observe(loaded.cube, loaded.angles_deg, prepare_psf(loaded.psf, "fwhm"))


@pytest.fixture(scope="module")
def beta_pictoris() -> Search:
    return find_sources(real("cube_with_planet", "parallactic_angles"), Settings())


@needs_real
@pytest.mark.slow
def test_beta_pictoris_b(beta_pictoris):
    (planet,) = beta_pictoris.sources
    assert planet.y == pytest.approx(61.70, abs=0.1)
    assert planet.x == pytest.approx(61.82, abs=0.1)
    assert planet.snr == pytest.approx(11.69, abs=0.1)


@needs_real
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.slow
def test_the_real_cube_without_its_planet_has_no_peak(mode):
    of = real("cube_planet_removed", "parallactic_angles_planet_removed")
    maps = compute_maps(of, Settings(mode=mode))
    assert np.isfinite(maps.snr).sum() > 6000
    assert np.nanmax(maps.snr) < 5


@needs_real
@pytest.mark.slow
def test_the_real_cube_with_its_angles_reversed_has_no_peak(beta_pictoris):
    """With the planet in it or not."""
    of = real("cube_with_planet", "parallactic_angles")
    assert np.nanmax(compute_maps(of, Settings(), angles_deg=-of.angles_deg).snr) < 5
    assert np.nanmax(beta_pictoris.null.snr) < 5
    assert np.nanmax(compute_maps(beta_pictoris.residual.each[0], Settings()).snr) < 5
