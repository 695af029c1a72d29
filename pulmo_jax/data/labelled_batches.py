"""Training batches of patches and the codes of their pixels, for several networks in parallel.

Batch k depends only on (seed, k), not on threads or processes, so resuming is a slice.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Int

from pulmo_jax.data.labelled_patches import Cells, LabelledImages, ReadLabelled
from pulmo_jax.data.pipeline import CellBatches, MapDataset, RowShare, grain
from pulmo_jax.data.transforms import Preprocessing


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
    kept = kept[np.lexsort((kept[:, 0], kept[:, 1]))]
    by_class = np.split(kept, np.flatnonzero(np.diff(kept[:, 1])) + 1)
    return [np.split(own, np.flatnonzero(np.diff(own[:, 0])) + 1) for own in by_class if len(own)]


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
