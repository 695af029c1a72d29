"""What the frame gives to every task: several processes, the memory check, the profile, figures in progress."""

import csv
import json
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tifffile
from PIL import Image
from references import child
from references.chest_phantoms import write_set
from references.selection import mostly_campaign

from pulmo_jax.data.synthetic_mri import write_slices
from pulmo_jax.host import resources
from pulmo_jax.runs.task import find_task
from pulmo_jax.shell.composing import compose_config
from pulmo_jax.tasks.anomalies import training as anomalies
from pulmo_jax.train import train
from pulmo_jax.types import InputError

LOOP = {"trainer.steps": 4, "trainer.validate_every": 2, "trainer.checkpoint_every": 2, "trainer.log_every": 1}


@dataclass(frozen=True)
class Job:
    """A small training. values: keys of its config, beside its images; result: key of its figures in metrics.json."""

    task: str
    experiment: str
    values: dict[str, Any]
    result: str


JOBS = {
    "autoencoder": Job(
        "anomalies",
        "lung",
        LOOP
        | {"data.patch_size": 16, "model.width": 4, "model.latent": 8, "trainer.batch_size": 8,
           "trainer.validation_patches": 8, "calibration.pixel_rate": 0.1},
        "calibration",
    ),
    "patch_gaussian": Job(
        "anomalies", "lung_covariance", {"data.patch_size": 16, "calibration.pixel_rate": 0.1}, "calibration"
    ),
    "landmark_net": Job(
        "landmarks",
        "landmarks",
        LOOP
        | {"method": "landmark_net", "method.size": 32, "model.stem_stride": 2, "model.widths": [8, 8, 16],
           "method.members": 2, "trainer.batch_size": 8, "evaluation.replicates": 10},
        "errors",
    ),
    "eigenpatch": Job(
        "landmarks",
        "landmarks",
        {"method.size": 32, "method.templates": [5, 9], "method.reaches": [3], "evaluation.replicates": 10},
        "errors",
    ),
    "classifier": Job(
        "classification",
        "brain_mri",
        LOOP
        | {"method.size": 32, "model.widths": [8, 8], "trainer.folds": 2, "trainer.members": 1, "trainer.batch_size": 4,
           "evaluation.replicates": 10},
        "image",
    ),
    "segmentation": Job(
        "segmentation",
        "segmentation",
        LOOP
        | {"data.patch_size": 16, "data.resize": False, "model.width": 8, "model.encoder.width": 8, "trainer.folds": 2,
           "trainer.batch_size": 4, "evaluation.replicates": 10},
        "segmentation",
    ),
    "anomaly_gaussian": Job(
        "classification",
        "brain_mri",
        {"method": "anomaly_gaussian", "method.size": 32, "trainer.folds": 2, "evaluation.replicates": 10},
        "image",
    ),
}  # fmt: skip
NETWORKS = [name for name, job in JOBS.items() if "trainer.steps" in job.values]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """{task: keys of its config that name images}."""
    root = tmp_path_factory.mktemp("images")
    for i, texture in enumerate(np.random.default_rng(0).integers(900, 1100, (8, 40, 40))):
        path = root / "textures" / ("train" if i < 5 else "val") / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, texture.astype(np.uint16))
    chests = write_set(root / "chests", {"train": 24, "val": 8})
    write_slices(root / "slices", 24, seed=1)
    return {
        "anomalies": {"data.train": root / "textures" / "train", "data.val": root / "textures" / "val"},
        "landmarks": {
            "data.images": chests / "images",
            "data.train": chests / "train.csv",
            "data.val": chests / "val.csv",
        },
        "classification": {"data.root": root / "slices"},
        "segmentation": write_discs(root / "discs", 12),
    }


def write_discs(root: Path, count: int) -> dict[str, Path]:
    """Images of noise with a brighter disc, and its masks."""
    rng, (yy, xx) = np.random.default_rng(2), np.mgrid[:40, :40]
    for i in range(count):
        y, x = rng.integers(10, 30, 2)
        disc = (yy - y) ** 2 + (xx - x) ** 2 < 49
        for name, image in (("images", rng.integers(80, 120, disc.shape) + 60 * disc), ("masks", 255 * disc)):
            (root / name).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(root / name / f"{i}.tif", image.astype(np.uint8))
    return {"data.images": root / "images", "data.masks": root / "masks"}


def arguments(job: Job, images: dict, run: Path, *more: str) -> list[str]:
    values = {key: str(value).replace(" ", "") for key, value in (job.values | images[job.task]).items()}
    return ["pulmo_jax.train", f"+experiment={job.experiment}", *(f"{key}={value}" for key, value in values.items()),
            f"hydra.run.dir={run}", *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """trained(name): a run of one process, with a profile of its second step and a figure at every other one."""
    runs = {}

    def make(name: str) -> Path:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("runs") / name
            more = ["callbacks=profile", "callbacks.figures.every=2", "callbacks.profile.after=1"]
            child.run(*arguments(JOBS[name], images, runs[name], *more, "callbacks.profile.steps=1"))
        return runs[name]

    return make


def losses_of(run: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): value for row in rows for name, value in row.items() if name.endswith("loss")}


