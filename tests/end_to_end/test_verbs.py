"""Every verb as a person calls it, on a small crop of a real CT."""

import csv
import hashlib
import json
import re
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest
import tifffile
from omegaconf import OmegaConf
from PIL import Image
from references import child
from references.gate import gate
from references.pages import require_captions
from references.pictures import ink
from safetensors import safe_open
from safetensors.numpy import load_file
from scipy.ndimage import binary_dilation

import pulmo_jax as pj
from pulmo_jax.evaluation.image_statistics import STATISTICS
from pulmo_jax.inference.outputs import OUTLINE
from pulmo_jax.types import InputError

CROP = Path(__file__).parent / "lung_crop"
SETS = {"train": range(8), "val": range(8, 12), "test": range(12, 17)}
NODULE_PAGES = range(14, 17)
SMALL = [
    "data.patch_size=32", "model.width=16", "trainer.validation_patches=64", "calibration.pixel_rate=0.01",
    "evaluation.replicates=20",
]  # fmt: skip


def call(*arguments, status=0, cwd=None, draw=False):
    return child.run(*arguments, status=status, cwd=cwd, draw=draw)


@pytest.fixture(scope="module")
def crop(tmp_path_factory):
    """The crop as folders of TIFF files, as a user would have them."""
    root = tmp_path_factory.mktemp("crop")
    pages = {name: tifffile.imread(CROP / f"{name}.tif") for name in ("ct", "lungs", "nodule")}
    for folder, indices in SETS.items():
        for i in indices:
            for sub, name in ((folder, "ct"), ("foreground", "lungs"), ("test_masks", "nodule")):
                if sub != "test_masks" or folder == "test":
                    (root / sub).mkdir(exist_ok=True)
                    tifffile.imwrite(root / sub / f"lung_{i:02d}.tif", pages[name][i], resolution=(14.2, 14.2))
    return root


