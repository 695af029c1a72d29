"""The README's promises that a test can hold."""

import re
from pathlib import Path

import pytest
import yaml
from astropy.io import fits

from pulmo_jax.data.synthetic import rotating_stack

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if line.endswith("python -m pytest -q"))
    assert command in (ROOT / ".ci" / "run").read_text()


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\((?!https)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "key",
    sorted(
        set(re.findall(r"`((?:data|trainer|model|method|calibration|tiles|search|contrast)\.(?!json|csv)\w+)", README))
    ),
)
def test_keys_that_the_readme_names_exist(key):
    from pulmo_jax.shell.composing import allowed_keys
    from pulmo_jax.tasks.anomalies.config import TrainConfig
    from pulmo_jax.tasks.classification.config import ClassifierConfig
    from pulmo_jax.tasks.landmarks.config import LandmarkConfig
    from pulmo_jax.tasks.point_sources.config import DetectConfig

    section, name = key.split(".")
    nodes = [yaml.safe_load(file.read_text()) for file in (ROOT / "configs" / section).glob("*.yaml")]
    assert name in (
        *allowed_keys(TrainConfig, [section]),
        *allowed_keys(DetectConfig, [section]),
        *allowed_keys(LandmarkConfig, [section]),
        *allowed_keys(ClassifierConfig, [section]),
        *(key for node in nodes for key in node),
    )


def test_the_readmes_python_finds_a_planet(tmp_path, monkeypatch, capsys):
    stack = rotating_stack(seed=0, frames=24, size=48, planets=((40.0, 31.0, 900.0),)).stack
    arrays = {"cube": stack.cube, "angles": stack.angles_deg, "psf": stack.psf}
    for name, array in arrays.items():
        fits.writeto(tmp_path / f"{name}.fits", array)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    y, x, *_ = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert (y, x) == pytest.approx((40, 31), abs=1)
