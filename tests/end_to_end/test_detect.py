"""`detect` as a person calls it: a synthetic stack, files of every format, every option, and whatever can be wrong."""

import csv
import io
import json
import logging.config
import re
import signal
import sys
from ast import literal_eval
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from omegaconf import OmegaConf
from references import child
from scipy import stats

from pulmo_jax import detect
from pulmo_jax.config.section import validate
from pulmo_jax.data.psf import shift
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.evaluation.null_field import FALSE_ALARM_FLOOR
from pulmo_jax.host.marks import MARK
from pulmo_jax.inference.contrast import Contrast
from pulmo_jax.shell import cli
from pulmo_jax.tasks.point_sources import cells
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.types import PointSource

FRAMES, SIZE, ROTATION_DEG, SEED = 24, 48, 150.0, 0
PLANET = (34.0, 36.0, 1000.0)
CENTRE = (24.0, 24.0)
SMALL = [
    f"data.synthetic.frames={FRAMES}", f"data.synthetic.size={SIZE}", f"data.synthetic.rotation_deg={ROTATION_DEG}",
    "data.synthetic.planets=[[34,36,1000]]",
]  # fmt: skip
MAPS = ("snr", "flux", "flux_std", "a", "b", "snr_calibrated", "snr_null", "a_null", "b_null")
WORDS = ("flux_unit", "near_threshold")  # columns of detections.csv that are not numbers
PSF_TIMES = 7.0
SCALE, STAR_FLUX = 0.027, 2e5


def load(path: Path | str) -> np.ndarray:
    array: Any = fits.getdata(path)
    return array


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Run:
    """A finished run's folder, read."""

    path: Path
    out: str = ""

    def map(self, name: str) -> np.ndarray:
        return load(self.path / f"{name}.fits")

    def header(self, name: str = "snr") -> fits.Header:
        return fits.getheader(self.path / f"{name}.fits")

    def rows(self, name: str = "detections") -> list[dict[str, str]]:
        with (self.path / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))

    def only(self) -> dict[str, float]:
        """The numbers of the one source that there is."""
        [row] = self.rows()
        return {key: float(value) for key, value in row.items() if key not in WORDS}

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.path / "metrics.json").read_text())


@pytest.fixture(scope="module")
def planted():
    return rotating_stack(SEED, FRAMES, SIZE, ROTATION_DEG, (PLANET,)).stack


@pytest.fixture(scope="module")
def files(planted, tmp_path_factory):
    """The planted stack as FITS files, the PSF of another flux than 1, in a folder that needs quotes."""
    folder = tmp_path_factory.mktemp("fits") / "Straße ü (1), [x]=1"
    return write_stack(folder, planted.cube, planted.angles_deg, PSF_TIMES * planted.psf)


def write_stack(folder: Path, cube, angles, psf) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    for name, array in (("cube", cube), ("angles", angles), ("psf", psf)):
        fits.writeto(folder / f"{name}.fits", np.asarray(array))
    return {f"data.{name}": str(folder / f"{name}.fits") for name in ("cube", "angles", "psf")}


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    tree = OmegaConf.create()
    for key, value in changes.items():
        OmegaConf.update(tree, key, value, force_add=True)
    values: Any = OmegaConf.to_container(tree)
    return values


