"""The whole job in one process, on small textures: what survives damage, and what is refused."""

import json
import re
import shutil

import pytest

from pulmo_jax.host.lock import claim
from pulmo_jax.runs.directory import sealed_step
from pulmo_jax.tasks.anomalies.run import SEALED, open_run
from pulmo_jax.types import InputError


@pytest.fixture(scope="module")
def whole(go, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    go(folder)
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def largest_data_file(checkpoint):
    """Other than the manifest, which can be the largest file and is checked by the seal, with a message of its own."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != "MANIFEST")
    return max(files, key=lambda path: path.stat().st_size)


def arrays_of(run, step):
    return json.loads((run / "checkpoints" / str(step) / "MANIFEST").read_bytes().partition(b"\n")[2])["arrays"]


@pytest.mark.slow
def test_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(go, whole, tmp_path, capsys):
    run = tmp_path / "run"
    go(run, "trainer.steps=4", "optimizer.warmup_fraction=0")
    damaged = largest_data_file(run / "checkpoints" / "4")
    flip_a_bit(damaged)
    capsys.readouterr()
    go(run, "trainer.steps=4", "optimizer.warmup_fraction=0", "resume=true")
    said = capsys.readouterr().out
    assert re.search(rf"warning: {damaged}: .* SHA-256 .*; using an earlier checkpoint", said)
    assert "resuming after step 3" in said
    assert (run / "checkpoints" / "damaged-4").is_dir()
    assert sealed_step(run, SEALED) in (2, 4)
    again = tmp_path / "again"
    go(again, "trainer.steps=4", "optimizer.warmup_fraction=0")
    assert arrays_of(run, 4) == arrays_of(again, 4)
    assert (run / "metrics.jsonl").read_text() == (again / "metrics.jsonl").read_text()
    assert (run / "calibration.json").read_text() == (again / "calibration.json").read_text()


def copy_of(run, folder):
    shutil.copytree(run, folder)
    return folder


@pytest.mark.slow
def test_finished_run_with_a_damaged_checkpoint_is_refused_until_it_is_made_anew(go, whole, tmp_path, capsys):
    """Thresholds belong to the parameters that they were set with."""
    run = copy_of(whole, tmp_path / "run")
    damaged = largest_data_file(run / "checkpoints" / str(sealed_step(run, SEALED)))
    flip_a_bit(damaged)
    remedy = "The calibration is valid for that checkpoint only.*resume=true"
    with pytest.raises(InputError, match=rf"{damaged}.*\n{remedy}"):
        open_run(run)
    go(run, "resume=true")
    assert str(damaged) in capsys.readouterr().out
    assert open_run(run).step == sealed_step(run, SEALED)


@pytest.mark.parametrize("name", ["calibration.json", "baselines.json", "preprocessing.json"])
def test_changed_file_of_a_finished_run_is_refused_and_named(whole, tmp_path, name):
    run = copy_of(whole, tmp_path / "run")
    text = (run / name).read_text()
    digit = re.search(r"\d\.\d+", text).end() - 1
    (run / name).write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    with pytest.raises(InputError, match=rf"{run}/{name}: has changed since training .*resume=true"):
        open_run(run)
    (run / name).unlink()
    with pytest.raises(InputError, match=rf"{run}/{name}, listed in finished.json, cannot be read"):
        open_run(run)


def test_unfinished_run_is_refused(whole, tmp_path):
    run = copy_of(whole, tmp_path / "run")
    (run / "finished.json").unlink()
    with pytest.raises(InputError, match=r"training has not finished; continue it with resume=true"):
        open_run(run)
    (run / "finished.json").write_text("{}")
    with pytest.raises(InputError, match=r"finished.json: is not valid"):
        open_run(run)


def test_resuming_a_finished_run_changes_nothing(go, whole, tmp_path):
    run = copy_of(whole, tmp_path / "run")
    go(run, "resume=true")
    for name in ("metrics.jsonl", "calibration.json", "baselines.json", "finished.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_early_stop_stays_one_when_the_run_is_resumed(go, tmp_path):
    stop = ["trainer.steps=40", "trainer.validate_every=1", "callbacks.early_stopping.patience=1"]
    stop.append("callbacks.early_stopping.min_fraction=0.9")
    run = tmp_path / "run"
    go(run, *stop)
    facts = json.loads((run / "metrics.json").read_text())["training"]
    assert (facts["steps"], "not improved" in facts["stopped_early"]) == (3, True)
    go(run, *stop, "resume=true")
    assert json.loads((run / "metrics.json").read_text())["training"]["steps"] == 3


def test_second_run_in_a_directory_is_refused(go, whole, tmp_path):
    run = tmp_path / "run"
    with claim(run), pytest.raises(InputError, match=rf"{run} is in use by process \d+ on "):
        go(run)
    with pytest.raises(InputError, match=rf"{whole} already contains a run; resume=true"):
        go(whole)


def test_loss_that_overflows_names_the_step_and_the_files_and_keeps_the_checkpoint(go, tmp_path):
    run = tmp_path / "run"
    overflow = ["optimizer.learning_rate=1e30", "optimizer.warmup_fraction=0", "trainer.validate_every=100"]
    with pytest.raises(
        InputError, match=r"is (nan|inf) at step (\d), on patches of \d\d.tif.* checkpoint is kept"
    ) as error:
        go(run, *overflow)
    failed_at = int(re.search(r"at step (\d)", str(error.value))[1])
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == str(failed_at - 1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, failed_at))


def test_a_folder_that_holds_a_split_is_refused_before_anything_is_learnt(go, images, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(InputError) as error:
        go(run, f"data.train={images}", "data.val=null")
    assert str(error.value) == (
        f"data.train={images}: its subfolders train, val are parts of a split, and the images of all of them would be "
        f"learnt as normal; give data.train={images}/train data.val={images}/val"
    )
    assert not (run / "checkpoints").exists()


def test_batch_beyond_the_memory_names_the_setting(go, tmp_path):
    with pytest.raises(InputError, match=r"a step of 99999992 patches needs .* GiB .*trainer.batch_size"):
        go(tmp_path / "run", "trainer.batch_size=99999992")


def test_callback_that_is_none_is_refused_before_anything_is_read(go, tmp_path):
    target = "+callbacks.mine={_target_:pulmo_jax.training.callbacks.read_metrics,path:a}"
    with pytest.raises(InputError, match=r"callbacks.mine._target_=.*read_metrics: has no on_start"):
        go(tmp_path / "run", target)
