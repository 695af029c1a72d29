"""Runs of a stranger, who computes all digests himself: one line and status 2, unless they are right."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import yaml
from references import child
from references.chest_phantoms import write_set
from references.forgery import reseal, resign

import pulmo_jax as pj
from pulmo_jax.data.synthetic_mri import write_slices
from pulmo_jax.host import resources
from pulmo_jax.types import InputError

LOOP = ["trainer.steps=2", "trainer.validate_every=2", "trainer.checkpoint_every=2", "evaluation.replicates=10"]
IMAGE = np.random.default_rng(1).integers(900, 1100, (40, 40)).astype(np.uint16)


pytestmark = pytest.mark.slow  # trains a run of each task


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{task: finished run}"""
    root = tmp_path_factory.mktemp("runs")
    for i, texture in enumerate(np.random.default_rng(0).integers(900, 1100, (6, 40, 40))):
        path = root / "textures" / ("train" if i < 4 else "val") / f"{i}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, texture.astype(np.uint16))
    chests = write_set(root / "chests", {"train": 24, "val": 8})
    write_slices(root / "slices", 24, seed=1)
    arguments = {
        "anomalies": ["lung", f"data.train={root}/textures/train", f"data.val={root}/textures/val", *LOOP[:3],
                      "data.patch_size=16", "model.width=4", "model.latent=8", "trainer.batch_size=8",
                      "trainer.validation_patches=8", "calibration.pixel_rate=0.1"],
        "landmarks": ["landmarks", f"data.images={chests}/images", f"data.train={chests}/train.csv",
                      f"data.val={chests}/val.csv", "method.size=32", "method.templates=[5,9]", "method.reaches=[3]",
                      LOOP[-1]],
        "classification": ["brain_mri", f"data.root={root}/slices", "method.size=32", "model.widths=[8,8]",
                           "trainer.folds=2", "trainer.members=1", "trainer.batch_size=4", *LOOP],
    }  # fmt: skip
    for task, (experiment, *keys) in arguments.items():
        child.run("pulmo_jax.train", f"+experiment={experiment}", *keys, f"hydra.run.dir={root / task}")
    return {task: root / task for task in arguments}


@pytest.fixture
def copy(runs, tmp_path):
    """copy(task): a copy of a run, to be changed."""
    return lambda task: shutil.copytree(runs[task], tmp_path / task)


def edit(path, **changes):
    """Change keys of a JSON file of a run, given as a__b, and seal the run again."""
    content = json.loads(path.read_text())
    for keys, value in changes.items():
        *parents, last = keys.split("__")
        part = content
        for key in parents:
            part = part[key]
        part[last] = value
    path.write_text(json.dumps(content))
    reseal(path.parent)


def refused(run, words):
    with pytest.raises(InputError, match=words) as error:
        pj.open_run(run).predict(IMAGE)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("task", ["anomalies", "landmarks", "classification"])
def test_a_copy_predicts_as_the_run(runs, copy, task):
    here, there = (pj.open_run(run).predict(IMAGE) for run in (runs[task], copy(task)))
    assert repr(here) == repr(there)


# --- before anything of the run is computed


OPEN_ALL = """
import sys, pulmo_jax
from pulmo_jax.types import InputError
for run in sys.argv[1:]:
    try:
        pulmo_jax.open_run(run)
    except InputError as error:
        print(str(error).replace(chr(10), " "))
"""


def test_special_files_never_hang(runs, tmp_path):
    """In a process of its own, because the opening of a FIFO would never end."""
    folders = []
    for name in ("config.yaml", "finished.json", "calibration.json", "preprocessing.json"):
        for kind in ("fifo", "device", "out"):
            run = shutil.copytree(runs["anomalies"], tmp_path / f"{kind}-{name}")
            (run / name).rename(tmp_path / "outside")
            if kind == "fifo":
                os.mkfifo(run / name)
            else:
                (run / name).symlink_to(tmp_path / "outside" if kind == "out" else "/dev/zero")
            folders.append(run)
    command = [sys.executable, "-c", OPEN_ALL, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders)
    for run, line in zip(folders, lines, strict=True):
        assert str(run) in line
        assert any(words in line for words in ("is not a regular file", "a link leads out of", "no config.yaml there"))


