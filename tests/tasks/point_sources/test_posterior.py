"""`search.posterior=true`: samples, figure, section of the report, the result in Python, and what it refuses."""

import csv
import io
from dataclasses import replace

import jax
import numpy as np
import pytest

import pulmo_jax
from pulmo_jax.config.section import validate
from pulmo_jax.host import extras
from pulmo_jax.host.console import Console, make_console
from pulmo_jax.methods.paco.posterior import CHAINS, DRAWS
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.point_sources.config import DetectConfig
from pulmo_jax.tasks.point_sources.detection import read, search_stack, settings_of, write
from pulmo_jax.tasks.point_sources.posterior import posterior_sections, sample_posteriors
from pulmo_jax.types import InputError

pytestmark = pytest.mark.draws

PLANET = (36.0, 37.0, 300.0)
STACK = {"frames": 24, "size": 48, "rotation_deg": 80.0, "planets": [list(PLANET)]}
GIVEN = {
    "data": {"synthetic": STACK, "north_deg": 30.0},
    "method": {"patch_radius_px": 2.5},
    "search": {"posterior": True, "max_sources": 1},
    "contrast": {"rings": 0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A search with a posterior: the observation, the search and the run directory."""
    folder = tmp_path_factory.mktemp("run")
    place = Place(folder, folder, make_console())
    result, search = search_stack(read(validate(DetectConfig, GIVEN), place), place)
    write(result, search, place, 0.0)
    return result, search, folder


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_samples_are_written_with_their_position_on_the_sky(run):
    result, search, folder = run
    rows = rows_of(folder / "posterior.csv")
    [source] = rows_of(folder / "detections.csv")
    [found] = result.posteriors
    assert len(rows) == CHAINS * DRAWS
    assert {row["label"] for row in rows} == {"1"}
    assert [(row["chain"], row["draw"]) for row in rows[DRAWS - 1 : DRAWS + 1]] == [("0", str(DRAWS - 1)), ("1", "0")]
    written = np.array([[float(row[name]) for name in ("y", "x", "flux")] for row in rows])
    np.testing.assert_allclose(written, found.posterior.flat, rtol=1e-5)
    for name in ("separation_px", "position_angle_deg"):
        values = np.array([float(row[name]) for row in rows])
        assert abs(values.mean() - float(source[name])) < float(source[f"{name}_std"]), name
    assert found.source is search.sources[0]


@pytest.mark.slow
def test_samples_have_the_errors_of_the_table(run):
    """The flux has the empirical error, and the injected values lie within the samples' spread."""
    result, search, _ = run
    [source], [found] = search.sources, result.posteriors
    mean, std = found.posterior.mean, found.posterior.std
    assert std[2] == pytest.approx(source.flux_debiased_std_empirical, rel=0.1)
    np.testing.assert_allclose(std[:2], [source.y_std, source.x_std], rtol=0.3)
    assert (abs(mean - PLANET) < 4 * std).all()
    assert (abs(mean - [source.y, source.x, source.flux_debiased]) < std).all()
    assert found.posterior.r_hat.max() < 1.02


@pytest.mark.slow
def test_report_shows_table_and_figure(run):
    result, _, folder = run
    report = " ".join((folder / "report.html").read_text().split())
    assert "Posterior of position and flux" in report
    assert "No-U-Turn Sampler" in report
    assert f"({CHAINS * DRAWS:,} samples)" in report
    assert (folder / "figures" / "posterior_1.png").stat().st_size > 10_000
    [section] = posterior_sections(result.posteriors, folder)
    [row] = section.tables[0].rows
    assert row[0] == "1"
    assert row[-1] == "0"  # divergent transitions
    low, high = (float(value) for value in row[4].split(" to "))
    assert low < PLANET[2] < high or abs(PLANET[2] - (low + high) / 2) < 2 * (high - low)


@pytest.mark.slow
def test_python_returns_the_same_posterior(run):
    result, search, _ = run
    stack = result.stack
    keys = {"method.patch_radius_px": 2.5, "search.posterior": True, "search.max_sources": 1, "contrast.rings": 0}
    found = pulmo_jax.detect(stack.cube[0], stack.angles_deg, stack.psf[0], config=keys)
    [one] = found.posteriors
    assert one.source == found.sources[0]
    assert one.posterior.std[2] == pytest.approx(search.sources[0].flux_debiased_std_empirical, rel=0.1)


@pytest.mark.slow
def test_source_without_a_maximum_is_named(run):
    """A negative flux at the position of the source is a minimum of the likelihood there."""
    result, search, folder = run
    negative = replace(search.sources[0], flux_debiased=-search.sources[0].flux_debiased)
    shown = io.StringIO()
    terminal = Console(file=shown, width=200)
    place = Place(folder, folder, terminal)
    with jax.enable_x64(False):
        found = sample_posteriors(result, replace(search, sources=[negative]), settings_of(result.config.method), place)
    assert [each.posterior for each in found] == [None]
    assert posterior_sections(found, folder) == []
    assert "source 1 has no posterior: no maximum of the likelihood at its position" in shown.getvalue()


def test_missing_package_is_named_before_the_search(monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"search\.posterior=true needs blackjax, .*install it: .*posterior"):
        validate(DetectConfig, {"search": {"posterior": True}})
    assert not validate(DetectConfig, {"search": {"posterior": False}}).search.posterior


def test_combined_epochs_have_no_posterior(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match=r"search\.posterior=true and epochs\.runs exclude each other"):
        validate(DetectConfig, {"epochs": {"runs": [str(tmp_path)]}, "search": {"posterior": True}})
