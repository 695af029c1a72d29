"""Files that lie, bombs, and folders with surprises, by what the product calls: a right result or a clear error."""

import gzip
import lzma
import os
import signal
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image
from references.image_files import noise, write_all, write_dicom

from pulmo_jax.data.arrays import read_array
from pulmo_jax.data.images import Reader, index_images
from pulmo_jax.data.scan import Sampling, scan_images
from pulmo_jax.data.sources import list_images, open_source
from pulmo_jax.data.sources.source import decoding
from pulmo_jax.types import InputError, Window

MB = 2**20
SAMPLING = Sampling(patch_size=8, stride=8, min_foreground=0.25, foreground_range=None, resize=False)


@pytest.fixture(autouse=True)
def _no_hang():
    """A read that waits for ever fails instead."""

    def late(*_: object) -> None:
        raise TimeoutError("a minute has gone by")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """The process grows by less than so many bytes, C libraries included (measured on Linux alone)."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        yield
        return
    peak.write_text("5")
    before = resident()
    yield
    assert resident() - before < limit


def resident() -> int:
    """Peak since it was reset, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def read(path: Path, **options: int) -> np.ndarray:
    with open_source(path, **options) as source:
        return np.stack([source.read(page) for page in range(source.shape[0])])


def write_tiff(path: Path, pixels: np.ndarray, **options: object) -> None:
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=None, **options)


# What the header says


def lying_tiff(path: Path) -> None:
    write_tiff(path, noise((8, 8), np.uint8), compression="zlib", tile=(16, 16))
    with tifffile.TiffFile(path, mode="r+") as tif:
        for code in (256, 257):
            tif.pages.first.tags[code].overwrite(65_535)


def lying_png(path: Path) -> None:
    Image.fromarray(noise((8, 8), np.uint8)).save(path)
    header = b"IHDR" + struct.pack(">IIBBBBB", 65_535, 65_535, 8, 0, 0, 0, 0)
    content = path.read_bytes()
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def lying_jpeg(path: Path) -> None:
    Image.fromarray(noise((8, 8), np.uint8)).save(path)
    content, sides = path.read_bytes(), struct.pack(">HH", 8, 8)
    at = content.index(b"\xff\xc0") + 5
    assert content[at : at + 4] == sides
    path.write_bytes(content[:at] + struct.pack(">HH", 65_535, 65_535) + content[at + 4 :])


