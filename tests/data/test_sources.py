"""What holds for image files of every format: round trips, windows, limits, damage, and finding them."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from references.image_files import noise, write_all, write_dicom

from pulmo_jax.data.sources import list_images, open_source
from pulmo_jax.types import InputError, Window

TIFFS = ["plain", "big_endian", "bigtiff", "deflate_strips", "lzw_tiles", "plain_tiles", "zstd_big_endian"]
NAMES = [*TIFFS, "packbits", "lzma", "png16", "png_rgb", "jpeg", "dicom", ".nii", ".nii.gz"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    return write_all(tmp_path_factory.mktemp("images"))


def all_pixels(path: Path) -> np.ndarray:
    with open_source(path) as source:
        return np.stack([source.read(page) for page in range(source.shape[0])])


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(files, name):
    path, expected = files[name]
    with open_source(path) as source:
        assert source.path == path
        assert source.shape == expected.shape
        assert source.dtype == expected.dtype
        for page, pixels in enumerate(expected):
            found = source.read(page)
            assert found.dtype == source.dtype
            assert found.dtype.isnative
            np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("name", NAMES)
def test_any_window_is_the_crop_of_the_page(files, name):
    path, expected = files[name]
    pages, height, width, _ = expected.shape

    @given(st.data())
    def check(data):
        page, y, x = (data.draw(st.integers(0, n - 1)) for n in (pages, height, width))
        h, w = data.draw(st.integers(1, height - y)), data.draw(st.integers(1, width - x))
        found = source.read(page, Window(y, x, h, w))
        np.testing.assert_array_equal(found, expected[page, y : y + h, x : x + w])

    with open_source(path) as source:
        check()


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_is_the_callers_own(files, name):
    path, expected = files[name]
    with open_source(path) as source:
        source.read()[:] = 0
        np.testing.assert_array_equal(source.read(), expected[0])


@pytest.mark.parametrize("window", [(-1, 0, 5, 5), (0, -1, 5, 5), (46, 0, 5, 5), (0, 66, 5, 5), (0, 0, 0, 5)])
@pytest.mark.parametrize("name", ["plain", "lzw_tiles", "png16"])
def test_windows_outside_of_the_image_are_errors(files, name, window):
    with open_source(files[name][0]) as source, pytest.raises(ValueError, match="50 x 70") as error:
        source.read(0, Window(*window))
    assert not isinstance(error.value, InputError)


@pytest.mark.parametrize("page", [-1, 3])
def test_pages_outside_of_the_file_are_errors(files, page):
    with open_source(files["plain"][0]) as source, pytest.raises(ValueError, match="3 pages"):
        source.read(page)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_off_anywhere_is_refused_or_read_in_full(files, name, tmp_path):
    path, expected = files[name]
    content = path.read_bytes()
    lengths = {*np.linspace(0, len(content) - 1, 40, dtype=int), *range(len(content) - 20, len(content))}
    refused = 0
    for length in lengths:
        cut = tmp_path / path.name
        cut.write_bytes(content[:length])
        try:
            found = all_pixels(cut)
        except InputError:
            refused += 1
        else:
            np.testing.assert_array_equal(found, expected)
    assert refused >= 40


@pytest.mark.parametrize("name", ["png16", "png_rgb", ".nii.gz", "deflate_strips"])
def test_checksums_catch_flipped_bits(files, name, tmp_path):
    path, _ = files[name]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    damaged = tmp_path / path.name
    damaged.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        all_pixels(damaged)


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_is_on_the_decoded_size_of_a_page(files, name):
    path, expected = files[name]
    with open_source(path, max_bytes=expected[0].nbytes) as source:
        source.read()
    with pytest.raises(InputError, match=r"limit.*\n.*data\.max_image_mb"):
        open_source(path, max_bytes=expected[0].nbytes - 1)


def write_png_header(path: Path, width: int, height: int) -> None:
    """A greyscale PNG of next to no pixels, whatever its header says."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"\0" * 9),
    }
    chunks[b"IEND"] = b""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def test_a_bomb_is_refused_from_its_header(tmp_path):
    """And the limit is ours: Pillow would refuse 1.6 gigapixels, which are within 2 GiB."""
    write_png_header(tmp_path / "bomb.png", 40_000, 40_000)
    with open_source(tmp_path / "bomb.png") as source:
        assert source.shape == (1, 40_000, 40_000, 1)
    write_png_header(tmp_path / "bomb.png", 60_000, 60_000)
    with pytest.raises(InputError, match=r"3433\.2 MB, the limit is 2048\.0 MB"):
        open_source(tmp_path / "bomb.png")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".jpg", ".tiff", ".txt", ""])
def test_content_decides_not_the_suffix(files, name, suffix, tmp_path):
    path, expected = files[name]
    renamed = tmp_path / f"image{suffix}"
    shutil.copy(path, renamed)
    with open_source(str(renamed)) as source:
        np.testing.assert_array_equal(source.read(), expected[0])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.tif", b"", r"is empty \(0 bytes\)"),
        ("text.png", b"not an image, whatever its name" * 20, "unknown image format"),
        ("zipped.nii.gz", bytes.fromhex("1f8b0800"), "cut off"),
        ("gif.png", b"GIF89a" + bytes(500), "unknown image format"),
        ("short.tif", b"II*\0", "cut off"),
    ],
)
def test_other_content_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: .*{reason}"):
        open_source(tmp_path / name)


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        open_source(tmp_path)
    with pytest.raises(InputError, match=r"gone\.tif: there is no such file"):
        open_source(tmp_path / "gone.tif")


def test_list_images(tmp_path):
    Image.fromarray(noise((4, 4), np.uint8)).save(tmp_path / "b.png")
    listed = ["A.TIF", "anim.gif", "b.png", "sub/c.JPEG", "sub/d.nii.gz", "sub/e.Nii", "z.tiff"]
    others = [".hidden.png", ".git/x.png", "notes.txt", "e.gz", "table", "sub/v1.2", "fits.fits"]
    for name in listed + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "b.png", tmp_path / name) if name != "b.png" else None
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "README").write_bytes(bytes.fromhex("1f8b0800"))  # half a zipped file
    for name in ("IM0001", "sub/1.2.840.10008.5", "DICOMDIR", "scan.raw"):
        write_dicom(tmp_path / name, noise((4, 4)))
    found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert found == sorted([*listed, "IM0001", "sub/1.2.840.10008.5"])


def test_list_images_of_one_file_is_that_file(tmp_path):
    (tmp_path / "x.raw").touch()
    assert list_images(tmp_path / "x.raw") == [tmp_path / "x.raw"]


def test_list_images_refuses_what_has_none(tmp_path):
    with pytest.raises(InputError, match=r"\.tif, \.tiff, \.png.*DICOM"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        list_images(tmp_path / "gone")
