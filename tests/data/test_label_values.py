"""Label masks in the files that people have: class numbers where they are clear, an error where they are not."""

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image
from references.image_files import write_dicom
from scipy.ndimage import gaussian_filter

from pulmo_jax.data.label_values import FULL, NO_VALUE, find_values
from pulmo_jax.data.sources import open_source
from pulmo_jax.types import InputError, Window

INSIDE = np.zeros((40, 56), bool)
INSIDE[8:24, 16:40] = True
GREY = np.where(INSIDE, 255, 0).astype("u1")
CLASSES = np.where(INSIDE, 2, 0).astype("u1")
CLASSES[8:16, 16:24] = 7
OPAQUE = np.full_like(GREY, 255)
NUMBERS = CLASSES.astype("i4")
FULL_INSIDE = GREY.astype("i4")
BLACK, WHITE, RED, BLUE = (0, 0, 0), (255, 255, 255), (200, 0, 0), (0, 0, 90)
RGBA = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
GREY_ALPHA = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}


def palette(indices: np.ndarray, *colours: tuple[int, int, int], **options) -> bytes:
    image = Image.fromarray(indices.astype("u1"), mode="P")
    image.putpalette([value for colour in colours for value in colour])
    file = BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def picture(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def nodata(value: str) -> dict:
    return {"extratags": [(42113, 2, 0, value, True)]}


def coloured(*colours: tuple[int, int, int]) -> np.ndarray:
    """An RGB mask whose classes have colours in the order of their numbers."""
    return np.array(colours, "u1")[np.searchsorted([0, 2, 7], CLASSES)]


def values_of(path: Path, kind: str = "numbers", ignore: int | None = None) -> np.ndarray:
    with open_source(path, as_stored=True) as source:
        rule, _ = find_values(path, source, ignore, kind)  # pyright: ignore[reportArgumentType]
        return rule(source.read())


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


SOFT = np.clip(gaussian_filter(GREY.astype(float), 1.5), 0, 255).round().astype("u1")
GAP = np.where(np.arange(56) < 4, 255, NUMBERS)  # four columns are 255

NUMBERED = {
    "grey.png": (picture(GREY), FULL_INSIDE),
    "grey.tif": (tiff(GREY), FULL_INSIDE),
    "sixteen_bit.tif": (tiff(GREY.astype("u2") * 257), FULL_INSIDE * 257),
    "zero_and_one.png": (picture(GREY // 255), FULL_INSIDE // 255),
    "bool.tif": (tiff(INSIDE), INSIDE.astype("i4")),
    "one_bit.png": (picture(INSIDE), INSIDE.astype("i4")),
    "numbers.png": (picture(CLASSES), NUMBERS),
    "numbers_16_bit.tif": (tiff(CLASSES.astype("u2")), NUMBERS),
    "numbers_32_bit.tif": (tiff(CLASSES.astype("i4")), NUMBERS),
    "numbers_float.tif": (tiff(CLASSES.astype("f4")), NUMBERS),
    "numbers_double.tif": (tiff(CLASSES.astype("f8")), NUMBERS),
    "numbers_tiled.tif": (tiff(CLASSES, tile=(16, 16), compression="zlib"), NUMBERS),
    "white_is_zero.tif": (tiff(255 - CLASSES, photometric="miniswhite"), NUMBERS),
    "palette.png": (palette(np.array([0, 1, 2])[np.searchsorted([0, 2, 7], CLASSES)], WHITE, RED, BLUE),
                    np.searchsorted([0, 2, 7], CLASSES).astype("i4")),
    "voc.png": (palette(GAP, *[BLACK] + [(i, 255 - i, 128) for i in range(1, 256)]), GAP),
    "grey_palette.png": (palette(np.searchsorted([0, 2, 7], CLASSES), BLACK, (128,) * 3, WHITE),
                         np.searchsorted([0, 2, 7], CLASSES).astype("i4")),
    "identity_palette.png": (palette(CLASSES, *[(i, i, i) for i in range(256)]), NUMBERS),
    "palette.tif": (tiff(CLASSES, photometric="palette", colormap=np.random.default_rng(0).integers(
        1, 65535, (3, 256)).astype("u2") * (np.arange(256) > 0).astype("u2")), NUMBERS),
    "grey_rgb.png": (picture(np.dstack([CLASSES] * 3)), NUMBERS),
    "grey_rgba.png": (picture(np.dstack([CLASSES] * 3 + [OPAQUE])), NUMBERS),
    "grey_alpha.png": (picture(np.dstack([CLASSES, OPAQUE])), NUMBERS),
    "grey_alpha.tif": (tiff(np.dstack([CLASSES, OPAQUE]), **GREY_ALPHA), NUMBERS),
    "rgba.tif": (tiff(np.dstack([CLASSES] * 3 + [OPAQUE]), **RGBA), NUMBERS),
    "transparent_background.png": (picture(np.dstack([np.maximum(CLASSES, 5), OPAQUE * INSIDE])),
                                   np.where(INSIDE, np.maximum(NUMBERS, 5), 0)),
    "one_colour.png": (picture(coloured(BLACK, RED, RED)), FULL_INSIDE),
    "one_colour_rgba.png": (picture(np.dstack([coloured(BLACK, RED, RED), OPAQUE])), FULL_INSIDE),
    "all_one_colour.png": (picture(np.full((40, 56, 3), RED, "u1")), np.full((40, 56), FULL)),
    "opacity.png": (picture(np.dstack([np.full_like(GREY, 9), GREY])), FULL_INSIDE),
    "opacity_of_black.png": (picture(np.dstack([np.zeros_like(GREY)] * 3 + [GREY // 2])), FULL_INSIDE),
    "empty.png": (picture(np.zeros_like(GREY)), np.zeros_like(NUMBERS)),
    "all_foreground.png": (picture(OPAQUE), np.full_like(NUMBERS, 255)),
    "nodata.tif": (tiff(GAP.astype("u1"), **nodata("255")), np.where(GAP == 255, NO_VALUE, GAP)),
    "nodata_below.tif": (tiff(np.where(GAP == 255, -9999, GAP).astype("i2"), **nodata("-9999")),
                         np.where(GAP == 255, NO_VALUE, GAP)),
    "nodata_float.tif": (tiff(np.where(GAP == 255, -3.4028235e38, GAP).astype("f4"), **nodata("-3.4028235e+38")),
                         np.where(GAP == 255, NO_VALUE, GAP)),
    "nodata_is_background.tif": (tiff(CLASSES, **nodata("0")), NUMBERS),
    "nodata_out_of_range.tif": (tiff(CLASSES, **nodata("-1")), NUMBERS),
    "nan.tif": (tiff(np.where(GAP == 255, np.nan, GAP).astype("f4")), np.where(GAP == 255, NO_VALUE, GAP)),
    "webp_lossless.tif": (tiff(np.dstack([CLASSES] * 3), photometric="rgb", compression="lzw"), NUMBERS),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERED)
def test_class_numbers(tmp_path, name):
    content, expected = NUMBERED[name]
    np.testing.assert_array_equal(values_of(write(tmp_path, name, content)), expected)


@pytest.mark.parametrize("name", NUMBERED)
def test_a_window_has_the_values_of_the_whole(tmp_path, name):
    content, expected = NUMBERED[name]
    path = write(tmp_path, name, content)
    with open_source(path, as_stored=True) as source:
        rule, _ = find_values(path, source)
        np.testing.assert_array_equal(rule(source.read(0, Window(6, 2, 20, 30))), expected[6:26, 2:32])


def test_volumes_of_numbers(tmp_path):
    volume = np.zeros((4, 5, 3), "u1")
    volume[1:3, 1:4, 1] = 12
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii.gz")
    with open_source(tmp_path / "v.nii.gz", as_stored=True) as source:
        rule, _ = find_values(tmp_path / "v.nii.gz", source)
        assert [int((rule(source.read(page)) == 12).sum()) for page in range(3)] == [0, 6, 0]
    write_dicom(tmp_path / "d.dcm", CLASSES)
    np.testing.assert_array_equal(values_of(tmp_path / "d.dcm"), NUMBERS)


def png(samples: np.ndarray, bits: int) -> bytes:
    """A greyscale PNG of 2 or 4 bits, which Pillow does not write."""
    shifts = np.arange(8 - bits, -1, -bits)
    packed = (samples.reshape(len(samples), -1, len(shifts)).astype(int) << shifts).sum(axis=-1).astype("u1")
    rows = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">II5B", samples.shape[1], samples.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits(tmp_path, bits):
    numbers = np.where(INSIDE, 2, 0).astype("u1")
    numbers[8:16, 16:24] = 3
    np.testing.assert_array_equal(values_of(write(tmp_path, "a.png", png(numbers, bits))), numbers)


REFUSED = {
    "jpeg.jpg": (picture(GREY, "JPEG", quality=85), "JPEG.*compression blurs.*save it as PNG or TIFF"),
    "jpeg_in_tiff.tif": (tiff(np.dstack([GREY] * 3), photometric="rgb", compression="jpeg"), "is a JPEG"),
    "named_png.png": (picture(GREY, "JPEG"), "is a JPEG"),
    "fractions.tif": (tiff((GREY / 255 * 0.8).astype("f4")), "fractional or infinite values.*0.8.*apply a threshold"),
    "colours.png": (picture(coloured(BLACK, RED, BLUE)), "several colours .*0, 0, 90.*200, 0, 0.*save class numbers"),
    "no_black.png": (picture(coloured(WHITE, RED, RED)), "several colours"),
    "four_bands.tif": (tiff(np.dstack([GREY, GREY, GREY, OPAQUE]), photometric="minisblack", planarconfig="contig"),
                       "4 bands and several colours"),
    "negative.tif": (tiff(NUMBERS.astype("i2") - 1), "negative values.*-1.*data.ignore=255"),
    "instances.tif": (tiff(CLASSES.astype("u2") * 100), "above 254.*700.*class numbers are 1 to 254"),
    "black_not_first.png": (palette(INSIDE, RED, BLACK), "black at index 1, not 0"),
    "compressed_grey.png": (palette(np.searchsorted([0, 2, 7], CLASSES), BLACK, (10, 10, 10), (20, 20, 20)),
                            "dark greys that are not its indices .*0, 1, 2, greys 0, 10, 20"),
    "soft_alpha.png": (picture(np.dstack([np.full_like(GREY, 9), SOFT])), "alpha channel.*soft edges"),
    "transparent.png": (picture(np.dstack([CLASSES, np.zeros_like(GREY)])), "all its pixels are transparent"),
    "photo.tif": (tiff(np.random.default_rng(0).normal(1000, 200, (90, 90)).astype("f4")), "fractional or infinite"),
    "infinite.tif": (tiff(np.where(INSIDE, np.inf, 0).astype("f4")), "fractional or infinite values.*0, inf"),
    "intensities.tif": (tiff(np.random.default_rng(0).integers(0, 60_000, (200, 200)).astype("u2")),
                        "such as those of soft edges"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_are_refused(tmp_path, name):
    content, reason = REFUSED[name]
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=f"(?s){path}.*{reason}"):
        values_of(path)


OF_A_CLASS = {
    "grey.png": (picture(GREY), INSIDE),
    "bool.tif": (tiff(INSIDE), INSIDE),
    "one_and_zero.tif": (tiff(INSIDE.astype("f4")), INSIDE),
    "instances.tif": (tiff(CLASSES.astype("u2") * 1000), INSIDE),
    "several_colours.png": (picture(coloured(BLACK, RED, BLUE)), INSIDE),
    "palette.png": (palette(INSIDE, WHITE, RED), INSIDE),
    "white_is_zero.tif": (tiff(255 - GREY, photometric="miniswhite"), INSIDE),
    "empty.png": (picture(np.zeros_like(GREY)), np.zeros_like(INSIDE)),
    "full.png": (picture(OPAQUE), np.ones_like(INSIDE)),
}


@pytest.mark.parametrize("name", OF_A_CLASS)
def test_masks_of_one_class(tmp_path, name):
    content, inside = OF_A_CLASS[name]
    np.testing.assert_array_equal(values_of(write(tmp_path, name, content), "class") > 0, inside)


REFUSED_OF_A_CLASS = {
    "soft.png": (picture(SOFT), "soft edges|those of soft"),
    "few_grey_levels.png": (picture(np.where(SOFT > 200, 255, SOFT // 60 * 60).astype("u1")), "soft edges"),
    "jpeg.jpg": (picture(GREY, "JPEG"), "is a JPEG"),
    "no_background.tif": (tiff(CLASSES + np.uint8(1)), "no pixel is 0"),
    "fractions.tif": (tiff((GREY / 255 * 0.5).astype("f4")), "fractional"),
}


@pytest.mark.parametrize("name", REFUSED_OF_A_CLASS)
def test_masks_of_one_class_that_are_refused(tmp_path, name):
    content, reason = REFUSED_OF_A_CLASS[name]
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=reason):
        values_of(path, "class")


def test_the_ignored_value_may_be_any(tmp_path):
    path = write(tmp_path, "a.tif", tiff(np.where(GAP == 255, 40_000, GAP).astype("u2")))
    with pytest.raises(InputError, match=r"40000.*data.ignore"):
        values_of(path)
    assert values_of(path, ignore=40_000).max() == 40_000
    path = write(tmp_path, "b.png", picture(np.where(GAP == 255, 128, GREY).astype("u1")))
    with pytest.raises(InputError, match=r"128.*255.*data.ignore"):
        values_of(path, "class")
    assert values_of(path, "class", ignore=128).max() == 255


def test_notes_say_how_a_mask_is_read(tmp_path):
    for name, word in (("white_is_zero.tif", "white-is-zero"), ("opacity.png", "opacity"),
                       ("nodata_is_background.tif", "GDAL_NODATA"), ("numbers.png", "^$")):  # fmt: skip
        path = write(tmp_path, name, NUMBERED[name][0])
        with open_source(path, as_stored=True) as source:
            assert re.search(word, find_values(path, source)[1])
