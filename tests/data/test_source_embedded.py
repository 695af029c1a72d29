"""The size that an image inside of an image says of itself, and that a lying one is refused before it is decoded."""

import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit
from references.image_files import noise, write_dicom

from pulmo_jax.data.sources import open_source
from pulmo_jax.data.sources.embedded import embedded_size
from pulmo_jax.types import InputError

COLOUR = noise((37, 53, 3), np.uint8)
CODES = {
    "jpeg": imagecodecs.jpeg_encode(COLOUR),
    "lossless jpeg": imagecodecs.ljpeg_encode(noise((37, 53))),
    "jpeg-ls": imagecodecs.jpegls_encode(COLOUR),
    "jpeg 2000 codestream": imagecodecs.jpeg2k_encode(COLOUR, codecformat="J2K"),
    "jpeg 2000 file": imagecodecs.jpeg2k_encode(COLOUR, codecformat="JP2"),
    "png": imagecodecs.png_encode(COLOUR),
    "webp": imagecodecs.webp_encode(COLOUR, level=50),
    "lossless webp": imagecodecs.webp_encode(COLOUR, lossless=True),
    "webp with alpha": imagecodecs.webp_encode(noise((37, 53, 4), np.uint8), level=50),
    "lerc": imagecodecs.lerc_encode(COLOUR[..., 0]),
}


@pytest.mark.parametrize("name", CODES)
def test_the_size_is_found(name):
    found = embedded_size(CODES[name])
    assert found is not None
    assert found[:2] == (37, 53)


@pytest.mark.parametrize("name", CODES)
def test_a_header_that_was_cut_off_has_no_size(name):
    assert embedded_size(CODES[name][:12]) is None


@pytest.mark.parametrize("data", [b"", b"no image at all", b"\xff\xd8\xff\xd9", b"RIFF0000WEBPVP9 " + bytes(40)])
def test_other_content_has_no_size(data):
    assert embedded_size(data) is None


LIES = {
    "jpeg2000": lambda tile: tile.replace(struct.pack(">II", 32, 32), struct.pack(">II", 60_000, 60_000)),
    "webp": lambda tile: tile[:21] + struct.pack("<I", 0x0FFF_FFFF) + tile[25:],  # 16,384 x 16,384 px
    "png": lambda tile: tile[:16] + struct.pack(">II", 60_000, 60_000) + tile[24:],
    "lerc": lambda tile: tile[:14] + struct.pack("<II", 60_000, 60_000) + tile[22:],
}


@pytest.mark.parametrize("codec", LIES)
def test_a_tile_larger_than_the_page_says_is_refused(tmp_path, codec):
    pixels = noise((32, 32, 3), np.uint8) if codec != "lerc" else noise((32, 32), np.uint8)
    kind = "rgb" if codec != "lerc" else "minisblack"
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric=kind, tile=(32, 32), compression=codec)
    with open_source(tmp_path / "x.tif") as source:
        assert source.read().shape[:2] == (32, 32)
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        start, size = tif.pages.first.dataoffsets[0], tif.pages.first.databytecounts[0]
    content = (tmp_path / "x.tif").read_bytes()
    lying = LIES[codec](content[start : start + size])
    assert len(lying) == size
    assert lying != content[start : start + size]
    (tmp_path / "x.tif").write_bytes(content[:start] + lying + content[start + size :])
    with open_source(tmp_path / "x.tif") as source, pytest.raises(InputError, match=r"in a strip or tile of \(32, 32"):
        source.read()


def test_a_dicom_frame_larger_than_its_header_says_is_refused(tmp_path):
    code = CODES["jpeg"].replace(struct.pack(">HH", 37, 53), struct.pack(">HH", 60_000, 60_000))
    write_dicom(tmp_path / "x.dcm", COLOUR[None], JPEGBaseline8Bit, PixelData=encapsulate([code]))
    with open_source(tmp_path / "x.dcm") as source, pytest.raises(InputError, match=r"\(60000, 60000, 3\) in a frame"):
        source.read()


@pytest.mark.parametrize(("codec", "name"), [("jpegxl", "JPEGXL"), ("jpegxr", "JPEGXR")])
def test_codecs_whose_size_is_not_known_beforehand_are_refused(tmp_path, codec, name):
    tifffile.imwrite(tmp_path / "x.tif", COLOUR, photometric="rgb", compression=codec)
    with pytest.raises(InputError, match=f"compressed with {name}.*save it with deflate"):
        open_source(tmp_path / "x.tif")


def test_a_tile_of_another_depth_is_refused(tmp_path):
    """To put 16 bits into 8 would keep the lower ones without a word."""
    tifffile.imwrite(tmp_path / "x.tif", noise((32, 32)), compression="jpeg2000", photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+") as tif:
        tif.pages.first.tags[258].overwrite(8)
    with open_source(tmp_path / "x.tif") as source, pytest.raises(InputError, match="uint16 in a page of uint8"):
        source.read()
