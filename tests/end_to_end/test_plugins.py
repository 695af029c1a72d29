"""A user's package (tests/plugins) adds a task, method, model, loss, callback, image format and figure by config."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from astropy.io import fits
from omegaconf import OmegaConf
from references import child

PLUGINS = Path(__file__).parents[1] / "plugins"
OWN = ["--config-dir", PLUGINS / "configs"]


def call(verb, *arguments, status=0):
    return child.run(f"pulmo_jax.{verb}", *arguments, status=status, cwd=PLUGINS)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files that only the package's format can read."""
    folder, random = tmp_path_factory.mktemp("raw"), np.random.default_rng(0)
    pixels = random.integers(0, 256, (6, 16, 16)).astype(np.uint8)
    for i, image in enumerate(pixels):
        image.tofile(folder / f"{i}.raw")
    return folder, pixels.astype(np.float64)


@pytest.fixture(scope="module")
def mean_run(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("mean") / "run"
    call(
        "train", *OWN, "+experiment=mean_image", "plugins=[lab]", f"data.train={images[0]}", "sources=raw",
        "callbacks=notes", "figures=numbers", f"hydra.run.dir={run}",
    )  # fmt: skip
    return run


def expected(pixels):
    return np.sqrt(((pixels - pixels.mean(0)) ** 2).mean((1, 2)))


def test_a_task_is_trained_with_the_users_format_callback_and_figure(images, mean_run):
    metrics = json.loads((mean_run / "metrics.json").read_text())
    assert metrics["distance"] == pytest.approx(expected(images[1]).mean(), rel=1e-5)
    assert (mean_run / "notes.txt").read_text() == "1\n"
    report = (mean_run / "report.html").read_text()
    assert "1 numbers of run: none should stand out." in report
    assert (mean_run / "figures" / "numbers.pdf").is_file()


def test_callbacks_of_ones_own_cannot_drop_checkpoints_and_log(images, tmp_path):
    """A group without the default callbacks: hours later the run can be used."""
    run = tmp_path / "run"
    call(
        "train", *OWN, "+experiment=mean_image", "plugins=[lab]", f"data.train={images[0]}", "sources=raw",
        "callbacks=only_notes", f"hydra.run.dir={run}",
    )  # fmt: skip
    assert list(OmegaConf.load(run / "config.yaml").callbacks) == ["notes"]
    assert (run / "notes.txt").read_text() == "1\n"
    assert json.loads((run / "metrics.jsonl").read_text())["step"] == 1
    out = tmp_path / "out"
    call("predict", *OWN, f"run={run}", "plugins=[lab]", "sources=raw", f"input={images[0]}", f"output={out}")
    assert (out / "distances.csv").is_file()


def test_its_run_predicts_and_is_evaluated(images, mean_run, tmp_path):
    call("predict", *OWN, f"run={mean_run}", "plugins=[lab]", "sources=raw", f"input={images[0]}", f"output={tmp_path}")
    rows = list(csv.DictReader((tmp_path / "distances.csv").read_text().splitlines()))
    assert [row["filename"] for row in rows] == [f"{i}.raw" for i in range(6)]
    np.testing.assert_allclose([float(row["distance"]) for row in rows], expected(images[1]), rtol=1e-4)
    call(
        "evaluate", *OWN, f"run={mean_run}", "plugins=[lab]", "sources=raw", "figures=numbers",
        "figures.numbers.size_inch=2.0", f"data.test={images[0]}", f"hydra.run.dir={tmp_path / 'evaluation'}",
    )  # fmt: skip
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["distance"] == pytest.approx(expected(images[1]).mean(), rel=1e-5)
    assert "none should stand out" in (tmp_path / "evaluation" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+experiment=mean_image"], "task=mean_image: does not exist; .*add plugins=.PACKAGE."),
        (["+experiment=lung", "model=tiny"], r"model._target_=lab.models.Tiny: only .*add plugins=\[lab\]"),
        (["+experiment=lung", "method/loss=charbonnier"], r"method.loss._target_=lab.*add plugins=\[lab\]"),
        (["+experiment=lung", "figures=numbers"], r"figures.numbers._target_=lab.*add plugins=\[lab\]"),
        (["+experiment=lung", "sources=raw"], r"sources.raw._target_=lab.*add plugins=\[lab\]"),
        (
            ["+experiment=lung", "method/loss=charbonnier", "plugins=[lab]", "method.loss.epsilon=0.0"],
            "method.loss.epsilon=0.0: input should be greater than 0",
        ),
        (["+experiment=lung", "method.loss=l1"], "choose one with method/loss=l1"),
        (
            ["+experiment=lung", "method/loss=laplace"],
            "method.loss._target_=.*: lacks the arguments image, reconstruction",
        ),
    ],
)
def test_what_may_not_be_built_is_refused_before_any_work(arguments, words, tmp_path):
    done = call("train", *OWN, *arguments, f"hydra.run.dir={tmp_path / 'run'}", status=2)
    assert re.search(words, done.stderr), done.stderr
    assert not list(tmp_path.glob("run/*.json"))


def test_a_method_a_model_and_a_loss_are_trained_together(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "normal").mkdir()
    for i in range(5):
        tifffile.imwrite(tmp_path / "normal" / f"{i}.tif", random.normal(100, 10, (32, 32)).astype(np.float32))
    run = tmp_path / "run"
    call(
        "train", *OWN, "+experiment=lung", "plugins=[lab]", "method=reseeded", "method/loss=charbonnier", "model=tiny",
        f"data.train={tmp_path / 'normal'}", "data.patch_size=16", "trainer.steps=2", "trainer.batch_size=4",
        "trainer.validation_patches=4", "calibration.pixel_rate=0.05", "evaluation.replicates=10",
        f"hydra.run.dir={run}",
    )  # fmt: skip
    config = OmegaConf.load(run / "config.yaml")
    assert config.method.seed == 3
    assert config.seed == 0
    assert config.method.loss._target_ == "lab.losses.charbonnier"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] > 0.01  # at least its epsilon
    calls = json.loads((run / "calibration.json").read_text())
    assert calls["image_threshold"]["value"] > 0


@pytest.mark.slow
def test_a_search_for_point_sources_draws_the_users_figure(tmp_path):
    run = tmp_path / "run"
    call(
        "detect", *OWN, "+experiment=adi", "plugins=[lab]", "figures=snr", "data.synthetic.frames=10",
        "data.synthetic.size=40", "contrast.rings=0", f"hydra.run.dir={run}",
    )  # fmt: skip
    mapped = int(np.isfinite(fits.getdata(run / "snr.fits")).sum())
    page = (run / "report.html").read_text()
    assert "Further figures" in page
    assert f"SNR of {mapped} pixels, adi." in page
    assert (run / "figures" / "snr_histogram.pdf").read_bytes().startswith(b"%PDF")
