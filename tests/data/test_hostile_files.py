"""Files that lie, bombs, and folders with surprises, by what the product calls: a right result or a clear error."""

import gzip
import io
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
from types import SimpleNamespace

import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
from astropy.io import fits
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless
from references.image_files import noise, write_all, write_dicom

from pulmo_jax.data import fits_headers
from pulmo_jax.data.arrays import read_array
from pulmo_jax.data.images import index_images
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scan import Sampling, scan_images
from pulmo_jax.data.sources import dicom, list_images, nifti, open_source, source, tiff
from pulmo_jax.data.sources.source import decoding
from pulmo_jax.data.store_writing import ingest_folder
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
    with memory_below(20 * MB), pytest.raises(InputError, match=r"x\.png: damaged: has more compressed pixels"):
        read(tmp_path / "x.png")


def test_zipped_text_that_expands_beyond_the_limit(tmp_path):
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"1\n" * 50 * MB, 1))
    with memory_below(60 * MB), pytest.raises(InputError, match="a text file of more than 16 MB, the limit"):
        read_array(tmp_path / "x.txt.gz", (1,))


def zipped_zeros(path: Path, head: bytes, megabytes: int = 100) -> Path:
    with gzip.open(path, "wb", 1) as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(bytes(MB))
    return path


def fits_header(*cards: str) -> bytes:
    text = "".join(card.ljust(80) for card in (*cards, "END"))
    return text.ljust(-(-len(text) // 2880) * 2880).encode()


def npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


PRIMARY = ("SIMPLE  =                    T", "BITPIX  =                  -32")
TEN = fits_header(*PRIMARY, "NAXIS   =                    1", "NAXIS1  =                   10")
EMPTY_UNIT = fits_header("XTENSION= 'IMAGE   '", "BITPIX  = 8", "NAXIS   = 0", "PCOUNT  = 0", "GCOUNT  = 1")
ZIPPED = {
    "more than one HDU declares": (TEN, "far more than its headers declare"),
    "a header without END": (PRIMARY[0].ljust(2880).encode(), "has no END"),
    "1,200 HDUs": (TEN + bytes(2880) + EMPTY_UNIT * 1200, "more than 1000 HDUs"),
    "more than .npy declares": (npy_header((10,)) + bytes(80), "unzips to more than its header declares"),
    "a header of .npy of 4 GB": (b"\x93NUMPY\x02\0\xff\xff\xff\xff", "its header takes 4294967295 bytes"),
    "a negative length": (npy_header((-1,)), "holds no values"),
    "zeros": (b"1 2 3\n", "unknown file format"),
    "TIFF": (b"II*\0", "is a gzipped TIFF file"),
    "gzip in gzip": (gzip.compress(TEN + bytes(2880)), "unknown file format"),
}


@pytest.mark.parametrize("kind", ZIPPED)
def test_zipped_arrays_are_unzipped_only_as_far_as_they_declare(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(fits_headers, "_MAX_UNITS", 1000)
    head, reason = ZIPPED[kind]
    path = zipped_zeros(tmp_path / "x.gz", head)
    assert path.stat().st_size < MB
    with memory_below(60 * MB), pytest.raises(InputError, match=reason) as error:
        read_array(path, (1,))
    assert str(error.value).startswith(f"{path}: ")


def test_members_of_a_gzip_file_count_together(tmp_path):
    whole = gzip.compress(TEN[:1000]) + gzip.compress(b"") * 100 + gzip.compress(TEN[1000:] + bytes(2880))
    (tmp_path / "x.gz").write_bytes(whole)
    np.testing.assert_array_equal(read_array(tmp_path / "x.gz", (1,)), np.zeros(10, np.float32))
    (tmp_path / "x.gz").write_bytes(whole + gzip.compress(bytes(MB), 1) * 100)
    with memory_below(20 * MB), pytest.raises(InputError, match="far more than its headers declare"):
        read_array(tmp_path / "x.gz", (1,))


def test_zipped_fits_with_several_hdus_is_read_as_without_gzip(tmp_path):
    images = [fits.PrimaryHDU(), fits.ImageHDU(noise((5, 6))), fits.ImageHDU(noise((4, 5, 6)))]
    fits.HDUList(images).writeto(tmp_path / "x.fits", checksum=True)
    content = (tmp_path / "x.fits").read_bytes()
    (tmp_path / "x.fits.gz").write_bytes(gzip.compress(content + bytes(2880 * 9)))  # the padding of a tape
    for dims in ((2,), (3,)):
        expected = read_array(tmp_path / "x.fits", dims)
        np.testing.assert_array_equal(read_array(tmp_path / "x.fits.gz", dims), expected)
    np.save(tmp_path / "x.npy", noise((4, 5)))
    (tmp_path / "x.npy.gz").write_bytes(gzip.compress((tmp_path / "x.npy").read_bytes()))
    np.testing.assert_array_equal(read_array(tmp_path / "x.npy.gz", (2,)), noise((4, 5)))


@pytest.mark.parametrize("name", ["x.fits", "x.fits.gz", "x.npy", "x.npy.gz", "x.tif"])
def test_an_array_must_fit_into_the_free_memory(tmp_path, name, monkeypatch):
    array = np.zeros((1000, 1000))  # 7.6 MB
    monkeypatch.setattr(source, "_CHECKED_BYTES", MB)
    if ".fits" in name:
        fits.PrimaryHDU(array).writeto(tmp_path / name)
    elif name == "x.tif":
        write_tiff(tmp_path / name, array)
    else:
        with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wb") as file:
            np.save(file, array)
    monkeypatch.setattr(source, "host_memory_bytes", lambda: 7 * MB)
    with memory_below(6 * MB), pytest.raises(InputError, match=r"needs 0\.\d+ GiB of memory, 0\.01 GiB are free"):
        read_array(tmp_path / name, (2,))
    monkeypatch.setattr(source, "host_memory_bytes", lambda: None)  # unknown
    assert read_array(tmp_path / name, (2,)).shape == (1000, 1000)


@pytest.mark.parametrize("name", ["x.tif", "x.png", "x.nii", "s.h5/x.tif"])
def test_a_page_must_fit_into_the_free_memory(tmp_path, name, monkeypatch):
    pixels = np.zeros((2000, 2000), np.uint8)  # 3.8 MB
    monkeypatch.setattr(source, "_CHECKED_BYTES", MB)
    if name == "x.nii":
        nibabel.Nifti1Image(pixels, np.eye(4)).to_filename(tmp_path / name)
    elif name == "x.png":
        Image.fromarray(pixels).save(tmp_path / name, compress_level=1)
    else:
        write_tiff(tmp_path / "x.tif", pixels, tile=(512, 512), compression="zlib")
        quiet = {"group_regex": None, "near_bits": 0, "threads": 1, "max_image_mb": 100}
        ingest_folder(tmp_path, tmp_path / "s.h5", tracker=lambda _: lambda items, _: items, **quiet)
    monkeypatch.setattr(source, "host_memory_bytes", lambda: 3 * MB)
    with open_source(tmp_path / name) as opened:
        with memory_below(20 * MB), pytest.raises(InputError, match=r"needs 0\.\d+ GiB of memory, 0\.00 GiB are free"):
            opened.read()
        if name in ("x.tif", "s.h5/x.tif"):  # of large images, windows can still be read
            assert opened.read(0, Window(5, 5, 9, 9)).shape == (9, 9, 1)


def tile_bomb(path: Path, rows: list[tuple[int, int]], heap: bytes) -> None:
    """A compressed FITS image of 4 tiles of 64 px whose lengths and offsets are those of `rows`."""
    fits.CompImageHDU(np.zeros((4, 64), "i4"), compression_type="GZIP_1").writeto(path)
    with fits.open(path, disable_image_compression=True) as units:
        headers = [unit.header for unit in units]
    width, headers[1]["PCOUNT"] = headers[1]["NAXIS1"], len(heap)
    table = b"".join(struct.pack(">ii", *row).ljust(width, b"\0") for row in rows) + heap
    head, extension = (header.tostring().encode() for header in headers)
    path.write_bytes(head + extension + table.ljust(-(-len(table) // 2880) * 2880, b"\0"))


def test_tiles_of_compressed_fits_that_expand_or_overlap(tmp_path):
    bomb, tile = gzip.compress(bytes(100 * MB)), gzip.compress(bytes(256))
    large = gzip.compress(np.random.default_rng(0).bytes(6000))
    tile_bomb(tmp_path / "bomb.fits", [(len(bomb), 0), (0, 0), (0, 0), (0, 0)], bomb)
    tile_bomb(tmp_path / "same.fits", [(len(large), 0)] * 4, large)
    tile_bomb(tmp_path / "members.fits", [(2 * len(tile), 0), (0, 0), (0, 0), (0, 0)], 2 * tile)
    for name, reason in (("bomb", "expands to more"), ("same", "overlap"), ("members", "expands to more")):
        with memory_below(20 * MB), pytest.raises(InputError, match=reason):
            read_array(tmp_path / f"{name}.fits", (2,))


@pytest.mark.parametrize("kind", ["GZIP_1", "GZIP_2", "RICE_1"])
def test_tiles_of_compressed_fits_are_read(tmp_path, kind):
    array = np.random.default_rng(0).integers(0, 2**15, (100, 90)).astype("i4")
    fits.CompImageHDU(array, compression_type=kind, tile_shape=(30, 90)).writeto(tmp_path / "x.fits")
    np.testing.assert_array_equal(read_array(tmp_path / "x.fits", (2,)), array)
    real = np.random.default_rng(0).normal(size=(100, 90)).astype("f4")
    fits.CompImageHDU(real, compression_type=kind).writeto(tmp_path / "y.fits")
    np.testing.assert_allclose(read_array(tmp_path / "y.fits", (2,)), real, atol=0.5)


def test_rows_of_a_table_that_refer_to_the_same_bytes(tmp_path):
    """20,000 arrays of 8 MB in a heap of 8 MB."""
    cards = [
        "XTENSION= 'BINTABLE'",
        "BITPIX  = 8",
        "NAXIS   = 2",
        "NAXIS1  = 8",
        "NAXIS2  = 20000",
        f"PCOUNT  = {8 * MB}",
    ]
    cards += ["GCOUNT  = 1", "TFIELDS = 1", "TTYPE1  = 'ANGLE   '", "TFORM1  = 'PD(1048576)'"]
    data = struct.pack(">ii", MB, 0) * 20_000 + bytes(8 * MB)
    empty = fits_header(PRIMARY[0], "BITPIX  = 8", "NAXIS   = 0")
    (tmp_path / "x.fits").write_bytes(empty + fits_header(*cards) + data + bytes(-len(data) % 2880))
    with memory_below(60 * MB), pytest.raises(InputError, match="has 0 numeric columns"):
        read_array(tmp_path / "x.fits", (1,))


def nifti_header(*shape: int) -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header["dim"], header["magic"], header["vox_offset"] = [len(shape), *shape, *[1] * (7 - len(shape))], b"n+1", 352
    return header.binaryblock + bytes(4)


def test_a_volume_that_declares_more_than_its_file_or_the_disk_can_hold(tmp_path, monkeypatch):
    path = zipped_zeros(tmp_path / "x.nii.gz", nifti_header(1024, 1024, 32_767), 8)
    with pytest.raises(
        InputError, match=r"unpacks to 32\.0 GiB, \d+ times its size; if you trust it, unzip it yourself"
    ):
        open_source(path)
    path = zipped_zeros(tmp_path / "y.nii.gz", nifti_header(1024, 1024, 8), 8)
    assert not read(path).any()
    monkeypatch.setattr(nifti.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(
        InputError, match=r"unpacks to 0\.01 GiB, 0\.00 GiB are free in .*; free some space, set TMPDIR"
    ):
        open_source(path)


def png(path: Path, *chunks: tuple[bytes, bytes]) -> Path:
    """8 x 8 px of 16 bits, with further chunks before its pixels."""
    head = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 0, 0, 0, 0))
    pixels = (b"IDAT", zlib.compress((b"\0" + bytes(16)) * 8))
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in (head, *chunks, pixels, (b"IEND", b""))]  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("kind", ["iCCP", "zTXt", "iTXt", "many", "IDAT", "long"])
def test_png_chunks_that_expand_or_are_too_many(tmp_path, kind):
    assert read(png(tmp_path / "x.png")).shape == (1, 8, 8, 1)
    bomb = zlib.compress(bytes(100 * MB))
    text = b"x\0\1\0\0\0" if kind == "iTXt" else b"x\0\0"
    chunks = {"many": [(b"abCd", b"")] * 20_000, "IDAT": [(b"IDAT", bomb)], "long": [(b"abCd", bytes(17 * MB))]}
    path = png(tmp_path / "x.png", *chunks.get(kind, [(kind.encode(), text + bomb)]))
    with memory_below(30 * MB), pytest.raises(InputError, match=r"x\.png: "):
        read(path)


def test_a_jpeg_far_longer_than_its_pixels(tmp_path):
    Image.fromarray(noise((8, 8), np.uint8)).save(tmp_path / "x.jpg")
    with (tmp_path / "x.jpg").open("ab") as file:
        file.truncate(2**30)
        file.seek(0, os.SEEK_END)
        file.write(b"\xff\xd9")
    with memory_below(20 * MB), pytest.raises(InputError, match="has 1024 MB, more than its pixels can take"):
        read(tmp_path / "x.jpg")


PIXEL = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
PIXEL += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 1)]


def directories(path: Path, tags: list[tuple[int, int, int, int]], count: int, end: bytes = b"") -> Path:
    size = 6 + 12 * len(tags)
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    chain = (body + struct.pack("<I", 8 + size * (k + 1) if k < count - 1 else 0) for k in range(count))
    path.write_bytes(b"II*\0\x08\0\0\0" + b"".join(chain) + end)
    return path


def test_a_tiff_of_too_many_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff, "_MAX_PAGES", 1000)
    assert read(directories(tmp_path / "x.tif", PIXEL, 3)).shape == (3, 1, 1, 1)
    for tags in (PIXEL, [(254, 4, 1, 0)]):
        with memory_below(60 * MB), pytest.raises(InputError, match="has more than 1000 pages"):
            open_source(directories(tmp_path / "x.tif", tags, 50_000))


@pytest.mark.parametrize(("code", "kind", "size"), [(270, 2, 1), (273, 4, 4), (65_000, 12, 8)])
def test_tiff_directories_that_share_large_tags(tmp_path, code, kind, size):
    tags = sorted([tag for tag in PIXEL if tag[0] != code] + [(code, kind, 4 * MB // size, 8)])
    with memory_below(30 * MB), pytest.raises(InputError, match="its tags have more values than the file can hold"):
        open_source(directories(tmp_path / "x.tif", tags, 1000, bytes(4 * MB)))


def test_dicom_runs_that_expand_and_too_many_elements(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "_MAX_ELEMENTS", 1000)
    path, runs = tmp_path / "x.dcm", struct.pack("<16I", 1, 64, *[0] * 14)
    options = {"Rows": 8, "Columns": 8}
    write_dicom(path, noise((8, 8), np.uint8), **options)
    dataset = dcmread(path)
    for data, reason in (
        (b"\xc1" + b"\7", None),
        (b"\x81\0" * MB, "OUTPUT_TOO_SMALL"),
        (b"\xc1\7" * 2, "a segment of"),
    ):
        dataset.file_meta.TransferSyntaxUID = RLELossless
        dataset.PixelData = encapsulate([runs + data])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.save_as(path)
        if reason is None:
            assert (read(path) == 7).all()
            continue
        with memory_below(20 * MB), pytest.raises(InputError, match=reason):
            read(path)
    element = b"".join(struct.pack("<HH2sH", 0x29, 0x1000 + k, b"CS", 0) for k in range(900))
    content = path.read_bytes()
    at = content.index(b"\xe0\x7f\x10\x00OB")
    path.write_bytes(content[:at] + element + element.replace(b"\x29\0", b"\x2b\0") + content[at:])
    with memory_below(60 * MB), pytest.raises(InputError, match="more than 1000 data elements"):
        open_source(path)


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
