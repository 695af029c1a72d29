"""Reports on sample data say so; those on a user's own data do not."""

import json

import pytest

from pulmo_jax.data.sample_facts import declared_unit, described_sample, sample_line


def sample(tmp_path, name, **facts):
    folder = tmp_path / name
    (folder / "test").mkdir(parents=True)
    (folder / "sample.json").write_text(json.dumps({"format": 1, **facts}))
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lung_ct", "one patient"),
        ("lung_lobes", "one patient"),
        ("radiographs", "CT of one patient"),
        ("synthetic_mri", "drawn"),
        ("copied elsewhere", "sample data set"),
    ],
)
def test_a_sample_is_described_by_its_root_and_its_folders(tmp_path, name, words):
    root = sample(tmp_path, name)
    for folder in (root, root / "test"):
        assert words in described_sample(folder)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"format": 1', "\x00"])
def test_a_users_own_folder_has_no_description(tmp_path, content):
    (tmp_path / "mine" / "images").mkdir(parents=True)
    if content is not None:
        (tmp_path / "mine" / "sample.json").write_text(content)
    assert described_sample(tmp_path / "mine" / "images") == ""
    assert declared_unit(tmp_path / "mine" / "images") == ("", 0.0)
    assert described_sample(None) == ""


def test_the_sample_ct_declares_hounsfield_units(tmp_path):
    assert declared_unit(sample(tmp_path, "lung_ct", hu_offset=1024) / "test") == ("HU", -1024.0)
    assert declared_unit(sample(tmp_path, "radiographs") / "test") == ("", 0.0)


def test_the_line_tells_tested_from_trained():
    assert sample_line("slices").startswith("Sample data: slices. ")
    assert sample_line("", "slices").startswith("Trained on sample data: slices. ")
    assert sample_line("slices", "others") == sample_line("slices")
    assert "not evidence" in sample_line("slices")
    assert sample_line("", "") == ""
