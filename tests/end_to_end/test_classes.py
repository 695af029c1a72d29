"""Classes of images as a person trains, uses and tests them, on drawn slices; every call is a process of its own."""

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps
from references import child
from references.pages import first_line, require_captions
from references.pictures import ink
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

import pulmo_jax as pj
from pulmo_jax.data.synthetic_mri import write_slices
from pulmo_jax.host.console import Console
from pulmo_jax.methods.networks import SHARED
from pulmo_jax.tasks.classification.config import ClassifierDataConfig
from pulmo_jax.tasks.classification.data import read_classes
from pulmo_jax.tasks.classification.run import open_run
from pulmo_jax.training.checkpoint import Checkpoints
from pulmo_jax.types import InputError

COUNT = 48
SHORT_REPORT = ["evaluation.replicates=20", "evaluation.examples=2"]
LOOP = [
    "method.size=32", "trainer.folds=2", "trainer.members=1", "trainer.steps=6", "trainer.batch_size=4",
    "trainer.validate_every=3", "trainer.checkpoint_every=3", "trainer.log_every=2", *SHORT_REPORT,
]  # fmt: skip
NET = [*LOOP, "model.widths=[8,8]"]


def call(*arguments, status=0, draw=False):
    """Run a verb; returns what it printed."""
    done = child.run(*arguments, status=status, draw=draw, env={"COLUMNS": 200})
    return done.stdout + done.stderr


def train(root, run, *more, status=0, draw=False):
    return call("pulmo_jax.train", "+experiment=brain_mri", f"data.root={root}", *more, f"hydra.run.dir={run}",
                status=status, draw=draw)  # fmt: skip


def predict(run, images, out, status=0):
    return call("pulmo_jax.predict", f"run={run}", f"input={images}", f"output={out}", status=status)


def evaluate(run, images, out, *more, status=0):
    return call("pulmo_jax.evaluate", f"run={run}", f"data.test={images}", "evaluation.replicates=20",
                "evaluation.examples=2", *more, f"hydra.run.dir={out}", status=status)  # fmt: skip


def read(table):
    return list(csv.DictReader(table.read_text().splitlines()))


def figures_of(folder):
    return json.loads((folder / "metrics.json").read_text())["image"]


def contents(run):
    files = [path for path in run.rglob("*") if path.is_file() and ".hydra" not in path.parts]
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices") / "set"
    write_slices(folder, COUNT, seed=1)
    return folder


