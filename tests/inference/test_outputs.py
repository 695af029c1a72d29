"""What prediction writes, read back with other libraries; and that no half file is ever seen."""

import csv
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.ndimage import maximum_filter

from pulmo_jax.data.sources import open_source
from pulmo_jax.host.files import atomically, write_json, write_text
from pulmo_jax.inference import outputs
from pulmo_jax.inference.outputs import (
    CSV_COLUMNS,
    detection_row,
    open_map,
    overlay_step,
    subsample_mask,
    write_overlay,
)
from pulmo_jax.types import Detection, ImageTags, OutputError, Window

OUTLINE = (0, 229, 255)


# --- each file whole or not at all


def test_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"

    def write(temporary: Path):
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename within one file system
        assert temporary.name.startswith(".")  # and no image of the next run
        temporary.write_text("whole")

    atomically(path, write)
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary: Path):
        temporary.write_text("half of the n")
        raise error

    with pytest.raises(error):
        atomically(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_writer_that_fails_before_it_writes_raises_its_own_error(tmp_path):
    with pytest.raises(ZeroDivisionError):
        atomically(tmp_path / "a.txt", lambda temporary: 1 / 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", ["map", "overlay", "json"])
def test_every_writer_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch, writer):
    path = tmp_path / "out"
    write = {
        "map": lambda: write_map(path, [np.zeros((4, 4), np.float32)], ImageTags()),
        "overlay": lambda: overlay(path, np.zeros((4, 4), bool)),
        "json": lambda: write_json(path, {"a": 1}),
    }[writer]
    write()
    before = path.read_bytes()

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="^the disk is full: "):
        write()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "a.md", "≥ 3 µm")
    assert (tmp_path / "a.md").read_bytes().decode("utf-8") == "≥ 3 µm"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_is_standard_json(tmp_path, value):
    write_json(tmp_path / "a.json", {"a": [1, None, 0.1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None, 0.1]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": value})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None, 0.1]}


# --- maps


def write_map(path: Path, pages: list[np.ndarray], tags: ImageTags) -> None:
    with open_map(path, tags, sum(page.nbytes for page in pages)) as write:
        for page in pages:
            write(page.shape, page.dtype, page.__getitem__)


GEO = (
    (33550, 12, 3, (0.5, 0.5, 0.0)),
    (33922, 12, 6, (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0)),
    (34735, 3, 8, (1, 1, 0, 1, 1024, 0, 1, 1)),
    (34737, 2, 10, "WGS 84|12|"),
)


def test_map_comes_back_with_its_pages_and_tags(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a_score.tif"
    pages = [rng.normal(size=(33, 50)).astype(np.float32) for _ in range(3)]
    pages[1][2:5] = np.nan
    write_map(path, pages, ImageTags(resolution=(14.2, 7.1, 3), geo=GEO))
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == 3
        for page, expected in zip(tiff.pages, pages, strict=True):
            assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            assert page.dtype == np.float32
            assert page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
            np.testing.assert_array_equal(page.asarray(), expected)
            numerator, denominator = page.tags["XResolution"].value
            assert numerator / denominator == pytest.approx(14.2)
            assert page.tags["ResolutionUnit"].value == 3
            for code, dtype, count, value in GEO:
                tag = page.tags[code]
                assert (int(tag.dtype), tag.value) == (dtype, value)
                assert count <= tag.count <= count + 1  # text ends with a zero


def test_tags_survive_from_source_to_map_to_source(tmp_path):
    geo = [(code, dtype, count, value, False) for code, dtype, count, value in GEO]
    with tifffile.TiffWriter(tmp_path / "image.tif") as tiff:
        tiff.write(np.zeros((9, 8), np.uint16), resolution=(300.0, 150.0), resolutionunit=2, extratags=geo)
    with open_source(tmp_path / "image.tif") as source:
        tags = source.tags
    assert tags.resolution == (300.0, 150.0, 2)
    write_map(tmp_path / "map.tif", [np.ones((9, 8), np.float32)], tags)
    with open_source(tmp_path / "map.tif") as source:
        assert source.tags == tags
        assert (source.shape, source.dtype) == ((1, 9, 8, 1), np.float32)


def test_map_without_tags_claims_no_scale(tmp_path):
    write_map(tmp_path / "a.tif", [np.zeros((4, 5), np.float32)], ImageTags())
    with open_source(tmp_path / "a.tif") as source:
        assert source.tags.geo == ()
        assert source.tags.resolution in (None, (1.0, 1.0, 1))  # TIFF's way of saying none


def test_masks_are_maps_of_bytes(tmp_path):
    mask = (np.arange(30).reshape(5, 6) % 3 == 0).astype(np.uint8) * 255
    write_map(tmp_path / "a_mask.tif", [mask], ImageTags())
    found = np.asarray(Image.open(tmp_path / "a_mask.tif"))  # by another library
    np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("shape", [(1, 1), (700, 333), (3, 100_000)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_map_of_any_shape_is_asked_for_a_strip_at_a_time(tmp_path, shape, dtype):
    page = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    asked = []

    def values_of(rows: slice) -> np.ndarray:
        asked.append(page[rows])
        return page[rows]

    with open_map(tmp_path / "a.tif", ImageTags(), page.nbytes) as write:
        write(shape, np.dtype(dtype), values_of)
    np.testing.assert_array_equal(np.concatenate(asked), page)
    assert all(strip.nbytes <= max(outputs.STRIP_BYTES, page[:1].nbytes) for strip in asked)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), page)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.tif")), page)  # by another library


def test_map_is_there_only_when_its_last_page_is(tmp_path):
    def write_two(path: Path, values_of: Callable[[slice], np.ndarray]):
        with open_map(path, ImageTags(), 2 * page.nbytes) as write:
            write(page.shape, page.dtype, page.__getitem__)
            assert path.is_file() == bool(whole)
            write(page.shape, page.dtype, values_of)

    page, path = np.ones((600, 500), np.float32), tmp_path / "deep" / "a.tif"
    whole = b""
    write_two(path, page.__getitem__)
    assert [p.name for p in path.parent.iterdir()] == ["a.tif"]
    whole = path.read_bytes()

    def fails(rows: slice) -> np.ndarray:
        if rows.start > 0:
            raise OSError("No space left on device")
        return page[rows]

    with pytest.raises(OutputError, match="^the disk is full: "):
        write_two(path, fails)
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == ["a.tif"]


def test_map_beyond_the_limit_of_tiff_is_a_bigtiff(tmp_path):
    page = np.zeros((8, 8), np.float32)
    for size, big in ((page.nbytes, False), (2**32, True)):
        with open_map(tmp_path / "a.tif", ImageTags(), size) as write:
            write(page.shape, page.dtype, page.__getitem__)
        with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
            assert tiff.is_bigtiff == big


# --- overlays


def overlay(path: Path, mask: np.ndarray, image=None, score=None, threshold=1.0) -> np.ndarray:
    """A gray image with scores of 0, if not given; the picture as it is on disk."""
    image = np.full((*mask.shape, 1), 0.4, np.float32) if image is None else image
    image = image[:: overlay_step(mask.shape), :: overlay_step(mask.shape)]
    score = np.zeros(mask.shape, np.float32) if score is None else score
    write_overlay(path, image, score, mask, threshold)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        height, width = image.shape[:2]
        return np.asarray(picture)[:height, :width]  # without the legend


@pytest.mark.parametrize(("width", "step"), [(64, 1), (1000, 1), (3000, 2)])
def test_legend_is_below_the_image_and_its_scale_bar_has_the_length_it_states(tmp_path, monkeypatch, width, step):
    asked = []

    def scale(columns: int) -> tuple[float, str]:
        asked.append(columns)
        return 40.0, "20 mm"

    mask, score = np.zeros((50, width), bool), np.zeros((50, width), np.float32)
    mask[20:30, 20:30] = True
    image = np.full((50, width, 1), 0.4, np.float32)[::step, ::step]
    pictures = []
    for chosen in (scale, None):
        write_overlay(tmp_path / "a.png", image, score, mask, 1.0, chosen)
        with Image.open(tmp_path / "a.png") as picture:
            pictures.append(np.asarray(picture))
    with_bar, without = pictures
    height, columns = image.shape[:2]
    assert with_bar.shape == without.shape
    assert with_bar.shape[1] >= columns
    np.testing.assert_array_equal(with_bar[:height], without[:height])
    assert (without[height:] == OUTLINE).all(axis=-1).any()  # the sample of an outline
    assert not without[:height, columns:].any()
    lines = (with_bar[height:] == 255).all(axis=-1) & ~(without[height:] == 255).all(axis=-1)
    assert lines.sum(axis=1).max() == 40 // step
    assert asked == [asked[0]]
    assert asked[0] <= width


def outlined(picture: np.ndarray) -> np.ndarray:
    return (picture == OUTLINE).all(axis=-1)


def test_findings_are_outlined_just_outside(tmp_path):
    mask = np.zeros((40, 50), bool)
    mask[10:20, 15:30] = True
    mask[0:3, 0:3] = True  # at the edge
    found = outlined(overlay(tmp_path / "a.png", mask))
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    np.testing.assert_array_equal(found, maximum_filter(mask, footprint=cross) & ~mask)
    assert found.sum() == 2 * (10 + 15) + 6


def test_image_without_findings_is_shown_as_it_is(tmp_path):
    image = np.linspace(0, 1, 12 * 10, dtype=np.float32).reshape(12, 10, 1)
    picture = overlay(tmp_path / "a.png", np.zeros((12, 10), bool), image)
    np.testing.assert_array_equal(picture, np.repeat((image * 255).astype(np.uint8), 3, axis=-1))


@pytest.mark.parametrize("bands", [1, 3, 5])
def test_any_number_of_bands_can_be_shown_and_is_limited_to_the_range(tmp_path, bands):
    image = np.random.default_rng(0).normal(0.5, 1, (12, 10, bands)).astype(np.float32)
    picture = overlay(tmp_path / "a.png", np.zeros((12, 10), bool), image)
    shown = image if bands == 3 else np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    np.testing.assert_allclose(picture, np.clip(shown, 0, 1) * 255, atol=1)


def test_score_is_coloured_from_half_the_threshold_on(tmp_path):
    score = np.tile(np.linspace(0, 4, 41, dtype=np.float32), (5, 1))
    score[0] = np.nan  # outside the foreground
    picture = overlay(tmp_path / "a.png", np.zeros(score.shape, bool), score=score, threshold=2.0).astype(int)
    coloured = np.ptp(picture, axis=-1) > 0
    assert not coloured[0].any()
    assert not coloured[1:, score[1] <= 1.0].any()
    assert coloured[1:, score[1] > 1.2].all()


def test_colours_mean_the_same_in_every_image(tmp_path):
    low, high = np.full((6, 6), 2.0, np.float32), np.full((6, 6), 2.0, np.float32)
    high[0, 0] = 100.0
    none = np.zeros((6, 6), bool)
    pictures = [overlay(tmp_path / "a.png", none, score=score) for score in (low, high)]
    np.testing.assert_array_equal(pictures[0][3:], pictures[1][3:])


def test_threshold_of_zero_can_be_shown(tmp_path):
    mask = np.zeros((8, 8), bool)
    mask[2:4, 2:4] = True
    assert outlined(overlay(tmp_path / "a.png", mask, threshold=0.0)).sum() == 8


def test_small_finding_is_outlined_in_a_large_image_too(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "OVERLAY_PX", 50)
    mask = np.zeros((400, 333), bool)
    mask[201, 101] = True
    picture = overlay(tmp_path / "a.png", mask)
    assert picture.shape == (50, 42, 3)
    assert np.argwhere(outlined(picture)).mean(axis=0).tolist() == [201 // 8, 101 // 8]


@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=17)), step=st.integers(1, 6))
def test_thinning_keeps_whatever_a_block_holds(mask, step):
    rows, columns = (range(0, size, step) for size in mask.shape)
    expected = [[mask[y : y + step, x : x + step].any() for x in columns] for y in rows]
    np.testing.assert_array_equal(subsample_mask(mask, step), expected)
    assert subsample_mask(mask, step).shape == mask[::step, ::step].shape


# --- detections


def test_row_of_a_detection_has_a_value_in_every_column():
    detection = Detection(
        label=2,
        y=11,
        x=22,
        box=Window(10, 20, 3, 4),
        area_px=9,
        peak_score=0.1,
        mean_score=1 / 3,
        p_value=1e-9,
        p_value_image=0.05,
    )
    row = detection_row("a, b.tif", 3, detection)
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS)
    writer.writeheader()
    writer.writerow(row)
    [found] = csv.DictReader(io.StringIO(text.getvalue()))
    assert list(found) == list(CSV_COLUMNS)
    assert found["filename"] == "a, b.tif"
    whole = {"page": 3, "label": 2, "y": 11, "x": 22, "box_y": 10, "box_x": 20, "box_height": 3, "box_width": 4}
    assert {name: int(found[name]) for name in whole} == whole
    assert int(found["area_px"]) == 9
    scores = {"peak_score": 0.1, "mean_score": 1 / 3, "p_value": 1e-9, "p_value_image": 0.05}
    assert {name: float(found[name]) for name in scores} == scores  # to the last digit
