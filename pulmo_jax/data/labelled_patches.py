"""Patches of labelled images and the codes of their pixels, with a cache on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from pulmo_jax.core.tiling import cut
from pulmo_jax.data.codes import UNLABELLED
from pulmo_jax.data.image_scale import for_image
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.label_masks import LabelReader, nearest_index
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scratch import NO_CACHE_REMEDY, DecodedReader, Scratch
from pulmo_jax.data.transforms import Preprocessing, finite, preprocess, resize_bands
from pulmo_jax.host.cache import cache_folder
from pulmo_jax.types import Window

Cells = Int[np.ndarray, "_ 3"]  # (image, y, x) of patches, in px


@runtime_checkable
class LabelledImages(Protocol):
    """Labelled images, such as `tasks.segmentation.data.Labelled`."""

    @property
    def refs(self) -> Sequence[ImageRef]:
        """The images."""
        ...

    @property
    def labels(self) -> LabelReader:
        """Reads the codes of their pixels."""
        ...

    @property
    def reader(self) -> Reader:
        """Reads the images."""
        ...

    @property
    def places(self) -> Int[np.ndarray, "_ 4"]:
        """(image, class, y, x) of random pixels of each class."""
        ...


class CachedLabels:
    """Images and codes, each decoded once if all fit into a cache on disk.

    Args:
        labelled: The images.
        decoded_mb: Largest size of the cache in MiB; if the images need more, files are read for every patch.
        folder: Folder of the cache; None: the user's.

    Attributes:
        fits: Whether the images are cached.
        needed_mb: Decoded size of images and codes in MiB.

    Raises:
        InputError: The disk has not enough space.
    """

    def __init__(self, labelled: LabelledImages, decoded_mb: int = 8192, folder: Path | None = None):
        refs, folder = list(labelled.refs), folder or cache_folder()
        self._refs, self._labels = refs, labelled.labels
        shapes = [ref.shape[:2] for ref in refs]
        codes_mb = sum(height * width for height, width in shapes) / 2**20
        self._pixels = DecodedReader(labelled.reader, refs, max(0, decoded_mb - int(codes_mb)), folder)
        self.fits, self.needed_mb = self._pixels.fits, self._pixels.needed_mb + codes_mb
        self._codes = Scratch(shapes, [np.dtype(np.uint8)] * len(refs), folder, NO_CACHE_REMEDY) if self.fits else None

    def image(self, row: int, window: Window | None = None) -> np.ndarray:
        """Pixels (h, w, C) of an image or of a window of it; read-only if they are cached."""
        return self._pixels.image(self._refs[row], window)

    def codes(self, row: int, window: Window | None = None) -> np.ndarray:
        """Codes (h, w) of an image or of a window of it; read-only if they are cached."""
        ref = self._refs[row]
        if self._codes is None:
            return self._labels.codes(ref, window)
        whole = self._codes.get(row, lambda: self._labels.codes(ref))
        y, x, h, w = window or (0, 0, *whole.shape)
        return whole[y : y + h, x : x + w]


@dataclass(frozen=True)
class ReadLabelled:
    """Reads normalised patches and the codes of their pixels.

    Attributes:
        refs: The images.
        source: Reads pixels and codes of an image, given by its row.
        scales: Preprocessing of single images, by row and preprocessing, filled while reading.
        resized: Cache of resized images for each preprocessing, and of their codes; None for no cache.
    """

    refs: Sequence[ImageRef]
    source: Any
    scales: dict[tuple[int, Preprocessing], Preprocessing]
    resized: tuple[dict[Preprocessing, Scratch], Scratch] | None = None

    def __call__(self, cell: Sequence[int], how: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
        """Read a patch.

        Args:
            cell: (image, y, x) of the patch, in px.
            how: The preprocessing.

        Returns:
            Normalised patch (P, P, C) and codes (P, P). Beyond the image, the patch repeats the nearest pixel, and
            there is no label.
        """
        row, y, x = (int(value) for value in cell)
        if how.resize:
            return self._whole(row, how)
        size, (height, width) = how.patch_size, self.refs[row].shape[:2]
        window = Window(y, x, min(size, height - y), min(size, width - x))
        pixels, codes = self.source.image(row, window), self.source.codes(row, window)
        patch = preprocess(cut(pixels, 0, 0, size), None, self._scaled(row, how))
        padded = np.full((size, size), UNLABELLED, np.uint8)
        padded[: codes.shape[0], : codes.shape[1]] = _known(codes, pixels)
        return patch, padded

    def _whole(self, row: int, how: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
        size = how.patch_size

        def image() -> np.ndarray:
            return resize_bands(preprocess(self.source.image(row), None, self._scaled(row, how)), size, size)

        def codes() -> np.ndarray:
            whole = _known(self.source.codes(row), self.source.image(row))
            rows, columns = (nearest_index(length, size) for length in whole.shape)
            return whole[np.ix_(rows, columns)]

        if self.resized is None:
            return image(), codes()
        images, labels = self.resized
        return images[how].get(row, image), labels.get(row, codes)

    def _scaled(self, row: int, how: Preprocessing) -> Preprocessing:
        """Preprocessing with the scale of the image, if each image has its own."""
        if how.percentiles is None:
            return how
        if (row, how) not in self.scales:
            self.scales[row, how] = for_image(how, self.source.image(row))
        return self.scales[row, how]


def _known(codes: np.ndarray, pixels: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    """Codes without those of pixels that are not finite."""
    known = finite(pixels)
    return codes if known.all() else np.where(known, codes, np.uint8(UNLABELLED))


def patch_reader(
    labelled: LabelledImages, hows: Sequence[Preprocessing], decoded_mb: int = 8192, folder: Path | None = None
) -> ReadLabelled:
    """Make a reader of patches with a cache on disk.

    Args:
        labelled: The images.
        hows: All preprocessings that will be used; they agree in `resize` and `patch_size`.
        decoded_mb: Largest size of the cache in MiB; 0 for none.
        folder: Folder of the cache; None: the user's.

    Returns:
        The reader.

    Raises:
        InputError: The disk has not enough space.
    """
    refs, folder = labelled.refs, folder or cache_folder()
    if not hows[0].resize or not decoded_mb:
        return ReadLabelled(refs, CachedLabels(labelled, decoded_mb, folder), {})
    size, distinct, count = hows[0].patch_size, dict.fromkeys(hows), len(refs)

    def scratch(shape: tuple[int, ...], dtype: type) -> Scratch:
        return Scratch([shape] * count, [np.dtype(dtype)] * count, folder, NO_CACHE_REMEDY)

    images = {how: scratch((size, size, how.channels), np.float32) for how in distinct}
    return ReadLabelled(refs, CachedLabels(labelled, 0, folder), {}, (images, scratch((size, size), np.uint8)))


def windows(
    labelled: LabelledImages, cells: Cells, how: Preprocessing
) -> tuple[Float[np.ndarray, "n P P C"], UInt8[np.ndarray, "n P P"]]:
    """Read patches, such as those of the validation loss.

    Args:
        labelled: The images.
        cells: (image, y, x) of n patches, in px.
        how: The preprocessing.

    Returns:
        Normalised patches (n, P, P, C) and codes (n, P, P).
    """
    read = ReadLabelled(labelled.refs, _Uncached(labelled), {})
    patches, codes = zip(*(read(cell, how) for cell in cells.tolist()), strict=True)
    return np.stack(patches), np.stack(codes)


def whole(
    labelled: LabelledImages, row: int, how: Preprocessing
) -> tuple[Float[np.ndarray, "P P C"], UInt8[np.ndarray, "P P"]]:
    """Read an image that is resized to a patch.

    Args:
        labelled: The images.
        row: Row of the image.
        how: The preprocessing, with `resize`.

    Returns:
        Normalised image (P, P, C) and codes (P, P).
    """
    patches, codes = windows(labelled, np.array([[row, 0, 0]]), how)
    return patches[0], codes[0]


@dataclass(frozen=True)
class _Uncached:
    """Reads pixels and codes of images from their files."""

    labelled: LabelledImages

    def image(self, row: int, window: Window | None = None) -> np.ndarray:
        """Pixels (h, w, C) of an image or of a window of it."""
        return self.labelled.reader.image(self.labelled.refs[row], window)

    def codes(self, row: int, window: Window | None = None) -> np.ndarray:
        """Codes (h, w) of an image or of a window of it."""
        return self.labelled.labels.codes(self.labelled.refs[row], window)
