"""Images in the lung frame, from a landmark run to findings in the pixels of the images that they were."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from references import child
from references.chest_phantoms import phantom, write_set
from references.tiff_files import description

from pulmo_jax.data.images import index_images
from pulmo_jax.host.console import Console
from pulmo_jax.host.outputs import output_folder
from pulmo_jax.tasks.anomalies.aligning import Masks, align_folder, low_quality_notes
from pulmo_jax.tasks.landmarks.run import open_run
from pulmo_jax.types import InputError

pytestmark = pytest.mark.slow  # its parts have quick tests of their own

SHAPE = (96, 96)


def call(*arguments, status=0):
    """Run a verb; returns what it printed."""
    done = child.run(*arguments, status=status, env={"COLUMNS": 200})
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory) -> Path:
    """A run that finds the ten points of drawn chests."""
    chests = write_set(tmp_path_factory.mktemp("chests") / "set", {"train": 40, "val": 16})
    run = tmp_path_factory.mktemp("runs") / "landmarks"
    tables = [f"data.{name}={chests / name}.csv" for name in ("train", "val")]
    call("pulmo_jax.train", "+experiment=landmarks", f"data.images={chests / 'images'}", *tables,
         "evaluation.replicates=20", f"hydra.run.dir={run}")  # fmt: skip
    return run


def draw(folder: Path, names: list[str], seed: int, lesion: bool = False) -> dict[str, np.ndarray]:
    """Chests in new poses; the landmarks of each. With a lesion, a bright spot lies at the eighth landmark."""
    rng, points = np.random.default_rng(seed), {}
    folder.mkdir(parents=True)
    for name in names:
        image, points[name] = phantom(rng, SHAPE)
        if lesion:
            distance = np.hypot(*(np.moveaxis(np.indices(SHAPE), 0, -1) - points[name][7] * [1, 1]).transpose(2, 0, 1))
            image = np.clip(image + 110 * np.exp(-((distance / 3) ** 2)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / name)
    return points


def test_what_lies_at_a_landmark_lies_at_the_landmark_of_the_frame(landmarks, tmp_path):
    """Masks show it: a square about the eighth landmark, and a foreground of the left half."""
    points = draw(tmp_path / "in", ["a.png", "b.png", "c.png"], seed=5)
    for name, truth in points.items():
        y, x = np.rint(truth[7]).astype(int)
        square, left = np.zeros((2, *SHAPE), np.uint8)
        square[y - 4 : y + 5, x - 4 : x + 5], left[:, : SHAPE[1] // 2] = 255, 255
        for folder, mask in (("squares", square), ("left", left)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(mask).save(tmp_path / folder / name)
    run, masks = open_run(landmarks), Masks(tmp_path / "left", tmp_path / "squares")
    done, failed = align_folder(run, tmp_path / "in", tmp_path / "out", "test", masks, 64, Console(quiet=True))
    assert not failed
    assert [image.name for image in done] == ["a.png.tif", "b.png.tif", "c.png.tif"]
    scale = run.frame.size / SHAPE[0]
    for image in done:
        truth = points[image.pages[0].name]
        np.testing.assert_allclose(image.points[0], truth, atol=3)
        square = tifffile.imread(tmp_path / "out" / "test_masks" / image.name) > 0
        assert np.abs(np.argwhere(square).mean(0) - run.frame.points[7]).max() < 4 * scale
        assert tifffile.imread(tmp_path / "out" / "test" / image.name).shape == (run.frame.size,) * 2
        left = tifffile.imread(tmp_path / "out" / "foreground" / image.name) > 0
        y, x = np.rint(run.frame.points).astype(int).T
        sides = truth[:, 1] - (SHAPE[1] - 1) / 2
        clear = np.abs(sides) > 6
        np.testing.assert_array_equal(left[y, x][clear], (sides < 0)[clear])


def test_a_mask_of_another_size_is_named(landmarks, tmp_path):
    draw(tmp_path / "in", ["a.png"], seed=1)
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.ones((5, 5), np.uint8)).save(tmp_path / "masks" / "a.png")
    run, masks = open_run(landmarks), Masks(tmp_path / "masks")
    with pytest.raises(InputError, match=r"masks/a\.png: the mask is \(1, 5, 5, 1\).*its image a\.png"):
        align_folder(run, tmp_path / "in", tmp_path / "out", "test", masks, 64, Console(quiet=True))


def test_nothing_is_warped_twice_and_nothing_stays_of_images_that_are_gone(landmarks, tmp_path):
    """One file of two pages, one of another size that cannot be read, and one that goes away."""
    inside, out = tmp_path / "in", tmp_path / "out"
    draw(inside, ["a.png", "gone.png"], seed=1)
    rng = np.random.default_rng(2)
    tifffile.imwrite(inside / "two.tif", np.stack([phantom(rng, SHAPE)[0] for _ in range(2)]))
    (inside / "cut.png").write_bytes((inside / "a.png").read_bytes()[:200])
    run = open_run(landmarks)

    def align():
        with output_folder(out, "predict"):
            return align_folder(run, inside, out, "images", Masks(), 64, Console(quiet=True))

    first, failed = align()
    assert [image.name for image in first] == ["a.tif", "gone.tif", "two.tif"]
    assert [file.name for file in failed] == ["cut.png"]
    assert tifffile.imread(out / "images" / "two.tif").shape == (2, run.frame.size, run.frame.size)
    assert tifffile.imread(out / "foreground" / "two.tif").shape == (2, run.frame.size, run.frame.size)
    made = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    (inside / "gone.png").unlink()
    Image.fromarray(phantom(rng, SHAPE)[0]).save(inside / "a.png")
    second, _ = align()
    changed = {path.name for path in (out / "images").iterdir() if path.stat().st_mtime_ns != made[path]}
    assert changed == {"a.tif"}
    assert [image.name for image in second] == ["a.tif", "two.tif"]
    np.testing.assert_allclose(second[1].points, first[2].points)
    refs, _ = index_images(out / "images", group_regex=r"^([a-z]+)\.(?:png|tif)$")
    assert [ref.group for ref in refs] == ["a", "two", "two"]  # the user's own names, and pages stay together


@pytest.mark.campaign
def test_a_spot_is_found_where_it_lies_in_the_image(landmarks, tmp_path):
    """Trained and predicted with the verbs, on images as they are."""
    draw(tmp_path / "normal", [f"n{i:02d}.png" for i in range(60)], seed=2)
    draw(tmp_path / "val", [f"v{i:02d}.png" for i in range(30)], seed=3)
    points = draw(tmp_path / "ill", [f"i{i}.png" for i in range(6)], seed=4, lesion=True)
    pages = [np.asarray(Image.open(tmp_path / "ill" / f"i{i}.png")) for i in (0, 1)]
    tifffile.imwrite(tmp_path / "ill" / "two.tif", np.stack(pages), photometric="minisblack")
    run = tmp_path / "run"
    text = call("pulmo_jax.train", "+experiment=lung_aligned", f"data.align_run={landmarks}", "data.patch_size=64",
                f"data.train={tmp_path / 'normal'}", f"data.val={tmp_path / 'val'}", f"hydra.run.dir={run}",
                "evaluation.replicates=20")  # fmt: skip
    assert "aligning train images" in text
    call("pulmo_jax.predict", f"run={run}", f"input={tmp_path / 'ill'}", f"output={tmp_path / 'out'}")
    assert tifffile.imread(tmp_path / "out" / "in_images" / "two_0001_score.tif").shape == SHAPE
    with (tmp_path / "out" / "in_images" / "detections.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert all(row["alignment"] in ("ok", "partly low", "low") for row in rows)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {image["alignment"] for image in summary["images"]} <= {"ok", "partly low", "low"}
    for name, truth in points.items():
        best = max((row for row in rows if row["filename"] == name), key=lambda row: float(row["peak_score"]))
        assert np.hypot(float(best["y"]) - truth[7][0], float(best["x"]) - truth[7][1]) < 6
        score = tifffile.imread(tmp_path / "out" / "in_images" / f"{Path(name).stem}_score.tif")
        assert score.shape == SHAPE
        peak = np.unravel_index(np.nanargmax(score), SHAPE)
        assert np.hypot(*(peak - truth[7])) < 6
    for table in ("image_scores.csv", "detections.csv"):  # in the lung frame, under the names of the input
        with (tmp_path / "out" / table).open() as file:
            assert {row["filename"] for row in csv.DictReader(file)} <= {*points, "two.tif"}
    again = call("pulmo_jax.predict", f"run={run}", f"input={tmp_path / 'ill'}", f"output={tmp_path / 'out'}")
    assert "8 images finished (8 of them earlier)" in again
    try:
        (landmarks / "finished.json").write_text((landmarks / "finished.json").read_text() + "\n")
        text = call(
            "pulmo_jax.predict", f"run={run}", f"input={tmp_path / 'ill'}", f"output={tmp_path / 'o'}", status=2
        )
    finally:
        (landmarks / "finished.json").write_text((landmarks / "finished.json").read_text()[:-1])
    assert "was trained again after the training images had been aligned with it" in text


def test_aligned_images_of_low_quality_are_marked(landmarks, tmp_path):
    """A chest, noise, and a file of both: in the list, in the file, and for the report."""
    draw(tmp_path / "in", ["chest.png"], seed=1)
    chest = np.asarray(Image.open(tmp_path / "in" / "chest.png"))
    noise = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "in" / "noise.png")
    tifffile.imwrite(tmp_path / "in" / "two.tif", np.stack([chest, noise]), photometric="minisblack")
    run, out = open_run(landmarks), tmp_path / "out"
    done, _ = align_folder(run, tmp_path / "in", out, "test", Masks(), 64, Console(quiet=True))
    assert [image.quality[0] for image in done[:2]] == ["ok", "low"]
    assert done[2].quality == ("ok", "low")
    listed = json.loads((out / "test.json").read_text())
    assert listed["noise.png.tif"]["alignment"] == ["low"]
    assert listed["two.tif.tif"]["low"] == [0, 10]
    marks = [description(out / "test" / image.name) for image in done]
    assert marks[1] == "aligned by landmarks of low quality: 10 of 10"
    assert marks[2].startswith("aligned by landmarks of low quality: 10 of 10 on page 1")
    assert "low quality" not in marks[0]
    assert tifffile.imread(out / "test" / "two.tif.tif").shape == (2, run.frame.size, run.frame.size)
    (note,) = low_quality_notes(out)
    assert note.startswith("2 of 4 test images are aligned by landmarks of low quality, so their scores are not to be")
    assert note.endswith("trusted: noise.png.tif, two.tif.tif")
    assert low_quality_notes(tmp_path / "nowhere") == []
    again, _ = align_folder(run, tmp_path / "in", out, "test", Masks(), 64, Console(quiet=True))
    assert [image.quality for image in again] == [image.quality for image in done]


def test_the_same_name_in_two_folders_is_refused(landmarks, tmp_path):
    draw(tmp_path / "train", ["a.png", "b.png", "c.png"], seed=1)
    draw(tmp_path / "val", ["a.png", "d.png"], seed=2)
    text = call("pulmo_jax.train", "+experiment=lung_aligned", f"data.align_run={landmarks}",
                f"data.train={tmp_path / 'train'}", f"data.val={tmp_path / 'val'}", f"hydra.run.dir={tmp_path / 'run'}",
                status=2)  # fmt: skip
    assert "a.png is in data.val and in data.train" in text
