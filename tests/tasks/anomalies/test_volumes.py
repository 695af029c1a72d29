"""Prediction of volumes: what is written, where it is, and what a second call does."""

import csv
import io
import json
import re

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.uid import generate_uid
from references.anomaly_run import run_on, write_sealed
from references.volumes import oblique_affine, stacked, write_frames, write_nifti, write_series
from scipy import ndimage

from pulmo_jax.host.console import SOME_FAILED, Console
from pulmo_jax.host.extras import install_command
from pulmo_jax.host.outputs import output_folder
from pulmo_jax.inference import dicom_seg
from pulmo_jax.runs.place import Place
from pulmo_jax.runs.records import predict_all
from pulmo_jax.tasks.anomalies import maps, prediction
from pulmo_jax.tasks.anomalies.config import MapConfig
from pulmo_jax.types import InputError


def voxels_with_a_blob(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """10 dark slices (n, H, W) with a bright box in slices 3 to 5, and the box."""
    voxels = np.random.default_rng(seed).integers(0, 200, (10, 40, 50)).astype(np.uint8)
    box = np.zeros(voxels.shape, bool)
    box[3:6, 10:16, 20:30] = True
    return np.where(box, np.uint8(250), voxels), box


@pytest.fixture
def predict(tmp_path):
    """predict(source, format=...) -> (exit status, text on the console); results in tmp_path/out."""
    run = run_on(tmp_path / "run", "uint8")
    write_sealed(run.path)

    def call(source, status=0, **options):
        text, out = io.StringIO(), tmp_path / "out"
        config = MapConfig(run=run.path, input=source, output=out, **options)
        with output_folder(out, "predict"):
            place = Place(run.path, out, Console(file=text, width=200))
            assert predict_all(prediction, run, config, place) == status
        return text.getvalue()

    return call


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_slices_of_a_series_are_one_volume(predict, tmp_path):
    voxels, box = voxels_with_a_blob()
    names = write_series(tmp_path / "in" / "ct", voxels, stacked(10))
    tifffile.imwrite(tmp_path / "in" / "plain.tif", voxels[0])
    text = predict(tmp_path / "in")
    (row,) = rows_of(tmp_path / "out" / "findings_3d.csv")
    assert row["volume"].startswith("ct/series_")
    assert (row["space"], row["first_slice"], row["last_slice"], row["voxels"]) == ("LPS", "3", "5", str(box.sum()))
    assert float(row["volume_mm3"]) == pytest.approx(box.sum() * 0.8 * 0.5 * 3)
    place = [float(row[f"{axis}_mm"]) for axis in "xyz"]
    assert place == pytest.approx([-30 + 24.5 * 0.8, -40 + 12.5 * 0.5, 100 + 4 * 3])
    assert row["peak_filename"] == f"ct/{names[int(row['peak_slice'])]}"
    for k, name in enumerate(names):
        mask = tifffile.imread(tmp_path / "out" / "maps" / "ct" / name.replace(".dcm", "_mask.tif"))
        np.testing.assert_array_equal(mask > 0, box[k])
    images = rows_of(tmp_path / "out" / "image_scores.csv")
    assert [image["filename"] for image in images] == [*(f"ct/{name}" for name in sorted(names)), "plain.tif"]
    assert {image["filename"]: image["slice"] for image in images} == {
        **{f"ct/{name}": str(k) for k, name in enumerate(names)}, "plain.tif": "",
    }  # fmt: skip
    assert {image["findings"] for image in images if image["slice"] in ("3", "4", "5")} == {"1"}
    assert [image["anomalous"] for image in images].count("yes") == 3
    detections = rows_of(tmp_path / "out" / "detections.csv")
    assert [one["filename"] for one in detections] == sorted(f"ct/{name}" for name in names[3:6])
    assert text.endswith("1 findings across the slices of 1 volumes; 3 of 11 images anomalous (3 findings)\n")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["n_findings_3d"] == 1
    assert summary["volumes"][0]["slices"] == [f"ct/{name}" for name in names]


@pytest.mark.parametrize("zooms", [(0.7, 0.9, 2.5), (-0.7, 0.9, 2.5)])
def test_maps_of_a_nifti_file_lie_on_it(predict, tmp_path, zooms):
    voxels, box = voxels_with_a_blob()
    (tmp_path / "in").mkdir()
    affine = oblique_affine(zooms)
    write_nifti(tmp_path / "in" / "a.nii.gz", voxels, affine)
    predict(tmp_path / "in")
    tiffs = {kind: tifffile.imread(tmp_path / "out" / "maps" / f"a_{kind}.tif") for kind in maps.MAPS}
    text = predict(tmp_path / "in", format="nifti")
    assert "(0 of them earlier)" in text
    given = nibabel.load(tmp_path / "in" / "a.nii.gz")
    for kind, pages in tiffs.items():
        made = nibabel.load(tmp_path / "out" / "maps" / f"a_{kind}.nii.gz")
        np.testing.assert_array_equal(made.affine, given.affine)
        assert made.shape == given.shape
        np.testing.assert_array_equal(
            np.asarray(made.dataobj).transpose(2, 1, 0), pages // 255 if kind == "mask" else pages
        )
    np.testing.assert_array_equal(np.asarray(made.dataobj) > 0, np.asarray(given.dataobj) == 250)
    (row,) = rows_of(tmp_path / "out" / "findings_3d.csv")
    z, y, x = ndimage.center_of_mass(box)
    place = nibabel.affines.apply_affine(given.affine, [x, y, z])
    np.testing.assert_allclose([float(row[f"{axis}_mm"]) for axis in "xyz"], place, rtol=1e-5)
    assert float(row["volume_mm3"]) == pytest.approx(box.sum() * 0.7 * 0.9 * 2.5, rel=1e-5)
    assert row["space"] == "RAS"
    again = predict(tmp_path / "in", format="nifti")
    assert "10 images finished (10 of them earlier)" in again


def test_maps_of_a_series_are_one_nifti_file(predict, tmp_path):
    voxels, box = voxels_with_a_blob()
    write_series(tmp_path / "in", voxels, stacked(10)[::-1])
    predict(tmp_path / "in", format="nifti")
    (mask,) = (tmp_path / "out" / "maps").glob("series_*_mask.nii.gz")
    made = nibabel.load(mask)
    np.testing.assert_array_equal(np.asarray(made.dataobj).transpose(2, 1, 0) > 0, box[::-1])
    np.testing.assert_allclose(made.affine @ [0, 0, 0, 1], [30, 40, 100, 1], rtol=1e-6)
    assert len(list((tmp_path / "out" / "maps").glob("*_overlay.png"))) == 10
    assert list((tmp_path / "out" / "maps").glob("*.tif")) == []


@pytest.mark.parametrize("shuffled", [False, True])
def test_frames_of_one_file_are_mapped_in_the_order_of_the_format(predict, tmp_path, shuffled):
    """TIFF pages are frames; NIfTI slices are sorted by position; the findings are the same."""
    voxels, box = voxels_with_a_blob()
    order = np.random.default_rng(0).permutation(10) if shuffled else np.arange(10)[::-1]
    (tmp_path / "in").mkdir()
    write_frames(tmp_path / "in" / "x.dcm", voxels[order], stacked(10)[order])
    tables = []
    for form in ("tiff", "nifti"):
        predict(tmp_path / "in", format=form)
        tables.append((tmp_path / "out" / "findings_3d.csv").read_text())
    assert tables[0] == tables[1]
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "maps" / "x_mask.tif") > 0, box[order])
    made = nibabel.load(tmp_path / "out" / "maps" / "x_mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(made.dataobj).transpose(2, 1, 0) > 0, box)
    (row,) = rows_of(tmp_path / "out" / "findings_3d.csv")
    assert (row["first_slice"], row["last_slice"], row["voxels"]) == ("3", "5", str(box.sum()))


@pytest.mark.parametrize("form", ["tiff", "nifti"])
def test_damaged_slice_loses_no_other(predict, tmp_path, monkeypatch, form):
    """Its slice is empty, findings do not cross it, and the next call tries again."""
    voxels, _ = voxels_with_a_blob()
    names = write_series(tmp_path / "in", voxels, stacked(10))
    path = tmp_path / "in" / names[4]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"MONOCHROME2 ", b"MONOCHROME9 "))
    text = predict(tmp_path / "in", format=form, status=SOME_FAILED)
    assert "9 images finished" in text  # its header cannot be read: a gap
    rows = rows_of(tmp_path / "out" / "findings_3d.csv")
    assert sorted((row["first_slice"], row["last_slice"]) for row in rows) == [("3", "3"), ("4", "4")]
    path.write_bytes(whole)
    original = maps.score_page

    def failing(ref, *args):
        if ref.path == path:
            raise InputError(f"{path}: its pixels are damaged")
        return original(ref, *args)

    with monkeypatch.context() as patched:
        patched.setattr(maps, "score_page", failing)
        predict(tmp_path / "in", format=form, status=SOME_FAILED)
    rows = rows_of(tmp_path / "out" / "findings_3d.csv")
    assert sorted((row["first_slice"], row["last_slice"]) for row in rows) == [("3", "3"), ("5", "5")]
    images = rows_of(tmp_path / "out" / "image_scores.csv")
    assert len(images) == 10
    assert [image["filename"] for image in images if image["reason"].startswith("failed: ")] == [names[4]]
    if form == "nifti":
        (score,) = (tmp_path / "out" / "maps").glob("*_score.nii.gz")
        values = np.asarray(nibabel.load(score).dataobj)
        assert np.isnan(values[..., 4]).all()
        assert np.isfinite(np.delete(values, 4, axis=2)).all()
    assert "0 files failed" in predict(tmp_path / "in", format=form)
    assert len(rows_of(tmp_path / "out" / "findings_3d.csv")) == 1


