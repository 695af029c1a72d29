"""PNG and JPEG files.

Pillow reads them, with two exceptions: 16-bit PNG is read with libpng, because Pillow reduces 16-bit colour to 8 bits,
and complete JPEG files with libjpeg, which takes half the time.

Pixels are as stored: EXIF orientation is not applied. Palette and CMYK images become RGB, 1-bit images become 0 and 1,
and grey values of 2 or 4 bits are scaled to 0 to 255. Fully transparent pixels of a PNG become NaN (see `missing`), and
its alpha channel is dropped. A JPEG with several images (previews, stereo) is read as its first image; a PNG with
several frames is refused.

Pillow's format plugins are called directly, not through Image.open, because this package applies a separate size limit.
"""

import os
import struct
from collections.abc import Callable
from io import BufferedIOBase, BytesIO
from pathlib import Path

import imagecodecs
import numpy as np
from PIL.Image import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from pulmo_jax.data.sources.missing import float_dtype, with_nan
from pulmo_jax.data.sources.source import Encoding, ImageSource, decoding, page_source
from pulmo_jax.types import ImageTags, InputError

# Number of channels to keep, by the mode in Pillow and by the colour type in the header of a 16-bit PNG.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3, "CMYK": 3}
_RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 2, 3, 4, 6  # colour types
_CHANNELS_16_BIT = {0: 1, 2: 3, 4: 1, 6: 3}
# A file may be longer than its decoded pixels by this much; compressed pixels of a PNG may be longer than raw ones.
_MAX_EXTRA_PNG_BYTES, _MAX_EXTRA_JPEG_BYTES = 16 * 2**20, 128 * 2**20
_MAX_IDAT_RATIO, _MAX_EXTRA_IDAT_BYTES = 2, 2**16
_MAX_PNG_CHUNKS = 10_000  # other than IDAT; Pillow takes 4 us each
_END_OF_JPEG = b"\xff\xd9"


def open_png(path: Path, max_bytes: int, as_stored: bool = False) -> ImageSource:
    """Open a PNG file.

    Args:
        path: The file.
        max_bytes: Limit on the decoded size in bytes.
        as_stored: Whether to read the stored samples, such as the indices of a palette, instead of pixels.

    Raises:
        InputError: The file cannot be read, is not supported or exceeds the limit.
    """
    with decoding(path), path.open("rb") as file:
        width, height, bits, colour_type = struct.unpack(">II2B", file.read(26)[16:])
        raw = height * (2 + width * 4 * max(8, bits) // 8)
        _check_file_size(path, min(raw, max_bytes) + _MAX_EXTRA_PNG_BYTES)
        _check_png_chunks(path, file, _MAX_IDAT_RATIO * raw + _MAX_EXTRA_IDAT_BYTES)
        file.seek(0)
        with PngImageFile(file) as image:
            if image.n_frames > 1:
                raise InputError(f"{path}: is an animation of {image.n_frames} frames; save one frame as PNG")
            if image.mode == "P" and image.palette is None:
                raise InputError(f"{path}: damaged: its palette is missing; save it again")
            dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)
            if as_stored:
                return _stored_png(path, image, bits, colour_type, max_bytes)
            transparent = _transparent(image, bits, colour_type)
            channels = _CHANNELS_16_BIT[colour_type] if bits == 16 else _CHANNELS[image.mode]

            def decode(path: Path) -> np.ndarray:
                pixels = _decode_png_16_bit(path) if bits == 16 else _decode_png(path)
                pixels = pixels.reshape(image.height, image.width, -1)
                kept = pixels[..., :channels]
                return kept if transparent is None else with_nan(kept, transparent(pixels), float_dtype(dtype))

            if transparent is None:
                return _source(path, image, channels, dtype, decode, max_bytes)
            return _source(path, image, channels, float_dtype(dtype), decode, max_bytes, stored_dtype=dtype)


