"""Class folders as they are downloaded: masks beside their images, parts of a split, folders within a folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pulmo_jax.data.mask_files import split_off_masks
from pulmo_jax.data.store_writing import ingest_folder
from pulmo_jax.host.console import Console
from pulmo_jax.tasks.classification.config import ClassifierDataConfig
from pulmo_jax.tasks.classification.data import class_counts, read_classes
from pulmo_jax.tasks.classification.folders import check_folders
from pulmo_jax.types import InputError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PULMO_JAX_CACHE", str(tmp_path / "cache"))


def save(path, seed=None):
    """A smooth picture, or a mask without a seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((4, 4), np.uint8) if seed is None else np.random.default_rng(seed).integers(0, 255, (4, 4))
    Image.fromarray(pixels.astype(np.uint8)).resize((32, 32)).save(path)


def read(root, classes=None, **options):
    return read_classes(root, ClassifierDataConfig(**options), 32, Console(quiet=True), classes)


# --- masks


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a/x.png", "a/x_mask.png"),
        ("a/x (1).png", "a/x (1)_mask.png"),
        ("a/x (1).png", "a/x (1)_mask_1.png"),
        ("a/x (1).png", "a/x (1)_mask_12.png"),
        ("a/x.png", "a/x_MASK.PNG"),
        ("a/X.JPG", "a/x_Mask.png"),
        ("a/x.jpg", "a/x-mask.tif"),
        ("a/x.jpg", "a/x.mask.png"),
        ("a/x.jpg", "a/x mask.png"),
        ("a/x.png", "a/x_seg.png"),
        ("a/x.png", "a/x_segmentation.png"),
        ("a/x.png", "a/x_label.png"),
        ("a/x.png", "a/x_gt.bmp"),
        ("a/x.png", "a/x_GroundTruth.png"),
        ("a/p/x.png", "a/p/x_mask.png"),
        ("a/x.png", "a/masks/x.png"),
        ("a/images/x.png", "a/masks/x.png"),
        ("a/images/x.png", "a/Binary Masks/x_mask.png"),
        ("a/p/images/x.png", "a/p/mask/x.png"),
    ],
)
def test_a_mask_beside_its_image_is_found(image, mask):
    assert split_off_masks([image, mask, "b/other.png"]) == {mask: image}


@pytest.mark.parametrize(
    "names",
    [
        ["a/x_mask.png"],  # no image beside it
        ["a/x_mask.png", "b/x.png"],  # in another class
        ["a/x_mask.png", "a/x_1.png"],
        ["a/unmask.png", "a/un.png"],  # a word of its own
        ["a/xmask.png", "a/x.png"],
        ["a/x_masked.png", "a/x.png"],
        ["a/x_1.png", "a/x.png"],
        ["a/mask.png", "a/x.png"],
        ["with_mask/with_mask_1.jpg", "without_mask/without_mask_1.jpg"],  # faces
        ["mask/0.png", "no mask/0.png"],  # classes
        ["a/masks/y.png", "a/images/x.png"],
    ],
)
def test_what_has_no_image_beside_it_is_no_mask(names):
    assert split_off_masks(names) == {}


@pytest.mark.parametrize("stored", [False, True])
def test_masks_are_left_out_and_counted_on_one_line(tmp_path, stored):
    root = tmp_path / "busi"
    for k, name in enumerate(("benign", "normal")):
        for i in range(3):
            save(root / name / f"{name} ({i}).png", 10 * k + i)
            save(root / name / f"{name} ({i})_mask.png")
    save(root / "benign" / "benign (1)_mask_1.png")
    save(root / "benign" / "lonely_mask.png", 99)
    if stored:
        ingest_folder(root, tmp_path / "set.h5", group_regex=None, near_bits=6, threads=1, max_image_mb=64,
                      tracker=lambda _: lambda items, _: items)  # fmt: skip
        root = tmp_path / "set.h5"
    found = read(root)
    assert class_counts(found) == {"benign": 4, "normal": 3}
    assert "benign/lonely_mask.png" in found.titles
    assert found.notes == ["left out: 7 masks (benign (0)_mask.png beside benign (0).png)"]


def test_a_mask_that_cannot_be_read_stops_nothing(tmp_path):
    for i, name in enumerate(("no", "yes")):
        save(tmp_path / name / "x.png", i)
    (tmp_path / "yes" / "x_mask.png").write_bytes(b"")
    assert class_counts(read(tmp_path)) == {"no": 1, "yes": 1}


