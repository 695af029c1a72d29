"""Keys completed from the header of the cube, and notes on what contradicts them."""

import numpy as np
import pytest

from pulmo_jax.data.adi import SpectralStack
from pulmo_jax.data.header_angles import FrameAngles
from pulmo_jax.data.instruments import Observed
from pulmo_jax.data.observation_header import Position
from pulmo_jax.tasks.point_sources.config import StackConfig
from pulmo_jax.tasks.point_sources.reading import observe, with_header

ANGLES = np.array([10.0, 20.0, 40.0])
GIVEN = FrameAngles(ANGLES, -104.84, -0.45, "column PARANG of table [1] FRAMES (NACO)")
SEEN = Observed(pixel_scale=0.02719, position=Position(86.8, -51.1, "FK5"), known="NACO")


def stack(angles_deg=ANGLES, given: FrameAngles | None = GIVEN, seen: Observed = SEEN) -> SpectralStack:
    psf = np.exp(-((np.mgrid[-4:5, -4:5] ** 2).sum(0)) / 8)
    cube = np.random.default_rng(0).normal(size=(1, 3, 20, 20))
    return SpectralStack(cube, angles_deg, psf[None], np.ones(1), observed=seen, header_angles=given)


@pytest.fixture
def files(tmp_path):
    paths = {name: tmp_path / name for name in ("cube", "angles", "psf")}
    for path in paths.values():
        path.write_bytes(b"x")
    return paths


def keys(files, *names, **changes) -> StackConfig:
    return StackConfig.model_validate({name: str(files[name]) for name in names} | changes)


def test_keys_that_are_null_come_from_the_header(files):
    data, notes = with_header(keys(files, "cube", "psf"), stack())
    assert (data.pixel_scale, data.pupil_offset_deg, data.true_north_deg) == (0.02719, -104.84, -0.45)
    assert (data.star_ra_deg, data.star_dec_deg) == (86.8, -51.1)
    said = "\n".join(notes)
    assert f"{files['cube']}: the angles are column PARANG of table [1] FRAMES (NACO), plus data.pupil_offset" in said
    for text in ("data.pixel_scale=0.02719", "data.pupil_offset_deg=-104.84", "data.true_north_deg=-0.45"):
        assert f"the header (NACO) gives {text}" in said


def test_keys_that_are_given_win_and_a_note_says_so(files):
    given = {"pixel_scale": 0.0270, "pupil_offset_deg": -104.84, "true_north_deg": -0.6}
    data, notes = with_header(keys(files, "cube", "psf", **given, star_ra_deg=1.0, star_dec_deg=2.0), stack())
    assert {key: getattr(data, key) for key in given} == given
    assert (data.star_ra_deg, data.star_dec_deg) == (1.0, 2.0)
    said = "\n".join(notes)
    assert "gives data.pixel_scale=0.02719; 0.027 is used, as data.pixel_scale says" in said
    assert "gives data.true_north_deg=-0.45; -0.6 is used, as data.true_north_deg says" in said
    assert "data.pupil_offset_deg=" not in said


def test_angles_of_a_file_have_no_offsets_unless_they_are_given(files):
    data, notes = with_header(keys(files, "cube", "angles", "psf"), stack(ANGLES - 104.84 - 0.45))
    assert (data.pupil_offset_deg, data.true_north_deg) == (None, None)
    assert not any("data.angles" in note or "parallactic angles" in note for note in notes)


def test_parallactic_angles_without_the_offsets_of_the_instrument_are_noted(files):
    _, notes = with_header(keys(files, "cube", "angles", "psf"), stack(ANGLES + 360))
    assert "are the parallactic angles of the header" in notes[-1]
    assert "give data.pupil_offset_deg=-104.84 data.true_north_deg=-0.45" in notes[-1]
    _, notes = with_header(keys(files, "cube", "angles", "psf", pupil_offset_deg=-104.84), stack())
    assert not any("are the parallactic angles" in note for note in notes)


def test_angles_that_contradict_the_header_are_noted(files):
    _, notes = with_header(keys(files, "cube", "angles", "psf"), stack(-ANGLES))
    assert "differ by up to" in notes[-1]
    assert "data.angles is used" in notes[-1]


def test_nothing_in_the_header(files):
    data = keys(files, "cube", "angles", "psf", pixel_scale=0.03)
    assert with_header(data, stack(given=None, seen=Observed())) == (data, [])


@pytest.mark.parametrize("sign", [1, -1])
def test_offsets_are_added_to_the_signed_angles(files, sign):
    """The product's rule: a source at theta in the map is at theta - angle in a frame."""
    data = keys(files, "cube", "psf", pupil_offset_deg=-104.84, true_north_deg=-0.45, angle_sign=sign)
    plain = observe(stack(), keys(files, "cube", "psf", angle_sign=sign)).reference.angles_deg
    np.testing.assert_allclose(plain, sign * ANGLES)
    np.testing.assert_allclose(observe(stack(), data).reference.angles_deg, sign * ANGLES - 105.29)
