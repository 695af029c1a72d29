"""Library of source spectra for a search in several wavelengths, and the unit of the wavelengths.

The library holds a flat spectrum, blackbodies, shapes like those of L, T and Y dwarfs, and each channel alone. Fluxes
are in units of the PSF. If this is the star's, they are contrasts, so a source's spectrum is divided by that of the
star: a blackbody of a given temperature or, by default, of infinite temperature (Rayleigh-Jeans, lambda^-4).

The L-, T- and Y-like shapes are blackbodies seen through absorption bands exp(-tau) with a Gaussian optical depth. They
are analytic approximations and no templates: centres and widths follow the near-infrared spectral sequence of Cushing,
Rayner & Vacca 2005 (ApJ 623, 1115; H2O, CH4, CO), the depths give ratios of band to continuum near those that define
the types (Burgasser et al. 2006, ApJ 637, 1067), and NH3 is added for Y dwarfs (Cushing et al. 2011, ApJ 743, 50).
"""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy import units
from astropy.io import fits
from jaxtyping import Float

from pulmo_jax.data.fits_headers import check_fits
from pulmo_jax.types import InputError

HC_K_UM = 14387.77  # h c / k, um K
SAME = 0.99  # correlation above which two spectra are merged
# Ranges in which only one unit is plausible, and the factors to um. From 3000 to 30000, nm and angstrom are both.
RANGES_UM = ((3e-7, 3e-5, 1e6), (0.3, 30.0, 1.0), (300.0, 3000.0, 1e-3), (30000.0, 300000.0, 1e-4))
UNITS_UM = {"um": 1.0, "nm": 1e-3, "m": 1e6, "angstrom": 1e-4}

# (centre, standard deviation) of the optical depth of each band, um.
BANDS = {
    "H2O": ((0.94, 0.02), (1.14, 0.03), (1.40, 0.07), (1.87, 0.09), (2.70, 0.20), (6.3, 0.6)),
    "CH4": ((0.89, 0.01), (1.14, 0.03), (1.36, 0.035), (1.68, 0.055), (2.32, 0.10), (3.32, 0.17), (7.7, 0.5)),
    "NH3": ((1.03, 0.015), (1.21, 0.02), (1.52, 0.03), (2.00, 0.05), (3.0, 0.1), (10.5, 0.7)),
    "CO": ((2.35, 0.04), (4.67, 0.12)),
}
# Name, temperature (K), and optical depth at the centre of the bands of each molecule.
SHAPES = (
    ("blackbody 1700 K", 1700.0, {}),
    ("blackbody 800 K", 800.0, {}),
    ("L-like", 1600.0, {"H2O": 0.4, "CO": 0.3}),
    ("T-like", 1000.0, {"H2O": 0.7, "CH4": 1.8}),
    ("Y-like", 450.0, {"H2O": 3.0, "CH4": 5.0, "NH3": 1.0}),
)


class SpectralLibrary(NamedTuple):
    """Candidate spectra of a search.

    Attributes:
        spectra: M spectra of mean 1, the flat one first.
        names: Their names.
        caveats: Limitations.
    """

    spectra: Float[np.ndarray, "M L"]
    names: tuple[str, ...]
    caveats: tuple[str, ...] = ()


def spectral_library(
    wavelengths: Float[np.ndarray, "L"], unit: str | None = None, star_temperature_k: float | None = None
) -> SpectralLibrary:
    """Make the library of a stack.

    Args:
        wavelengths: Wavelength of each channel.
        unit: Unit of the wavelengths (see `to_micrometres`); None: from their magnitude.
        star_temperature_k: Temperature of the star, K; None: infinite.

    Returns:
        The library, without near-duplicates; without physical shapes, and with a caveat, if the unit is unknown.

    Raises:
        InputError: If the unit is no length.
    """
    n = len(wavelengths)
    flat = ("flat", np.ones(n))
    if n == 1:
        return SpectralLibrary(flat[1][None], (flat[0],))
    um = to_micrometres(wavelengths, unit)
    shapes = [] if um is None else [(name, contrast(um, t, depths, star_temperature_k)) for name, t, depths in SHAPES]
    alone = [(f"channel {k} alone", row) for k, row in enumerate(np.eye(n))]
    names, spectra = zip(*distinct([flat, *shapes, *alone]), strict=True)
    caveats = () if um is not None else (
        f"the unit of the wavelengths, {wavelengths.min():g} to {wavelengths.max():g}, is ambiguous: the search tries "
        "a flat spectrum and each channel alone; data.wavelength_unit=um, nm, m or angstrom adds blackbodies and L-, "
        "T- and Y-like spectra",
    )  # fmt: skip
    return SpectralLibrary(np.stack(spectra), names, caveats)


