"""Observing dates from FITS headers."""

import warnings
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.time import Time

from pulmo_jax.data.fits_headers import check_fits
from pulmo_jax.types import InputError


def observed_mjd(path: Path) -> float | None:
    """Read the observing date of a FITS file from MJD-OBS or, without it, from DATE-OBS.

    Args:
        path: The file; of any format, because the date is optional.

    Returns:
        Modified Julian date in days of the first header with a date; None if the file is not FITS, cannot be read or
        has no date.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if file.read(9) != b"SIMPLE  =":
                return None
            file.seek(0)
            check_fits(path, file, path.stat().st_size)
            file.seek(0)
            with fits.open(file, lazy_load_hdus=True) as units:
                headers: list[fits.Header] = [unit.header for unit in units]  # pyright: ignore
                return next((mjd for header in headers if (mjd := _mjd(header)) is not None), None)
    except (OSError, ValueError, TypeError, InputError):
        return None


def _mjd(header: fits.Header) -> float | None:
    value, text = header.get("MJD-OBS"), header.get("DATE-OBS")
    if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
        return float(value)
    return float(np.asarray(Time(text, scale="utc").mjd)) if isinstance(text, str) and text.strip() else None
