"""`detect` on a cube with a header: its maps as astropy and ds9 read them, and positions that agree with the table."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.nddata import CCDData
from astropy.time import Time
from astropy.wcs import WCS
from omegaconf import OmegaConf

from pulmo_jax import detect
from pulmo_jax.config.section import validate
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.types import InputError

FRAMES, SIZE, CENTRE, PLANET = 24, 48, (24.0, 24.0), (34.0, 36.0, 1000.0)
SCALE = 0.02719
CARDS = {
    "OBJECT": "bet Pic", "TELESCOP": "ESO-VLT-U4", "INSTRUME": "NAOS+CONICA", "HIERARCH ESO INS OPTI6 ID": "L_prime",
    "DATE-OBS": "2013-02-01T03:00:00", "MJD-OBS": 56324.125, "RA": 86.8212, "DEC": -51.0665, "BUNIT": "ADU",
    "HIERARCH ESO INS PIXSCALE": SCALE, "HIERARCH ESO ADA PUPILPOS": 74.6, "HIERARCH ESO DET DIT": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def planted():
    return rotating_stack(0, FRAMES, SIZE, 150.0, (PLANET,)).stack


@pytest.fixture(scope="module")
def stack(planted, tmp_path_factory) -> Path:
    """One file with cube, its errors, a PSF and a table of the frames."""
    frames = fits.BinTableHDU.from_columns([fits.Column("PARANG", "D", array=planted.angles_deg)], name="FRAMES")
    hdus = [
        fits.PrimaryHDU(header=fits.Header(CARDS)),
        fits.ImageHDU(planted.cube, name="SCI"),
        fits.ImageHDU(np.ones_like(planted.cube), name="ERR"),
        fits.ImageHDU(7 * planted.psf, name="PSF"),
        frames,
    ]
    path = tmp_path_factory.mktemp("stack") / "stack.fits"
    fits.HDUList(hdus).writeto(path)
    return path


def run(folder: Path, monkeypatch, **data: Any) -> Path:
    monkeypatch.setattr("pulmo_jax.tasks.point_sources.detection.write_adi_report", lambda *arguments: None)
    config = validate(DetectConfig, {"data": data, "contrast": {"rings": 0}, "method": {"mode": "fast"}})
    detect.detect(config, folder)
    return folder


def only(folder: Path) -> dict[str, float]:
    with (folder / "detections.csv").open() as file:
        (row,) = csv.DictReader(file)
    words = ("near_threshold", "flux_unit")
    return {key: float(value) for key, value in row.items() if key not in words}


def turned(found: float, true: float) -> float:
    return abs((found - true + 180) % 360 - 180)


@pytest.mark.slow
def test_maps_of_a_cube_with_a_header(stack, tmp_path, monkeypatch, capsys):
    """Everything but the PSF's extension comes from the file."""
    folder = run(tmp_path / "run", monkeypatch, cube=str(stack), psf=f"{stack}[PSF]")
    said = " ".join(capsys.readouterr().out.split())
    assert "column PARANG of table [4] FRAMES (NACO)" in said
    assert "gives data.pixel_scale=0.02719" in said
    maps = sorted(folder.glob("*.fits"))
    assert len(maps) == 9
    for path in maps:
        with fits.open(path, checksum=True) as hdus:
            hdus.verify("exception")
            header = hdus[0].header
        assert (header["EXTNAME"], header["OBJECT"], header["INSTRUME"]) == (path.stem, "bet Pic", "NAOS+CONICA")
        assert (header["FILTER"], header["EXPTIME"], header["TELESCOP"]) == ("L_prime", 0.2, "ESO-VLT-U4")
        assert (header["DATE-OBS"], header["MJD-OBS"]) == ("2013-02-01T03:00:00", 56324.125)
        assert abs(Time(header["DATE"], scale="utc") - Time.now()) < 1 * units.hour
        assert {"CHECKSUM", "DATASUM"} < set(header)
        powers = {"flux": 1, "flux_std": 1, "a": -2, "b": -1, "a_null": -2, "b_null": -1}
        assert CCDData.read(path).unit == units.adu ** powers.get(path.stem, 0)


