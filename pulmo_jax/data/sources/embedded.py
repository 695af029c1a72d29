"""Images inside of images: the tiles of a TIFF and the frames of a DICOM file may be files of their own.

Their decoders allocate what the embedded header says, whatever the file around it says; so that header is read first.
"""

import re
import struct

_JPEG_FRAME = {*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7}  # SOFn, JPEG-LS
_JPEG_ALONE = {0x01, 0xFF, *range(0xD0, 0xD9)}  # markers without a length, and fill bytes
_JPEG2000_SIZE = re.compile(rb"\xff\x4f\xff\x51(?=(.{38}))", re.DOTALL)
_ALPHA_OR_FOUR = 4  # samples that a decoder may add to those of the page


def check_embedded_size(data: bytes, height: int, width: int, samples: int, where: str) -> None:
    """Raises ValueError if an embedded image is larger than the `where`, such as a tile, that it should fill."""
    found = embedded_size(data)
    if found is None:
        raise ValueError(f"{where} holds no image of which the size is known")
    if found[0] > height or found[1] > width or found[2] > max(samples, _ALPHA_OR_FOUR):
        raise ValueError(f"an image of (H, W, C) = {found} in {where} of {(height, width, samples)}")


def embedded_size(data: bytes) -> tuple[int, int, int] | None:
    """(H, W, C) that a JPEG, JPEG-LS, JPEG 2000, PNG, WebP or LERC says of itself; None if it says none."""
    readers = {b"\xff\xd8": _jpeg, b"\x89PNG": _png, b"RIFF": _webp, b"Lerc2 ": _lerc}
    reader = next((read for magic, read in readers.items() if data.startswith(magic)), _jpeg2000)
    try:
        return reader(data)
    except struct.error:
        return None


def _jpeg(data: bytes) -> tuple[int, int, int] | None:
    at = 2
    while at + 1 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAME:
            return struct.unpack_from(">HHB", data, at + 5)
        at += 1 if marker == 0xFF else 2
        if marker not in _JPEG_ALONE:
            at += struct.unpack_from(">H", data, at)[0]
    return None


def _jpeg2000(data: bytes) -> tuple[int, int, int] | None:
    """The largest, should other boxes of the file hold something that looks like a size."""
    sizes = [struct.unpack_from(">4I", match[1], 4) for match in _JPEG2000_SIZE.finditer(data)]
    samples = [struct.unpack_from(">H", match[1], 36)[0] for match in _JPEG2000_SIZE.finditer(data)]
    if not sizes:
        return None
    return max(y - y0 for _, y, _, y0 in sizes), max(x - x0 for x, _, x0, _ in sizes), max(samples)


def _png(data: bytes) -> tuple[int, int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return height, width, _ALPHA_OR_FOUR


def _webp(data: bytes) -> tuple[int, int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        return None
    return height, width, _ALPHA_OR_FOUR


def _lerc(data: bytes) -> tuple[int, int, int]:
    """Version 3 added a checksum before the size, version 4 a depth behind it."""
    (version_number,) = struct.unpack_from("<i", data, 6)
    height, width, samples = struct.unpack_from("<III", data, 14 if version_number >= 3 else 10)
    return height, width, samples if version_number >= 4 else 1