def test_masks_in_a_folder_of_their_own(tmp_path):
    """As in the COVID-19 radiography database."""
    for k, name in enumerate(("COVID", "Normal")):
        for i in range(2):
            save(tmp_path / name / "images" / f"{name}-{i}.png", 10 * k + i)
            save(tmp_path / name / "masks" / f"{name}-{i}.png")
    found = read(tmp_path)
    assert class_counts(found) == {"COVID": 2, "Normal": 2}
    assert found.notes == ["left out: 4 masks (COVID/masks/COVID-0.png for COVID/images/COVID-0.png)"]


# --- folders


def files(*folders):
    return [f"{folder}/{i}.png" for i, folder in enumerate(folders)]


SPLIT = files("Training/glioma", "Training/notumor", "Testing/glioma", "Testing/notumor")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (SPLIT, r"Testing and Training hold the same subfolders \(glioma and notumor\), so they are parts of a split "
                r"and not classes: train with data\.root=DIR/Training and test with python -m pulmo_jax\.evaluate "
                r"run=RUN data\.test=DIR/Testing"),
        (files("train/a", "train/b", "test/a", "test/b", "val/a", "val/b"), r"=DIR/train and test with .*=DIR/test"),
        (files("TRAIN/a", "TRAIN/b", "Validation/a"), r"hold subfolders \(a and b\).*root=DIR/TRAIN .*DIR/Validation"),
        (files("train_set/a", "train_set/b", "test_set/a", "test_set/b"), r"data\.root=DIR/train_set"),
        (files("train/a", "train/b", "test/a", "test/b", "extra/a"), r"parts of a split"),
        (files("train/a", "train/b", "test"), r"test with .*data\.test=DIR/test"),  # test images without a class
        (files("train", "test"), r"test and train are parts of a split and hold no class subfolders: sort"),
        (files("fold0/a", "fold0/b", "fold1/a", "fold1/b"), r"fold0 and fold1 all hold the same subfolders \(a and b"
                                                            r"\), so which are the classes\? .*data\.root=DIR/fold0"),
        (files("set/no", "set/yes"), r"classes are in the subfolder set \(no and yes\): set data\.root=DIR/set"),
        (files("a/b/no", "a/b/yes"), r"in the subfolder a/b \(no and yes\): set data\.root=DIR/a/b"),
        (files("archive/Training/x", "archive/Testing/x"), r"parts of a split"),
        (["in/" + name for name in SPLIT], r"parts of a split .*train with data\.root=DIR/in/Training and test with"),
        (files("no", "yes", "set/no", "set/yes"), r"set holds the subfolders no and yes once more: remove it, or set "
                                                  r"data\.root=DIR/set"),
        (files("images", "masks"), r"images and masks are images and their masks, not classes"),
        (files("images/no", "images/yes", "masks/no", "masks/yes"), r"data\.root=DIR/images"),
    ],
)  # fmt: skip
def test_folders_that_are_no_classes_are_refused_on_one_line(names, words):
    with pytest.raises(InputError, match=rf"DIR: .*{words}") as error:
        check_folders(Path("DIR"), names, "data.root")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        files("no", "yes"),
        files("glioma", "meningioma", "notumor"),
        files("no/1", "no/2", "yes/3", "yes/4"),  # patients
        files("no/1", "no/2", "yes/1"),
        files("no/images", "yes/images"),
        files("train", "car"),  # vehicles
        files("mask", "no mask"),
        files("no"),
        ["0.png", "1.png"],  # in no folder, which is another error
    ],
)
def test_classes_are_accepted(names):
    check_folders(Path("DIR"), names, "data.root")


def test_a_test_set_of_one_class_may_have_subfolders():
    names = files("yes/p1", "yes/p2")
    check_folders(Path("DIR"), names, "data.test", ("no", "yes"))
    with pytest.raises(InputError, match=r"set data\.test=DIR/yes"):
        check_folders(Path("DIR"), names, "data.test", ("p1", "p2"))


def test_the_check_can_be_turned_off(tmp_path):
    for i, name in enumerate(SPLIT):
        save(tmp_path / name, i)
    with pytest.raises(InputError, match="data.check_folders=false"):
        read(tmp_path)
    assert class_counts(read(tmp_path, check_folders=False)) == {"Testing": 2, "Training": 2}


def test_of_a_store_the_parts_are_ingested_alone(tmp_path):
    for i, name in enumerate(SPLIT):
        save(tmp_path / "set" / name, i)
    ingest_folder(tmp_path / "set", tmp_path / "set.h5", group_regex=None, near_bits=0, threads=1, max_image_mb=64,
                  tracker=lambda _: lambda items, _: items)  # fmt: skip
    with pytest.raises(InputError, match="ingest FOLDER/Training alone and give that store"):
        read(tmp_path / "set.h5")
