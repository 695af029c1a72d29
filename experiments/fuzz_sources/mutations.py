"""Mutations of files: random, in headers, and format-specific."""

import gzip
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from seeds import Seed, join_png, png_chunks

INTERESTING = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**64 - 1,
)
NUMBERS = (
    "0",
    "-1",
    "1",
    "2",
    "255",
    "65535",
    "65536",
    "2147483647",
    "4294967295",
    "99999999999",
    "1e400",
    "nan",
    "T",
    "'x'",
)


@dataclass(frozen=True)
class Mutant:
    """A damaged file. checked: a checksum inside of it shows the damage, so it must not be read as other pixels."""

    seed: Seed
    kind: str
    content: bytes
    checked: bool


Mutation = Callable[[np.random.Generator, bytearray, Seed, list[Seed]], bytes]


def mutate(rng: np.random.Generator, format_name: str, seeds: list[Seed]) -> Mutant:
    """One to three mutations of a random seed; zipped ones are sometimes mutated inside and zipped again."""
    seed = seeds[rng.integers(len(seeds))]
    own = OF_FORMAT.get(format_name, [])
    inside = seed.zipped and rng.random() < 0.3
    original = gzip.decompress(seed.content) if inside else seed.content
    kinds, content = [], original
    for _ in range(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1])):
        choices = BLIND + [_header_integer] * 3 + own * 3
        mutation = choices[rng.integers(len(choices))]
        content = bytes(mutation(rng, bytearray(content), seed, seeds))
        kinds.append(mutation.__name__.strip("_"))
    repaired = inside or "png_chunk" in kinds
    checked = not repaired and _all_checked(seed, content)
    return Mutant(seed, "+".join(kinds), gzip.compress(content, mtime=0) if inside else content, checked)


def _all_checked(seed: Seed, content: bytes) -> bool:
    """Whether every changed byte lies where a checksum covers it, and the checksum is still there."""
    if any(content.count(word) != seed.content.count(word) for word in (b"CHECKSUM= '", b"DATASUM = '")):
        return False
    if b"CHECKSUM= '" in content and _fits_sum(content) == _fits_sum(seed.content):
        return False  # a sum: two opposite changes of one bit cancel
    if seed.checked == ((0, len(seed.content)),):
        return True
    if not seed.checked or len(content) != len(seed.content):
        return False
    changed = np.flatnonzero(np.frombuffer(content, np.uint8) != np.frombuffer(seed.content, np.uint8))
    covered = np.zeros(len(content), bool)
    for start, stop in seed.checked:
        covered[start:stop] = True
    return bool(len(changed) and covered[changed].all())


def _fits_sum(content: bytes) -> int:
    """Of all 32-bit words, in ones' complement."""
    return int(np.frombuffer(content + bytes(-len(content) % 4), ">u4").sum(dtype=np.uint64)) % (2**32 - 1)


# Blind


