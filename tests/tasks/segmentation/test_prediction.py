"""What prediction writes for a page, read back with other libraries, against the same computed at once."""

import csv
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from matplotlib.path import Path as Outline
from PIL import Image
from references.image_files import write_dicom
from references.segmentation_run import BOTH, ONE, TWO, segmentation_run
from scipy import ndimage
from skimage.measure import label, regionprops

from pulmo_jax.data.file_rows import FileRows
from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources import open_source
from pulmo_jax.data.transforms import Preprocessing
from pulmo_jax.inference import map_files
from pulmo_jax.inference.class_maps import class_masks, decide
from pulmo_jax.inference.component_table import COLUMNS
from pulmo_jax.runs.place import workplace
from pulmo_jax.runs.records import predict_all
from pulmo_jax.tasks.segmentation import prediction
from pulmo_jax.tasks.segmentation.config import SegmentConfig
from pulmo_jax.tasks.segmentation.pages import write_page
from pulmo_jax.types import InputError

UTM = [
    (33550, 12, 3, (10.0, 10.0, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 399960.0, 5700000.0, 0.0), True),
    (34735, 3, 20, (1, 1, 0, 4, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633, 3076, 0, 1, 9001), True),
]
NO_DATA = (42113, 2, 0, "0", True)


def smooth(shape: tuple[int, ...], seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    """Blobs of a few pixels, 1 to 255."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), (3, 3, 0)[: len(shape)])
    return (1 + 254 * (noise - noise.min()) / np.ptp(noise)).astype(dtype)


def signed_area(ring: list[list[float]]) -> float:
    x, y = np.array(ring)[:-1].T
    return 0.5 * float(x @ np.roll(y, -1) - np.roll(x, -1) @ y)


def page_of(run, path: Path, output: Path, page: int = 0, **options):
    """Record of a page, whose files are named "a"."""
    refs, failed = index_images(path)
    assert failed == []
    config = run.config.calibration
    return write_page(run.mapper, Reader(), refs[page], output, "a", min_area_px=config.min_area_px, **options)


def rasterised(geometries: list[dict], shape: tuple[int, int]) -> np.ndarray:
    """Number of geometries that hold each pixel's centre."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    centres, inside = np.stack([x.ravel() + 0.5, y.ravel() + 0.5], axis=1), np.zeros(shape[0] * shape[1], int)
    for one in geometries:
        polygons = [one["coordinates"]] if one["type"] == "Polygon" else one["coordinates"]
        for exterior, *holes in polygons:
            inside += Outline(exterior).contains_points(centres)
            inside -= sum((Outline(hole).contains_points(centres) for hole in holes), np.zeros(len(inside), int))
    return inside.reshape(shape)


# --- the files of a page


@pytest.mark.parametrize("classes", [ONE, TWO, BOTH])
@pytest.mark.parametrize("resize", [False, True])
def test_files_of_a_page_are_those_of_the_whole_image(tmp_path, classes, resize):
    pixels = smooth((70, 90))
    tifffile.imwrite(tmp_path / "image.tif", pixels, photometric="minisblack", compression="zlib", rowsperstrip=7)
    run = segmentation_run(tmp_path / "run", classes, resize=resize)
    record = page_of(run, tmp_path / "image.tif", tmp_path / "out")
    p = run.mapper.probabilities(pixels[..., None])
    codes = decide(p, run.mapper.thresholds, classes)
    inside = class_masks(p, run.mapper.thresholds, classes)
    assert 0 < (codes > 0).mean() < 1
    with tifffile.TiffFile(tmp_path / "out" / "masks" / "a.tif") as tiff:
        np.testing.assert_array_equal(tiff.pages[0].asarray(), codes)
        assert tiff.pages[0].dtype == np.uint8
        assert 42113 not in tiff.pages[0].tags
    written = tifffile.imread(tmp_path / "out" / "probabilities" / "a.tif")
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, p if len(classes) > 1 else p[..., 0], atol=1e-6)
    features = json.loads((tmp_path / "out" / "polygons" / "a.geojson").read_text())["features"]
    for k, name in enumerate(classes.names):
        regions = [r for r in regionprops(label(inside[..., k], connectivity=2)) if r.area >= 3]
        rows = [row for row in record["components"] if row["class"] == name]
        assert sorted(row["area_px"] for row in rows) == sorted(int(r.area) for r in regions)
        own = [one for one in features if one["properties"]["class"] == name]
        assert [one["properties"]["label"] for one in own] == [row["label"] for row in rows]
        kept = np.zeros(codes.shape, int)
        for region in regions:
            kept[tuple(region.coords.T)] = 1
        np.testing.assert_array_equal(rasterised([one["geometry"] for one in own], codes.shape), kept)
        assert record["images"][0]["classes"][name] == {"area_px": inside[..., k].sum(), "components": len(rows)}
    with Image.open(tmp_path / "out" / "overlays" / "a.png") as overlay:
        assert overlay.mode == "RGB"
        assert overlay.size[0] >= 90
        assert overlay.size[1] > 70
        grey = np.asarray(overlay)[:70, :90]
    coloured = np.ptp(grey, axis=-1) > 0
    assert 0 < coloured.sum() < inside.any(-1).sum()
    assert inside.any(-1)[coloured].all()


