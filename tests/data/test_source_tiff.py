"""TIFF: which directories are pages, how samples become channels, tags, and how little a window decodes."""

import struct

import numpy as np
import pytest
import tifffile
from PIL import Image
from references.image_files import noise

from pulmo_jax.data.sources import open_source, tiff_pixels
from pulmo_jax.types import ImageTags, InputError, Window


def read(path) -> np.ndarray:
    with open_source(path) as source:
        return np.stack([source.read(page) for page in range(source.shape[0])])


DEPTHS = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]


@pytest.mark.parametrize("options", [{}, {"compression": "deflate", "predictor": True, "tile": (16, 16)}])
@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_is_kept(tmp_path, depth, options):
    pixels = noise((40, 30), np.dtype(depth).type)
    predictable = {"predictor": depth not in ("u8", "i8", "f2")} if options else {}
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", **(options | predictable))
    found = read(tmp_path / "x.tif")
    assert found.dtype == pixels.dtype
    np.testing.assert_array_equal(found, pixels[None, :, :, None])


def test_not_a_number_is_returned_as_it_is(tmp_path):
    pixels = np.array([[np.nan, np.inf], [-np.inf, 1]], np.float32)
    tifffile.imwrite(tmp_path / "x.tif", pixels)
    np.testing.assert_array_equal(read(tmp_path / "x.tif")[0, :, :, 0], pixels)


@pytest.mark.parametrize("bands", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 32)}, {"compression": "zlib", "rowsperstrip": 9}])
def test_bands_are_channels_however_they_are_stored(tmp_path, bands, planar, options):
    pixels = noise((40, 50, bands))
    stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
    photometric = "rgb" if bands in (3, 4) else "minisblack"
    tifffile.imwrite(tmp_path / "x.tif", stored, photometric=photometric, planarconfig=planar, metadata=None, **options)
    with open_source(tmp_path / "x.tif") as source:
        assert source.shape == (1, 40, 50, bands)
        np.testing.assert_array_equal(source.read(), pixels)
        np.testing.assert_array_equal(source.read(0, Window(7, 20, 20, 25)), pixels[7:27, 20:45])


def test_a_hyperstack_has_a_page_for_each_directory(tmp_path):
    pixels = noise((2, 3, 20, 30))  # time and channel
    tifffile.imwrite(tmp_path / "x.tif", pixels, imagej=True, metadata={"axes": "TCYX"})
    np.testing.assert_array_equal(read(tmp_path / "x.tif"), pixels.reshape(6, 20, 30, 1))


def test_white_is_zero_is_inverted(tmp_path):
    pixels = noise((20, 30))
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="miniswhite")
    np.testing.assert_array_equal(read(tmp_path / "x.tif")[0, :, :, 0], 65535 - pixels.astype(int))


@pytest.mark.parametrize("compression", [None, "tiff_deflate", "packbits"])
@pytest.mark.parametrize("white", [0, 1])
def test_one_bit_becomes_zero_and_one(tmp_path, compression, white):
    pixels = noise((21, 30), np.uint8) > 127
    options = {"compression": compression} if compression else {}
    Image.fromarray(pixels).save(tmp_path / "x.tif", tiffinfo={262: 1 - white}, **options)
    with Image.open(tmp_path / "x.tif") as image:
        assert image.tag_v2[262] == 1 - white
        expected = np.asarray(image)
    found = read(tmp_path / "x.tif")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, :, :, 0], expected)


@pytest.mark.parametrize("factor", [1, 256, 257])
def test_palettes_become_rgb_of_8_bits(tmp_path, factor):
    indices, colours = noise((20, 30), np.uint8), noise((3, 256), np.uint8, seed=1)
    colormap = colours.astype(np.uint16) * factor
    tifffile.imwrite(tmp_path / "x.tif", indices, photometric="palette", colormap=colormap)
    found = read(tmp_path / "x.tif")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], colours.T[indices])


