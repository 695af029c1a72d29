"""Sweeps as a person calls them: jobs in processes of their own, some of which fail, are killed or stopped."""

import csv
import json
import os
import re
import signal
from pathlib import Path

import pytest
import tifffile
from references import child
from references.gate import gate

CROP = Path(__file__).parent / "lung_crop"
SMALL = [
    "data.patch_size=32", "model.width=8", "model.latent=8", "trainer.batch_size=16", "trainer.validation_patches=16",
    "calibration.pixel_rate=0.01", "evaluation.examples=1", "~callbacks.figures",
]  # fmt: skip
TROUBLE = """
import os, signal
from pathlib import Path

class Trouble:
    def __init__(self, kind: str): self.kind = kind
    def on_start(self, start):
        if self.kind == "bug" and not Path("mended").exists(): raise ZeroDivisionError("a bug of mine")
        if self.kind == "kill": os.kill(os.getpid(), signal.SIGKILL)
    def on_event(self, event): pass
    def on_end(self): pass
"""
SIDE_BY_SIDE = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep_images")
    for number, page in enumerate(tifffile.imread(CROP / "ct.tif")[:6]):
        tifffile.imwrite(folder / f"lung_{number}.tif", page)
    return folder


@pytest.fixture
def command(images, tmp_path, monkeypatch):
    """Of a sweep in tmp_path / "sweep", whose jobs may use `trouble.Trouble`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trouble.py").write_text(TROUBLE)

    def make(*more, verb="train", launcher=None):
        of_training = ["+experiment=lung", f"data.train={images}", *SMALL] if verb == "train" else []
        launched = SIDE_BY_SIDE.get(launcher, [])
        return [f"pulmo_jax.{verb}", "-m", *of_training, *launched, "hydra.sweep.dir=sweep", *more]

    return make


def troubles(*kinds):
    return [
        "plugins=[trouble]",
        "+callbacks.trouble._target_=trouble.Trouble",
        f"+callbacks.trouble.kind={','.join(kinds)}",
    ]


def call(command, status=0):
    return child.run(*command, status=status)


def rows(folder=Path("sweep")):
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def statuses():
    return [row["status"] for row in rows()]


def steps_done(job):
    path = Path("sweep") / str(job) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def start(command):
    """In a group of its own, so that all of it can be killed."""
    return child.start(*command, log=Path("log"), start_new_session=True)


@pytest.mark.slow
def test_jobs_side_by_side_of_which_one_fails(command, tmp_path):
    keys = [*troubles("bug", "none"), "trainer.steps=2"]
    failed = call(command(*keys, launcher="joblib"), status=3)
    assert "Traceback" not in failed.stderr
    assert "error: job 0 failed: ZeroDivisionError: a bug of mine" in failed.stderr
    assert statuses() == ["failed", "done"]
    assert "a bug of mine" in (tmp_path / "sweep" / "0" / "traceback.txt").read_text()
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "a bug of mine" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)

    objective, losses = rows()[1]["objective"], (tmp_path / "sweep" / "1" / "metrics.jsonl").stat().st_mtime_ns
    (tmp_path / "mended").touch()
    again = call(command(*keys, "resume=true"))
    assert f"job 1 has already finished; objective {objective}" in again.stdout
    assert (tmp_path / "sweep" / "1" / "metrics.jsonl").stat().st_mtime_ns == losses
    assert statuses() == ["done", "done"]
    assert [row["objective"] for row in rows()] == [objective, objective]  # trouble apart they are the same job


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [pytest.param("joblib", marks=pytest.mark.campaign), "submitit"])
def test_killed_job_loses_no_other(command, launcher):
    if launcher == "submitit":
        pytest.importorskip("submitit")
    done = call(command(*troubles("none", "kill", "no", "never"), "trainer.steps=2", launcher=launcher), status=3)
    assert "continuing with the other jobs" in done.stderr
    record = json.loads(Path("sweep/1/job.json").read_text())
    assert (record["status"], "killed" in record["reason"]) == ("failed", True)
    assert statuses()[2:] == ["done", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.campaign), "submitit"])
def test_stopped_sweep_goes_on_to_the_same_end(command, launcher):
    if launcher == "submitit":
        pytest.importorskip("submitit")
    gates = Path("go").absolute()
    sweep = command("seed=0,1", "trainer.steps=20", "trainer.log_every=1", *gate(3, gates), launcher=launcher)
    process = start(sweep)
    running = (0,) if launcher == "basic" else (0, 1)
    child.wait_until(lambda: all(steps_done(job) > 2 for job in running), process, Path("log"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=child.PATIENCE_S) == 128 + signal.SIGTERM, Path("log").read_text()
    assert "Traceback" not in Path("log").read_text()
    assert set(statuses()) == {"interrupted"}
    assert {row["reason"] for row in rows()} == {"stopped by SIGTERM"}
    assert steps_done(0) in (3, 4)

    for job in "01":
        (gates / job).mkdir(parents=True)
    call([*sweep, "resume=true"])
    assert statuses() == ["done", "done"]
    assert steps_done(0) == 20
    resumed = [row["objective"] for row in rows()]
    call([argument.replace("sweep.dir=sweep", "sweep.dir=straight") for argument in sweep])
    assert [row["objective"] for row in rows(Path("straight"))] == resumed


@pytest.mark.campaign
def test_search_that_was_killed_goes_on(command):
    gates = Path("go").absolute()
    for job in "013":
        (gates / job).mkdir(parents=True)
    sweep = command(
        "hydra/sweeper=search", "hydra.sweeper.n_trials=4", "hydra.sweeper.sampler.n_startup_trials=2",
        "optimizer.learning_rate=tag(log,interval(1e-4,1e-2))", "trainer.steps=12", "trainer.checkpoint_every=5",
        "trainer.log_every=1", *gate(11, gates),
    )  # fmt: skip
    process = start(sweep)
    child.wait_until(lambda: steps_done(2) > 10, process, Path("log"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=child.PATIENCE_S)
    (gates / "2").mkdir()
    before = rows()
    assert [row["status"] for row in before] == ["done", "done"]
    done = call([*sweep, "resume=true"])
    assert "resuming after step" in done.stdout
    assert statuses() == ["done"] * 4
    assert rows()[:2] == before
    assert Path("sweep/optimization_results.yaml").exists()


@pytest.mark.slow
def test_sweep_over_detections(command):
    small = ["data.synthetic.size=48", "data.synthetic.frames=16", "contrast.rings=0", "search.max_sources=1"]
    call(command("+experiment=adi", *small, "seed=0,1", verb="detect"))
    assert statuses() == ["done", "done"]
    assert [float(row["highest_snr"]) > 0 for row in rows()] == [True, True]
    assert Path("sweep/figures/sweep.pdf").exists()
