"""Commands for optional dependencies, from a clone and from a wheel."""

import importlib.metadata
import shlex
import tomllib

from packaging.requirements import Requirement

from pulmo_jax.host.extras import ROOT, install_command, requirements_of

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def metadata_of(extras):
    """As hatchling writes it into a wheel."""
    return ["numpy>=2.1", *(f"{item}; extra == {name!r}" for name, items in extras.items() for item in items)]


def test_a_clone_is_installed_with_the_extra(tmp_path):
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    assert shlex.split(install_command("dicom", clone)) == [
        "python", "-m", "pip", "install", "-e", f"{clone}[dicom]",
    ]  # fmt: skip
    assert shlex.split(install_command("dicom"))[-1] == f"{ROOT}[dicom]"


def test_a_wheel_names_the_packages_because_it_is_on_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: metadata_of(EXTRAS))
    for name, packages in EXTRAS.items():
        assert list(map(Requirement, requirements_of(name))) == list(map(Requirement, packages))
        command = shlex.split(install_command(name, tmp_path))
        assert command == ["python", "-m", "pip", "install", *requirements_of(name)]