def test_palettes_of_16_bits_keep_their_depth(tmp_path):
    indices, colours = noise((20, 30), np.uint8), noise((3, 256), seed=1)
    tifffile.imwrite(tmp_path / "x.tif", indices, photometric="palette", colormap=colours, byteorder=">")
    found = read(tmp_path / "x.tif")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[0], colours.T[indices])


@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_jpeg_compressed_colours_are_decoded_to_rgb(tmp_path, tile):
    smooth = np.stack(np.meshgrid(np.arange(70), np.arange(50)), -1).repeat(2, -1)[..., :3].astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", smooth, photometric="rgb", compression="jpeg", tile=tile)
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        assert tif.pages.first.photometric == tifffile.PHOTOMETRIC.YCBCR
    with open_source(tmp_path / "x.tif") as source:
        assert np.abs(source.read().astype(int) - smooth).mean() < 3
        np.testing.assert_array_equal(source.read(), tifffile.imread(tmp_path / "x.tif"))
        np.testing.assert_array_equal(source.read(0, Window(20, 20, 30, 50)), source.read()[20:50, 20:70])


def test_reduced_copies_are_left_out_and_masks_applied(tmp_path):
    pages = noise((2, 64, 64))
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        for page in pages:
            tif.write(page, subifds=1, metadata=None)
            tif.write(page[::2, ::2], subfiletype=1, metadata=None)  # a pyramid in sub-directories
            tif.write(page[::4, ::4], subfiletype=1, metadata=None)  # a thumbnail in the chain
        tif.write(pages[0] > 1000, subfiletype=4, metadata=None)
    found, expected = read(tmp_path / "x.tif"), pages[..., None].astype(np.float32)
    expected[1][pages[0] <= 1000] = np.nan
    np.testing.assert_array_equal(found, expected)


