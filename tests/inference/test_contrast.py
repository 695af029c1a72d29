"""Ranges of flux that are detected: against searches of stacks with injected sources, and what must not change them."""

from dataclasses import fields, replace

import numpy as np
import pytest
from references import paco as reference
from scipy.ndimage import gaussian_filter

from pulmo_jax.inference.contrast import (
    HALF,
    MULTIPLES,
    ROUNDS,
    Contrast,
    contrast_curve,
    range_of,
    ring_separations,
    throughput_map,
)
from pulmo_jax.inference.point_sources import Search, find_sources
from pulmo_jax.methods.paco import Observation, Settings, compute_maps, observe

FRAMES, SIDE, FWHM = 20, 40, 3.5
CENTRE = (20.0, 20.0)
ANGLES = np.linspace(-50, 50, FRAMES)
SETTINGS = Settings(patch_radius_px=3.0)
DIRECTIONS, RINGS = 8, 4
FLUXES = ("limit", "half_low", "half_high", "most_low", "most_high", "tested_high")


def gaussian_psf(side: int = 15) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return np.exp(-4 * np.log(2) * (y**2 + x**2) / FWHM**2)


PSF = gaussian_psf()


def noise(seed: int) -> np.ndarray:
    white = np.random.default_rng(seed).normal(size=(FRAMES, SIDE, SIDE))
    smooth = gaussian_filter(white, (0, 1, 1))
    return smooth / smooth.std()


def ready(cube: np.ndarray, angles: np.ndarray = ANGLES) -> Observation:
    return observe(cube, angles, PSF)


def searched(cube: np.ndarray, angles: np.ndarray = ANGLES) -> Search:
    return find_sources(ready(cube, angles), SETTINGS, max_sources=0)


def curve(search: Search, **options) -> Contrast:
    return contrast_curve(search, SETTINGS, n_directions=DIRECTIONS, n_rings=RINGS, **options)


CUBE = noise(0)


@pytest.fixture(scope="module")
def search() -> Search:
    return searched(CUBE)


@pytest.fixture(scope="module")
def contrast(search) -> Contrast:
    return curve(search)


def on_ring(separation: float, n: int, turn: float = 0.37) -> np.ndarray:
    """(N, 2): places on a ring, in other directions than those that the limit was found in."""
    theta = 2 * np.pi * (np.arange(n) + turn) / n
    return np.array(CENTRE) + separation * np.stack([np.sin(theta), np.cos(theta)], -1)


# --- what a limit means


def detected(contrast: Contrast, fluxes: np.ndarray, n: int) -> np.ndarray:
    """(R, N): whether a search of the stack with a source finds it and nothing else, n directions a ring."""
    found = []
    for separation, flux in zip(contrast.separation_px, fluxes, strict=True):
        for y, x in on_ring(separation, n):
            cube = reference.inject(CUBE, ANGLES, PSF, float(y), float(x), flux)
            sources = find_sources(ready(cube), SETTINGS).sources
            found.append([np.hypot(one.y - y, one.x - x) < FWHM for one in sources] == [True])
    return np.reshape(found, (-1, n))


@pytest.mark.slow
def test_a_search_finds_sources_above_the_limit_and_none_below(contrast):
    assert np.isfinite(contrast.half_low).all()
    assert detected(contrast, 1.5 * contrast.half_low, 2).mean() >= 0.75
    assert detected(contrast, 0.6 * contrast.half_low, 2).mean() <= 0.25


@pytest.mark.slow
def test_a_search_finds_sources_of_every_flux_tested(contrast):
    np.testing.assert_array_equal(contrast.most_high, contrast.tested_high)
    for flux in (np.sqrt(contrast.most_low * contrast.most_high), contrast.tested_high):
        assert detected(contrast, flux, 1).all()


