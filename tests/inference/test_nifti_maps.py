"""Maps as NIfTI, read by nibabel, in the place of the input."""

import nibabel
import numpy as np
import pytest
from references.image_files import noise
from references.volumes import oblique_affine, stacked, write_nifti, write_series

from pulmo_jax.data.images import by_file, index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.volumes import Volume, find_volumes
from pulmo_jax.inference import nifti_maps
from pulmo_jax.inference.nifti_maps import open_nifti_map


def volume_in(folder) -> Volume:
    (unit,), _ = find_volumes(by_file(index_images(folder)[0]))
    assert unit.volume is not None
    return unit.volume


def write_values(path, volume, dtype=np.float32) -> None:
    """The pixels of the volume as a map."""
    reader = Reader()
    with open_nifti_map(path, volume, np.dtype(dtype)) as write:
        for ref in volume.slices:
            write(ref.shape[:2], np.dtype(dtype), reader.image(ref)[..., 0].astype(dtype).__getitem__)


@pytest.mark.parametrize("zooms", [(0.7, 0.9, 2.5), (-0.7, 0.9, 2.5), (0.7, 0.9, -2.5)])
@pytest.mark.parametrize("code", [1, 2, 4])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_map_of_a_nifti_file_lies_on_it(tmp_path, monkeypatch, zooms, code, suffix):
    monkeypatch.setattr(nifti_maps, "CHUNK_BYTES", 64)
    write_nifti(tmp_path / f"a{suffix}", noise((5, 6, 7), np.int16), oblique_affine(zooms), code)
    write_values(tmp_path / "out" / "b.nii.gz", volume_in(tmp_path / f"a{suffix}"))
    given, made = nibabel.load(tmp_path / f"a{suffix}"), nibabel.load(tmp_path / "out" / "b.nii.gz")
    np.testing.assert_array_equal(made.affine, given.affine)
    assert made.shape == given.shape
    assert made.get_data_dtype() == np.float32
    assert made.header.get_zooms() == given.header.get_zooms()
    assert made.header.get_xyzt_units()[0] == given.header.get_xyzt_units()[0] == "mm"
    for key in ("sform_code", "qform_code"):
        assert made.header[key] == given.header[key] == code
    for name in ("get_sform", "get_qform"):
        np.testing.assert_allclose(getattr(made, name)(), getattr(given, name)(), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(made.dataobj), np.asarray(given.dataobj))
    assert nibabel.aff2axcodes(made.affine) == nibabel.aff2axcodes(given.affine)


def test_codes_units_and_version_are_those_of_the_input(tmp_path):
    image = nibabel.Nifti2Image(noise((7, 6, 5), np.int16).astype(">i2"), oblique_affine((1, 2, 3)))
    image.set_sform(None, 0)
    image.set_qform(oblique_affine((1, 2, 3)), 3)
    image.header.set_xyzt_units("micron")
    image.header.set_slope_inter(2, 1)
    image.to_filename(tmp_path / "a.nii")
    write_values(tmp_path / "out" / "b.nii.gz", volume_in(tmp_path / "a.nii"))
    given, made = nibabel.load(tmp_path / "a.nii"), nibabel.load(tmp_path / "out" / "b.nii.gz")
    assert isinstance(made, nibabel.Nifti2Image)
    np.testing.assert_array_equal(made.affine, given.affine)
    assert (int(made.header["sform_code"]), int(made.header["qform_code"])) == (0, 3)
    assert made.header.get_xyzt_units()[0] == "micron"
    np.testing.assert_array_equal(np.asarray(made.dataobj), np.asarray(given.dataobj))


def test_bands_of_the_input_are_no_axis_of_the_map(tmp_path):
    nibabel.Nifti1Image(noise((7, 6, 5, 3), np.int16), np.diag([1.0, 2, 3, 1])).to_filename(tmp_path / "a.nii")
    write_values(tmp_path / "out" / "b.nii.gz", volume_in(tmp_path / "a.nii"))
    made = nibabel.load(tmp_path / "out" / "b.nii.gz")
    assert made.shape == (7, 6, 5)
    assert made.header.get_zooms() == (1, 2, 3)


def test_map_of_a_series_is_where_the_patient_is(tmp_path):
    """A voxel's LPS position, from the DICOM header, is its RAS position with x and y reversed."""
    voxels = noise((5, 9, 8), np.int16)
    origins = stacked(5)
    write_series(tmp_path / "ct", voxels, origins)
    write_values(tmp_path / "b.nii.gz", volume_in(tmp_path / "ct"))
    made = nibabel.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(made.dataobj).transpose(2, 1, 0), voxels)
    for k, y, x in ((0, 0, 0), (4, 8, 7), (2, 3, 5)):
        left, posterior, superior = origins[k] + [0.8 * x, 0.5 * y, 0]
        np.testing.assert_allclose(made.affine @ [x, y, k, 1], [-left, -posterior, superior, 1], rtol=1e-6)
    assert (int(made.header["sform_code"]), int(made.header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(made.get_qform(), made.affine, atol=1e-5)
    assert made.header.get_xyzt_units()[0] == "mm"


def test_equal_maps_are_equal_files_and_an_unfinished_one_is_none(tmp_path):
    write_nifti(tmp_path / "a.nii", noise((3, 6, 7), np.int16), np.eye(4))
    volume = volume_in(tmp_path / "a.nii")
    for name in ("b.nii.gz", "c.nii.gz"):
        write_values(tmp_path / name, volume)
    assert (tmp_path / "b.nii.gz").read_bytes() == (tmp_path / "c.nii.gz").read_bytes()
    with pytest.raises(KeyboardInterrupt), open_nifti_map(tmp_path / "d.nii.gz", volume, np.dtype(np.uint8)):
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii", "b.nii.gz", "c.nii.gz"]
