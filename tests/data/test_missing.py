"""Pixels that files and arrays declare to be missing: each way of each format, read as NaN and nothing else."""

import logging
import struct
import zlib
from dataclasses import dataclass

import imagecodecs
import nibabel
import numpy as np
import pytest
import tifffile
from astropy.io import fits
from PIL import Image
from pydicom.uid import ImplicitVRLittleEndian
from references.image_files import noise, write_dicom

from pulmo_jax.data.arrays import read_array
from pulmo_jax.data.images import index_images
from pulmo_jax.data.one_image import one_image
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scan import Sampling, scan_images
from pulmo_jax.data.sources import open_source
from pulmo_jax.data.sources.source import page_source
from pulmo_jax.tasks.point_sources.detection import as_file
from pulmo_jax.types import InputError, Window

HOLE = np.zeros((40, 50), bool)
HOLE[:7, 3:] = HOLE[30:, :5] = True
SEEN = np.random.default_rng(3).integers(1, 200, (40, 50))


def read(path, **options):
    with open_source(path, **options) as source:
        assert source.read().dtype == source.dtype
        return source.read(), source


def holes(pixels: np.ndarray) -> np.ndarray:
    """Missing pixels, after checking that the others have their values."""
    nan = np.isnan(pixels)
    assert (nan.all(axis=-1) == nan.any(axis=-1)).all()
    return nan.any(axis=-1)


def write_nodata(path, value: str, dtype: str, **options) -> np.ndarray:
    pixels = SEEN.astype(dtype)
    pixels[HOLE] = np.array(float(value.replace(",", "."))).astype(dtype)
    tifffile.imwrite(path, pixels, extratags=[(42113, 2, 0, value, True)], **options)
    return pixels


