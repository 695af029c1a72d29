"""`detect` on several wavelengths: a synthetic stack and files, what is written, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from references.pages import first_line, require_captions

from pulmo_jax import detect
from pulmo_jax.config.section import validate
from pulmo_jax.data.spectral_library import spectral_library
from pulmo_jax.data.synthetic import spectral_stack
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.reading import load
from pulmo_jax.types import InputError

pytestmark = pytest.mark.slow  # its parts have quick tests of their own

PLANET = (33.0, 35.0, 2500.0)
WHOLE: dict[str, Any] = {"frames": 26, "size": 46, "rotation_deg": 150.0, "planets": [list(PLANET)]}


@pytest.fixture(scope="module")
def made():
    return spectral_stack(0, 2, WHOLE["frames"], WHOLE["size"], WHOLE["rotation_deg"], (PLANET,))


def run(folder: Path, **data: Any) -> Path:
    values = {"data": data, "method": {"patch_radius_px": 2.5}, "contrast": {"rings": 2, "directions": 2}}
    detect.detect(validate(DetectConfig, values), folder)
    return folder


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("synthetic"), synthetic=WHOLE | {"channels": 2})


def files(folder: Path, made, **changes: Any) -> dict[str, Any]:
    stack = made.stack
    arrays = {
        "cube": stack.cube,
        "angles": stack.angles_deg,
        "psf": stack.psf,
        "wavelengths": stack.wavelengths,
    } | changes
    for name, array in arrays.items():
        fits.writeto(folder / f"{name}.fits", np.asarray(array))
    return {name: str(folder / f"{name}.fits") for name in arrays}


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_spectra_of_a_synthetic_stack_come_back(synthetic, made):
    sources, spectra = rows(synthetic, "detections"), rows(synthetic, "spectra")
    source = min(sources, key=lambda row: np.hypot(float(row["y"]) - PLANET[0], float(row["x"]) - PLANET[1]))
    of_source = [row for row in spectra if row["label"] == source["label"]]
    assert len(spectra) == 2 * len(sources)
    for row, wavelength, share in zip(of_source, made.stack.wavelengths, made.spectrum, strict=True):
        assert float(row["wavelength"]) == pytest.approx(wavelength)
        assert abs(float(row["flux"]) - share * PLANET[2]) < 4 * float(row["flux_std_empirical"])
        assert float(row["flux"]) == pytest.approx(share * PLANET[2], rel=0.25)


def test_outputs_of_several_wavelengths(synthetic):
    metrics = json.loads((synthetic / "metrics.json").read_text())
    assert metrics["wavelengths"] == [1.0, 1.3]
    r = np.array(metrics["spectral_correlation"]["correlation"])
    assert r.shape[1:] == (2, 2)
    header = fits.getheader(synthetic / "snr.fits")
    names = spectral_library(np.array([1.0, 1.3])).names
    n = len(names)
    assert (header["NCHANNEL"], header["WAVEMIN"], header["WAVEMAX"], header["NSPECTRA"]) == (2, 1.0, 1.3, n)
    assert header["NTRIALS"] == pytest.approx(metrics["effective_trials"])
    assert 1 <= header["NTRIALS"] <= n == metrics["spectra_tried"]
    assert metrics["threshold"] > 5
    named = fits.getheader(synthetic / "template.fits")
    assert tuple(named[f"SPEC{number}"] for number in range(n)) == names == tuple(metrics["spectra"])
    assert all(row["spectrum"] == names[int(row["template"])] for row in rows(synthetic, "spectra"))
    assert (header["CENTERY"], header["CENTERX"]) == (23, 23)
    for name in ("figures/spectra.png", "contrast.csv", "throughput.fits", "snr_null.fits"):
        assert (synthetic / name).stat().st_size > 0
    page = (synthetic / "report.html").read_text()
    require_captions(synthetic / "report.html")
    assert first_line(synthetic / "report.html").startswith("Sample data: a synthetic image stack")
    for words in ("combine 2 channels", "A&amp;A 637, A9"):
        assert words in page


@pytest.mark.slow
def test_files_with_a_set_of_spectra_and_scaled_frames(made, tmp_path, synthetic):
    spectra = np.stack([made.spectrum[::-1], made.spectrum])
    given = files(tmp_path, made, spectrum=spectra)
    folder = run(tmp_path / "run", **given, spectral_scaling=True)
    template: Any = fits.getdata(folder / "template.fits")
    assert template[round(PLANET[0]), round(PLANET[1])] == 1
    assert fits.getheader(folder / "snr.fits")["NSPECTRA"] == 2
    [row] = [row for row in rows(folder, "detections") if abs(float(row["y"]) - PLANET[0]) < 1]
    assert abs(float(row["x"]) - PLANET[1]) < 0.5
    assert float(row["flux_debiased"]) == pytest.approx(PLANET[2], rel=0.25)
    assert (fits.getheader(folder / "snr.fits")["CENTERY"]) == 23
    scaled: Any = fits.getdata(folder / "snr.fits")
    plain: Any = fits.getdata(synthetic / "snr.fits")
    assert scaled.shape == plain.shape


@pytest.mark.parametrize(
    ("changes", "named", "words"),
    [
        ({"wavelengths": np.array([1.0, 1.1, 1.2])}, "wavelengths", "has 3 wavelengths"),
        ({"wavelengths": np.array([1.0, 1.0])}, "wavelengths", "2 channels have the same wavelength, 1"),
        ({"wavelengths": np.array([1.0, -1.0])}, "wavelengths", "not positive"),
        ({"spectrum": np.ones(3)}, "spectrum", "the stack has 2 channels"),
        ({"spectrum": np.array([1.0, -1.0])}, "spectrum", "not negative"),
        ({"spectrum": np.zeros(2)}, "spectrum", "not all 0"),
        ({"psf": np.ones((3, 9, 9))}, "psf", "3 PSF images"),
        ({"cube": np.ones((2, 26, 46, 46))}, "cube", "no channel can be used"),
    ],
    ids=["count", "equal", "negative", "length", "spectrum negative", "spectrum empty", "psfs", "bad channels"],
)
def test_what_does_not_fit_is_refused_by_name(made, tmp_path, changes, named, words):
    given = files(tmp_path, made, **changes)
    with pytest.raises(InputError) as error:
        run(tmp_path / "run", **given)
    assert given[named] in str(error.value)
    assert words in str(error.value)


def test_a_cube_of_several_wavelengths_needs_them(made, tmp_path):
    given = files(tmp_path, made)
    del given["wavelengths"]
    with pytest.raises(InputError, match="also requires data.wavelengths=FILE"):
        run(tmp_path / "run", **given)


def test_a_spectrum_needs_wavelengths(made, tmp_path):
    given = files(tmp_path, made, spectrum=np.ones(len(made.stack.wavelengths)))
    del given["wavelengths"]
    with pytest.raises(InputError, match="data.spectrum needs data.wavelengths, or wavelengths in the header"):
        run(tmp_path / "run", **given)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"wavelengths": __file__}, "data.wavelengths belongs to a data.cube"),
        ({"synthetic": {"channels": 0}}, "data.synthetic.channels"),
    ],
    ids=["wavelengths alone", "no channels"],
)  # fmt: skip
def test_keys_that_do_not_belong_together(data, words):
    with pytest.raises(InputError, match=words):
        validate(DetectConfig, {"data": data})


@pytest.mark.parametrize("given", [None, "library", "flat"])
def test_spectra_are_named(given):
    assert validate(DetectConfig, {"data": {"spectrum": given}}).data.spectrum == given
    with pytest.raises(InputError, match=r"data\.spectrum='nothing': does not exist; give a file"):
        validate(DetectConfig, {"data": {"spectrum": "nothing"}})


def test_stack_gets_the_library_a_flat_spectrum_or_those_of_a_file(made, tmp_path):
    given = files(tmp_path, made, spectrum=np.ones((1, 2)))
    spectrum = given.pop("spectrum")
    named = {}
    for kind, changes in (("library", {}), ("flat", {"spectrum": "flat"}), ("file", {"spectrum": spectrum})):
        _, stack = load(validate(DetectConfig, {"data": given | changes}).data)
        named[kind] = stack.spectrum_names
        assert (stack.spectra is None) == (kind == "flat")
    assert named == {"library": spectral_library(made.stack.wavelengths).names, "flat": ("flat",), "file": ()}
    assert len(named["library"]) > 2