def _flip_bits(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    for _ in range(rng.integers(1, 9)):
        if data:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return data


def _overwrite(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    at, length = _place(rng, data)
    fills = (bytes(length), b"\xff" * length, rng.bytes(length))
    data[at : at + length] = fills[rng.integers(3)]
    return data


def _truncate(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    return data[: rng.integers(len(data) + 1)]


def _insert(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    at, length = _place(rng, data)
    data[at:at] = rng.bytes(length)
    return data


def _delete(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    at, length = _place(rng, data)
    del data[at : at + length]
    return data


def _duplicate(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    at, length = _place(rng, data)
    data[at:at] = data[at : at + length]
    return data


def _splice(rng: np.random.Generator, data: bytearray, _: Seed, seeds: list[Seed]) -> bytes:
    """The head of one file, of at least 16 bytes, and the tail of another."""
    other = seeds[rng.integers(len(seeds))].content
    return bytes(data[: 16 + rng.integers(len(data) + 1)]) + other[rng.integers(len(other) + 1) :]


def _place(rng: np.random.Generator, data: bytes) -> tuple[int, int]:
    return int(rng.integers(len(data) + 1)), int(2 ** rng.uniform(0, 7))


def _header_integer(rng: np.random.Generator, data: bytearray, seed: Seed, *_: object) -> bytes:
    return _set_integer(rng, data, int(rng.integers(max(1, min(seed.header, len(data))))), int(2 ** rng.integers(4)))


def _set_integer(rng: np.random.Generator, data: bytearray, at: int, size: int) -> bytes:
    value = INTERESTING[rng.integers(len(INTERESTING))] & (256**size - 1)
    data[at : at + size] = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
    return data


BLIND: list[Mutation] = [_flip_bits, _overwrite, _truncate, _insert, _delete, _duplicate, _splice]


# Of one format


def _tiff_tag(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    """Another code, type, count or value of a tag of the first directory, or another offset of the next directory."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    first, count, entry = (8, "Q", 20) if big else (4, "H", 12)
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, first)
        (tags,) = struct.unpack_from(order + count, data, at)
    except struct.error:
        return data
    at += struct.calcsize(count) + entry * int(rng.integers(min(tags, 200) + 1))
    offset, size = [(0, 2), (2, 2), (4, entry // 2 - 2), (entry // 2 + 2, entry // 2 - 2)][rng.integers(4)]
    value = INTERESTING[rng.integers(len(INTERESTING))] & (256**size - 1)
    if rng.random() < 0.5:
        value = int(rng.integers(0, 300))
    data[at + offset : at + offset + size] = value.to_bytes(size, "little" if order == "<" else "big")
    return data


def _png_chunk(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    """A chunk doubled, left out, moved, or changed and given a right checksum."""
    chunks = png_chunks(bytes(data))
    if not chunks:
        return data
    at, action = int(rng.integers(len(chunks))), rng.integers(5)
    kind, body = chunks[at]
    if action == 0:
        chunks.insert(at, chunks[at])
    elif action == 1:
        del chunks[at]
    elif action == 2:
        chunks.insert(int(rng.integers(len(chunks))), chunks.pop(at))
    elif action == 3:
        chunks[at] = kind, bytes(_flip_bits(rng, bytearray(body)))
    elif body:
        changed = _set_integer(rng, bytearray(body), int(rng.integers(len(body))), int(2 ** rng.integers(3)))
        chunks[at] = kind, bytes(changed)
    return join_png(chunks)


def _jpeg_segment(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    """A segment doubled or left out, or a number near its start changed."""
    starts, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        length = 2 + struct.unpack_from(">H", data, at + 2)[0]
        starts.append((at, length))
        at += length
    if not starts:
        return data
    at, length = starts[rng.integers(len(starts))]
    action = rng.integers(4)
    if action == 0:
        del data[at : at + length]
    elif action == 1:
        data[at:at] = data[at : at + length]
    else:
        _set_integer(rng, data, at + 1 + int(rng.integers(min(length, 18))), int(2 ** rng.integers(2)))
    return data


def _dicom_element(rng: np.random.Generator, data: bytearray, *_: object) -> bytes:
    """The value or the length of an element of group 0028, the one that describes the pixels."""
    places = [match.start() for match in re.finditer(rb"\x28\x00.[\x00\x10\x11]", bytes(data), re.DOTALL)]
    if places:
        at = places[rng.integers(len(places))] + int(rng.choice([4, 6, 8, 8, 8]))
        _set_integer(rng, data, at, int(2 ** rng.integers(1, 3)))
    return data


def _number_in_text(rng: np.random.Generator, data: bytearray, seed: Seed, *_: object) -> bytes:
    """Another number for one that stands in the header's text; of a FITS card the length is kept."""
    places = list(re.finditer(rb"-?\d+(\.\d+)?", bytes(data[: seed.header])))
    if not places:
        return data
    found, new = places[rng.integers(len(places))], NUMBERS[rng.integers(len(NUMBERS))].encode()
    start, stop = found.span()
    if data.startswith(b"SIMPLE"):
        start = max(0, stop - len(new))
    data[start:stop] = new
    return data


OF_FORMAT: dict[str, list[Mutation]] = {
    "TIFF": [_tiff_tag],
    "PNG": [_png_chunk],
    "JPEG": [_jpeg_segment],
    "DICOM": [_dicom_element],
    "FITS": [_number_in_text],
    "npy": [_number_in_text],
    "text": [_number_in_text],
}
