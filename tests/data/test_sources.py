"""What holds for image files of every format: round trips, windows, limits, damage, finding them, and a user's own."""

import io
import multiprocessing
import shutil
import struct
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread
from pydicom.uid import EnhancedSRStorage, RTPlanStorage, RTStructureSetStorage
from references.image_files import noise, write_all, write_dicom
from references.own_format import OwnFormat, write_own

from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources import IMAGE_SUFFIXES, list_images, open_source, survey
from pulmo_jax.data.sources.formats import Format, check_formats, find_format
from pulmo_jax.data.sources.listing import describe_left_out
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
    """The content decides: every file here with pixels is listed, and the others are counted by kind."""
    picture, shot = BytesIO(), BytesIO()
    Image.fromarray(noise((4, 4), np.uint8)).save(picture, "PNG")
    Image.fromarray(noise((4, 4), np.uint8)).save(shot, "JPEG")
    tifffile.imwrite(slide := BytesIO(), noise((4, 4)))
    nibabel.save(nibabel.Nifti1Image(noise((4, 4, 2)), np.eye(4)), tmp_path / "v.nii.gz")
    listed = {
        "A.TIF": slide, "anim.gif": picture, "b.png": picture, "sub/c.JPEG": shot, "sub/e.Nii": picture,
        "z.tiff": slide,
        "slide.svs": slide, "scan.ndpi": slide, "big.btf": slide, "conf.lsm": slide, "map.geotiff": slide,
        "w.jfif": shot, "w.jpe": shot, "notes.txt": picture, "table": picture, "sub/v1.2": picture, "x.tif.bak": slide,
        "damaged.tif": BytesIO(),
    }  # fmt: skip
    others = {
        ".hidden.png": "by-products", "._b.png": "by-products", "Thumbs.db": "by-products",
        "sub/.DS_Store": "by-products",
        "A.TIF.aux.xml": "by-products", "A.tfw": "by-products", "A.TIF.ovr": "by-products", "DICOMDIR": "by-products",
        "a.csv": ".csv", "b.CSV": ".csv", "read.me": ".me", "LICENSE": "files without a suffix", "e.gz": ".gz",
        "sub/1.2.840": "files without a suffix", "empty": "files without a suffix",
    }  # fmt: skip
    hidden = dict.fromkeys((".git/x.png", "__MACOSX/x.png", "sub/.ipynb_checkpoints/y.png"), "by-products")
    others |= hidden | {"z.tif.part": "by-products"}
    for name in (*listed, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(listed[name].getvalue() if name in listed else b"text, no picture")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "A.TIF.ovr").write_bytes(slide.getvalue())
    (tmp_path / "e.gz").write_bytes(bytes.fromhex("1f8b0800"))  # half a zipped file
    (tmp_path / "folder.png").mkdir()
    dicom = ("IM0001", "sub/1.2.840.10008.5", "d.IMA", "e.dicom", "1.2.840.99.CT", "scan.raw")
    for name in dicom:
        write_dicom(tmp_path / name, noise((4, 4)))
    listing = survey(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in listing.images]
    assert sorted(found) == sorted([*listed, *dicom, "v.nii.gz"])
    assert listing.left_out == Counter(others.values())
    assert list_images(tmp_path) == listing.images
    assert describe_left_out(listing.left_out) == ("12 by-products, 3 files without a suffix, 2 .csv, 1 .gz, 1 .me")


def test_dicom_without_pixels_is_left_out_of_a_folder_and_named_by_itself(tmp_path):
    """Reports and structures lie in every exported study."""
    write_dicom(tmp_path / "image.dcm", noise((4, 4)))
    for name, kind in (("report", EnhancedSRStorage), ("structures", RTStructureSetStorage), ("plan", RTPlanStorage)):
        data = dcmread(tmp_path / "image.dcm")
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = kind
        for keyword in ("PixelData", "SamplesPerPixel", "Rows", "Columns") if name != "plan" else ("PixelData",):
            delattr(data, keyword)
        data.save_as(tmp_path / f"{name}.dcm")
    said = []
    (ref,), skipped = index_images(tmp_path, say=said.append)
    assert (ref.name, skipped) == ("image.dcm", [])
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path}: 1 images; left out: ")
    for kind in ("Enhanced SR", "RT Structure Set", "RT Plan"):
        assert f"1 DICOM object: {kind}" in said[0]
    with pytest.raises(InputError, match=r"report\.dcm: holds no image \(DICOM object: Enhanced SR\); give another"):
        index_images(tmp_path / "report.dcm")
    (tmp_path / "image.dcm").unlink()
    with pytest.raises(InputError, match="holds no images, only 1 DICOM object: Enhanced SR, "):
        index_images(tmp_path)


def test_list_images_of_one_file_is_that_file(tmp_path):
    (tmp_path / "x.raw").touch()
    assert list_images(tmp_path / "x.raw") == [tmp_path / "x.raw"]


