"""Class folders as people give them: what is read right, and errors that name the file and say what to do."""

import errno

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from pulmo_jax.data import scratch
from pulmo_jax.data.store_writing import ingest_folder
from pulmo_jax.host.console import Console
from pulmo_jax.host.lock import claim
from pulmo_jax.tasks.classification.config import ClassifierDataConfig
from pulmo_jax.tasks.classification.data import class_counts, digest_of, metadata_features, read_classes
from pulmo_jax.types import InputError

SIZE = 32


def pixels(seed, height=40, width=30):
    """A smooth picture, unlike those of other seeds."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (5, 5)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height))).astype(np.uint8)


def picture(seed):
    return Image.fromarray(pixels(seed))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PULMO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """no/0.png … no/2.png and yes/0.png … yes/2.png"""
    for k, name in enumerate(("no", "yes")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            picture(10 * k + i).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def read(root, classes=None, **options):
    return read_classes(root, ClassifierDataConfig(**options), SIZE, Console(quiet=True), classes)


def ingest(folder, target):
    ingest_folder(folder, target, group_regex=None, near_bits=6, threads=2, max_image_mb=64,
                  tracker=lambda _: lambda items, _: items)  # fmt: skip
    return target


def squares_of(found):
    return found.squares.stack(np.arange(len(found.refs)))


# --- what is read right


def test_a_folder_is_classes_groups_and_squares(folder):
    picture(0).resize((60, 80)).save(folder / "no" / "larger.jpg")  # of no/0.png
    found = read(folder)
    assert found.classes == ("no", "yes")
    assert found.titles[:4] == ["no/0.png", "no/1.png", "no/2.png", "no/larger.jpg"]
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert found.groups[3] == found.groups[0]
    assert len(set(found.groups)) == 6
    assert class_counts(found) == {"no": 4, "yes": 3}
    assert squares_of(found).shape == (7, SIZE, SIZE)
    np.testing.assert_allclose(metadata_features(found)[3, :4], [80, 60, 80 / 60, 1])


def test_a_store_is_the_same_set_as_its_folder(folder, tmp_path):
    picture(0).resize((60, 80)).save(folder / "no" / "larger.jpg")
    tifffile.imwrite(folder / "yes" / "pages.tif", np.stack([pixels(60), pixels(61)]))
    a, b = read(folder), read(ingest(folder, tmp_path / "set.h5"))
    assert digest_of(a, []) == digest_of(b, [])
    assert a.titles[-2:] == ["yes/pages.tif[0]", "yes/pages.tif[1]"]
    assert a.groups[-2] == a.groups[-1]
    np.testing.assert_array_equal(a.looks, b.looks)
    np.testing.assert_array_equal(metadata_features(a), metadata_features(b))
    np.testing.assert_array_equal(squares_of(a), squares_of(b))


def save_alpha(path):
    Image.fromarray(np.dstack([pixels(50), np.full_like(pixels(50), 7)])).save(path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("png.jpg", lambda path: picture(50).save(path, format="PNG")),
        ("jpeg.png", lambda path: picture(50).save(path, format="JPEG", quality=95)),
        ("palette.png", lambda path: picture(50).convert("RGB").quantize(256).save(path)),
        ("alpha.png", save_alpha),
        ("rgba.png", lambda path: picture(50).convert("RGBA").save(path)),
        ("cmyk.jpg", lambda path: picture(50).convert("RGB").convert("CMYK").save(path, quality=95)),
        ("deep.png", lambda path: Image.fromarray(pixels(50).astype(np.uint16) * 257).save(path)),
        ("CAPITAL.JPG", lambda path: picture(50).save(path, format="JPEG", quality=95)),
    ],
)
def test_the_picture_counts_and_not_how_it_was_saved(folder, name, save):
    """A copy, by its look, of the plain one, and the same square but for its units and what JPEG loses."""
    picture(50).save(folder / "no" / "plain.png")
    save(folder / "no" / name)
    found = read(folder)
    plain, other = (found.titles.index(f"no/{title}") for title in ("plain.png", name))
    assert found.groups[plain] == found.groups[other]
    a, b = found.squares.stack(np.array([plain, other]))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999


def test_pictures_of_hardly_anything_have_squares_all_the_same(folder):
    for i, shape in enumerate([(1, 1), (1, 3), (1000, 2), (20, 20)]):
        Image.fromarray(np.zeros(shape, np.uint8) + i).save(folder / "no" / f"blank{i}.png")
    tifffile.imwrite(folder / "yes" / "nan.tif", np.full((30, 30), np.nan, np.float32))
    tifffile.imwrite(folder / "yes" / "sentinel.tif", np.where(pixels(3) < 60, np.float32(-3.4e38), pixels(3)))
    found = read(folder)
    assert np.isfinite(squares_of(found)).all()
    assert len(set(found.groups)) == len(found.refs)  # what shows nothing looks like nothing


def test_files_that_are_no_images_are_no_matter(folder):
    (folder / "groups.csv").write_text("file,group\n")
    (folder / "no" / "Thumbs.db").write_bytes(b"x")
    (folder / "no" / ".hidden.png").write_bytes(b"x")
    (folder / "empty").mkdir()
    assert read(folder).classes == ("no", "yes")


def test_a_class_of_one_image_is_a_class(folder):
    for i in (1, 2):
        (folder / "yes" / f"{i}.png").unlink()
    assert class_counts(read(folder)) == {"no": 3, "yes": 1}


def test_three_classes(folder):
    (folder / "maybe").mkdir()
    picture(77).save(folder / "maybe" / "0.png")
    found = read(folder)
    assert found.classes == ("maybe", "no", "yes")
    assert found.labels.tolist() == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("how", ["patient", "look"])
def test_a_group_across_classes_stays_together_and_is_told(folder, how):
    if how == "look":
        picture(0).resize((60, 80)).save(folder / "yes" / "larger.png")
    found = read(folder, group_regex=r"(\d)\.png" if how == "patient" else None)
    (note,) = found.notes
    assert "have images in several classes, such as the group of" in note
    assert len(set(found.groups)) == (3 if how == "patient" else 6)


def test_a_test_set_has_the_classes_of_its_run_and_maybe_not_all(folder):
    for path in (folder / "yes").iterdir():
        path.unlink()
    found = read(folder, classes=("maybe", "no", "yes"))
    assert found.classes == ("maybe", "no", "yes")
    assert found.labels.tolist() == [1, 1, 1]


# --- what is refused


def cut_off(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def animate(path):
    picture(50).save(path, save_all=True, append_images=[picture(51)])


def hang(path):
    path.unlink()
    path.symlink_to(path.with_name("nowhere.png"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut_off, r"1\.png: cannot be read, it may be damaged or cut off"),
        (lambda path: path.write_bytes(b""), r"1\.png: is empty \(0 bytes\); supported formats are TIFF, PNG, JPEG"),
        (lambda path: path.write_text("<html>"), r"1\.png: unknown image format; supported formats are"),
        (animate, r"1\.png: is an animation of 2 frames; save one frame as PNG"),
        (hang, r"1\.png: is a broken link"),
    ],
)
def test_a_file_that_is_of_no_use_is_named_or_left_out(folder, harm, words):
    harm(folder / "no" / "1.png")
    with pytest.raises(InputError, match=rf"{words}(.|\n)*skip such files with data\.on_error=skip"):
        read(folder)
    found = read(folder, on_error="skip")
    assert found.titles == ["no/0.png", "no/2.png", *(f"yes/{i}.png" for i in range(3))]
    assert "1 files were skipped, such as" in found.notes[0]
    assert squares_of(found).shape == (5, SIZE, SIZE)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_folder_of_which_nothing_can_be_read(folder, on_error):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"0\.png: is empty(.|\n)*none of the 6 images can be used"):
        read(folder, on_error=on_error)


@pytest.mark.parametrize("stored", [False, True])
def test_the_same_file_in_two_classes(folder, tmp_path, stored):
    (folder / "yes" / "again.png").write_bytes((folder / "no" / "0.png").read_bytes())
    root = ingest(folder, tmp_path / "set.h5") if stored else folder
    with pytest.raises(
        InputError, match=r"no/0\.png and .*yes/again\.png are the same file in two classes; remove one"
    ):
        read(root)
    found = read(root, on_error="skip")
    assert {"no/0.png", "yes/again.png"}.isdisjoint(found.titles)
    assert len(found.refs) == 5


def test_one_class_alone(folder):
    for path in (folder / "yes").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"set: has images of one class only \(no\); at least two class subfolders"):
        read(folder)


def test_images_in_no_class_folder(folder):
    picture(9).save(folder / "loose.png")
    with pytest.raises(
        InputError, match=r"1 images are in no class subfolder \(loose\.png\); put every image into a sub"
    ):
        read(folder)


def test_classes_that_the_run_does_not_know(folder):
    with pytest.raises(InputError, match=r"classes that are not in the run \(yes\); the run has healthy, no: rename"):
        read(folder, classes=("healthy", "no"))


def test_a_group_expression_that_matches_nothing(folder):
    with pytest.raises(InputError, match=r"no/0\.png: data\.group_regex=patient does not match"):
        read(folder, group_regex="patient")


def set_version(path):
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 99


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (set_version, r"set\.h5: has store version 99, but this program reads versions up to \d+; update it"),
        (cut_off, r"set\.h5: cannot be read, it may be damaged or cut off"),
        (lambda path: path.write_bytes(b""), r"set\.h5: is empty \(0 bytes\)"),
        (lambda path: path.write_bytes(b"pulmo_jax store part 2\n"), r"set\.h5: unknown image format"),
    ],
)
def test_a_store_that_cannot_be_used(folder, tmp_path, harm, words):
    store = ingest(folder, tmp_path / "set.h5")
    harm(store)
    with pytest.raises(InputError, match=words):
        read(store)


def test_a_store_that_is_added_to_is_read_as_it_was(folder, tmp_path):
    """Until the larger one takes its place."""
    store = ingest(folder, tmp_path / "set.h5")
    (tmp_path / "set.h5.part").write_bytes(b"pulmo_jax store part 2\n")
    with claim(tmp_path, ".set.h5.lock"):
        assert len(read(store).refs) == 6


def test_no_room_for_the_squares(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scratch, "allocate_file", full)
    with pytest.raises(
        InputError, match=r"cache: no space for .*No space left on device\); free some or set another folder"
    ):
        read(folder)