def test_components_have_their_places_and_probabilities(tmp_path):
    pixels = smooth((70, 90), 1)
    tifffile.imwrite(
        tmp_path / "image.tif", pixels, photometric="minisblack", resolution=(20.0, 40.0), resolutionunit=3
    )
    run = segmentation_run(tmp_path / "run", ONE, thresholds=(0.99,))
    rows = page_of(run, tmp_path / "image.tif", tmp_path / "out")["components"]
    p = run.mapper.probabilities(pixels[..., None])[..., 0]
    regions = [r for r in regionprops(label(p > 0.99, connectivity=2), p) if r.area >= 3]
    assert len(rows) == len(regions) > 3
    assert [row["area_px"] for row in rows] == sorted((row["area_px"] for row in rows), reverse=True)
    by_box = {(row["box_y"], row["box_x"], row["box_height"], row["box_width"]): row for row in rows}
    for region in regions:
        top, left, bottom, right = region.bbox
        row = by_box[top, left, bottom - top, right - left]
        assert (row["y"], row["x"]) == pytest.approx(region.centroid)
        values = p[tuple(region.coords.T)]
        assert row["mean_probability"] == pytest.approx(float(values.astype(float).mean()), abs=1e-6)
        assert row["max_probability"] == pytest.approx(float(values.max()), abs=1e-6)
        assert row["area_mm2"] == pytest.approx(region.area * 0.5 * 0.25)
        assert row["area_m2"] is None


def test_areas_in_mm_follow_from_the_pixel_spacing_of_a_dicom_file(tmp_path):
    write_dicom(tmp_path / "image.dcm", smooth((70, 90)).astype(np.uint16), PixelSpacing=[0.5, 0.25])
    refs, _ = index_images(tmp_path / "image.dcm")
    run = segmentation_run(tmp_path / "run", ONE, refs[0].scale)
    rows = page_of(run, tmp_path / "image.dcm", tmp_path / "out")["components"]
    assert all(row["area_mm2"] == pytest.approx(row["area_px"] / 8) for row in rows)
    assert len(rows) > 0