@pytest.mark.slow
def test_position_angle_and_separation_are_those_of_the_world_coordinates(stack, tmp_path, monkeypatch, capsys):
    """The header turns the map by the offset of beta Pictoris, 104.84 degrees."""
    folder = run(tmp_path / "run", monkeypatch, cube=f"{stack}[SCI]", psf=f"{stack}[PSF]")
    source = only(folder)
    wcs = WCS(fits.getheader(folder / "snr.fits"))
    star = SkyCoord(CARDS["RA"], CARDS["DEC"], unit="deg")
    at = SkyCoord(*wcs.pixel_to_world_values(source["x"], source["y"]), unit="deg")
    assert star.separation(at).to_value(units.arcsec) == pytest.approx(source["separation_arcsec"], abs=1e-6)
    assert turned(float(star.position_angle(at).deg), source["position_angle_deg"]) < 1e-5  # of 8 printed digits
    expected = np.rad2deg(np.arctan2(PLANET[0] - CENTRE[0], PLANET[1] - CENTRE[1])) - 104.84 - 90
    assert turned(source["position_angle_deg"], expected) < 1
    saved: Any = OmegaConf.load(folder / "config.yaml").data
    assert (saved.pixel_scale, saved.star_ra_deg) == (SCALE, CARDS["RA"])
    assert saved.pupil_offset_deg == pytest.approx(-104.84)
    capsys.readouterr()


@pytest.mark.slow
def test_offsets_from_the_star_without_its_position(planted, tmp_path, monkeypatch, capsys):
    """An off-centre star in frames that are not square; north_deg and pupil_offset_deg are two ways to say the same."""
    for name, array in (("cube", planted.cube[:, 1:, 3:]), ("angles", planted.angles_deg), ("psf", planted.psf)):
        np.save(tmp_path / f"{name}.npy", array)
    given = {name: str(tmp_path / f"{name}.npy") for name in ("cube", "angles", "psf")}
    given |= {"centre": [CENTRE[0] - 1, CENTRE[1] - 3], "pixel_scale": SCALE}
    by_north = run(tmp_path / "north", monkeypatch, **given, north_deg=194.84)
    by_offset = run(tmp_path / "offset", monkeypatch, **given, pupil_offset_deg=-104.34, true_north_deg=-0.5)
    for folder in (by_north, by_offset):
        source, header = only(folder), fits.getheader(folder / "flux.fits")
        east, north = WCS(header).wcs_pix2world([[source["x"] + 1, source["y"] + 1]], 1)[0]
        assert np.hypot(east, north) == pytest.approx(source["separation_arcsec"], abs=1e-6)
        assert turned(np.rad2deg(np.arctan2(east, north)), source["position_angle_deg"]) < 1e-5
        assert (header["CTYPE1"], header["CUNIT1"], header["BUNIT"]) == ("EAST", "arcsec", "count")
    assert turned(only(by_north)["position_angle_deg"], only(by_offset)["position_angle_deg"]) < 0.5
    capsys.readouterr()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"cube": "stack.fits", "psf": "stack.fits"}, "data.cube and data.psf are both"),
        ({"cube": "stack.fits[SCI]", "psf": "stack.fits[1]"}, r"\[1\]: is stack.fits\[SCI\] itself"),
        ({"cube": "stack.fits[SCI]", "psf": "stack.fits"}, r"is stack.fits\[SCI\] itself"),
        ({"cube": "stack.fits[SCIENCE]", "psf": "stack.fits[PSF]"}, r"no extension 'SCIENCE'; the file has \[0\] PRIM"),
        ({"cube": "stack.fits", "psf": "stack.fits[PSF]", "angles": "stack.fits[4][col PA]"}, "columns are: PARANG"),
        ({"cube": "stack.fits", "psf": "stack.fits[7]"}, "no extension '7'"),
        ({"cube": "stack.fits[9]", "psf": "stack.fits[PSF]"}, "no extension '9'"),
        ({"cube": "nowhere.fits[1]", "psf": "stack.fits[PSF]"}, "does not exist; give a file, or FILE"),
        ({"cube": "stack.fits", "psf": "stack.fits[PSF]", "star_ra_deg": 3.0}, "belong together"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(stack, tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(stack.parent)
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run", monkeypatch, **data)
    assert not list((tmp_path / "run").glob("*.fits"))