@pytest.fixture
def job(tmp_path, monkeypatch, capsys):
    """Does the whole job of a config (dotted keys) but for report and limits."""
    monkeypatch.setattr("pulmo_jax.tasks.point_sources.detection.write_adi_report", lambda *arguments: None)

    def call(changes: dict[str, Any], name: str = "run") -> Run:
        config = validate(DetectConfig, nested({"contrast.rings": 0} | changes))
        detect.detect(config, tmp_path / name)
        return Run(tmp_path / name, capsys.readouterr().out)

    return call


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Calls it as the command line does, in an empty folder. Hydra's logging would close pytest's handlers."""
    monkeypatch.setattr(logging.config.DictConfigurator, "configure", lambda self: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["detect.py", *arguments])
        status = 0
        try:
            cli.main("detect", detect.detect, "")
        except SystemExit as error:
            assert isinstance(error.code, int)
            status = error.code
        return Done(status, *capsys.readouterr())

    return call


def as_arguments(changes: dict[str, Any]) -> list[str]:
    return [f"{key}='{value}'" if isinstance(value, str) else f"{key}={value}" for key, value in changes.items()]


# --- a sweep over a synthetic stack, in a process of its own


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    more = ["method.shrinkage=paco,oas", "contrast.rings=0", "search.max_sources=0", "hydra.sweep.dir=out"]
    done = child.run("pulmo_jax.detect", "-m", "+experiment=adi", *SMALL, *more, cwd=folder)
    assert done.stderr == ""
    return [Run(folder / "out" / str(number), done.stdout) for number in range(2)]


@pytest.mark.slow
def test_every_output_is_there(sweep):
    for run in sweep:
        names = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
        figures = ("detection_maps", "null_distribution", "null_by_radius", "frames")
        expected = {f"{name}.fits" for name in MAPS}
        expected |= {f"figures/{name}.{kind}" for name in figures for kind in ("pdf", "png")}
        expected |= {
            "detections.csv",
            "metrics.json",
            "run.json",
            "config.yaml",
            "report.html",
            "job.json",
            "inputs.json",
        }
        assert names - {MARK} == expected
        for name in expected:
            assert (run.path / name).stat().st_size > 0


@pytest.mark.slow
def test_jobs_of_a_sweep_differ_where_they_should(sweep):
    configs = [OmegaConf.load(run.path / "config.yaml") for run in sweep]
    assert [config.method.shrinkage for config in configs] == ["paco", "oas"]
    assert configs[0].data == configs[1].data
    assert not np.array_equal(sweep[0].map("snr"), sweep[1].map("snr"), equal_nan=True)
    assert sweep[0].header()["RHOMED"] != sweep[1].header()["RHOMED"]


@pytest.mark.slow
def test_maps_agree_with_each_other(sweep):
    a, b, snr, flux, std = (sweep[0].map(name).astype(float) for name in ("a", "b", "snr", "flux", "flux_std"))
    known = np.isfinite(snr)
    assert known.mean() > 0.6
    np.testing.assert_allclose(snr[known], (b / np.sqrt(a))[known], rtol=1e-5)
    np.testing.assert_allclose(flux[known], (b / a)[known], rtol=1e-5)
    np.testing.assert_allclose(std[known], (1 / np.sqrt(a))[known], rtol=1e-5)
    assert sweep[0].metrics()["highest_snr"] == pytest.approx(np.nanmax(snr), rel=1e-6)
    assert np.unravel_index(np.nanargmax(snr), snr.shape) == (34, 36)
    assert np.nanmax(snr) > 5


@pytest.mark.slow
def test_report_is_self_contained(sweep):
    page = (sweep[0].path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    for words in ("Sources", "Noise", "The stack", "A&amp;A 618", "fewer than the"):
        assert words in page


# --- headers


def read_back(header: fits.Header) -> dict[str, Any]:
    """The config that a header holds, in cards of its own or in comments."""
    found = {key.removeprefix("PJ "): header[key] for key in header.keys() if key.startswith("PJ ")}  # noqa: SIM118
    lines = "".join(f"{line}\n" for line in header.get("COMMENT", [])).replace("&\n", "").splitlines()
    for line in lines:
        name, separator, value = line.partition(" = ")
        if separator:
            found[name] = literal_eval(value)
    return {key.lower(): value for key, value in found.items()}


def dotted(values: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_header_of_every_map_gives_every_key_back(sweep, name):
    config: Any = OmegaConf.to_container(OmegaConf.load(sweep[0].path / "config.yaml"))
    found = read_back(sweep[0].header(name))
    for key, value in dotted(config).items():
        expected = value if isinstance(value, bool | int | float | str) else str(value)
        assert found[key] == expected, key
    assert set(found) == set(dotted(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_header_says_what_the_map_is(sweep, name):
    with fits.open(sweep[0].path / f"{name}.fits") as hdus:
        hdus.verify("exception")
        hdu: Any = hdus[0]
        assert len(hdus) == 1
        header = hdu.header
    powers = {"flux": "", "flux_std": "", "a": "-2", "b": "-1", "a_null": "-2", "b_null": "-1"}
    assert (header["EXTNAME"], header["BUNIT"]) == (name, f"count{powers[name]}" if name in powers else "")
    assert "OBJECT" not in header
    assert (header["CENTERY"], header["CENTERX"]) == CENTRE
    assert (header["CRPIX2"], header["CRPIX1"]) == (CENTRE[0] + 1, CENTRE[1] + 1)
    assert (header["NFRAMES"], header["NDROPPED"], header["NMASKED"]) == (FRAMES, 0, 0)
    assert header["ROTATION"] == pytest.approx(ROTATION_DEG)
    assert header["PSFNORM"] == "fwhm"
    assert header["PSFFLUX"] == pytest.approx(1)
    assert header["BITPIX"] == -32
    assert "CTYPE1" not in header


# --- from files


def as_fits(path: Path, array: np.ndarray) -> None:
    fits.writeto(path, array)


WRITERS = {"fits": as_fits, "fits.gz": as_fits, "tif": tifffile.imwrite, "npy": np.save, "txt": np.savetxt}


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["fits fits fits", "tif txt tif", "npy npy npy", "fits.gz txt npy"])
def test_formats_give_the_map_of_the_synthetic_stack_itself(job, sweep, planted, tmp_path, kinds):
    arrays = {"cube": planted.cube, "angles": planted.angles_deg, "psf": planted.psf}
    given = {}
    for (name, array), kind in zip(arrays.items(), kinds.split(), strict=True):
        path = tmp_path / f"{name}.{kind}"
        WRITERS[kind](path, array)
        given[f"data.{name}"] = str(path)
    run = job(given | {"search.max_sources": 0})
    np.testing.assert_allclose(run.map("snr"), sweep[0].map("snr"), atol=2e-4)
    assert f"{given['data.cube']}: 24 frames" in run.out


def test_names_with_spaces_umlauts_and_signs(command, files, monkeypatch):
    monkeypatch.setattr("pulmo_jax.tasks.point_sources.detection.write_adi_report", lambda *arguments: None)
    more = ["contrast.rings=0", "search.max_sources=0", "hydra.run.dir='Läufe 1'"]
    done = command("+experiment=adi", *as_arguments(files), *more)
    assert (done.status, done.err) == (0, "")
    run = Run(Path("Läufe 1"))
    assert read_back(run.header())["data.cube"] == files["data.cube"]
    assert OmegaConf.load(run.path / "config.yaml").data.cube == files["data.cube"]


def test_what_is_wrong_with_a_stack_is_said_and_the_planet_found(job, planted, tmp_path):
    """NaN frames, a masked centre, dead pixels, odd frames that are not square, angles that wrap, an even and large
    PSF: one call."""
    cube = planted.cube[:, :-1].copy()
    cube[[3, 17]] = np.nan
    cube[:, 22:27, 22:27] = np.nan
    cube[:, 5, 7] = 3
    psf = np.pad(planted.psf, 15)[:-1, :-1]
    given = write_stack(tmp_path / "ugly", cube, np.mod(planted.angles_deg, 360), psf)
    run = job(given | {"data.centre": list(CENTRE), "search.max_sources": 0})
    words = " ".join(run.out.split())
    for said in (
        "2 blank, saturated or mostly non-finite frames are dropped: 3, 17", "25 pixels are excluded",
        "1 pixels are constant", "was cropped to 47 x 47 px", "22 frames of 47 x 48 px", "field rotation 150.0 degrees",
    ):  # fmt: skip
        assert said in words
    header = run.header()
    assert (header["NFRAMES"], header["NDROPPED"], header["NMASKED"]) == (22, 2, 26)
    snr = run.map("snr")
    assert np.unravel_index(np.nanargmax(snr), snr.shape) == (34, 36)
    assert np.nanmax(snr) > 5
    assert run.metrics()["frames_left_out"] == 2
    assert any("fewer than the" in caveat for caveat in run.metrics()["caveats"])


# --- geometry


@pytest.mark.slow
def test_field_that_rotates_the_other_way(job, files, planted, tmp_path):
    turned = write_stack(tmp_path / "turned", planted.cube, -planted.angles_deg, PSF_TIMES * planted.psf)
    one, other = job(files, "one"), job(turned | {"data.angle_sign": -1}, "other")
    for name in MAPS:
        np.testing.assert_array_equal(one.map(name), other.map(name))
    assert one.rows() == other.rows()


@pytest.mark.slow
def test_centre_off_the_grid(job, planted, tmp_path):
    dy, dx = 0.3, -0.4
    cube = np.stack([shift(frame.astype(float), dy, dx) for frame in planted.cube])
    given = write_stack(tmp_path / "moved", cube, planted.angles_deg, PSF_TIMES * planted.psf)
    run = job(given | {"data.centre": [CENTRE[0] + dy, CENTRE[1] + dx]})
    source, header = run.only(), run.header()
    assert np.hypot(source["y"] - PLANET[0] - dy, source["x"] - PLANET[1] - dx) < 0.2
    assert source["separation_px"] == pytest.approx(np.hypot(PLANET[0] - 24, PLANET[1] - 24), abs=0.2)
    assert (header["CENTERY"], header["CENTERX"]) == pytest.approx((24.3, 23.6))
    assert (header["CRPIX2"], header["CRPIX1"]) == pytest.approx((25.3, 24.6))


@pytest.mark.slow
def test_north_turns_the_position_angle_alone(job, files):
    up, turned = job(files, "up"), job(files | {"data.north_deg": 30}, "turned")
    before, after = up.only(), turned.only()
    expected = np.rad2deg(np.arctan2(before["y"] - 24, before["x"] - 24)) - 90
    assert before["position_angle_deg"] == pytest.approx(np.mod(expected, 360), abs=1e-4)
    assert after["position_angle_deg"] == pytest.approx(np.mod(expected + 60, 360), abs=1e-4)
    key = "position_angle_deg"
    assert {k: v for k, v in before.items() if k != key} == {k: v for k, v in after.items() if k != key}


# --- units and limits


@pytest.fixture(scope="module")
def limits(files, tmp_path_factory):
    """A run with all that scale and star's flux give, and a contrast curve."""
    folder = tmp_path_factory.mktemp("limits")
    how = {"data.pixel_scale": SCALE, "data.star_flux": STAR_FLUX, "contrast.rings": 2, "contrast.directions": 2}
    config = validate(DetectConfig, nested(files | how))
    with redirect_stdout(io.StringIO()) as out:
        detect.detect(config, folder)
    return Run(folder, out.getvalue())


