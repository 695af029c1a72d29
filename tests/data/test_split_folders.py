"""Folders of training images that hold a whole split."""

import re

import numpy as np
import pytest
from PIL import Image

from pulmo_jax.data.split_folders import check_one_part
from pulmo_jax.data.store_writing import ingest_folder
from pulmo_jax.types import InputError


def save(root, names):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16)).astype(np.uint8)).save(
            root / name / "x.png"
        )
    return root


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["train", "val", "test"], "data.train=DIR/train data.val=DIR/val data.test=DIR/test"),
        (["Training", "Testing"], "data.train=DIR/Training data.test=DIR/Testing"),
        (["TRAIN", "valid"], "data.train=DIR/TRAIN data.val=DIR/valid"),
        (["train_set", "Validation", "notes"], "data.train=DIR/train_set data.val=DIR/Validation"),
        (["test/a/b", "train/a/b"], "data.train=DIR/train data.test=DIR/test"),
        (["val", "test"], "data.train=DIR/val data.test=DIR/test"),
        (["archive/train", "archive/test"], "data.train=DIR/archive/train data.test=DIR/archive/test"),
        (["train/NORMAL", "train/PNEUMONIA", "val/NORMAL", "test/NORMAL", "test/PNEUMONIA"],
         "data.train=DIR/train/NORMAL data.val=DIR/val/NORMAL data.test=DIR/test"),
    ],
)  # fmt: skip
def test_a_whole_split_is_refused_on_one_line_with_the_folders_to_give(tmp_path, names, keys):
    root = save(tmp_path / "set", names)
    with pytest.raises(InputError, match="learnt as normal") as error:
        check_one_part(root, "normal")
    message = str(error.value)
    assert message.startswith(f"data.train={root}: its subfolders ")
    assert message.endswith(f"; give {keys.replace('DIR', str(root))}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "names", [["train"], ["train", "patient1"], ["train", "train_set"], ["patient1", "patient2"], ["trains", "tests"]]
)
def test_other_folders_are_accepted(tmp_path, names):
    check_one_part(save(tmp_path / "set", names), "normal")


def test_an_empty_part_and_a_single_file_are_no_split(tmp_path):
    root = save(tmp_path / "set", ["train"])
    (root / "test").mkdir()
    check_one_part(root, "normal")
    check_one_part(root / "train" / "x.png", "normal")


def test_of_a_store_the_training_part_is_ingested_alone(tmp_path):
    root = save(tmp_path / "set", ["train", "test"])
    ingest_folder(root, tmp_path / "set.h5", group_regex=None, near_bits=0, threads=1, max_image_mb=64,
                  tracker=lambda _: lambda items, _: items)  # fmt: skip
    with pytest.raises(InputError, match=re.escape("ingest FOLDER/train alone and give that store")):
        check_one_part(tmp_path / "set.h5", "normal")
