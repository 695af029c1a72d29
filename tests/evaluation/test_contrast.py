"""Limits of detection: that half of the sources at the limit are found, and what limits must not depend on."""

from dataclasses import fields

import numpy as np
import pytest
from references import paco as reference
from scipy.ndimage import gaussian_filter

from pulmo_jax.evaluation.contrast import ROUNDS, Contrast, contrast_curve, ring_separations, throughput_map
from pulmo_jax.evaluation.null_field import NullProfile
from pulmo_jax.methods.paco import LikelihoodMaps, Observation, Settings, compute_maps, observe

FRAMES, SIDE, FWHM = 30, 44, 3.5
CENTRE = (22.0, 22.0)
ANGLES = np.linspace(-50, 50, FRAMES)
SETTINGS = Settings()
DIRECTIONS, RINGS = 12, 5


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


def curve(cube: np.ndarray, angles: np.ndarray = ANGLES, **options) -> Contrast:
    return contrast_curve(ready(cube, angles), SETTINGS, n_directions=DIRECTIONS, n_rings=RINGS, **options)


CUBE = noise(0)


@pytest.fixture(scope="module")
def contrast() -> Contrast:
    return curve(CUBE)


@pytest.fixture(scope="module")
def empty() -> LikelihoodMaps:
    return compute_maps(ready(CUBE), SETTINGS)


def pixels_on(separation: float) -> np.ndarray:
    """(N, 2): pixels near a ring, in other directions than those that the limit was found in."""
    theta = 2 * np.pi * (np.arange(DIRECTIONS) + 0.37) / DIRECTIONS
    return np.round(np.array(CENTRE) + separation * np.stack([np.sin(theta), np.cos(theta)], -1)).astype(int)


def measured(contrast: Contrast, fluxes: np.ndarray, empty: LikelihoodMaps) -> np.ndarray:
    """(N, 3) of sources injected one at a time: SNR, what it has risen by, and the share of the flux that is left."""
    rows = []
    for separation, flux in zip(contrast.separation_px, fluxes, strict=True):
        for y, x in pixels_on(separation):
            cube = reference.inject(CUBE, ANGLES, PSF, float(y), float(x), flux)
            maps = compute_maps(ready(cube), SETTINGS)
            rise = (maps.flux[y, x] - empty.flux[y, x]) / flux
            rows.append((maps.snr[y, x], maps.snr[y, x] - empty.snr[y, x], rise))
    return np.array(rows)


def outer(contrast: Contrast) -> Contrast:
    """The rings that have a limit."""
    return Contrast(*(getattr(contrast, field.name)[1:] for field in fields(contrast)))


# --- what a limit means


def test_half_of_the_sources_at_the_limit_are_found(contrast, empty):
    rings = outer(contrast)
    assert np.isfinite(rings.limit_corrected).all()
    snr, gain, share = measured(rings, rings.limit_corrected, empty).T
    assert len(snr) >= 40
    deviation = 3 * np.sqrt(0.25 / len(snr))  # three binomial standard deviations
    assert 0.5 - deviation < (snr >= 5).mean() < 0.5 + deviation
    assert gain.mean() == pytest.approx(5, abs=0.2)
    by_ring = share.reshape(-1, DIRECTIONS)
    np.testing.assert_allclose(by_ring.mean(1), rings.flux_throughput, atol=0.06)


def test_few_are_found_at_the_limit_that_knows_nothing_of_self_subtraction(contrast, empty):
    rings = outer(contrast)
    snr, gain, _ = measured(rings, rings.limit, empty).T
    assert (snr >= 5).mean() < 0.1
    assert 1.5 < gain.mean() < 3.5


def test_limits_are_those_of_the_maps(contrast, empty):
    for k, separation in enumerate(contrast.separation_px):
        y, x = pixels_on(separation).T
        assert contrast.limit[k] == pytest.approx(5 * np.median(empty.flux_std[y, x]), rel=0.08)


def test_correction_is_the_throughput(contrast):
    rings = outer(contrast)
    np.testing.assert_allclose(rings.limit_corrected * rings.throughput, rings.limit, rtol=0.05)
    assert (rings.limit_corrected > rings.limit).all()
    for share, scatter in (
        (contrast.throughput, contrast.throughput_std),
        (contrast.flux_throughput, contrast.flux_throughput_std),
    ):
        assert (share < 1).all()
        assert (share > 0).all()
        assert (np.diff(share)[:2] > 0).all()  # near the centre nothing leaves its own place
        assert ((scatter > 0) & (scatter < 0.15)).all()
    np.testing.assert_array_equal(contrast.n, DIRECTIONS)
    np.testing.assert_array_equal(contrast.threshold, 5)


