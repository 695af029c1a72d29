"""NIfTI: axes, types, scaling, versions, units, and what is refused."""

import gzip
import os
import tempfile

import nibabel
import numpy as np
import pytest
from references.image_files import noise

from pulmo_jax.data.sources import open_source
from pulmo_jax.types import InputError, Window


def read(path) -> np.ndarray:
    with open_source(path) as source:
        return np.stack([source.read(page) for page in range(source.shape[0])])


def save(path, data: np.ndarray, image_class=nibabel.Nifti1Image) -> None:
    image_class(data, np.eye(4)).to_filename(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("shape", [(7, 6), (7, 6, 5), (7, 6, 5, 4)])
def test_pages_are_planes_of_the_third_axis(tmp_path, suffix, image_class, shape):
    data = noise(shape, np.int16)
    path = tmp_path / f"x{suffix}"
    save(path, data, image_class)
    loaded = np.asarray(nibabel.load(path).dataobj).reshape(*shape, *[1] * (4 - len(shape)))
    np.testing.assert_array_equal(loaded.reshape(shape), data)
    np.testing.assert_array_equal(read(path), loaded.transpose(2, 1, 0, 3))
    with open_source(path) as source:
        page, window = source.shape[0] - 1, Window(1, 2, 3, 4)
        np.testing.assert_array_equal(
            source.read(page, window), loaded[2:6, 1:4, page].swapaxes(0, 1).reshape(3, 4, -1)
        )


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "i8", "f4", "f8", ">i2", ">f4"])
def test_depth_is_kept(tmp_path, dtype):
    data = noise((7, 6, 5), np.dtype(dtype).newbyteorder("=").type).astype(dtype)
    header = nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    header.set_data_dtype(dtype)
    nibabel.Nifti1Image(data, np.eye(4), header).to_filename(tmp_path / "x.nii")
    found = read(tmp_path / "x.nii")
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found[..., 0], data.transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [(np.uint8, np.float32), (np.int16, np.float32), (np.int32, np.float64), (np.float32, np.float32)],
)
@pytest.mark.parametrize(("slope", "intercept"), [(2, 0), (0.5, -1024), (1, 3)])
def test_slope_and_intercept(tmp_path, dtype, scaled, slope, intercept):
    data = noise((7, 6, 5), dtype)
    save(tmp_path / "x.nii", data)
    content = bytearray((tmp_path / "x.nii").read_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    (tmp_path / "x.nii").write_bytes(content)
    found = read(tmp_path / "x.nii")
    assert found.dtype == scaled
    expected = nibabel.load(tmp_path / "x.nii").get_fdata().transpose(2, 1, 0)
    np.testing.assert_allclose(found[..., 0], expected, rtol=1e-6)
    assert not np.array_equal(expected, data.transpose(2, 1, 0))


@pytest.mark.parametrize(("unit", "mm"), [("mm", 1), ("micron", 0.001), ("meter", 1000), ("unknown", 1)])
def test_zooms_are_resolution(tmp_path, unit, mm):
    image = nibabel.Nifti1Image(noise((7, 6, 5), np.int16), np.diag([0.5, 0.25, 2, 1]))
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "x.nii")
    with open_source(tmp_path / "x.nii") as source:
        assert source.tags.resolution == pytest.approx((20 / mm, 40 / mm, 3))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (noise((3, 3, 3, 3, 3), np.int16), r"axes of \[3, 3, 3, 3, 3\]"),
        (noise((3, 3, 3), np.float32).astype(np.complex64), "complex64"),
        (np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "voxels of type"),
        (noise((9,), np.int16), r"axes of \[9\]"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, data, reason):
    save(tmp_path / "x.nii", data)
    with pytest.raises(InputError, match=reason):
        open_source(tmp_path / "x.nii")


def test_a_pair_of_files_is_refused(tmp_path):
    nibabel.Nifti1Pair(noise((7, 6, 5), np.int16), np.eye(4)).to_filename(tmp_path / "x.img")
    with pytest.raises(InputError, match="pair"):
        open_source(tmp_path / "x.hdr")


def test_more_than_the_header_declares_is_not_kept(tmp_path, monkeypatch):
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the source)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: unpacked)
    data = noise((7, 6, 5), np.int16)
    save(tmp_path / "x.nii", data)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress((tmp_path / "x.nii").read_bytes() + bytes(20 * 2**20)))
    with open_source(tmp_path / "x.nii.gz") as source:
        np.testing.assert_array_equal(source.read(4)[..., 0], data[:, :, 4].T)
        assert unpacked.seek(0, os.SEEK_END) == (tmp_path / "x.nii").stat().st_size
    assert unpacked.closed


def test_a_header_that_was_shortened_is_found_by_the_checksum_at_the_end(tmp_path):
    """Fewer voxels than there are would be read without a word, were what follows them left alone."""
    save(tmp_path / "x.nii", noise((7, 6, 5), np.int16))
    packed = bytearray(gzip.compress((tmp_path / "x.nii").read_bytes(), 0))
    at = packed.index(np.array([3, 7, 6, 5], "<i2").tobytes())
    packed[at + 6 : at + 8] = b"\4\0"
    (tmp_path / "x.nii.gz").write_bytes(packed)
    with open_source(tmp_path / "x.nii.gz") as source:
        assert source.shape == (4, 6, 7, 1)
        with pytest.raises(InputError, match="CRC"):
            source.read()


def test_a_bomb_behind_the_voxels_is_refused(tmp_path):
    save(tmp_path / "x.nii", noise((7, 6, 5), np.int16))
    content = (tmp_path / "x.nii").read_bytes()
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(content + bytes(80 * 2**20), 1))
    with open_source(tmp_path / "x.nii.gz") as source, pytest.raises(InputError, match="unpacks to far more"):
        source.read()