@pytest.mark.parametrize("form", ["tiff", "nifti"])
@pytest.mark.parametrize("number", [0, 9])
def test_series_with_a_slice_of_another_depth_keeps_the_others(predict, tmp_path, form, number):
    """Also if it is the first slice, from which nothing about the others may follow."""
    voxels, _ = voxels_with_a_blob()
    names = write_series(tmp_path / "in", voxels, stacked(10))
    other = pydicom.dcmread(tmp_path / "in" / names[number])
    other.BitsAllocated, other.BitsStored, other.HighBit = 16, 16, 15
    other.PixelData = bytes(2 * voxels[0].size)
    other.save_as(tmp_path / "in" / names[number])
    predict(tmp_path / "in", format=form, status=SOME_FAILED)
    images = rows_of(tmp_path / "out" / "image_scores.csv")
    assert [image["filename"] for image in images if image["reason"]] == [names[number]]
    assert len([image for image in images if image["image_score"]]) == 9
    (row,) = rows_of(tmp_path / "out" / "findings_3d.csv")
    assert (row["first_slice"], row["last_slice"]) == ("3", "5")


@pytest.mark.parametrize("form", ["tiff", "nifti", "dicom_seg"])
def test_series_whose_slices_all_fail_leaves_no_maps(predict, tmp_path, capsys, form):
    """A mask of zeros, or one of an earlier call, would mean no findings."""
    if form == "dicom_seg":
        pytest.importorskip("highdicom", reason="needs the extra dicom_seg")
    voxels, _ = voxels_with_a_blob()
    uids = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid()}
    names = write_series(tmp_path / "in", voxels, stacked(10), **uids)
    predict(tmp_path / "in", format=form)
    assert list((tmp_path / "out" / "maps").iterdir())
    write_series(tmp_path / "in", voxels.astype(np.uint16), stacked(10), names, RescaleIntercept=-1024, **uids)
    text = predict(tmp_path / "in", format=form, status=SOME_FAILED)
    assert "0 images finished (0 of them earlier), 1 files failed" in text
    told = capsys.readouterr().err
    assert told.count("failed: series_") == 1
    assert f"all of its 10 slices failed, so it has no maps: {tmp_path / 'in' / names[0]}: 1 bands of int32" in told
    assert [path for path in (tmp_path / "out" / "maps").rglob("*") if path.is_file()] == []
    (row,) = rows_of(tmp_path / "out" / "image_scores.csv")
    assert row["filename"].startswith("series_")
    assert "all of its 10 slices failed" in row["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tiff", "nifti"])
