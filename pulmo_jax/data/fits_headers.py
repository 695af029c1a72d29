"""What astropy takes a FITS file at its word for, checked beforehand: the headers' own numbers and the checksums.

Billions of axes keep it busy, to find a lost END it searches the whole file, and a negative number of bytes in a pixel,
or tiles of HCOMPRESS that are larger than they should be, end the process.

Section numbers are those of the FITS standard 4.0 (Pence et al. 2010, A&A 524, A42, and its successor of 2018).
"""

import re
from collections.abc import Mapping
from io import BufferedIOBase
from math import prod
from pathlib import Path

import numpy as np

from pulmo_jax.types import InputError

_BLOCK, _CARD = 2880, 80  # bytes
_MAX_HEADER = 4 * 2**20  # bytes in which a header must end; without a limit a lost END means to search the whole file
_MAX_AXES = _MAX_FIELDS = 999  # sections 4.4.1 and 7.3.1
_MAX_TILE = 2**27  # pixels: of 8 bytes each, they are counted in a signed integer of 32 bits
_SUMMED_AT_ONCE = 1000 * _BLOCK
_INTEGER = re.compile(rb"(BITPIX|NAXIS\d*|PCOUNT|GCOUNT|TFIELDS|ZNAXIS\d*|ZTILE\d+|ZVAL\d+) *= *([^/]*)")
_TEXT = re.compile(rb"(CHECKSUM|DATASUM) *= *'([^']*)'")


def check_fits(path: Path, file: BufferedIOBase, size: int) -> None:
    """Walks the headers of an open file of `size` bytes and verifies DATASUM and CHECKSUM where they are given.

    Raises InputError naming the header-data unit (HDU) for a header without end, numbers that cannot be, and sums that
    do not fit.
    """
    at, unit = 0, 0
    while at < size:
        file.seek(at)
        if unit and not (block := file.read(_BLOCK)).startswith(b"XTENSION"):
            if block.strip(b"\0 "):
                raise InputError(f"{path}: damaged: what follows HDU {unit - 1} is no further HDU")
            return
        header = _header(path, file, at, unit)
        numbers = _numbers(path, header, unit)
        _check_compression(path, header, numbers, unit)
        start = at + len(header)
        stop = start + _padded(_data_bytes(numbers))
        texts = (_TEXT.match(card) for card in _cards(header))
        sums = {found[1]: found[2].strip() for found in texts if found}
        _check_sums(path, file, (at, start, min(stop, size)), sums, unit)
        at, unit = stop, unit + 1


def _header(path: Path, file: BufferedIOBase, at: int, unit: int) -> bytes:
    """Whole blocks, up to the one with the END card."""
    file.seek(at)
    header = b""
    while len(header) < _MAX_HEADER and (block := file.read(_BLOCK)):
        header += block
        if any(card[:8] == b"END     " for card in _cards(block)):
            return header
    raise InputError(f"{path}: damaged or cut off: the header of HDU {unit} has no END within {len(header)} bytes")


def _cards(header: bytes) -> list[bytes]:
    return [header[k : k + _CARD] for k in range(0, len(header), _CARD)]


def _numbers(path: Path, header: bytes, unit: int) -> dict[str, int]:
    """Those that tell how the data are laid out."""
    numbers = {}
    for card in _cards(header):
        if found := _INTEGER.match(card):
            keyword, value = found[1].decode(), found[2].strip().decode("ascii", "backslashreplace")
            try:
                numbers[keyword] = int(value)
            except ValueError:
                if keyword.startswith("ZVAL"):  # parameters of the compression, of which some are no integers
                    continue
                raise InputError(f"{path}: damaged: {keyword} of HDU {unit} is {value!r}, no whole number") from None
    for keyword, limit in (("NAXIS", _MAX_AXES), ("TFIELDS", _MAX_FIELDS)):
        if not 0 <= numbers.get(keyword, 0) <= limit:
            raise InputError(f"{path}: damaged: {keyword} of HDU {unit} is {numbers[keyword]}, allowed is 0 to {limit}")
    negative = [keyword for keyword, number in numbers.items() if number < 0 and keyword != "BITPIX"]
    if negative:
        raise InputError(f"{path}: damaged: {negative[0]} of HDU {unit} is {numbers[negative[0]]}")
    return numbers


def _check_compression(path: Path, header: bytes, numbers: Mapping[str, int], unit: int) -> None:
    """Refuses what the decoders of tiles (section 10.4) take for granted: they end the process when it is not so."""
    if b"'HCOMPRESS" in header:  # a damaged tile makes it write beyond its memory
        raise InputError(f"{path}: HDU {unit} is compressed as HCOMPRESS; save it with RICE or GZIP")
    for number in re.findall(rb"ZNAME(\d+) *= *'BYTEPIX *'", header):
        size = numbers.get(f"ZVAL{number.decode()}")
        if size not in (1, 2, 4, 8):
            raise InputError(f"{path}: damaged: BYTEPIX of HDU {unit} is {size}, allowed is 1, 2, 4 or 8")
    tile = prod(number for keyword, number in numbers.items() if keyword.startswith("ZTILE"))
    if tile > _MAX_TILE:
        raise InputError(f"{path}: damaged: a tile of HDU {unit} has {tile} pixels, allowed is {_MAX_TILE}")


def _data_bytes(numbers: Mapping[str, int]) -> int:
    """Section 4.4.1.2, equation 2; random groups (section 6) begin with NAXIS1 = 0, which is no length."""
    lengths = [numbers.get(f"NAXIS{k}", 0) for k in range(1, numbers.get("NAXIS", 0) + 1)]
    if len(lengths) > 1 and lengths[0] == 0 and "GCOUNT" in numbers:
        lengths = lengths[1:]
    elements = prod(lengths) if lengths else 0
    groups, parameters = numbers.get("GCOUNT", 1), numbers.get("PCOUNT", 0)
    return abs(numbers.get("BITPIX", 8)) // 8 * groups * (parameters + elements)


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def _check_sums(
    path: Path, file: BufferedIOBase, places: tuple[int, int, int], sums: Mapping[bytes, bytes], unit: int
) -> None:
    """Section 4.4.2.7 and appendix J: DATASUM is the sum of the data; with CHECKSUM in it, the unit sums to -0."""
    at, start, stop = places
    declared, summed = sums.get(b"DATASUM", b""), sums.get(b"CHECKSUM", b"").strip(b"0") != b""
    if not declared and not summed:
        return
    data = _sum(file, start, stop)
    wrong = declared and declared != str(data).encode()
    if wrong or (summed and _folded(_sum(file, at, start) + data) != 2**32 - 1):
        raise InputError(
            f"{path}: damaged: the checksum of HDU {unit} does not fit its content.\n"
            "If a program changed it without renewing the checksum and you trust it: fitscheck --write --force FILE"
        )


def _sum(file: BufferedIOBase, start: int, stop: int) -> int:
    """Sum of the 32-bit words in ones' complement, where a carry is added at the other end."""
    total, at = 0, start
    file.seek(start)
    while at < stop and (chunk := file.read(min(_SUMMED_AT_ONCE, stop - at))):
        at += len(chunk)
        words = np.frombuffer(chunk + bytes(-len(chunk) % 4), ">u4")
        total = _folded(total + int(words.sum(dtype=np.uint64)))
    return total


def _folded(total: int) -> int:
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total
