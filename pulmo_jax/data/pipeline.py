"""The one Grain chain: cells -> shuffle -> batch -> read, preprocess and augment -> prefetch; or every cell once.

Batches are formed inside the MapDataset, so batch k is a function of (seed, k) alone: it does not depend on threads or
workers, and resuming is a slice. What is done to a batch is done to all of its patches at once: on two cores that
train, each call of Python for a single patch is felt.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from absl import flags
from absl import logging as absl_logging
from jaxtyping import Bool, Float, Int, Shaped

from pulmo_jax.core.tiling import cut
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.scratch import Scratch
from pulmo_jax.data.transforms import Preprocessing, finite, flip_and_turn, preprocess, resize_bands
from pulmo_jax.types import InputError, Window

absl_logging.set_verbosity(absl_logging.ERROR)  # on import Grain warns of a profiler that is not used here
import grain.python as grain  # noqa: E402

MapDataset = grain.MapDataset
Batches = grain.DatasetIterator  # of (B, P, P, C) float32, or of these and (B, P, P) bool
WHOLE = 0.999  # of a shrunk pixel that is foreground, roundings aside


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
        inside = None if insides[0] is None else turned(insides, turns)
        return preprocess(turned(patches, turns), inside, self.how)

    def with_inside(self, cells: Int[np.ndarray, "B 3"]) -> tuple[np.ndarray, Bool[np.ndarray, "B P P"]]:
        """The patches, and which of their pixels are a number, foreground, and not beyond the image's end."""
        return self(cells), np.stack([self._inside(*cell) for cell in cells.tolist()])

    def _inside(self, image: int, y: int, x: int) -> Bool[np.ndarray, "P P"]:
        ref, size = self.images[image], self.how.patch_size
        window = None if self.how.resize else Window(y, x, min(size, ref.shape[0] - y), min(size, ref.shape[1] - x))
        foreground = self.reader.foreground(ref, window)
        inside = np.ones(window[2:] if window else ref.shape[:2], bool) if foreground is None else foreground
        if not np.issubdtype(ref.dtype, np.integer):
            inside = inside & finite(self.reader.image(ref, window))
        if self.how.resize:
            return resize_bands(inside[..., None].astype(np.float32), size, size)[..., 0] > WHOLE
        return np.pad(inside, [(0, size - length) for length in inside.shape])

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


def turned(patches: Sequence[np.ndarray], codes: Sequence[int]) -> Shaped[np.ndarray, "B P P ..."]:
    """Each in its symmetry of the square, in one array."""
    batch = np.empty((len(patches), *patches[0].shape), patches[0].dtype)
    for target, patch, code in zip(batch, patches, codes, strict=True):
        target[...] = flip_and_turn(patch, code)
    return batch


@dataclass(frozen=True)
class CellBatches:
    """Element k, of endlessly many, is the cells (B, 3) that batch k is read at, before their jitter; or rows (B, 1).

    Cells are shuffled anew in every epoch; an epoch's last cells share a batch with the next one's first.
    """

    cells: Int[np.ndarray, "N A"]
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> Int[np.ndarray, "B A"]:
        epochs, places = np.divmod(k * self.batch_size + np.arange(self.batch_size), len(self.cells))
        parts = [permutation(self.seed, int(e), len(self.cells))[places[epochs == e]] for e in np.unique(epochs)]
        return self.cells[np.concatenate(parts)]


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, "N"]:
    return np.random.default_rng([seed, epoch]).permutation(size).astype(np.int32)


@dataclass(frozen=True)
class RowShare:
    """Element k is one process's consecutive share of the rows of batch k; side by side the shares are the batch.

    Raises InputError on creation where the rows cannot be divided evenly.
    """

    batches: Any
    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        shares(self.batch_size, self.process_count)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Int[np.ndarray, "b A"]:
        share = self.batch_size // self.process_count
        return self.batches[k][self.process_index * share : (self.process_index + 1) * share]


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
    share = shares(batch_size, process_count)
    rows = slice(process_index * share, (process_index + 1) * share)
    batches = cast(grain.RandomAccessDataSource, CellBatches(cells, batch_size, seed))
    return grain.MapDataset.source(batches).seed(seed).random_map(ReadBatch(read, augmentation, rows))


@dataclass(frozen=True)
class CellsInOrder:
    """Element k is the cells (B, 3) of batch k of one pass, the last one shorter."""

    cells: Int[np.ndarray, "N 3"]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.cells) // self.batch_size)

    def __getitem__(self, k: int) -> Int[np.ndarray, "B 3"]:
        return self.cells[k * self.batch_size : (k + 1) * self.batch_size]


@dataclass(frozen=True)
class ReadOnce(grain.MapTransform):
    """Some rows of a batch and their pixels that count; where the batch ends early, rows without any."""

    read: ReadPatches
    rows: slice

    def map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        cells, size = np.array(element)[self.rows], self.read.how.patch_size
        shape = (self.rows.stop - self.rows.start, size, size)
        patches, inside = np.zeros((*shape, self.read.how.channels), np.float32), np.zeros(shape, bool)
        if len(cells):
            patches[: len(cells)], inside[: len(cells)] = self.read.with_inside(cells)
        return patches, inside


def every_patch_once(
    cells: Int[np.ndarray, "N 3"], read: ReadPatches, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Batches of (patches (B, P, P, C), inside (B, P, P)) in the order of the images, or a process's share of each."""
    share = shares(batch_size, process_count)
    rows = slice(process_index * share, (process_index + 1) * share)
    batches = cast(grain.RandomAccessDataSource, CellsInOrder(cells, batch_size))
    return grain.MapDataset.source(batches).map(ReadOnce(read, rows))


def shares(batch_size: int, processes: int) -> int:
    """Rows of a batch for each process. Raises InputError where they do not come out even."""
    if batch_size % processes:
        raise InputError(f"trainer.batch_size={batch_size} cannot be divided by {processes} processes")
    return batch_size // processes


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
