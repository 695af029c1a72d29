"""The library of spectra: the unit of the wavelengths, contrasts, absorption bands, and no near-duplicates."""

from itertools import pairwise

import numpy as np
import pytest
from astropy.io import fits
from scipy.constants import c, h, k

from pulmo_jax.data.spectral_library import (
    SAME,
    SHAPES,
    contrast,
    distinct,
    fits_unit,
    spectral_library,
    to_micrometres,
)
from pulmo_jax.types import InputError

YJH = np.linspace(0.96, 1.64, 39)  # um, as of an integral-field spectrograph


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([1.0, 1.3], None, [1.0, 1.3]),
        ([950.0, 2300.0], None, [0.95, 2.3]),
        ([1e-6, 3.8e-6], None, [1.0, 3.8]),
        ([37000.0, 48000.0], None, [3.7, 4.8]),
        ([9500.0, 16500.0], None, None),  # 9.5 to 16.5 um in nm, or 0.95 to 1.65 um in angstrom
        ([0.1, 5.0], None, None),
        ([1.0, 39.0], None, None),  # numbers of channels
        ([9500.0, 16500.0], "angstrom", [0.95, 1.65]),
        ([9500.0, 16500.0], "nm", [9.5, 16.5]),
        ([9500.0, 16500.0], "Angstrom", [0.95, 1.65]),
        ([1.0, 2.0], "micron", [1.0, 2.0]),
    ],
)
def test_unit_is_the_only_plausible_one(values, unit, expected):
    found = to_micrometres(np.array(values), unit)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("unit", ["Jy", "parsnip"])
def test_what_is_no_length_is_refused(unit):
    with pytest.raises(InputError, match="no unit of wavelength"):
        to_micrometres(np.ones(2), unit)


def test_unit_of_a_fits_file(tmp_path):
    path = tmp_path / "w.fits"
    for cards, expected in (({"BUNIT": "nm"}, "nm"), ({"BUNIT": "Jy"}, None), ({}, None), ({"BUNIT": ""}, None)):
        fits.writeto(path, np.ones(3), fits.Header(cards), overwrite=True)
        assert fits_unit(path) == expected
    column = fits.Column("WAVELENGTH", "D", unit="um", array=np.ones(3))
    fits.BinTableHDU.from_columns([column]).writeto(path, overwrite=True)
    assert fits_unit(path) == "um"
    (tmp_path / "w.txt").write_text("1 2 3")
    assert fits_unit(tmp_path / "w.txt") is None
    assert fits_unit(tmp_path / "nowhere.fits") is None


@pytest.mark.parametrize("star", [None, 6000.0])
def test_blackbody_is_plancks_law_over_the_stars(star):
    um = np.linspace(1.0, 4.8, 7)
    metres = um * 1e-6

    def planck(temperature):
        return metres**-5 / np.expm1(h * c / (metres * k * temperature))

    expected = planck(900.0) / (metres**-4 if star is None else planck(star))
    np.testing.assert_allclose(contrast(um, 900.0, {}, star), expected / expected.mean(), rtol=1e-5)


def ratio(shape: str, band: tuple[float, float], continuum: tuple[float, float]) -> float:
    """Mean flux in a band over that of the continuum, of the source itself (times lambda^-4)."""
    _, temperature, depths = next(one for one in SHAPES if one[0] == shape)
    um = np.concatenate([np.linspace(*band, 40), np.linspace(*continuum, 40)])
    flux = contrast(um, temperature, depths) * um**-4.0
    return float(flux[:40].mean() / flux[40:].mean())


@pytest.mark.parametrize(
    ("band", "continuum", "limits"),
    [
        ((1.140, 1.165), (1.260, 1.285), (0.5, 0.25, 0.1)),  # H2O-J of Burgasser et al. 2006
        ((1.635, 1.675), (1.560, 1.600), (0.95, 0.45, 0.25)),  # CH4-H
        ((2.215, 2.255), (2.080, 2.120), (0.85, 0.45, 0.25)),  # CH4-K
    ],
    ids=["H2O-J", "CH4-H", "CH4-K"],
)
def test_bands_deepen_from_l_to_y(band, continuum, limits):
    """L dwarfs have no methane at 1.6 um, T dwarfs are defined by it."""
    late_l, late_t, y = (ratio(shape, band, continuum) for shape in ("L-like", "T-like", "Y-like"))
    assert late_l > limits[0]
    assert 0.05 < late_t < limits[1]
    assert y < limits[2]
    assert late_l > late_t > y


def test_cold_sources_at_short_wavelengths_stay_finite():
    for name, temperature, depths in SHAPES:
        spectrum = contrast(np.linspace(0.3, 30, 50), temperature, depths)
        assert np.isfinite(spectrum).all(), name
        assert (spectrum >= 0).all()


def test_library_of_a_spectrograph():
    library = spectral_library(YJH)
    assert library.names[0] == "flat"
    shapes = len(library.names) - len(YJH)
    assert len(library.spectra) == len(library.names)
    assert 4 <= shapes <= 6
    np.testing.assert_allclose(library.spectra.mean(1), 1)
    units = library.spectra / np.linalg.norm(library.spectra, axis=1, keepdims=True)
    assert (np.triu(units @ units.T, 1) <= SAME).all()
    assert library.caveats == ()
    alone = library.spectra[shapes:]
    assert ((alone > 0).sum(1) == 1).all()


def test_shapes_that_are_alike_in_narrow_bands_are_one():
    library = spectral_library(np.linspace(2.10, 2.12, 3))
    assert library.names[0] == "flat, " + ", ".join(name for name, *_ in SHAPES)
    assert len(library.names) == 4
    np.testing.assert_array_equal(library.spectra[0], 1)


def test_without_a_unit_only_flat_and_each_channel():
    library = spectral_library(np.array([9500.0, 12000.0, 16500.0]))
    assert library.names == ("flat", "channel 0 alone", "channel 1 alone", "channel 2 alone")
    [caveat] = library.caveats
    assert "data.wavelength_unit" in caveat
    assert spectral_library(np.array([9500.0, 12000.0, 16500.0]), "angstrom").caveats == ()


def test_one_channel_has_a_flat_spectrum():
    library = spectral_library(np.ones(1))
    assert library.names == ("flat",)
    np.testing.assert_array_equal(library.spectra, [[1.0]])


def test_first_of_two_that_are_alike_is_kept():
    kept = distinct([("a", np.array([1.0, 1.0])), ("b", np.array([1.0, 1.1])), ("c", np.array([1.0, 5.0]))])
    assert [name for name, _ in kept] == ["a, b", "c"]
    assert all(first != second for (first, _), (second, _) in pairwise(kept))