@pytest.mark.slow
def test_planted_planet_is_found(limits):
    source = limits.only()
    assert np.hypot(source["y"] - PLANET[0], source["x"] - PLANET[1]) < 0.25
    assert source["flux_debiased"] == pytest.approx(PLANET[2], rel=0.1)
    assert abs(source["flux_debiased"] - PLANET[2]) < 3 * source["flux_debiased_std_empirical"]
    assert source["flux"] < 0.8 * PLANET[2]  # one pass keeps a part alone
    assert FALSE_ALARM_FLOOR <= source["false_alarm_probability"] < 1e-3
    assert np.nanmax(limits.map("snr_null")) < 5 < np.nanmax(limits.map("snr"))
    assert "1 source, " in limits.out
    assert "24 frames of 48 x 48 px, field rotation 150.0 degrees" in limits.out


@pytest.mark.slow
def test_tables_hold_finite_numbers_in_the_columns_that_are_promised(limits):
    more = ["separation_arcsec", "separation_arcsec_std", "contrast", "contrast_std", "delta_mag", "delta_mag_std"]
    [source] = limits.rows()
    assert list(source) == [*(field.name for field in fields(PointSource)), "flux_unit", *more]
    assert source.pop("flux_unit") == "psf_fwhm"
    assert source.pop("near_threshold") in ("True", "False")
    assert np.isfinite([float(value) for value in source.values()]).all()
    rings = limits.rows("contrast")
    names = [field.name for field in fields(Contrast)]
    relative = [f"{kind}{share}" for kind in ("contrast", "delta_mag") for share in ("", "_half", "_95")]
    assert list(rings[0]) == ["separation_arcsec", *names, "limit_corrected", "flux_unit", *relative]
    assert len(rings) == 2
    separations = [float(ring["separation_px"]) for ring in rings]
    assert 0 < separations[0] < separations[1] < SIZE / 2
    for ring in rings:
        assert ring["limit_corrected"] == ring["half_low"]
        always = [float(ring[name]) for name in ("threshold", "limit", "tested_high", "flux_throughput", "n")]
        assert (np.array(always) > 0).all()
        assert 1 <= float(ring["n"]) <= 2
        for low, high in (("half_low", "half_high"), ("most_low", "most_high")):
            assert bool(ring[low]) == bool(ring[high])
            assert not ring[low] or 0 < float(ring[low]) <= float(ring[high]) <= float(ring["tested_high"])
    assert float(rings[1]["half_low"]) > float(rings[1]["limit"])