def test_predict_refuses_a_config_of_aliases_with_status_2(copy, tmp_path):
    run = copy("anomalies")
    bomb = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "a0: &a0 [x,x,x,x]\n" + bomb)
    tifffile.imwrite(tmp_path / "image.tif", IMAGE)
    arguments = [f"run={run}", f"input={tmp_path / 'image.tif'}", f"output={tmp_path / 'out'}"]
    done = child.run("pulmo_jax.predict", *arguments, status=2)
    (line,) = done.stderr.splitlines()
    assert f"{run / 'config.yaml'}: is not a valid config (line " in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["task: [anomalies]\n", "1: 2\n", "- a\n", "task: {a: b}\n", "task: '../../x'\n", "x"])
def test_a_config_that_is_none_is_one_line(copy, text):
    run = copy("anomalies")
    (run / "config.yaml").write_text(text)
    refused(run, ".")


# --- models that do not fit the checkpoint


@pytest.mark.parametrize(
    ("task", "section", "changes", "words"),
    [
        ("anomalies", "model", {"latent": 2_000_000_000}, "cannot be restored into this model"),
        ("anomalies", "model", {"width": 10**9}, "cannot be restored into this model|cannot be built"),
        ("anomalies", "model", {"width": 2**62}, "cannot be restored into this model|cannot be built"),
        ("anomalies", "method", {"smooth_px": 1e9}, "method.smooth_px"),
        ("anomalies", "method", {"smooth_px": float("nan")}, "method.smooth_px"),
        ("anomalies", "data", {"patch_size": 2**40}, ""),
        ("anomalies", "tiles", {"batch_size": 10**12}, "a batch of 1000000000000 tiles .* lower tiles.batch_size"),
        ("classification", "model", {"widths": [8] * 40_000}, "model.widths"),
        ("classification", "model", {"widths": [8, 8 * 10**8]}, "cannot be restored into this model|cannot be built"),
        ("classification", "model", {"blocks": 10**6}, "model.blocks"),
        ("classification", "method", {"asymmetry": [0.1] * 1000}, "cannot be restored into this model"),
        ("classification", "method", {"size": 2**40}, "method.size"),
        ("landmarks", "method", {"size": 2**40}, "method.size"),
        ("landmarks", "method", {"scales": [1] * 9, "templates": [5] * 9, "reaches": [3] * 8}, "method.scales"),
        ("landmarks", "method", {"prior": False}, "cannot be restored into this model"),
        ("landmarks", "method", {"reaches": [10**9]}, "method.reaches"),
        ("landmarks", "method", {"iterations": 10**9}, "method.iterations"),
    ],
)  # fmt: skip
def test_sizes_are_judged_before_arrays_are_made(copy, task, section, changes, words):
    run = copy(task)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section] |= changes
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if changes == {"patch_size": 2**40}:  # that of preprocessing.json is used
        edit(run / "preprocessing.json", patch_size=2**40)
        words = "preprocessing.json: is not a valid preprocessing file"
    refused(run, words)


def test_a_program_that_needs_more_memory_than_there_is_does_not_run(copy, monkeypatch):
    run = pj.open_run(copy("landmarks"))
    monkeypatch.setattr(resources, "available_bytes", lambda: 1000)
    with pytest.raises(InputError, match="localising the landmarks of 16 images needs 0.0 GiB of memory"):
        run.predict(IMAGE)


def test_a_manifest_with_other_arrays_is_refused(copy):
    run = copy("anomalies")
    checkpoint = next((run / "checkpoints").iterdir())

    def change(record):
        name = next(name for name in record["arrays"] if "ema" in name and "to_latent" in name and "kernel" in name)
        return record | {"arrays": record["arrays"] | {name: record["arrays"][name] | {"shape": [10**6, 10**6]}}}

    resign(checkpoint, change)
    reseal(run)
    refused(run, r"cannot be restored into this model .*\(1000000, 1000000\) there")


# --- values