def test_killed_prediction_of_a_volume_goes_on(predict, tmp_path, monkeypatch, form):
    voxels, _ = voxels_with_a_blob()
    write_series(tmp_path / "in" / "a", voxels, stacked(10))
    write_series(tmp_path / "in" / "b", voxels, stacked(10))
    calls, original = [], maps.score_page

    def stopping(*args):
        calls.append(args)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(maps, "score_page", stopping)
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "in", format=form)
    assert not list((tmp_path / "out" / "maps").rglob(".*"))
    text = predict(tmp_path / "in", format=form)
    assert "20 images finished (10 of them earlier)" in text
    assert len(calls) == 15 + 10
    assert len(rows_of(tmp_path / "out" / "findings_3d.csv")) == 2
    listed = {json.loads(line) for line in (tmp_path / "out" / ".pulmo_jax").read_text().splitlines()[1:] if line}
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found - {".pulmo_jax", "run.lock"} <= listed


def test_new_slice_renews_its_volume_and_no_other(predict, tmp_path):
    voxels, _ = voxels_with_a_blob()
    names = write_series(tmp_path / "in" / "a", voxels, stacked(10))
    write_series(tmp_path / "in" / "b", voxels, stacked(10))
    last = (tmp_path / "in" / "a" / names[9]).read_bytes()
    (tmp_path / "in" / "a" / names[9]).unlink()
    assert "19 images finished (0 of them earlier)" in predict(tmp_path / "in")
    (tmp_path / "in" / "a" / names[9]).write_bytes(last)
    assert "20 images finished (10 of them earlier)" in predict(tmp_path / "in")