def lying_nifti(path: Path) -> None:
    image = nibabel.Nifti1Image(noise((8, 8, 2), np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    struct.pack_into("<8h", content, 40, 3, 32_767, 32_767, 32_767, 1, 1, 1, 1)
    path.write_bytes(gzip.compress(content))


LIARS = {
    "x.tif": lying_tiff,
    "x.png": lying_png,
    "x.jpg": lying_jpeg,
    "x.dcm": lambda path: write_dicom(path, noise((8, 8), np.uint8), Rows=65_535, Columns=65_535),
    "x.nii.gz": lying_nifti,
}


@pytest.mark.parametrize("name", LIARS)
def test_a_page_of_65_535_px_in_a_small_file(tmp_path, name):
    """Above the limit it is refused from the header; below it, the pixels are missing."""
    LIARS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size < 2000
    with memory_below(20 * MB), pytest.raises(InputError, match=rf"{name}: .*decodes to.*limit is.*\n.*max_image_mb"):
        open_source(tmp_path / name, max_bytes=512 * MB)
    refs, (skipped,) = index_images(tmp_path, max_image_mb=512)
    assert not refs
    assert "data.max_image_mb" in skipped.reason


def test_a_small_file_that_expands_to_768_mb(tmp_path):
    strip = zlib.compress(bytes(64 * 16_384 * 3), 9)
    options = {"shape": (16_384, 16_384, 3), "dtype": np.uint8, "compression": "zlib", "rowsperstrip": 64}
    tifffile.imwrite(tmp_path / "x.tif", iter([strip] * 256), photometric="rgb", **options)
    assert (tmp_path / "x.tif").stat().st_size < 1.2 * MB
    with memory_below(20 * MB), pytest.raises(InputError, match=r"decodes to 768\.0 MB, the limit is 512\.0 MB"):
        open_source(tmp_path / "x.tif", max_bytes=512 * MB)
    with memory_below(60 * MB), open_source(tmp_path / "x.tif") as source:
        assert not source.read(0, Window(8000, 8000, 100, 100)).any()


BOMBS = {
    "zlib": lambda: imagecodecs.zlib_encode(bytes(100 * MB)),
    "zstd": lambda: imagecodecs.zstd_encode(bytes(100 * MB)),
    "lzma": lambda: lzma.compress(bytes(100 * MB), preset=0),
    "lzw": lambda: imagecodecs.lzw_encode(bytes(100 * MB)),
    "packbits": lambda: b"\x81\0" * (100 * MB // 128),
}


@pytest.mark.parametrize("codec", BOMBS)
def test_a_tile_that_expands_to_far_more_than_its_page_says(tmp_path, codec):
    write_tiff(tmp_path / "x.tif", noise((32, 32), np.uint8), tile=(32, 32), compression=codec)
    bomb = BOMBS[codec]()
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+") as tif:
        end = tif.filehandle.size
        tif.pages.first.tags[324].overwrite(end)
        tif.pages.first.tags[325].overwrite(len(bomb))
    with (tmp_path / "x.tif").open("ab") as file:
        file.write(bomb)
    with memory_below(20 * MB):
        try:
            assert not read(tmp_path / "x.tif").any()  # its first pixels
        except InputError as error:
            assert "x.tif" in str(error)


def test_a_png_that_expands_to_far_more_than_its_header_says(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    content, data = (tmp_path / "x.png").read_bytes(), b"IDAT" + zlib.compress(bytes(100 * MB))
    at = content.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    (tmp_path / "x.png").write_bytes(content[:at] + chunk + content[-12:])
    with memory_below(20 * MB):
        assert read(tmp_path / "x.png").shape == (1, 8, 8, 1)


def test_zipped_text_that_expands_beyond_the_limit(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"1\n" * 50 * MB, 1))
    with memory_below(30 * MB), pytest.raises(InputError, match="unzips to more than the limit"):
        read_array(tmp_path / "x.txt.gz", (1,), max_bytes=10 * MB)
    with memory_below(150 * MB), pytest.raises(InputError, match=r"a text file of 100\.0 MB, the limit is 16 MB"):
        read_array(tmp_path / "x.txt.gz", (1,))


@pytest.mark.parametrize("code", [258, 259, 273, 277, 279])
def test_a_tag_that_cannot_be_read_is_not_passed_over(tmp_path, code):
    """tifffile leaves it out, with a line in its log, and decodes the pixels as if it had never been there."""
    write_tiff(tmp_path / "x.tif", noise((20, 30)), compression="zlib", predictor=True)
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        at = tif.pages.first.tags[code].offset
    content = bytearray((tmp_path / "x.tif").read_bytes())
    content[at + 2 : at + 4] = b"\xff\x7f"  # its type
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.tif: "):
        read(tmp_path / "x.tif")


# Pixels


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 3), (1, 9), (9, 1)])
@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg", ".dcm", ".nii", ".nii.gz"])
def test_images_of_one_pixel_or_one_row(tmp_path, suffix, shape):
    pixels, path = np.full(shape, 7, np.uint8), tmp_path / f"x{suffix}"
    if suffix == ".dcm":
        write_dicom(path, pixels[None] if pixels.ndim == 3 else pixels)
    elif suffix.startswith(".nii"):
        plane = pixels.reshape(*shape[:2], 1, -1).swapaxes(0, 1)
        nibabel.Nifti1Image(plane, np.eye(4)).to_filename(path)
    else:
        Image.fromarray(pixels).save(path)
    found = read(path)
    assert found.shape == (1, *shape[:2], 3 if len(shape) == 3 else 1)
    assert (found == 7).all()


