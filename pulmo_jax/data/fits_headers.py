"""Validation of FITS headers and checksums, before astropy reads a file.

astropy trusts the header. Billions of declared axes stall it, a missing END card makes it search the whole file, a
negative BYTEPIX or an oversized HCOMPRESS tile crashes the process, and a gzipped tile can expand without limit.

Reference:
    FITS standard 4.0 (2018), successor of Pence et al. 2010, A&A 524, A42. Section numbers below refer to it.
"""

import re
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from math import prod
from pathlib import Path

import numpy as np

from pulmo_jax.data.fits_tiles import check_tiles
from pulmo_jax.types import InputError

_BLOCK, _CARD = 2880, 80  # bytes
_MAX_HEADER = 4 * 2**20  # bytes; without a limit, a missing END card means searching the whole file
_MAX_UNITS, _MAX_ALL_HEADERS = 10_000, 64 * 2**20  # astropy takes 0.4 ms a unit, and 40 ms a MB of headers
_MAX_AXES = _MAX_FIELDS = 999  # sections 4.4.1 and 7.3.1
_MAX_TILE = 2**27  # pixels; decoders count the bytes, 8 per pixel, in a signed 32-bit integer
_CHECKSUM_CHUNK_BYTES = 1000 * _BLOCK
_COPY_BYTES, _MAX_PADDING = 2**20, 2**20
_INTEGER = re.compile(rb"(BITPIX|NAXIS\d*|PCOUNT|GCOUNT|TFIELDS|ZNAXIS\d*|ZTILE\d+|ZVAL\d+) *= *([^/]*)")
_TEXT = re.compile(rb"(CHECKSUM|DATASUM) *= *'([^']*)'")


def check_fits(path: Path, file: BufferedIOBase, size: int) -> None:
    """Validate all headers of a FITS file, and DATASUM and CHECKSUM where present.

    Args:
        path: Name of the file in error messages.
        file: The file, open for reading.
        size: Its length in bytes.

    Raises:
        InputError: A header has no END card or an impossible value, or a checksum does not match; the message names
            the header-data unit (HDU).
    """
    offset, unit, headers = 0, 0, 0
    while offset < size:
        file.seek(offset)
        block = file.read(_BLOCK)
        if unit and not block.startswith(b"XTENSION"):
            if block.strip(b"\0 "):
                raise InputError(f"{path}: damaged: HDU {unit - 1} is followed by data that are not an HDU")
            return
        header = _header(path, file, block, unit)
        headers += len(header)
        _check_count(path, unit, headers)
        numbers = _numbers(path, header, unit)
        _check_compression(path, header, numbers, unit)
        start = offset + len(header)
        stop = start + _padded(_data_bytes(numbers))
        if b"ZIMAGE" in header:
            check_tiles(path, file, header, numbers, (start, min(stop, size)), unit)
        matches = (_TEXT.match(card) for card in _cards(header))
        sums = {match[1]: match[2].strip() for match in matches if match}
        _check_sums(path, file, (offset, start, min(stop, size)), sums, unit)
        offset, unit = stop, unit + 1


def copy_declared(path: Path, source: BufferedIOBase, target: BufferedIOBase, limit: int) -> Iterator[int]:
    """Copy the HDUs of a FITS stream, each as far as its header declares.

    Args:
        path: Name of the file in error messages.
        source: The stream, at its start; it is not sought.
        target: Where to copy.
        limit: Largest length in bytes. Of an HDU beyond it, only the header is copied, and nothing after it.

    Yields:
        The length so far including that of the next HDU, in bytes, before its data are copied.

    Raises:
        InputError: A header is invalid, or more data follow the last HDU than the padding of a tape.
    """
    unit = headers = 0
    while (block := source.read(_BLOCK)) and (unit == 0 or block.startswith(b"XTENSION")):
        header = _header(path, source, block, unit)
        headers += len(header)
        _check_count(path, unit, headers)
        length = _padded(_data_bytes(_numbers(path, header, unit)))
        target.write(header)
        if target.tell() + length > limit:
            return
        yield target.tell() + length
        while length and (chunk := source.read(min(length, _COPY_BYTES))):
            target.write(chunk)
            length -= len(chunk)
        unit += 1
    target.write(block)
    if len(source.read(_MAX_PADDING + 1)) > _MAX_PADDING:
        raise InputError(f"{path}: damaged: unzips to far more than its headers declare; export it again")


def _header(path: Path, file: BufferedIOBase, block: bytes, unit: int) -> bytes:
    """The header in whole blocks, up to and including the one with the END card, after its first block was read."""
    header = b""
    while block and len(header) < _MAX_HEADER:
        header += block
        if any(card[:8] == b"END     " for card in _cards(block)):
            return header
        block = file.read(_BLOCK)
    raise InputError(f"{path}: damaged or cut off: the header of HDU {unit} has no END within {len(header)} bytes")