@pytest.mark.campaign
def test_half_of_the_sources_at_the_limit_are_found(contrast):
    found = detected(contrast, contrast.half_low, 16)
    deviation = 3 * np.sqrt(0.25 / found.size)  # three binomial standard deviations
    assert 0.5 - deviation - 0.1 < found.mean() < 0.5 + deviation + 0.1


@pytest.mark.slow
def test_limits_are_those_of_the_maps(search, contrast):
    """Each at the SNR that has a significance of 5 there; that without self-subtraction is far below the true one."""
    maps = compute_maps(ready(CUBE), SETTINGS)
    for k, separation in enumerate(contrast.separation_px):
        y, x = np.round(on_ring(separation, 12)).astype(int).T
        level = search.noise.ratio_at(5.0, float(separation))
        assert contrast.threshold[k] == pytest.approx(level)
        assert contrast.limit[k] == pytest.approx(level * np.median(maps.flux_std[y, x]), rel=0.1)
    assert (contrast.half_low > 1.2 * contrast.limit).all()
    assert contrast.half_low[0] > contrast.half_low[-1]


@pytest.mark.slow
def test_ranges_are_in_order(contrast):
    assert (contrast.half_low <= contrast.most_low).all()
    assert (contrast.most_low < contrast.most_high).all()
    assert (contrast.most_high <= contrast.half_high).all()
    assert (contrast.half_high <= contrast.tested_high).all()
    assert (contrast.tested_high > 1e3 * contrast.half_low).all()
    np.testing.assert_array_equal(contrast.n, DIRECTIONS)
    assert (contrast.flux_throughput < 1).all()
    assert (contrast.flux_throughput > 0).all()
    assert (np.diff(contrast.flux_throughput)[:2] > 0).all()  # near the centre nothing leaves its own place
    assert ((contrast.flux_throughput_std > 0) & (contrast.flux_throughput_std < 0.2)).all()


@pytest.mark.slow
def test_where_nothing_is_detected_there_is_no_limit():
    """A source that moves by less than its width is taken for the background however bright it is."""
    still = curve(searched(CUBE, ANGLES / 1e5))
    for name in ("half_low", "half_high", "most_low", "most_high"):
        assert np.isnan(getattr(still, name)).all()
    assert np.isfinite(still.tested_high).all()
    assert np.isfinite(still.limit).all()
    assert (still.flux_throughput < 0.05).all()


def test_range_of_fluxes_by_hand():
    limits, fluxes = np.array([3.0, 1.0, np.inf, 2.0]), np.array([1.5, 15.0, 150.0])
    detected_ = np.array([[0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0]], bool)
    assert range_of(limits, fluxes, detected_, 0.5) == (2.0, 150.0)
    assert range_of(limits, fluxes, detected_, 0.75) == (3.0, 150.0)
    none = range_of(limits, fluxes, detected_, 0.95)
    assert np.isnan(none).all()
    detected_[1] = [1, 0, 0, 0]
    assert range_of(limits, fluxes, detected_, 0.5) == (2.0, 2.0)  # a gap ends the range
    assert HALF == 0.5


# --- what it must not depend on


@pytest.mark.slow
def test_unit_and_static_background(contrast):
    background = 1000 * np.random.default_rng(1).random((SIDE, SIDE))
    other = curve(searched(64 * (CUBE + background)))
    for field in fields(Contrast):
        scale = 64 if field.name in FLUXES else 1
        np.testing.assert_allclose(
            getattr(other, field.name), scale * getattr(contrast, field.name), rtol=2e-2, atol=2e-3, err_msg=field.name
        )


@pytest.mark.slow
def test_thresholds(search, contrast):
    """Of a null twice as wide, a higher SNR is needed; the theoretical SNR needs none of it."""
    profile = replace(search.profile, std=2 * search.profile.std)
    wide = curve(replace(search, noise=replace(search.noise, profile=profile)))
    np.testing.assert_allclose(wide.threshold, 2 * contrast.threshold, rtol=1e-6)
    np.testing.assert_allclose(wide.limit, 2 * contrast.limit, rtol=1e-6)
    assert (wide.half_low > 1.4 * contrast.half_low).all()
    formal = curve(search, threshold=3.0, calibrated=False)
    np.testing.assert_allclose(formal.threshold, 3)
    np.testing.assert_allclose(formal.limit * contrast.threshold, 3 * contrast.limit, rtol=1e-5)
    assert (formal.half_low < contrast.half_low).all()


