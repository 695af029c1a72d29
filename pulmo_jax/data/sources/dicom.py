"""DICOM files, read with pydicom: single-frame and multi-frame, greyscale and RGB.

Pages are frames. Rescale slope and intercept are applied. If the slope is 1 and the intercept is an integer, pixels
stay integers; otherwise they become float32, or float64 above 24 bits. MONOCHROME1, in which larger values are darker,
is inverted within the stored range. Pixels with a declared padding value become NaN (see `missing`). Files with a
lookup table (palette or modality) are refused.
"""

import os
import struct
from contextlib import ExitStack
from io import BufferedReader
from itertools import count, pairwise
from math import prod
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_file_meta_info, read_partial
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.tag import BaseTag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, RLELossless

from pulmo_jax.data.sources.embedded import check_embedded_size
from pulmo_jax.data.sources.missing import float_dtype, with_nan
from pulmo_jax.data.sources.source import ImageSource, NoImageError, check_page_size, decoding, whole_pages
from pulmo_jax.host.extras import install_command
from pulmo_jax.types import ImageTags, InputError

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom converts all of them to RGB
_PIXEL_DATA_HEAD = 12  # bytes of tag, value representation and length, which are explicit in compressed syntaxes
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
# Type of the samples, by the bytes of the tag that precedes them in either byte order.
_KINDS = ((0x08, "f4"), (0x09, "f8"), (0x10, "integers"))
_SAMPLES_OF = {struct.pack(f"{order}HH", 0x7FE0, element): kind for order in "<>" for element, kind in _KINDS}
_MAX_ELEMENTS = 2**16  # pydicom takes 3 us and 0.3 kB each
_RLE_PADDING = 128  # some encoders end a plane with a longer run
_MAX_FLOAT32_BITS = 24  # float32 represents integers of up to 24 bits exactly


