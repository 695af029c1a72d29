"""Training batches of downsampled images and their landmarks, determined by (seed, step)."""

from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Float, Int

from pulmo_jax.data.pipeline import CellBatches, MapDataset, RowShare, grain

Batch = tuple[np.ndarray, np.ndarray]  # (B, S, S), (B, K, 2)


@dataclass(frozen=True)
class ReadLandmarks(grain.MapTransform):
    """Maps row indices (B, 1) to images (B, S, S) and landmarks (B, K, 2).

    Attributes:
        images: Downsampled images (N, S, S).
        points: Landmarks (y, x) in px of these images (N, K, 2).
    """

    images: Float[np.ndarray, "N S S"]
    points: Float[np.ndarray, "N K 2"]

    def map(self, element: Int[np.ndarray, "B 1"]) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read the images and landmarks of a batch."""
        rows = np.asarray(element)[:, 0]
        return np.asarray(self.images[rows]), self.points[rows]


def shuffled_batches(
    images: Float[np.ndarray, "N S S"],
    points: Float[np.ndarray, "N K 2"],
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> MapDataset:
    """Make an endless dataset of shuffled batches.

    Args:
        images: Downsampled images (N, S, S).
        points: Landmarks (y, x) in px of these images (N, K, 2).
        batch_size: Images per batch B.
        seed: Seed of the shuffling, which differs between epochs.
        process_index: Index of this process.
        process_count: Number of processes; each reads consecutive rows of every batch.

    Returns:
        Element k holds the images (B, S, S) and landmarks (B, K, 2) of batch k.

    Raises:
        InputError: The batch size is not divisible by the number of processes.
    """
    rows = np.arange(len(images), dtype=np.int32)[:, None]
    all_rows = CellBatches(rows, batch_size, seed)
    batches = cast(grain.RandomAccessDataSource, RowShare(all_rows, batch_size, process_index, process_count))
    return MapDataset.source(batches).map(ReadLandmarks(images, points))


def rows_of_batch(count: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, "B"]:
    """Row indices of the images in the batch of a step.

    Args:
        count: Number of training images N.
        batch_size: Images per batch B.
        seed: Seed of `shuffled_batches`.
        step: Training step, from 0.
    """
    return CellBatches(np.arange(count, dtype=np.int32)[:, None], batch_size, seed)[step][:, 0]