def test_the_levels_of_an_aperio_slide_are_left_out(tmp_path):
    slide = noise((128, 128, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        for step, tile in (
            (1, (64, 64)),
            (8, None),
            (2, (64, 64)),
        ):  # slide, thumbnail, level: none marked as such
            level = np.ascontiguousarray(slide[::step, ::step])
            tif.write(level, tile=tile, description="Aperio Image Library", photometric="rgb", metadata=None)
    np.testing.assert_array_equal(read(tmp_path / "x.tif"), slide[None])


@pytest.mark.parametrize("other", [noise((20, 31)), noise((20, 30), np.uint8), noise((20, 30, 3))])
def test_pages_that_differ_are_refused(tmp_path, other):
    with tifffile.TiffWriter(tmp_path / "x.tif") as tif:
        tif.write(noise((20, 30)), metadata=None)
        tif.write(noise((20, 30)), metadata=None)
        tif.write(other, metadata=None, photometric="rgb" if other.ndim == 3 else "minisblack")
    with pytest.raises(InputError, match=r"page 2 is 20 x .*page 0 is 20 x 30 px of 1 x uint16"):
        open_source(tmp_path / "x.tif")


def test_images_hidden_behind_one_directory_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", noise((5, 20, 30)), photometric="minisblack", contiguous=True)
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+") as tif:
        tif.pages.first.tags[270].overwrite("ImageJ=1.53\nimages=7\nslices=7\n")
    with pytest.raises(InputError, match="7 ImageJ images in 5 directories"):
        open_source(tmp_path / "x.tif")
    tifffile.imwrite(tmp_path / "y.tif", noise((5, 20, 30)), photometric="minisblack", truncate=True)
    with pytest.raises(InputError, match="several images in one directory"):
        open_source(tmp_path / "y.tif")


@pytest.mark.parametrize(
    ("pixels", "options", "reason"),
    [
        (noise((20, 30)).astype(np.complex64), {}, "64 bits"),
        (noise((20, 30), np.float32), {"photometric": "miniswhite"}, "MINISWHITE"),
        (noise((20, 30, 3), np.uint8), {"photometric": "cielab"}, "CIELAB"),
        (
            noise((4, 16, 16), np.uint8),
            {"volumetric": True, "tile": (16, 16, 16), "photometric": "minisblack"},
            "volume",
        ),
        (noise((20, 30), np.uint8), {"subfiletype": 1}, "reduced"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, pixels, options, reason):
    tifffile.imwrite(tmp_path / "x.tif", pixels, metadata=None, **options)
    with pytest.raises(InputError, match=reason):
        open_source(tmp_path / "x.tif")


@pytest.mark.parametrize("compression", ["zlib", None])
def test_a_window_of_a_large_tiled_image_decodes_few_tiles(tmp_path, monkeypatch, compression):
    pixels = noise((1024, 2048), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pixels, tile=(64, 64), compression=compression)
    decoded = []

    def counted(file, page, index, decode=tiff_pixels.decode_segment):
        decoded.append(index)
        return decode(file, page, index)

    monkeypatch.setattr(tiff_pixels, "decode_segment", counted)
    with open_source(tmp_path / "x.tif") as source:
        np.testing.assert_array_equal(source.read(0, Window(130, 200, 64, 64))[..., 0], pixels[130:194, 200:264])
        assert decoded == [2 * 32 + 3, 2 * 32 + 4, 3 * 32 + 3, 3 * 32 + 4]  # of 512
        source.read(0, Window(140, 205, 40, 40))
        assert len(decoded) == 4  # neighbouring windows share them


def test_a_window_of_a_large_striped_image_decodes_few_strips(tmp_path, monkeypatch):
    pixels = noise((1000, 300), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", pixels, rowsperstrip=10, compression="lzw")
    decode, decoded = tiff_pixels.decode_segment, []
    monkeypatch.setattr(tiff_pixels, "decode_segment", lambda file, page, i: decoded.append(i) or decode(file, page, i))
    with open_source(tmp_path / "x.tif") as source:
        np.testing.assert_array_equal(source.read(0, Window(505, 9, 10, 5))[..., 0], pixels[505:515, 9:14])
    assert decoded == [50, 51]


def test_resolution_and_georeference_survive_a_copy(tmp_path):
    scale, tie_point = (0.5, 0.5, 0.0), (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0)
    keys = (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32611)
    geo = (
        (33550, 12, 3, scale),
        (33922, 12, 6, tie_point),
        (34735, 3, len(keys), keys),
        (34736, 12, 2, (1.5, 2.5)),
        (34737, 2, 6, "UTM11|"),
    )
    tags = {"resolution": (72.5, 36.25), "resolutionunit": 3, "extratags": [(*tag, True) for tag in geo]}
    tifffile.imwrite(tmp_path / "x.tif", noise((20, 30)), **tags)
    with open_source(tmp_path / "x.tif") as source:
        found = source.tags
    assert found.resolution == (72.5, 36.25, 3)
    assert [tag[0] for tag in found.geo] == [33550, 33922, 34735, 34736, 34737]
    *resolution, unit = found.resolution
    extratags = [(*tag, True) for tag in found.geo]
    tifffile.imwrite(
        tmp_path / "copy.tif",
        noise((20, 30)),
        resolution=resolution,
        resolutionunit=unit,
        extratags=extratags,
    )
    with open_source(tmp_path / "copy.tif") as source:
        assert source.tags == found
    with tifffile.TiffFile(tmp_path / "copy.tif") as tif:
        assert [tif.pages.first.tags[code].value for code, *_ in geo] == [value for *_, value in geo]


def test_no_tags_are_no_tags(tmp_path):
    Image.fromarray(noise((20, 30), np.uint8)).save(tmp_path / "x.tif")
    with open_source(tmp_path / "x.tif") as source:
        assert source.tags == ImageTags()


def overwrite(path, code: int, value) -> None:
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages.first.tags[code].overwrite(value)


def test_bombs_are_refused_from_the_header(tmp_path):
    """A tile may be a bomb too: its size is not bounded by that of the image."""
    tifffile.imwrite(tmp_path / "x.tif", noise((64, 64), np.uint8), compression="zlib", tile=(64, 64))
    overwrite(tmp_path / "x.tif", 257, 10_000_000)
    with pytest.raises(InputError, match=r"610\.4 MB, the limit is 100\.0 MB"):
        open_source(tmp_path / "x.tif", max_bytes=100 * 2**20)
    overwrite(tmp_path / "x.tif", 257, 64)
    overwrite(tmp_path / "x.tif", 323, 64_000)
    overwrite(tmp_path / "x.tif", 322, 64_000)
    with pytest.raises(InputError, match="strip or tile"):
        open_source(tmp_path / "x.tif", max_bytes=100 * 2**20)


def test_a_jpeg_tile_larger_than_the_page_says_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", noise((64, 64), np.uint8), compression="jpeg", tile=(64, 64))
    content = (tmp_path / "x.tif").read_bytes()
    frame = content.index(b"\xff\xc0") + 5
    (tmp_path / "x.tif").write_bytes(content[:frame] + struct.pack(">HH", 65_000, 65_000) + content[frame + 4 :])
    with (
        open_source(tmp_path / "x.tif") as source,
        pytest.raises(InputError, match=r"\(65000, 65000, 1\) in a strip or tile of \(64, 64, 1\)"),
    ):
        source.read()


def test_tiles_never_written_are_missing_if_there_is_a_declared_value(tmp_path):
    pixels = noise((64, 64), np.int16)
    nodata = [(42113, 2, 5, "-999", True)]
    for name, tags in (("undeclared.tif", []), ("declared.tif", nodata)):
        tifffile.imwrite(tmp_path / name, pixels, tile=(32, 32), compression="zlib", extratags=tags)
        with tifffile.TiffFile(tmp_path / name, mode="r+") as tif:
            page = tif.pages.first
            page.tags[324].overwrite((page.dataoffsets[0], 0, *page.dataoffsets[2:]))
            page.tags[325].overwrite((page.databytecounts[0], 0, *page.databytecounts[2:]))
    with pytest.raises(InputError, match="1 of 4 strips or tiles of page 0 were never written"):
        open_source(tmp_path / "undeclared.tif")
    found = read(tmp_path / "declared.tif")[0, :, :, 0]
    assert np.isnan(found[:32, 32:]).all()
    found[:32, 32:] = pixels[:32, 32:]
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("target", ["first", "second"])
def test_a_circle_of_directories_is_refused(tmp_path, target):
    tifffile.imwrite(tmp_path / "x.tif", noise((2, 8, 8)), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        first, last = (page.offset for page in tif.pages)
        (tags,) = struct.unpack("<H", (tmp_path / "x.tif").read_bytes()[last : last + 2])
    content = bytearray((tmp_path / "x.tif").read_bytes())
    struct.pack_into("<I", content, last + 2 + 12 * tags, first if target == "first" else last)
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(InputError, match="circular"):
        open_source(tmp_path / "x.tif")


def test_a_page_lost_at_the_end_is_not_passed_over(tmp_path):
    """tifffile alone reads the other pages and says nothing."""
    tifffile.imwrite(tmp_path / "x.tif", noise((3, 8, 8)), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(tmp_path / "x.tif") as tif:
        last = tif.pages[2].offset
    content = (tmp_path / "x.tif").read_bytes()
    (tmp_path / "x.tif").write_bytes(content[:last])
    with pytest.raises(InputError, match="no image directory after the first 2"):
        open_source(tmp_path / "x.tif")


def test_a_closed_source_reads_no_more(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", noise((20, 30)), compression="zlib")
    with open_source(tmp_path / "x.tif") as source:
        source.read()
    with pytest.raises(InputError):
        source.read()
