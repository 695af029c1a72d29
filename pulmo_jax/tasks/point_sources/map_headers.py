"""FITS cards of the maps of a search: name and unit, observation, world coordinates, stack and search."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
from astropy.units import Unit

from pulmo_jax import __version__
from pulmo_jax.core.geometry import rotation_deg
from pulmo_jax.data.instruments import Observed
from pulmo_jax.data.observation_header import Position
from pulmo_jax.inference.point_sources import Search
from pulmo_jax.inference.sky_axes import sky_axes
from pulmo_jax.tasks.point_sources.config import StackConfig
from pulmo_jax.tasks.point_sources.report import Result

MEANINGS = {  # definition, and the power of the unit of flux
    "snr": ("b / sqrt(a)", 0),
    "flux": ("b / a, one pass", 1),
    "flux_std": ("1 / sqrt(a)", 1),
    "a": ("sum of h' C^-1 h over the frames", -2),
    "b": ("sum of h' C^-1 (r - m) over the frames", -1),
    "snr_calibrated": ("Gaussian significance of snr (Student t)", 0),
    "snr_null": ("snr with reversed angles, sources subtracted", 0),
    "a_null": ("a with reversed angles, sources subtracted", -2),
    "b_null": ("b with reversed angles, sources subtracted", -1),
    "throughput": ("fraction of an injected flux that is recovered", 0),
    "template": ("index of the best-fitting spectrum, from 0", 0),
}
FLUX_MEANINGS = {
    "fwhm": "sum of the cube's values within one FWHM",
    "aperture": "sum of the cube's values in the aperture",
    "peak": "peak of the PSF in the cube's values",
    "none": "in units of data.psf",
}
COUNTS = "count"  # of a cube whose header has no unit, or one that the FITS standard does not have


def flux_unit(data: StackConfig, seen: Observed) -> str:
    """Unit of fluxes: that of the cube, or else counts; dimensionless if the PSF is not normalised."""
    return "" if data.psf_flux == "none" else seen.unit or COUNTS


def unit_power(unit: str, power: int) -> str:
    """A unit to a power, in the notation of the FITS standard."""
    return "" if power == 0 or not unit else str((Unit(unit) ** power).to_string(format="fits"))


def header(result: Result, search: Search, name: str) -> dict[str, tuple[Any, str]]:
    """FITS cards that describe a map and the observation."""
    data, (meaning, power) = result.config.data, MEANINGS[name]
    unit = unit_power(flux_unit(data, result.stack.observed), power)
    cards: dict[str, tuple[Any, str]] = {
        "EXTNAME": (name, meaning),
        "BUNIT": (unit, f"flux: {FLUX_MEANINGS[data.psf_flux]}" if power else "dimensionless"),
        "CREATOR": (f"pulmo_jax {__version__}", "Flasseur et al. 2018, A&A 618, A138"),
    }
    cards |= observation_cards(result.stack.observed)
    cards |= sky_axes(result.channels.centre, data.pixel_scale, data.north_deg, star_of(data, result.stack.observed))
    cards |= search_cards(result, search)
    if name == "template":
        spectra = range(len(search.combination.spectra))
        cards |= {f"SPEC{number}": (result.name_of_spectrum(number), "spectrum of this index") for number in spectra}
    if (star := result.fluxes.star_mean) is not None:
        cards["STARFLUX"] = (star, "flux of the star; flux / STARFLUX is the contrast")
    if data.pixel_scale is not None:
        cards["PIXSCALE"] = (data.pixel_scale, "[arcsec/px]")
    return cards


def observation_cards(seen: Observed) -> dict[str, tuple[Any, str]]:
    """Date of the file, and what the header of the cube says about the observation."""
    known = {
        "OBJECT": (seen.target, "from the header of the cube, as the next"),
        "TELESCOP": (seen.telescope, ""),
        "INSTRUME": (seen.instrument, ""),
        "FILTER": (seen.filter, ""),
        "EXPTIME": (seen.exposure_s, "[s] of a frame"),
        "DATE-OBS": (seen.date, ""),
        "MJD-OBS": (seen.mjd, "[d]"),
    }
    written = datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00")
    cards: dict[str, tuple[Any, str]] = {"DATE": (written, "UTC, when this file was written")}
    return cards | {keyword: card for keyword, card in known.items() if card[0] is not None}


def star_of(data: StackConfig, seen: Observed) -> Position | None:
    """Position of the star: that of the keys, or else that of the header with its equinox."""
    if data.star_ra_deg is None or data.star_dec_deg is None:
        return seen.position
    known = seen.position
    if known is not None and (known.ra_deg, known.dec_deg) == (data.star_ra_deg, data.star_dec_deg):
        return known
    return Position(data.star_ra_deg, data.star_dec_deg)


def search_cards(result: Result, search: Search) -> dict[str, tuple[Any, str]]:
    """Cards on the stack and the search."""
    observation, maps = result.channels.reference, search.maps
    centre, wavelengths = result.channels.centre, result.channels.wavelengths
    cards: dict[str, tuple[Any, str]] = {
        "CENTERY": (centre[0], "[px] centre of rotation, from 0"),
        "CENTERX": (centre[1], "[px] centre of rotation, from 0"),
        "NFRAMES": (len(observation.deviations), "frames used"),
        "NDROPPED": (int((~observation.kept).sum()), "excluded frames"),
        "NMASKED": (int((~observation.usable).sum()), "excluded pixels"),
        "ROTATION": (rotation_deg(observation.angles_deg), "[deg] field rotation"),
        "NPATCH": (search.n_patch, "pixels per patch"),
        "RHOMED": (float(np.nanmedian(maps.shrinkage)), "median weight of the diagonal"),
        "NSINGULR": (int(maps.singular.sum()), "locations with a singular covariance"),
        "PSFFWHM": (result.channels.fwhm_px, "[px] FWHM of the PSF"),
        "PSFNORM": (observation.psf.flux_kind, "normalisation of the PSF"),
        "PSFFLUX": (observation.psf.flux, "divisor of the PSF"),
        "PSFERR": (maps.psf_error, "largest relative error of the PSF expansion"),
        "SNRERR": (maps.snr_error, "bound on the resulting error of the SNR"),
    }
    if len(wavelengths) > 1:
        cards["NCHANNEL"] = (len(wavelengths), "wavelengths; frame data: middle one")
        cards["WAVEMIN"], cards["WAVEMAX"] = (wavelengths[0], "the first"), (wavelengths[-1], "the last")
        cards["NSPECTRA"] = (len(search.combination.spectra), "number of trial spectra, mean 1")
        cards["NTRIALS"] = (search.noise.trials, "effective number of independent spectra")
    return cards
