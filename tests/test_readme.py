"""The README's promises that a test can hold."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if line.endswith("python -m pytest -q"))
    assert command in (ROOT / ".ci" / "run").read_text()


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\((?!https)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "key", sorted(set(re.findall(r"`((?:data|trainer|model|method|calibration|tiles)\.(?!json)\w+)", README)))
)
def test_keys_that_the_readme_names_exist(key):
    from pulmo_jax.cli import allowed_keys, node_keys
    from pulmo_jax.config import TrainConfig

    section, name = key.split(".")
    assert name in (allowed_keys(TrainConfig, [section]) or node_keys([section]))