def test_output_name_of_another_input_is_no_result_of_this_one(predict, tmp_path):
    """a.tif and a.png both prefer `a`: what one call writes for a.png is not taken for a.tif by the next."""
    voxels, _ = voxels_with_a_blob()
    (tmp_path / "in").mkdir()
    tif, png = tmp_path / "in" / "a.tif", tmp_path / "in" / "a.png"
    tifffile.imwrite(tif, voxels[4])
    assert "1 images finished (0 of them earlier)" in predict(tmp_path / "in")
    expected = tifffile.imread(tmp_path / "out" / "maps" / "a_score.tif")
    tif.rename(tmp_path / "kept.tif")
    Image.fromarray(voxels[0]).save(png)
    assert "1 images finished (0 of them earlier)" in predict(tmp_path / "in")
    png.unlink()
    (tmp_path / "kept.tif").rename(tif)
    assert "1 images finished (0 of them earlier)" in predict(tmp_path / "in")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out" / "maps" / "a_score.tif"), expected)
    Image.fromarray(voxels[0]).save(png)
    predict(tmp_path / "in")
    assert {"a.tif_score.tif", "a.png_score.tif"} <= {p.name for p in (tmp_path / "out" / "maps").iterdir()}
    rows = rows_of(tmp_path / "out" / "image_scores.csv")
    assert [(row["filename"], row["findings"]) for row in rows] == [("a.png", "0"), ("a.tif", "1")]


def test_image_without_a_score_and_failed_file_are_rows_too(predict, tmp_path):
    voxels, _ = voxels_with_a_blob()
    for folder in ("in", "masks"):
        (tmp_path / folder).mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", voxels[4])
    tifffile.imwrite(tmp_path / "masks" / "a.tif", np.zeros((40, 50), np.uint8))
    (tmp_path / "in" / "b.tif").write_bytes(b"II*\0 damaged")
    predict(tmp_path / "in", foreground=tmp_path / "masks", status=SOME_FAILED)
    a, b = rows_of(tmp_path / "out" / "image_scores.csv")
    assert (a["image_score"], a["anomalous"], a["reason"]) == ("", "", "no pixel could be scored")
    assert b["filename"] == "b.tif"
    assert b["reason"].startswith("failed: ")


def test_segmentation_needs_its_extra(predict, tmp_path, monkeypatch):
    voxels, _ = voxels_with_a_blob()
    write_series(tmp_path / "in", voxels, stacked(10))
    monkeypatch.setattr(dicom_seg.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape(install_command("dicom_seg"))):
        predict(tmp_path / "in", format="dicom_seg")


@pytest.mark.parametrize("blob", [True, False])
def test_segmentation_of_a_series_is_its_mask(predict, tmp_path, blob):
    highdicom = pytest.importorskip("highdicom", reason="needs the extra dicom_seg")
    voxels, box = voxels_with_a_blob()
    voxels, box = (voxels, box) if blob else (np.minimum(voxels, 190), np.zeros_like(box))
    names = write_series(tmp_path / "in", voxels, stacked(10))
    predict(tmp_path / "in", format="dicom_seg")
    (path,) = (tmp_path / "out" / "maps").glob("series_*_seg.dcm")
    segmentation = highdicom.seg.segread(path)
    assert segmentation.PatientID == "patient 7"
    assert segmentation.get_segment_description(1).SegmentLabel == "Finding"
    for k, name in enumerate(names):
        source = pydicom.dcmread(tmp_path / "in" / name)
        pixels = segmentation.get_pixels_by_source_instance(
            [source.SOPInstanceUID], ignore_spatial_locations=True, assert_missing_frames_are_empty=True
        )
        np.testing.assert_array_equal(pixels[0, ..., 0] > 0, box[k])
    assert "10 images finished (10 of them earlier)" in predict(tmp_path / "in", format="dicom_seg")


