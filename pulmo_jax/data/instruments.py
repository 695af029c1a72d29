"""Offsets, pixel scales and wavelengths from the headers of instruments, each with its reference.

The position angle of a source is its position angle on the detector plus the angle of the frame,

    angle = parallactic angle + pupil offset + true north,

for images in which east is counter-clockwise of north. An instrument is here only as far as a public pipeline or manual
states its formula.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pulmo_jax.data.observation_header import (
    Header,
    Position,
    Table,
    date_of,
    mjd_of,
    position_of,
    target_of,
    unit_of,
    wavelengths_of,
)
from pulmo_jax.types import InputError

SPHERE_CLOCK_FIXED_MJD = 57581.0  # 2016-07-12
NIRC2_SERVICED_MJD = 57125.0  # 2015-04-13
IRDIS_MICRON = {
    "DB_Y23": (1.022, 1.076),
    "DB_J23": (1.190, 1.273),
    "DB_H23": (1.593, 1.667),
    "DB_NDH23": (1.593, 1.667),
    "DB_H34": (1.667, 1.733),
    "DB_K12": (2.110, 2.251),
}


@dataclass(frozen=True)
class Instrument:
    """What is known of the headers of an instrument.

    Attributes:
        name: Name in messages.
        matches: Whether a header is the instrument's.
        pupil_offset_deg: Offset of the pupil from a header, one value or one per row of a table; raises InputError for
            modes other than pupil tracking. None: the angles are not known.
        true_north_deg: Correction for true north.
        start_end: Keywords of the parallactic angle at the start and at the end of the exposures of the cube.
        frames: Keyword of the number of exposures in the cube.
        pixel_scale: Pixel scale from a header, arcsec per pixel, or None.
        exposure_s: Exposure time of a frame, s, or None.
        filter: Keyword of the filter.
        wavelengths: Wavelengths from a header and the number of channels, or None.
    """

    name: str
    matches: Callable[[Header], bool]
    pupil_offset_deg: Callable[[Header, Table | None], float | np.ndarray] | None = None
    true_north_deg: Callable[[Header], float] = lambda header: 0.0
    start_end: tuple[str, str] | None = None
    frames: str | None = None
    pixel_scale: Callable[[Header], float | None] = lambda header: header.number("PIXSCALE")
    exposure_s: Callable[[Header], float | None] = lambda header: header.number("EXPTIME")
    filter: str = "FILTER"
    wavelengths: Callable[[Header, int], np.ndarray | None] = wavelengths_of


def _column(header: Header, table: Table | None, keyword: str) -> float | np.ndarray | None:
    """Value of a keyword: a column of the table if it has one, else the card."""
    columns = {} if table is None else table.columns
    return next((values for name, values in columns.items() if name.upper() == keyword), header.number(keyword))


def _needed(name: str, keyword: str, value: float | np.ndarray | None) -> float | np.ndarray:
    if value is None:
        raise InputError(f"the {name} header has no {keyword}; give data.angles")
    return value


def _sphere_arm(header: Header) -> str:
    return (header.text("ESO SEQ ARM") or header.text("ESO DET ID") or "").upper()


def _is_sphere(arm: str) -> Callable[[Header], bool]:
    return lambda header: header.text("INSTRUME") == "SPHERE" and _sphere_arm(header) == arm


def _sphere_offset(instrument_deg: float) -> Callable[[Header, Table | None], float]:
    """Pupil offset of SPHERE, with the correction of the derotator before its clock was fixed."""

    def offset(header: Header, table: Table | None) -> float:
        if (mode := header.text("ESO INS4 DROT2 MODE")) not in (None, "ELEV"):
            raise InputError(f"ESO INS4 DROT2 MODE is {mode}, but only ELEV is pupil tracking; give data.angles")
        altitude, begin = header.number("ESO TEL ALT"), header.number("ESO INS4 DROT2 BEGIN")
        mjd, drift = mjd_of(header), 0.0
        if mjd is not None and mjd <= SPHERE_CLOCK_FIXED_MJD and altitude is not None and begin is not None:
            drift = float(np.rad2deg(np.arctan(np.tan(np.deg2rad(altitude - 2 * begin)))))
        return 135.99 + instrument_deg + drift

    return offset


def _irdis_wavelengths(header: Header, n_channels: int) -> np.ndarray | None:
    pair = IRDIS_MICRON.get(header.text("ESO INS COMB IFLT") or "")
    return np.array(pair) if pair and n_channels == len(pair) else None


def _naco_offset(header: Header, table: Table | None) -> float:
    position = header.number("ESO ADA PUPILPOS")
    return float(_needed("NACO", "ESO ADA PUPILPOS (pupil tracking)", position)) - (90.0 + 89.44)


def _is_nirc2(header: Header) -> bool:
    return "NIRC2" in (header.text("INSTRUME"), header.text("CURRINST"))


def _nirc2_offset(header: Header, table: Table | None) -> float | np.ndarray:
    if (mode := (header.text("ROTMODE") or "").lower()) not in ("", "vertical angle"):
        raise InputError(f"ROTMODE is {mode!r}, but only 'vertical angle' lets the field rotate; give data.angles")
    rotator = _needed("NIRC2", "ROTPOSN", _column(header, table, "ROTPOSN"))
    return rotator - _needed("NIRC2", "INSTANGL", _column(header, table, "INSTANGL"))


def _nirc2_narrow(header: Header, before: float, after: float) -> float | None:
    """Value of the narrow camera before and after its servicing; None for others, or without a date."""
    mjd = mjd_of(header)
    if mjd is None or (header.text("CAMNAME") or "").lower() != "narrow":
        return None
    return before if mjd < NIRC2_SERVICED_MJD else after


def _nirc2_scale(header: Header) -> float | None:
    wide = {"medium": 0.019829, "wide": 0.039686}.get((header.text("CAMNAME") or "").lower())
    return _nirc2_narrow(header, 0.009952, 0.009971) if wide is None else wide


def _nirc2_exposure(header: Header) -> float | None:
    time, coadds = header.number("ITIME"), header.number("COADDS")
    return None if time is None or coadds is None else time * coadds


def _charis_wavelengths(header: Header, n_channels: int) -> np.ndarray | None:
    first, step = header.number("LAM_MIN"), header.number("DLOGLAM")
    return None if first is None or step is None else first * np.exp(np.arange(n_channels) * step) / 1000


INSTRUMENTS = (
    # Maire et al. 2016, SPIE 9908, 990834; vlt-sphere, sphere/utils/toolbox.py, compute_angles, and transmission.py.
    Instrument(
        "SPHERE IRDIS",
        _is_sphere("IRDIS"),
        _sphere_offset(0.0),
        lambda header: -1.75,
        ("ESO TEL PARANG START", "ESO TEL PARANG END"),
        "ESO DET NDIT",
        lambda header: 0.012255,
        lambda header: header.number("ESO DET SEQ1 DIT"),
        "ESO INS COMB IFLT",
        _irdis_wavelengths,
    ),
    Instrument(
        "SPHERE IFS",
        _is_sphere("IFS"),
        _sphere_offset(-100.48),
        lambda header: -1.75,
        pixel_scale=lambda header: 0.00746,
        exposure_s=lambda header: header.number("ESO DET SEQ1 DIT"),
        filter="ESO INS COMB IFLT",
    ),
    # NACO User Manual v102, p. 65; PynPoint, AngleCalculationModule.
    Instrument(
        "NACO",
        lambda header: header.text("INSTRUME") in ("NAOS+CONICA", "NACO"),
        _naco_offset,
        start_end=("ESO TEL PARANG START", "ESO TEL PARANG END"),
        frames="ESO DET NDIT",
        pixel_scale=lambda header: header.number("ESO INS PIXSCALE"),
        exposure_s=lambda header: header.number("ESO DET DIT"),
        filter="ESO INS OPTI6 ID",
    ),
    # pyKLIP, instruments/NIRC2.py, get_pa; Yelda et al. 2010, ApJ 725, 331; Service et al. 2016, PASP 128, 095004.
    Instrument(
        "NIRC2",
        _is_nirc2,
        _nirc2_offset,
        lambda header: _nirc2_narrow(header, -0.252, -0.262) or 0.0,
        pixel_scale=_nirc2_scale,
        exposure_s=_nirc2_exposure,
    ),
    # CHARIS pipeline, charis/utr/calc_metadata.py, addWCS; pyKLIP, instruments/CHARIS.py.
    Instrument(
        "SCExAO/CHARIS",
        lambda header: header.number("DLOGLAM") is not None and header.number("LAM_MIN") is not None,
        lambda header, table: 113.0,
        pixel_scale=lambda header: 0.0162,
        filter="FILTNAME",
        wavelengths=_charis_wavelengths,
    ),
    # De Rosa et al. 2015, ApJ 814, L3. Its cubes are mirrored until a pipeline turns them over, which the header does
    # not tell, so the angles cannot be interpreted.
    Instrument(
        "GPI", lambda header: header.text("INSTRUME") == "GPI", pixel_scale=lambda header: 0.014166, filter="IFSFILT"
    ),
)
GENERIC = Instrument("", lambda header: True)


def instrument_of(header: Header) -> Instrument:
    """The instrument of a header; without a name if it is none of `INSTRUMENTS`."""
    return next((known for known in INSTRUMENTS if known.matches(header)), GENERIC)


@dataclass(frozen=True)
class Observed:
    """What a header says about the observation; None for what it does not say.

    Attributes:
        target: Name of the star.
        telescope: TELESCOP.
        instrument: INSTRUME, or the name of the recognised instrument.
        filter: Name of the filter.
        date: Start of the observation, ISO 8601.
        mjd: Modified Julian date.
        exposure_s: Exposure time of a frame, s.
        position: Position of the star on the sky.
        unit: Unit of the cube in the notation of the FITS standard; None if dimensionless, too.
        pixel_scale: Pixel scale, arcsec per pixel.
        known: Name of the instrument of `INSTRUMENTS`, or empty.
    """

    target: str | None = None
    telescope: str | None = None
    instrument: str | None = None
    filter: str | None = None
    date: str | None = None
    mjd: float | None = None
    exposure_s: float | None = None
    position: Position | None = None
    unit: str | None = None
    pixel_scale: float | None = None
    known: str = ""


NOT_OBSERVED = Observed()  # a synthetic stack


def observed(header: Header) -> Observed:
    """Collect what a header says about the observation.

    Args:
        header: Header of the cube.

    Returns:
        The values.
    """
    instrument = instrument_of(header)
    scale = instrument.pixel_scale(header)
    return Observed(
        target=target_of(header),
        telescope=header.text("TELESCOP"),
        instrument=header.text("INSTRUME") or header.text("CURRINST") or instrument.name or None,
        filter=header.text(instrument.filter) or header.text("FILTER"),
        date=date_of(header),
        mjd=mjd_of(header),
        exposure_s=instrument.exposure_s(header),
        position=position_of(header),
        unit=unit_of(header),
        pixel_scale=scale if scale is not None and scale > 0 else None,
        known=instrument.name,
    )
