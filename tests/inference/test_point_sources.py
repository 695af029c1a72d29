"""The search for sources: what is found where, how bright and how sure, what is left, and what is not found."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from references import paco as reference
from scipy.ndimage import gaussian_filter

from pulmo_jax.data.adi import load_stack
from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.evaluation.null_field import separation_map
from pulmo_jax.inference.point_sources import Search, error_factor, find_sources, highest, without
from pulmo_jax.methods.paco import Observation, Settings, compute_maps, observe
from pulmo_jax.methods.paco.source_fit import Fit

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "adi_betapic"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="the real cubes are not beside the checkout")

FRAMES, SIDE, FWHM = 30, 48, 3.5
CENTRE = np.array([24.0, 24.0])
ANGLES = np.linspace(-50, 50, FRAMES)
SETTINGS = Settings()


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
TRUTH = ((10.3, 60.0, 30.0), (15.3, 315.0, 45.0))
PLANETS = [(*at(separation, angle), flux) for separation, angle, flux in TRUTH]
BRIGHTEST_FIRST = TRUTH[::-1]


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
        snr = [source.snr for source in search.sources]
        assert snr == sorted(snr, reverse=True)
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
            spread = float(search.profile.std_at(source.separation_px))
            assert source.snr_calibrated == pytest.approx(source.snr / spread)
            assert source.flux_debiased > source.flux  # one pass subtracts a part of the source
            assert source.false_alarm_probability < 1e-3
        brightest = search.sources[0]
        y, x = round(brightest.y), round(brightest.x)
        assert brightest.snr == pytest.approx(np.nanmax(search.maps.snr), rel=1e-6)
        near = np.s_[y - 1 : y + 2, x - 1 : x + 2]
        assert brightest.snr == search.maps.snr[near].max()
        std = search.profile.std_at(separation_map((SIDE, SIDE), tuple(CENTRE)))
        np.testing.assert_allclose(search.snr_calibrated, search.maps.snr / std)
        assert search.n_patch == 29


def test_empirical_errors_are_wider_where_the_covariance_is_learnt_from_few_frames(searches):
    ratios = [s.flux_debiased_std_empirical / s.flux_debiased_std for search in searches for s in search.sources]
    assert 1 < np.mean(ratios) < 4
    assert (np.array(ratios) > 0.7).all()


def test_nothing_is_left_of_what_was_found(searches):
    for search in searches:
        left = compute_maps(search.residual.each[0], SETTINGS).snr
        assert np.nanmax(left) < 5
        for y, x, _ in PLANETS:
            assert abs(left[round(y), round(x)]) < 4
        assert np.nanmax(search.null.snr) < 5


def test_nothing_is_found_where_there_is_nothing():
    for seed in range(100, 105):
        search = find_sources(stack(seed, []), SETTINGS)
        assert search.sources == []
        assert search.residual.each[0].deviations.shape == (FRAMES, SIDE, SIDE)
        assert np.nanmax(search.null.snr) < 5


def test_two_sources_one_and_a_half_fwhm_apart():
    first = at(14.3, 200.0)
    pair = [(*first, 60.0), (first[0] + 1.5 * FWHM * 0.6, first[1] + 1.5 * FWHM * 0.8, 45.0)]
    search = find_sources(stack(7, pair), SETTINGS)
    assert len(search.sources) == 2
    assert (abs(pulls(search, pair)) < 4).all()
    assert np.nanmax(compute_maps(search.residual.each[0], SETTINGS).snr) < 5


# --- how it is asked


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


def test_threshold_of_the_snr(searches):
    brightest, next_one = (source.snr for source in searches[0].sources)
    assert find_sources(stack(0, PLANETS), SETTINGS, threshold=brightest + 0.01).sources == []
    between = find_sources(stack(0, PLANETS), SETTINGS, threshold=(brightest + next_one) / 2)
    assert len(between.sources) == 1


def test_threshold_of_the_calibrated_snr(searches):
    """The null of a search that knows of no source yet holds the remains of them, but no peaks."""
    search = find_sources(stack(0, PLANETS), SETTINGS, calibrated=True)
    assert len(search.sources) == 2
    for source, other in zip(search.sources, searches[0].sources, strict=True):
        assert source.y == pytest.approx(other.y, abs=1e-3)
        assert source.snr_calibrated == pytest.approx(other.snr_calibrated)
    high = max(float(np.nanmax(search.snr_calibrated)), search.sources[0].snr) * 1.5
    assert find_sources(stack(0, PLANETS), SETTINGS, threshold=high, calibrated=True).sources == []


def test_what_is_done_is_said():
    said = []
    find_sources(stack(0, PLANETS), SETTINGS, say=said.append)
    assert sum("a source near (y, x) = " in line for line in said) == 2


# --- its parts


def fit_of(y: float, x: float, flux: float) -> Fit:
    number = jnp.asarray
    zero = number(0.0)
    return Fit(number(y), number(x), number(flux), jnp.zeros((3, 3)), zero, zero, number(0))


@pytest.mark.parametrize(
    "planets", [PLANETS, [(1.2, 24.0, 80.0)], [(46.7, 45.9, 50.0)], [(24.0, 80.0, 50.0)]],
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
    cube[:, 20:24, 33:36] = np.nan
    of = observe(cube, ANGLES, PSF)
    left = without(of, [fit_of(21.0, 34.0, 5.0)])
    assert not left.usable[20:24, 33:36].any()
    np.testing.assert_array_equal(left.deviations[:, 20:24, 33:36], 0)
    assert np.isfinite(left.deviations).all()


def test_highest_by_hand():
    snr = np.array([[1.0, 7.0, np.nan], [np.nan, 6.0, 6.5]])
    free = np.ones((2, 3), bool)
    assert highest(snr, free, 5.0) == (0, 1)
    free[0, 1] = False
    assert highest(snr, free, 5.0) == (1, 2)
    assert highest(snr, free, 6.5) == (1, 2)
    assert highest(snr, free, 6.6) is None
    assert highest(np.full((2, 3), np.nan), free, -1.0) is None


def test_error_factor_needs_blank_places():
    of = stack(1, [])
    assert np.isnan(error_factor(of, SETTINGS, (24.0, 25.5), []))  # a circle of 9 px has room for two
    assert np.isnan(error_factor(of, SETTINGS, (24.0, 24.0), []))


# --- the real cubes


def real(name: str, angles: str) -> Observation:
    loaded = load_stack(REAL / f"{name}.fits", REAL / f"{angles}.fits", REAL / "psf.fits")
    return observe(loaded.cube, loaded.angles_deg, prepare_psf(loaded.psf, "fwhm"))


@pytest.fixture(scope="module")
def beta_pictoris() -> Search:
    return find_sources(real("cube_with_planet", "parallactic_angles"), SETTINGS)


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
    assert np.nanmax(compute_maps(of, SETTINGS, angles_deg=-of.angles_deg).snr) < 5
    assert np.nanmax(beta_pictoris.null.snr) < 5
    assert np.nanmax(compute_maps(beta_pictoris.residual.each[0], SETTINGS).snr) < 5
