"""Volumes: which slices belong together, in which order, and where they are."""

import nibabel
import numpy as np
import pytest
import tifffile
from references.image_files import noise, write_dicom
from references.volumes import oblique_affine, stacked, write_frames, write_nifti, write_series

from pulmo_jax.data.geometry import default_group
from pulmo_jax.data.images import by_file, index_images
from pulmo_jax.data.volumes import TO_RAS, Volume, find_volumes
from pulmo_jax.types import InputError


def found_in(folder):
    refs, failed = index_images(folder)
    assert failed == []
    return find_volumes(by_file(refs))


def volume_in(folder) -> Volume:
    (unit,), notes = found_in(folder)
    assert notes == []
    assert unit.volume is not None
    assert unit.refs == unit.volume.slices
    return unit.volume


@pytest.mark.parametrize("direction", [1, -1])
def test_slices_of_a_series_are_sorted_by_position_not_by_name(tmp_path, direction):
    names = write_series(tmp_path / "ct", noise((7, 9, 8)), stacked(7)[::direction])
    volume = volume_in(tmp_path)
    assert [ref.name for ref in volume.slices] == [f"ct/{name}" for name in names[::direction]]
    assert volume.name.startswith("ct/series_")
    assert volume.space == "LPS"
    expected = [[0.8, 0, 0, -30], [0, 0.5, 0, -40], [0, 0, 3, 100], [0, 0, 0, 1]]
    np.testing.assert_allclose(volume.affine_mm, expected)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_oblique_series_is_sorted_along_its_normal(tmp_path, tilt):
    """Also with a tilted gantry, where slices shift along their rows."""
    affine = oblique_affine((0.8, 0.5, 4.0))
    affine[:3, 2] += tilt * affine[:3, 1]
    origins = affine[:3, 3] + np.arange(6)[:, None] * affine[:3, 2]
    along = (affine[:3, :2] / (0.8, 0.5)).T.round(9)
    names = write_series(tmp_path, noise((6, 9, 8)), origins, ImageOrientationPatient=along.ravel().tolist())
    volume = volume_in(tmp_path)
    assert [ref.name for ref in volume.slices] == names
    np.testing.assert_allclose(volume.affine_mm, affine, atol=1e-6)
    np.testing.assert_allclose(volume.spacing_mm, 4.0, rtol=1e-6)
    assert volume.is_regular


def test_series_in_one_folder_are_kept_apart_and_other_images_stay_single(tmp_path):
    a = write_series(tmp_path, noise((3, 9, 8)), stacked(3), ["a1", "b1", "c1"])
    b = write_series(tmp_path, noise((3, 9, 8)), stacked(3), ["a2", "b2", "c2"])
    tifffile.imwrite(tmp_path / "stack.tif", noise((4, 9, 8)), photometric="minisblack")
    units, notes = found_in(tmp_path)
    assert notes == []
    assert [[ref.name for ref in unit.refs] for unit in units] == [a, b, ["stack.tif"] * 4]
    assert units[2].volume is None


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"ImagePositionPatient": None}, "no position of every image"),
        ({"ImagePositionPatient": [0, 0, 5]}, "several images at one position"),
        ({"ImageOrientationPatient": {0: [1, 0, 0, 0, 0, 1], 1: [1, 0, 0, 0, 1, 0], 2: [1, 0, 0, 0, 1, 0]}},
         "different orientations or pixel spacings"),
        ({"PixelSpacing": {0: [0.5, 0.8], 1: [0.5, 0.8], 2: [0.5, 0.5]}}, "different orientations or pixel spacings"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "no position of every image"),
        ({"PixelSpacing": None}, "no position of every image"),
    ],
)  # fmt: skip
def test_what_is_no_volume_is_said_once_and_its_images_stay_single(tmp_path, elements, reason):
    write_series(tmp_path, noise((3, 9, 8)), stacked(3), **elements)
    units, notes = found_in(tmp_path)
    assert [len(unit.refs) for unit in units] == [1, 1, 1]
    assert all(unit.volume is None for unit in units)
    assert notes == [f"1 DICOM series are not volumes ({reason}: 1); their images are predicted singly"]