def test_segmentation_of_frames_is_their_mask(predict, tmp_path):
    highdicom = pytest.importorskip("highdicom", reason="needs the extra dicom_seg")
    voxels, box = voxels_with_a_blob()
    order = np.random.default_rng(1).permutation(10)
    (tmp_path / "in").mkdir()
    write_frames(tmp_path / "in" / "x.dcm", voxels[order], stacked(10)[order])
    predict(tmp_path / "in", format="dicom_seg")
    segmentation = highdicom.seg.segread(tmp_path / "out" / "maps" / "x_seg.dcm")
    pixels = segmentation.get_pixels_by_source_frame(
        pydicom.dcmread(tmp_path / "in" / "x.dcm").SOPInstanceUID, list(range(1, 11)),
        ignore_spatial_locations=True, assert_missing_frames_are_empty=True,
    )  # fmt: skip
    np.testing.assert_array_equal(pixels[..., 0] > 0, box[order])


@pytest.mark.parametrize(
    ("keyword", "empty", "reason"),
    [
        ("FrameOfReferenceUID", False, "highdicom cannot make a segmentation of it"),
        ("SliceThickness", False, "its slices have no SliceThickness (0018,0050)"),
        ("SliceThickness", True, "its slices have no SliceThickness (0018,0050)"),
    ],
)
def test_series_without_what_a_segmentation_needs_is_told(predict, tmp_path, capsys, keyword, empty, reason):
    pytest.importorskip("highdicom", reason="needs the extra dicom_seg")
    voxels, _ = voxels_with_a_blob()
    for name in write_series(tmp_path / "in", voxels, stacked(10)):
        slice_of = pydicom.dcmread(tmp_path / "in" / name)
        delattr(slice_of, keyword)
        if empty:
            setattr(slice_of, keyword, None)
        slice_of.save_as(tmp_path / "in" / name)
    predict(tmp_path / "in", format="dicom_seg", status=SOME_FAILED)
    told = capsys.readouterr().err
    assert reason in told
    assert "use format=nifti or tiff" in told
    assert not list((tmp_path / "out" / "maps").glob("*_seg.dcm"))


def test_segmentation_of_a_series_without_type_2_attributes(predict, tmp_path):
    """De-identified: absent attributes are empty in the segmentation, and the series is unchanged."""
    highdicom = pytest.importorskip("highdicom", reason="needs the extra dicom_seg")
    voxels, box = voxels_with_a_blob()
    for name in write_series(tmp_path / "in", voxels, stacked(10)):
        header = pydicom.dcmread(tmp_path / "in" / name)
        for keyword in (set(dicom_seg.TYPE_2) | {"SeriesNumber", "InstanceNumber"}) & set(header.dir()):
            delattr(header, keyword)
        header.save_as(tmp_path / "in" / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    predict(tmp_path / "in", format="dicom_seg")
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    (path,) = (tmp_path / "out" / "maps").glob("series_*_seg.dcm")
    segmentation = highdicom.seg.segread(path)
    of_series = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID")
    assert [str(segmentation[keyword].value or "") for keyword in of_series] == [""] * len(of_series)
    assert segmentation.pixel_array.sum() == box.sum()


@pytest.mark.filterwarnings("default")  # as outside of the tests: shown, and not an error
@pytest.mark.parametrize(
    ("element", "told"),
    [
        ({"PatientName": "anonymous"}, ""),
        ({"StudyInstanceUID": "1.2.a.b", "PatientID": "7" * 65}, "The value length (65) exceeds the maximum length"),
    ],
)
def test_invalid_values_of_a_series_are_told_in_one_line(predict, tmp_path, capsys, recwarn, element, told):
    pytest.importorskip("highdicom", reason="needs the extra dicom_seg")
    voxels, _ = voxels_with_a_blob()
    write_series(tmp_path / "in", voxels, stacked(10), **element)
    recwarn.clear()  # those of writing it
    predict(tmp_path / "in", format="dicom_seg")
    shown = [str(warning.message) for warning in recwarn]  # of other tests, too: databases that highdicom left open
    assert [text for text in shown if not text.startswith("unclosed database")] == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told)
    assert told in "".join(lines)
    assert all(line.startswith("warning: series_") and "repeats invalid values of the series" in line for line in lines)
