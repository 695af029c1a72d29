"""An image format as a user's package would add one: the magic number "OWN1", (pages, H, W, C) and uint16 pixels."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pulmo_jax.data.sources.source import page_source
from pulmo_jax.types import ImageTags, InputError, Source

HEADER = struct.Struct("<4s4I")


def write_own(path: Path, pixels: np.ndarray) -> np.ndarray:
    """pixels: (pages, H, W, C) uint16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(HEADER.pack(b"OWN1", *pixels.shape) + pixels.tobytes())
    return pixels


@dataclass(frozen=True)
class OwnFormat:
    suffixes: tuple[str, ...] = (".own",)

    def open(self, path: Path, max_bytes: int) -> Source:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        if not head.startswith(b"OWN1"):
            raise InputError("is not an OWN file; convert it")
        _, pages, height, width, channels = HEADER.unpack(head)
        size = height * width * channels

        def decode(page: int) -> np.ndarray:
            pixels = np.fromfile(path, np.uint16, size, offset=HEADER.size + 2 * page * size)
            return pixels.reshape(height, width, channels)

        shape, tags = (pages, height, width, channels), ImageTags(resolution=(300.0, 300.0, 2))
        return page_source(path, shape, np.dtype(np.uint16), decode, max_bytes, tags)