@pytest.mark.slow
def test_rings_that_are_not_seen_are_left_out(contrast):
    y, x = np.indices((SIDE, SIDE))
    masked = np.where(np.hypot(y - 20, x - 20) < 6.5, np.nan, CUBE)
    found = curve(searched(masked))
    np.testing.assert_allclose(found.separation_px, contrast.separation_px[1:])
    assert np.isfinite(found.half_low).all()


@pytest.mark.slow
def test_progress_is_shown_round_by_round(search):
    seen = []

    def track(items, total):
        for item in items:
            seen.append(total)
            yield item

    curve(search, track=track)
    assert seen == [ROUNDS] * ROUNDS + [len(MULTIPLES)] * len(MULTIPLES)


# --- the rings


def field_of(rows: slice, columns: slice, shape=(44, 44)) -> np.ndarray:
    whole = np.zeros(shape, bool)
    whole[rows, columns] = True
    return whole


def test_rings_by_hand():
    whole = field_of(slice(3, 41), slice(3, 41))
    np.testing.assert_allclose(ring_separations(whole, (22.0, 22.0), FWHM, 12), [3.5, 7.125, 10.75, 14.375, 18.0])
    np.testing.assert_allclose(ring_separations(whole, (22.0, 22.0), FWHM, 2), [3.5, 18.0])
    np.testing.assert_allclose(ring_separations(whole, (22.0, 22.0), FWHM, 1), [3.5])


@pytest.mark.parametrize(
    ("rows", "columns", "centre", "expected"),
    [
        (slice(4, 5), slice(4, 5), (4.0, 4.0), [1.0]),  # one place
        (slice(3, 6), slice(3, 6), (4.0, 4.0), [1.0]),
        (slice(2, 8), slice(0, 44), (5.0, 20.0), [2.0]),  # no circle of one FWHM
        (slice(3, 41), slice(3, 41), (0.0, 0.0), [1.0]),  # the centre is not in the field
        (slice(3, 41), slice(3, 41), (8.0, 30.0), [3.5]),  # no room for a second one
    ],
)
def test_rings_of_tiny_fields_and_off_centre(rows, columns, centre, expected):
    np.testing.assert_allclose(ring_separations(field_of(rows, columns), centre, FWHM, 12), expected)


@pytest.mark.parametrize("centre", [(22.0, 22.0), (15.5, 27.25), (13.0, 22.0)])
@pytest.mark.parametrize("fwhm", [1.5, 3.5, 4.6])
@pytest.mark.parametrize("n", [3, 12])
def test_rings_lie_in_the_field_one_fwhm_apart(centre, fwhm, n):
    found = ring_separations(field_of(slice(3, 41), slice(3, 41)), centre, fwhm, n)
    assert 2 <= len(found) <= n
    assert found[0] == fwhm
    assert (np.diff(found) >= fwhm - 1e-9).all()
    assert found[-1] == min(centre[0] - 3, 40 - centre[0], centre[1] - 3, 40 - centre[1])


@pytest.mark.slow
def test_throughput_at_every_pixel(contrast):
    found = throughput_map(contrast, (SIDE, SIDE + 3), CENTRE)
    assert found.shape == (SIDE, SIDE + 3)
    assert found[20, 20] == contrast.flux_throughput[0]
    assert found[20, 42] == contrast.flux_throughput[-1]
    assert found[20, 20 + 9] == found[20 - 9, 20]
    at = np.interp(9, contrast.separation_px, contrast.flux_throughput)
    assert found[20, 29] == pytest.approx(at)
