"""The PSF: its place, width and flux against analytic ones and fine sampling; when its pixels are left alone."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given
from hypothesis import strategies as st
from references import paco
from scipy.special import j1

from pulmo_jax.core.psf import sample_footprint
from pulmo_jax.data.psf import disc_overlap, fit_gaussian, prepare_psf, shift
from pulmo_jax.types import InputError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "adi_betapic"


def gaussian(side: int, y: float, x: float, fwhm: float = 4.6, ratio: float = 1.0, turn: float = 0.0) -> np.ndarray:
    """Of peak 1; `fwhm` is the geometric mean of the axes, `ratio` one over the other, the longer one at `turn`."""
    rows, columns = np.mgrid[:side, :side]
    along = (rows - y) * np.sin(turn) + (columns - x) * np.cos(turn)
    across = (rows - y) * np.cos(turn) - (columns - x) * np.sin(turn)
    return np.exp(-4 * np.log(2) * (along**2 / ratio + across**2 * ratio) / fwhm**2)


def airy(side: int, y: float, x: float, resolution: float = 4.5) -> np.ndarray:
    """(2 J1(u) / u)^2, u = pi r / (lambda / D); the first zero at 1.22 lambda / D."""
    rows, columns = np.mgrid[:side, :side]
    u = np.pi * np.maximum(np.hypot(rows - y, columns - x), 1e-9) / resolution
    return (2 * j1(u) / u) ** 2


# --- place and width


@given(
    st.floats(-2, 2), st.floats(-2, 2), st.floats(1.5, 7), st.floats(1, 1.7), st.floats(0, np.pi), st.floats(1e-6, 1e9)
)
def test_place_and_width_of_a_gaussian(dy, dx, fwhm, ratio, turn, scale):
    centre, found = fit_gaussian(scale * gaussian(31, 15 + dy, 15 + dx, fwhm, ratio, turn))
    np.testing.assert_allclose(centre, (15 + dy, 15 + dx), atol=1e-5)
    assert found == pytest.approx(fwhm, rel=1e-5)


def test_width_of_an_airy_pattern():
    """Its FWHM is 1.029 lambda / D; a Gaussian that fits its core to the first dark ring is 6 % narrower."""
    centre, fwhm = fit_gaussian(airy(39, 19.2, 18.7))
    np.testing.assert_allclose(centre, (19.2, 18.7), atol=2e-3)
    assert fwhm == pytest.approx(0.94 * 1.029 * 4.5, rel=0.01)


def test_noise_moves_the_fit_little():
    noise = np.random.default_rng(0).normal(0, 0.01, (39, 39))
    centre, fwhm = fit_gaussian(gaussian(39, 19.3, 18.9) + noise)
    np.testing.assert_allclose(centre, (19.3, 18.9), atol=0.02)
    assert fwhm == pytest.approx(4.6, rel=0.01)


# --- moving


@pytest.mark.parametrize(("dy", "dx"), [(0.0, 0.0), (0.3, -0.45), (2.0, -3.0), (1.7, 0.2)])
def test_shift_is_the_package_s_interpolation(dy, dx):
    stamp = np.random.default_rng(1).normal(size=(9, 9))
    offsets = np.argwhere(np.ones((9, 9))) - 4
    np.testing.assert_allclose(shift(stamp, dy, dx).ravel(), paco.shift_psf(stamp, dy, dx, offsets), atol=1e-12)
    if dy == dx:
        found = sample_footprint(stamp, offsets, np.array([dy]))[0, 0]
        np.testing.assert_allclose(shift(stamp, dy, dx).ravel(), found, atol=1e-12)


@pytest.mark.parametrize("side", [8, 9])
def test_shift_by_whole_pixels_rolls(side):
    stamp = np.random.default_rng(2).normal(size=(side, side))
    np.testing.assert_allclose(shift(stamp, 2.0, -3.0), np.roll(stamp, (2, -3), axis=(0, 1)), atol=1e-12)


@pytest.mark.parametrize("side", [30, 31])
def test_shift_of_a_smooth_stamp_is_exact(side):
    found = shift(gaussian(side, 14, 15), 0.4, -0.7)
    np.testing.assert_allclose(found, gaussian(side, 14.4, 14.3), atol=1e-6)


# --- centring


@pytest.mark.parametrize(("dy", "dx"), [(0.0, 0.0), (0.03, -0.03)])
def test_pixels_of_a_centred_stamp_are_untouched(dy, dx):
    stamp = gaussian(31, 15 + dy, 15 + dx)
    psf = prepare_psf(stamp, flux="none")
    np.testing.assert_array_equal(psf.stamp, stamp)
    np.testing.assert_allclose(psf.offset_px, (dy, dx), atol=1e-6)


@pytest.mark.parametrize(
    ("side", "y", "x", "left"),
    [
        (31, 15.3, 14.6, 31),
        (31, 15.0, 15.06, 31),
        (31, 16.2, 15.0, 29),
        (31, 12.4, 16.8, 25),
        (30, 15.0, 15.0, 29),
        (30, 14.0, 14.0, 29),
        (30, 14.5, 14.5, 29),
        (30, 14.6, 14.9, 29),
    ],
)
def test_other_stamps_are_centred_and_odd(side, y, x, left):
    psf = prepare_psf(gaussian(side, y, x), flux="none")
    np.testing.assert_allclose(psf.offset_px, (y - side // 2, x - side // 2), atol=1e-5)
    assert psf.stamp.shape == (left, left)
    np.testing.assert_allclose(psf.stamp, gaussian(left, left // 2, left // 2), atol=1e-5)


def test_recentring_can_be_turned_off():
    stamp = gaussian(31, 15.3, 14.6)
    np.testing.assert_array_equal(prepare_psf(stamp, flux="none", recentre_px=1.0).stamp, stamp)


# --- flux


@given(st.floats(0.05, 9), st.floats(4, 10), st.floats(4, 10))
def test_disc_overlap_adds_up(radius, y, x):
    area = disc_overlap(15, (y, x), radius)
    assert area.min() >= 0
    assert area.max() <= 1
    if radius <= 4.5:
        assert area.sum() == pytest.approx(np.pi * radius**2, rel=1e-9)


def test_rounding_takes_no_root_of_a_negative_number():
    for radius in np.random.default_rng(0).uniform(1, 4, 2000):  # its square may be rounded up or down
        assert np.isfinite(disc_overlap(9, (4.0, 4.0), float(radius))).all()


@pytest.mark.parametrize("radius", [0.2, 0.5, 1.0, 2.3, 3.7, 6.0])
@pytest.mark.parametrize("centre", [(4.0, 4.0), (4.3, 3.6), (0.0, 8.4)])
def test_disc_overlap_against_fine_sampling(radius, centre):
    fine = 400
    points = (np.arange(9 * fine) + 0.5) / fine - 0.5
    inside = (points[:, None] - centre[0]) ** 2 + (points - centre[1]) ** 2 < radius**2
    expected = inside.reshape(9, fine, 9, fine).mean(axis=(1, 3))
    np.testing.assert_allclose(disc_overlap(9, centre, radius), expected, atol=3e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 7e5])
def test_flux_in_the_fwhm_of_a_gaussian_is_half_of_it(scale):
    fwhm = 4.6
    psf = prepare_psf(scale * gaussian(39, 19, 19, fwhm), flux="fwhm")
    total = scale * np.pi * fwhm**2 / (4 * np.log(2))
    assert psf.flux == pytest.approx(total / 2, rel=0.02)  # pixels average, so that it is not quite half
    assert psf.aperture_px == pytest.approx(fwhm / 2)
    assert (disc_overlap(39, (19.0, 19.0), fwhm / 2) * psf.stamp).sum() == pytest.approx(1)
    assert psf.stamp.sum() * psf.flux == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("radius", [0.4, 3.0, 12.0])
def test_flux_in_an_aperture(radius):
    stamp = gaussian(31, 15.2, 14.8)
    psf = prepare_psf(stamp, flux="aperture", aperture_px=radius)
    assert (psf.flux_kind, psf.aperture_px) == ("aperture", radius)
    assert (disc_overlap(31, (15.0, 15.0), radius) * psf.stamp).sum() == pytest.approx(1)
    np.testing.assert_allclose(psf.stamp * psf.flux, gaussian(31, 15, 15), atol=1e-5)


def test_flux_of_a_flat_field_is_the_area():
    """Pixels on the edge count by the share that lies inside."""
    stamp = gaussian(31, 15, 15, fwhm=2.5) * 100 + 1
    radius = 9.3
    expected = np.pi * radius**2 + 100 * np.pi * 2.5**2 / (4 * np.log(2))
    assert prepare_psf(stamp, flux="aperture", aperture_px=radius).flux == pytest.approx(expected, rel=1e-4)


def test_peak_is_that_between_the_pixels():
    psf = prepare_psf(7 * gaussian(31, 15.5, 14.5), flux="peak")
    assert psf.flux == pytest.approx(7, rel=1e-4)
    middle = len(psf.stamp) // 2
    assert psf.stamp.max() == psf.stamp[middle, middle] == 1
    assert psf.aperture_px is None


def test_no_normalisation():
    stamp = 7 * gaussian(31, 15, 15)
    psf = prepare_psf(stamp, flux="none")
    assert (psf.flux, psf.flux_kind, psf.aperture_px) == (1.0, "none", None)
    np.testing.assert_array_equal(psf.stamp, stamp)


@pytest.mark.parametrize("flux", ["peak", "fwhm"])
def test_a_normalised_psf_has_flux_one(flux):
    once = prepare_psf(123 * airy(38, 18.7, 19.4), flux=flux)
    again = prepare_psf(once.stamp, flux=flux)
    assert again.flux == pytest.approx(1, abs=1e-3)
    assert again.fwhm_px == pytest.approx(once.fwhm_px, rel=1e-3)


def test_float32_is_computed_in_float64():
    stamp = gaussian(31, 15.3, 14.6).astype(np.float32)
    psf = prepare_psf(stamp)
    assert psf.stamp.dtype == np.float64
    np.testing.assert_array_equal(psf.stamp, prepare_psf(stamp.astype(np.float64)).stamp)


def test_smallest_stamp():
    psf = prepare_psf(gaussian(3, 1, 1, fwhm=1.5))
    assert psf.stamp.shape == (3, 3)
    assert psf.fwhm_px == pytest.approx(1.5, rel=1e-3)


# --- refusals


def hot_pixel() -> np.ndarray:
    stamp = np.zeros((15, 15))
    stamp[7, 7] = 1
    return stamp


@pytest.mark.parametrize(
    ("stamp", "found"),
    [
        (np.full((15, 15), np.nan), "225 of 225 pixels are not finite"),
        (np.zeros((15, 15)), "no positive flux"),
        (-gaussian(15, 7, 7), "no positive flux"),
        (gaussian(15, 7, 7) - 0.5, "no positive flux"),
        (np.ones((2, 2)), "2 x 2 px"),
        (np.ones((15, 15)), "no point source"),
        (hot_pixel(), "no point source"),
        (np.add.outer(np.arange(15.0), np.zeros(15)), "no point source"),
        (gaussian(15, 7, 0.2), "at the edge"),
        (gaussian(15, -1.5, 7), "no point source"),
    ],
)
def test_no_psf(stamp, found):
    with pytest.raises(InputError, match=found):
        prepare_psf(stamp)


@pytest.mark.parametrize("radius", [None, 0.0, -1.0, 7.6, np.nan])
def test_aperture_that_the_stamp_does_not_hold(radius):
    with pytest.raises(InputError, match="at most 7.5 px"):
        prepare_psf(gaussian(15, 7, 7), flux="aperture", aperture_px=radius)


@pytest.mark.skipif(not REAL.is_dir(), reason="the data is not here")
def test_real_psf():
    """VLT/NaCo in L'; the FWHM of the Airy pattern that fits best is 4.60 px."""
    stamp = fits.getdata(REAL / "psf.fits").astype(np.float64)
    psf = prepare_psf(stamp)
    assert psf.fwhm_px == pytest.approx(4.6, rel=0.04)
    assert np.hypot(*psf.offset_px) < 0.05
    np.testing.assert_allclose(psf.stamp, stamp / psf.flux)