def test_list_images_refuses_what_has_none(tmp_path):
    with pytest.raises(InputError, match=r"\.tif, \.tiff, \.png.*DICOM"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        list_images(tmp_path / "gone")


# --- a format of the user's own

OWN = (OwnFormat(),)


@pytest.fixture
def own(tmp_path) -> tuple[Path, np.ndarray]:
    """A folder with an image of that format in two pages, and a PNG."""
    pixels = write_own(tmp_path / "images/p1/a.own", noise((2, 20, 30, 3)))
    Image.fromarray(noise((20, 30), np.uint8)).save(tmp_path / "images/b.png")
    return tmp_path / "images", pixels


def test_a_file_of_an_own_format_is_read_like_any_other(own):
    folder, pixels = own
    with open_source(folder / "p1/a.own", formats=OWN) as source:
        assert (source.shape, source.dtype) == (pixels.shape, pixels.dtype)
        assert source.tags.resolution == (300, 300, 2)
        np.testing.assert_array_equal(source.read(1), pixels[1])
        np.testing.assert_array_equal(source.read(0, Window(3, 4, 5, 6)), pixels[0, 3:8, 4:10])
        source.read()[:] = 0
        np.testing.assert_array_equal(source.read(), pixels[0])
        with pytest.raises(ValueError, match="page 2 of an image of 2 pages"):
            source.read(2)
        with pytest.raises(ValueError, match="20 x 30 px"):
            source.read(0, Window(18, 0, 5, 5))


def test_images_of_an_own_format_are_indexed_with_their_masks_and_groups(own, tmp_path):
    folder, pixels = own
    Image.fromarray(mask := (noise((20, 30), np.uint8) > 99).astype(np.uint8)).save(tmp_path / "a.png")
    write_own(tmp_path / "b.own", mask[None, ..., None].astype(np.uint16))
    refs, skipped = index_images(folder, masks=tmp_path, group_regex=r"(?:^|/)(\w)$", formats=OWN)
    assert not skipped
    assert [(r.title, r.shape, r.dtype, r.group) for r in refs] == [
        ("b.png", (20, 30, 1), "uint8", "b"),
        ("p1/a.own[0]", (20, 30, 3), "uint16", "a"),
        ("p1/a.own[1]", (20, 30, 3), "uint16", "a"),
    ]
    reader = Reader(formats=OWN)
    np.testing.assert_array_equal(np.stack([reader.image(ref) for ref in refs[1:]]), pixels)
    for ref in refs:
        np.testing.assert_array_equal(reader.foreground(ref), mask > 0)
    assert reader.tags(refs[1]).resolution == (300, 300, 2)
    reader.close()


def test_without_the_format_nothing_knows_it(own):
    folder, _ = own
    assert list_images(folder, OWN) == [folder / "b.png", folder / "p1/a.own"]
    assert list_images(folder) == [folder / "b.png"]
    assert ".own" not in IMAGE_SUFFIXES
    with pytest.raises(InputError, match=r"a\.own: unknown image format; .* DICOM and NIfTI: convert"):
        open_source(folder / "p1/a.own")
    (folder / "c.png").write_bytes(b"text" * 200)
    with pytest.raises(InputError, match=r"c\.png: unknown image format; .*, NIfTI and \*\.own: convert"):
        open_source(folder / "c.png", formats=OWN)
    (folder / "p1/a.own").unlink()
    (folder / "b.png").unlink()
    (folder / "c.png").unlink()
    with pytest.raises(InputError, match=r"images: holds no images \(\.tif, .*, \.own, or DICOM"):
        list_images(folder, OWN)


def test_other_content_under_the_suffix_of_an_own_format_is_named(own):
    folder, _ = own
    shutil.copy(folder / "b.png", folder / "wrong.own")
    (folder / "cut.own").write_bytes((folder / "p1/a.own").read_bytes()[:10])
    (folder / "empty.own").touch()
    refs, skipped = index_images(folder, formats=OWN)
    assert [ref.title for ref in refs] == ["b.png", "p1/a.own[0]", "p1/a.own[1]"]
    reasons = {file.name: file.reason for file in skipped}
    assert reasons["wrong.own"] == f"{folder}/wrong.own: is not an OWN file; convert it"
    assert reasons["empty.own"].startswith(f"{folder}/empty.own: is not an OWN file")
    assert reasons["cut.own"].startswith(f"{folder}/cut.own: cannot be read, it may be damaged or cut off (error: ")
    (folder / "short.own").write_bytes((folder / "p1/a.own").read_bytes()[:-2])
    with open_source(folder / "short.own", formats=OWN) as source:
        source.read(0)
        with pytest.raises(InputError, match=r"short\.own: cannot be read, it may be damaged or cut off"):
            source.read(1)


def test_the_limit_holds_for_an_own_format(own):
    folder, pixels = own
    open_source(folder / "p1/a.own", max_bytes=pixels[0].nbytes, formats=OWN).close()
    with pytest.raises(InputError, match=r"a\.own: a page of .*the limit is .*\n.*data\.max_image_mb"):
        open_source(folder / "p1/a.own", max_bytes=pixels[0].nbytes - 1, formats=OWN)


class FaultySource:
    """A source of a plugin's own class: an OWN file with a fault."""

    def __init__(self, source, changes):
        self.path, self.shape, self.dtype, self.tags = source.path, source.shape, source.dtype, source.tags
        self.read, self.close = source.read, source.close
        for name, value in changes.items():
            setattr(self, name, value)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@dataclass(frozen=True)
class Faulty:
    changes: dict[str, Any]
    suffixes: tuple[str, ...] = (".own",)

    def open(self, path, max_bytes) -> Any:
        return FaultySource(OwnFormat().open(path, max_bytes), self.changes)


class NoSource(Faulty):
    def open(self, path, max_bytes):
        return io.BytesIO()


@pytest.mark.parametrize(
    ("image_format", "message"),
    [
        (NoSource({}), r"NoSource\.open returned BytesIO; it must return a pulmo_jax\.types\.Source"),
        (Faulty({"shape": (20, 30, 3)}), r"Faulty\.open declares shape \(20, 30, 3\).*allowed: \(pages, H, W, C\)"),
        (Faulty({"dtype": np.dtype(complex)}), r"dtype complex128; allowed"),
        (Faulty({"shape": (0, 20, 30, 3)}), "holds no pixels"),
    ],
)
def test_a_format_that_opens_no_image_is_named_with_the_file(own, image_format, message):
    path = own[0] / "p1/a.own"
    with pytest.raises(InputError, match=rf"a\.own: .*{message}"):
        open_source(path, formats=(image_format,))


@pytest.mark.parametrize("pixels", [np.zeros((20, 30, 1), np.uint16), np.zeros((20, 30, 3), np.uint8)])
def test_pixels_that_are_not_as_declared_are_refused(own, pixels):
    image_format = Faulty({"read": lambda page, window: pixels})
    with open_source(own[0] / "p1/a.own", formats=(image_format,)) as source:
        with pytest.raises(InputError, match=r"a\.own: .*read returned .* instead of \(20, 30, 3\) uint16"):
            source.read()


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ((OwnFormat(()),), r"OwnFormat\.suffixes is \(\); give a tuple"),
        ((OwnFormat(".own"),), r"OwnFormat\.suffixes is '\.own'; give a tuple"),  # pyright: ignore
        ((OwnFormat((".OWN",)),), r"OwnFormat\.suffixes has '\.OWN'; suffixes start with a dot and are in lower case"),
        ((OwnFormat(("own",)),), r"OwnFormat\.suffixes has 'own'"),
        ((OwnFormat(), Faulty({})), r"OwnFormat and Faulty both have the suffix \.own; keep one"),
        ((object(),), r"object is not an image format; define `suffixes` and `open\(path, max_bytes\)`"),
    ],
)
def test_what_is_no_format_is_refused_before_any_file(formats, message):
    with pytest.raises(InputError, match=f"^sources: {message}"):
        check_formats(formats)