def test_georeference_is_carried_over(tmp_path):
    pixels = smooth((70, 90, 4), 2, np.uint16)
    tifffile.imwrite(
        tmp_path / "image.tif", pixels, photometric="minisblack", planarconfig="contig", extratags=UTM, tile=(32, 32)
    )
    run = segmentation_run(tmp_path / "run", TWO, "uint16", 4)
    record = page_of(run, tmp_path / "image.tif", tmp_path / "out")
    with open_source(tmp_path / "image.tif", max_bytes=2**30) as source:
        tags = source.tags
    for name in ("masks", "probabilities"):
        with open_source(tmp_path / "out" / name / "a.tif", max_bytes=2**30) as source:
            assert source.tags == tags
            assert source.shape[1:3] == (70, 90)
    with tifffile.TiffFile(tmp_path / "out" / "probabilities" / "a.tif") as tiff:
        page = tiff.pages[0]
        assert page.shape == (70, 90, 2)
        assert page.planarconfig == 1
        assert (
            '<Item name="DESCRIPTION" sample="1" role="description">lésion &lt;a&gt;</Item>' in page.tags[42112].value
        )
    content = json.loads((tmp_path / "out" / "polygons" / "a.geojson").read_text())
    assert content["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    assert "note" not in content
    row, feature = record["components"][0], content["features"][0]
    assert row["area_m2"] == pytest.approx(100 * row["area_px"])
    assert feature["properties"]["epsg"] == 32633
    assert "area_mm2" not in feature["properties"]
    outline = feature["geometry"]["coordinates"]
    corners = np.array(outline[0] if feature["geometry"]["type"] == "Polygon" else outline[0][0])
    low, high = corners.min(0), corners.max(0)
    if feature["geometry"]["type"] == "Polygon":
        assert low[0] == 399960 + 10 * row["box_x"]
        assert high[1] == 5700000 - 10 * row["box_y"]
        assert high[0] - low[0] == 10 * row["box_width"]
        assert high[1] - low[1] == 10 * row["box_height"]


def test_rotated_georeference_gives_rotated_outlines(tmp_path):
    """Columns run north, rows run east: the map mirrors the image, and rings keep their orientation."""
    matrix = (0.0, 2.0, 0.0, 500.0, 2.0, 0.0, 0.0, 900.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    transformation = (34264, 12, 16, matrix, True)
    tifffile.imwrite(
        tmp_path / "image.tif", smooth((70, 90)), photometric="minisblack", extratags=[transformation, UTM[2]]
    )
    run = segmentation_run(tmp_path / "run", ONE)
    record = page_of(run, tmp_path / "image.tif", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "polygons" / "a.geojson").read_text())
    geometry = content["features"][0]["geometry"]
    polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    areas = [[signed_area(ring) for ring in polygon] for polygon in polygons]
    assert all(exterior > 0 and max(holes, default=-1) < 0 for exterior, *holes in areas)
    row = record["components"][0]
    assert sum(map(sum, areas)) == pytest.approx(4 * row["area_px"]) == pytest.approx(row["area_m2"])
    x, y = np.concatenate([np.array(polygon[0]) for polygon in polygons]).T
    assert (x.min(), y.min()) == (500 + 2 * row["box_y"], 900 + 2 * row["box_x"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (3, 5)])
def test_images_of_any_shape_have_all_files(tmp_path, shape):
    Image.fromarray(np.full(shape, 200, np.uint8)).save(tmp_path / "image.png")
    run = segmentation_run(tmp_path / "run", TWO)
    page_of(run, tmp_path / "image.png", tmp_path / "out")
    assert tifffile.imread(tmp_path / "out" / "masks" / "a.tif").shape == shape
    assert tifffile.imread(tmp_path / "out" / "probabilities" / "a.tif").shape == (*shape, 2)
    with Image.open(tmp_path / "out" / "overlays" / "a.png") as overlay:
        assert overlay.size[0] >= shape[1]


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_missing_pixels_are_255_in_the_mask_and_nan_in_the_probabilities(tmp_path, compression):
    pixels = smooth((70, 90))
    pixels[10:20, :30] = pixels[60:] = 0
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", extratags=[NO_DATA], compression=compression)
    run = segmentation_run(tmp_path / "run", TWO)
    record = page_of(run, path, tmp_path / "out")
    with tifffile.TiffFile(tmp_path / "out" / "masks" / "a.tif") as tiff:
        mask, page = tiff.pages[0].asarray(), tiff.pages[0]
        assert page.tags[42113].value == "255"
    np.testing.assert_array_equal(mask == 255, pixels == 0)
    with tifffile.TiffFile(tmp_path / "out" / "probabilities" / "a.tif") as tiff:
        p = tiff.pages[0].asarray()
        assert tiff.pages[0].tags[42113].value == "nan"
    np.testing.assert_array_equal(np.isnan(p), np.repeat((pixels == 0)[..., None], 2, axis=-1))
    assert record["images"][0]["n_missing"] == (pixels == 0).sum()
    expected = run.mapper.probabilities(np.where(pixels == 0, np.float32(np.nan), pixels)[..., None])
    np.testing.assert_allclose(p, expected, atol=1e-6)


def test_file_without_a_pixel_that_is_known(tmp_path):
    tifffile.imwrite(tmp_path / "image.tif", np.full((30, 40), np.nan, np.float32))
    run = segmentation_run(tmp_path / "run", TWO, "float32")
    record = page_of(run, tmp_path / "image.tif", tmp_path / "out")
    assert (tifffile.imread(tmp_path / "out" / "masks" / "a.tif") == 255).all()
    assert record["components"] == []
    assert record["images"][0]["n_missing"] == 1200


def test_listed_components_reach_the_probability_threshold_of_the_run(tmp_path):
    tifffile.imwrite(tmp_path / "image.tif", smooth((70, 90)), photometric="minisblack")
    run = segmentation_run(tmp_path / "run", ONE, thresholds=(0.9,))
    rows = page_of(run, tmp_path / "image.tif", tmp_path / "out")["components"]
    limit = float(np.median([row["max_probability"] for row in rows]))
    some = page_of(run, tmp_path / "image.tif", tmp_path / "out", min_probability=limit)["components"]
    assert len(some) == sum(row["max_probability"] >= limit for row in rows) < len(rows)


def test_blocks_of_the_files_change_nothing(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "image.tif", smooth((70, 90)), photometric="minisblack")
    run = segmentation_run(tmp_path / "run", TWO)
    record = page_of(run, tmp_path / "image.tif", tmp_path / "one")
    monkeypatch.setattr(map_files, "STRIP_BYTES", 5 * 90 * 2 * 4)
    assert page_of(run, tmp_path / "image.tif", tmp_path / "many") == record
    for name in ("masks", "probabilities"):
        one, many = (tmp_path / folder / name / "a.tif" for folder in ("one", "many"))
        np.testing.assert_array_equal(tifffile.imread(one), tifffile.imread(many))
        with tifffile.TiffFile(many) as tiff:
            assert tiff.pages[0].rowsperstrip == 5
    for name in ("polygons/a.geojson", "overlays/a.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_large_image_has_a_subsampled_overlay_that_shows_small_regions(tmp_path, monkeypatch):
    monkeypatch.setattr("pulmo_jax.inference.outputs.OVERLAY_PX", 30)
    pixels = smooth((70, 90))
    tifffile.imwrite(tmp_path / "image.tif", pixels, photometric="minisblack")
    run = segmentation_run(tmp_path / "run", ONE)
    page_of(run, tmp_path / "image.tif", tmp_path / "out")
    inside = run.mapper.probabilities(pixels[..., None])[..., 0] > 0.5
    with Image.open(tmp_path / "out" / "overlays" / "a.png") as overlay:
        picture = np.asarray(overlay)[:24, :30]
    coloured = np.ptp(picture, axis=-1) > 0
    blocks = np.pad(inside, ((0, 2), (0, 0))).reshape(24, 3, 30, 3).any((1, 3))
    assert coloured.any()
    assert blocks[coloured].all()


def test_file_is_never_read_whole(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "image.tif", smooth((400, 30)), photometric="minisblack", rowsperstrip=8)
    monkeypatch.setattr("pulmo_jax.inference.class_maps.STRIP_PX", 2**10)
    monkeypatch.setattr(map_files, "STRIP_BYTES", 2**10)
    heights, read = [], Reader.image

    def watched(reader, ref, window=None):
        heights.append(ref.shape[0] if window is None else window.height)
        return read(reader, ref, window)

    monkeypatch.setattr(Reader, "image", watched)
    page_of(segmentation_run(tmp_path / "run", ONE), tmp_path / "image.tif", tmp_path / "out")
    assert len(heights) > 50
    assert max(heights) <= 2 * 16


def test_rows_of_a_file_are_those_of_its_image(tmp_path):
    pixels = smooth((70, 90, 3))
    tifffile.imwrite(tmp_path / "image.tif", pixels, photometric="rgb")
    refs, _ = index_images(tmp_path / "image.tif")
    rows = FileRows(Reader(), refs[0])
    assert (len(rows), rows.shape, rows.dtype) == (70, (70, 90, 3), np.uint8)
    np.testing.assert_array_equal(rows[3:20], pixels[3:20])
    np.testing.assert_array_equal(rows[60:200], pixels[60:])
    np.testing.assert_array_equal(rows[np.array([67, 68, 69, 69, 69])], pixels[[67, 68, 69, 69, 69]])
    assert rows[70:80].shape == (0, 90, 3)


def test_file_that_breaks_off_leaves_no_files(tmp_path):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, smooth((200, 90)), photometric="minisblack", compression="zlib", rowsperstrip=8)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[-2], tiff.pages[0].databytecounts[-2]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = struct.pack(f"{count}x")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"image\.tif"):
        page_of(segmentation_run(tmp_path / "run", TWO), path, tmp_path / "out")
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