def numbers_in(content: Any) -> list[float]:
    """All numbers of a JSON value, in its order."""
    if isinstance(content, dict | list):
        return [n for part in (content.values() if isinstance(content, dict) else content) for n in numbers_in(part)]
    return [content] if isinstance(content, int | float) and not isinstance(content, bool) else []


def parameters_of(run: Path, task: str) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(find_task(task).open_run(run).weights)]


@pytest.mark.slow
@pytest.mark.parametrize(  # autoencoder is in test_verbs
    "name",
    mostly_campaign([name for name in JOBS if name != "autoencoder"], "patch_gaussian"),
)
def test_two_processes_train_what_one_does(trained, images, tmp_path, name):
    """Over loopback: the same losses, parameters and figures of merit; the second process leaves nothing behind."""
    job, one, two = JOBS[name], trained(name), tmp_path / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = [f"cluster.coordinator=127.0.0.1:{port}", "cluster.processes=2"]
    logs = [tmp_path / f"log{number}" for number in range(2)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                child.start(*arguments(job, images, two, *shared, f"cluster.process={number}"), log=log, cwd=tmp_path)
            )
            for number, log in enumerate(logs)
        ]
        statuses = [process.wait(timeout=child.PATIENCE_S) for process in processes]
    assert statuses == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    assert "done in" in logs[0].read_text()
    assert [line for line in logs[1].read_text().splitlines() if not line.startswith("[Gloo]")] == []
    alone, together = losses_of(one), losses_of(two)
    assert alone.keys() == together.keys()
    assert len(alone) == (6 if name in NETWORKS else 1)
    np.testing.assert_allclose([*together.values()], [*alone.values()], rtol=1e-4)
    mine, theirs = (np.concatenate([np.ravel(a) for a in parameters_of(run, job.task)]) for run in (two, one))
    close = np.isclose(mine, theirs, rtol=1e-3, atol=1e-5)
    # Biases before a normalization have no gradient but rounding errors, which Adam makes steps of its full length.
    assert close.mean() > (0.98 if name in NETWORKS else 0.9999)
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=4 * 2 * 0.002)  # steps of up to the learning rate, apart
    results = [json.loads((run / "metrics.json").read_text())[job.result] for run in (one, two)]
    np.testing.assert_allclose(*map(numbers_in, results), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly_campaign(NETWORKS, "autoencoder", "classifier"))
def test_figures_show_what_a_run_in_progress_does_and_the_profile_where_its_time_goes(trained, name):
    run = trained(name)
    assert sorted(path.name for path in (run / "figures" / "training").glob("*.png")) == [
        "step_000002.png", "step_000004.png",
    ]  # fmt: skip
    with Image.open(run / "figures" / "training" / "step_000004.png") as picture:
        assert picture.format == "PNG"
    rows = list(csv.DictReader((run / "profile" / "operations.csv").read_text().splitlines()))
    assert len(rows) > 3
    assert (run / "figures" / "profile.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS if name not in NETWORKS])
def test_a_fit_in_one_step_leaves_its_figure(trained, name):
    pictures = [path.name for path in (trained(name) / "figures" / "training").glob("*.png")]
    assert len(pictures) == 1
    assert int(pictures[0][len("step_") : -len(".png")]) == max(step for step, _ in losses_of(trained(name)))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_a_step_that_memory_does_not_suffice_for_is_refused_before_it(images, tmp_path, monkeypatch, name):
    job, run = JOBS[name], tmp_path / "run"
    config = compose_config("train", job.experiment, job.values | images[job.task])
    monkeypatch.setattr(resources, "available_bytes", lambda: 1000)
    monkeypatch.setattr(anomalies, "require_scoring_memory", lambda *_: None)  # has a test of its own
    size = config.trainer.batch_size
    with pytest.raises(
        InputError, match=rf"^a step of \d+ \w+ needs .* GiB are free; lower .*batch_size \(now {size}\)"
    ):
        train(config, run)
    assert not any((run / "checkpoints").iterdir())
    assert not (run / "finished.json").exists()


@pytest.mark.slow
def test_scoring_that_memory_does_not_suffice_for_is_refused_before_training(images, tmp_path, monkeypatch):
    job, run = JOBS["autoencoder"], tmp_path / "run"
    monkeypatch.setattr(resources, "available_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"^scoring a batch of 64 tiles .* lower tiles\.batch_size \(now 64"):
        train(compose_config("train", job.experiment, job.values | images[job.task]), run)
    assert not (run / "checkpoints").exists()