@pytest.mark.slow
def test_throughput_map_is_the_curve_at_every_separation(limits):
    rings = limits.rows("contrast")
    separation, share = ([float(ring[name]) for ring in rings] for name in ("separation_px", "flux_throughput"))
    y, x = np.indices((SIZE, SIZE))
    image = limits.map("throughput")
    expected = np.interp(np.hypot(y - CENTRE[0], x - CENTRE[1]), separation, share)
    known = np.isfinite(image)
    np.testing.assert_array_equal(known, np.isfinite(limits.map("snr")))
    np.testing.assert_allclose(image[known], expected[known], rtol=1e-5)
    assert limits.header("throughput")["EXTNAME"] == "throughput"
    assert read_back(limits.header("throughput"))["data.star_flux"] == STAR_FLUX


@pytest.mark.slow
def test_scale_and_star_give_arcsec_and_contrasts(limits):
    source = limits.only()
    assert source["separation_arcsec"] == pytest.approx(SCALE * source["separation_px"], rel=1e-6)
    assert source["separation_arcsec_std"] == pytest.approx(SCALE * source["separation_px_std"], rel=1e-6)
    assert source["contrast"] == pytest.approx(source["flux_debiased"] / STAR_FLUX, rel=1e-6)
    assert source["contrast_std"] == pytest.approx(source["flux_debiased_std_empirical"] / STAR_FLUX, rel=1e-6)
    assert source["delta_mag"] == pytest.approx(-2.5 * np.log10(source["contrast"]), rel=1e-6)
    relative = source["contrast_std"] / source["contrast"]
    assert source["delta_mag_std"] == pytest.approx(2.5 / np.log(10) * relative, rel=1e-6)
    assert limits.metrics()["star_flux"] == limits.header()["STARFLUX"] == STAR_FLUX
    assert limits.metrics()["flux_unit"] == "psf_fwhm"
    for ring in limits.rows("contrast"):
        assert float(ring["separation_arcsec"]) == pytest.approx(SCALE * float(ring["separation_px"]), rel=1e-6)
        for share, flux in (("", "limit"), ("_half", "half_low"), ("_95", "most_low")):
            one, magnitude = ring[f"contrast{share}"], ring[f"delta_mag{share}"]
            assert bool(one) == bool(magnitude) == bool(ring[flux])
            if one:
                assert float(one) == pytest.approx(float(ring[flux]) / STAR_FLUX, rel=1e-6)
                assert float(magnitude) == pytest.approx(-2.5 * np.log10(float(one)), rel=1e-6)
    header = limits.header()
    assert header["PIXSCALE"] == SCALE
    page = (limits.path / "report.html").read_text()
    mas = [1000 * source[f"separation_arcsec{kind}"] for kind in ("", "_std")]
    assert cells.measured(*mas) in page
    assert "contrast" in page
    assert "ΔRA = Δα cos δ" in page
    assert "Limits" in page
    assert (limits.path / "figures" / "contrast_curve.png").stat().st_size > 0


