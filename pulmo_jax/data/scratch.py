"""A cache of decoded images in a temporary file: each image is decoded once, and patches are read from the cache.

Reading a patch of a compressed image decodes all overlapping strips or tiles, often a hundred times as many pixels,
which would slow down training on few cores. The file is anonymous, is created in the user's cache folder and
disappears with the process. Its memory pages are released regularly, so memory use does not grow with the data set.
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.types import InputError, Window

MAX_RESIDENT_BYTES = 8 * 2**20  # of the file in memory, before its pages are released
READAHEAD_BYTES = 64 * 2**10  # that the system maps in addition to the accessed bytes
NO_CACHE_REMEDY = ", or set data.decoded_mb=0, which is slower"
PATCH_BYTES = 160 * 2**10  # typically accessed by one patch
MEBIBYTE = 2**20


class Scratch:
    """A file-backed cache of arrays with known shapes and dtypes, each computed on first access.

    Threads may share it. Pickling, for worker processes, drops the contents.

    Args:
        shapes: Shape of each array.
        dtypes: Dtype of each array.
        folder: Folder of the temporary file.
        remedy: Appended to the error message for a full disk.

    Raises:
        InputError: The disk has not enough space.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype], folder: Path, remedy: str = ""):
        self._shapes, self._dtypes, self._folder, self._remedy = list(shapes), list(dtypes), folder, remedy
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
        ends = np.cumsum([-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]).tolist()
        self._starts, self._made = [0, *ends[:-1]], [False] * len(sizes)
        self._accessed, self._lock = 0, threading.Lock()
        try:
            self._map = allocate_file(folder, ends[-1])
        except OSError as error:
            raise InputError(
                f"{folder}: no space for {ends[-1] / MEBIBYTE:.0f} MiB of decoded images ({error.strerror}); free some "
                f"or set another folder with PULMO_JAX_CACHE{remedy}"
            ) from error

    def __getstate__(self) -> tuple:
        return self._shapes, self._dtypes, self._folder, self._remedy

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def get(self, index: int, make: Callable[[], np.ndarray]) -> Shaped[np.ndarray, "..."]:
        """Get an array.

        Args:
            index: Index of the array.
            make: Computes the array on first access.

        Returns:
            Read-only view of the array.
        """
        shape, dtype, start = self._shapes[index], self._dtypes[index], self._starts[index]
        view = np.frombuffer(self._map, dtype, prod(shape), start).reshape(shape)
        accessed = min(view.nbytes + READAHEAD_BYTES, PATCH_BYTES)
        if not self._made[index]:
            view[...], accessed = make(), view.nbytes
            self._made[index] = True
        with self._lock:
            self._accessed += accessed
            if self._accessed > MAX_RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)  # pages of a file are not lost, but read again when needed
                self._accessed = 0
        view.flags.writeable = False
        return view


def allocate_file(folder: Path, size: int) -> mmap.mmap:
    """Map an anonymous temporary file into memory.

    Args:
        folder: Folder of the file, created if necessary.
        size: Size in bytes.

    Returns:
        The memory map.

    Raises:
        OSError: The disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process at the first write
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return mmap.mmap(file.fileno(), size)


class DecodedReader:
    """A `Reader` that decodes each image only once, if all images fit into the cache.

    Args:
        reader: Reads the files.
        images: All images that will be read.
        limit_mb: Largest size of the cache in MiB. If the images need more, nothing is cached and `fits` is False.
        folder: Folder of the temporary file.

    Attributes:
        needed_mb: Decoded size of the images and masks in MiB.
        fits: Whether they are cached.

    Raises:
        InputError: The disk has not enough space.
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
            self._pixels = Scratch(shapes, dtypes, folder, NO_CACHE_REMEDY)
            flags = [np.dtype(bool)] * len(shapes)
            self._masks = Scratch([shape[:2] for shape in shapes], flags, folder, NO_CACHE_REMEDY) if masked else None

    def image(self, ref: ImageRef, window: Window | None = None) -> Shaped[np.ndarray, "h w C"]:
        """Read an image or a window of it, see `Reader.image`; the array is read-only if it is cached."""
        if self._pixels is None:
            return self._reader.image(ref, window)
        whole = self._pixels.get(self._index[ref.path, ref.page], lambda: self._reader.image(ref))
        return _cut(whole, window)

    def foreground(self, ref: ImageRef, window: Window | None = None) -> Bool[np.ndarray, "h w"] | None:
        """Read the foreground mask of an image or of a window of it, see `Reader.foreground`."""
        if self._masks is None or ref.mask is None:
            return self._reader.foreground(ref, window)
        whole = self._masks.get(self._index[ref.path, ref.page], lambda: self._mask(ref))
        return _cut(whole, window)

    def _mask(self, ref: ImageRef) -> np.ndarray:
        mask = self._reader.foreground(ref)
        assert mask is not None  # called only for images with a mask
        return mask


def _cut(whole: np.ndarray, window: Window | None) -> np.ndarray:
    y, x, h, w = window or (0, 0, *whole.shape[:2])
    return whole[y : y + h, x : x + w]
