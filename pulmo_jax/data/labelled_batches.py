"""Training batches of patches and the codes of their pixels, for several networks in parallel.

Batch k depends only on (seed, k), not on threads or processes, so resuming is a slice.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from pulmo_jax.core.tiling import cut
from pulmo_jax.data.codes import UNLABELLED
from pulmo_jax.data.image_scale import for_image
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.label_masks import LabelReader, nearest_index
from pulmo_jax.data.pipeline import CellBatches, MapDataset, RowShare, grain
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scratch import NO_CACHE_REMEDY, DecodedReader, Scratch
from pulmo_jax.data.transforms import Preprocessing, finite, preprocess, resize_bands
from pulmo_jax.host.cache import cache_folder
from pulmo_jax.types import Window

Cells = Int[np.ndarray, "_ 3"]  # (image, y, x) of patches, in px


@runtime_checkable
class LabelledImages(Protocol):
    """Labelled images, such as `tasks.segmentation.data.Labelled`.

    Attributes:
        refs: The images.
        labels: Reads the codes of their pixels.
        reader: Reads the images.
        places: (image, class, y, x) of random pixels of each class.
    """

    refs: Sequence[ImageRef]
    labels: LabelReader
    reader: Reader
    places: Int[np.ndarray, "_ 4"]


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
        codes = _known(codes, pixels)
        padding = [(0, size - length) for length in codes.shape]
        patch = preprocess(cut(pixels, 0, 0, size), None, self._scaled(row, how))
        return patch, np.pad(codes, padding, constant_values=UNLABELLED)

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


@dataclass(frozen=True)
class LabelledCells:
    """An endless sequence of batches of cells: element k holds (image, y, x) of batch k (B, M, 3) of M networks.

    Attributes:
        networks: Cells of each network.
    """

    networks: Sequence["NetworkCells"]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> Int[np.ndarray, "B M 3"]:
        return np.stack([network[k] for network in self.networks], axis=1)


@dataclass(frozen=True)
class NetworkCells:
    """Batches of cells of one network.

    A fraction of the rows is centred on a pixel of a class, up to a random offset within the patch: a class is drawn
    uniformly among those present, then an image with it, then one of its places. The others are shuffled cells, each
    used once per epoch at most, with jitter.

    Attributes:
        cells: Shuffled cells.
        places: For each class present, for each image with it, its places (image, class, y, x).
        shapes: Height and width of all images (N, 2), in px.
        size: Side of a patch in px; 0 for whole images, whose cells have no position.
        jitter_px: Largest random shift of a shuffled cell in px.
        fraction: Fraction of the rows that are centred on a pixel of a class.
    """

    cells: CellBatches
    places: list[list[Int[np.ndarray, "_ 4"]]]
    shapes: Int[np.ndarray, "N 2"]
    size: int
    jitter_px: int
    fraction: float

    def __getitem__(self, k: int) -> Int[np.ndarray, "B 3"]:
        rng = np.random.default_rng([self.cells.seed, k])
        cells = np.array(self.cells[k])
        count = len(cells)
        moves = rng.integers(-self.jitter_px, self.jitter_px + 1, size=(count, 2))
        offsets = rng.integers(max(self.size, 1), size=(count, 2))
        draws = rng.random((count, 3))
        cells[:, 1:] += moves
        serial = k * count + np.arange(count)
        centred = np.floor((serial + 1) * self.fraction) > np.floor(serial * self.fraction)
        for row in np.flatnonzero(centred).tolist() if self.places else ():
            image, _, y, x = self._place(*draws[row].tolist()).tolist()
            cells[row] = image, y - offsets[row, 0], x - offsets[row, 1]
        if not self.size:
            cells[:, 1:] = 0
            return cells
        limits = np.maximum(self.shapes[cells[:, 0]] - self.size, 0)
        cells[:, 1:] = np.clip(cells[:, 1:], 0, limits)
        return cells

    def _place(self, of_class: float, of_image: float, of_place: float) -> np.ndarray:
        """Choose a place by three numbers in [0, 1)."""
        images = self.places[int(of_class * len(self.places))]
        places = images[int(of_image * len(images))]
        return places[int(of_place * len(places))]


def places_by_class(places: Int[np.ndarray, "_ 4"], rows: Int[np.ndarray, "_"]) -> list[list[Int[np.ndarray, "_ 4"]]]:
    """Group the places of some images by class and image.

    Args:
        places: (image, class, y, x).
        rows: The images.

    Returns:
        For each class present, for each image with it, its places.
    """
    kept = places[np.isin(places[:, 0], rows)]
    return [
        [kept[(kept[:, 1] == k) & (kept[:, 0] == image)] for image in np.unique(kept[kept[:, 1] == k, 0])]
        for k in np.unique(kept[:, 1])
    ]


@dataclass(frozen=True)
class ReadBatch(grain.MapTransform):
    """Maps cells (B, M, 3) to patches (B, M, P, P, C) and codes (B, M, P, P).

    Attributes:
        read: Reads patches.
        hows: Preprocessing of each network.
    """

    read: ReadLabelled
    hows: Sequence[Preprocessing]

    def map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: Int[np.ndarray, "B M 3"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read the patches and codes of a batch."""
        cells, size = np.asarray(element), self.hows[0].patch_size
        patches = np.empty((*cells.shape[:2], size, size, self.hows[0].channels), np.float32)
        codes = np.empty((*cells.shape[:2], size, size), np.uint8)
        for b, m in np.ndindex(*cells.shape[:2]):
            patches[b, m], codes[b, m] = self.read(cells[b, m].tolist(), self.hows[m])
        return patches, codes


