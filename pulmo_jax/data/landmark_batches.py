"""Batches of working images and their landmarks: a function of (seed, step), like those of patches."""

from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Float, Int

from pulmo_jax.data.pipeline import CellBatches, MapDataset, RowShare, grain

Batch = tuple[np.ndarray, np.ndarray]  # (B, S, S), (B, K, 2)


@dataclass(frozen=True)
class ReadLandmarks(grain.MapTransform):
    """Rows (B, 1) -> their images and points."""

    images: Float[np.ndarray, "N S S"]
    points: Float[np.ndarray, "N K 2"]

    def map(self, element: Int[np.ndarray, "B 1"]) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
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
    """Endlessly many batches, or a process's share of the rows of each; every epoch in an order of its own."""
    rows = np.arange(len(images), dtype=np.int32)[:, None]
    all_rows = CellBatches(rows, batch_size, seed)
    batches = cast(grain.RandomAccessDataSource, RowShare(all_rows, batch_size, process_index, process_count))
    return MapDataset.source(batches).map(ReadLandmarks(images, points))


def rows_of_batch(count: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, "B"]:
    """Which images the batch of a step, from 0, is made of."""
    return CellBatches(np.arange(count, dtype=np.int32)[:, None], batch_size, seed)[step][:, 0]
