"""The one Grain chain: cells -> shuffle -> batch -> read, preprocess and augment -> prefetch.

Batches are formed inside the MapDataset, so batch k is a function of (seed, k) alone: it does not depend on threads or
workers, and resuming is a slice. What is done to a batch is done to all of its patches at once: on two cores that
train, each call of Python for a single patch is felt.
"""

from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np
from absl import flags
from absl import logging as absl_logging
from jaxtyping import Float, Int, Shaped

from pulmo_jax.core.tiling import cut
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.scratch import Scratch
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


@runtime_checkable
class PatchReader(Protocol):
    """`images.Reader`, or `scratch.DecodedReader` around one."""

    def image(self, ref: ImageRef, window: Window | None = None) -> np.ndarray: ...

    def foreground(self, ref: ImageRef, window: Window | None = None) -> np.ndarray | None: ...


@dataclass(frozen=True)
class ReadPatches:
    """Cells (image, y, x) -> normalised patches, float32. resized: keeps whole images that are shrunk, if given."""

    images: list[ImageRef]
    how: Preprocessing
    reader: PatchReader
    resized: Scratch | None = None

    def __call__(
        self, cells: Int[np.ndarray, "B 3"], codes: Int[np.ndarray, "B"] | None = None
    ) -> Float[np.ndarray, "B P P C"]:
        """codes: the symmetry of the square that each patch is in (see `flip_and_turn`)."""
        turns = [0] * len(cells) if codes is None else codes.tolist()
        if self.how.resize:
            return np.stack(
                [flip_and_turn(self._shrunk(i), t) for i, t in zip(cells[:, 0].tolist(), turns, strict=True)]
            )
        patches, insides = zip(*(self._cut(*cell) for cell in cells.tolist()), strict=True)
        raw = np.stack([flip_and_turn(patch, t) for patch, t in zip(patches, turns, strict=True)])
        if insides[0] is None:
            return preprocess(raw, None, self.how)
        inside = np.stack([flip_and_turn(i[..., None], t)[..., 0] for i, t in zip(insides, turns, strict=True)])
        return preprocess(raw, inside, self.how)

    def _cut(self, image: int, y: int, x: int) -> tuple[np.ndarray, np.ndarray | None]:
        ref, size = self.images[image], self.how.patch_size
        window = Window(y, x, min(size, ref.shape[0] - y), min(size, ref.shape[1] - x))
        foreground = self.reader.foreground(ref, window)
        inside = None if foreground is None else cut(foreground, 0, 0, size)
        return cut(self.reader.image(ref, window), 0, 0, size), inside

    def _shrunk(self, image: int) -> np.ndarray:
        ref, size = self.images[image], self.how.patch_size

        def make() -> np.ndarray:
            whole = preprocess(self.reader.image(ref), self.reader.foreground(ref), self.how)
            return resize_bands(whole, size, size)

        return make() if self.resized is None else self.resized.get(image, make)


@dataclass(frozen=True)
class ReadBatch(grain.RandomMapTransform):
    """ReadPatches at jittered positions, each patch then in one of the square's symmetries.

    rows: of the batch, those that this process reads; the random numbers are the whole batch's.
    """

    read: ReadPatches
    augmentation: Augmentation
    rows: slice

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        cells, jitter = np.array(element), self.augmentation.jitter_px
        moves = rng.integers(-jitter, jitter + 1, size=(len(cells), 2))
        codes = rng.integers(8, size=len(cells)) if self.augmentation.symmetries else np.zeros(len(cells), int)
        if not self.read.how.resize:
            shapes = np.array([self.read.images[image].shape[:2] for image in cells[:, 0]])
            room = np.maximum(shapes - self.read.how.patch_size, 0)
            cells[:, 1:] = np.clip(cells[:, 1:] + moves, 0, room)
        return self.read(cells[self.rows], codes[self.rows])


def training_batches(
    cells: Int[np.ndarray, "N 3"],
    read: ReadPatches,
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
    share = batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share)
    return cells_in_batches(cells, batch_size=batch_size, seed=seed).random_map(ReadBatch(read, augmentation, rows))


def cells_in_batches(cells: Int[np.ndarray, "N 3"], *, batch_size: int, seed: int) -> grain.MapDataset:
    """An endless MapDataset: element k is the cells (B, 3) that batch k is read at, before their jitter."""
    source = cast(grain.RandomAccessDataSource, cells)
    # nothing is dropped of an endless set, whose length is then exact
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)


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
