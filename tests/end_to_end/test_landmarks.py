"""Landmarks as a person trains, uses and tests them, on drawn chests; every call is a process of its own."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import Image
from references import child
from references.chest_phantoms import write_set
from references.pages import require_captions
from references.pictures import ink
from references.tiff_files import description
from scipy.stats import chi2

import pulmo_jax as pj
from pulmo_jax.data.landmark_table import read_landmarks
from pulmo_jax.data.working_images import read_working
from pulmo_jax.evaluation.landmark_degraded import move, turn
from pulmo_jax.evaluation.landmark_metrics import squared_distance
from pulmo_jax.tasks.landmarks.run import open_run
from pulmo_jax.types import InputError

K = 10
NET = [
    "method=landmark_net", "method.size=32", "model.stem_stride=2", "model.widths=[8,8,16]", "method.members=2",
    "trainer.batch_size=8", "trainer.steps=8", "trainer.validate_every=4", "trainer.checkpoint_every=4",
    "trainer.log_every=2",
]  # fmt: skip


def call(*arguments, status=0, draw=False):
    """Run a verb; returns what it printed."""
    done = child.run(*arguments, status=status, draw=draw)
    return done.stdout + done.stderr


def read(table):
    return list(csv.DictReader(table.read_text().splitlines()))


def points_of(row):
    return np.array([[float(row[f"{axis}{k + 1}"]) for axis in "yx"] for k in range(K)])


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("chests") / "set", {"train": 40, "val": 16, "test": 12})


def arguments(chests, run, *more):
    tables = [f"data.{name}={chests / name}.csv" for name in ("train", "val", "test")]
    return ["pulmo_jax.train", "+experiment=landmarks", f"data.images={chests / 'images'}", *tables,
            "evaluation.replicates=20", f"hydra.run.dir={run}", *more]  # fmt: skip


@pytest.fixture(scope="module")
def run(chests, tmp_path_factory):
    """A run by eigenpatches."""
    folder = tmp_path_factory.mktemp("runs") / "eigenpatch"
    text = call(*arguments(chests, folder), draw=True)
    assert "40 training and 16 validation images with 10 landmarks" in text
    return folder


@pytest.mark.slow
def test_a_run_beats_the_mean_shape_and_writes_what_a_report_needs(run):
    found = json.loads((run / "metrics.json").read_text())
    error = {name: of["px"]["mean"]["value"] for name, of in found["errors"].items()}
    assert list(error) == ["Eigenpatch", "mean shape", "ridge", "kernel ridge"]
    assert error["Eigenpatch"] < 0.4 * error["mean shape"]
    assert len(found["by_landmark"]) == K
    assert set(found["by_class"]) == {"Normal-test", "Shadow-test"}
    assert 0.8 < found["coverage"]["0.95"]["value"] <= 1
    rows = read(run / "landmark_errors.csv")
    assert len(rows) == 12 * K
    mean = np.mean([float(row["Eigenpatch"]) for row in rows])
    assert mean == pytest.approx(error["Eigenpatch"], rel=1e-5)
    page = (run / "report.html").read_text()
    for name in ("cumulative_errors", "error_by_landmark", "class_comparison", "coverage", "failures", "aligned"):
        assert ink(run / "figures" / f"{name}.png") > 0.02
    assert page.count("data:image/png") >= 7
    require_captions(run / "report.html")
    assert "ample data" not in page  # the images are the user's own


@pytest.mark.slow
def test_prediction_writes_the_users_own_columns_in_the_images_own_pixels(run, chests, tmp_path):
    """An image of twice the pixels, and one of another shape and depth, have their landmarks where they lie in them."""
    source, inside = chests / "images" / "Normal-test000.png", tmp_path / "in"
    (inside / "sub").mkdir(parents=True)
    pixels = np.asarray(Image.open(source))
    Image.fromarray(pixels).save(inside / "a.png")
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(inside / "sub" / "large.png")
    tifffile.imwrite(inside / "deep.tif", pixels.astype(np.uint16)[:, 8:-8] * 200)
    text = call(
        "pulmo_jax.predict", f"run={run}", f"input={inside}", f"output={tmp_path / 'out'}", "output.aligned=true"
    )
    assert "3 images finished" in text
    rows = {row["filename"]: row for row in read(tmp_path / "out" / "landmarks.csv")}
    assert set(rows) == {"a.png", "deep.tif", "sub/large.png"}
    points = {
        n: np.array([[float(row[f"{axis}{k + 1}"]) for axis in "yx"] for k in range(K)]) for n, row in rows.items()
    }
    truth = next(row for row in read(chests / "test.csv") if row["filename"] == source.name)
    expected = np.array([[float(truth[f"{axis}{k + 1}"]) for axis in "yx"] for k in range(K)])
    assert np.abs(points["a.png"] - expected).max() < 3
    np.testing.assert_allclose(points["sub/large.png"], 2 * points["a.png"] + 0.5, atol=0.5)
    np.testing.assert_allclose(points["deep.tif"], points["a.png"] - [0, 8], atol=2)
    assert all(float(rows["a.png"][f"std{k + 1}"]) > 0 for k in range(K))
    assert {rows["a.png"][f"quality{k + 1}"] for k in range(K)} <= {"ok", "low"}
    assert tifffile.imread(tmp_path / "out" / "aligned" / "deep.tif").dtype == np.uint16
    with Image.open(tmp_path / "out" / "overlays" / "sub" / "large.png") as overlay:
        assert (np.ptp(np.asarray(overlay), axis=-1) > 50).any()  # coloured marks on a gray image
    again = call("pulmo_jax.predict", f"run={run}", f"input={inside}", f"output={tmp_path / 'out'}", "aligned=true")
    assert "3 images finished (3 of them earlier)" in again


@pytest.mark.slow
def test_what_cannot_be_read_is_named_and_what_is_no_chest_is_of_low_quality(run, chests, tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    Image.fromarray(np.full((80, 80), 9, np.uint8)).save(inside / "gray.png")
    (inside / "broken.png").write_bytes((chests / "images" / "Normal-test000.png").read_bytes()[:300])
    Image.fromarray(np.array([[7]], np.uint8)).save(inside / "tiny.png")
    Image.open(chests / "images" / "Normal-test000.png").resize((12, 12)).save(inside / "small.png")
    chest = np.asarray(Image.open(chests / "images" / "Normal-test000.png")).astype(np.float32)
    tifffile.imwrite(inside / "sentinel.tif", np.where(chest < 40, np.float32(-3.4e38), chest))
    shutil.copy(chests / "images" / "Normal-test001.png", inside / "chest.png")
    text = call("pulmo_jax.predict", f"run={run}", f"input={inside}", f"output={tmp_path / 'out'}", "aligned=true",
                status=3)  # fmt: skip
    assert "broken.png" in text
    marks = {path.name: description(path) for path in (tmp_path / "out" / "aligned").iterdir()}
    assert "quality" not in marks.pop("chest.tif")
    assert set(marks.values()) == {"aligned by landmarks of low quality: 10 of 10"}
    rows = read(tmp_path / "out" / "landmarks.csv")
    (chest,) = (row for row in rows if row["filename"] == "chest.png")
    rows.remove(chest)
    assert [row["filename"] for row in rows] == ["gray.png", "sentinel.tif", "small.png", "tiny.png"]
    assert all(row[f"quality{k + 1}"] == "low" for row in rows for k in range(K))
    of_size = {"gray.png": 80, "sentinel.tif": 96, "small.png": 12, "tiny.png": 1}
    for row in rows:  # relative to the size of the image, no landmark is as certain as that of a chest
        for k in range(K):
            assert float(row[f"std{k + 1}"]) / of_size[row["filename"]] > float(chest[f"std{k + 1}"]) / 96
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["low_quality_images"] == ["gray.png", "sentinel.tif", "small.png", "tiny.png"]
    assert [file["filename"] for file in summary["failed"]] == ["broken.png"]


@pytest.mark.slow
def test_landmarks_in_images_unlike_the_training_images_have_errors_that_say_so(run, chests):
    """Of kinds that the calibration has not seen; on images like the training images hardly anything changes."""
    opened = open_run(run)
    before = replace(opened, calibration=replace(opened.calibration, doubt_surprise=(), doubt_variance=()))
    table = read_landmarks(chests / "test.csv", chests / "images")
    working, _ = read_working(table.refs, opened.size, 64, 1, lambda items, _: items)
    pixels, square, rng = np.array(working.pixels), working.to_square(table.points), np.random.default_rng(0)
    noise = pixels.mean() + pixels.std() * rng.normal(size=pixels.shape).astype(np.float32)
    kinds = {
        "like": (pixels, square),
        "noise alone": (noise, square),
        "turned": move(pixels, square, turn(120), (0, 0)),
    }
    kinds["negative, upside down"] = move(pixels.max() - pixels, square, np.diag([-1.0, 1.0]), (0, 0))

    def found(of, images, points):
        given = replace(working, pixels=np.asarray(images, np.float32))
        located, truth = of.find(given), working.to_images(points)
        inside = squared_distance(located.points, located.covariance, truth) < chi2.ppf(0.95, 2)
        return inside.mean(), np.median(located.std), located

    limits = np.array(opened.calibration.std_limits) / working.scales.mean()
    for name, (images, points) in kinds.items():
        (covered, std, old), (now_covered, now_std, new) = (found(of, images, points) for of in (before, opened))
        np.testing.assert_array_equal(old.points, new.points)
        np.testing.assert_array_equal(old.low, new.low)
        assert (new.std >= old.std * (1 - 1e-6)).all()
        assert (new.std >= limits * 0.99)[new.low].all()
        if name == "like":
            assert now_std == pytest.approx(std, rel=0.02)
            continue
        assert new.low.mean() > 0.9
        assert covered < 0.6
        assert now_covered > covered + 0.3
        assert now_std > 3 * std


@pytest.mark.slow
def test_a_run_compared_with_itself_has_its_own_errors(run, tmp_path):
    text = call("pulmo_jax.compare", run, run, f"output={tmp_path / 'out'}", "replicates=20")
    assert "Difference from" in text
    found, own = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "out", run))
    for name, errors in own["errors"].items():
        row = found["figures"][found["reference"] if name == "Eigenpatch" else name]
        assert row["mean_px"]["value"] == pytest.approx(errors["px"]["mean"]["value"], rel=1e-12)
        assert row["median_px_at_224"]["value"] == pytest.approx(errors["px_at_224"]["median"]["value"], rel=1e-12)
    same = next(iter(found["differences"].values()))
    assert {(e["value"], e["low"], e["high"]) for e in same.values()} == {(0.0, 0.0, 0.0)}


@pytest.mark.slow
def test_evaluate_gives_on_the_same_table_what_training_gave(run, chests, tmp_path):
    call("pulmo_jax.evaluate", f"run={run}", f"data.images={chests / 'images'}", f"data.test={chests / 'test.csv'}",
         f"hydra.run.dir={tmp_path / 'ev'}")  # fmt: skip
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (run, tmp_path / "ev"))
    of = [found["errors"]["Eigenpatch"]["px"]["mean"]["value"] for found in (before, after)]
    assert of[0] == pytest.approx(of[1], rel=1e-4)
    assert before["coverage"]["0.95"]["value"] == pytest.approx(after["coverage"]["0.95"]["value"], abs=0.01)
    header, *rows = (chests / "test.csv").read_text().splitlines()
    table = read_landmarks(chests / "test.csv", chests / "images")
    sides = {ref.name: (ref.shape[1], ref.shape[0]) * K for ref in table.refs}
    for name, whole in (("fraction", 1), ("percent", 100)):
        shares = [header]
        for row in rows:
            title, *cells = row.split(",")
            values = [(float(v) + 0.5) / side * whole for v, side in zip(cells, sides[title], strict=True)]
            shares.append(",".join([title, *map(str, values)]))
        (tmp_path / f"{name}.csv").write_text("\n".join(shares))
        given = [f"run={run}", f"data.images={chests / 'images'}", f"data.test={tmp_path / f'{name}.csv'}"]
        call("pulmo_jax.evaluate", *given, f"data.units={name}", f"hydra.run.dir={tmp_path / name}")
        found = json.loads((tmp_path / name / "metrics.json").read_text())["errors"]["Eigenpatch"]["px"]["mean"]
        assert found["value"] == pytest.approx(of[1], rel=1e-6)
    given[-1] = f"data.test={tmp_path / 'fraction.csv'}"
    assert "Set data.units=fraction" in call("pulmo_jax.evaluate", *given, f"hydra.run.dir={tmp_path / 'px'}", status=2)
    text = call("pulmo_jax.evaluate", f"run={run}", f"data.test={chests / 'images'}", status=2)
    assert "data.images must be given" in text


@pytest.mark.slow
def test_evaluation_leaves_out_what_it_is_told_to(run, chests, tmp_path):
    lines = (chests / "test.csv").read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join([*lines[:6], "gone.png," + lines[6].partition(",")[2]]))
    given = [f"run={run}", f"data.images={chests / 'images'}", f"data.test={tmp_path / 'some.csv'}"]
    text = call("pulmo_jax.evaluate", *given, f"hydra.run.dir={tmp_path / 'a'}", status=2)
    assert "some.csv: 1 of 6 rows cannot be used" in text
    call("pulmo_jax.evaluate", *given, "data.on_error=skip", "data.class_regex='^(.*)-'", "evaluation.replicates=20",
         "data.normal_name=Shadow", f"hydra.run.dir={tmp_path / 'b'}")  # fmt: skip
    found = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert found["test"]["images"] == 5
    assert set(found["by_class"]) == {"Normal", "Shadow"}
    assert set(found["class_shift"]) == {"Normal"}
    text = call("pulmo_jax.evaluate", *given, f"data.test_masks={chests / 'images'}", status=2)
    assert "unknown key data.test_masks" in text
    assert "the run is of task=landmarks; data.test_masks is for runs of task=anomalies" in text


@pytest.mark.slow
def test_a_refused_resume_leaves_the_run_as_it_was(run, chests):
    files = [path for path in run.rglob("*") if path.is_file() and ".hydra" not in path.parts]
    before = [path.read_bytes() for path in files]
    text = call(*arguments(chests, run), "resume=true", "seed=5", status=2)
    assert "resume=true: seed differ from the run" in text
    assert [path.read_bytes() for path in files] == before


@pytest.mark.slow
def test_a_changed_file_of_the_run_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "calibration.json").write_text((copy / "calibration.json").read_text().replace("1", "2", 1))
    with pytest.raises(InputError, match=r"calibration.json: has changed since training"):
        open_run(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.images=nowhere"], ["data.images=nowhere: does not exist"]),
        pytest.param(
            ["method=autoencoder"], ["is no landmark method", "eigenpatch, landmark_net"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["data.val=null", "data.test={train}"],
            ["40 images are in both the training and the test table"],
            marks=pytest.mark.slow,
        ),
        (["data.train={bad}"], ["bad.csv: 2 of 5 rows cannot be used", "gone.png", "data.on_error=skip"]),
    ],
)
def test_bad_input_is_named_and_nothing_is_left_behind(chests, tmp_path, changes, words):
    lines = (chests / "train.csv").read_text().splitlines()
    (tmp_path / "bad.csv").write_text(
        "\n".join([*lines[:4], "gone.png," + lines[5].partition(",")[2], lines[6].rpartition(",")[0] + ",left"])
    )
    given = [text.format(train=chests / "train.csv", bad=tmp_path / "bad.csv") for text in changes]
    text = call(*arguments(chests, tmp_path / "run"), *given, status=2)
    for word in words:
        assert word in text
    assert not (tmp_path / "run" / "finished.json").exists()


@pytest.mark.campaign  # two networks are compiled
def test_a_network_that_was_stopped_goes_on_to_the_same_end(chests, tmp_path):
    """Bit for bit: losses, and the landmarks that are found."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    call(*arguments(chests, whole, *NET))
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "8")  # as after a kill
    for name in ("finished.json", "metrics.json", "landmark_errors.csv"):
        (halves / name).unlink()
    text = call(*arguments(chests, halves, *NET, "resume=true"))
    assert "resuming after step 4" in text
    assert (whole / "metrics.jsonl").read_text() == (halves / "metrics.jsonl").read_text()
    rows = [json.loads((folder / "metrics.json").read_text())["errors"] for folder in (whole, halves)]
    assert rows[0] == rows[1]
    assert "LandmarkNetwork" in rows[0]


@pytest.mark.slow
def test_python_gives_the_landmarks_of_predict(run, chests, tmp_path):
    source = chests / "images" / "Normal-test000.png"
    call("pulmo_jax.predict", f"run={run}", f"input={source}", f"output={tmp_path / 'out'}")
    row, opened = read(tmp_path / "out" / "landmarks.csv")[0], pj.open_run(run)
    for result in (opened.predict(source), opened.predict(np.asarray(Image.open(source)))):
        np.testing.assert_allclose(result.points, points_of(row), rtol=1e-5)  # the table has fewer digits
        np.testing.assert_allclose(result.std, [float(row[f"std{k + 1}"]) for k in range(K)], rtol=1e-5)
        assert result.quality == tuple(row[f"quality{k + 1}"] for k in range(K))
        assert f"{K} landmarks with 95 % regions" in result._repr_html_()
    record = json.loads((tmp_path / "out" / "records" / f"{source.name}.json").read_text())
    np.testing.assert_allclose(opened.predict(source).points, record["points"], rtol=1e-6)
