"""Debiased fluxes of combined epochs: the stacks of the runs are read again, if they are still the same."""

import csv
import json

import numpy as np
import pytest
from astropy.io import fits

from pulmo_jax import detect
from pulmo_jax.config.section import validate
from pulmo_jax.data.synthetic import rotating_stack
from pulmo_jax.inference.epoch_flux import Flux, joint_flux
from pulmo_jax.tasks.point_sources.combination_report import bounded
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.inputs import input_digests, require_unchanged
from pulmo_jax.tasks.point_sources.source_flux import SourceFlux, flux_section, flux_text
from pulmo_jax.types import InputError

PLANET = (45.0, 47.0, 400.0)


def write_stack(folder, seed):
    folder.mkdir()
    stack = rotating_stack(seed, 30, 60, 80.0, (PLANET,)).stack
    for name, array in (("cube", stack.cube), ("angles", stack.angles_deg), ("psf", stack.psf)):
        fits.writeto(folder / f"{name}.fits", array)
    return {name: str(folder / f"{name}.fits") for name in ("cube", "angles", "psf")}


def given(tmp_path, **files):
    return validate(DetectConfig, {"data": files}).data


def test_inputs_are_recognised_or_the_difference_is_named(tmp_path):
    files = write_stack(tmp_path / "stack", 0)
    run, data = tmp_path / "run", given(tmp_path, **files)
    run.mkdir()
    with pytest.raises(InputError, match="earlier version"):
        require_unchanged(run, data)
    (run / "inputs.json").write_text(json.dumps(input_digests(data)))
    require_unchanged(run, data)
    psf = fits.getdata(files["psf"])
    fits.writeto(files["psf"], psf * 1.01, overwrite=True)
    with pytest.raises(InputError, match=r"data\.psf=.*psf\.fits has changed since the run"):
        require_unchanged(run, data)
    fits.writeto(files["psf"], psf, overwrite=True)
    require_unchanged(run, data)
    (tmp_path / "stack" / "cube.fits").unlink()
    with pytest.raises(InputError, match=r"data\.cube=.*No such file"):
        require_unchanged(run, data)


def test_synthetic_stacks_have_no_input_files():
    assert input_digests(validate(DetectConfig, {}).data) == {}


def test_section_of_fluxes_names_what_is_unknown():
    one = (Flux(48.0, 1.0, 4.0), Flux(), Flux(90.0, 2.0, 5.0))
    section = flux_section([SourceFlux(one, joint_flux(one))], ["a", "b", "c"], np.array([[17.0, 16.0, np.nan]]))
    [table] = section.tables
    assert table.rows[0] == ["1", "a", "48.0 ± 4.0", "17"]
    assert table.rows[1] == ["1", "b", "unknown", "16"]
    assert "from 2 epochs" in table.notes[0]
    assert "the flux varies" in table.notes[0]
    none = flux_section([SourceFlux((Flux(),), joint_flux([Flux()]))], ["a"], np.array([[17.0]]))
    assert "no epoch has a debiased flux" in none.tables[0].notes[0]
    assert flux_text(Flux(3.0, 0.5)) == "3.00 ± 0.50 (likelihood)"


def test_probabilities_below_the_bound_are_shown_as_such():
    assert bounded(1e-6, 1e-6) == "< 1e-06"
    assert bounded(3e-3, 1e-6) == "0.003"
    assert bounded(float("nan"), float("nan")) == "-"


@pytest.mark.campaign
def test_fluxes_of_combined_runs_are_debiased_and_nan_where_a_cube_is_gone(tmp_path, capsys):
    """Runs on files, one on a synthetic stack of the config; then one cube changes and one is removed."""
    runs = []
    for seed in (1, 2):
        config = validate(DetectConfig, {"data": write_stack(tmp_path / f"stack{seed}", seed)} | QUICK)
        detect.detect(config, tmp_path / f"run{seed}")
        runs.append(str(tmp_path / f"run{seed}"))
    synthetic = {"frames": 30, "size": 60, "rotation_deg": 80.0, "planets": [list(PLANET)]}
    detect.detect(validate(DetectConfig, {"data": {"synthetic": synthetic}, "seed": 3} | QUICK), tmp_path / "run3")
    runs.append(str(tmp_path / "run3"))
    config = validate(DetectConfig, {"epochs": {"runs": runs, "null_fields": 20}})
    assert detect.detect(config, tmp_path / "all") >= 1
    row = first_source(tmp_path / "all")
    assert float(row["flux_epochs"]) == 3
    error = float(row["flux_debiased_std_empirical"])
    assert abs(float(row["flux_debiased"]) - PLANET[2]) < 3.5 * error
    assert error < 0.25 * PLANET[2]
    assert float(row["flux_self_subtracted"]) < 0.8 * PLANET[2]
    assert float(row["constancy_probability"]) > 1e-3
    assert "Debiased flux (Algorithm 3)" in (tmp_path / "all" / "report.html").read_text()
    cube = tmp_path / "stack1" / "cube.fits"
    fits.writeto(cube, fits.getdata(cube) * 2, overwrite=True)
    (tmp_path / "stack2" / "cube.fits").unlink()
    capsys.readouterr()
    detect.detect(config, tmp_path / "again")
    shown = " ".join(capsys.readouterr().out.split())
    again = first_source(tmp_path / "again")
    assert float(again["flux_epochs"]) == 1
    assert again["flux_debiased_1"] == again["flux_debiased_2"] == ""  # NaN
    assert again["flux_debiased_3"] == row["flux_debiased_3"]
    assert again["flux_self_subtracted_1"] == row["flux_self_subtracted_1"]
    assert "has changed since the run" in shown
    assert "does not exist" in shown
    caveats = " ".join(json.loads((tmp_path / "again" / "metrics.json").read_text())["caveats"])
    assert caveats.count("has no debiased flux") == 2


QUICK = {"contrast": {"rings": 0}, "method": {"patch_radius_px": 2.5}}


def first_source(folder):
    with (folder / "detections.csv").open() as file:
        sources = list(csv.DictReader(file))
    return min(sources, key=lambda row: np.hypot(float(row["y"]) - PLANET[0], float(row["x"]) - PLANET[1]))