@pytest.mark.slow
def test_contrast_from_the_psf_image_does_not_depend_on_its_normalisation(job, files):
    """With star_flux=psf a contrast is the flux over that of the image, in frames of 50 times its exposure."""
    how: dict[str, Any] = {"data.star_flux": "psf", "data.exposure_ratio": 50.0}
    for kind in ("fwhm", "peak", "none"):
        run = job(files | how | {"data.psf_flux": kind}, kind)
        source = run.only()
        assert run.metrics()["star_flux"] == pytest.approx(50 * run.header()["PSFFLUX"], rel=1e-6)
        assert source["contrast"] == pytest.approx(PLANET[2] / (50 * PSF_TIMES), rel=0.1)
        assert source["delta_mag"] == pytest.approx(-2.5 * np.log10(source["contrast"]), rel=1e-6)


@pytest.mark.slow
def test_psf_flux_changes_the_flux_and_nothing_else(job, files, planted):
    """A flux over what the PSF was divided by is a multiple of the PSF as given, whatever that is."""
    kinds: dict[str, dict[str, Any]] = {kind: {"data.psf_flux": kind} for kind in ("fwhm", "peak", "none")}
    kinds["aperture"] = {"data.psf_flux": "aperture", "data.psf_aperture_px": 5.0}
    runs = {kind: job(files | how, kind) for kind, how in kinds.items()}
    offset = (np.arange(39 * 20) + 0.5) / 20 - 19.5
    inside = (offset[:, None] ** 2 + offset**2 <= 25).reshape(39, 20, 39, 20).mean((1, 3))
    divided = {"fwhm": 1.0, "peak": planted.psf.max(), "none": 1 / PSF_TIMES, "aperture": (inside * planted.psf).sum()}
    reference = runs["none"].only()
    for kind, run in runs.items():
        header, source = run.header(), run.only()
        assert header["PSFNORM"] == kind
        assert header["PSFFLUX"] == pytest.approx(PSF_TIMES * divided[kind], rel=1e-4)
        np.testing.assert_allclose(run.map("snr"), runs["none"].map("snr"), atol=2e-4)
        np.testing.assert_allclose(
            run.map("flux") / header["PSFFLUX"], runs["none"].map("flux"), rtol=1e-3, atol=1e-3 * reference["flux"]
        )
        for name in ("flux", "flux_std", "flux_debiased", "flux_debiased_std"):
            assert source[name] / header["PSFFLUX"] == pytest.approx(reference[name], rel=2e-3), name
        assert (source["y"], source["x"]) == pytest.approx((reference["y"], reference["x"]), abs=2e-3)
    assert reference["flux_debiased"] * PSF_TIMES == pytest.approx(PLANET[2], rel=0.1)