def test_a_source_of_an_own_class_is_read_and_closed(own):
    folder, pixels = own
    closed = []
    with open_source(folder / "p1/a.own", formats=(Faulty({"close": lambda: closed.append(True)}),)) as source:
        np.testing.assert_array_equal(source.read(1, Window(2, 3, 4, 5)), pixels[1, 2:6, 3:8])
        assert not closed
    assert closed == [True]


def test_readers_and_indices_check_their_formats(own):
    with pytest.raises(InputError, match="^sources: "):
        Reader(formats=(OwnFormat(("own",)),))
    with pytest.raises(InputError, match="^sources: "):
        index_images(own[0], formats=(OwnFormat(("own",)),))


def test_the_longest_suffix_decides_and_goes_before_the_built_in_ones(tmp_path):
    short, long = OwnFormat((".gz", ".png")), OwnFormat((".own.gz",))
    assert isinstance(short, Format)
    assert find_format(Path("a.own.GZ"), (short, long)) is long
    assert find_format(Path("a.nii.gz"), (short, long)) is short
    assert find_format(Path("a.tif"), (short, long)) is None
    pixels = write_own(tmp_path / "a.png", noise((1, 4, 5, 1)))
    with open_source(tmp_path / "a.png", formats=(short,)) as source:
        np.testing.assert_array_equal(source.read(), pixels[0])


def test_a_file_of_an_own_format_is_no_store(tmp_path):
    """HDF5 may be the format of the user's images, too."""
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    for path in (tmp_path, tmp_path / "a.h5"):
        assert list_images(path, (OwnFormat((".h5",)),)) == [tmp_path / "a.h5"]
        refs, (skipped,) = index_images(path, formats=(OwnFormat((".h5",)),))
        assert not refs
        assert "is not an OWN file" in skipped.reason


def test_worker_processes_read_an_own_format(own):
    folder, pixels = own
    refs, _ = index_images(folder / "p1", formats=OWN)
    reader = Reader(formats=OWN)
    reader.image(refs[0])  # its open file stays behind
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(reader.image, refs))
    np.testing.assert_array_equal(np.stack(found), pixels)
    reader.close()
