"""The centre of a halo: against images whose centre is known, and its standard errors against the scatter."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from scipy.ndimage import gaussian_filter

from pulmo_jax.evaluation.halo_centre import halo_centre

BETA_PICTORIS = Path(__file__).parents[3] / "shared" / "data" / "adi_betapic" / "cube_planet_removed.fits"


def halo(centre, size=100, static=0.0, seed=0):
    """Power law with a hole and multiplicative speckles of the width of a PSF; an independent model."""
    y, x = np.mgrid[:size, :size]
    r2 = (y - centre[0]) ** 2 + (x - centre[1]) ** 2
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((size, size)), 2, mode="wrap")
    return 1e4 / (r2 + 60) * (1 - np.exp(-r2 / 40)) * (1 + static * noise / noise.std())


@pytest.mark.parametrize("centre", [(50.0, 50.0), (51.3, 48.6), (46.2, 53.9), (50.5, 50.5)])
def test_a_smooth_halo_is_centred_exactly(centre):
    found = halo_centre(halo(centre), (50.0, 50.0), 6, 40)
    assert found is not None
    assert np.hypot(found.y - centre[0], found.x - centre[1]) < 0.03


def test_a_bright_companion_and_unknown_pixels_hardly_matter():
    image = halo((49.4, 50.8))
    y, x = np.mgrid[:100, :100]
    image += 300 * np.exp(-((y - 70) ** 2 + (x - 50) ** 2) / 8)
    image[40:44, 60:70] = np.nan
    found = halo_centre(image, (50.0, 50.0), 6, 40)
    assert found is not None
    assert np.hypot(found.y - 49.4, found.x - 50.8) < 0.1


def test_standard_errors_are_those_of_speckles():
    found = [halo_centre(halo((50, 50), static=0.3, seed=seed), (51, 49), 9, 45) for seed in range(30)]
    y, x, y_std, x_std = np.array([(f.y, f.x, f.y_std, f.x_std) for f in found if f is not None]).T
    assert len(y) >= 29
    pulls = np.concatenate([(y - 50) / y_std, (x - 50) / x_std])
    assert 0.6 < pulls.std() < 1.5  # 60 values
    assert 0.05 < np.hypot(y - 50, x - 50).mean() < 1


def test_offset_in_pixels_and_in_errors():
    found = halo_centre(halo((50, 50), static=0.2), (50, 50), 6, 40)
    assert found is not None
    distance, errors = found.offset_from((found.y + 3 * found.y_std, found.x - 4 * found.x_std))
    assert errors == pytest.approx(5)
    assert distance == pytest.approx(np.hypot(3 * found.y_std, 4 * found.x_std))


@pytest.mark.parametrize("image", [np.zeros((60, 60)), np.full((60, 60), np.nan), np.ones((60, 60))])
def test_no_halo_no_centre(image):
    assert halo_centre(image, (30, 30), 5, 25) is None


def test_noise_is_no_halo():
    found = [halo_centre(np.random.default_rng(k).standard_normal((60, 60)), (30, 30), 5, 25) for k in range(40)]
    assert found == [None] * 40


@pytest.mark.skipif(not BETA_PICTORIS.exists(), reason="the shared data are not there")
def test_beta_pictoris_is_at_its_known_centre():
    found = halo_centre(fits.getdata(BETA_PICTORIS).astype(float).mean(axis=0), (52, 47), 9.2, 45)
    assert found is not None
    assert found.offset_from((50, 50))[0] < 0.6
    assert found.offset_from((50, 50))[1] < 3