@pytest.fixture(scope="module")
def run(slices, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "net"
    text = train(slices, folder, *NET, draw=True)
    assert "48 images (21 no, 27 yes) in 42 groups; 2 networks and 2 on random splits" in text
    return folder


# --- training


@pytest.mark.slow
def test_a_run_tests_every_image_once_and_writes_what_a_report_needs(run, slices):
    assert list(figures_of(run)) == [
        "ClassifierNetwork", "file metadata", "majority class", "ClassifierNetwork, random split (leaks)",
        "file metadata, random split (leaks)",
    ]  # fmt: skip
    rows = read(run / "out_of_fold.csv")
    assert sorted(row["filename"] for row in rows) == sorted(
        path.relative_to(slices).as_posix() for path in slices.glob("*/*")
    )
    assert all(row["class"] == row["filename"].split("/")[0] for row in rows)
    folds = {group: {row["fold"] for row in rows if row["group"] == group} for group in {r["group"] for r in rows}}
    assert all(len(of) == 1 for of in folds.values())
    assert {row["fold"] for row in rows} == {"0", "1"}
    p = np.array([[float(row["p_no"]), float(row["p_yes"])] for row in rows])
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    right = np.mean([row["label"] == row["class"] for row in rows if not row["copy_of"]])
    assert figures_of(run)["ClassifierNetwork"]["accuracy"]["value"] == pytest.approx(right)
    page = (run / "report.html").read_text()
    for name in ("comparison", "roc_curves", "confusion_matrix", "reliability", "loss_curves", "saliency_right"):
        assert ink(run / "figures" / f"{name}.png") > 0.02
    assert page.count("data:image/png") >= 7
    require_captions(run / "report.html")
    assert "ample data" not in page  # the images are the user's own
    assert "classes.json" in json.loads((run / "finished.json").read_text())


@pytest.mark.slow
def test_files_that_are_copies_are_of_one_group(run, slices):
    """Those that were drawn as such: however saved, most are found, and what is another slice is hardly taken for
    one."""
    truth = {row["file"]: row["group"] for row in read(slices / "groups.csv")}
    groups = {row["filename"]: row["group"] for row in read(run / "out_of_fold.csv")}
    pairs = [(a, b) for a in truth for b in truth if a < b]
    copies = [groups[a] == groups[b] for a, b in pairs if truth[a] == truth[b]]
    others = [groups[a] == groups[b] for a, b in pairs if truth[a] != truth[b]]
    assert np.mean(copies) > 0.8
    assert np.mean(others) < 0.01


@pytest.mark.campaign
def test_copies_count_once(slices, tmp_path):
    """A sixth of the images five times over: the figures are those of the images, and the copies are told."""
    folder, run = tmp_path / "set", tmp_path / "run"
    shutil.copytree(slices, folder)
    for path in [*(slices / "no").iterdir()][:3]:
        for i in range(4):
            shutil.copy(path, folder / "no" / f"{path.stem} copy {i}{path.suffix}")
    shutil.copy(path, folder / "no" / f"{path.stem}_mask{path.suffix}")
    text = train(folder, run, *NET)
    assert text.count("left out: 1 mask") == 1
    rows = read(run / "out_of_fold.csv")
    assert len(rows) == COUNT + 12
    once = [row for row in rows if not row["copy_of"]]
    assert COUNT / 2 < len(once) <= COUNT
    assert all(row["copy_of"] in {other["filename"] for other in once} for row in rows if row["copy_of"])
    assert f"{len(rows) - len(once)} of {len(rows)} images are copies or near copies" in " ".join(text.split())

    def figures(some):
        truth, p = np.array([row["class"] == "yes" for row in some]), np.array([float(row["p_yes"]) for row in some])
        return [roc_auc_score(truth, p), log_loss(truth, p), accuracy_score(truth, [r["label"] == "yes" for r in some])]

    of = figures_of(run)["ClassifierNetwork"]
    found = [of[name]["value"] for name in ("auroc", "log_loss", "accuracy")]
    np.testing.assert_allclose(found, figures(once), atol=1e-5)
    assert np.abs(np.array(found) - figures(rows)).min() > 1e-3  # what it would be if they counted again
    test = json.loads((run / "metrics.json").read_text())["test"]
    assert sum(test["images"].values()) == len(once)
    assert test["copies"] == len(rows) - len(once)


@pytest.mark.slow
def test_a_run_that_is_there_stays_as_it_was(run, slices, tmp_path):
    before = contents(run)
    assert "already contains a run; resume=true continues it" in train(slices, run, *NET, status=2)
    text = train(slices, run, *NET, "resume=true", "seed=5", status=2)
    assert "resume=true: seed, images, classes, groups or folds differ from the run" in text
    shutil.copytree(slices, tmp_path / "fewer")
    (tmp_path / "fewer" / "no" / "slice 1.jpg").unlink()
    text = train(tmp_path / "fewer", run, *NET, "resume=true", status=2)
    assert "resume=true: images, classes, groups or folds differ from the run" in text
    assert contents(run) == before


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_end(run, slices, tmp_path):
    """Bit for bit: losses, parameters, and what is said of each image."""
    halves = tmp_path / "halves"
    shutil.copytree(run, halves)
    shutil.rmtree(halves / "checkpoints" / "6")  # as after a kill
    for name in ("finished.json", "classes.json", "out_of_fold.csv", "metrics.json"):
        (halves / name).unlink()
    assert "training has not finished" in predict(halves, slices, tmp_path / "out", status=2)
    assert "resuming after step 3" in train(slices, halves, *NET, "resume=true")
    one, other = (Checkpoints(folder / "checkpoints", read_only=True).record(6) for folder in (run, halves))
    assert one.arrays == other.arrays  # with their SHA-256
    assert len(one.arrays) > 10
    for name in ("metrics.jsonl", "out_of_fold.csv", "classes.json"):
        assert (run / name).read_text() == (halves / name).read_text()
    assert figures_of(run) == figures_of(halves)


@pytest.mark.slow
def test_a_store_trains_and_is_judged_as_its_folder(run, slices, tmp_path):
    store = tmp_path / "set.h5"
    text = call("pulmo_jax.ingest", f"input={slices}", f"output={store}")
    assert "the store contains 48 images in 42 groups" in text
    train(store, tmp_path / "run", *NET)
    assert (tmp_path / "run" / "out_of_fold.csv").read_text() == (run / "out_of_fold.csv").read_text()
    assert figures_of(tmp_path / "run") == figures_of(run)
    tables = []
    for name, images in (("store", store), ("folder", slices)):
        assert "48 images finished (0 of them earlier)" in predict(run, images, tmp_path / name)
        tables.append((tmp_path / name / "predictions.csv").read_text())
        assert len(list((tmp_path / name / "overlays").rglob("*.png"))) == COUNT
    assert tables[0] == tables[1]
    assert "48 of the 48 images are exact or near copies" in evaluate(run, store, tmp_path / "ev")
    assert figures_of(tmp_path / "ev")["ClassifierNetwork"] == figures_of(run)["ClassifierNetwork"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "title"),
    [
        pytest.param(
            ["method=anomaly", "method.latent=4", "method.width=4"], "AutoencoderAnomaly", marks=pytest.mark.campaign
        ),
        (["method=anomaly_gaussian"], "GaussianAnomaly"),
    ],
)
def test_a_model_of_the_normal_class_alone(slices, tmp_path, method, title):
    """A batch is larger than a fold has normal images."""
    run, one = tmp_path / "run", tmp_path / "in"
    train(slices, run, *LOOP, *method, "trainer.batch_size=16", "data.normal_name=yes", "trainer.repeats=2")
    of = figures_of(run)
    assert list(of)[:2] == [title, f"{title}, 2 repeats averaged"]
    assert np.isfinite(of[title]["auroc"]["value"])
    assert Counter(row["filename"] for row in read(run / "out_of_fold.csv")).most_common()[-1][1] == 2
    one.mkdir()
    shutil.copy(slices / "no" / "slice 1.jpg", one)
    predict(run, one, tmp_path / "out")
    (row,) = read(tmp_path / "out" / "predictions.csv")
    assert float(row["p_no"]) + float(row["p_yes"]) == pytest.approx(1)
    before = (run / "out_of_fold.csv").read_text()
    train(slices, run, *LOOP, *method, "trainer.batch_size=16", "data.normal_name=yes", "trainer.repeats=2",
          "resume=true")  # fmt: skip
    assert (run / "out_of_fold.csv").read_text() == before


