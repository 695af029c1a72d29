"""The synthetic stack: where its planets are, that nothing else depends on them, and what its docstring claims."""

import time

import numpy as np
import pytest
from references import paco
from scipy.ndimage import map_coordinates

from pulmo_jax.data.psf import fit_gaussian, prepare_psf
from pulmo_jax.data.synthetic import (
    FWHM_PX,
    PSF_SIDE,
    parallactic_angles,
    rotating_stack,
    spectral_stack,
    synthetic_psf,
)


def added(planets: tuple, **options) -> tuple[np.ndarray, np.ndarray]:
    """What planets add to each frame, and the angles."""
    stack = rotating_stack(3, planets=planets, **options).stack
    return stack.cube.astype(float) - rotating_stack(3, planets=(), **options).stack.cube, stack.angles_deg


def halo(r: np.ndarray) -> np.ndarray:
    return 160 * (16 / r) ** 2 * (1 - np.exp(-((r / 6.9) ** 2))) ** 2


def radius(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.hypot(y - height // 2, x - width // 2)


# --- the planets


def test_sign_of_the_angles_by_hand():
    """A source on the x axis of the map stands, at angle +90 degrees, above it, where y is smaller."""
    frames, angles = added(((50.0, 70.0, 1000.0),), frames=2, rotation_deg=180.0)
    for frame, angle in zip(frames, np.deg2rad(angles), strict=True):
        y, x = np.unravel_index(frame.argmax(), frame.shape)
        assert (y, x) == (round(50 - 20 * np.sin(angle)), round(50 + 20 * np.cos(angle)))
    assert angles[0] < -60
    assert angles[1] > 90


@pytest.mark.parametrize("size", [100, 81, (60, 90), (91, 64)])
@pytest.mark.parametrize("dy_dx", [(-11.3, 14.8), (6.25, -17.6)])
def test_places_and_brightness_in_every_frame(size, dy_dx):
    height, width = (size, size) if isinstance(size, int) else size
    centre = (height // 2, width // 2)
    place = (centre[0] + dy_dx[0], centre[1] + dy_dx[1])
    frames, angles = added(((*place, 1e5),), frames=8, size=size)
    psf = prepare_psf(synthetic_psf())
    offsets = paco.disc(4)
    for frame, (y, x) in zip(frames, paco.tracks(angles, *place, centre), strict=True):
        row, column = round(y), round(x)
        found = frame[row + offsets[:, 0], column + offsets[:, 1]]
        expected = 1e5 * paco.shift_psf(psf.stamp, y - row, x - column, offsets)
        np.testing.assert_allclose(found, expected, atol=1e-3)  # the cube is float32
        np.testing.assert_allclose(fit_gaussian(frame[row - 9 : row + 10, column - 9 : column + 10])[0],
                                   (9 + y - row, 9 + x - column), atol=2e-3)  # fmt: skip


def test_planets_add_up_and_flux_is_linear():
    one, two = (45.0, 70.5, 300.0), (20.2, 30.1, 40.0)
    both, first, second = (added(planets)[0] for planets in ((one, two), (one,), (two,)))
    np.testing.assert_allclose(both, first + second, atol=1e-3)
    np.testing.assert_allclose(added(((45.0, 70.5, 900.0),))[0], 3 * first, atol=1e-3)


@pytest.mark.parametrize("place", [(1.0, 50.0), (50.0, 98.6), (-3.0, 50.0), (50.0, 250.0), (-200.0, -200.0)])
def test_planets_at_the_edge_are_cut(place):
    frames, angles = added(((*place, 1e4),), frames=5)
    psf, half = synthetic_psf(), PSF_SIDE // 2
    for frame, (y, x) in zip(frames, paco.tracks(angles, *place, (50, 50)), strict=True):
        pixels = np.argwhere(np.ones(frame.shape)) - (round(y), round(x))
        inside = (abs(pixels) <= half).all(axis=1)
        expected = np.zeros(len(pixels))
        expected[inside] = 1e4 * paco.shift_psf(psf, y - round(y), x - round(x), pixels[inside])
        np.testing.assert_allclose(frame.ravel(), expected, atol=1e-3)


@pytest.mark.parametrize("size", [100, 64, (70, 120)])
def test_default_planets_get_fainter_outwards_and_stay_in_the_frame(size):
    height, width = (size, size) if isinstance(size, int) else size
    planets = rotating_stack(0, frames=3, size=size).planets
    separations = [np.hypot(y - height // 2, x - width // 2) for y, x, _ in planets]
    np.testing.assert_allclose(separations, np.array([0.16, 0.27, 0.38]) * min(height, width))
    fluxes = [flux for _, _, flux in planets]
    assert fluxes == sorted(fluxes, reverse=True)


def test_default_planets_can_be_found():
    """The matched filter of the slow reference at their places, and nothing like it in the stack without them."""
    offsets = paco.disc(4)

    def snr(cube: np.ndarray, angles: np.ndarray, psf: np.ndarray, y: float, x: float) -> float:
        a = b = 0.0
        for t, (py, px) in enumerate(paco.tracks(angles, y, x, (50, 50))):
            row, column = round(py), round(px)
            mean, precision = paco.learn(cube, row, column, offsets)
            h = paco.shift_psf(psf, py - row, px - column, offsets)
            a += h @ precision @ h
            b += h @ precision @ (paco.patches(cube, row, column, offsets)[t] - mean)
        return b / np.sqrt(a)

    found, empty = rotating_stack(0), rotating_stack(0, planets=())
    for y, x, _ in found.planets:
        stack = found.stack
        assert snr(stack.cube.astype(float), stack.angles_deg, stack.psf, y, x) > 5.5
        assert abs(snr(empty.stack.cube.astype(float), stack.angles_deg, stack.psf, y, x)) < 3.5


# --- determinism and cost


def test_the_same_seed_gives_the_same_stack():
    first, again, other = (rotating_stack(seed, frames=5).stack for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.cube, again.cube)
    np.testing.assert_array_equal(first.angles_deg, other.angles_deg)
    assert np.abs(first.cube - other.cube).std() > 1


def test_noise_is_the_same_away_from_the_planets():
    frames, _ = added(((50.0, 80.0, 100.0),), frames=4, rotation_deg=0.0)
    assert np.abs(frames[:, :, : 80 - PSF_SIDE // 2]).max() == 0
    assert frames.max() > 5


def test_fast_enough():
    start = time.process_time()
    rotating_stack(0)
    assert time.process_time() - start < 3  # 0.2 s, without the checks of annotations


@pytest.mark.parametrize("frames", [1, 2])
def test_few_frames(frames):
    stack = rotating_stack(0, frames=frames, size=31).stack
    assert stack.cube.shape == (frames, 31, 31)
    assert np.isfinite(stack.cube).all()
    assert np.isfinite(stack.angles_deg).all()


# --- what the docstring claims


def test_angles():
    angles = parallactic_angles(61, 70.0)
    steps = np.diff(angles)
    assert np.ptp(angles) == pytest.approx(70)
    assert steps.min() > 0
    assert steps.max() > 2 * steps.min()
    assert abs(angles[steps.argmax()]) < 2  # fastest near 0
    np.testing.assert_array_equal(parallactic_angles(61, -70.0), -angles)
    np.testing.assert_array_equal(parallactic_angles(5, 0.0), 0)


def test_psf():
    psf = prepare_psf(synthetic_psf())
    assert psf.flux == pytest.approx(1, abs=1e-9)
    assert psf.fwhm_px == pytest.approx(FWHM_PX, rel=0.01)
    np.testing.assert_allclose(psf.offset_px, 0, atol=1e-9)
    profile = synthetic_psf()[PSF_SIDE // 2, PSF_SIDE // 2 :] / synthetic_psf().max()
    assert profile[5] > profile[6] < profile[7] > profile[9]  # a ring, not a shoulder
    assert profile[7] == pytest.approx(0.018, abs=0.001)
    assert profile[-1] < 1e-6


@pytest.fixture(scope="module")
def long() -> np.ndarray:
    return rotating_stack(5, frames=1500, size=64, planets=()).stack.cube.astype(float)


def test_halo_falls_with_the_square_of_the_radius():
    means = [rotating_stack(seed, frames=20, planets=()).stack.cube.mean(axis=0) for seed in range(12)]
    mean, r = np.mean(means, axis=0), radius(100, 100)
    for low in (16, 24, 32, 40):
        ring = (r >= low) & (r < low + 4)
        assert mean[ring].mean() == pytest.approx(halo(r[ring]).mean(), rel=0.1)
        assert mean[ring].mean() == pytest.approx((160 * (16 / r[ring]) ** 2).mean(), rel=0.12)
    assert mean[r < 1].mean() < 0.1 * mean[(r > 4) & (r < 8)].mean()


def test_static_speckles_are_exponential():
    """Over many seeds at one radius: mean 1, standard deviation 0.3, and skewness 2, as of 0.7 + 0.3 Exp(1)."""
    ring = np.abs(radius(100, 100) - 20) < 0.5
    pixels = np.array([rotating_stack(s, frames=60, planets=()).stack.cube.mean(axis=0)[ring] for s in range(60)])
    pixels /= pixels.mean(axis=0)
    assert pixels.std() == pytest.approx(0.3, abs=0.04)
    assert ((pixels - 1) ** 3).mean() / pixels.std() ** 3 == pytest.approx(2, abs=0.6)


def test_variance_in_time(long):
    """0.08 and 0.12 of the halo, and the read noise of 1, in squares; so it falls with the radius."""
    r = radius(64, 64)
    for low in (10, 16, 22, 28):
        ring = (r >= low) & (r < low + 2)
        expected = (0.08**2 + 0.12**2) * halo(r[ring]) ** 2 + 1
        assert long.var(axis=0)[ring].mean() == pytest.approx(expected.mean(), rel=0.15)


def test_correlation_in_time(long):
    """exp(-lag / 2) of all but the read noise."""
    r = radius(64, 64)
    deviation = (long - long.mean(axis=0))[:, (r > 10) & (r < 14)]
    variance = (deviation**2).mean() - 1
    for lag in (1, 2, 4):
        found = (deviation[lag:] * deviation[:-lag]).mean() / variance
        assert found == pytest.approx(np.exp(-lag / 2), abs=0.06)


def test_lifetime_can_be_chosen():
    cube = rotating_stack(5, frames=400, size=40, planets=(), speckle_lifetime_frames=0.01).stack.cube.astype(float)
    deviation = cube - cube.mean(axis=0)
    assert np.abs((deviation[1:] * deviation[:-1]).mean() / (deviation**2).mean()) < 0.1


def test_quasi_static_speckles_have_the_psf_s_size(long):
    """What changes in time, less the halo's gain and the read noise: correlated as a Gaussian of the FWHM."""
    r = radius(64, 64)
    used = (r > 12) & (r < 22)
    relative = (long - long.mean(axis=0)) / halo(np.maximum(r, 1))
    relative -= np.mean(relative[:, used], axis=1)[:, None, None]
    for shift in (2, 4):
        pairs = used & np.roll(used, -shift, axis=1)
        product = (relative * np.roll(relative, -shift, axis=2))[:, pairs].mean()
        correlation = product / 0.08**2
        assert correlation == pytest.approx(np.exp(-4 * np.log(2) * (shift / FWHM_PX) ** 2), abs=0.08)


# --- several wavelengths


def test_one_channel_is_the_rotating_stack():
    one, expected = spectral_stack(2, 1, frames=4, size=40), rotating_stack(2, frames=4, size=40)
    np.testing.assert_array_equal(one.stack.cube, expected.stack.cube[None])
    np.testing.assert_array_equal(one.stack.psf, expected.stack.psf[None])
    assert one.planets == expected.planets
    assert one.spectrum.tolist() == [1.0]


def test_channels_have_the_spectrum_and_psfs_as_wide_as_their_wavelengths():
    planet = (37.3, 26.8, 1000.0)
    full, empty = (spectral_stack(4, 3, frames=3, size=48, planets=planets) for planets in ((planet,), ()))
    np.testing.assert_allclose(full.stack.wavelengths, [1, 1.15, 1.3])
    np.testing.assert_allclose(full.spectrum, [0.5, 1, 1.5])
    for channel, (psf, share) in enumerate(zip(full.stack.psf, full.spectrum, strict=True)):
        assert fit_gaussian(psf)[1] == pytest.approx(FWHM_PX * full.stack.wavelengths[channel], rel=0.02)
        assert prepare_psf(psf).flux == pytest.approx(1, rel=1e-3)
        frames = full.stack.cube[channel].astype(float) - empty.stack.cube[channel]
        for frame, (y, x) in zip(frames, paco.tracks(full.stack.angles_deg, *planet[:2], (24, 24)), strict=True):
            offsets = paco.disc(4)
            found = frame[round(y) + offsets[:, 0], round(x) + offsets[:, 1]]
            expected = share * 1000 * paco.shift_psf(psf, y - round(y), x - round(x), offsets)
            np.testing.assert_allclose(found, expected, atol=1e-2)
    other = spectral_stack(4, 3, frames=3, size=48, spectrum=np.array([2.0, 2.0, 5.0]))
    np.testing.assert_allclose(other.spectrum, np.array([2, 2, 5]) / 3)


def test_speckles_stand_at_multiples_of_the_wavelength():
    """Frames scaled about the centre by lambda_0 / lambda look alike; as they are they do not."""
    cube = spectral_stack(5, 2, frames=40, size=80, planets=()).stack.cube.mean(1).astype(float)
    y, x = np.indices(cube.shape[1:])
    ring = (np.hypot(y - 40, x - 40) > 18) & (np.hypot(y - 40, x - 40) < 28)
    at = np.stack([40 + (y - 40) * 1.3, 40 + (x - 40) * 1.3])
    back = map_coordinates(cube[1], at, order=3)
    assert np.corrcoef(cube[0][ring], back[ring])[0, 1] > 0.95
    left = [
        image[ring]
        - np.poly1d(np.polyfit(np.hypot(y - 40, x - 40)[ring], image[ring], 3))(np.hypot(y - 40, x - 40)[ring])
        for image in cube
    ]
    assert abs(np.corrcoef(*left)[0, 1]) < 0.5
