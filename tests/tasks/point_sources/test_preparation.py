"""`prepare`: raw stacks with known faults become stacks that `detect` can search; bad input is refused."""

import csv
import json
import shlex

import numpy as np
import pytest
from astropy.io import fits
from omegaconf import OmegaConf

from pulmo_jax import prepare
from pulmo_jax.config.section import validate
from pulmo_jax.data.psf import prepare_psf, shift
from pulmo_jax.data.synthetic import rotating_stack, spectral_stack
from pulmo_jax.host.console import make_console
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.config import PrepareConfig, StackConfig
from pulmo_jax.tasks.point_sources.preparation import compute, crop
from pulmo_jax.tasks.point_sources.preparation_reading import read_stack
from pulmo_jax.tasks.point_sources.reading import load, observe
from pulmo_jax.types import InputError

PLANET = (50 + 14.0, 50 - 20.0, 900.0)


def dithered(cube, shifts, margin=20):
    """Frames shifted by trigonometric interpolation, which the product does not use, and cut out."""
    moved = np.stack([shift(frame.astype(float), *d) for frame, d in zip(cube, shifts, strict=True)])
    return moved[:, margin:-margin, margin:-margin].astype(np.float32)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A stack with dithers, bad pixels, cosmic hits and a cloud, and the same without."""
    folder, rng = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    planet = (PLANET[0] + 20, PLANET[1] + 20, PLANET[2])
    made = rotating_stack(2, frames=24, size=140, planets=(planet,)).stack
    true = rng.uniform(-1.0, 1.0, (24, 2))
    cube = dithered(made.cube, true)
    cube += 0.3 * rng.standard_normal(cube.shape).astype(np.float32)
    cube[:, 20, 30] += 3000
    cube[4, 66, 40] += 2000
    cube[9] = 0.05 * cube[9] + rng.standard_normal((100, 100))
    header = fits.Header({"OBJECT": "beta Pic", "MJD-OBS": 55000.5, "CRPIX1": 3.0})
    header["HIERARCH ESO TEL PARANG START"] = 3.0
    fits.writeto(folder / "cube.fits", cube, header)
    fits.writeto(folder / "angles.fits", made.angles_deg)
    stamp = np.pad(made.psf, 10)
    fits.writeto(folder / "psf.fits", np.stack([shift(stamp, 0.3, -0.2), shift(stamp, -1.4, 0.6)]))
    return folder, made, true


def configured(folder, output, **keys):
    files = {name: str(folder / f"{name}.fits") for name in ("cube", "angles", "psf")}
    return validate(PrepareConfig, files | {"output": str(output)} | keys)


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_everything_is_written_and_can_be_searched(raw, tmp_path, capsys):
    folder, made, true = raw
    config = configured(folder, tmp_path / "out", recentre={"method": "cross_correlation"}, pixel_scale=0.027,
                        crop_px=91, psf_crop_px=32)  # fmt: skip
    prepare.prepare(config, tmp_path)
    text, out = capsys.readouterr().out, tmp_path / "out"
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    files = {"cube.fits", "angles.fits", "psf.fits", "bad_pixels.fits", "frames.csv", "metrics.json", "run.json"}
    assert names == files | {"config.yaml", "report.html", "figures"}
    assert validate(PrepareConfig, OmegaConf.to_container(OmegaConf.load(out / "config.yaml"))) == config  # pyright: ignore
    rows = table(out / "frames.csv")
    assert [int(row["frame"]) for row in rows if row["kept"] == "0"] == [9]
    assert "flux" in rows[9]["reason"].split()
    error = np.array([[float(row["shift_y"]), float(row["shift_x"])] for row in rows]) + true
    error = np.delete(error - np.median(error, axis=0), 9, axis=0)
    assert error.std() < 0.05
    kept = np.arange(24) != 9
    np.testing.assert_allclose(fits.getdata(out / "angles.fits"), made.angles_deg[kept])
    header = fits.getheader(out / "cube.fits")
    assert (header["OBJECT"], header["MJD-OBS"], header["NFRAMES"]) == ("beta Pic", 55000.5, 23)
    assert "CRPIX1" not in header
    assert not any("PARANG" in keyword for keyword in header)
    assert fits.getdata(out / "psf.fits").shape == (31, 31)
    counts = fits.getdata(out / "bad_pixels.fits")
    assert (counts[20, 30], counts[66, 40]) == (24, 1)
    words = shlex.split(text.split("search them with: ")[1].splitlines()[0])
    assert words[:4] == ["python", "-m", "pulmo_jax.detect", "+experiment=adi"]
    keys = dict(word.removeprefix("data.").split("=") for word in words[4:])
    data = validate(StackConfig, keys | {"pixel_scale": float(keys["pixel_scale"])})
    _, stack = load(data)
    assert stack.cube.shape == (1, 23, 91, 91)
    assert observe(stack, data).centre == (45.0, 45.0)
    assert json.loads((out / "metrics.json").read_text())["frames_left_out"]["flux"] == [9]
    assert "Median frame" in (out / "report.html").read_text()
    again = configured(folder, tmp_path / "out", recentre={"method": "none"})
    prepare.prepare(again, tmp_path)  # replaces the results
    assert fits.getdata(out / "cube.fits").shape == (23, 100, 100)
    capsys.readouterr()


def test_the_flux_of_a_planet_is_kept_to_one_percent(raw, tmp_path, capsys):
    """Against the same frames without dither and without faults; the star is where it was."""
    folder, made, true = raw
    keys = {"recentre": {"method": "cross_correlation"}, "centre": [50.0, 50.0]}
    prepared = compute(configured(folder, tmp_path / "out", **keys), Place(tmp_path, tmp_path, make_console()))
    kept, psf = prepared.kept, prepare_psf(made.psf)
    clean = dithered(made.cube, np.zeros((24, 2)))[kept]
    found = float(np.median(prepared.shifts.applied[0] + true))
    assert abs(found) < 0.1
    matched = [matched_flux(cube, made.angles_deg[kept], psf.stamp) for cube in (clean, prepared.cube[0][kept])]
    assert matched[1] == pytest.approx(matched[0], rel=0.01)
    capsys.readouterr()


def matched_flux(cube, angles_deg, stamp):
    """Flux of the planet by a matched filter at its known place in every frame, above the mean of the other frames."""
    values = []
    for t, angle in enumerate(np.deg2rad(angles_deg)):
        dy, dx = PLANET[0] - 50, PLANET[1] - 50
        y, x = 50 + dy * np.cos(angle) - dx * np.sin(angle), 50 + dx * np.cos(angle) + dy * np.sin(angle)
        far = np.abs(angles_deg - angles_deg[t]) > 20
        half = len(stamp) // 2 - 10
        at = slice(round(y) - half, round(y) + half + 1), slice(round(x) - half, round(x) + half + 1)
        template = shift(stamp, y - round(y), x - round(x))[10:-10, 10:-10]
        signal = cube[t][at] - np.median(cube[far][:, at[0], at[1]], axis=0)
        values.append((signal * template).sum() / (template**2).sum())
    return np.mean(values)


def test_peaks_and_spots_bring_the_star_to_the_middle(tmp_path, capsys):
    rng, place = np.random.default_rng(1), Place(tmp_path, tmp_path, make_console())
    stars = np.array([50.0, 50]) + rng.uniform(-2, 2, (12, 2))
    y, x = np.mgrid[:100, :101]
    offsets = np.array([[-25, -24.0], [24, -25], [25, 24], [-24, 25]])
    peak, spots = rng.standard_normal((2, 12, 100, 101)).astype(np.float32)
    for t, star in enumerate(stars):
        r2 = [(y - star[0] - dy) ** 2 + (x - star[1] - dx) ** 2 for dy, dx in [(0, 0), *offsets]]
        peak[t] += 2000 * np.exp(-r2[0] / 8)
        spots[t] += 3e4 / (r2[0] + 400) + sum(300 * np.exp(-one / 8) for one in r2[1:])
    peak[3] = np.minimum(peak[3], 500)
    for name, cube in (("peak", peak), ("spots", spots)):
        fits.writeto(tmp_path / f"{name}.fits", cube)
    for name, recentre in (
        ("peak", {"method": "peak"}),
        ("spots", {"method": "satellite_spots", "spots": (np.array([50, 50]) + offsets).tolist()}),
    ):
        config = validate(
            PrepareConfig, {"cube": str(tmp_path / f"{name}.fits"), "output": str(tmp_path / "o"), "recentre": recentre}
        )
        prepared = compute(config, place)
        bad = [3] if name == "peak" else []
        assert np.flatnonzero(~prepared.kept).tolist() == bad
        error = prepared.shifts.applied[0] + stars - 50
        assert np.nanmax(np.abs(error)) < 0.05
        assert prepared.centre == (50.0, 50.0)
    assert "saturated" in " ".join(capsys.readouterr().out.split())


def test_channels_are_prepared_each_with_its_own_psf(tmp_path, capsys):
    made = spectral_stack(0, 3, frames=12, size=80).stack
    cube = made.cube.copy()
    cube[1, :, 10, 12] += 4000
    cube[2, 7, 60, 20] += 4000
    for name, values in (("cube", cube), ("angles", made.angles_deg), ("psf", made.psf), ("lambda", made.wavelengths)):
        np.save(tmp_path / f"{name}.npy", values)
    files = {key: str(tmp_path / f"{name}.npy") for key, name in
             (("cube", "cube"), ("angles", "angles"), ("psf", "psf"), ("wavelengths", "lambda"))}  # fmt: skip
    prepare.prepare(validate(PrepareConfig, files | {"output": str(tmp_path / "out")}), tmp_path)
    assert "data.wavelengths=" in capsys.readouterr().out
    out = tmp_path / "out"
    assert fits.getdata(out / "cube.fits").shape == (3, 12, 80, 80)
    assert fits.getdata(out / "psf.fits").shape == (3, 39, 39)
    counts = fits.getdata(out / "bad_pixels.fits")
    assert (counts[1, 10, 12], counts[0, 10, 12], counts[2, 60, 20]) == (12, 0, 1)
    assert len(table(out / "frames.csv")) == 36


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"recentre": {"method": "satellite_spots"}}, "belong together"),
        ({"recentre": {"method": "satellite_spots", "spots": [[1.0, 2.0]]}}, "give the four spots"),
        ({"recentre": {"method": "peak"}}, "use recentre.method=satellite_spots or cross_correlation"),
        ({"crop_px": 120}, "can have a side of at most 100 px"),
        ({"centre": [120.0, 3.0]}, r"centre=\[120.0, 3.0\]: lies outside the frames of 100 x 100 px"),
        ({"selection": {"annulus": [200.0, 300.0]}}, "has no pixels"),
        ({"bad_pixels": {"mask": "psf.fits"}}, "give bad pixels"),
        ({"angles": "psf.fits"}, "parallactic angles"),
        ({"psf": "cube.fits"}, "must be different files"),
        ({"wavelengths": "angles.fits"}, "has 24 wavelengths, but .* has 1 channels"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(raw, tmp_path, keys, message, capsys):
    def at(value):
        return str(raw[0] / value) if isinstance(value, str) and value.endswith(".fits") else value

    keys = {
        k: {n: at(v) for n, v in value.items()} if isinstance(value, dict) else at(value) for k, value in keys.items()
    }
    with pytest.raises(InputError, match=message):
        prepare.prepare(configured(raw[0], tmp_path / "out", **keys), tmp_path)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()


def test_inputs_in_the_output_folder_are_refused(raw, tmp_path):
    with pytest.raises(InputError, match="lies in the output folder"):
        prepare.prepare(configured(raw[0], raw[0]), tmp_path)


def test_a_missing_library_names_its_installation(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "skimage.registration", None)
    with pytest.raises(InputError, match="needs scikit-image; install it with: .*prepare"):
        prepare.prepare(configured(raw[0], tmp_path / "out", recentre={"method": "cross_correlation"}), tmp_path)
    capsys.readouterr()


def test_a_crop_keeps_the_star_in_the_middle():
    cube = np.zeros((1, 2, 60, 64), np.float32)
    cube[:, :, 28, 33] = 1
    for side in (21, 20):
        view, centre = crop(cube, (28.0, 33.0), side)
        assert view.shape == (1, 2, side, side)
        assert centre == (side // 2, side // 2)
        assert view[0, 0, side // 2, side // 2] == 1
        assert np.shares_memory(view, cube)


def test_exposures_of_the_psf_are_recentred_before_they_are_averaged(raw, tmp_path):
    stack = read_stack(configured(raw[0], tmp_path / "out"))
    assert stack.psfs is not None
    (psf,) = stack.psfs
    assert psf.fwhm_px == pytest.approx(prepare_psf(raw[1].psf).fwhm_px, rel=0.01)
