"""What a header says about the observation: every notation, and nothing where it is not valid."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from pulmo_jax.data import observation_header
from pulmo_jax.data.instruments import Observed, observed
from pulmo_jax.data.observation_header import (
    Header,
    Position,
    date_of,
    mjd_of,
    position_of,
    read_header,
    unit_of,
    wavelengths_of,
)

CUBE = np.zeros((3, 4, 5), "f4")


def stored(path: Path, **cards) -> Path:
    fits.writeto(path, CUBE, fits.Header(cards), overwrite=True)
    return path


@pytest.mark.parametrize(
    ("cards", "ra", "dec"),
    [
        ({"RA": 86.821, "DEC": -51.066}, 86.821, -51.066),
        ({"RA": "86.821", "DEC": "-51.066"}, 86.821, -51.066),
        ({"RA": "05:47:17.09", "DEC": "-51:03:59.4"}, 86.8212083, -51.0665),
        ({"OBJCTRA": "05 47 17.09", "OBJCTDEC": "-51 03 59.4"}, 86.8212083, -51.0665),
        ({"OBJCTRA": "00 00 30", "OBJCTDEC": "-00 30 00"}, 0.125, -0.5),
        ({"ESO INS4 DROT2 RA": 54717.09, "ESO INS4 DROT2 DEC": -510359.4}, 86.8212083, -51.0665),
        ({"ESO INS4 DROT2 RA": 54717.09, "ESO INS4 DROT2 DEC": -510359.4, "RA": 1.0, "DEC": 2.0}, 86.8212083, -51.0665),
        ({"ESO TEL TARG ALPHA": 30.0, "ESO TEL TARG DELTA": -3000.0}, 0.125, -0.5),
    ],
)
def test_position_of_the_star(cards, ra, dec):
    found = position_of(Header(cards))
    assert found is not None
    assert (found.ra_deg, found.dec_deg) == pytest.approx((ra, dec), abs=1e-6)
    assert (found.frame, found.equinox) == ("ICRS", 2000.0)


@pytest.mark.parametrize(
    "cards",
    [
        {},
        {"RA": 10.0},
        {"RA": "unavailable", "DEC": "unavailable"},
        {"RA": 400.0, "DEC": 0.0},
        {"RA": 10.0, "DEC": -95.0},
        {"RA": True, "DEC": 1.0},
        {"RA": float("nan"), "DEC": 1.0},
        {"ESO INS4 DROT2 RA": 56199.0, "ESO INS4 DROT2 DEC": 0.0},
    ],
    ids=str,
)
def test_positions_that_are_none(cards):
    assert position_of(Header(cards)) is None


def test_frame_and_equinox():
    at = {"RA": 1.0, "DEC": 2.0}
    assert position_of(Header(at | {"EQUINOX": 2000.0})) == Position(1.0, 2.0, "FK5", 2000.0)
    assert position_of(Header(at | {"EQUINOX": 2015.5, "RADECSYS": "FK5"})) == Position(1.0, 2.0, "FK5", 2015.5)
    assert position_of(Header(at | {"RADESYS": "ICRS"})) == Position(1.0, 2.0, "ICRS", 2000.0)
    assert position_of(Header(at | {"RADESYS": "unavailable"})) == Position(1.0, 2.0, "ICRS", 2000.0)
    assert position_of(Header(at | {"EQUINOX": 1950.0})) == Position(1.0, 2.0, "FK4", 1950.0)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("adu", "adu"),
        ("ADU", "adu"),
        ("adu/s", "adu s-1"),
        ("count", "count"),
        ("Jy", "Jy"),
        ("counts per s", None),
        ("", None),
        ("DN!", None),
        (3, None),
    ],
)
def test_unit_of_the_cube(text, unit):
    assert unit_of(Header({"BUNIT": text})) == unit


def test_a_wavelength_axis():
    axis = {"CTYPE4": "WAVE", "CRVAL4": 1.5, "CDELT4": 0.1, "CRPIX4": 1.0}
    np.testing.assert_allclose(wavelengths_of(Header(axis), 3), [1.5, 1.6, 1.7])
    np.testing.assert_allclose(wavelengths_of(Header(axis | {"CRPIX4": 2.0, "CD4_4": 0.2}), 3), [1.3, 1.5, 1.7])
    assert wavelengths_of(Header(axis | {"CTYPE4": "TIME"}), 3) is None
    assert wavelengths_of(Header({"CTYPE4": "WAVE"}), 3) is None


def test_the_extension_of_the_cube_overrides_the_primary_header(tmp_path):
    science = fits.ImageHDU(CUBE, fits.Header({"FILTER": "H", "EXTNAME": "SCI"}))
    errors = fits.ImageHDU(CUBE, fits.Header({"FILTER": "none", "EXTNAME": "ERR"}))
    primary = fits.PrimaryHDU(header=fits.Header({"OBJECT": "HD 1", "FILTER": "K", "HIERARCH ESO DET DIT": 2.0}))
    fits.HDUList([primary, errors, science]).writeto(tmp_path / "x.fits")
    header = read_header(tmp_path / "x.fits")
    assert (header.text("OBJECT"), header.text("FILTER"), header.number("ESO DET DIT")) == ("HD 1", "H", 2.0)
    assert read_header(tmp_path / "x.fits[1]").text("FILTER") == "none"
    assert read_header(tmp_path / "x.fits[sci]").text("FILTER") == "H"
    assert read_header(tmp_path / "x.fits[9]") == Header()
    (tmp_path / "x.fits.gz").write_bytes(gzip.compress((tmp_path / "x.fits").read_bytes()))
    assert read_header(tmp_path / "x.fits.gz") == header


def test_tables_of_the_file(tmp_path):
    columns = [fits.Column("PARANG", "D", array=[1.0, 2.0]), fits.Column("FILE", "5A", array=["a", "b"])]
    columns.append(fits.Column("SPOTS", "2D", array=np.zeros((2, 2))))
    hdus = [fits.PrimaryHDU(CUBE), fits.BinTableHDU.from_columns(columns, name="FRAMES")]
    fits.HDUList(hdus).writeto(tmp_path / "x.fits")
    (table,) = read_header(tmp_path / "x.fits").tables
    assert (table.name, table.rows, list(table.columns)) == ("[1] FRAMES", 2, ["PARANG"])
    np.testing.assert_array_equal(table.columns["PARANG"], [1.0, 2.0])


def test_large_tables_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(observation_header, "MAX_TABLE_BYTES", 100)
    tables = [fits.BinTableHDU.from_columns([fits.Column("PA", "D", array=np.zeros(n))]) for n in (12, 13)]
    fits.HDUList([fits.PrimaryHDU(CUBE), *tables]).writeto(tmp_path / "x.fits")
    assert [table.rows for table in read_header(tmp_path / "x.fits").tables] == [12]


def test_files_without_a_header(tmp_path):
    np.save(tmp_path / "x.npy", CUBE)
    assert read_header(tmp_path / "x.npy") == Header()
    path = stored(tmp_path / "x.fits")
    path.write_bytes(path.read_bytes()[:200])
    assert read_header(path) == Header()
    assert observed(Header()) == Observed()


def test_what_is_observed(tmp_path):
    path = stored(
        tmp_path / "x.fits", OBJECT="HD 1 ", TELESCOP="Keck II", INSTRUME="cam", FILTER="Lp", EXPTIME=1.5, BUNIT="ADU",
        PIXSCALE=0.02, RA=1.0, DEC=2.0, **{"DATE-OBS": "2020-01-02", "UTC": "03:04:05"},
    )  # fmt: skip
    found = observed(read_header(path))
    assert found.mjd == pytest.approx(58850.12783565, abs=1e-7)
    assert replace(found, mjd=None) == Observed(
        target="HD 1",
        telescope="Keck II",
        instrument="cam",
        filter="Lp",
        date="2020-01-02T03:04:05",
        exposure_s=1.5,
        position=Position(1.0, 2.0),
        unit="adu",
        pixel_scale=0.02,
    )


@pytest.mark.parametrize(
    ("cards", "date", "mjd"),
    [
        ({"DATE-OBS": "2020-01-02T12:00:00.1"}, "2020-01-02T12:00:00.1", 58850.5),
        ({"DATE-OBS": "2020-01-02T12:00:00.1", "MJD-OBS": 58850.5}, "2020-01-02T12:00:00.1", 58850.5),
        ({"DATE-OBS": "2020-01-02", "MJD-OBS": 58850.5}, "2020-01-02T12:00:00.000", 58850.5),
        ({"DATE-OBS": "02/01/20", "MJD-OBS": 58850.5}, "2020-01-02T12:00:00.000", 58850.5),
        ({"MJD": 58850.5}, "2020-01-02T12:00:00.000", 58850.5),
        ({"DATE-OBS": "2020-01-02"}, "2020-01-02", 58850.0),
        ({"DATE-OBS": "2020-13-45"}, None, None),
        ({"DATE-OBS": "yesterday"}, None, None),
        ({"MJD-OBS": 1e300}, None, None),
        ({}, None, None),
    ],
    ids=str,
)
def test_dates_agree_with_each_other(cards, date, mjd):
    """astropy.wcs warns of a DATE-OBS that MJD-OBS contradicts."""
    header = Header(cards)
    assert date_of(header) == date
    assert mjd_of(header) == (None if mjd is None else pytest.approx(mjd, abs=2e-6))
    if date is not None:
        pair = {"CTYPE1": "EAST", "CTYPE2": "NORTH", "DATE-OBS": date, "MJD-OBS": mjd_of(header)}
        WCS(fits.Header(pair))


def test_cards_that_cannot_be_parsed_are_left_out(tmp_path):
    path = stored(tmp_path / "x.fits", OBJECT="HD 1", FILTER="xxxxxxxx", EMPTY=None)
    content = path.read_bytes().replace(b"'xxxxxxxx'", b"xx'xx 1 2 ")
    path.write_bytes(content)
    found = observed(read_header(path))
    assert (found.target, found.filter) == ("HD 1", None)


def test_the_star_where_eso_writes_the_type_of_the_frame():
    cards = {"OBJECT": "OBJECT,FLUX", "ESO OBS TARG NAME": "bet Pic"}
    assert observed(Header(cards)).target == "bet Pic"
    assert observed(Header(cards | {"OBJECT": "HR 8799"})).target == "HR 8799"
    assert observed(Header({"OBJECT": "OBJECT"})).target == "OBJECT"
