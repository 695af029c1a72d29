"""What the FITS header of a cube says about the observation: target, date, filter, position, pixel scale, angles."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from astropy.coordinates import Angle
from astropy.io import fits
from astropy.time import Time
from astropy.units import Unit, UnitBase, UnrecognizedUnit
from jaxtyping import Float

from pulmo_jax.data.arrays import MAX_BYTES, opened
from pulmo_jax.data.file_parts import split_part
from pulmo_jax.data.fits_arrays import SCIENCE, numeric_columns
from pulmo_jax.data.fits_headers import check_fits
from pulmo_jax.data.sources.source import decoding
from pulmo_jax.types import InputError

MAX_TABLE_BYTES = 16 * 2**20  # of a table of the frames
SECONDS_PER_DAY = 86400
MJD_RANGE = (-678575.0, 2973483.0)  # the years 1 to 9999
Values = Mapping[str, Any]  # of a header, by keyword


@dataclass(frozen=True)
class Table:
    """A table of a FITS file.

    Attributes:
        name: Number and EXTNAME.
        rows: Number of rows.
        columns: Numeric columns by name.
    """

    name: str
    rows: int
    columns: Mapping[str, Float[np.ndarray, "N"]]


@dataclass(frozen=True)
class Header:
    """Header of a cube, and the tables in its file.

    Attributes:
        values: Values of the primary header and, over them, of the extension of the cube.
        tables: Tables of the file.
    """

    values: Values = field(default_factory=dict)
    tables: tuple[Table, ...] = ()

    def number(self, keyword: str) -> float | None:
        """The finite number of a card, or None."""
        value = self.values.get(keyword)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if np.isfinite(value) else None

    def text(self, keyword: str) -> str | None:
        """The text of a card without blanks at its ends, or None if it has none."""
        value = self.values.get(keyword)
        return (value.strip() or None) if isinstance(value, str) else None


def read_header(path: Path, max_bytes: int = MAX_BYTES) -> Header:
    """Read the header of a cube and the tables in its file.

    Args:
        path: The cube, in any format; only FITS has a header. The extension is the named one or the first image.
        max_bytes: Limit on the size of an unzipped file.

    Returns:
        The header; empty if the file is not FITS or its headers are damaged.
    """
    part = split_part(path)
    try:
        with decoding(path), opened(path, "a cube", max_bytes) as (file, size), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if file.read(9) != b"SIMPLE  =":
                return Header()
            file.seek(0)
            check_fits(path, file, size)
            file.seek(0)
            with fits.open(file) as hdus:
                return _header(list(hdus), part.extension, path, size)
    except (OSError, InputError):  # the cube itself is read elsewhere, and refused with a message
        return Header()


def _header(hdus: list[Any], extension: str | None, path: Path, size: int) -> Header:
    images = [hdu for hdu in hdus if hdu.is_image and hdu.shape]
    images.sort(key=lambda hdu: (hdu.name.upper() != SCIENCE, len(hdu.shape) < 3))
    if extension is not None:
        name = extension.partition(",")[0].strip()
        images = [hdus[int(name)]] if name.isdigit() else [h for h in hdus if h.name.upper() == name.upper()]
    values = _values(hdus[0].header) | (_values(images[0].header) if images else {})
    tables = [
        Table(f"[{i}] {hdu.name}".strip(), int(hdu.header["NAXIS2"]), _columns(path, hdu, size))
        for i, hdu in enumerate(hdus)
        if hdu.header.get("XTENSION") in ("BINTABLE", "TABLE") and not hdu.is_image and hdu.size <= MAX_TABLE_BYTES
    ]
    return Header(values, tuple(tables))


def _columns(path: Path, table: Any, size: int) -> dict[str, np.ndarray]:
    data = {name: np.asarray(table.data[name], np.float64) for name in numeric_columns(path, table, size)}
    return {name: column for name, column in data.items() if column.ndim == 1}


def _values(header: fits.Header) -> dict[str, Any]:
    """Values by keyword; cards that are not valid are left out."""
    found: dict[str, Any] = {}
    for card in header.cards:
        try:
            if card.keyword and not isinstance(card.value, fits.card.Undefined):
                found[card.keyword.upper()] = card.value
        except (ValueError, fits.VerifyError):
            continue
    return found


@dataclass(frozen=True)
class Position:
    """Position of the star on the sky.

    Attributes:
        ra_deg: Right ascension, degrees.
        dec_deg: Declination, degrees.
        frame: Value of RADESYS.
        equinox: Equinox of the coordinates, years.
    """

    ra_deg: float
    dec_deg: float
    frame: str = "ICRS"
    equinox: float = 2000.0


FRAMES = ("ICRS", "FK5", "FK4", "FK4-NO-E")
POSITION_KEYWORDS = (
    ("ESO INS4 DROT2 RA", "ESO INS4 DROT2 DEC"),
    ("OBJCTRA", "OBJCTDEC"),
    ("RA", "DEC"),
    ("ESO TEL TARG ALPHA", "ESO TEL TARG DELTA"),
)


def position_of(header: Header) -> Position | None:
    """Position of the star, from the first pair of `POSITION_KEYWORDS` in the header.

    Numbers are degrees, text is sexagesimal with the right ascension in hours; ESO's HHMMSS.sss and DDMMSS.sss are
    recognised by their keywords.

    Args:
        header: Header of the cube.

    Returns:
        The position, or None.
    """
    for ra_keyword, dec_keyword in POSITION_KEYWORDS:
        packed = ra_keyword.startswith("ESO")
        ra, dec = _angle_deg(header, ra_keyword, packed, 15.0), _angle_deg(header, dec_keyword, packed, 1.0)
        if ra is not None and dec is not None and 0 <= ra <= 360 and -90 <= dec <= 90:
            frame, equinox = header.text("RADESYS") or header.text("RADECSYS"), header.number("EQUINOX")
            if frame not in FRAMES:  # section 8.3 of the FITS standard
                frame = "ICRS" if equinox is None else "FK5" if equinox >= 1984 else "FK4"
            return Position(ra, dec, frame, 2000.0 if equinox is None else equinox)
    return None


def _angle_deg(header: Header, keyword: str, packed: bool, per_unit: float) -> float | None:
    """Degrees; `per_unit` is 15 for the hours of a sexagesimal right ascension."""
    number, text = header.number(keyword), header.text(keyword)
    try:
        plain = float(text) if number is None and text is not None else number
        return _unpacked(plain) * per_unit if packed and plain is not None else plain
    except ValueError:  # sexagesimal
        pass
    try:
        return float(np.asarray(Angle(text, unit="hourangle" if per_unit > 1 else "deg").deg))
    except (ValueError, TypeError):
        return None


def _unpacked(number: float) -> float:
    """Hours or degrees of HHMMSS.sss or DDMMSS.sss: 54717.09 is 5 h 47 min 17.09 s."""
    minutes, seconds = divmod(abs(number), 100)
    whole, minutes = divmod(minutes, 100)
    if minutes >= 60 or seconds >= 60:
        raise ValueError("minutes or seconds of 60 or more")
    return float(np.copysign(whole + minutes / 60 + seconds / 3600, number))


def mjd_of(header: Header) -> float | None:
    """Modified Julian date from MJD-OBS, MJD or DATE-OBS, or None."""
    for keyword in ("MJD-OBS", "MJD"):
        if (value := header.number(keyword)) is not None and MJD_RANGE[0] < value < MJD_RANGE[1]:
            return value
    return _mjd(_date(header))


def date_of(header: Header) -> str | None:
    """Date and time of `mjd_of`: DATE-OBS, or where it differs by more than a second, the date of MJD-OBS."""
    mjd, text = mjd_of(header), _date(header)
    named = _mjd(text)
    if mjd is None or (named is not None and abs(named - mjd) * SECONDS_PER_DAY < 1):
        return text if named is not None else None
    return str(Time(mjd, format="mjd", scale="utc", precision=3).isot)


def _date(header: Header) -> str | None:
    """DATE-OBS, with the time of UTC or UT appended if it has none."""
    date, time = header.text("DATE-OBS"), header.text("UTC") or header.text("UT")
    return f"{date}T{time}" if date and "T" not in date and time and ":" in time else date


def _mjd(date: str | None) -> float | None:
    try:
        return None if date is None else float(np.asarray(Time(date, format="isot", scale="utc").mjd))
    except ValueError:
        return None


def target_of(header: Header) -> str | None:
    """Name of the star. ESO writes the type of the frame into OBJECT of raw files."""
    name = header.text("OBJECT")
    return header.text("ESO OBS TARG NAME") or name if name is None or name.upper().startswith("OBJECT") else name


def unit_of(header: Header) -> str | None:
    """BUNIT of the cube as a unit string of the FITS standard, or None if it is none or is dimensionless."""
    text = header.text("BUNIT")
    for spelling in (text, text.lower()) if text else ():
        try:
            unit: Any = Unit(spelling)
            if isinstance(unit, UnitBase) and not isinstance(unit, UnrecognizedUnit) and unit != Unit(""):
                return unit.to_string(format="fits") or None
        except (ValueError, TypeError):
            continue
    return None


def wavelengths_of(header: Header, n_channels: int) -> Float[np.ndarray, "L"] | None:
    """Wavelengths of a cube (L, T, H, W) from its fourth axis, or None.

    Args:
        header: Header of the cube.
        n_channels: Number of channels L.

    Returns:
        The wavelengths in the unit of the header.

    Reference:
        Greisen et al. 2006, A&A 446, 747: linear spectral axes.
    """
    step = header.number("CD4_4") or header.number("CDELT4")
    first, pixel = header.number("CRVAL4"), header.number("CRPIX4")
    if (header.text("CTYPE4") or "").upper() not in ("WAVE", "AWAV") or step is None or first is None:
        return None
    return first + (np.arange(1, n_channels + 1) - (1.0 if pixel is None else pixel)) * step
