"""Angles, scales and wavelengths from headers, against the formulas of the pipelines worked out by hand."""

import numpy as np
import pytest
from astropy.io import fits

from pulmo_jax.data.adi import load_channels
from pulmo_jax.data.header_angles import frame_angles
from pulmo_jax.data.instruments import INSTRUMENTS, instrument_of, observed
from pulmo_jax.data.observation_header import Header, Table
from pulmo_jax.types import InputError

PARANG = np.array([10.0, 12.0, 15.0])
SPHERE = {"INSTRUME": "SPHERE", "ESO SEQ ARM": "IRDIS", "DATE-OBS": "2018-01-01T00:00:00"}
ENDS = {"ESO TEL PARANG START": 10.0, "ESO TEL PARANG END": 40.0, "ESO DET NDIT": 3}
NACO = {"INSTRUME": "NAOS+CONICA", "ESO ADA PUPILPOS": 74.6}
NIRC2 = {"CURRINST": "NIRC2", "CAMNAME": "narrow", "ROTPOSN": 4.43, "INSTANGL": 0.7, "DATE-OBS": "2016-01-01"}
CHARIS = {"LAM_MIN": 1155.0, "DLOGLAM": 0.05}


def table(rows: int = 3, **columns) -> Table:
    return Table("[1] FRAMES", rows, {name: np.asarray(values, float) for name, values in columns.items()})


def angles(path, cards, *tables, n_frames=3):
    """Total angle of each frame, and the two offsets."""
    found = frame_angles(path, Header(cards, tables), n_frames)
    total = found.angles_deg + found.pupil_offset_deg + found.true_north_deg
    return total, found.pupil_offset_deg, found.true_north_deg


def refusal(path, cards, *tables, n_frames=3) -> str:
    with pytest.raises(InputError) as error:
        frame_angles(path, Header(cards, tables), n_frames)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize(
    ("cards", "pupil", "north"),
    [
        (SPHERE, 135.99, -1.75),
        (SPHERE | {"ESO SEQ ARM": "IFS"}, 135.99 - 100.48, -1.75),
        ({"INSTRUME": "SPHERE", "ESO DET ID": "IFS"}, 135.99 - 100.48, -1.75),
        (SPHERE | {"ESO INS4 DROT2 MODE": "ELEV"}, 135.99, -1.75),
        (NACO, 74.6 - 179.44, 0.0),
        (NIRC2, 3.73, -0.262),
        (NIRC2 | {"DATE-OBS": "2014-01-01", "ROTMODE": "vertical angle"}, 3.73, -0.252),
        (NIRC2 | {"CAMNAME": "wide"}, 3.73, 0.0),
        (CHARIS, 113.0, 0.0),
    ],
    ids=lambda v: str(v.get("ESO SEQ ARM", v.get("INSTRUME"))) if isinstance(v, dict) else None,
)
def test_parallactic_angles_of_a_table(tmp_path, cards, pupil, north):
    total, *offsets = angles(tmp_path, cards, table(PARANG=PARANG))
    assert offsets == pytest.approx([pupil, north])
    np.testing.assert_allclose(total, PARANG + pupil + north)


def test_naco_gives_the_offset_of_beta_pictoris(tmp_path):
    """The rotator offset of the stack of 2013-02-01 is 104.84 degrees."""
    assert angles(tmp_path, NACO, table(PARANG=PARANG))[1] == pytest.approx(-104.84)


def test_derotator_of_sphere_before_its_clock_was_fixed(tmp_path):
    cards = SPHERE | {"DATE-OBS": "2015-02-05T03:00:00", "ESO TEL ALT": 62.0, "ESO INS4 DROT2 BEGIN": 30.95}
    assert angles(tmp_path, cards, table(PARANG=PARANG))[1] == pytest.approx(135.99 + 0.1)
    later = cards | {"DATE-OBS": "2016-07-13T00:00:00"}
    assert angles(tmp_path, later, table(PARANG=PARANG))[1] == pytest.approx(135.99)


def test_interpolation_between_start_and_end(tmp_path):
    """The header gives the start of the first and the end of the last exposure."""
    total, pupil, north = angles(tmp_path, SPHERE | ENDS)
    np.testing.assert_allclose(total - pupil - north, [15.0, 25.0, 35.0])
    ends = {"ESO TEL PARANG START": 170.0, "ESO TEL PARANG END": -160.0}
    total, pupil, north = angles(tmp_path, NACO | ends)
    np.testing.assert_allclose(total - pupil - north, [175.0, 185.0, 195.0])