@pytest.mark.parametrize(
    ("value", "dtype", "read_as"),
    [
        ("-9999", "f4", "f4"), ("-32768", "i2", "f4"), ("65535", "u2", "f4"), ("255", "u1", "f4"), ("0", "u1", "f4"),
        ("-3.4028234663852886e+38", "f4", "f4"), ("-3.40282e+38", "f4", "f4"), ("1e+20", "f8", "f8"),
        ("2147483647", "i4", "f8"), ("-9999.0", "i2", "f4"), ("nan", "f4", "f4"), ("-1,5", "f4", "f4"),
        ("0", "f2", "f2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"tile": (16, 32), "compression": "zlib"}, {"byteorder": ">"}])
def test_gdal_nodata(tmp_path, caplog, value, dtype, read_as, options):
    with caplog.at_level(logging.DEBUG, "tifffile"):
        pixels = write_nodata(tmp_path / "x.tif", value, dtype, **options)
        caplog.clear()
        found, source = read(tmp_path / "x.tif")
    assert found.dtype == read_as
    np.testing.assert_array_equal(holes(found), HOLE)
    np.testing.assert_array_equal(found[~HOLE][:, 0], pixels[~HOLE])
    assert source.stored_dtype == dtype
    assert not caplog.records
    with open_source(tmp_path / "x.tif") as again:
        np.testing.assert_array_equal(again.read(0, Window(5, 2, 30, 20)), found[5:35, 2:22])


@pytest.mark.parametrize(
    ("value", "dtype"), [("-9999", "u1"), ("nan", "u2"), ("0.5", "i2"), ("70000", "u2"), ("", "u1")]
)
def test_a_value_that_no_pixel_can_have_leaves_the_pixels(tmp_path, caplog, value, dtype):
    with caplog.at_level(logging.DEBUG, "tifffile"):
        tifffile.imwrite(tmp_path / "x.tif", SEEN.astype(dtype), extratags=[(42113, 2, 0, value, True)])
        found, _ = read(tmp_path / "x.tif")
    np.testing.assert_array_equal(found[..., 0], SEEN)
    assert not caplog.records


def test_a_value_that_is_no_number_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", SEEN.astype("u1"), extratags=[(42113, 2, 0, "none", True)])
    with pytest.raises(InputError, match=r"x\.tif: its no-data value \(GDAL_NODATA\) is 'none', which is not a number"):
        open_source(tmp_path / "x.tif")


def test_one_band_suffices_unless_the_value_is_that_of_a_colour(tmp_path):
    """0 is declared by most orthophotos of 8 bits; a pure red pixel is not missing."""
    for dtype, missing in (("u1", [False, True]), ("i2", [True, True])):
        pixels = np.full((2, 4, 4, 3), 9, dtype)[0]
        pixels[0, 0] = (200, 0, 0)
        pixels[1, 1] = 0
        tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb", extratags=[(42113, 2, 0, "0", True)])
        found, _ = read(tmp_path / "x.tif")
        assert [np.isnan(found[0, 0]).all(), np.isnan(found[1, 1]).all()] == missing
        assert np.isnan(found).any(axis=-1).sum() == sum(missing)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("bands", [1, 3])
def test_alpha_of_a_tiff(tmp_path, kind, bands):
    colours = [SEEN.astype("u1")] * bands
    pixels = np.dstack([*colours, np.where(HOLE, 0, 255).astype("u1")])
    options = {"photometric": "rgb" if bands == 3 else "minisblack", "planarconfig": "contig", "extrasamples": [kind]}
    tifffile.imwrite(tmp_path / "x.tif", pixels, **options)
    found, source = read(tmp_path / "x.tif")
    assert (found.dtype, source.stored_dtype, found.shape) == (np.float32, np.uint8, (40, 50, bands))
    np.testing.assert_array_equal(holes(found), HOLE)
    np.testing.assert_array_equal(found[~HOLE], pixels[~HOLE][:, :bands])
    tifffile.imwrite(tmp_path / "y.tif", np.zeros_like(pixels), **options)  # a tile beyond the edge of a mosaic
    found, _ = read(tmp_path / "y.tif")
    assert found.shape == (40, 50, bands)
    assert np.isnan(found).all()


@pytest.mark.parametrize("channel", ["sparse", "zero"])
def test_a_fourth_channel_that_is_tagged_as_alpha_is_a_channel(tmp_path, channel):
    """Most software tags it so: near infrared, or fluorescence, which is mostly 0."""
    signal = np.where(np.random.default_rng(0).random((300, 50)) < 0.1, noise((300, 50)), 0)
    pixels = np.dstack([noise((300, 50, 3)), signal if channel == "sparse" else np.zeros_like(signal)])
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb")
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        assert tif.pages[0].extrasamples == (2,)
    found, _ = read(tmp_path / "x.tif")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, pixels)


def test_transparency_mask_of_a_tiff(tmp_path):
    """As GDAL writes it: a directory after that of its image. The third page has none."""
    pages = np.stack([SEEN, SEEN[::-1], SEEN]).astype("u2")
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        for number, page in enumerate(pages):
            tif.write(page, metadata=None)
            if number < 2:
                tif.write(~HOLE, subfiletype=4, photometric="mask", metadata=None)
    with open_source(tmp_path / "x.tif") as source:
        assert source.shape == (3, 40, 50, 1)
        for number, hole in enumerate((HOLE, HOLE, np.zeros_like(HOLE))):
            found = source.read(number)
            np.testing.assert_array_equal(holes(found), hole)
            np.testing.assert_array_equal(found[~hole][:, 0], pages[number][~hole])


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_alpha_of_a_png(tmp_path, bands, dtype):
    full = np.iinfo(dtype).max
    alpha = np.where(HOLE, 0, np.where(SEEN > 150, full // 3, full))  # half transparent pixels are pixels
    pixels = np.dstack([SEEN.astype(dtype)] * bands)
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(np.dstack([pixels, alpha]).astype(dtype)))
    found, source = read(tmp_path / "x.png")
    assert (found.shape, source.stored_dtype) == ((40, 50, bands), dtype)
    np.testing.assert_array_equal(holes(found), HOLE)
    np.testing.assert_array_equal(found[~HOLE], pixels[~HOLE])


def png(bits: int, colour_type: int, rows: bytes, width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("bits", "colour_type", "row", "key", "expected"),
    [
        (8, 0, bytes([5, 7, 9, 7]), struct.pack(">H", 7), [5, None, 9, None]),
        (4, 0, bytes([0x57, 0x97]), struct.pack(">H", 7), [85, None, 153, None]),
        (16, 0, struct.pack(">4H", 500, 7, 9, 7), struct.pack(">H", 7), [500, None, 9, None]),
        (8, 2, bytes([1, 2, 3, 1, 2, 4]), struct.pack(">3H", 1, 2, 3), [None, (1, 2, 4)]),
        (16, 2, struct.pack(">6H", 999, 2, 3, 1, 2, 4), struct.pack(">3H", 999, 2, 3), [None, (1, 2, 4)]),
        (8, 3, bytes([0, 1, 2, 1]), bytes([255, 0]), [(0, 0, 0), None, (2, 2, 2), None]),
    ],
)
def test_transparent_colour_of_a_png(tmp_path, bits, colour_type, row, key, expected):
    palette = [(b"PLTE", bytes(v for i in range(256) for v in (i, i, i)))] if colour_type == 3 else []
    (tmp_path / "x.png").write_bytes(png(bits, colour_type, b"\0" + row, len(expected), 1, *palette, (b"tRNS", key)))
    found, _ = read(tmp_path / "x.png")
    bands = 1 if colour_type == 0 else 3
    wanted = [[np.nan] * bands if value is None else np.broadcast_to(value, bands) for value in expected]
    np.testing.assert_array_equal(found[0], np.array(wanted))


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("dtype", "padding", "limit"), [("u2", 0, None), ("i2", -2000, None), ("i2", -2000, -1900), ("u2", 65535, 65000)]
)
def test_padding_of_a_dicom(tmp_path, syntax, dtype, padding, limit):
    pixels = SEEN.astype(dtype)
    pixels[HOLE] = padding
    pixels[0, 3] = padding if limit is None else (padding + limit) // 2
    elements = {"PixelPaddingValue": padding} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    options = {} if syntax is None else {"syntax": syntax}
    write_dicom(tmp_path / "x.dcm", pixels, **options, RescaleSlope="1", RescaleIntercept="-10", **elements)
    found, source = read(tmp_path / "x.dcm")
    np.testing.assert_array_equal(holes(found), HOLE)
    np.testing.assert_array_equal(found[~HOLE][:, 0], pixels[~HOLE].astype(int) - 10)
    assert source.stored_dtype.kind == "i"


def test_blank_of_a_fits_stack(tmp_path):
    stack = np.stack([SEEN, SEEN]).astype("i2")
    stack[:, HOLE] = -1
    unit = fits.PrimaryHDU(stack)
    unit.header["BLANK"] = -1
    unit.writeto(tmp_path / "x.fits")
    found = read_array(tmp_path / "x.fits", (3,))
    np.testing.assert_array_equal(np.isnan(found), np.stack([HOLE, HOLE]))
    np.testing.assert_array_equal(found[:, ~HOLE], stack[:, ~HOLE])


def test_nan_of_a_nifti(tmp_path):
    pixels = np.where(HOLE, np.nan, SEEN).astype("f4")
    nibabel.save(nibabel.Nifti1Image(pixels.T[..., None], np.eye(4)), tmp_path / "x.nii")
    np.testing.assert_array_equal(holes(read(tmp_path / "x.nii")[0]), HOLE)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4", "f8"])
def test_masked_array(dtype):
    image = np.ma.array(SEEN.astype(dtype), mask=HOLE)
    ref, pixels = one_image(image, 0, 100)
    np.testing.assert_array_equal(holes(pixels), HOLE)
    assert (ref.scale, ref.dtype) == (dtype_name(dtype), pixels.dtype.name)


def dtype_name(dtype: str) -> str:
    return np.dtype(dtype).name


def test_missing_pixels_are_no_foreground_and_in_no_statistic(tmp_path):
    """Statistics and patches are those of the same image with NaN, and files with and without a border mix."""
    for folder, value, dtype in (("tag", "65535", "u2"), ("nan", "nan", "f4")):
        (tmp_path / folder).mkdir()
        for i in range(3):
            write_nodata(tmp_path / folder / f"{i}.tif", value, dtype)
    sampling = Sampling(16, 8, 0.9, None, resize=False)
    tagged, expected = (
        scan_images(index_images(tmp_path / folder)[0], sampling, Reader()) for folder in ("tag", "nan")
    )
    np.testing.assert_array_equal(tagged.cells, expected.cells)
    assert (tagged.mean, tagged.std) == (expected.mean, expected.std)
    assert 0 < len(tagged.cells) < 3 * len(scan_images(plain(tmp_path), sampling, Reader()).cells)


def plain(folder):
    (folder / "plain").mkdir()
    tifffile.imwrite(folder / "plain" / "x.tif", SEEN.astype("u2"))
    (ref,) = index_images(folder / "plain")[0]
    assert ref.scale == index_images(folder / "tag")[0][0].scale == "uint16"
    return [ref]


def test_palette_with_a_transparent_entry_by_pillow(tmp_path):
    """A second opinion on the palette: what Pillow converts to RGBA."""
    image = Image.fromarray(SEEN.astype("u1"), mode="P")
    image.putpalette(noise((256, 3), np.uint8).tobytes())
    image.save(tmp_path / "x.png", transparency=17)
    with Image.open(tmp_path / "x.png") as opened:
        rgba = np.asarray(opened.convert("RGBA"))
    found, _ = read(tmp_path / "x.png")
    np.testing.assert_array_equal(holes(found), rgba[..., 3] == 0)
    np.testing.assert_array_equal(found[rgba[..., 3] > 0], rgba[rgba[..., 3] > 0][:, :3])


@dataclass(frozen=True)
class MaskedFormat:
    """A format of a user's package whose decoder returns masked arrays, such as netCDF4."""

    dtype: str
    suffixes: tuple[str, ...] = (".msk",)

    def open(self, path, max_bytes):
        pixels = np.ma.array(SEEN.astype(self.dtype)[..., None], mask=HOLE[..., None])
        return page_source(path, (1, 40, 50, 1), np.dtype(self.dtype), lambda page: pixels, max_bytes)


def test_masked_pixels_of_a_format_of_ones_own(tmp_path):
    (tmp_path / "x.msk").touch()
    found, _ = read(tmp_path / "x.msk", formats=[MaskedFormat("f4")])
    np.testing.assert_array_equal(holes(found), HOLE)
    np.testing.assert_array_equal(found[~HOLE][:, 0], SEEN[~HOLE])
    with pytest.raises(InputError, match="masked array of uint16; declare a float dtype for missing pixels"):
        read(tmp_path / "x.msk", formats=[MaskedFormat("u2")])


def test_masked_stack(tmp_path):
    stack = np.ma.array(np.stack([SEEN, SEEN]).astype("i2"), mask=np.stack([HOLE, ~HOLE]))
    path = as_file(stack, tmp_path / "cube.npy")
    np.testing.assert_array_equal(np.isnan(np.load(path)), stack.mask)
    np.testing.assert_array_equal(np.load(path)[~stack.mask], stack.data[~stack.mask])


@pytest.mark.parametrize("name", ["x.tif", "x.png", "x.jpg"])
@pytest.mark.parametrize("beside", ["msk", "aux.xml", "both"])
def test_files_beside_an_image(tmp_path, name, beside):
    """As GDAL writes them for formats without a tag: the image itself is read as before without them."""
    pixels = SEEN.astype("u1")
    if name == "x.tif":
        tifffile.imwrite(tmp_path / name, pixels)
    else:
        Image.fromarray(pixels).save(tmp_path / name, quality=100)
    whole, _ = read(tmp_path / name)
    expected = np.zeros_like(HOLE)
    if beside != "aux.xml":
        tifffile.imwrite(tmp_path / f"{name}.msk", np.where(HOLE, 0, 255).astype("u1"))
        expected |= HOLE
    if beside != "msk":
        xml = '<PAMDataset><PAMRasterBand band="1"><NoDataValue>1.8E+01</NoDataValue></PAMRasterBand></PAMDataset>'
        (tmp_path / f"{name}.aux.xml").write_text(xml)
        expected |= whole[..., 0] == 18
    found, source = read(tmp_path / name)
    np.testing.assert_array_equal(holes(found), expected)
    np.testing.assert_array_equal(found[~expected], whole[~expected])
    assert (source.stored_dtype, whole.dtype) == (np.uint8, np.uint8)
    assert [ref.name for ref in index_images(tmp_path)[0]] == [name]


def test_a_mask_beside_an_image_has_its_size(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", SEEN)
    tifffile.imwrite(tmp_path / "x.tif.msk", HOLE[:9])
    with pytest.raises(InputError, match=r"x\.tif\.msk: is the transparency mask of x\.tif, but has 9 x 50 px"):
        open_source(tmp_path / "x.tif")
