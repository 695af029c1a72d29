"""Decoded images in a temporary file: each is decoded once, and patches are read from it again and again.

A patch of a compressed image costs as much as the strips or tiles that it touches, a hundred times its own pixels'
worth; two cores that train have no such time to spare. The file has no name, lies where the user's cache is, and
vanishes with the process. Its pages are let go of as training moves on, so memory does not grow with the set.
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import numpy as np

from pulmo_jax.data.images import ImageRef, Reader
from pulmo_jax.types import InputError, Window

HELD_BYTES = 8 * 2**20  # of the file, in memory
AROUND_BYTES = 64 * 2**10  # that the system maps beside what is touched
KEEP_NONE = ", or set data.decoded_mb=0, which is slower"
READ_BYTES = 160 * 2**10  # about what a patch of an image touches
MEBIBYTE = 2**20


class Scratch:
    """Arrays of known shapes and dtypes, each made when first asked for.

    Threads may ask at the same time. Pickling (for worker processes) leaves the contents behind.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype], folder: Path, otherwise: str = ""
    ):
        """Reserves the room. Raises InputError where there is not enough; otherwise: what helps then beside more."""
        self._shapes, self._dtypes, self._folder, self._otherwise = list(shapes), list(dtypes), folder, otherwise
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        ends = np.cumsum([-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]).tolist()
        self._starts, self._made = [0, *ends[:-1]], [False] * len(sizes)
        self._touched, self._lock = 0, threading.Lock()
        try:
            self._map = room(folder, ends[-1])
        except OSError as error:
            raise InputError(
                f"{folder}: no room for {ends[-1] / MEBIBYTE:.0f} MiB of decoded images ({error.strerror}); make room, "
                f"or give another folder with PULMO_JAX_CACHE{otherwise}"
            ) from error

    def __getstate__(self) -> tuple:
        return self._shapes, self._dtypes, self._folder, self._otherwise

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def get(self, index: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """A view of an array; `make` gives it the first time."""
        shape, dtype, start = self._shapes[index], self._dtypes[index], self._starts[index]
        view = np.frombuffer(self._map, dtype, prod(shape), start).reshape(shape)
        touched = min(view.nbytes + AROUND_BYTES, READ_BYTES)
        if not self._made[index]:
            view[...], touched = make(), view.nbytes
            self._made[index] = True
        with self._lock:
            self._touched += touched
            if self._touched > HELD_BYTES and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)  # of a file: nothing is lost, it is read again when needed
                self._touched = 0
        view.flags.writeable = False
        return view


def room(folder: Path, size: int) -> mmap.mmap:
    """So many bytes of a file without a name. OSError where the disk has none."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process at the first write
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return mmap.mmap(file.fileno(), size)


class DecodedReader:
    """A `Reader` that decodes each image once. `fits` is False, and nothing is kept, beyond `limit_mb`.

    Raises InputError where the disk has no room.
    """

    def __init__(self, reader: Reader, images: Sequence[ImageRef], limit_mb: int, folder: Path):
        self._reader = reader
        self._index = {(ref.path, ref.page): i for i, ref in enumerate(images)}
        shapes, dtypes = [ref.shape for ref in images], [np.dtype(ref.dtype) for ref in images]
        masked = any(ref.mask is not None for ref in images)
        pixel_bytes = (prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
        self.needed_mb = sum(pixel_bytes) / MEBIBYTE + masked * sum(prod(shape[:2]) for shape in shapes) / MEBIBYTE
        self.fits = self.needed_mb <= limit_mb
        self._pixels = self._masks = None
        if self.fits:
            self._pixels = Scratch(shapes, dtypes, folder, KEEP_NONE)
            flags = [np.dtype(bool)] * len(shapes)
            self._masks = Scratch([shape[:2] for shape in shapes], flags, folder, KEEP_NONE) if masked else None

    def image(self, ref: ImageRef, window: Window | None = None) -> np.ndarray:
        """(h, w, C) in the file's dtype, not to be written to."""
        if self._pixels is None:
            return self._reader.image(ref, window)
        whole = self._pixels.get(self._index[ref.path, ref.page], lambda: self._reader.image(ref))
        return _cut(whole, window)

    def foreground(self, ref: ImageRef, window: Window | None = None) -> np.ndarray | None:
        """(h, w) bool, or None where the whole image is foreground."""
        if self._masks is None or ref.mask is None:
            return self._reader.foreground(ref, window)
        whole = self._masks.get(self._index[ref.path, ref.page], lambda: self._mask(ref))
        return _cut(whole, window)

    def _mask(self, ref: ImageRef) -> np.ndarray:
        mask = self._reader.foreground(ref)
        assert mask is not None  # asked for where there is one
        return mask


def _cut(whole: np.ndarray, window: Window | None) -> np.ndarray:
    y, x, h, w = window or (0, 0, *whole.shape[:2])
    return whole[y : y + h, x : x + w]