@pytest.mark.parametrize("compression", [None, "zlib", "jpeg"])
def test_cmyk_tiffs_keep_their_four_inks(tmp_path, compression):
    inks = np.full((16, 16, 4), (10, 90, 170, 250), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", inks, photometric="separated", compression=compression)
    found = read(tmp_path / "x.tif")[0]
    assert found.shape == inks.shape
    assert np.abs(found.astype(int) - inks).max() <= 3  # JPEG loses a little


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_read_as_they_are_and_enter_no_statistics(tmp_path, reader, value):
    pixels = noise((16, 16), np.float32)
    pixels[:8, :8] = value
    write_tiff(tmp_path / "x.tif", pixels, compression="zlib")
    np.testing.assert_array_equal(read(tmp_path / "x.tif")[0, :, :, 0], pixels)
    scan = scan_images(index_images(tmp_path)[0], SAMPLING, reader)
    assert scan.cells.tolist() == [[0, 0, 8], [0, 8, 0], [0, 8, 8]]
    assert np.isfinite([*scan.mean, *scan.std]).all()


def test_an_image_of_nothing_but_nan_is_said_to_have_no_patches(tmp_path, reader):
    write_tiff(tmp_path / "x.tif", np.full((16, 16), np.nan, np.float32))
    with pytest.raises(InputError, match="no patch of 8 px has 25% foreground"):
        scan_images(index_images(tmp_path)[0], SAMPLING, reader)


# Files that change after they were listed


def listed(folder: Path, **options: object):
    write_tiff(folder / "x.tif", noise((400, 300)), **options)
    (ref,), _ = index_images(folder)
    return ref


@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 4}, {"compression": "zlib", "rowsperstrip": 4}])
@pytest.mark.parametrize("window", [None, Window(300, 3, 8, 8)])
def test_a_file_that_is_cut_short_while_it_is_open(tmp_path, reader, options, window):
    """Were it mapped into memory, this would end the process."""
    ref = listed(tmp_path, **options)
    reader.image(ref, Window(0, 0, 2, 2))
    os.truncate(tmp_path / "x.tif", 600)
    with pytest.raises(InputError, match=r"x\.tif: "):
        reader.image(ref, window)


def test_a_file_that_became_a_folder_or_a_pipe(tmp_path, reader):
    ref = listed(tmp_path)
    (tmp_path / "x.tif").unlink()
    (tmp_path / "x.tif").mkdir()
    with pytest.raises(InputError, match=r"x\.tif: is a folder"):
        reader.image(ref)
    (tmp_path / "x.tif").rmdir()
    os.mkfifo(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: is a pipe"):
        reader.image(ref)


def test_a_file_that_vanished_is_listed_as_skipped(tmp_path, reader):
    for name in "ab":
        write_tiff(tmp_path / f"{name}.tif", noise((16, 16)))
    refs, _ = index_images(tmp_path)
    (tmp_path / "a.tif").unlink()
    scan = scan_images(refs, SAMPLING, reader)
    assert [ref.name for ref in scan.images] == ["b.tif"]
    assert [skipped.name for skipped in scan.skipped] == ["a.tif"]
    assert "there is no such file" in scan.skipped[0].reason


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of a user that may not read everything, even where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65_534)
        yield Path(name)
        if root:
            os.seteuid(0)


def test_a_file_that_may_no_longer_be_read(nobody, reader):
    ref = listed(nobody)
    (nobody / "x.tif").chmod(0)
    with pytest.raises(InputError, match=r"x\.tif: cannot be read \(Permission denied\)"):
        reader.image(ref)
    refs, (skipped,) = index_images(nobody)
    assert not refs
    assert "Permission denied" in skipped.reason


def test_what_may_not_be_listed_is_not_passed_over(nobody):
    write_tiff(nobody / "x.tif", noise((4, 4)))
    (nobody / "README").touch()
    (nobody / "README").chmod(0)  # it may be a DICOM file
    assert [path.name for path in list_images(nobody)] == ["README", "x.tif"]
    (nobody / "sub").mkdir()
    (nobody / "sub").chmod(0)
    try:
        with pytest.raises(InputError, match=r"sub: cannot be listed \(Permission denied\)"):
            index_images(nobody)
        with pytest.raises(InputError, match=r"a\.tif: cannot be read \(Permission denied\)"):
            open_source(nobody / "sub" / "a.tif")
    finally:
        (nobody / "sub").chmod(0o700)


# Folders


def test_pipes_sockets_devices_and_folders_are_no_images(tmp_path):
    write_tiff(tmp_path / "x.tif", noise((4, 4)))
    os.mkfifo(tmp_path / "pipe.tif")
    os.mkfifo(tmp_path / "1.2.840")  # named as DICOM files are
    (tmp_path / "zero.tif").symlink_to("/dev/zero")
    (tmp_path / "folder.tif").mkdir()
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's name is short
        server.bind("socket.tif")
        os.chdir(here)
        refs, skipped = index_images(tmp_path)
        assert [ref.name for ref in refs] == ["x.tif"]
        assert not skipped
        for name in ("pipe.tif", "zero.tif", "socket.tif"):
            with pytest.raises(InputError, match=rf"{name}: is a pipe, a socket or a device"):
                open_source(tmp_path / name)
            with pytest.raises(InputError, match=rf"{name}: is a pipe, a socket or a device"):
                read_array(tmp_path / name, (1,))


