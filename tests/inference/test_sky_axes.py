"""World coordinates of maps, read by astropy.wcs: separation and position angle of a pixel are those of the tables."""

import numpy as np
import pytest
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS

from pulmo_jax.data.observation_header import Position
from pulmo_jax.inference.fits import write_fits
from pulmo_jax.inference.sky_axes import sky_axes

SCALE = 0.01225
SHAPE, CENTRE = (40, 56), (17.25, 30.5)  # neither square nor centred
POINTS = np.array([(3.0, 4.0), (39.7, 55.2), (17.25, 31.5), (16.25, 30.5), (30.1, 2.2)])
NORTHS = [90.0, 0.0, 194.84, -123.4, 270.0, 45.0]


def expected(north_deg):
    """Separation (arcsec) and position angle (deg) by the formulas of detections.csv."""
    dy, dx = (POINTS - CENTRE).T
    return np.hypot(dy, dx) * SCALE, np.mod(np.rad2deg(np.arctan2(dy, dx)) - north_deg, 360)


def written(tmp_path, *axes):
    write_fits(tmp_path / "x.fits", np.zeros(SHAPE), sky_axes(CENTRE, *axes), {})
    with fits.open(tmp_path / "x.fits", checksum=True) as hdus:
        hdus.verify("exception")
        return WCS(hdus[0].header), hdus[0].header


def turned(found, true):
    return np.abs((found - true + 180) % 360 - 180).max()


@pytest.mark.parametrize("north_deg", NORTHS)
@pytest.mark.parametrize("star", [Position(86.8212345, -51.0665123), Position(0.0001, 89.2, "FK5", 2015.5)])
def test_celestial(tmp_path, north_deg, star):
    wcs, header = written(tmp_path, SCALE, north_deg, star)
    assert wcs.has_celestial
    assert (header["RADESYS"], header["EQUINOX"]) == (star.frame, star.equinox)
    separation, angle = expected(north_deg)
    at = SkyCoord(*wcs.pixel_to_world_values(POINTS[:, 1], POINTS[:, 0]), unit="deg")
    centre = SkyCoord(star.ra_deg, star.dec_deg, unit="deg")
    np.testing.assert_allclose(centre.separation(at).to_value(units.arcsec), separation, atol=1e-6, rtol=0)
    assert turned(centre.position_angle(at).deg, angle) < 1e-6
    np.testing.assert_allclose(wcs.wcs_world2pix([[star.ra_deg, star.dec_deg]], 1)[0], np.array(CENTRE)[::-1] + 1)


@pytest.mark.parametrize("north_deg", NORTHS)
def test_offsets_from_the_star(tmp_path, north_deg):
    wcs, header = written(tmp_path, SCALE, north_deg)
    assert [str(unit) for unit in wcs.wcs.cunit] == ["arcsec", "arcsec"]
    assert (header["CTYPE1"], header["CTYPE2"]) == ("EAST", "NORTH")
    east, north = wcs.wcs_pix2world(POINTS[:, ::-1] + 1, 1).T  # as ds9 counts, the first pixel is 1
    separation, angle = expected(north_deg)
    np.testing.assert_allclose(np.hypot(east, north), separation, atol=1e-6, rtol=0)
    assert turned(np.rad2deg(np.arctan2(east, north)), angle) < 1e-6


def test_east_is_left_where_north_is_up(tmp_path):
    _, header = written(tmp_path, SCALE, 90.0)
    assert [header[f"CD{i}_{j}"] for i in (1, 2) for j in (1, 2)] == [-SCALE, 0, 0, SCALE]


def test_without_a_scale_there_is_a_reference_pixel_alone(tmp_path):
    wcs, header = written(tmp_path, None, 90.0, Position(1.0, 2.0))
    assert (header["CRPIX1"], header["CRPIX2"]) == (31.5, 18.25)
    assert not {"CTYPE1", "CD1_1", "CRVAL1", "CUNIT1", "RADESYS"} & set(header)
    assert not wcs.has_celestial
