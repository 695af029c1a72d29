"""Attributes of a store, read without HDF5, which loops forever over a damaged global heap.

Only scalar integers and text in the root object header are read: stores have no others.

Reference:
    HDF5 File Format Specification 3.0, sections III.E (global heap), IV.A.1 (object headers), IV.A.2.d (datatypes) and
    IV.A.2.m (attributes).
"""

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from h5py import h5o  # pyright: ignore[reportAttributeAccessIssue]

_MAX_BLOCK_BYTES, _MAX_BLOCKS = 2**16, 64  # of an object header
_MAX_HEAP_BYTES = 2**20
_CONTINUATION, _ATTRIBUTE = 0x10, 0x0C  # kinds of messages
_SHARED = 2  # flag of a message
_INTEGER, _TEXT, _VARIABLE = 0, 3, 9  # classes of datatypes
Read = Callable[[int, int], bytes]  # maps (offset, size) to bytes


def read_attributes(file: Any) -> dict[str, int | str]:
    """Read the attributes of a file that are an integer or text.

    Args:
        file: The open HDF5 file.

    Returns:
        Values by name.

    Raises:
        ValueError: The object header is damaged.
        struct.error: The file is cut off.
    """
    descriptor = file.id.get_vfd_handle()

    def read(offset: int, size: int) -> bytes:
        return os.pread(descriptor, size, offset)

    attributes = {}
    for message in _attribute_messages(read, h5o.get_info(file.id).addr):
        name, value = _attribute(read, message)
        if value is not None:
            attributes[name] = value
    return attributes


def _attribute_messages(read: Read, address: int) -> Iterator[bytes]:
    """The attribute messages of an object header of version 1 or 2."""
    head = read(address, 32)
    version_2 = head.startswith(b"OHDR")
    if version_2:
        flags = head[5]
        start = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        blocks = [(address + start + width, int.from_bytes(head[start : start + width], "little"))]
        entry, layout = 4 + (2 if flags & 4 else 0), "<BHB"
    else:
        blocks, entry, layout = [(address + 16, struct.unpack_from("<I", head, 8)[0])], 8, "<HHB"
    for number, (start, size) in enumerate(blocks):
        if size > _MAX_BLOCK_BYTES or number > _MAX_BLOCKS:
            raise ValueError("an object header is too large")
        block, offset = read(start, size), 4 if version_2 and number else 0  # after its signature
        while offset + entry <= len(block):
            kind, length, flags = struct.unpack_from(layout, block, offset)
            message = block[offset + entry : offset + entry + length]
            offset += entry + length
            if kind == _CONTINUATION:
                blocks.append(struct.unpack_from("<QQ", message))
            elif kind == _ATTRIBUTE and not flags & _SHARED:
                yield message


def _attribute(read: Read, message: bytes) -> tuple[str, int | str | None]:
    """Name and value of an attribute; None if it is not a scalar integer or text."""
    version, *lengths = struct.unpack_from("<BxHHH", message)
    parts, offset = [], 9 if version == 3 else 8
    for length in lengths:
        parts.append(message[offset : offset + length])
        offset += -(-length // 8) * 8 if version == 1 else length
    name, kind, space = parts
    scalar = space[1] == 0 and (space[0] == 1 or space[3] == 0)
    return name.rstrip(b"\0").decode(errors="replace"), _value(read, kind, message[offset:]) if scalar else None


def _value(read: Read, kind: bytes, data: bytes) -> int | str | None:
    """Decode a value of a datatype."""
    category, size = kind[0] & 15, struct.unpack_from("<I", kind, 4)[0]
    if category == _INTEGER:
        return int.from_bytes(data[:size], "big" if kind[1] & 1 else "little", signed=bool(kind[1] & 8))
    if category == _VARIABLE and kind[1] & 15 == 1:
        length, address, index = struct.unpack_from("<IQI", data)
        data, size = _heap_object(read, address, index), length
    elif category != _TEXT:
        return None
    return data[:size].rstrip(b"\0").decode(errors="replace")


def _heap_object(read: Read, address: int, index: int) -> bytes:
    """An object of a collection of the global heap."""
    signature, size = struct.unpack("<4s4xQ", read(address, 16))
    if signature != b"GCOL" or size > _MAX_HEAP_BYTES:
        raise ValueError("a global heap is damaged")
    heap, offset = read(address, size), 16
    while offset + 16 <= len(heap):
        number, length = struct.unpack_from("<H6xQ", heap, offset)
        if number == index:
            return heap[offset + 16 : offset + 16 + length]
        offset += 16 + -(-length // 8) * 8
    raise ValueError("a global heap is incomplete")