def distinct(
    named: list[tuple[str, Float[np.ndarray, "L"]]],
) -> list[tuple[str, Float[np.ndarray, "L"]]]:
    """Normalise spectra to mean 1 and keep the first of those whose correlation (cosine) exceeds SAME.

    Args:
        named: Names and spectra.

    Returns:
        Names and spectra; the name of a kept spectrum includes those that were merged into it.
    """
    kept: list[tuple[str, np.ndarray]] = []
    for name, spectrum in named:
        unit = spectrum / np.linalg.norm(spectrum)
        same = next((i for i, (_, other) in enumerate(kept) if unit @ other / np.linalg.norm(other) > SAME), None)
        if same is None:
            kept.append((name, spectrum / spectrum.mean()))
        else:
            kept[same] = (f"{kept[same][0]}, {name}", kept[same][1])
    return kept


def contrast(
    um: Float[np.ndarray, "L"], temperature_k: float, depths: dict[str, float], star_temperature_k: float | None = None
) -> Float[np.ndarray, "L"]:
    """Spectrum of a source divided by that of its star, up to a factor.

    Args:
        um: Wavelengths, um.
        temperature_k: Temperature of the source, K.
        depths: Optical depth at the centre of the bands of each molecule of BANDS.
        star_temperature_k: Temperature of the star, K; None: infinite.

    Returns:
        The spectrum, of mean 1.
    """
    depth = np.zeros_like(um)
    for molecule, at_centre in depths.items():
        for centre, width in BANDS[molecule]:
            depth += at_centre * np.exp(-(((um - centre) / width) ** 2) / 2)
    # Planck's law relative to Rayleigh-Jeans, where lambda^-4 cancels: x / (e^x - 1), x = h c / (lambda k T).
    log_source = log_planck(HC_K_UM / (um * temperature_k)) - depth
    log_star = np.zeros_like(um) if star_temperature_k is None else log_planck(HC_K_UM / (um * star_temperature_k))
    logarithm = log_source - log_star
    ratio = np.exp(logarithm - logarithm.max())  # a cool source at short wavelengths underflows otherwise
    return ratio / ratio.mean()


def log_planck(x: Float[np.ndarray, "L"]) -> Float[np.ndarray, "L"]:
    """Logarithm of x / (e^x - 1), Planck's law relative to Rayleigh-Jeans."""
    return np.log(x) - x - np.log1p(-np.exp(-x))


def to_micrometres(wavelengths: Float[np.ndarray, "L"], unit: str | None = None) -> Float[np.ndarray, "L"] | None:
    """Convert wavelengths to micrometres.

    Args:
        wavelengths: Wavelengths.
        unit: A unit of length in the spelling of FITS or astropy ("um", "nm", "m", "angstrom"); None: the only one for
            which all wavelengths are between 0.3 and 30 um.

    Returns:
        Wavelengths, um; None if no unit is given and none, or more than one, is plausible.

    Raises:
        InputError: If the unit is no length.
    """
    if unit is not None:
        return wavelengths * factor_um(unit)
    for low, high, factor in RANGES_UM:
        if wavelengths.min() >= low and wavelengths.max() <= high:
            return wavelengths * factor
    return None


def factor_um(unit: str) -> float:
    """Length of a unit, um.

    Raises:
        InputError: If it is no unit of length.
    """
    if unit in UNITS_UM:
        return UNITS_UM[unit]
    try:
        return float(np.real(units.Unit(unit).to(units.um)))
    except (ValueError, TypeError, units.UnitConversionError):
        raise InputError(f"{unit!r} is no unit of wavelength; give um, nm, m or angstrom") from None


def fits_unit(path: Path) -> str | None:
    """Unit of the wavelengths in a FITS file: BUNIT of an image, or TUNIT1 of a table; None without one.

    Args:
        path: The file; of any format, because the unit is optional.

    Returns:
        The unit, if it is one of length.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if file.read(9) != b"SIMPLE  =":
                return None
            file.seek(0)
            check_fits(path, file, path.stat().st_size)
            file.seek(0)
            with fits.open(file, lazy_load_hdus=True) as parts:
                headers: list[fits.Header] = [part.header for part in parts]  # pyright: ignore
        found = [str(header[key]).strip() for header in headers for key in ("BUNIT", "TUNIT1") if header.get(key)]
        factor_um(found[0])
        return found[0]
    except (OSError, ValueError, TypeError, IndexError, InputError):
        return None