def test_images_of_different_sizes_are_no_volume(tmp_path):
    common = {"SeriesInstanceUID": "1.2.3", "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    for i, size in enumerate([8, 8, 9]):
        write_dicom(tmp_path / f"{i}.dcm", noise((size, 8)), ImagePositionPatient=[0, 0, i], **common)
    _, (note,) = found_in(tmp_path)
    assert "images of different sizes: 1" in note


def test_irregular_slices_keep_their_positions_and_a_gap_is_no_contact(tmp_path):
    origins = stacked(7)
    origins[:, 2] = [0, 2, 4, 10, 12, 14, 16]  # two slices are missing
    write_series(tmp_path, noise((7, 9, 8)), origins)
    (unit,), notes = found_in(tmp_path)
    volume = unit.volume
    assert volume is not None
    assert notes == [
        f"{volume.name}: its slices are 2 to 6 mm apart, some slices are missing; places in mm follow the position of "
        "each slice"
    ]
    assert volume.adjacent.tolist() == [True, True, False, True, True, True]
    np.testing.assert_allclose(volume.thickness_mm, 2)
    assert not volume.is_regular


def test_thickness_follows_a_change_of_spacing(tmp_path):
    origins = stacked(5)
    origins[:, 2] = [0, 2, 4, 9, 14]
    write_series(tmp_path, noise((5, 9, 8)), origins)
    volume = found_in(tmp_path)[0][0].volume
    assert volume is not None
    assert volume.adjacent.all()
    np.testing.assert_allclose(volume.thickness_mm, [2, 2, 3.5, 5, 5])


def test_frames_of_one_file_are_a_volume(tmp_path):
    """An enhanced object has the positions of its frames in functional groups; here, they descend."""
    write_frames(tmp_path / "x.dcm", noise((3, 9, 8)), stacked(3, -10.0))
    volume = volume_in(tmp_path)
    assert volume.name == "x.dcm"
    assert [ref.page for ref in volume.slices] == [2, 1, 0]
    np.testing.assert_allclose(volume.affine_mm[:3, 3], [-30, -40, 80])
    np.testing.assert_allclose(np.diag(volume.affine_mm), [0.8, 0.5, 10, 1])


@pytest.mark.parametrize("zooms", [(0.7, 0.9, 2.5), (-0.7, 0.9, 2.5), (0.7, 0.9, -2.5)])
def test_planes_of_a_nifti_file_are_where_nibabel_says(tmp_path, zooms):
    affine = oblique_affine(zooms)
    write_nifti(tmp_path / "a.nii.gz", noise((5, 6, 7), np.int16), affine)
    volume = volume_in(tmp_path)
    loaded = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.affine_mm, loaded.affine, atol=1e-5)
    assert (volume.space, volume.name) == ("RAS", "a.nii.gz")
    assert [ref.page for ref in volume.slices] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(volume.spacing_mm, 2.5, rtol=1e-5)


def test_nifti_in_metres_is_placed_in_mm(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 4, 3), np.int16), np.diag([0.001, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    image.to_filename(tmp_path / "a.nii")
    np.testing.assert_allclose(np.diag(volume_in(tmp_path).affine_mm), [1, 2, 3, 1], rtol=1e-6)


def test_nifti_without_orientation_or_with_a_flat_affine_says_so(tmp_path):
    for name, affine, code in (("none", np.diag([2.0, 2, 2, 1]), 0), ("flat", np.diag([1.0, 1, 1, 1]), 1)):
        image = nibabel.Nifti1Image(np.zeros((4, 4, 3), np.int16), affine)
        image.set_sform(affine, code)
        image.set_qform(affine, 0)
        if name == "flat":
            image.header["srow_z"] = 0
            image.header["srow_x"][0] = 1
        with (tmp_path / f"{name}.nii").open("wb") as file:
            file.write(image.header.binaryblock.ljust(352, b"\0") + bytes(96))
    (flat, none), notes = found_in(tmp_path)
    assert flat.volume is not None
    assert none.volume is not None
    assert none.volume.space == "unknown"
    assert none.volume.placed
    assert not flat.volume.placed
    assert notes == ["flat.nii: its header has no valid geometry; places are given in voxels only"]


def test_left_and_posterior_become_right_and_anterior():
    np.testing.assert_array_equal(TO_RAS @ [1, 2, 3, 1], [-1, -2, 3, 1])


def test_group_of_a_dicom_file_is_its_patient_and_does_not_name_him(tmp_path):
    write_series(tmp_path / "a", noise((2, 9, 8)), stacked(2))
    write_series(tmp_path / "b", noise((2, 9, 8)), stacked(2))
    write_series(tmp_path / "c", noise((2, 9, 8)), stacked(2), PatientID="")
    write_dicom(tmp_path / "single.dcm", noise((9, 8)))
    tifffile.imwrite(tmp_path / "x.tif", noise((9, 8)))
    refs, _ = index_images(tmp_path)
    groups = {ref.name: ref.group for ref in refs}
    by_patient = {group for name, group in groups.items() if name[0] in "ab"}
    by_series = {group for name, group in groups.items() if name[0] == "c"}
    assert len(by_patient) == len(by_series) == 1
    assert by_patient != by_series
    assert all(group.startswith("patient_") and "7" not in group.split("_") for group in by_patient)
    assert all("patient 7" not in group for group in groups.values())
    assert groups["single.dcm"] == "single.dcm"
    assert groups["x.tif"] == "x.tif"
    named, _ = index_images(tmp_path, group_regex="^(.)")
    assert {ref.group for ref in named} == {"I", "s", "x"}


def test_deleted_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"x\.dcm"):
        default_group(tmp_path / "x.dcm", "x.dcm")