# --- the verb


@pytest.fixture
def predicted(capsys):
    """Function that predicts as the verb does, and returns exit status and console output."""

    def predict(run, folder: Path, output: Path, **options) -> tuple[int, str]:
        config = SegmentConfig(run=run.path, input=folder, output=output, **options)
        with workplace(output, "predict", config, run.path) as place:
            status = predict_all(prediction, run, config, place)
        return status, capsys.readouterr().out

    return predict


@pytest.fixture
def images(tmp_path) -> Path:
    """A stack of two pages, a PNG of the same name, and a file in a folder."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    tifffile.imwrite(folder / "stack.tif", np.stack([smooth((40, 50), i) for i in range(2)]), photometric="minisblack")
    Image.fromarray(smooth((33, 47), 5)).save(folder / "one.png")
    tifffile.imwrite(folder / "one.tif", smooth((33, 47), 6), photometric="minisblack")
    Image.fromarray(smooth((20, 20), 7)).save(folder / "sub" / "c.png")
    return folder


def test_every_page_has_its_files(tmp_path, images, predicted):
    run = segmentation_run(tmp_path / "run", TWO)
    status, text = predicted(run, images, tmp_path / "out")
    assert status == 0
    assert "5 images finished" in text
    names = {"one.png", "one.tif", "stack_0000", "stack_0001", "sub/c"}
    for kind, suffix in (("masks", ".tif"), ("probabilities", ".tif"), ("polygons", ".geojson"), ("overlays", ".png")):
        root = tmp_path / "out" / kind
        found = {p.relative_to(root).as_posix().removesuffix(suffix) for p in root.rglob(f"*{suffix}")}
        assert found == names
    np.testing.assert_array_equal(
        tifffile.imread(tmp_path / "out" / "masks" / "stack_0001.tif"),
        decide(run.mapper.probabilities(smooth((40, 50), 1)[..., None]), run.mapper.thresholds, TWO),
    )
    with (tmp_path / "out" / "components.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n_components"] == len(rows) > 5
    assert [one["page"] for one in summary["images"] if one["filename"] == "stack.tif"] == [0, 1]
    assert [one["number"] for one in summary["classes"]] == [10, 20]
    assert {row["class"] for row in rows} <= set(TWO.names)


def test_repeated_call_computes_nothing_and_other_outputs_are_added(tmp_path, images, predicted):
    run = segmentation_run(tmp_path / "run", TWO)
    predicted(run, images, tmp_path / "out", polygons=False, overlays=False, probabilities=False)
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} >= {"masks", "records"}
    assert not (tmp_path / "out" / "polygons").exists()
    before = (tmp_path / "out" / "components.csv").read_text()
    _, text = predicted(run, images, tmp_path / "out", polygons=False, overlays=False, probabilities=False)
    assert "(5 of them earlier)" in text
    _, text = predicted(run, images, tmp_path / "out")
    assert "(0 of them earlier)" in text
    assert (tmp_path / "out" / "polygons" / "sub" / "c.geojson").is_file()
    assert (tmp_path / "out" / "components.csv").read_text() == before


def test_images_that_do_not_fit_the_run_fail_by_themselves(tmp_path, images, predicted):
    Image.fromarray(smooth((20, 20, 3))).save(images / "rgb.png")
    (images / "broken.tif").write_bytes(b"II*\0")
    run = segmentation_run(tmp_path / "run", TWO)
    status, text = predicted(run, images, tmp_path / "out")
    assert status != 0
    assert "5 images finished" in text
    failed = json.loads((tmp_path / "out" / "summary.json").read_text())["failed"]
    assert sorted(one["filename"] for one in failed) == ["broken.tif", "rgb.png"]
    assert "3 bands of uint8, but the run was trained on 1 of uint8" in str(failed)


def test_result_for_a_notebook_is_that_of_the_files(tmp_path):
    tifffile.imwrite(tmp_path / "image.tif", smooth((70, 90)), photometric="minisblack")
    run = segmentation_run(tmp_path / "run", TWO)
    record = page_of(run, tmp_path / "image.tif", tmp_path / "out")
    result = run.predict(tmp_path / "image.tif")
    np.testing.assert_array_equal(result.mask, tifffile.imread(tmp_path / "out" / "masks" / "a.tif"))
    for name, found in result.components.items():
        areas = [row["area_px"] for row in record["components"] if row["class"] == name]
        assert [one.area_px for one in found] == areas
    np.testing.assert_array_equal(run.predict(smooth((70, 90))).mask, result.mask)
    html = result._repr_html_()
    assert html.startswith("<figure>")
    assert "lung" in html
    assert len(result.figure().axes) == 3
    with pytest.raises(InputError, match="3 bands"):
        run.predict(smooth((20, 20, 3)))


def test_scale_of_each_image_holds_for_the_overlay(tmp_path):
    """A dim image in other units is as bright as the others."""
    run = segmentation_run(tmp_path / "run", ONE, "uint16")
    hows: tuple[Preprocessing, ...] = tuple(replace(how, percentiles=(0.0, 100.0)) for how in run.mapper.hows)
    run = replace(run, mapper=replace(run.mapper, hows=hows))
    tifffile.imwrite(tmp_path / "a.tif", smooth((70, 90)).astype(np.uint16), photometric="minisblack")
    tifffile.imwrite(tmp_path / "b.tif", smooth((70, 90)).astype(np.uint16) * 200 + 3, photometric="minisblack")
    for name in "ab":
        page_of(run, tmp_path / f"{name}.tif", tmp_path / name)
    pictures = [np.asarray(Image.open(tmp_path / name / "overlays" / "a.png")).astype(int) for name in "ab"]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert pictures[0][:70, :90].max() == 255