def train_arguments(crop, run, *more):
    return [
        "pulmo_jax.train", "+experiment=lung", f"data.train={crop / 'train'}", f"data.val={crop / 'val'}",
        f"data.foreground={crop / 'foreground'}", *SMALL, f"hydra.run.dir={run}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(crop, tmp_path_factory):
    """A run trained on the crop, and tested on it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    test = [f"data.test={crop / 'test'}", f"data.test_masks={crop / 'test_masks'}"]
    call(*train_arguments(crop, folder, "trainer.steps=120", *test), draw=True)
    return folder


@pytest.fixture(scope="module")
def predicted(run, crop, tmp_path_factory):
    output = tmp_path_factory.mktemp("predicted") / "out"
    call("pulmo_jax.predict", f"run={run}", f"input={crop / 'test'}", f"output={output}")
    return output


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_training_learns_and_leaves_a_whole_run_directory(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows]
    assert [row["step"] for row in rows] == list(range(10, 121, 10))
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    files = {name: json.loads((run / f"{name}.json").read_text()) for name in ("images", "run", "calibration")}
    assert [len(files["images"][name]) for name in ("training", "validation")] == [8, 4]
    assert files["run"]["packages"]["jax"]
    assert len(files["calibration"]["normal_image_scores"]) == 4
    assert OmegaConf.load(run / "config.yaml").model.width == 16
    assert "autoencoder" in (run / "metrics.md").read_text()
    pictures = list((run / "figures").glob("*.png"))
    assert min(map(ink, pictures)) > 0.01
    for picture in pictures:
        assert picture.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert b"train/loss" in b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    assert "120" in {folder.name for folder in (run / "checkpoints").iterdir()}


def test_exported_weights_are_those_of_the_run(run, tmp_path):
    done = call("pulmo_jax.export", f"run={run}", "format=safetensors", cwd=tmp_path)
    path = tmp_path / f"{run.name}.safetensors"
    (params,), arrays = pj.open_run(run).weights, load_file(path)
    leaves = jax.tree.leaves(params)
    assert f"{len(leaves)} tensors" in done.stdout
    assert path.name in done.stdout
    assert sorted(a.shape for a in arrays.values()) == sorted(leaf.shape for leaf in leaves)
    np.testing.assert_allclose(sum(float(a.sum()) for a in arrays.values()), sum(map(np.sum, leaves)), rtol=1e-4)
    with safe_open(path, "np") as file:
        facts = file.metadata()
    assert facts["run_sha256"] == hashlib.sha256((run / "finished.json").read_bytes()).hexdigest()
    assert (facts["task"], facts["step"]) == ("anomalies", "120")
    before = path.read_bytes()
    refused = call("pulmo_jax.export", f"run={run}", f"output={path}", status=2, cwd=tmp_path)
    assert "exists; overwrite=true replaces it" in refused.stderr
    call("pulmo_jax.export", f"run={run}", f"output={path}", "overwrite=true", cwd=tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_training_tests_beside_the_baselines(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["pixel"]) == {"autoencoder", "intensity", "local intensity", "z-score"}
    single = {f"autoencoder, {name}" for name in STATISTICS}
    assert set(metrics["image"]) == set(metrics["pixel"]) | single
    assert next(iter(metrics["image"])) == "autoencoder"
    assert metrics["calibration"]["image_statistic"] == "combined"
    aurocs = {name: figures["auroc"]["value"] for name, figures in metrics["pixel"].items()}
    assert aurocs["autoencoder"] > 0.9  # the nodule is plain to see
    assert metrics["lesions"]["images_with_lesions"] == len(NODULE_PAGES)
    planted = metrics["validation"]["planted_ap"]
    assert planted["count"] == 20
    assert 0 < planted["value"] < 1


def test_report_is_self_contained(run):
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    require_captions(run / "report.html")
    assert "ample data" not in page  # the images are the user's own


def test_maps_of_every_image_are_written(predicted, crop):
    for i in SETS["test"]:
        with tifffile.TiffFile(predicted / "maps" / f"lung_{i:02d}_score.tif") as tiff:
            page = tiff.pages.first
            assert (page.dtype, page.shape) == (np.float32, (128, 128))
            assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert page.tags["XResolution"].value[0] / page.tags["XResolution"].value[1] == pytest.approx(14.2)
            score = page.asarray()
        p_value = tifffile.imread(predicted / "maps" / f"lung_{i:02d}_pvalue.tif")
        mask = tifffile.imread(predicted / "maps" / f"lung_{i:02d}_mask.tif")
        foreground = tifffile.imread(crop / "foreground" / f"lung_{i:02d}.tif") > 0
        np.testing.assert_array_equal(np.isfinite(score), foreground)
        np.testing.assert_array_equal(np.isfinite(p_value), foreground)
        assert 0 < np.nanmin(p_value) <= np.nanmax(p_value) <= 1
        assert not mask[~foreground].any()
        with Image.open(predicted / "maps" / f"lung_{i:02d}_overlay.png") as overlay:
            picture = np.asarray(overlay)[:128, :128]  # the legend is below
        outline = picture[binary_dilation(mask > 0) & (mask == 0)]
        assert (outline == OUTLINE).all()


def test_highest_finding_of_each_nodule_slice_is_the_nodule(predicted):
    rows = read_rows(predicted / "detections.csv")
    nodule = tifffile.imread(CROP / "nodule.tif") > 0
    for i in NODULE_PAGES:
        first = next(row for row in rows if row["filename"] == f"lung_{i:02d}.tif")
        assert first["label"] == "1"
        assert nodule[i, int(first["y"]), int(first["x"])]


def test_detections_agree_with_the_maps(predicted):
    threshold = json.loads((predicted / "summary.json").read_text())["pixel_threshold"]
    for row in read_rows(predicted / "detections.csv"):
        base = predicted / "maps" / row["filename"].removesuffix(".tif")
        score, mask = tifffile.imread(f"{base}_score.tif"), tifffile.imread(f"{base}_mask.tif")
        assert score[int(row["y"]), int(row["x"])] == np.float32(row["peak_score"]) > threshold
        y, x, h, w = (int(row[f"box_{k}"]) for k in ("y", "x", "height", "width"))
        assert np.count_nonzero(mask[y : y + h, x : x + w]) >= int(row["area_px"])


@pytest.mark.slow
def test_an_image_scores_the_same_in_calibration_prediction_and_evaluation(run, crop, tmp_path):
    call("pulmo_jax.predict", f"run={run}", f"input={crop / 'val'}", f"output={tmp_path}")
    images = json.loads((tmp_path / "summary.json").read_text())["images"]
    predicted = {image["filename"]: image["image_score"] for image in images}
    calibrated = json.loads((run / "calibration.json").read_text())["normal_statistics"]["values"]

    classes = tmp_path / "classes"
    classes.mkdir()
    (classes / "normal").symlink_to(crop / "val")
    evaluated = tmp_path / "evaluated"
    arguments = [f"data.test={classes}", f"data.foreground={masks_below(classes, crop)}", "evaluation.replicates=20"]
    call("pulmo_jax.evaluate", f"run={run}", *arguments, f"hydra.run.dir={evaluated}")
    for row in read_rows(evaluated / "image_scores.csv"):
        assert float(row["autoencoder"]) == pytest.approx(predicted[Path(row["filename"]).name], rel=1e-6)
    rows = read_rows(evaluated / "image_scores.csv")
    for name in set(STATISTICS) - {"area"}:  # whose threshold leaves out the image in calibration
        np.testing.assert_allclose(sorted(float(row[name]) for row in rows), sorted(calibrated[name]), rtol=1e-6)
        assert min(float(row[f"p_{name}"]) for row in rows) == pytest.approx(2 / 5)


@pytest.mark.slow
def test_a_finished_run_is_evaluated_by_another_statistic(run, crop, tmp_path):
    test = [f"data.test={crop / 'test'}", f"data.test_masks={crop / 'test_masks'}", "evaluation.replicates=20"]
    call("pulmo_jax.evaluate", f"run={run}", *test, "image_statistic=mean", f"hydra.run.dir={tmp_path}")
    now, then = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, run))
    assert now["calibration"]["image_statistic"] == "mean"
    assert now["image"]["autoencoder"] == then["image"]["autoencoder, mean"]
    assert now["image"]["autoencoder, combined"] == then["image"]["autoencoder"]
    assert now["pixel"] == then["pixel"]


def masks_below(classes, crop):
    """Foreground masks under the same relative names as the images."""
    masks = classes.parent / "masks"
    masks.mkdir()
    (masks / "normal").symlink_to(crop / "foreground")
    return masks


@pytest.mark.slow
def test_evaluation_with_masks_repeats_what_training_found(run, crop, tmp_path):
    test = [f"data.test={crop / 'test'}", f"data.test_masks={crop / 'test_masks'}", "evaluation.replicates=20"]
    call("pulmo_jax.evaluate", f"run={run}", *test, f"hydra.run.dir={tmp_path}")
    now, then = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, run))
    assert now["pixel"] == then["pixel"]
    assert now["image"] == then["image"]
    assert "autoencoder" in (tmp_path / "metrics.md").read_text()
    assert f"{now['pixel']['autoencoder']['auroc']['value']:.3f}" in (tmp_path / "report.html").read_text()


def test_a_run_compared_with_itself_has_its_own_figures(run, tmp_path):
    """And the report says how it was made, as that of the run does."""
    call("pulmo_jax.compare", run, run, f"output={tmp_path / 'out'}", "replicates=20", "seed=0")
    found, own = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", run))
    for name in own["pixel"]:  # the method and the baselines
        row = found["figures"][found["reference"] if name == "autoencoder" else name]
        for figure in ("auroc", "ap", "sensitivity"):
            assert row[figure]["value"] == pytest.approx(own["image"][name][figure]["value"], rel=1e-12)
        for figure in ("auroc", "aupro", "dice"):
            assert row[f"pixel_{figure}"]["value"] == pytest.approx(own["pixel"][name][figure]["value"], rel=1e-12)
    same = next(iter(found["differences"].values()))
    assert {e["value"] for e in same.values()} == {0.0}
    cost = next(iter(found["runs"].values()))
    assert cost["parameters"] == own["training"]["parameters"] > 1000
    for folder, verb in ((tmp_path / "out", "compare"), (run, "train")):
        page = (folder / "report.html").read_text()
        assert f"python -m pulmo_jax.{verb} " in page[page.index("How this was made") :]
        assert json.loads((folder / "run.json").read_text())["command"].startswith(f"python -m pulmo_jax.{verb} ")


def test_volume_is_predicted_in_its_place(run, crop, tmp_path):
    slices = np.stack([tifffile.imread(crop / "test" / f"lung_{i:02d}.tif") for i in SETS["test"]])
    affine = np.array([[-0.7, 0, 0, 90], [0, 0.7, 0, -80], [0, 0, 1.5, 40], [0, 0, 0, 1]])
    nibabel.Nifti1Image(slices.transpose(2, 1, 0), affine).to_filename(tmp_path / "lungs.nii.gz")
    output = tmp_path / "out"
    arguments = ["pulmo_jax.predict", f"run={run}", f"input={tmp_path / 'lungs.nii.gz'}", f"output={output}"]
    said = call(*arguments, "output.format=nifti").stdout
    score = nibabel.load(output / "maps" / "lungs_score.nii.gz")
    np.testing.assert_array_equal(score.affine, nibabel.load(tmp_path / "lungs.nii.gz").affine)
    assert score.shape == slices.transpose(2, 1, 0).shape
    images, rows = read_rows(output / "image_scores.csv"), read_rows(output / "findings_3d.csv")
    normal = json.loads((run / "calibration.json").read_text())["normal_statistics"]["values"]["max"]
    for k, image in enumerate(images):
        higher = sum(value >= np.nanmax(score.dataobj[..., k]) for value in normal)
        assert float(image["p_max"]) == pytest.approx((1 + higher) / (1 + len(normal)))
    anomalous = sum(image["anomalous"] == "yes" for image in images)
    found = len(read_rows(output / "detections.csv"))
    last = said.splitlines()[-1]
    assert last.endswith(f"{anomalous} of {len(slices)} images anomalous ({found} findings)")
    assert last.startswith(f"{len(rows)} findings across the slices of 1 volumes; ")
    assert 0 < len(rows) <= found


def test_second_prediction_does_nothing_again_and_one_bad_file_loses_no_other(run, crop, tmp_path):
    images = tmp_path / "images"
    output = images / "results"  # is not taken for input by the second call
    images.mkdir()
    for i in SETS["test"]:
        (images / f"lung_{i:02d}.tif").write_bytes((crop / "test" / f"lung_{i:02d}.tif").read_bytes())
    whole = (images / "lung_13.tif").read_bytes()
    (images / "lung_13.tif").write_bytes(whole[: len(whole) // 2])
    arguments = ["pulmo_jax.predict", f"run={run}", f"input={images}", f"output={output}"]
    first = call(*arguments, status=3)
    assert "lung_13.tif" in first.stderr
    assert "Traceback" not in first.stderr
    failed = json.loads((output / "summary.json").read_text())["failed"]
    assert [file["filename"] for file in failed] == ["lung_13.tif"]
    before = {p: p.stat().st_mtime_ns for p in (output / "maps").iterdir()}
    assert len(before) == 4 * (len(SETS["test"]) - 1)

    (images / "lung_13.tif").write_bytes(whole)
    second = call(*arguments)
    assert "4 of them earlier" in " ".join(second.stdout.split())
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert np.isfinite(tifffile.imread(output / "maps" / "lung_13_score.tif")).any()


@pytest.mark.slow
def test_interrupted_run_goes_on_as_if_nothing_had_happened(crop, tmp_path):
    """By the warning of a scheduler, whose time is nearly up."""
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    steps = ["trainer.steps=40", "trainer.log_every=2", "trainer.validate_every=10", *gate(6, tmp_path / "go")]
    (tmp_path / "go" / "whole").mkdir(parents=True)
    call(*train_arguments(crop, whole, *steps))
    with child.start(*train_arguments(crop, broken, *steps), log=log) as process:
        child.wait_until(lambda: count_lines(broken / "metrics.jsonl") >= 3, process, log)
        process.send_signal(signal.SIGUSR1)
        process.wait(timeout=child.PATIENCE_S)
    assert process.returncode == 128 + signal.SIGUSR1, log.read_text()
    assert "Traceback" not in log.read_text()
    assert "continue with resume=true" in log.read_text()
    assert count_lines(broken / "metrics.jsonl") in (3, 4)
    again = ["pulmo_jax.train", "+experiment=lung", *SMALL, *steps]  # without data.train: the run knows its images
    call(*again, f"hydra.run.dir={broken}", "resume=true")
    for name in ("metrics.jsonl", "calibration.json", "baselines.json"):
        assert (whole / name).read_text() == (broken / name).read_text()


@pytest.mark.slow
def test_two_processes_train_what_one_does(crop, tmp_path):
    """Over loopback; each reads its share of every batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, two, steps = tmp_path / "one", tmp_path / "two", ["trainer.steps=40", "trainer.log_every=2"]
    call(*train_arguments(crop, one, *steps))
    shared = [f"cluster.coordinator=127.0.0.1:{port}", "cluster.processes=2"]
    command = train_arguments(crop, two, *steps, *shared)
    logs = [tmp_path / f"log{process}" for process in range(2)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(child.start(*command, f"cluster.process={number}", log=log))
            for number, log in enumerate(logs)
        ]
        statuses = [process.wait(timeout=child.PATIENCE_S) for process in processes]
    assert statuses == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    alone, together = (read_losses(folder / "metrics.jsonl") for folder in (one, two))
    assert alone.keys() == together.keys()
    assert len(alone) > 20
    np.testing.assert_allclose([*together.values()], [*alone.values()], rtol=1e-4)
    thresholds = [json.loads((run / "calibration.json").read_text())["pixel_threshold"] for run in (one, two)]
    assert thresholds[1]["value"] == pytest.approx(thresholds[0]["value"], rel=1e-2)


def read_losses(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["step"], name): row[name] for row in rows for name in row if name.endswith("loss")}


