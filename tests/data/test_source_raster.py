"""PNG and JPEG: modes, depth, palettes, transparency, animations, resolution."""

import sys

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from references.image_files import noise

from pulmo_jax.data.sources import open_source
from pulmo_jax.types import ImageTags, InputError


def read(path) -> np.ndarray:
    with open_source(path) as source:
        pixels = source.read()
        assert pixels.dtype == source.dtype
        assert (1, *pixels.shape) == source.shape
        return pixels


@pytest.mark.parametrize(("stored", "kept"), [(1, 1), (2, 1), (3, 3), (4, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_keeps_depth_and_drops_alpha(tmp_path, stored, kept, dtype):
    """Pillow alone would squeeze 16-bit colour to 8 bits. With alpha, pixels may be missing, so they are floats."""
    pixels = noise((20, 30, stored), dtype)
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(pixels.squeeze()))
    found = read(tmp_path / "x.png")
    assert found.dtype == (dtype if stored == kept else np.float32)
    opaque = pixels[..., -1] > 0 if stored > kept else np.ones((20, 30), bool)
    np.testing.assert_array_equal(found[opaque], pixels[opaque][:, :kept])
    assert np.isnan(found[~opaque]).all()


def test_one_bit_becomes_zero_and_one(tmp_path):
    pixels = noise((20, 30), np.uint8) > 127
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read(tmp_path / "x.png")[..., 0], pixels.astype(np.uint8))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palettes_become_rgb(tmp_path, transparency):
    indices, colours = noise((20, 30), np.uint8), noise((256, 3), np.uint8, seed=1)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colours.tobytes())
    image.putdata(indices.ravel().tolist())
    image.save(tmp_path / "x.png", **({} if transparency is None else {"transparency": transparency}))
    found, clear = read(tmp_path / "x.png"), indices == {None: -1, 3: 3}.get(transparency, 0)
    np.testing.assert_array_equal(found[~clear], colours[indices][~clear])
    assert np.isnan(found[clear]).all()


def test_a_palette_that_is_missing_is_said(tmp_path):
    """Pillow would make it black."""
    image = Image.fromarray(noise((20, 30), np.uint8)).convert("P")
    image.save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    at = content.index(b"PLTE") - 4
    end = at + 12 + int.from_bytes(content[at : at + 4], "big")
    (tmp_path / "x.png").write_bytes(content[:at] + content[end:])
    with pytest.raises(InputError, match=r"x\.png: damaged: its palette is missing"):
        open_source(tmp_path / "x.png")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_modes(tmp_path, mode):
    image = Image.fromarray(noise((20, 30, 3), np.uint8)).convert(mode)
    image.save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as written:
        expected = np.asarray(written.convert("L" if mode == "L" else "RGB")).reshape(20, 30, -1)
    np.testing.assert_array_equal(read(tmp_path / "x.jpg"), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_rows": 1}, {"keep_rgb": True}],
)
def test_whole_jpegs_are_what_pillow_makes_of_them(tmp_path, mode, options):
    """They do not go through it; what has bytes behind its end does."""
    path = tmp_path / "x.jpg"
    for shape in ((1, 1, 3), (17, 9, 3), (64, 80, 3)):
        Image.fromarray(noise(shape, np.uint8)).convert(mode).save(path, **options)
        with Image.open(path) as written:
            expected = np.asarray(written).reshape(*shape[:2], -1)
        np.testing.assert_array_equal(read(path), expected)
        path.write_bytes(path.read_bytes() + b"\0\0")
        np.testing.assert_array_equal(read(path), expected)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_is_cut_off_anywhere_is_refused(tmp_path, progressive):
    Image.fromarray(noise((40, 50, 3), np.uint8)).save(tmp_path / "x.jpg", progressive=progressive)
    whole = (tmp_path / "x.jpg").read_bytes()
    for size in range(0, len(whole) - 2, 7):
        (tmp_path / "x.jpg").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"x\.jpg"):
            read(tmp_path / "x.jpg")


def test_damaged_16_bit_pngs_cost_no_references(tmp_path):
    """A failure of imagecodecs' decoder takes one from None, and the process ends when none is left."""
    (tmp_path / "x.png").write_bytes(imagecodecs.png_encode(noise((40, 50), np.uint16)))
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.png").write_bytes(content)
    before = sys.getrefcount(None)
    for _ in range(200):
        with pytest.raises(InputError, match=r"x\.png"):
            read(tmp_path / "x.png")
    assert sys.getrefcount(None) > before - 100


def test_orientation_is_left_alone(tmp_path):
    image = Image.fromarray(noise((20, 30), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read(tmp_path / "x.jpg").shape == (20, 30, 1)


def test_animations_are_refused(tmp_path):
    frames = [Image.fromarray(noise((20, 30), np.uint8, seed)) for seed in range(3)]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="animation of 3 frames"):
        open_source(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_resolution(tmp_path, suffix):
    image = Image.fromarray(noise((20, 30), np.uint8))
    image.save(tmp_path / f"with.{suffix}", dpi=(300, 150))
    image.save(tmp_path / f"without.{suffix}")
    with open_source(tmp_path / f"with.{suffix}") as source:
        assert source.tags.resolution == pytest.approx((300, 150, 2), rel=1e-3)
    with open_source(tmp_path / f"without.{suffix}") as source:
        assert source.tags == ImageTags()
