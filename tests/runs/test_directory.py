"""Run directories: sealed with what they are opened from, and refused where that has changed."""

import json
import re
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pytest
from references.fake_training import fake_state

from pulmo_jax import __version__
from pulmo_jax.config.section import PathLike, Section
from pulmo_jax.reporting.provenance import provenance
from pulmo_jax.runs.directory import (
    FINISHED,
    citation_of,
    digest_of_run,
    load_config,
    load_values,
    restore_sealed,
    save_config,
    seal,
    sealed_step,
    task_of,
    unseal,
)
from pulmo_jax.runs.older import naming_version, version_of
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.types import InputError

FILES = ("calibration.json", "classes.json")


class Config(Section):
    task: Literal["landmarks"] = "landmarks"
    plugins: tuple[str, ...] = ()
    images: PathLike | None = None
    size: int = 3


def state(step: int, value: float):
    return fake_state(step).replace(params={"w": jnp.full(3, value)}, ema={"w": jnp.full(3, 2 * value)})


@pytest.fixture
def run(tmp_path):
    """A finished run with two checkpoints, of which the first is sealed."""
    folder = tmp_path / "run"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state(1, 1.0), 0.5, {})
        checkpoints.save(state(2, 2.0), 0.7, {})
    for name in FILES:
        (folder / name).write_text(f'{{"{name}": 1.25}}')
    seal(folder, 1, FILES)
    return folder


def test_a_sealed_run_is_opened_with_its_checkpoint(run):
    assert sealed_step(run, FILES) == 1
    found = restore_sealed(run, 1, state(0, 0.0))
    np.testing.assert_array_equal(found.ema["w"], [2, 2, 2])
    for_inference = restore_sealed(run, 1, state(0, 0.0).replace(params=()))
    np.testing.assert_array_equal(for_inference.ema["w"], [2, 2, 2])
    assert set(json.loads((run / FINISHED).read_text())) == {*FILES, "checkpoints/1/MANIFEST"}


@pytest.mark.parametrize("name", [*FILES, "checkpoints/1/MANIFEST"])
def test_a_file_that_has_changed_or_is_gone_is_named(run, name):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole.replace(b"1", b"2", 1))
    again = re.escape(f"; train resume=true hydra.run.dir={run} trains it again")
    with pytest.raises(InputError, match=rf"^{run / name}: has changed since training \(SHA-256 differs.*{again}$"):
        sealed_step(run, FILES)
    (run / name).unlink()
    with pytest.raises(
        InputError, match=rf"^{run / name}, listed in finished.json, cannot be read \(No such.*{again}$"
    ):
        sealed_step(run, FILES)
    (run / name).write_bytes(whole)
    assert sealed_step(run, FILES) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[1]", "is not valid"),
        ("{}", "is not valid"),
        ('{"calibration.json": "", "classes.json": ""}', "is not valid"),
        ('{"calibration.json": "", "checkpoints/1/MANIFEST": ""}', "is not valid"),
        ('{"calibration.json": "", "classes.json": "", "checkpoints/1/MANIFEST": "", "more": ""}', "is not valid"),
        ('{"calibration.json": "", "classes.json": "", "a/1/MANIFEST": "", "b/2/MANIFEST": ""}', "is not valid"),
    ],
)
def test_a_list_of_files_that_training_did_not_write_is_refused(run, content, words):
    (run / FINISHED).write_text(content)
    with pytest.raises(InputError, match=f"^{run / FINISHED}: {words}"):
        sealed_step(run, FILES)


def test_an_unfinished_run_is_refused_with_how_to_continue(run):
    unseal(run)
    with pytest.raises(InputError, match=f"^run={run}: training has not finished; continue it with resume=true hydra"):
        sealed_step(run, FILES)
    unseal(run)  # once more is no error


def test_the_seal_changes_with_the_run(run):
    before = digest_of_run(run)
    seal(run, 1, FILES)
    assert digest_of_run(run) == before
    seal(run, 2, FILES)
    assert digest_of_run(run) != before
    assert sealed_step(run, FILES) == 2


def test_a_damaged_checkpoint_is_refused_with_what_to_do(run):
    largest = max((p for p in (run / "checkpoints" / "1").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    with pytest.raises(
        InputError, match=rf"^{largest}.*\nThe calibration is valid for that checkpoint only; .*resume=t"
    ):
        restore_sealed(run, 1, state(0, 0.0))
    assert (run / "checkpoints" / "1").is_dir()  # is not set aside: a run that is read stays as it is


def test_another_architecture_is_refused_and_shapes_may_be_those_on_disk(run):
    other = state(0, 0.0).replace(params={"w": jnp.zeros(5)}, ema={"w": jnp.zeros(5)})
    with pytest.raises(InputError, match="cannot be restored into this model"):
        restore_sealed(run, 1, other)
    assert restore_sealed(run, 1, other, as_written=True).params["w"].shape == (3,)


def test_a_config_is_read_back_as_it_was(tmp_path, monkeypatch):
    config = Config(images=tmp_path / "ü $x", size=5)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path, Config, ()) == config
    monkeypatch.setenv("SECRET", "told")
    (tmp_path / "config.yaml").write_text("task: landmarks\nimages: ${oc.env:SECRET}\nplugins: [theirs]\n")
    assert load_values(tmp_path)["images"] == "${oc.env:SECRET}"
    assert load_config(tmp_path, Config, ("mine",)).plugins == ("mine",)


@pytest.mark.parametrize(
    ("text", "task"), [("seed: 1\n", "anomalies"), ("task: landmarks\n", "landmarks"),
                       ("task: classes\n", "classification"), ("", "anomalies")],
)  # fmt: skip
def test_a_config_tells_its_task(tmp_path, text, task):
    (tmp_path / "config.yaml").write_text(text)
    assert task_of(tmp_path) == task


def test_a_run_of_another_task_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("task: classes\nsize: 3\n")
    with pytest.raises(InputError) as error:
        load_config(tmp_path, Config, ())
    assert str(error.value) == f"run={tmp_path}: is a run of task=classification; give a run of task=landmarks"


def test_a_config_that_this_version_cannot_read_names_the_version_that_made_it(tmp_path):
    (tmp_path / "config.yaml").write_text("task: landmarks\nsize: 3\nqqq: 4\n")
    (tmp_path / "run.json").write_text('{"packages": {"pulmo-jax": "0.0.7"}}')
    with pytest.raises(InputError) as error, naming_version(tmp_path):
        load_config(tmp_path, Config, ())
    assert str(error.value) == (
        f"{tmp_path / 'config.yaml'}: unknown key qqq; the config has: task, plugins, images, size; the run was made "
        f"by pulmo_jax 0.0.7, this is {__version__}"
    )
    (tmp_path / "run.json").write_text(json.dumps(provenance()))
    with pytest.raises(InputError) as error, naming_version(tmp_path):
        load_config(tmp_path, Config, ())
    assert "made by" not in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"packages": []}'])
def test_a_run_may_not_tell_its_version(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert version_of(tmp_path) == "an unknown version"


def test_provenance_names_this_version_and_the_citation_is_of_the_data(tmp_path):
    found = provenance()
    assert found["packages"]["pulmo-jax"] == __version__
    assert {"jax", "numpy", "optax"} <= found["packages"].keys()
    (tmp_path / "run.json").write_text(json.dumps({"citation": "A. Author (2020)", **found}))
    assert (citation_of(tmp_path), version_of(tmp_path)) == (["A. Author (2020)"], __version__)
    (tmp_path / "run.json").write_text(json.dumps({"citation": ""}))
    assert citation_of(tmp_path) == []