@pytest.mark.parametrize(
    ("task", "file", "changes", "words"),
    [
        ("anomalies", "preprocessing.json", {"channels": 10**9}, "preprocessing.json: .*do not fit together"),
        ("anomalies", "preprocessing.json", {"dtype": "nonsense"}, "preprocessing.json: .*do not fit together"),
        ("anomalies", "preprocessing.json", {"scale": [0.0]}, "preprocessing.json: .*do not fit together"),
        ("anomalies", "preprocessing.json", {"clip": [1.0, 1.0]}, "preprocessing.json: .*do not fit together"),
        ("anomalies", "calibration.json", {"pixel_threshold__n_scores": -5}, "pixel_threshold.n_scores"),
        ("anomalies", "calibration.json", {"pixel_threshold__n_scores": 10**300}, "pixel_threshold.n_scores"),
        ("anomalies", "calibration.json", {"normal_pixel_scores": [[0.0, 10**30]]}, "normal_pixel_scores"),
        ("anomalies", "baselines.json", {"mean_intensity": [[]]}, "baselines.json"),
        ("landmarks", "landmarks.json", {"n_landmarks": 10**9}, "landmarks.json: does not describe"),
        ("landmarks", "landmarks.json", {"mirror": [0] * 10}, "landmarks.json: does not describe"),
        ("landmarks", "landmarks.json", {"mirror": list(range(5000))}, "landmarks.json: does not describe"),
        ("landmarks", "landmarks.json", {"frame_px": 10**6}, "landmarks.json: does not describe"),
        ("landmarks", "landmarks.json", {"frame_points": [[1e308, 0.0]] * 10}, "frame of"),
        ("landmarks", "landmarks.json", {"frame_points": [[5.0, 5.0]] * 10}, "."),
        ("landmarks", "calibration.json", {"std_limits": [1.0]}, "calibration.json: is not a calibration of 10"),
        ("landmarks", "calibration.json", {"surprise_limit": "x"}, "calibration.json: is not a valid landmark"),
        ("classification", "classes.json", {"normal": 2}, "classes.json: its classes"),
        ("classification", "classes.json", {"normal": -1}, "classes.json: does not describe"),
        ("classification", "classes.json", {"classes": ["a", "a"]}, "classes.json: its classes"),
        ("classification", "classes.json", {"class_weights": [1.0]}, "classes.json: its classes"),
        ("classification", "classes.json", {"members": []}, "classes.json: its classes"),
        (
            "classification",
            "classes.json",
            {"members": [{"repeat": 0, "fold": 0, "number": 0, "seed": 2**40}]},
            "classes",
        ),
        (
            "classification",
            "classes.json",
            {"scalings": [{"scale": 1.0, "offsets": []}] * 2},
            "classes.json: its classes",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(copy, task, file, changes, words):
    run = copy(task)
    edit(run / file, **changes)
    refused(run, words)


@pytest.mark.parametrize("name", ["calibration.json", "preprocessing.json", "baselines.json", "finished.json"])
def test_deep_files_are_one_line(copy, name):
    run = copy("anomalies")
    (run / name).write_text("[" * 100_000 + "]" * 100_000)
    if name != "finished.json":
        reseal(run)
    refused(run, name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("look.mean", lambda a: np.zeros(7, np.float32)),
        ("look.components", lambda a: a[:, :-1]),
        ("look.smoothing_px", lambda a: np.array(1e9)),
        ("baselines.ridge", lambda a: a.astype(np.int32)),
        ("shapes.lower", lambda a: a[:1]),
        ("shapes.mean", lambda a: np.zeros((5000, 2), np.float32)),
        ("added", lambda a: np.zeros(3)),
    ],
)
def test_companions_that_do_not_fit_together_are_refused(copy, name, change):
    run = copy("landmarks")
    with np.load(run / "companions.npz") as arrays:
        found = dict(arrays)
    np.savez(run / "companions.npz", **{**found, name: change(found.get(name))})
    reseal(run)
    refused(run, f"companions.npz: .*{name}")


def test_images_of_a_classification_that_are_none_are_refused(copy):
    run = copy("classification")
    edit(run / "images.json", images=[{"content": "", "look": -1, "unseen_by": [10**9]}])
    opened = pj.open_run(run)
    with pytest.raises(InputError, match="images.json: does not list the images of the run"):
        _ = opened.images
