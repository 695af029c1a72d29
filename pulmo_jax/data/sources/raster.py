"""PNG and JPEG, through Pillow; 16-bit PNG through libpng, because Pillow squeezes 16-bit colour to 8 bits, and whole
JPEGs through libjpeg, which takes half the time without Pillow around it.

Pixels are as stored: an EXIF orientation is not applied. Palette and CMYK images become RGB, an alpha channel
is dropped, 1-bit images become 0 and 1, and grey values of 2 or 4 bits are spread over 0 to 255. Of a JPEG
with several pictures (previews, stereo) the first is read; a PNG with several frames is refused.

The plugins are called by themselves, not through Image.open: the limit on the size is ours, not Pillow's.
"""

from collections.abc import Callable
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import imagecodecs
import numpy as np
from PIL.Image import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from pulmo_jax.data.sources.source import ImageSource, check_page_size, decoding, whole_pages
from pulmo_jax.types import ImageTags, InputError

# Channels that are kept, by Pillow's mode and by the colour type in the header of a 16-bit PNG.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3, "CMYK": 3}
_CHANNELS_16_BIT = {0: 1, 2: 3, 4: 1, 6: 3}
_END_OF_JPEG = b"\xff\xd9"


def open_png(path: Path, max_bytes: int) -> ImageSource:
    with decoding(path):
        with path.open("rb") as file, PngImageFile(file) as image:
            file.seek(24)
            bits, colour_type = file.read(2)
            if image.n_frames > 1:
                raise InputError(f"{path}: an animation of {image.n_frames} frames; save one frame as PNG")
            if image.mode == "P" and image.palette is None:
                raise InputError(f"{path}: its palette is missing, the file is damaged; save it anew")
            if bits == 16:
                channels = _CHANNELS_16_BIT[colour_type]
                return _source(path, image, channels, np.dtype(np.uint16), _decode_png_16_bit, max_bytes)
            return _source(path, image, _CHANNELS[image.mode], np.dtype(np.uint8), _decode_png, max_bytes)


def open_jpeg(path: Path, max_bytes: int) -> ImageSource:
    with decoding(path), JpegImageFile(path) as image:
        decode = _decode_jpeg_by_pillow if image.mode == "CMYK" else _decode_jpeg
        return _source(path, image, _CHANNELS[image.mode], np.dtype(np.uint8), decode, max_bytes)


def _source(
    path: Path,
    image: Image,
    channels: int,
    dtype: np.dtype,
    decode: Callable[[Path], np.ndarray],
    max_bytes: int,
) -> ImageSource:
    width, height = image.size
    shape = (1, height, width, channels)
    check_page_size(path, shape, dtype, max_bytes)

    def kept_channels(page: int) -> np.ndarray:
        return decode(path).reshape(height, width, -1)[..., :channels]

    resources = ExitStack()
    reader = whole_pages(kept_channels, shape, dtype, resources)
    return ImageSource(path, shape, dtype, _tags(image), reader, resources)


def _decode_jpeg(path: Path) -> np.ndarray:
    data = path.read_bytes()
    if data.endswith(_END_OF_JPEG):
        return imagecodecs.jpeg8_decode(data)
    return _decode_jpeg_by_pillow(path)  # which says of a file that it is cut off


def _decode_jpeg_by_pillow(path: Path) -> np.ndarray:
    with JpegImageFile(path) as image:
        return np.asarray(image.convert("RGB") if image.mode == "CMYK" else image)


def _decode_png(path: Path) -> np.ndarray:
    with PngImageFile(BytesIO(_verified(path))) as image:
        # Not RGB, of which Pillow warns where the palette has transparency.
        return np.asarray(image.convert("RGBA") if image.mode == "P" else image).astype(np.uint8, copy=False)


def _decode_png_16_bit(path: Path) -> np.ndarray:
    # Damaged files must not come so far: each failure of this decoder costs a reference to None, many end the process.
    return imagecodecs.png_decode(_verified(path))


def _verified(path: Path) -> bytes:
    """The file's content, its checksums compared, which decoding leaves out."""
    data = path.read_bytes()
    with PngImageFile(BytesIO(data)) as image:
        image.verify()
    return data


def _tags(image: Image) -> ImageTags:
    """`dpi` is pixels per inch (x, y), whatever unit the file has it in."""
    x, y = (float(dots) for dots in image.info.get("dpi", (0, 0)))
    return ImageTags(resolution=(x, y, 2) if x > 0 and y > 0 else None)