def test_a_rotator_that_is_given_for_every_frame(tmp_path):
    rotator = np.array([4.0, 5.0, 7.0])
    total, *_ = angles(tmp_path, NIRC2, table(PARANG=PARANG, ROTPOSN=rotator))
    np.testing.assert_allclose(total, PARANG + rotator - 0.7 - 0.262)


@pytest.mark.parametrize(("name", "cards"), [("DEROT ANGLE", SPHERE), ("angle", SPHERE), ("PARANG", {})])
def test_columns_that_are_complete(tmp_path, name, cards):
    total, *offsets = angles(tmp_path, cards, table(**{name: PARANG}))
    np.testing.assert_array_equal(total, PARANG)
    assert offsets == [0, 0]


@pytest.mark.parametrize(
    ("cards", "tables", "words"),
    [
        ({}, [], "data.angles is missing, and INSTRUME is absent, not a known instrument (SPHERE IRDIS, SPHERE IFS,"),
        ({"INSTRUME": "NICI"}, [], "INSTRUME is NICI"),
        (SPHERE, [], "the SPHERE IRDIS header has no ESO TEL PARANG START and ESO TEL PARANG END"),
        (SPHERE | ENDS | {"ESO DET NDIT": 4}, [], "angles of 4 exposures (ESO DET NDIT), but the cube has 3 frames"),
        (SPHERE | ENDS | {"ESO INS4 DROT2 MODE": "SKY"}, [], "MODE is SKY, but only ELEV is pupil tracking"),
        ({"INSTRUME": "NACO"}, [table(PARANG=PARANG)], "the NACO header has no ESO ADA PUPILPOS"),
        (NIRC2, [], "a NIRC2 header does not give one angle per frame; a table in the same file"),
        (NIRC2 | {"ROTMODE": "position angle"}, [table(PARANG=PARANG)], "ROTMODE is 'position angle', but only"),
        ({"INSTRUME": "GPI"}, [table(PARANG=PARANG)], "GPI cubes are mirrored"),
        ({"INSTRUME": "GPI"}, [], "GPI cubes are mirrored"),
        (SPHERE, [table(4, PARANG=np.zeros(4))], "PARANG of table [1] FRAMES has 4 angles, but the cube has 3 frames"),
        (SPHERE, [table(PARANG=PARANG, DEROT=PARANG)], "several columns may be the angles ([1] FRAMES: PARANG, DEROT)"),
        ({}, [table(PA=PARANG), table(angle=PARANG)], "several columns may be the angles"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_headers_without_angles_say_why(tmp_path, cards, tables, words):
    message = refusal(tmp_path, cards, *tables)
    assert words in message
    assert "data.angles" in message


@pytest.mark.parametrize(
    ("cards", "scale", "exposure", "filter_"),
    [
        (SPHERE | {"ESO DET SEQ1 DIT": 16.0, "ESO INS COMB IFLT": "DB_H23"}, 0.012255, 16.0, "DB_H23"),
        (SPHERE | {"ESO SEQ ARM": "IFS"}, 0.00746, None, None),
        (NACO | {"ESO INS PIXSCALE": 0.02719, "ESO DET DIT": 0.2}, 0.02719, 0.2, None),
        (NACO | {"ESO INS OPTI6 ID": "L_prime"}, None, None, "L_prime"),
        (NIRC2 | {"ITIME": 0.5, "COADDS": 60, "FILTER": "Lp + clear"}, 0.009971, 30.0, "Lp + clear"),
        (NIRC2 | {"DATE-OBS": "2015-04-12"}, 0.009952, None, None),
        (NIRC2 | {"CAMNAME": "wide"}, 0.039686, None, None),
        ({"CURRINST": "NIRC2", "CAMNAME": "narrow"}, None, None, None),
        (CHARIS | {"FILTNAME": "Broadband"}, 0.0162, None, "Broadband"),
        ({"INSTRUME": "GPI", "IFSFILT": "IFSFILT_H_G1213"}, 0.014166, None, "IFSFILT_H_G1213"),
        ({"PIXSCALE": 0.03, "EXPTIME": 2}, 0.03, 2.0, None),
        ({"PIXSCALE": -1.0}, None, None, None),
    ],
)
def test_scale_exposure_and_filter(cards, scale, exposure, filter_):
    found = observed(Header(cards))
    assert (found.pixel_scale, found.exposure_s, found.filter) == (scale, exposure, filter_)


def test_one_instrument_fits_a_header():
    for cards in (SPHERE, SPHERE | {"ESO SEQ ARM": "IFS"}, NACO, NIRC2, CHARIS, {"INSTRUME": "GPI"}):
        assert sum(known.matches(Header(cards)) for known in INSTRUMENTS) == 1
    assert instrument_of(Header({"INSTRUME": "SPHERE", "ESO SEQ ARM": "ZIMPOL"})).name == ""


# --- in files


def write_stack(folder, cards, cube, tables=()):
    psf = np.exp(-((np.mgrid[-4:5, -4:5] ** 2).sum(0)) / 8)
    header = fits.Header({f"HIERARCH {key}" if len(key) > 8 else key: value for key, value in cards.items()})
    hdus = [fits.PrimaryHDU(cube, header), *tables]
    fits.HDUList(hdus).writeto(folder / "cube.fits")
    fits.writeto(folder / "psf.fits", psf)
    return folder / "cube.fits", folder / "psf.fits"


CUBE = np.random.default_rng(0).normal(size=(3, 20, 20)).astype("f4")


def test_a_cube_with_its_angles(tmp_path):
    columns = fits.BinTableHDU.from_columns([fits.Column("PARANG", "D", array=PARANG)], name="FRAMES")
    cube, psf = write_stack(tmp_path, NACO | {"OBJECT": "bet Pic", "ESO DET DIT": 0.2}, CUBE, [columns])
    stack = load_channels(cube, None, psf)
    np.testing.assert_array_equal(stack.angles_deg, PARANG)
    assert stack.header_angles is not None
    assert stack.header_angles.pupil_offset_deg == pytest.approx(-104.84)
    assert (stack.observed.target, stack.observed.known, stack.observed.exposure_s) == ("bet Pic", "NACO", 0.2)


@pytest.mark.parametrize(
    ("cards", "n_channels", "expected"),
    [
        (SPHERE | {"ESO INS COMB IFLT": "DB_H23"}, 2, [1.593, 1.667]),
        (CHARIS, 4, 1.155 * np.exp(0.05 * np.arange(4))),
        ({"CTYPE4": "WAVE", "CRVAL4": 1.5, "CDELT4": 0.1, "CRPIX4": 1.0}, 3, [1.5, 1.6, 1.7]),
    ],
    ids=["IRDIS", "CHARIS", "axis"],
)
def test_wavelengths_of_the_header(tmp_path, cards, n_channels, expected):
    cube, psf = write_stack(tmp_path, cards, np.stack([CUBE + k for k in range(n_channels)]))
    np.save(tmp_path / "angles.npy", PARANG)
    stack = load_channels(cube, tmp_path / "angles.npy", psf)
    np.testing.assert_allclose(stack.wavelengths, expected)
    assert any("the wavelengths are those of its header" in caveat for caveat in stack.caveats)
    np.save(tmp_path / "nm.npy", 1000 * np.asarray(expected))
    stack = load_channels(cube, tmp_path / "angles.npy", psf, tmp_path / "nm.npy")
    assert not any("are not those of" in caveat for caveat in stack.caveats)  # another unit is no contradiction
    np.save(tmp_path / "others.npy", 1.5 ** np.arange(n_channels))
    stack = load_channels(cube, tmp_path / "angles.npy", psf, tmp_path / "others.npy")
    np.testing.assert_allclose(stack.wavelengths, 1.5 ** np.arange(n_channels))
    assert any("are not those of the header" in c and "data.wavelengths is used" in c for c in stack.caveats)


def test_a_filter_with_another_number_of_channels_gives_no_wavelengths(tmp_path):
    cards = SPHERE | {"ESO INS COMB IFLT": "DB_H23"}
    cube, psf = write_stack(tmp_path, cards, np.stack([CUBE, CUBE, CUBE]))
    np.save(tmp_path / "angles.npy", PARANG)
    with pytest.raises(InputError, match="also requires data.wavelengths=FILE, because its header has no wavelengths"):
        load_channels(cube, tmp_path / "angles.npy", psf)
