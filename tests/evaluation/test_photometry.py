"""Contrast and magnitudes against astropy, against simulated fluxes, and where a flux has no logarithm."""

import astropy.units as u
import numpy as np
import pytest

from pulmo_jax.data.psf import prepare_psf
from pulmo_jax.data.synthetic import synthetic_psf
from pulmo_jax.evaluation.photometry import (
    delta_magnitude,
    delta_magnitude_std,
    flux_definition,
    relative_photometry,
)


def test_magnitudes_are_those_of_astropy():
    contrast = np.array([[1.0, 1e-4], [3.7e-6, 2.5]])
    expected = (contrast * u.dimensionless_unscaled).to_value(u.mag())
    np.testing.assert_allclose(delta_magnitude(contrast), expected, atol=1e-12)
    assert float(delta_magnitude(1e-4)) == pytest.approx(10)


@pytest.mark.parametrize("flux", [0.0, -3.0, float("nan")])
def test_flux_that_is_not_positive_has_no_magnitude(flux):
    found = relative_photometry(flux, 2.0, 1000.0)
    assert np.isnan(found["delta_mag"])
    assert np.isnan(found["delta_mag_std"])
    np.testing.assert_allclose(found["contrast"], flux / 1000)
    assert float(found["contrast_std"]) == pytest.approx(2e-3)


def test_error_of_a_magnitude_is_its_scatter_for_a_precise_flux():
    draws = 1e-4 * (1 + 0.02 * np.random.default_rng(0).standard_normal(200_000))
    assert float(delta_magnitude_std(1e-4, 2e-6)) == pytest.approx(float(delta_magnitude(draws).std()), rel=5e-3)


def test_error_at_five_standard_deviations_lies_between_the_asymmetric_ones():
    """The figures of the docstring."""
    brighter, fainter = -delta_magnitude(1.2), delta_magnitude(0.8)
    assert float(brighter) == pytest.approx(0.198, abs=5e-4)
    assert float(fainter) == pytest.approx(0.242, abs=5e-4)
    assert float(delta_magnitude_std(1.0, 0.2)) == pytest.approx(0.217, abs=5e-4)


def test_star_flux_differs_between_channels():
    flux, star = np.array([10.0, 20.0, np.nan]), np.array([1e3, 4e3, 5e3])
    found = relative_photometry(flux, 0.1 * flux, star)
    np.testing.assert_allclose(found["contrast"], [0.01, 0.005, np.nan])
    np.testing.assert_allclose(found["delta_mag"], [5.0, 5.752575, np.nan], atol=1e-6)
    np.testing.assert_allclose(found["delta_mag_std"], [0.1085736, 0.1085736, np.nan], atol=1e-6)


@pytest.mark.parametrize("kind", ["fwhm", "aperture", "peak", "none"])
def test_unit_is_what_a_source_of_flux_one_measures(kind):
    """The sentence of the unit holds for the normalised PSF: its sum in the disc, its peak, or the image itself."""
    image = 7.0 * synthetic_psf()
    psf = prepare_psf(image, kind, 3.0 if kind == "aperture" else None)
    said = flux_definition(kind, psf.aperture_px)
    if kind == "none":
        assert "as given" in said
        np.testing.assert_allclose(psf.stamp, image)
    elif kind == "peak":
        assert "unit peak" in said
        assert psf.stamp.max() == pytest.approx(1)
    else:
        assert ("diameter FWHM" if kind == "fwhm" else "radius 3 px") in said
        again = prepare_psf(psf.stamp, kind, 3.0 if kind == "aperture" else None)
        assert again.flux == pytest.approx(1)
