"""`detect` warns of a wrong centre and of a wrong sign of the angles, and is silent otherwise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from pulmo_jax.config.section import validate
from pulmo_jax.data.adi import SpectralStack, load_stack
from pulmo_jax.data.synthetic import rotating_stack, spectral_stack
from pulmo_jax.host.console import make_console
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.config import DetectConfig, StackConfig
from pulmo_jax.tasks.point_sources.detection import read
from pulmo_jax.tasks.point_sources.geometry_check import geometry_caveats
from pulmo_jax.tasks.point_sources.reading import observe

BETA_PICTORIS = Path(__file__).parents[4] / "shared" / "data" / "adi_betapic"


def caveats(stack, **keys):
    data = validate(StackConfig, keys)
    return geometry_caveats(stack, observe(stack, data), data)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("planets", [None, ()])
def test_silent_on_the_sample(seed, planets):
    assert caveats(SpectralStack.of_one(rotating_stack(seed, planets=planets).stack)) == []


def test_a_wrong_sign_and_a_wrong_centre_are_named_with_the_remedy():
    stack = SpectralStack.of_one(rotating_stack(1, planets=((72.0, 35.0, 400.0),)).stack)
    (sentence,) = caveats(stack, angle_sign=-1)
    assert "try data.angle_sign=1" in sentence
    (sentence,) = caveats(replace(stack, angles_deg=-stack.angles_deg))
    assert "try data.angle_sign=-1" in sentence
    sentences = caveats(stack, centre=(53.0, 46.0))
    assert any("check data.centre" in sentence for sentence in sentences)


def test_channels_that_are_scaled_are_checked_in_their_own_frames():
    stack = spectral_stack(0, 3, frames=30).stack
    assert caveats(stack, spectral_scaling=True) == []
    (sentence,) = caveats(stack, spectral_scaling=True, centre=(54.0, 46.0))
    assert "(54, 46); check data.centre" in sentence


def test_unknown_pixels_and_frames_do_not_matter():
    stack = rotating_stack(2).stack
    cube = stack.cube.copy()
    cube[:, 30:34, 60:64] = cube[7] = np.nan
    assert caveats(SpectralStack.of_one(replace(stack, cube=cube))) == []
    bright = rotating_stack(1, planets=((72.0, 35.0, 400.0),)).stack
    cube = bright.cube.copy()
    cube[:, 30:34, 60:64] = cube[7] = np.nan
    assert len(caveats(SpectralStack.of_one(replace(bright, cube=cube)), angle_sign=-1)) == 1


def test_detect_prints_and_reports_the_warning(tmp_path, capsys):
    stack = rotating_stack(1, frames=40, planets=((72.0, 35.0, 400.0),)).stack
    for name, values in (("cube", stack.cube), ("angles", -stack.angles_deg), ("psf", stack.psf)):
        np.save(tmp_path / f"{name}.npy", values)
    data = {name: str(tmp_path / f"{name}.npy") for name in ("cube", "angles", "psf")}
    result = read(validate(DetectConfig, {"data": data}), Place(tmp_path, tmp_path, make_console()))
    assert "try data.angle_sign=-1" in " ".join(result.stack.caveats)
    assert "note: derotated with the opposite angles" in capsys.readouterr().out


@pytest.mark.skipif(not BETA_PICTORIS.exists(), reason="the shared data are not there")
def test_beta_pictoris(tmp_path):
    files = [BETA_PICTORIS / f"{name}.fits" for name in ("cube_with_planet", "parallactic_angles", "psf")]
    stack = SpectralStack.of_one(load_stack(*files))
    assert caveats(stack) == []
    assert len(caveats(stack, centre=(50.0, 53.0))) == 1
    assert "SNR 8" in caveats(stack, angle_sign=-1)[0]
    removed = fits.getdata(BETA_PICTORIS / "cube_planet_removed.fits").astype(np.float32)
    assert caveats(replace(stack, cube=removed[None])) == []
