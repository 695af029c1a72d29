"""Drawn slices: the same ones every time, copies that are found as such, and a lesion that no simple number shows."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from pulmo_jax.data.images import index_images
from pulmo_jax.data.near_copies import first_duplicates, perceptual_hash
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.synthetic_mri import COUNT, draw_slice, synthetic_mri, write_slices

N = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    write_slices(folder, N, seed=3)
    return folder


def groups(folder):
    return {row["file"]: row["group"] for row in csv.DictReader((folder / "groups.csv").read_text().splitlines())}


def test_files_are_of_two_classes_and_many_sizes(folder):
    refs, skipped = index_images(folder)
    assert (len(refs), skipped) == (N, [])
    assert {ref.name.partition("/")[0] for ref in refs} == {"no", "yes"}
    assert {ref.path.suffix for ref in refs} == {".jpg", ".png"}
    assert len({ref.shape for ref in refs}) > N // 2
    assert groups(folder).keys() == {ref.name for ref in refs}


def test_a_file_depends_on_its_number_and_the_seed_alone(folder, tmp_path):
    write_slices(tmp_path / "fewer", N // 2, seed=3)
    for path in (tmp_path / "fewer").glob("*/*"):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path / "fewer")).read_bytes()


def test_copies_are_of_one_class_and_found_by_their_look(folder):
    refs, _ = index_images(folder)
    of, reader = groups(folder), Reader()
    looks = np.array([perceptual_hash(reader.image(ref)) for ref in refs], np.uint64)
    found = first_duplicates([ref.name for ref in refs], looks)
    same = np.array([[of[a.name] == of[b.name] for b in refs] for a in refs])
    together = found[:, None] == found
    apart = ~np.eye(N, dtype=bool)
    assert (same & apart).sum() >= 4
    assert together[same & apart].mean() > 0.9
    assert together[~same].mean() < 0.05
    for group in set(of.values()):
        assert len({name.partition("/")[0] for name, g in of.items() if g == group}) == 1


@pytest.mark.parametrize("statistic", [np.mean, np.max, np.std], ids=lambda f: f.__name__)
def test_no_simple_number_tells_the_classes_apart(statistic):
    truth = np.arange(100) % 2
    values = [statistic(draw_slice(np.random.default_rng([5, k]), bool(of), 64)) for k, of in enumerate(truth)]
    area = roc_auc_score(truth, values)
    assert 0.25 < area < 0.75


def test_the_set_in_the_cache_is_whole_or_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("pulmo_jax.data.synthetic_mri.COUNT", 12)
    folder = synthetic_mri(tmp_path)
    stamp = (folder / "groups.csv").stat().st_mtime_ns
    assert synthetic_mri(tmp_path) == folder
    assert (folder / "groups.csv").stat().st_mtime_ns == stamp
    next(folder.glob("*/slice*")).unlink()
    assert len(list(synthetic_mri(tmp_path).glob("*/slice*"))) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["synthetic_mri"]
    assert COUNT == 160


def test_pixels_are_gray_and_of_the_size_asked_for():
    image = draw_slice(np.random.default_rng(0), abnormal=True, side=96)
    assert (image.shape, image.dtype) == ((96, 96), np.uint8)
    assert Image.fromarray(image).mode == "L"
    assert np.ptp(image) > 100