# --- options of the computation


@pytest.mark.slow
def test_double_precision_agrees(job, sweep):
    changes = nested_small() | {"method.precision": "float64", "search.max_sources": 0}
    run = job(changes)
    np.testing.assert_allclose(run.map("snr"), sweep[0].map("snr"), atol=1e-3)
    assert not np.array_equal(run.map("snr"), sweep[0].map("snr"), equal_nan=True)


def nested_small() -> dict[str, Any]:
    return {
        "data.synthetic.frames": FRAMES, "data.synthetic.size": SIZE, "data.synthetic.rotation_deg": ROTATION_DEG,
        "data.synthetic.planets": [list(PLANET)],
    }  # fmt: skip


@pytest.mark.slow
def test_fast_mode_finds_the_same(job, files, sweep):
    run = job(files | {"method.mode": "fast", "search.max_sources": 0})
    fast, exact = run.map("snr"), sweep[0].map("snr")
    assert np.unravel_index(np.nanargmax(fast), fast.shape) == (34, 36)
    assert np.nanmax(fast) == pytest.approx(np.nanmax(exact), rel=0.1)
    assert np.nanmax(abs(fast - exact)) > 1e-3
    assert run.header()["PSFERR"] == run.header()["SNRERR"] == 0
    assert sweep[0].header()["PSFERR"] > 0