def labelled_cells(
    labelled: LabelledImages,
    cells: Sequence[Cells],
    rows: Sequence[Int[np.ndarray, "_"]],
    hows: Sequence[Preprocessing],
    batch_size: int,
    seeds: Sequence[int],
    foreground_fraction: float = 1 / 3,
    jitter_px: int | None = None,
) -> LabelledCells:
    """Make the batches of cells of M networks.

    Args:
        labelled: The images.
        cells: Cells of the training images of each network (see `tasks.segmentation.data.fit_normalisation`).
        rows: Training images of each network.
        hows: Preprocessing of each network.
        batch_size: Patches per batch and network B.
        seeds: Seed of each network.
        foreground_fraction: Fraction of the patches that are centred on a pixel of a class.
        jitter_px: Largest shift of the others, in px; None: a quarter of a patch, which is half of the default stride.

    Returns:
        Element k holds the cells (B, M, 3) of batch k, from which the images of a batch are known, too.
    """
    size = 0 if hows[0].resize else hows[0].patch_size
    jitter = 0 if not size else size // 4 if jitter_px is None else jitter_px
    shapes = np.array([ref.shape[:2] for ref in labelled.refs])
    return LabelledCells(
        [
            NetworkCells(
                CellBatches(own, batch_size, seed),
                places_by_class(labelled.places, images),
                shapes,
                size,
                jitter,
                foreground_fraction,
            )
            for own, images, seed in zip(cells, rows, seeds, strict=True)
        ]
    )


def labelled_batches(
    batches: LabelledCells,
    read: ReadLabelled,
    hows: Sequence[Preprocessing],
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> MapDataset:
    """Make the endless dataset of training batches of M networks.

    Args:
        batches: Cells of the batches.
        read: Reads patches.
        hows: Preprocessing of each network.
        batch_size: Patches per batch and network B.
        process_index: Index of this process.
        process_count: Number of processes; each reads consecutive rows of every batch.

    Returns:
        Element k holds the normalised patches (B, M, P, P, C) and codes (B, M, P, P) of batch k.

    Raises:
        InputError: The batch size is not divisible by the number of processes.
    """
    share = RowShare(batches, batch_size, process_index, process_count)
    return MapDataset.source(cast(grain.RandomAccessDataSource, share)).map(ReadBatch(read, tuple(hows)))


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
