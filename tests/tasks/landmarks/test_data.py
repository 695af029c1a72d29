"""Classes from names and folders, and what a blank image does to a calibration."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pulmo_jax.data.images import index_images
from pulmo_jax.evaluation.landmark_quality import SurpriseModel, fit_surprise
from pulmo_jax.host.console import Console
from pulmo_jax.inference.locate import Positions
from pulmo_jax.tasks.landmarks.calibration import calibrate, surprises
from pulmo_jax.tasks.landmarks.config import LandmarkDataConfig
from pulmo_jax.tasks.landmarks.data import Labelled, classes_of, read_sets, read_working
from pulmo_jax.types import InputError

DEFAULT = LandmarkDataConfig().class_regex


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["Normal-1.png", "COVID-12.png", "Normal-3.png", "COVID (4).png"], ["Normal", "COVID", "Normal", "COVID"]),
        (["Normal/0001.png", "COVID/0002.png"] * 2, ["Normal", "COVID"] * 2),
        (["a/Normal/IM_1.png", "a/COVID/IM_2.png"] * 2, ["Normal", "COVID"] * 2),
        (["train/Normal-1.png", "train/COVID-2.png"] * 2, ["Normal", "COVID"] * 2),
        (["0001.png", "0002.png"], ["", ""]),
        ([f"{letter}.png" for letter in "abcdefghijklmnopqrst"], [""] * 20),
    ],
)
def test_classes_are_of_names_or_of_folders(names, classes):
    assert list(classes_of(names, DEFAULT)) == classes


def pictures(folder, count):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        smooth = np.asarray(Image.fromarray(rng.uniform(0, 255, (4, 4)).astype(np.float32)).resize((32, 32)))
        Image.fromarray(smooth.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def test_images_of_one_gray_set_no_limit(tmp_path):
    folder = pictures(tmp_path / "images", 20)
    for name in ("blank1.png", "blank2.png"):
        Image.fromarray(np.full((32, 32), 9, np.uint8)).save(folder / name)
    refs, _ = index_images(folder)
    working, skipped = read_working(refs, 32, 64, 2, lambda items, _: items)
    assert not skipped
    look: SurpriseModel = fit_surprise(jnp.asarray(working.pixels[:20]))
    unlike = surprises(look, working.pixels)
    assert np.isinf(unlike[20:]).all()
    points = np.random.default_rng(1).uniform(5, 25, (22, 3, 2))
    labelled = Labelled(working, points, tuple(str(i) for i in range(22)), ("",) * 22)
    covariance = np.broadcast_to(np.eye(2), (22, 3, 2, 2)).astype(np.float32)
    located = Positions((points + 1).astype(np.float32), covariance)
    found = calibrate(located, labelled, unlike)
    assert found.surprise_limit == pytest.approx(unlike[:20].max())
    with pytest.raises(InputError, match="none of the 22 validation images has any contrast"):
        calibrate(located, labelled, np.full(22, np.inf))


def test_tables_in_shares_give_the_sets_that_px_give(tmp_path):
    """Training, validation and test tables alike."""
    images, rng = pictures(tmp_path / "images", 9), np.random.default_rng(0)
    points = rng.uniform(0, 31, (9, 3, 2))
    for units in ("px", "fraction"):
        for j, name in enumerate(("train", "val", "test")):
            values = points if units == "px" else (points + 0.5) / 32
            rows = [f"{i:02d}.png," + ",".join(map(str, values[i].ravel())) for i in range(3 * j, 3 * j + 3)]
            (tmp_path / f"{units}_{name}.csv").write_text("\n".join(["filename,x1,y1,x2,y2,x3,y3", *rows]))
    px, shares = (
        read_sets(
            LandmarkDataConfig(
                images=images,
                units=units,
                **{name: tmp_path / f"{units}_{name}.csv" for name in ("train", "val", "test")},
            ),
            32,
            0,
            Console(quiet=True),
        )
        for units in ("px", "fraction")
    )
    for one, other in ((px.training, shares.training), (px.validation, shares.validation), (px.test, shares.test)):
        np.testing.assert_allclose(one.points, other.points, atol=1e-9)