@pytest.mark.slow
def test_calibrated_snr_decides_unless_the_theoretical_one_is_asked_for(job, files, limits):
    """Few independent values near the star make the significance lower than the SNR."""
    source = limits.only()
    refitted = source["snr_debiased"] / limits.metrics()["refit_gain"]
    assert source["snr_calibrated"] < refitted
    between = {"search.threshold": (source["snr_calibrated"] + refitted) / 2}
    assert job(files | between, "calibrated").rows() == []
    assert len(job(files | between | {"search.snr": "theoretical"}, "theory").rows()) == 1


@pytest.mark.slow
def test_calibrated_map_is_student_t_by_hand(limits):
    null = limits.metrics()["null_by_separation"]
    y, x = np.indices((SIZE, SIZE))
    separation = np.hypot(y - CENTRE[0], x - CENTRE[1])
    std, n = (np.interp(separation, null["separation_px"], null[name]) for name in ("std", "independent"))
    snr, calibrated = limits.map("snr").astype(float), limits.map("snr_calibrated")
    tail = stats.t.sf(abs(snr) / std / np.sqrt(1 + 1 / n), n - 1)
    known = np.isfinite(snr)
    np.testing.assert_array_equal(known, np.isfinite(calibrated))
    np.testing.assert_allclose(abs(calibrated[known]), stats.norm.isf(tail[known]), rtol=1e-4, atol=1e-4)
    assert (calibrated[known] * snr[known] >= 0).all()


def test_no_limits_and_no_search(job, files):
    run = job(files | {"search.max_sources": 0})
    names = {path.name for path in run.path.rglob("*")}
    assert not names & {"contrast.csv", "throughput.fits", "contrast_curve.png"}
    assert (run.path / "detections.csv").read_text().splitlines() == [
        ",".join([*(field.name for field in fields(PointSource)), "flux_unit"])
    ]
    assert run.metrics()["sources"] == 0


# --- what is refused


def broken(files: dict[str, str], folder: Path, what: str) -> dict[str, str]:
    """The files' stack with one thing wrong."""
    cube, angles, psf = (load(files[f"data.{name}"]) for name in ("cube", "angles", "psf"))
    arrays: dict[str, Any] = {
        "angles too many": (cube[:-1], angles, psf),
        "axes transposed": (np.moveaxis(cube, 0, -1), angles, psf),
        "psf as cube": (psf, angles, psf),
        "cube as angles": (cube, cube, psf),
        "angles not finite": (cube, np.where(np.arange(FRAMES) == 5, np.nan, angles), psf),
        "no rotation": (cube, np.full(FRAMES, 33.0), psf),
        "one frame": (cube[:1], angles[:1], psf),
        "two colours": (np.stack([cube, cube]), angles, psf),
        "all not finite": (np.full_like(cube, np.nan), angles, psf),
        "constant": (np.ones_like(cube), angles, psf),
        "psf negative": (cube, angles, -psf),
        "psf not finite": (cube, angles, np.where(psf == psf.max(), np.nan, psf)),
        "psf of one pixel": (cube, angles, (psf == psf.max()).astype(float)),
    }
    return write_stack(folder, *arrays[what])


