"""`detect` over a list of runs: what it reads, writes and refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.nddata import CCDData
from astropy.wcs import WCS
from omegaconf import OmegaConf
from references.epoch_maps import FWHM_PX, epoch, place_of, position
from references.pictures import ink

from pulmo_jax import detect
from pulmo_jax.config.section import validate
from pulmo_jax.data.observation_header import mjd_of, read_header
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.inference.epoch_flux import Flux, joint_flux
from pulmo_jax.inference.epoch_tracks import Track
from pulmo_jax.inference.epochs import Combined, Plan
from pulmo_jax.tasks.point_sources.combination_reading import MAPS, open_epochs
from pulmo_jax.tasks.point_sources.combination_report import CombinedResult, source_table
from pulmo_jax.tasks.point_sources.combination_results import detection_row
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.source_flux import SourceFlux
from pulmo_jax.types import InputError

CONFIGS = Path(__file__).parents[3] / "configs"
SIZE, SCALE, MJD = 40, 0.027, 55000.0
TRUE = (6.0, 0.1, 0.6, 0.7, 0.5, 1.0)
DAYS = (0.0, 250.0, 500.0)
KEPLERIAN = {"orbits": "keplerian", "star_mass": 1.75, "parallax_mas": 51.4}


def write_run(folder, maps, nulls, mjd=MJD, data=None, header=None):
    """What of a finished run is read."""
    folder.mkdir(parents=True)
    cards = {"CENTERY": maps.centre[0], "CENTERX": maps.centre[1], "PSFFWHM": FWHM_PX} | (
        {} if mjd is None else {"MJD-OBS": mjd}
    )
    for name, image in zip(MAPS, (maps.a, maps.b, nulls.a, nulls.b), strict=True):
        fits.writeto(folder / f"{name}.fits", image, fits.Header(cards if header is None else header))
    values = validate(DetectConfig, {"data": {"pixel_scale": SCALE} | (data or {})}).model_dump(mode="json")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    (folder / "metrics.json").write_text("{}")
    (folder / "report.html").write_text("")
    return folder


def make_epoch(seed, days, snr=6.0, size=SIZE):
    rng, sky = np.random.default_rng(seed), position(*TRUE, days, 1.75, 51.4)
    centre = (size // 2, size // 2)
    maps = epoch(rng, place_of(sky, centre, SCALE), snr, size=size, hole_px=3.0)
    return maps, epoch(rng, None, 0, size=size, hole_px=3.0)


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / f"run{i}", *make_epoch(i, days), mjd=MJD + days) for i, days in enumerate(DAYS)]


def configured(runs, cache=None, **changes):
    epochs = {"runs": [str(run) for run in runs], "null_fields": 20, "shapes": 64} | changes.pop("epochs", {})
    return validate(DetectConfig, {"epochs": epochs, "compile_cache": cache} | changes)


def refusal(runs, **changes):
    with pytest.raises(InputError) as error:
        open_epochs(configured(runs, **changes))
    assert 1 <= len(str(error.value).splitlines()) <= 2
    return str(error.value)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_fixed_place_writes_everything(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert detect.detect(configured(runs, str(tmp_path / "cache"), search={"snr": "theoretical"}), out) >= 0
    found = json.loads((out / "metrics.json").read_text())
    assert [e["mjd"] for e in found["epochs"]] == [MJD + d for d in DAYS]
    assert len(rows(out / "detections.csv")) == found["sources"]
    assert found["threshold"] == max(found[f"null_{kind}"]["threshold"] for kind in ("reversed_angles", "own_maps"))
    criterion, snr = (fits.getdata(out / f"{name}.fits") for name in ("criterion", "snr_combined"))
    by_hand = sum(np.nan_to_num(np.maximum(b, 0) ** 2 / a) for a, b in (read(run) for run in runs))
    np.testing.assert_allclose(criterion, by_hand, rtol=1e-5, atol=1e-6)
    a, b = (sum(np.nan_to_num(read(run)[i]) for run in runs) for i in (0, 1))
    known = a > 0
    np.testing.assert_allclose(snr[known], (b[known] / np.sqrt(a[known])), rtol=1e-4, atol=1e-5)
    assert {"combined_maps.png", "snr_by_epoch.png", "epoch_maps.png", "null_maxima.png"} <= {
        p.name for p in (out / "figures").iterdir()
    }
    assert "Dallant" in (out / "report.html").read_text()
    assert not (out / "orbits.csv").exists()
    assert fits.getheader(out / "criterion.fits")["MJD-OBS"] == MJD
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("star", [None, (86.8212, -51.0665)])
def test_maps_have_the_axes_and_the_names_of_the_first_epoch(tmp_path, capsys, star):
    """North of the first epoch is 30 degrees from the x axis; its star is off the centre of the second."""
    cards = {"PSFFWHM": FWHM_PX, "MJD-OBS": MJD, "DATE-OBS": "2009-06-18T00:00:00", "OBJECT": "bet Pic"}
    if star is not None:
        cards |= {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": star[0], "CRVAL2": star[1], "EQUINOX": 2000.0}
    runs = []
    for i in range(2):
        maps, nulls = make_epoch(i, 0.0, snr=12.0)
        header = cards | {"CENTERY": maps.centre[0], "CENTERX": maps.centre[1], "MJD-OBS": MJD + i}
        runs.append(write_run(tmp_path / f"run{i}", maps, nulls, data={"north_deg": 30.0}, header=header))
    detect.detect(configured(runs, str(tmp_path / "cache")), tmp_path / "out")
    capsys.readouterr()
    (source, *_) = rows(tmp_path / "out" / "detections.csv")
    for name in ("criterion", "snr_combined"):
        path = tmp_path / "out" / f"{name}.fits"
        with fits.open(path, checksum=True) as hdus:
            hdus.verify("exception")
            header = hdus[0].header
        assert (header["EXTNAME"], header["OBJECT"], header["DATE-OBS"]) == (name, "bet Pic", cards["DATE-OBS"])
        assert CCDData.read(path).unit == units.dimensionless_unscaled
        east, north = (float(source[f"{way}_arcsec"]) for way in ("east", "north"))
        wcs, place = WCS(header), (float(source["x"]), float(source["y"]))
        if star is None:
            np.testing.assert_allclose(wcs.wcs_pix2world([place], 0)[0], (east, north), atol=1e-6)
            continue
        at = SkyCoord(*wcs.pixel_to_world_values(*place), unit="deg")
        offsets = SkyCoord(*star, unit="deg").spherical_offsets_to(at)
        np.testing.assert_allclose([o.to_value(units.arcsec) for o in offsets], (east, north), atol=1e-6)


def read(run):
    return [np.asarray(fits.getdata(run / f"{name}.fits"), float) for name in ("a", "b")]


@pytest.mark.campaign
def test_orbits_write_samples_and_are_alike_for_alike_seeds(runs, tmp_path, capsys):
    folders = [tmp_path / "one", tmp_path / "two"]
    for out in folders:
        n = detect.detect(configured(runs[::-1], str(tmp_path / "cache"), epochs=KEPLERIAN), out)
    assert n == 1
    assert (folders[0] / "orbits.csv").read_text() == (folders[1] / "orbits.csv").read_text()
    table = rows(folders[0] / "orbits.csv")
    assert [row["kind"] for row in table[:2]] == ["best", "sample"]
    assert all(0 <= float(row["node_deg"]) < 180 for row in table)
    axis, period = (np.array([float(row[k]) for row in table]) for k in ("semi_major_axis_au", "period_yr"))
    np.testing.assert_allclose(period, np.sqrt(axis**3 / 1.75), rtol=1e-4)
    (source,) = rows(folders[0] / "detections.csv")
    place = place_of(position(*TRUE, 0.0, 1.75, 51.4), (SIZE // 2, SIZE // 2), SCALE)
    assert np.hypot(float(source["y"]) - place[0], float(source["x"]) - place[1]) < 2
    assert float(source["false_alarm_probability"]) == pytest.approx(1 / 21)
    assert ink(folders[0] / "figures" / "orbit_1.png") > 0.01
    capsys.readouterr()


def test_runs_are_put_in_the_order_of_their_dates(runs):
    found = open_epochs(configured(runs[::-1]))
    assert [e.map.days for e in found] == list(DAYS)
    given = open_epochs(configured(runs, epochs={"dates": [3.0, 1.0, 2.0]}))
    assert [e.path.name for e in given] == ["run1", "run2", "run0"]
    assert [e.map.days for e in given] == [0, 1, 2]


def test_calibrated_maps_are_over_the_nulls_spread(tmp_path):
    maps, nulls = make_epoch(0, 0.0)
    run = write_run(tmp_path / "run", maps, nulls._replace(b=3 * nulls.b))
    (found,) = open_epochs(configured([run], search={"snr": "calibrated"}))
    (plain,) = open_epochs(configured([run], search={"snr": "theoretical"}))
    assert np.nanstd(found.null.b / np.sqrt(found.null.a)) == pytest.approx(1, abs=0.15)
    assert np.nanstd(plain.null.b / np.sqrt(plain.null.a)) == pytest.approx(3, rel=0.2)
    np.testing.assert_allclose(found.map.b / found.map.a, plain.map.b / plain.map.a)  # fluxes stay


def test_contrasts_where_every_run_knows_its_star(tmp_path):
    made = [make_epoch(i, 0.0) for i in (0, 1)]
    runs = [write_run(tmp_path / f"run{i}", *made[i], mjd=MJD + i, data={"star_flux": 100.0 * (i + 1)}) for i in (0, 1)]
    for i, found in enumerate(open_epochs(configured(runs))):
        np.testing.assert_allclose(found.map.b / found.map.a, made[i][0].b / made[i][0].a / (100.0 * (i + 1)))
        assert found.flux_code == "contrast"
    other = write_run(tmp_path / "other", *made[1], mjd=MJD + 9)
    assert "data.star_flux" in refusal([*runs, other])
    (plain,) = open_epochs(configured([other]))
    assert plain.flux_code == "psf_fwhm"
    message = refusal([other], contrast={"unit": "magnitudes"})
    assert "contrast.unit=magnitudes" in message
    assert str(other) in message


def test_flux_of_the_star_from_the_psf_image_is_read_from_the_header(tmp_path):
    maps, nulls = make_epoch(0, 0.0)
    cards = {"CENTERY": SIZE // 2, "CENTERX": SIZE // 2, "PSFFWHM": FWHM_PX, "STARFLUX": 250.0}
    run = write_run(tmp_path / "run", maps, nulls, data={"star_flux": "psf"}, header=cards)
    (found,) = open_epochs(configured([run]))
    np.testing.assert_allclose(found.map.b / found.map.a, maps.b / maps.a / 250)
    for i, star in enumerate((None, -1.0, "bright")):
        changed = {name: value for name, value in cards.items() if name != "STARFLUX"}
        changed |= {} if star is None else {"STARFLUX": star}
        wrong = write_run(tmp_path / f"wrong{i}", maps, nulls, data={"star_flux": "psf"}, header=changed)
        assert "STARFLUX" in refusal([wrong])


@pytest.mark.parametrize(("star", "columns"), [(None, ["flux (PSF units)"]), (100.0, ["contrast", "Δmag"])])
def test_fluxes_of_all_epochs_have_a_unit(tmp_path, star, columns):
    """The table of a combination: PSF units or contrast with magnitudes, and separations in mas."""
    data = {} if star is None else {"star_flux": star}
    epochs = open_epochs(configured([write_run(tmp_path / "run", *make_epoch(0, 0.0), data=data)]))
    track = Track(
        30.0, 5.0, 2e-4, 4e-5, np.array([[0.3, -0.2]]), np.array([[20.0, 21.0]]), np.array([1.0]), np.array([5.0]),
        np.array([0.002, 0.004]),
    )  # fmt: skip
    empty = np.zeros((SIZE, SIZE))
    combined = Combined(empty, empty, 25.0, (), [track], track, np.zeros(0), 1)
    measured = Flux(2e-4, 2e-5, 4e-5)
    flux = SourceFlux((measured,), joint_flux([measured]))
    made = CombinedResult(configured([tmp_path / "run"]), epochs, combined, Plan(), (), (flux,))
    table = source_table(made)
    [row] = table.rows
    named = dict(zip(table.columns, row, strict=True))
    assert set(columns) < set(table.columns)
    assert named["north, east (mas)"] == "300.0 ± 2.0, -200.0 ± 4.0"
    assert named[columns[0]] == "(2.00 ± 0.40)e-04"
    written = detection_row(1, track, flux, made)
    assert written["flux_unit"] == ("psf_fwhm" if star is None else "contrast")
    if star is not None:
        assert named["Δmag"] == "9.25 ± 0.22"
        assert written["delta_mag"] == pytest.approx(-2.5 * np.log10(2e-4))
        assert written["delta_mag_std"] == pytest.approx(1.0857362 * 0.2)


def test_maps_of_other_sizes_and_scales_are_one_sky(runs, tmp_path):
    larger = write_run(tmp_path / "large", *make_epoch(9, 0.0, size=52), mjd=MJD + 900, data={"pixel_scale": 0.02})
    found = open_epochs(configured([*runs, larger]))
    assert [e.map.a.shape[0] for e in found] == [SIZE, SIZE, SIZE, 52]
    assert found[3].map.scale == 0.02


def test_what_is_no_finished_run_is_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no config.yaml there"):
        configured([tmp_path / "empty"])
    with pytest.raises(InputError, match="no config.yaml there"):
        configured([tmp_path / "nowhere"])
    (runs[1] / "report.html").unlink()
    assert "runs.1=" in refusal(runs)
    assert "not a finished run" in refusal(runs)
    (runs[0] / "a_null.fits").unlink()
    assert "earlier version" in refusal(runs)


def test_damaged_maps_are_refused(runs):
    a, b = read(runs[0])
    fits.writeto(runs[0] / "b.fits", np.full_like(b, np.nan), overwrite=True)
    assert "all pixels are NaN" in refusal(runs)
    fits.writeto(runs[0] / "b.fits", b[:-2], overwrite=True)
    assert "run detect again" in refusal(runs)
    (runs[0] / "b.fits").write_bytes(b"SIMPLE  = nonsense")
    assert str(runs[0]) in refusal(runs)
    fits.writeto(runs[1] / "a.fits", a, fits.Header(), overwrite=True)
    assert "header is incomplete" in refusal(runs[1:])
    (runs[2] / "config.yaml").write_text("- 1")
    assert "not a valid config of detect" in refusal(runs[2:])


def test_dates_scales_and_units_must_be_known_and_agree(runs, tmp_path):
    undated = write_run(tmp_path / "undated", *make_epoch(5, 0.0), mjd=None)
    assert "epochs.dates" in refusal([runs[0], undated], epochs=KEPLERIAN)
    assert [e.label for e in open_epochs(configured([runs[0], undated]))] == ["epoch 1", "epoch 2"]
    same = write_run(tmp_path / "same", *make_epoch(5, 0.0), mjd=MJD)
    assert "same date" in refusal([runs[0], same], epochs=KEPLERIAN)
    unscaled = write_run(tmp_path / "unscaled", *make_epoch(5, 0.0), mjd=MJD + 7, data={"pixel_scale": None})
    assert "data.pixel_scale" in refusal([runs[0], unscaled])
    assert "data.pixel_scale" in refusal([unscaled], epochs=KEPLERIAN)
    assert open_epochs(configured([unscaled]))[0].map.scale == 1
    peak = write_run(tmp_path / "peak", *make_epoch(5, 0.0), mjd=MJD + 8, data={"psf_flux": "peak"})
    assert "data.psf_flux" in refusal([runs[0], peak])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dates": [1.0, 2.0]}, "2 dates for 3 runs"),
        ({"dates": [1.0, 2.0, 1.0]}, "two are equal"),
        ({"orbits": "keplerian", "parallax_mas": 50.0}, "epochs.star_mass"),
        ({"orbits": "keplerian", "star_mass": 1.0}, "epochs.parallax_mas"),
        ({"star_mass": -1.0}, "epochs.star_mass"),
        ({"eccentricity": [0.5, 0.2]}, "epochs.eccentricity"),
        ({"eccentricity": [0.0, 0.99]}, "epochs.eccentricity"),
        ({"semi_major_axis_au": [9.0, 2.0]}, "epochs.semi_major_axis_au"),
        ({"orbits": "circular"}, "epochs.orbits"),
    ],
)
def test_configs_that_cannot_be_are_refused(runs, changes, expected):
    with pytest.raises(InputError, match=expected):
        configured(runs, epochs=changes)


def test_runs_exclude_a_stack_and_each_other(runs, tmp_path):
    for name in ("c", "a", "p"):
        (tmp_path / name).write_bytes(b"x")
    data = {"cube": str(tmp_path / "c"), "angles": str(tmp_path / "a"), "psf": str(tmp_path / "p")}
    with pytest.raises(InputError, match="exclude each other"):
        configured(runs, data=data)
    with pytest.raises(InputError, match="twice"):
        configured([runs[0], runs[0]])
    with pytest.raises(InputError, match=r"epochs\.runs"):
        validate(DetectConfig, {"epochs": {"orbits": "keplerian"}})
    with pytest.raises(InputError, match=r"epochs\.runs"):
        validate(DetectConfig, OmegaConf.to_container(OmegaConf.load(CONFIGS / "experiment" / "epochs.yaml")))


def test_dates_of_headers(tmp_path):
    path = tmp_path / "cube.fits"
    for cards, expected in (
        ({"MJD-OBS": 55000.5}, 55000.5),
        ({"DATE-OBS": "2009-06-18T12:00:00"}, 55000.5),
        ({"DATE-OBS": "yesterday"}, None),
        ({}, None),
    ):
        fits.writeto(path, np.zeros((2, 3, 3)), fits.Header(cards), overwrite=True)
        assert mjd_of(read_header(path)) == (None if expected is None else pytest.approx(expected))
    (tmp_path / "cube.npy").write_bytes(b"\x93NUMPY")
    assert mjd_of(read_header(tmp_path / "cube.npy")) is None
    assert mjd_of(read_header(tmp_path / "nowhere.fits")) is None


@pytest.mark.slow
@pytest.mark.draws
def test_stacks_searched_one_by_one_and_then_together(tmp_path, capsys):
    """From cubes with dates in their headers to the planet that none of them shows."""
    days = (0.0, 200.0, 420.0, 610.0, 800.0)
    true, runs = (9.0, 0.15, 0.9, 0.7, 0.5, 1.0), []
    places = [place_of(position(*true, d, 1.75, 51.4), (32, 32), SCALE) for d in days]
    for i, (place, day) in enumerate(zip(places, days, strict=True)):
        stack = rotating_stack(i, 40, 64, 100.0, ((float(place[0]), float(place[1]), 250.0),)).stack
        files = {name: tmp_path / f"{name}{i}.fits" for name in ("cube", "angles", "psf")}
        for array, (name, path) in zip((stack.cube, stack.angles_deg, stack.psf), files.items(), strict=True):
            fits.writeto(path, array, fits.Header({"MJD-OBS": MJD + day} if name == "cube" else {}))
        given = {"data": {"pixel_scale": SCALE} | {name: str(path) for name, path in files.items()}}
        config = validate(DetectConfig, given | {"contrast": {"rings": 0}, "method": {"mode": "fast"}})
        assert detect.detect(config, tmp_path / f"run{i}") == 0
        runs.append(tmp_path / f"run{i}")
    config = configured(runs, epochs=KEPLERIAN | {"null_fields": 100, "shapes": 512})
    assert detect.detect(config, tmp_path / "out") == 1
    (source,) = rows(tmp_path / "out" / "detections.csv")
    for i, place in enumerate(places):
        assert np.hypot(float(source[f"y_{i + 1}"]) - place[0], float(source[f"x_{i + 1}"]) - place[1]) < 2.5
        assert float(source[f"snr_{i + 1}"]) < 5
    orbits = json.loads((tmp_path / "out" / "metrics.json").read_text())["orbits"][0]["percentiles_16_50_84"]
    assert orbits["semi_major_axis_au"][0] < 1.3 * true[0]
    assert orbits["semi_major_axis_au"][2] > 0.7 * true[0]
    assert ink(tmp_path / "out" / "figures" / "orbit_1.png") > 0.01
    capsys.readouterr()