@pytest.mark.slow
def test_features_of_a_network_that_is_not_trained(slices, tmp_path):
    """One network of features for all folds; on its own images the run is as good as its cross-validation said."""
    run, keys = tmp_path / "run", ["method=logistic", "method.sizes=[32,64]", "model.blocks=[2]"]
    keys += ["model.weights=null", "trainer.folds=3", "trainer.members=1", "trainer.leak=false", *SHORT_REPORT]
    text = train(slices, run, *keys)
    assert "computing features" in text
    of = figures_of(run)["LogisticFeatures"]
    opened = open_run(run)
    (chunk,) = opened.chunks
    assert chunk["kernel"].shape == (3, 2 * 24, 2)
    assert chunk[SHARED]["network"]["encoder"]["stem"]["kernel"].shape == (3, 3, 1, 32)
    evaluate(run, slices, tmp_path / "ev")
    again = figures_of(tmp_path / "ev")["LogisticFeatures"]
    assert again["log_loss"]["value"] == pytest.approx(of["log_loss"]["value"], rel=1e-4)
    predict(run, slices / "no", tmp_path / "out")
    row = read(tmp_path / "out" / "predictions.csv")[0]
    result = opened.predict(slices / "no" / row["filename"])
    assert result.saliency.max() > 0
    before = contents(run)
    train(slices, run, *keys, "resume=true")
    assert {
        path for path in contents(run) if contents(run)[path] != before.get(path) and path.suffix == ".csv"
    } == set()