def _transparent(image: Image, bits: int, colour_type: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """A function that finds the transparent pixels (H, W) of decoded ones; None if the header declares none."""
    if colour_type in (_GREY_ALPHA, _RGB_ALPHA):
        return lambda pixels: pixels[..., -1] == 0
    key = image.info.get("transparency")
    if key is None:
        return None
    if colour_type == _PALETTE:
        return lambda pixels: pixels[..., -1] == 0  # decoded as RGBA
    if bits < 8 and image.mode == "L":  # the key is in units of the file
        key *= 255 // (2**bits - 1)
    return lambda pixels: (pixels[..., : _CHANNELS_16_BIT[colour_type]] == np.asarray(key)).all(axis=-1)


def _stored_png(path: Path, image: Image, bits: int, colour_type: int, max_bytes: int) -> ImageSource:
    """A source of the stored samples: indices of a palette, grey values of 2 or 4 bits, and the alpha channel."""
    dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)
    factor = 255 // (2**bits - 1) if bits in (2, 4) and image.mode == "L" else 1  # by which Pillow scales
    channels = {_PALETTE: 1, _GREY_ALPHA: 2, _RGB: 3, _RGB_ALPHA: 4}.get(colour_type, 1)

    def decode(path: Path) -> np.ndarray:
        if dtype == np.uint16:
            return _decode_png_16_bit(path)
        with PngImageFile(BytesIO(_verified(path))) as stored:
            samples = np.asarray(stored).astype(np.uint8, copy=False)
            return samples if factor == 1 else samples // np.uint8(factor)

    palette, transparent = None, ()
    if colour_type == _PALETTE:
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        opacity = image.info.get("transparency", b"")
        transparent = (opacity,) if isinstance(opacity, int) else tuple(i for i, a in enumerate(opacity) if a == 0)
    encoding = Encoding(palette, transparent, alpha=colour_type in (_GREY_ALPHA, _RGB_ALPHA))
    return _source(path, image, channels, dtype, decode, max_bytes, encoding=encoding)


def open_jpeg(path: Path, max_bytes: int, as_stored: bool = False) -> ImageSource:
    """Open a JPEG file.

    Args:
        path: The file.
        max_bytes: Limit on the decoded size in bytes.
        as_stored: Whether the samples are those of a mask; they are the same.

    Raises:
        InputError: The file cannot be read, is not supported or exceeds the limit.
    """
    with decoding(path), JpegImageFile(path) as image:
        _check_file_size(path, min(4 * image.width * image.height, max_bytes) + _MAX_EXTRA_JPEG_BYTES)
        decode = _decode_jpeg_by_pillow if image.mode == "CMYK" else _decode_jpeg
        encoding = Encoding(lossy=True) if as_stored else None
        return _source(path, image, _CHANNELS[image.mode], np.dtype(np.uint8), decode, max_bytes, encoding=encoding)


def _check_file_size(path: Path, limit: int) -> None:
    """Refuse a file that is far larger than its pixels, because decoding reads all of it into memory."""
    if (size := path.stat().st_size) > limit:
        raise InputError(
            f"{path}: has {size / 2**20:.0f} MB, more than its pixels can take; save it again without other data"
        )


def _check_png_chunks(path: Path, file: BufferedIOBase, limit: int) -> None:
    """Refuse a PNG whose compressed pixels expand beyond the image, or which has too many other chunks."""
    file.seek(8)
    pixels = others = 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        pixels += length if kind == b"IDAT" else 0
        others += kind != b"IDAT"
        if pixels > limit or others > _MAX_PNG_CHUNKS:
            raise InputError(f"{path}: damaged: has more compressed pixels than its size allows, or too many chunks")
        file.seek(length + 4, os.SEEK_CUR)


def _source(
    path: Path,
    image: Image,
    channels: int,
    dtype: np.dtype,
    decode: Callable[[Path], np.ndarray],
    max_bytes: int,
    stored_dtype: np.dtype | None = None,
    encoding: Encoding | None = None,
) -> ImageSource:
    width, height = image.size

    def kept_channels(page: int) -> np.ndarray:
        return decode(path).reshape(height, width, -1)[..., :channels]

    shape = (1, height, width, channels)
    return page_source(path, shape, dtype, kept_channels, max_bytes, _tags(image), stored_dtype, encoding)


def _decode_jpeg(path: Path) -> np.ndarray:
    data = path.read_bytes()
    if data.endswith(_END_OF_JPEG):
        return imagecodecs.jpeg8_decode(data)
    return _decode_jpeg_by_pillow(path)  # which raises an error for a truncated file


def _decode_jpeg_by_pillow(path: Path) -> np.ndarray:
    with JpegImageFile(path) as image:
        return np.asarray(image.convert("RGB") if image.mode == "CMYK" else image)


def _decode_png(path: Path) -> np.ndarray:
    with PngImageFile(BytesIO(_verified(path))) as image:
        # RGBA, because conversion to RGB makes Pillow warn about palettes with transparency.
        return np.asarray(image.convert("RGBA") if image.mode == "P" else image).astype(np.uint8, copy=False)


def _decode_png_16_bit(path: Path) -> np.ndarray:
    # Verified first: each failure of this decoder loses a reference to None, and many failures crash the process.
    return imagecodecs.png_decode(_verified(path))


def _verified(path: Path) -> bytes:
    """The file's content, with verified checksums, which decoding ignores."""
    data = path.read_bytes()
    with PngImageFile(BytesIO(data)) as image:
        image.verify()
    return data


def _tags(image: Image) -> ImageTags:
    """Resolution from `dpi`, which Pillow converts to pixels per inch (x, y) for any unit in the file."""
    x, y = (float(dots) for dots in image.info.get("dpi", (0, 0)))
    return ImageTags(resolution=(x, y, 2) if x > 0 and y > 0 else None)
