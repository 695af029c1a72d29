"""How results were made."""

import getpass
import importlib.metadata
import json
import platform
import socket

import jax

from pulmo_jax import __version__
from pulmo_jax.host.calls import called
from pulmo_jax.reporting import provenance as module
from pulmo_jax.reporting.provenance import how_made, provenance
from pulmo_jax.reporting.report import write_report


def test_command_versions_commit_device_date_and_time(monkeypatch):
    monkeypatch.setattr(module, "commit_of", lambda: "0123456789ab with local changes")
    with called("python -m pulmo_jax.train seed=1") as call:
        made, stored = how_made(), provenance()
    assert made["command"] == stored["command"] == "python -m pulmo_jax.train seed=1"
    assert made["versions"].startswith(
        f"pulmo_jax {__version__}, Python {platform.python_version()}, jax {jax.__version__}"
    )
    for name in ("jaxlib", "flax", "numpy"):
        assert f"{name} {importlib.metadata.version(name)}" in made["versions"]
    assert made["commit"] == stored["commit"] == "0123456789ab with local changes"
    assert made["device"].endswith("CPU cores")
    monkeypatch.setattr(module.jax, "devices", lambda: [*jax.local_devices()[:1] * 2])
    assert how_made()["device"].startswith("2 x cpu (cpu), ")
    assert made["date"] == f"{call.date:%Y-%m-%d %H:%M} UTC"
    assert made["wall time"] == "0 s until this report"
    json.dumps(stored)


def test_an_installed_package_has_no_commit(monkeypatch):
    monkeypatch.setattr(module, "commit_of", lambda: None)
    assert "commit" not in how_made()
    assert provenance()["commit"] is None


def test_a_sweep_leaves_the_devices_to_its_jobs(monkeypatch):
    monkeypatch.setattr(module.jax, "devices", lambda: 1 / 0)
    assert "cpu (" not in how_made(with_devices=False)["device"]


def test_every_report_ends_with_it(tmp_path):
    with called("python -m pulmo_jax.evaluate 'run=<a>'"):
        write_report(tmp_path / "r.html", "A run", {}, [], [], [])
    page = (tmp_path / "r.html").read_text()
    end = page[page.index("How this was made") :]
    assert "python -m pulmo_jax.evaluate &#39;run=&lt;a&gt;&#39;" in end
    assert f"pulmo_jax {__version__}" in end


def test_neither_user_nor_machine_are_named(monkeypatch):
    with called("a"):
        text = json.dumps([how_made(), {k: v for k, v in provenance().items() if k != "platform"}])
    assert socket.gethostname() not in text
    assert getpass.getuser() not in text
