"""Segmentation as a person trains, uses and tests it, on drawn discs; every call is a process of its own."""

import csv
import json
import shutil

import numpy as np
import pytest
import tifffile
from references import child
from references.pages import require_captions

import pulmo_jax as pj

SMALL = [
    "data.patch_size=32", "data.resize=false", "model.width=8", "model.encoder.width=8", "trainer.steps=160",
    "trainer.batch_size=8", "trainer.validate_every=80", "trainer.checkpoint_every=80", "trainer.log_every=10",
    "evaluation.replicates=20", "evaluation.examples=2", "trainer.folds=2", "optimizer.learning_rate=0.01",
    "method.contrast=0.1", "method.brightness=0.05", "method.gamma=0.1", "evaluation.baselines=false",
]  # fmt: skip


def call(*arguments, status=0, draw=False):
    """Run a verb; returns what it printed."""
    done = child.run(*arguments, status=status, draw=draw, env={"COLUMNS": 200})
    return done.stdout + done.stderr


def train(discs, run, *more, status=0, draw=False):
    data = [f"data.images={discs / 'images'}", f"data.masks={discs / 'masks'}"]
    where = f"hydra.run.dir={run}"
    return call("pulmo_jax.train", "+experiment=segmentation", *data, *SMALL, *more, where, status=status, draw=draw)


def draw_discs(root, count, seed):
    """Images of noise with bright (1) and dark (2) discs, and their class numbers."""
    rng, (yy, xx) = np.random.default_rng(seed), np.mgrid[:60, :72]
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros(yy.shape, np.uint8)
        for number in (1, 2):
            y, x = rng.integers(10, 50), rng.integers(10, 62)
            mask[(yy - y) ** 2 + (xx - x) ** 2 < 64] = number
        image = rng.normal(120, 8, mask.shape) + 70 * (mask == 1) - 70 * (mask == 2)
        tifffile.imwrite(root / "images" / f"{i:02d}.tif", np.clip(image, 0, 255).astype(np.uint8))
        tifffile.imwrite(root / "masks" / f"{i:02d}.tif", mask)
    return root


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return draw_discs(tmp_path_factory.mktemp("discs") / "set", 16, seed=0)


@pytest.fixture(scope="module")
def run(discs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "net"
    text = train(discs, folder, draw=True)
    assert "16 images in 16 groups, 2 folds; classes: class 1 (1), class 2 (2); 2 networks;" in text
    return folder


@pytest.mark.slow
def test_every_image_is_tested_once_and_the_discs_are_found(run):
    with (run / "image_scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "SegmentationNetwork"]
    assert len({row["filename"] for row in rows}) == 16
    figures = json.loads((run / "metrics.json").read_text())["segmentation"]["SegmentationNetwork"]
    assert min(figures[name]["dice"]["value"] for name in ("class 1", "class 2", "any class")) > 0.7
    require_captions(run / "report.html")


@pytest.mark.slow
def test_prediction_writes_class_numbers_of_the_images_own_size(run, discs, tmp_path):
    new = draw_discs(tmp_path / "new", 3, seed=9)
    text = call("pulmo_jax.predict", f"run={run}", f"input={new / 'images'}", f"output={tmp_path / 'out'}")
    assert "3 images finished" in text
    opened = pj.open_run(run)
    for i in range(3):
        truth = tifffile.imread(new / "masks" / f"{i:02d}.tif")
        mask = tifffile.imread(tmp_path / "out" / "masks" / f"{i:02d}.tif")
        assert mask.dtype == np.uint8
        assert mask.shape == truth.shape
        assert (mask == truth).mean() > 0.95
        p = tifffile.imread(tmp_path / "out" / "probabilities" / f"{i:02d}.tif")
        assert p.shape == (*truth.shape, 2)
        alone = opened.predict(new / "images" / f"{i:02d}.tif")
        np.testing.assert_allclose(alone.probabilities, p, atol=1e-5)
        np.testing.assert_array_equal(alone.mask, mask)
    again = call("pulmo_jax.predict", f"run={run}", f"input={new / 'images'}", f"output={tmp_path / 'out'}")
    assert "3 images finished (3 of them earlier)" in again


@pytest.mark.slow
def test_evaluation_of_the_own_images_is_that_of_the_training(run, discs, tmp_path):
    text = call("pulmo_jax.evaluate", f"run={run}", f"data.images={discs / 'images'}", f"data.masks={discs / 'masks'}",
                "evaluation.replicates=20", "evaluation.examples=2", f"hydra.run.dir={tmp_path / 'out'}")  # fmt: skip
    assert "16 of 16 images belong to the run" in text
    own, other = (json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "out"))
    for name, row in own["segmentation"]["SegmentationNetwork"].items():
        found = other["segmentation"]["SegmentationNetwork"][name]["dice"]["value"]
        assert found == pytest.approx(row["dice"]["value"], abs=1e-6)


@pytest.mark.campaign
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, discs, tmp_path):
    halves = tmp_path / "halves"
    shutil.copytree(run, halves)
    shutil.rmtree(halves / "checkpoints" / "160")
    (halves / "finished.json").unlink()
    assert "resuming after step 80" in train(discs, halves, "resume=true")
    for name in ("calibration.json", "networks.json", "metrics.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (run, halves))
        if name == "metrics.json":
            ours, theirs = ours["segmentation"], theirs["segmentation"]
        assert ours == theirs
    text = train(discs, halves, "resume=true", "seed=5", status=2)
    assert "resume=true: seed" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param("size", "the mask has 30 x 72 px, its image 03.tif has 60 x 72 px", marks=pytest.mark.slow),
        ("missing", "03.tif: has no mask"),
        pytest.param("surplus", "is the mask of no image", marks=pytest.mark.slow),
        ("jpeg", "is a JPEG"),
    ],
)
def test_bad_masks_are_refused_before_training(discs, tmp_path, damage, message):
    root = tmp_path / "set"
    shutil.copytree(discs, root)
    mask = tifffile.imread(root / "masks" / "03.tif")
    (root / "masks" / "03.tif").unlink()
    if damage == "size":
        tifffile.imwrite(root / "masks" / "03.tif", mask[:30])
    elif damage == "surplus":
        tifffile.imwrite(root / "masks" / "03.tif", mask)
        tifffile.imwrite(root / "masks" / "99.tif", mask)
    elif damage == "jpeg":
        from PIL import Image

        Image.fromarray(mask).save(root / "masks" / "03.jpg")
    text = train(root, tmp_path / "run", status=2)
    assert "03" in text or "99.tif" in text
    assert message in text, text
    assert not (tmp_path / "run" / "config.yaml").exists()