def open_dicom(path: Path, max_bytes: int) -> ImageSource:
    """Open a DICOM file.

    Args:
        path: The file.
        max_bytes: Limit on the decoded size of a frame in bytes.

    Raises:
        InputError: The file cannot be read, is not supported or exceeds the limit.
    """
    with decoding(path):
        syntax = _transfer_syntax(path)
        with path.open("rb") as file:
            header = read_header(file)
            samples = _SAMPLES_OF.get(file.read(4))
        if samples is None or "SamplesPerPixel" not in header:
            raise NoImageError(path, _kind_of(header))
        _check_decoder(path, syntax)
        _check_colours(path, header)
        frames = int(header.get("NumberOfFrames") or 1)
        shape = (frames, int(header.Rows), int(header.Columns), int(header.SamplesPerPixel))
        stored = _stored_type(header) if samples == "integers" else np.dtype(samples)
        bits, rescales = int(header.get("BitsStored") or 8 * stored.itemsize), _rescales(header, frames)
        unpadded = _rescaled_type(stored, bits, rescales)
        padding = _padding(header, stored)
        dtype = unpadded if padding is None else float_dtype(unpadded)
        check_page_size(path, shape, dtype, max_bytes)
        _check_length(path, header, prod(shape) * header.BitsAllocated // 8)
        shift = _unused_bits(path, header, stored) if samples == "integers" and _is_native(syntax) else None

        def decode(page: int) -> np.ndarray:
            if syntax == RLELossless:
                _check_run_lengths(_encoded(path, page, frames), shape[1] * shape[2])
            elif syntax.is_compressed:
                check_embedded_size(_encoded(path, page, frames), *shape[1:], "a frame")
            options: dict[str, Any] = {} if shift is None else {"correct_unused_bits": False}
            values = pixel_array(path, index=page, **options).reshape(shape[1:])
            values = values.astype(stored, casting="equiv", copy=False)
            if shift is not None:
                values = _shifted(path, values, *shift)
            pixels = _inverted(values, bits) if header.PhotometricInterpretation == "MONOCHROME1" else values
            pixels = _rescaled(pixels, *_rescale(header, page), unpadded)
            if padding is None:
                return pixels
            missing = (values >= padding[0]) & (values <= padding[1])
            return with_nan(pixels, np.asarray(missing.any(axis=-1)), dtype)

        resources = ExitStack()
        reader = whole_pages(path, decode, shape, dtype, resources)
        declared = None if padding is None else unpadded
        return ImageSource(path, shape, dtype, _tags(header), reader, resources, declared)


def _transfer_syntax(path: Path) -> UID:
    meta = read_file_meta_info(path)
    if "TransferSyntaxUID" not in meta:
        raise InputError(
            f"{path}: its meta header names no transfer syntax (0002,0010), so its pixels cannot be decoded; write it, "
            "for example with dcmconv"
        )
    if (
        meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    ):  # the header is in the deflated stream, of unknown size
        raise InputError(f"{path}: is a deflated DICOM file; save it uncompressed, for example with dcmconv +te")
    return meta.TransferSyntaxUID


def _kind_of(header: Dataset) -> str:
    """Name of the kind of object, such as "RT Structure Set"."""
    name = UID(str(header.get("SOPClassUID") or "")).name.removesuffix(" Storage")
    return f"DICOM object: {name}" if name else "DICOM object of unknown kind"


def _is_native(syntax: UID) -> bool:
    """Whether pixels are stored in words of BitsAllocated bits; the other codecs have a bit depth of their own."""
    return not syntax.is_compressed or syntax == RLELossless


def _unused_bits(path: Path, header: Dataset, stored: np.dtype) -> tuple[int, int] | None:
    """Numbers of bits above and below the stored ones in a word, if they are not the lowest ones (before 2014)."""
    bits, allocated = int(header.BitsStored), 8 * stored.itemsize
    high = int(header.get("HighBit", bits - 1))
    if high == bits - 1 or header.BitsAllocated == 1:
        return None
    if not bits - 1 <= high < allocated:
        raise InputError(
            f"{path}: its high bit is {high}, with {bits} bits stored of {allocated}; allowed: {bits - 1} to "
            f"{allocated - 1}. Correct HighBit (0028,0102)"
        )
    return allocated - 1 - high, high + 1 - bits


def _shifted(path: Path, values: np.ndarray, above: int, below: int) -> np.ndarray:
    """Move the stored bits to the lowest ones."""
    words = values.view(f"u{values.dtype.itemsize}")
    bits = 8 * values.dtype.itemsize - above - below
    if (words & ((1 << below) - 1)).any() and not (words >> bits).any():
        raise InputError(
            f"{path}: its high bit (0028,0102) says that the lowest {below} bits are unused, but the pixels are in the "
            f"lowest {bits} bits; correct the element"
        )
    return np.right_shift(np.left_shift(values, above), above + below)


def _padding(header: Dataset, stored: np.dtype) -> tuple[float, float] | None:
    """Lowest and highest stored value of pixels that are padding; None if none are declared."""
    if header.SamplesPerPixel > 1:
        return None
    if stored.kind == "f":
        keywords = [f"{'Double' * (stored.itemsize == 8)}FloatPixelPadding{end}" for end in ("Value", "RangeLimit")]
        limits = [header.get(keyword) for keyword in keywords]
    else:
        elements = [header.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
        limits = [_in_type(value, stored) for value in elements]
    value, limit = limits
    if value is None or isinstance(value, MultiValue):
        return None
    limit = value if limit is None else limit
    return min(value, limit), max(value, limit)


def _in_type(value: Any, stored: np.dtype) -> int | None:
    """A padding value as a stored one. Its sign is often wrong; in implicit syntaxes its type is not declared."""
    if value is None or isinstance(value, MultiValue):
        return None
    if isinstance(value, bytes):
        value = int.from_bytes(value, "little")
    bits = 8 * stored.itemsize
    wrapped = int(value) % 2**bits
    return wrapped - 2**bits if stored.kind == "i" and wrapped >= 2 ** (bits - 1) else wrapped


def read_header(file: BufferedReader) -> Dataset:
    """The elements before the pixels; the file is left at the pixels."""
    elements = count()

    def at_pixels(tag: BaseTag, *_: object) -> bool:
        if next(elements) > _MAX_ELEMENTS:
            raise ValueError(f"more than {_MAX_ELEMENTS} data elements")
        return tag in _PIXEL_TAGS

    return read_partial(file, at_pixels)


def _check_run_lengths(data: bytes, size: int) -> None:
    """Check that no segment of an RLE frame expands beyond its plane, which pydicom checks only afterwards.

    Args:
        data: The encoded frame (PS3.5, annex G): number of segments, offsets of 15 segments, segments.
        size: Pixels of a plane.

    Raises:
        ValueError: A segment is larger.
        ImcdError: A segment is larger.
    """
    segments, *offsets = struct.unpack_from("<16I", data)
    limits = [*offsets[: min(segments, 15)], len(data)]
    for start, stop in pairwise(limits):
        planes: Any = imagecodecs.packbits_decode(data[start:stop], out=size + _RLE_PADDING)
        if len(planes) > size + 1:
            raise ValueError(f"a segment of {len(planes)} pixels in a plane of {size}")


def _check_decoder(path: Path, syntax: UID) -> None:
    if not get_decoder(syntax).is_available:
        raise InputError(
            f"{path}: is compressed with {syntax.name}, for which no decoder is installed.\n"
            f"Install one: {install_command('dicom')}"
        )


def _check_colours(path: Path, header: Dataset) -> None:
    samples, colours = header.SamplesPerPixel, str(header.PhotometricInterpretation)
    if (samples, colours) not in [(1, grey) for grey in _GREY] + [(3, colour) for colour in _COLOUR]:
        allowed = ", ".join(_GREY + _COLOUR)
        raise InputError(f"{path}: has colour space {colours:.40} with {samples} samples per pixel; allowed: {allowed}")
    if colours == "MONOCHROME1" and "BitsStored" not in header:
        raise InputError(
            f"{path}: has float pixels of colour space MONOCHROME1, whose range is unknown; save MONOCHROME2"
        )
    if "ModalityLUTSequence" in header:
        raise InputError(f"{path}: has a modality lookup table; save it with rescale slope and intercept instead")


def _encoded(path: Path, frame: int, frames: int) -> bytes:
    """The encoded bytes of a frame."""
    with path.open("rb") as file:
        header = read_header(file)
        file.seek(_PIXEL_DATA_HEAD, os.SEEK_CUR)
        offsets = [header.get(keyword) for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
        extended = (offsets[0], offsets[1]) if offsets[0] and offsets[1] else None
        return get_frame(file, frame, extended_offsets=extended, number_of_frames=frames)


def _check_length(path: Path, header: Dataset, pixel_bytes: int) -> None:
    """Detect a truncated uncompressed file before reading any pixels."""
    size = path.stat().st_size
    native = not header.file_meta.TransferSyntaxUID.is_compressed
    if native and header.PhotometricInterpretation != "YBR_FULL_422" and size < pixel_bytes:
        raise InputError(
            f"{path}: cut off: has {size} bytes, but its header declares {pixel_bytes} bytes of pixels; copy it again"
        )


def _stored_type(header: Dataset) -> np.dtype:
    if "PixelRepresentation" not in header or header.BitsAllocated not in (1, 8, 16, 32):
        raise ValueError(f"{header.BitsAllocated} bits per sample; allowed: integers of 1 to 32 bits")
    if not 1 <= header.BitsStored <= header.BitsAllocated:
        raise ValueError(f"{header.BitsStored} bits stored of {header.BitsAllocated} bits allocated")
    return np.dtype(f"{'i' if header.PixelRepresentation else 'u'}{max(1, header.BitsAllocated // 8)}")


def frame_value(header: Dataset, frame: int, group: str, keyword: str) -> Any:
    """An attribute of a frame; enhanced objects keep it in per-frame or shared functional groups."""
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for groups in (*own[frame : frame + 1], *shared):
        for item in groups.get(group) or []:
            if item.get(keyword) is not None:
                return item.get(keyword)
    return header.get(keyword)


def _rescales(header: Dataset, frames: int) -> set[tuple[float, float]]:
    """All rescale slopes and intercepts, common to all frames or one per frame."""
    groups = len(header.get("PerFrameFunctionalGroupsSequence") or [])
    if groups not in (0, frames):
        raise ValueError(f"{groups} functional groups for {frames} frames")
    return {_rescale(header, frame) for frame in range(groups or 1)}


def _rescale(header: Dataset, frame: int) -> tuple[float, float]:
    """Rescale slope and intercept of a frame."""
    if header.SamplesPerPixel > 1:
        return 1.0, 0.0
    keywords = ("RescaleSlope", "RescaleIntercept")
    slope, intercept = (frame_value(header, frame, "PixelValueTransformationSequence", k) for k in keywords)
    slope, intercept = float(1 if slope is None else slope), float(intercept or 0)
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise ValueError(f"rescale slope {slope} and intercept {intercept}")
    return slope, intercept


def _rescaled_type(stored: np.dtype, bits: int, rescales: set[tuple[float, float]]) -> np.dtype:
    if rescales == {(1.0, 0.0)} or stored.kind == "f":
        return stored
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if stored.kind == "i" else (0, 2**bits - 1)
    if all(slope == 1 and intercept.is_integer() for slope, intercept in rescales):
        intercepts = [int(intercept) for _, intercept in rescales]
        for dtype in (np.int16, np.int32):
            limits = np.iinfo(dtype)
            if limits.min <= low + min(intercepts) and high + max(intercepts) <= limits.max:
                return np.dtype(dtype)
    return np.dtype(np.float32 if bits <= _MAX_FLOAT32_BITS else np.float64)


def _rescaled(pixels: np.ndarray, slope: float, intercept: float, dtype: np.dtype) -> np.ndarray:
    if pixels.dtype == dtype and (slope, intercept) == (1.0, 0.0):
        return pixels
    if dtype.kind == "f":
        return (pixels * slope + intercept).astype(dtype)
    # `dtype` can represent the sum, so a wrap-around of unsigned 32-bit values cancels.
    return np.add(pixels, np.int32(intercept), dtype=np.int32, casting="unsafe").astype(dtype)


def _inverted(pixels: np.ndarray, bits: int) -> np.ndarray:
    """max + min - x over the stored range."""
    return ~pixels if pixels.dtype.kind == "i" else pixels.dtype.type(2**bits - 1) - pixels


def _tags(header: Dataset) -> ImageTags:
    """Resolution from PixelSpacing, which is in mm, rows (y) first, and unit of the rescaled intensities."""
    spacing, unit = frame_value(header, 0, "PixelMeasuresSequence", "PixelSpacing"), _unit(header)
    if not isinstance(spacing, MultiValue) or len(spacing) != 2:
        return ImageTags(unit=unit)
    y, x = (float(mm) for mm in spacing)
    return ImageTags(resolution=(10 / x, 10 / y, 3) if x > 0 and y > 0 else None, unit=unit)


def _unit(header: Dataset) -> str:
    """HU for computed tomography, unless RescaleType states another unit; "US" means that it is unspecified."""
    keywords = ("RescaleIntercept", "RescaleType")
    intercept, stated = (frame_value(header, 0, "PixelValueTransformationSequence", k) for k in keywords)
    if stated:
        return "" if str(stated) == "US" else f"{stated!s:.16}"
    return "HU" if intercept is not None and header.get("Modality") == "CT" else ""
