"""The folders of images in a typed config: found wherever they stand, and refused where they are not."""

import h5py
import pytest

from pulmo_jax.config.section import ImageFolder, ImageInput, PathLike, Section
from pulmo_jax.runs.paths import check_paths, image_paths
from pulmo_jax.types import InputError


class Inner(Section):
    train: ImageFolder | None = None
    cache: PathLike | None = None
    tables: tuple[str, ...] = ()


class Outer(Section):
    input: ImageInput | None = None
    data: Inner = Inner()
    name: str = "x"


def test_marked_paths_are_found_with_their_dotted_keys(tmp_path):
    config = Outer(input=tmp_path / "a.png", data=Inner(train=tmp_path, cache=tmp_path / "nowhere"))
    assert [(key, path) for key, path, _ in image_paths(config)] == [
        ("input", tmp_path / "a.png"), ("data.train", tmp_path),
    ]  # fmt: skip
    assert list(image_paths(Outer())) == []
    check_paths(Outer())


def test_an_input_is_a_file_or_a_folder_that_is_there(tmp_path):
    (tmp_path / "a.png").touch()
    check_paths(Outer(input=tmp_path / "a.png"))
    check_paths(Outer(input=tmp_path))
    with pytest.raises(InputError, match=r"^input=.*/b.png: does not exist; "):
        check_paths(Outer(input=tmp_path / "b.png"))


def test_a_folder_of_images_is_a_folder_or_a_store(tmp_path):
    (tmp_path / "a.png").touch()
    with h5py.File(tmp_path / "store.h5", "w"):
        pass
    check_paths(Outer(data=Inner(train=tmp_path, cache=tmp_path / "nowhere")))
    check_paths(Outer(data=Inner(train=tmp_path / "store.h5")))
    for name, what in (("a.png", "is a file"), ("nowhere", "does not exist")):
        with pytest.raises(InputError, match=rf"^data.train={tmp_path / name}: {what}; give a folder of images"):
            check_paths(Outer(data=Inner(train=tmp_path / name)))