def _check_count(path: Path, unit: int, headers: int) -> None:
    if unit >= _MAX_UNITS or headers > _MAX_ALL_HEADERS:
        raise InputError(
            f"{path}: has more than {_MAX_UNITS} HDUs or {_MAX_ALL_HEADERS / 2**20:.0f} MB of headers; save a part"
        )


def _cards(header: bytes) -> list[bytes]:
    return [header[k : k + _CARD] for k in range(0, len(header), _CARD)]


def _numbers(path: Path, header: bytes, unit: int) -> dict[str, int]:
    """Values of the keywords that define the layout of the data."""
    numbers = {}
    for card in _cards(header):
        if match := _INTEGER.match(card):
            keyword, value = match[1].decode(), match[2].strip().decode("ascii", "backslashreplace")
            try:
                numbers[keyword] = int(value)
            except ValueError:
                if keyword.startswith("ZVAL"):  # compression parameters, some of which are not integers
                    continue
                raise InputError(f"{path}: damaged: {keyword} of HDU {unit} is {value!r}, not an integer") from None
    for keyword, limit in (("NAXIS", _MAX_AXES), ("TFIELDS", _MAX_FIELDS)):
        if not 0 <= numbers.get(keyword, 0) <= limit:
            raise InputError(f"{path}: damaged: {keyword} of HDU {unit} is {numbers[keyword]}, allowed: 0 to {limit}")
    negative = [keyword for keyword, number in numbers.items() if number < 0 and keyword != "BITPIX"]
    if negative:
        raise InputError(
            f"{path}: damaged: {negative[0]} of HDU {unit} is {numbers[negative[0]]}, but cannot be negative"
        )
    return numbers


def _check_compression(path: Path, header: bytes, numbers: Mapping[str, int], unit: int) -> None:
    """Refuse compressed tiles (section 10.4) that would crash the decoders."""
    if b"'HCOMPRESS" in header:  # its decoder writes out of bounds on a damaged tile
        raise InputError(f"{path}: HDU {unit} is compressed with HCOMPRESS; save it with RICE or GZIP")
    for number in re.findall(rb"ZNAME(\d+) *= *'BYTEPIX *'", header):
        size = numbers.get(f"ZVAL{number.decode()}")
        if size not in (1, 2, 4, 8):
            raise InputError(f"{path}: damaged: BYTEPIX of HDU {unit} is {size}, allowed: 1, 2, 4 or 8")
    tile = prod(number for keyword, number in numbers.items() if keyword.startswith("ZTILE"))
    if tile > _MAX_TILE:
        raise InputError(f"{path}: damaged: a tile of HDU {unit} has {tile} pixels, allowed: at most {_MAX_TILE}")


def _data_bytes(numbers: Mapping[str, int]) -> int:
    """Section 4.4.1.2, equation 2. Random groups (section 6) have NAXIS1 = 0, which is not a length."""
    lengths = [numbers.get(f"NAXIS{k}", 0) for k in range(1, numbers.get("NAXIS", 0) + 1)]
    if len(lengths) > 1 and lengths[0] == 0 and "GCOUNT" in numbers:
        lengths = lengths[1:]
    elements = prod(lengths) if lengths else 0
    groups, parameters = numbers.get("GCOUNT", 1), numbers.get("PCOUNT", 0)
    return abs(numbers.get("BITPIX", 8)) // 8 * groups * (parameters + elements)


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _check_sums(
    path: Path, file: BufferedIOBase, offsets: tuple[int, int, int], sums: Mapping[bytes, bytes], unit: int
) -> None:
    """Section 4.4.2.7 and appendix J: DATASUM is the sum of the data; CHECKSUM makes the HDU sum to -0."""
    header_start, data_start, data_stop = offsets
    declared, summed = sums.get(b"DATASUM", b""), sums.get(b"CHECKSUM", b"").strip(b"0") != b""
    if not declared and not summed:
        return
    data = _sum(file, data_start, data_stop)
    wrong = declared and declared != str(data).encode()
    if wrong or (summed and _folded(_sum(file, header_start, data_start) + data) != 2**32 - 1):
        raise InputError(
            f"{path}: damaged: the checksum of HDU {unit} does not match its content.\n"
            "If you trust the file and a program edited it without updating the checksum, run: "
            "fitscheck --write --force FILE"
        )


def _sum(file: BufferedIOBase, start: int, stop: int) -> int:
    """Ones' complement sum of the 32-bit words, with end-around carry."""
    total, offset = 0, start
    file.seek(start)
    while offset < stop and (chunk := file.read(min(_CHECKSUM_CHUNK_BYTES, stop - offset))):
        offset += len(chunk)
        words = np.frombuffer(chunk + bytes(-len(chunk) % 4), ">u4")
        total = _folded(total + int(words.sum(dtype=np.uint64)))
    return total


def _folded(total: int) -> int:
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total
