"""The one Grain chain: cells -> shuffle -> read and preprocess -> augment -> batch -> prefetch.

Batches are formed inside the MapDataset, so batch k is a function of (seed, k) alone: it does not depend on threads or
workers, and resuming is a slice.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from absl import flags
from absl import logging as absl_logging
from jaxtyping import Float, Int, Shaped

from pulmo_jax.core.tiling import cut
from pulmo_jax.data.images import ImageRef, Reader
from pulmo_jax.data.transforms import Preprocessing, flip_and_turn, preprocess, resize_bands
from pulmo_jax.types import InputError, Window

absl_logging.set_verbosity(absl_logging.ERROR)  # on import Grain warns of a profiler that is not used here
import grain.python as grain  # noqa: E402

Batches = grain.DatasetIterator  # of (B, P, P, C) float32


@dataclass(frozen=True)
class Augmentation:
    """jitter_px: patches move at random by up to so much about their grid cell; symmetries: flips and quarter turns."""

    jitter_px: int = 0
    symmetries: bool = True


@dataclass(frozen=True)
class ReadPatch:
    """(image, y, x) -> normalised patch (P, P, C), float32."""

    images: list[ImageRef]
    how: Preprocessing
    reader: Reader

    def __call__(self, cell: Int[np.ndarray, "3"]) -> Float[np.ndarray, "P P C"]:
        ref, size = self.images[cell[0]], self.how.patch_size
        if self.how.resize:
            whole = preprocess(self.reader.image(ref), self.reader.foreground(ref), self.how)
            return resize_bands(whole, size, size)
        y, x = int(cell[1]), int(cell[2])
        window = Window(y, x, min(size, ref.shape[0] - y), min(size, ref.shape[1] - x))
        return cut(
            preprocess(self.reader.image(ref, window), self.reader.foreground(ref, window), self.how),
            0,
            0,
            size,
        )


@dataclass(frozen=True)
class RandomPatch(grain.RandomMapTransform):
    """ReadPatch at a jittered position, then one of the square's symmetries."""

    read: ReadPatch
    augmentation: Augmentation

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        cell, jitter = element.copy(), self.augmentation.jitter_px
        if jitter and not self.read.how.resize:
            room = np.maximum(np.array(self.read.images[cell[0]].shape[:2]) - self.read.how.patch_size, 0)
            cell[1:] = np.clip(cell[1:] + rng.integers(-jitter, jitter + 1, size=2), 0, room)
        patch = self.read(cell)
        return flip_and_turn(patch, int(rng.integers(8))) if self.augmentation.symmetries else patch


def training_batches(
    cells: Int[np.ndarray, "N 3"],
    read: ReadPatch,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """An endless MapDataset: element k is batch k, or a process's consecutive share of its rows, (B, P, P, C) float32.

    Side by side the shares are the batch of one process, to the last bit.
    """
    if batch_size % process_count:
        raise InputError(f"trainer.batch_size={batch_size} cannot be divided by {process_count} processes")
    return (
        _cells_in_order(cells, seed)
        .random_map(RandomPatch(read, augmentation))
        # nothing is dropped of an endless set, whose length is then exact
        .batch(batch_size // process_count, drop_remainder=True)[process_index::process_count]
    )


def cells_of_batch(cells: Int[np.ndarray, "N 3"], number: int, *, batch_size: int, seed: int) -> Int[np.ndarray, "B 3"]:
    """The cells that batch `number` of `training_batches` is cut from (before their jitter); reads no file."""
    return np.asarray(_cells_in_order(cells, seed).batch(batch_size, drop_remainder=True)[number])


def _cells_in_order(cells: Int[np.ndarray, "N 3"], seed: int) -> grain.MapDataset:
    source = cast(grain.RandomAccessDataSource, cells)
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def iterate(dataset: grain.MapDataset, start: int, *, threads: int, prefetch: int, workers: int = 0) -> Batches:
    """Batches from number `start` on, read ahead by threads and, if asked for, worker processes."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
    batches = dataset[start:].to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags and crash otherwise
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)


def evenly(items: Shaped[np.ndarray, "N ..."], count: int) -> Shaped[np.ndarray, "n ..."]:
    """At most `count` items, evenly spread: those on which the validation loss is measured."""
    return items[np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]
