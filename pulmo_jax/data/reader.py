"""A reader of the pixels and foreground masks of images, which keeps a bounded number of files open."""

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from pulmo_jax.data.contents import fingerprint
from pulmo_jax.data.images import MEBIBYTE, ImageRef
from pulmo_jax.data.masks import Rule, find_rule
from pulmo_jax.data.sources import open_source
from pulmo_jax.data.sources.formats import Format, check_formats
from pulmo_jax.data.sources.source import decoding
from pulmo_jax.host.console import complain
from pulmo_jax.types import ImageTags, InputError, Source, Window

OPEN_FILES_PER_THREAD = 32
OPEN_BYTES_PER_THREAD = 16 * MEBIBYTE  # an open file may cache its last decoded page


class Reader:
    """Reads windows of images and masks, and keeps a bounded number of files open per thread.

    Formats that can only decode whole pages cache one page per file, so the total size of these pages is bounded too.
    Threads may share a reader. Pickling it, for worker processes, drops its open files.

    Args:
        max_image_mb: Limit on the decoded size of a page in MiB.
        formats: User-defined image formats, in addition to the built-in ones.

    Raises:
        InputError: A format is invalid.
    """

    def __init__(self, max_image_mb: int = 2048, formats: Sequence[Format] = ()):
        self.max_image_mb, self.formats = max_image_mb, check_formats(formats)
        self._sources: dict[int, OrderedDict[tuple[Path, bool], Source]] = {}  # by thread
        self._rules: dict[tuple[Path, str], Rule] = {}  # of masks, by path and fingerprint
        self._notes: set[str] = set()  # that were printed
        weakref.finalize(self, _close_all, self._sources)

    def __getstate__(self) -> dict:
        return {"max_image_mb": self.max_image_mb, "formats": self.formats}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def image(self, ref: ImageRef, window: Window | None = None) -> Shaped[np.ndarray, "h w C"]:
        """Read an image or a window of it.

        Args:
            ref: The image.
            window: Region to read, in pixels; None reads the whole image.

        Returns:
            Pixels (h, w, C) in the dtype of the file.

        Raises:
            InputError: The file cannot be read or has changed since it was indexed.
        """
        source = self.open(ref.path)
        now, listed = (*source.shape, source.dtype.name), (ref.pages, *ref.shape, ref.dtype)
        if now != listed:
            raise InputError(
                f"{ref.path}: the file changed while in use: (pages, H, W, C, dtype) is {now}, but was {listed}"
            )
        return source.read(ref.page, window)

    def foreground(self, ref: ImageRef, window: Window | None = None) -> Bool[np.ndarray, "h w"] | None:
        """Read the foreground mask of an image or of a window of it.

        Args:
            ref: The image.
            window: Region to read, in pixels; None reads the whole mask.

        Returns:
            True for foreground (h, w); None if the image has no mask and is all foreground.

        Raises:
            InputError: The mask cannot be read or its size differs from that of the image.
        """
        if ref.mask is None:
            return None
        source = self.open(ref.mask, as_stored=True)
        if source.shape[1:3] != ref.shape[:2] or source.shape[0] not in (1, ref.pages):
            raise InputError(
                f"{ref.mask}: the mask is {source.shape} (pages, H, W, C), its image {ref.path.name} has "
                f"{ref.pages} pages of {ref.shape[:2]}; they must agree (a mask of one page applies to all pages)"
            )
        rule = self._rule(ref.mask, source)
        return rule(source.read(min(ref.page, source.shape[0] - 1), window))

    def tags(self, ref: ImageRef) -> ImageTags:
        """Read the resolution and georeference of an image.

        Args:
            ref: The image.

        Returns:
            The tags.

        Raises:
            InputError: The file cannot be read.
        """
        return self.open(ref.path).tags

    def open(self, path: Path, as_stored: bool = False) -> Any:
        """Open a file for the current thread, or return it if it is open.

        Args:
            path: The file.
            as_stored: Whether to read samples as stored, such as those of a mask (see `sources.open_source`).

        Returns:
            The source, which must not be closed.

        Raises:
            InputError: The file cannot be read.
        """
        cache = self._sources.setdefault(threading.get_ident(), OrderedDict())
        key = path, as_stored
        if key not in cache:
            max_bytes = self.max_image_mb * MEBIBYTE
            cache[key] = open_source(path, max_bytes=max_bytes, formats=self.formats, as_stored=as_stored)
            while len(cache) > 1 and (
                len(cache) > OPEN_FILES_PER_THREAD or sum(map(page_bytes, cache.values())) > OPEN_BYTES_PER_THREAD
            ):
                cache.popitem(last=False)[1].close()
        cache.move_to_end(key)
        return cache[key]

    def _rule(self, path: Path, source: Any) -> Rule:
        """The rule of a mask, found once; each kind of note is printed once."""
        key = path, str(fingerprint(path))
        if key not in self._rules:
            with decoding(path):
                self._rules[key], note = find_rule(path, source)
            if note and note not in self._notes:
                self._notes.add(note)
                complain(f"note: {path}: {note}. All masks of this kind are read in this way.")
        return self._rules[key]

    def close(self) -> None:
        """Close all files. No thread may be reading; files reopen on demand."""
        _close_all(self._sources)


def page_bytes(source: Source) -> int:
    """Decoded size of a page in bytes."""
    return math.prod(source.shape[1:]) * source.dtype.itemsize


def _close_all(sources: dict[int, OrderedDict[tuple[Path, bool], Source]]) -> None:
    while sources:
        for source in sources.popitem()[1].values():
            source.close()