def test_links(tmp_path):
    """Those that work are followed; those that lead nowhere are named, for an image may be missing."""
    write_tiff(tmp_path / "x.tif", noise((4, 4)))
    (tmp_path / "good.tif").symlink_to("x.tif")
    (tmp_path / "lost.tif").symlink_to("not_there.tif")
    (tmp_path / "round.tif").symlink_to("round.tif")
    (tmp_path / "lost.txt").symlink_to("not_there.txt")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/up").symlink_to("..")
    (tmp_path / "sub/self").symlink_to("self")
    refs, skipped = index_images(tmp_path)
    assert [ref.name for ref in refs] == ["good.tif", "x.tif"]
    assert [file.name for file in skipped] == ["lost.tif", "round.tif"]
    assert all("is a broken link" in file.reason for file in skipped)


@pytest.mark.parametrize("name", ["a\nb.tif", "tab\tand bell\a.tif", "ümläut 图.tif", " .tif", "-rf.tif", "x.tif."])
def test_strange_names_are_read(tmp_path, reader, name):
    pixels = noise((9, 9))
    write_tiff(tmp_path / name, pixels)
    if name.endswith("."):
        return
    (ref,), skipped = index_images(tmp_path)
    assert not skipped
    assert ref.name == name
    np.testing.assert_array_equal(reader.image(ref)[..., 0], pixels)


def test_names_that_are_not_utf8_are_skipped_by_a_message_that_can_be_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9.tif")
    try:
        write_tiff(tmp_path / name, noise((9, 9)))
    except OSError:
        pytest.skip("this file system allows UTF-8 alone")
    write_tiff(tmp_path / "x.tif", noise((9, 9)))
    refs, (skipped,) = index_images(tmp_path)
    assert [ref.name for ref in refs] == ["x.tif"]
    assert "not valid UTF-8; rename it" in skipped.reason
    for text in (skipped.name, skipped.reason):
        assert "caf" in text
        assert text.isprintable()
        text.encode()
    assert read(tmp_path / name).shape == (1, 9, 9, 1)  # by itself it can be read
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(InputError, match="unknown image format") as error:
        open_source(tmp_path / name)
    str(error.value).encode()


def test_a_message_holds_no_control_characters_of_the_file(tmp_path):
    """They would reach the terminal."""
    write_dicom(tmp_path / "x.dcm", noise((9, 9)))
    content = (tmp_path / "x.dcm").read_bytes()
    (tmp_path / "x.dcm").write_bytes(content.replace(b"MONOCHROME2", b"\x1b[2JCHROME2"))
    with pytest.raises(InputError, match=r"\\x1b\[2JCHROME2") as error:
        open_source(tmp_path / "x.dcm")
    assert str(error.value).isprintable()


def test_a_message_is_not_as_long_as_the_file():
    path = Path("x.tif")
    for raised in (InputError(f"{path}: {'x' * 5000}; save it"), ValueError("x" * 5000)):
        with pytest.raises(InputError, match=r"^x\.tif: ") as error, decoding(path):
            raise raised
        assert len(str(error.value)) < 1000


def test_too_little_memory_names_the_setting():
    with (
        pytest.raises(InputError, match=r"x\.tif: does not fit into memory.*data\.max_image_mb"),
        decoding(Path("x.tif")),
    ):
        raise MemoryError


# Everything at once


def test_a_folder_of_damaged_files_beside_good_ones(tmp_path, reader):
    """Cut off, flipped, empty, text, of another suffix: every file is either right or named with the reason."""
    (tmp_path / "good").mkdir()
    files = write_all(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    for number, (path, _) in enumerate(files.values()):
        content = path.read_bytes()
        (tmp_path / "bad" / f"cut_{number}.tif").write_bytes(content[: len(content) // 2])
        (tmp_path / "bad" / f"head_{number}.png").write_bytes(content[:40])
    (tmp_path / "bad/empty.tif").touch()
    (tmp_path / "bad/text.tif").write_text("no image\n" * 100)
    refs, skipped = index_images(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        failed = [name for name, fails in pool.map(lambda ref: (ref.name, unreadable(reader, ref)), refs) if fails]
    named = {file.name for file in skipped} | set(failed)
    assert named == {f"bad/{path.name}" for path in (tmp_path / "bad").iterdir()}
    assert {ref.name for ref in refs} - named == {f"good/{path.name}" for path in (tmp_path / "good").iterdir()}
    reader.close()


def unreadable(reader: Reader, ref) -> bool:
    try:
        return reader.image(ref).size == 0
    except InputError as error:
        return ref.path.name in str(error)