@pytest.fixture(scope="module")
def three(slices, tmp_path_factory):
    """A third class, of slices in negative."""
    folder = tmp_path_factory.mktemp("three") / "set"
    shutil.copytree(slices, folder)
    (folder / "negative").mkdir()
    for path in sorted((slices / "yes").iterdir())[:12]:
        ImageOps.invert(Image.open(path).convert("L")).save(folder / "negative" / f"{path.stem}.png")
    return folder


@pytest.mark.campaign
def test_three_classes_and_one_part_held_out(three, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    train(three, run, *NET, "trainer.folds=1", "trainer.members=2", "data.group_regex='[0-9]+'")
    rows = read(run / "out_of_fold.csv")
    assert 6 <= len(rows) < 30
    assert {row["class"] for row in rows} == {"negative", "no", "yes"}
    assert not (run / "figures" / "roc_curves.png").exists()
    predict(run, three / "negative", out)
    assert list(read(out / "predictions.csv")[0])[:5] == ["filename", "label", "p_negative", "p_no", "p_yes"]
    text = evaluate(run, three, tmp_path / "ev")
    assert "60 of the 60 images are exact or near copies" in text
    assert f"{60 - len(rows)} images without such a network are excluded" in text
    assert figures_of(tmp_path / "ev")["ClassifierNetwork"]["accuracy"]["value"] == pytest.approx(
        figures_of(run)["ClassifierNetwork"]["accuracy"]["value"]
    )


@pytest.mark.campaign  # 160 slices are drawn
def test_drawn_slices_are_a_first_look(tmp_path):
    given = ["pulmo_jax.train", "+experiment=brain_mri", "data=synthetic_mri", f"data.cache={tmp_path / 'cache'}", *NET,
             "trainer.folds=1", "trainer.leak=false", f"hydra.run.dir={tmp_path / 'run'}"]  # fmt: skip
    text = call(*given)
    assert "drawing 160 synthetic slices (only once)" in text
    assert "synthetic slices: a demonstration, not evidence of accuracy" in text
    assert "160 images (60 no, 100 yes)" in text
    assert first_line(tmp_path / "run" / "report.html").startswith("Sample data: synthetic brain slices")
    assert "Sample data: synthetic brain slices" in (tmp_path / "run" / "metrics.md").read_text()
    text = call(*given, "resume=true", "trainer.steps=8")
    assert "drawing" not in text
    assert "resuming after step 6" in text
    images = tmp_path / "cache" / "synthetic_mri" / "no"
    assert "60 images finished" in predict(tmp_path / "run", images, tmp_path / "out")


# --- prediction


@pytest.mark.slow
def test_prediction_judges_draws_and_goes_on_where_it_stopped(run, slices, tmp_path):
    inside, out = tmp_path / "in", tmp_path / "out"
    (inside / "sub").mkdir(parents=True)
    whole = (slices / "no" / "slice 1.jpg").read_bytes()
    (inside / "a.png").write_bytes(whole)  # a JPEG by another name
    (inside / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((30, 20), 9, np.uint8)).save(inside / "sub" / "gray.png")
    text = predict(run, inside, out, status=3)
    assert "2 images finished (0 of them earlier)" in text
    assert "broken.jpg: cannot be read, it may be damaged or cut off" in text
    rows = read(out / "predictions.csv")
    assert list(rows[0]) == ["filename", "label", "p_no", "p_yes", "std_no", "std_yes"]
    assert [row["filename"] for row in rows] == ["a.png", "sub/gray.png"]
    for row in rows:
        p = {name: float(row[f"p_{name}"]) for name in ("no", "yes")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-6)
        assert row["label"] == max(p, key=p.__getitem__)
        with Image.open(out / "overlays" / row["filename"]) as overlay:
            assert min(overlay.size) > 20
    summary = json.loads((out / "summary.json").read_text())
    assert [file["filename"] for file in summary["failed"]] == ["broken.jpg"]
    table = (out / "predictions.csv").read_bytes()
    drawn = (out / "overlays" / "a.png").stat().st_mtime_ns
    (inside / "broken.jpg").write_bytes(whole)
    assert "3 images finished (2 of them earlier)" in predict(run, inside, out)
    assert (out / "overlays" / "a.png").stat().st_mtime_ns == drawn
    rows = {row.pop("filename"): row for row in read(out / "predictions.csv")}
    assert rows["broken.jpg"] == rows["a.png"]
    assert set(table.splitlines()) < set((out / "predictions.csv").read_bytes().splitlines())


@pytest.mark.slow
def test_a_changed_file_of_the_run_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "classes.json"
    path.write_text(path.read_text().replace('"no"', '"on"', 1))
    with pytest.raises(InputError, match=r"classes\.json: has changed since training"):
        open_run(tmp_path / "copy")


# --- evaluation


@pytest.mark.slow
def test_a_run_compared_with_itself_has_its_own_figures(run, tmp_path):
    call("pulmo_jax.compare", run, run, f"output={tmp_path / 'out'}", "replicates=20")
    found, own = json.loads((tmp_path / "out" / "metrics.json").read_text()), figures_of(run)
    for name in ("ClassifierNetwork", "file metadata"):
        row = found["figures"][found["reference"] if name == "ClassifierNetwork" else name]
        for figure in ("auroc", "ap", "accuracy", "sensitivity", "log_loss"):
            assert row[figure]["value"] == pytest.approx(own[name][figure]["value"], rel=1e-12)
    same = next(iter(found["differences"].values()))
    assert {(e["value"], e["low"], e["high"]) for e in same.values()} == {(0.0, 0.0, 0.0)}


@pytest.mark.slow
def test_on_its_own_images_a_run_is_as_good_as_its_cross_validation_said(run, slices, tmp_path):
    """For no network judges what it has learnt from."""
    text = evaluate(run, slices, tmp_path)
    assert "48 of the 48 images are exact or near copies" in text
    assert list(figures_of(tmp_path)) == ["ClassifierNetwork"]  # the baselines have learnt from all of them
    assert figures_of(tmp_path)["ClassifierNetwork"] == figures_of(run)["ClassifierNetwork"]
    assert (tmp_path / "report.html").read_text().count("data:image/png") >= 4


@pytest.mark.slow
def test_on_other_images_all_networks_judge_and_baselines_stand_beside(run, slices, tmp_path):
    other = tmp_path / "other"
    write_slices(other, 20, seed=7)
    text = evaluate(run, other, tmp_path / "a")
    assert "copies, exact or nearly" not in text
    assert list(figures_of(tmp_path / "a")) == ["ClassifierNetwork", "file metadata", "majority class"]
    predict(run, other, tmp_path / "out")
    found = read_classes(other, ClassifierDataConfig(), 32, Console(quiet=True))
    once = {found.titles[i] for i in found.counted_as(near_bits=6)}
    assert len(once) < 20
    rows = [row for row in read(tmp_path / "out" / "predictions.csv") if row["filename"] in once]
    right = [row["label"] == row["filename"].split("/")[0] for row in rows]
    assert figures_of(tmp_path / "a")["ClassifierNetwork"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    shutil.copy(slices / "no" / "slice 1.jpg", other / "yes" / "called yes.jpg")
    text = evaluate(run, other, tmp_path / "b")
    assert "1 of the 21 images are exact or near copies" in text
    assert "1 images have another class than in the run, such as yes/called yes.jpg (was no)" in text
    shutil.rmtree(other / "no")
    evaluate(run, other, tmp_path / "c")  # of one class alone
    figures = figures_of(tmp_path / "c")["ClassifierNetwork"]
    assert figures["auroc"]["value"] is None
    assert figures["auroc"]["reason"]
    (other / "maybe").mkdir()
    shutil.copy(slices / "no" / "slice 17.jpg", other / "maybe")
    assert ": the normal class of" in evaluate(run, other, tmp_path / "d", "data.normal_name=yes", status=2)
    text = evaluate(run, other, tmp_path / "d", status=2)
    assert "has classes that are not in the run (maybe); the run has no, yes: rename or remove the folders" in text
    assert not (tmp_path / "d" / "metrics.json").exists()


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.root=null"], ["data.root must be given", "a folder with one subfolder of images for each class",
                              "Brain MRI Images for Brain Tumor Detection", "Kaggle", "data=synthetic_mri"]),
        pytest.param(["data.root=nowhere"], ["data.root=nowhere: does not exist"], marks=pytest.mark.slow),
        pytest.param(["data.root={set}/no"], ["images are in no class subfolder"], marks=pytest.mark.slow),
        pytest.param(["data.root={set}/groups.csv"], ["is a file; give a folder of images or a store"],
                     marks=pytest.mark.slow),
        pytest.param(["method=autoencoder"], ["is no classifier", "classifier, logistic"], marks=pytest.mark.slow),
        pytest.param(["method=anomaly", "data.normal_name=healthy"],
                     ["data.normal_name=healthy: is not one of the classes, no, yes"], marks=pytest.mark.slow),
        pytest.param(["trainer.folds=30"], ["class no has", "too few for trainer.folds=30"], marks=pytest.mark.slow),
        pytest.param(["data.root={three}", "method=anomaly"], ["an anomaly method needs two classes, but there are 3"],
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_left_behind(slices, request, tmp_path, changes, words):
    folders = {"set": slices}
    if "{three}" in changes[0]:
        folders["three"] = request.getfixturevalue("three")
    given = [change.format(**folders) for change in changes]
    root = next((change for change in given if change.startswith("data.root=")), f"data.root={slices}")
    rest = [change for change in given if change != root]
    text = call("pulmo_jax.train", "+experiment=brain_mri", root, *rest, f"hydra.run.dir={tmp_path / 'run'}", status=2)
    for word in words:
        assert word in text
    assert not list((tmp_path / "run").glob("*.json"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_python_gives_the_probabilities_of_predict(run, slices, tmp_path):
    source = sorted((slices / "yes").iterdir())[0]
    predict(run, source, tmp_path / "out")
    row, opened = read(tmp_path / "out" / "predictions.csv")[0], pj.open_run(run)
    for result in (opened.predict(source), opened.predict(np.asarray(Image.open(source)))):
        assert result.label == row["label"]
        for name in ("no", "yes"):
            assert result.probabilities[name] == pytest.approx(float(row[f"p_{name}"]), rel=1e-6)
            assert result.std[name] == pytest.approx(float(row[f"std_{name}"]), rel=1e-5)
        assert result.saliency.shape == result.image.shape
        assert 0 <= result.saliency.min() <= result.saliency.max() <= 1
        assert f"{row['label']}" in result._repr_html_()