@pytest.mark.parametrize(
    ("what", "file", "words"),
    [
        ("angles too many", "angles", "24 angles"),
        ("axes transposed", "angles", "Axis 2 of the cube has that length"),
        ("psf as cube", "cube", "(39, 39)"),
        ("cube as angles", "angles", "(24, 48, 48)"),
        ("angles not finite", "angles", "frame 5"),
        ("no rotation", "angles", "33 degrees"),
        ("one frame", "cube", "at least 2"),
        ("two colours", "cube", "data.wavelengths"),
        ("all not finite", "cube", "0 usable frames"),
        ("constant", "cube", "0 usable frames"),
        ("psf negative", "psf", "no positive flux"),
        ("psf not finite", "psf", "1 of 1521 pixels"),
        ("psf of one pixel", "psf", "no point source"),
    ],
)
def test_stack_that_cannot_be_used_is_one_message_that_names_the_file(command, files, tmp_path, what, file, words):
    given = broken(files, tmp_path / "broken", what)
    done = command("+experiment=adi", *as_arguments(given), "hydra.run.dir=out")
    assert_refused(done)
    assert given[f"data.{file}"] in done.err
    assert words in done.err
    assert {path.name for path in Path("out").iterdir()} <= {".hydra"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello world", "not a table of numbers"),
        (b"\x00\x01\x02" * 100, "unknown file format"),
        (b"PK\x03\x04" + b"\0" * 60, "archive"),
        ("cut off", "damaged or cut off"),
    ],
    ids=["empty", "words", "binary", "npz", "cut off"],
)
@pytest.mark.parametrize("name", ["cube", "angles", "psf"])
def test_file_that_cannot_be_read_is_named(command, files, tmp_path, name, content, words):
    path = tmp_path / "bad.fits"
    whole = Path(files[f"data.{name}"]).read_bytes()
    path.write_bytes(whole[:2900] if isinstance(content, str) else content)
    done = command("+experiment=adi", *as_arguments(files | {f"data.{name}": str(path)}), "hydra.run.dir=out")
    assert_refused(done)
    assert str(path) in done.err
    assert words in done.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.centre": "[200,3]"}, "outside the frames"),
        ({"data.psf_flux": "aperture", "data.psf_aperture_px": 30}, "radius of 30"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_files_are_refused(command, files, changes, words):
    arguments = [f"{key}={value}" for key, value in changes.items()]
    done = command("+experiment=adi", *as_arguments(files), *arguments, "hydra.run.dir=out")
    assert_refused(done)
    assert words in done.err


def assert_refused(done: Done) -> None:
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert 1 <= len(done.err.splitlines()) <= 2
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.cub=x"], "unknown key data.cub; did you mean data.cube? data has: cube, angles"),
        (["+data.cub=x"], "did you mean data.cube?"),
        (["trainer.steps=3"], "unknown key trainer.steps"),
        (["data.cube=nowhere.fits"], "data.cube='nowhere.fits': does not exist"),
        (["data.cube=."], "data.cube='.': is a folder"),
        (["data.angle_sign=2"], "data.angle_sign=2: input should be 1 or -1"),
        (["data.pixel_scale=0"], "data.pixel_scale=0"),
        (["data.psf_flux=aperture"], "data.psf_aperture_px"),
        (["method.shrinkage=fixed"], "method.rho"),
        (["method.rho=0.5"], "method.shrinkage=fixed"),
        (["contrast.rings=many"], "contrast.rings='many'"),
        (["data.centre=[1,"], "data.centre=[1, is not valid"),
        (["data.cube=a b (c).fits"], "quote special characters"),
        (["+experiment=nope"], "experiment/nope does not exist"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_config_at_fault_leaves_nothing_on_disk(command, arguments, words):
    done = command(*arguments)
    assert_refused(done)
    assert words in done.err
    assert list(Path.cwd().iterdir()) == []


def test_stack_without_its_angles_and_psf_is_refused(command, files):
    done = command("+experiment=adi", f"data.cube='{files['data.cube']}'")
    assert_refused(done)
    assert "data.angles, data.psf must be given" in done.err
    assert list(Path.cwd().iterdir()) == []


def test_interrupted_run_says_so_and_nothing_more(tmp_path):
    log, given = tmp_path / "log", ["+experiment=adi", "data.synthetic.frames=40", f"hydra.run.dir={tmp_path / 'out'}"]
    with child.start("pulmo_jax.detect", *given, log=log) as running:
        child.wait_until(lambda: "40 frames" in log.read_text(), running, log)
        running.send_signal(signal.SIGINT)
        running.wait(timeout=child.PATIENCE_S)
    assert running.returncode == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert log.read_text().strip().splitlines()[-1] == "interrupted"
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".hydra"}
