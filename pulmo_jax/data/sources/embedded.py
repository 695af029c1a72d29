"""Embedded images: tiles of a TIFF file and frames of a DICOM file may be complete images with separate headers.

Decoders allocate memory according to the embedded header, not the enclosing file, so it is checked before decoding.
"""

import re
import struct

_JPEG_FRAME = {*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7}  # SOFn, JPEG-LS
_JPEG_STANDALONE = {0x01, 0xFF, *range(0xD0, 0xD9)}  # markers without a length, and fill bytes
_JPEG2000_SIZE = re.compile(rb"\xff\x4f\xff\x51(?=(.{38}))", re.DOTALL)
_MAX_SAMPLES = 4  # per pixel: decoders may add an alpha channel


def check_embedded_size(data: bytes, height: int, width: int, samples: int, container: str) -> None:
    """Check that an embedded image is not larger than its container.

    Args:
        data: The embedded image.
        height: Height of the container in px.
        width: Width of the container in px.
        samples: Samples per pixel of the container.
        container: Its name in the error message, such as "a strip or tile".

    Raises:
        ValueError: The image is larger than the container, or its header cannot be read.
    """
    size = embedded_size(data)
    if size is None:
        raise ValueError(f"{container} holds an image of unknown size")
    if size[0] > height or size[1] > width or size[2] > max(samples, _MAX_SAMPLES):
        raise ValueError(f"an image of (H, W, C) = {size} in {container} of {(height, width, samples)}")


def embedded_size(data: bytes) -> tuple[int, int, int] | None:
    """Read the size from the header of a JPEG, JPEG-LS, JPEG 2000, PNG, WebP or LERC image.

    Args:
        data: Encoded image.

    Returns:
        Height and width in px and number of channels; None if unknown.
    """
    readers = {b"\xff\xd8": _jpeg, b"\x89PNG": _png, b"RIFF": _webp, b"Lerc2 ": _lerc}
    reader = next((read for magic, read in readers.items() if data.startswith(magic)), _jpeg2000)
    try:
        return reader(data)
    except struct.error:
        return None


def _jpeg(data: bytes) -> tuple[int, int, int] | None:
    offset = 2
    while offset + 1 < len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker in _JPEG_FRAME:
            (length,) = struct.unpack_from(">H", data, offset + 2)
            whole = offset + 2 + length <= len(data)
            return struct.unpack_from(">HHB", data, offset + 5) if whole else None
        offset += 1 if marker == 0xFF else 2
        if marker not in _JPEG_STANDALONE:
            offset += struct.unpack_from(">H", data, offset)[0]
    return None


def _jpeg2000(data: bytes) -> tuple[int, int, int] | None:
    """The largest size, because other boxes may contain bytes that look like a size."""
    sizes = [struct.unpack_from(">4I", match[1], 4) for match in _JPEG2000_SIZE.finditer(data)]
    samples = [struct.unpack_from(">H", match[1], 36)[0] for match in _JPEG2000_SIZE.finditer(data)]
    if not sizes:
        return None
    return max(y - y0 for _, y, _, y0 in sizes), max(x - x0 for x, _, x0, _ in sizes), max(samples)


def _png(data: bytes) -> tuple[int, int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return height, width, _MAX_SAMPLES


def _webp(data: bytes) -> tuple[int, int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[offset : offset + 3], "little") for offset in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        return None
    return height, width, _MAX_SAMPLES


def _lerc(data: bytes) -> tuple[int, int, int]:
    """Version 3 added a checksum before the size, and version 4 a depth after it."""
    (version_number,) = struct.unpack_from("<i", data, 6)
    height, width, samples = struct.unpack_from("<III", data, 14 if version_number >= 3 else 10)
    return height, width, samples if version_number >= 4 else 1