def count_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_run_is_never_overwritten(run, crop):
    again = call(*train_arguments(crop, run), status=2)
    assert "resume=true" in again.stderr


@pytest.mark.slow
def test_unreadable_training_file_stops_before_training_or_is_left_out(crop, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in SETS["train"]:
        (images / f"lung_{i:02d}.tif").write_bytes((crop / "train" / f"lung_{i:02d}.tif").read_bytes())
    (images / "zz_damaged.tif").write_bytes(b"II*\0 this is no image")
    arguments = ["pulmo_jax.train", "+experiment=lung", f"data.train={images}", *SMALL, "trainer.steps=2"]
    stopped = call(*arguments, f"hydra.run.dir={tmp_path / 'a'}", status=2)
    assert "zz_damaged.tif" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    call(*arguments, f"hydra.run.dir={tmp_path / 'b'}", "data.on_error=skip")
    listed = json.loads((tmp_path / "b" / "images.json").read_text())
    assert [file["name"] for file in listed["skipped"]] == ["zz_damaged.tif"]
    assert len(listed["training"]) + len(listed["validation"]) == len(SETS["train"])


@pytest.mark.slow
def test_users_own_experiment_and_callback(crop, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nname: mine\nplugins: [mine_callbacks]\ntrainer: {steps: 4}\n"
        "callbacks: {count: {_target_: mine_callbacks.Count, path: counted.txt}}\n"
    )
    (tmp_path / "mine_callbacks.py").write_text(
        "from pathlib import Path\n"
        "class Count:\n"
        "    def __init__(self, path: str): self.path, self.n = Path(path), 0\n"
        "    def on_start(self, start): pass\n"
        "    def on_event(self, event): self.n += 1\n"
        "    def on_end(self): self.path.write_text(str(self.n))\n"
    )
    arguments = [f"data.train={crop / 'train'}", *SMALL, f"hydra.run.dir={tmp_path / 'run'}"]
    call("pulmo_jax.train", "--config-dir", "conf", "+experiment=mine", *arguments, cwd=tmp_path)
    assert (tmp_path / "counted.txt").read_text() == "4"


def test_python_gives_the_maps_and_findings_of_predict(run, crop, predicted):
    """From a path, which takes the run's mask, and from an array with its foreground."""
    opened, name = pj.open_run(run), "lung_15"
    mask = tifffile.imread(crop / "foreground" / f"{name}.tif") > 0
    rows = [row for row in read_rows(predicted / "detections.csv") if row["filename"] == f"{name}.tif"]
    summary = json.loads((predicted / "summary.json").read_text())["images"]
    written = next(image for image in summary if image["filename"] == f"{name}.tif")
    pixels = tifffile.imread(crop / "test" / f"{name}.tif")
    for result in (opened.predict(crop / "test" / f"{name}.tif"), opened.predict(pixels, mask)):
        for kind, values in (("score", result.score), ("pvalue", result.p_value)):
            np.testing.assert_allclose(values, tifffile.imread(predicted / "maps" / f"{name}_{kind}.tif"), rtol=1e-6)
        np.testing.assert_array_equal(result.mask, tifffile.imread(predicted / "maps" / f"{name}_mask.tif") > 0)
        assert [(f.label, f.y, f.x, f.area_px) for f in result.findings] == [
            tuple(int(row[key]) for key in ("label", "y", "x", "area_px")) for row in rows
        ]
        assert result.image_score == pytest.approx(written["image_score"], rel=1e-6)
        assert result.image_p_value == pytest.approx(written["image_p_value"], rel=1e-6)
        assert result.anomalous == written["anomalous"]
        assert f"{len(rows)} findings" in result._repr_html_()


def test_python_refuses_images_that_the_run_is_not_for(run, tmp_path):
    opened = pj.open_run(run)
    with pytest.raises(InputError, match=r"3 bands of float32, but the run was trained on 1 of uint16"):
        opened.predict(np.zeros((40, 40, 3), np.float32))
    with pytest.raises(InputError, match=r"the image has shape \(0, 3\); give an array \(H, W\)"):
        opened.predict(np.zeros((0, 3)))
    with pytest.raises(InputError, match=r"nothing\.tif: does not exist; give one image"):
        opened.predict(tmp_path / "nothing.tif")
    with pytest.raises(InputError, match=r"no config\.yaml there; give the directory"):
        pj.open_run(tmp_path)


@pytest.mark.slow
def test_python_trains_and_evaluates_as_the_verbs_do(crop, run, tmp_path):
    """The same run, made from Python, has the same checkpoint and thresholds; and the same figures of merit."""
    keys = dict(argument.split("=", 1) for argument in SMALL)
    data = {f"data.{name}": crop / name for name in ("train", "val", "foreground", "test", "test_masks")}
    typed = {key: OmegaConf.create(f"v: {value}").v for key, value in keys.items()}
    made = pj.train("lung", {**typed, **data, "trainer.steps": 120, "hydra.run.dir": tmp_path / "made"})
    assert (made.path / "calibration.json").read_text() == (run / "calibration.json").read_text()
    tested = {"data.test": crop / "test", "data.test_masks": crop / "test_masks", "evaluation.replicates": 20}
    metrics = pj.evaluate(made, tested, out_dir=tmp_path / "out")
    assert metrics["pixel"] == json.loads((run / "metrics.json").read_text())["pixel"]
    assert (tmp_path / "out" / "report.html").is_file()