def test_no_limit_near_the_centre(contrast):
    """A source that moves by less than its width is taken for the background however bright it is."""
    assert np.isnan(contrast.limit_corrected[0])
    assert np.isfinite(contrast.limit[0])
    still = curve(CUBE, ANGLES / 30)
    assert np.isnan(still.limit_corrected).all()
    assert (still.throughput < 0.2).all()


def test_more_rotation_leaves_more(contrast):
    """And after a whole turn no ring is without a limit."""
    turn = curve(CUBE, np.arange(FRAMES) * 360 / FRAMES)
    assert (turn.throughput > contrast.throughput).all()
    assert (turn.limit_corrected[1:] < contrast.limit_corrected[1:]).all()
    assert np.isfinite(turn.limit_corrected).all()


# --- what it must not depend on


def test_unit_and_static_background(contrast):
    background = 1000 * np.random.default_rng(1).random((SIDE, SIDE))
    other = curve(64 * (CUBE + background))
    for field in fields(Contrast):
        scale = 64 if field.name in ("limit", "limit_corrected") else 1
        np.testing.assert_allclose(
            getattr(other, field.name), scale * getattr(contrast, field.name), rtol=5e-3, atol=2e-3, err_msg=field.name
        )


def test_thresholds(contrast):
    """Of a null twice as wide, 2.5 times the spread are the 5 sigma of one that is not."""
    rings = np.array([2.0, 30.0])
    null = NullProfile(rings, 0 * rings, 2 + 0 * rings, rings, rings, rings)
    calibrated = curve(CUBE, threshold=2.5, null=null)
    for field in fields(Contrast):
        np.testing.assert_allclose(getattr(calibrated, field.name), getattr(contrast, field.name), err_msg=field.name)
    lower = curve(CUBE, threshold=3.0)
    np.testing.assert_array_equal(lower.threshold, 3)
    np.testing.assert_allclose(lower.limit, 0.6 * contrast.limit, rtol=1e-5)
    assert (lower.limit_corrected[1:] < 0.6 * contrast.limit_corrected[1:]).all()  # fainter ones lose less
    assert (lower.throughput[1:] > contrast.throughput[1:]).all()


def test_rings_that_are_not_seen_are_left_out(contrast):
    y, x = np.indices((SIDE, SIDE))
    masked = np.where(np.hypot(y - 22, x - 22) < 6.5, np.nan, CUBE)
    found = curve(masked)
    np.testing.assert_allclose(found.separation_px, contrast.separation_px[1:])
    np.testing.assert_allclose(found.limit[2:], contrast.limit[3:], rtol=1e-4)


def test_progress_is_shown_round_by_round():
    seen = []

    def track(items, total):
        for item in items:
            seen.append((item, total))
            yield item

    contrast_curve(ready(CUBE), SETTINGS, n_directions=DIRECTIONS, n_rings=2, track=track)
    assert seen == [(number, ROUNDS) for number in range(ROUNDS)]


# --- the rings


def field_of(rows: slice, columns: slice, shape=(SIDE, SIDE)) -> np.ndarray:
    whole = np.zeros(shape, bool)
    whole[rows, columns] = True
    return whole


def test_rings_by_hand():
    whole = field_of(slice(3, 41), slice(3, 41))
    np.testing.assert_allclose(ring_separations(whole, CENTRE, FWHM, 12), [3.5, 7.125, 10.75, 14.375, 18.0])
    np.testing.assert_allclose(ring_separations(whole, CENTRE, FWHM, 2), [3.5, 18.0])
    np.testing.assert_allclose(ring_separations(whole, CENTRE, FWHM, 1), [3.5])


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


def test_throughput_at_every_pixel(contrast):
    found = throughput_map(contrast, (SIDE, SIDE + 3), CENTRE)
    assert found.shape == (SIDE, SIDE + 3)
    assert found[22, 22] == contrast.flux_throughput[0]
    assert found[22, 46] == contrast.flux_throughput[-1]
    assert found[22, 22 + 9] == found[22 - 9, 22]
    at = np.interp(9, contrast.separation_px, contrast.flux_throughput)
    assert found[22, 31] == pytest.approx(at)
