"""The input pipeline (Grain): shuffle patch positions, form batches, read, preprocess, augment and prefetch.

Batches are formed inside the MapDataset, so batch k depends only on (seed, k), not on threads or workers, and resuming
is a slice. A batch is processed as a whole, because Python calls per patch would slow down training on few cores.
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

absl_logging.set_verbosity(absl_logging.ERROR)  # Grain warns about an unused profiler on import
import grain.python as grain  # noqa: E402

MapDataset = grain.MapDataset
Batches = grain.DatasetIterator  # yields (B, P, P, C) float32, or a tuple of that and (B, P, P) bool
MIN_COVERAGE = 0.999  # a downsampled pixel counts as foreground if all of it is, up to rounding


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of training patches.

    Attributes:
        jitter_px: Largest random shift of a patch from its grid position, in px.
        codes: Symmetries of the square of which one is applied (see `transforms.flip_and_turn`), such as `MIRROR`.
    """

    jitter_px: int = 0
    codes: tuple[int, ...] = tuple(range(8))


MIRROR = (0, 4)  # as it is, or mirrored left to right
UNCHANGED = (0,)


@runtime_checkable
class PatchReader(Protocol):
    """Reads windows of images and masks: `reader.Reader`, or `scratch.DecodedReader` wrapping one."""

    def image(self, ref: ImageRef, window: Window | None = None) -> np.ndarray:
        """Pixels (h, w, C) in the dtype of the file."""
        ...

    def foreground(self, ref: ImageRef, window: Window | None = None) -> np.ndarray | None:
        """Foreground mask (h, w) as bool; None if the whole image is foreground."""
        ...


@dataclass(frozen=True)
class ReadPatches:
    """Reads and normalises patches, given as cells (image, y, x).

    Attributes:
        images: The images that cells refer to by index.
        preprocessing: Normalisation and patch size.
        reader: Source of the pixels.
        resized: Cache of downsampled images, if whole images are resized to the patch size.
    """

    images: list[ImageRef]
    preprocessing: Preprocessing
    reader: PatchReader
    resized: Scratch | None = None

    def __call__(
        self, cells: Int[np.ndarray, "B 3"], codes: Int[np.ndarray, "B"] | None = None
    ) -> Float[np.ndarray, "B P P C"]:
        """Read normalised patches.

        Args:
            cells: (image, y, x) of each patch (B, 3), in px of the image. For whole images, (y, x) is a shift
                of the resized image, in px.
            codes: Symmetry of the square applied to each patch (see `flip_and_turn`); None applies none.

        Returns:
            Normalised patches (B, P, P, C) in float32.
        """
        turns = [0] * len(cells) if codes is None else codes.tolist()
        if self.preprocessing.resize:
            moved = (shifted(self._resized(image), y, x) for image, y, x in cells.tolist())
            return np.stack([flip_and_turn(patch, turn) for patch, turn in zip(moved, turns, strict=True)])
        patches, insides = zip(*(self._cut(*cell) for cell in cells.tolist()), strict=True)
        inside = None if insides[0] is None else apply_symmetries(insides, turns)
        return preprocess(apply_symmetries(patches, turns), inside, self.preprocessing)

    def with_inside(
        self, cells: Int[np.ndarray, "B 3"]
    ) -> tuple[Float[np.ndarray, "B P P C"], Bool[np.ndarray, "B P P"]]:
        """Read normalised patches and their valid pixels.

        Args:
            cells: (image, y, x) of each patch (B, 3), in px of the image.

        Returns:
            Normalised patches (B, P, P, C), and True for pixels (B, P, P) that are finite, foreground and inside the
            image.
        """
        return self(cells), np.stack([self._inside(*cell) for cell in cells.tolist()])

    def _inside(self, image: int, y: int, x: int) -> Bool[np.ndarray, "P P"]:
        ref, size, resize = self.images[image], self.preprocessing.patch_size, self.preprocessing.resize
        window = None if resize else Window(y, x, min(size, ref.shape[0] - y), min(size, ref.shape[1] - x))
        foreground = self.reader.foreground(ref, window)
        inside = np.ones(window[2:] if window else ref.shape[:2], bool) if foreground is None else foreground
        if not np.issubdtype(ref.dtype, np.integer):
            inside = inside & finite(self.reader.image(ref, window))
        if resize:
            return resize_bands(inside[..., None].astype(np.float32), size, size)[..., 0] > MIN_COVERAGE
        return np.pad(inside, [(0, size - length) for length in inside.shape])

    def _cut(self, image: int, y: int, x: int) -> tuple[np.ndarray, np.ndarray | None]:
        ref, size = self.images[image], self.preprocessing.patch_size
        window = Window(y, x, min(size, ref.shape[0] - y), min(size, ref.shape[1] - x))
        foreground = self.reader.foreground(ref, window)
        inside = None if foreground is None else cut(foreground, 0, 0, size)
        return cut(self.reader.image(ref, window), 0, 0, size), inside

    def _resized(self, image: int) -> np.ndarray:
        ref, size = self.images[image], self.preprocessing.patch_size

        def make() -> np.ndarray:
            whole = preprocess(self.reader.image(ref), self.reader.foreground(ref), self.preprocessing)
            return resize_bands(whole, size, size)

        return make() if self.resized is None else self.resized.get(image, make)


def shifted(patch: Shaped[np.ndarray, "P P C"], down: int, right: int) -> Shaped[np.ndarray, "P P C"]:
    """Shift a patch; the borders are filled with the nearest pixels.

    Args:
        patch: Patch.
        down: Shift of the content downwards, px.
        right: Shift of the content to the right, px.

    Returns:
        The shifted patch.
    """
    rows, columns = (np.clip(np.arange(len(patch)) - move, 0, len(patch) - 1) for move in (down, right))
    return patch[rows][:, columns] if down or right else patch


def apply_symmetries(patches: Sequence[np.ndarray], codes: Sequence[int]) -> Shaped[np.ndarray, "B P P ..."]:
    """Apply a symmetry of the square (see `flip_and_turn`) to each patch (P, P, ...) and stack the results."""
    batch = np.empty((len(patches), *patches[0].shape), patches[0].dtype)
    for target, patch, code in zip(batch, patches, codes, strict=True):
        target[...] = flip_and_turn(patch, code)
    return batch


@dataclass(frozen=True)
class CellBatches:
    """An endless sequence of shuffled batches of cells.

    Element k holds the cells (B, 3) of batch k, before jitter, or row indices (B, 1). Every epoch has its own order; a
    batch may contain the end of one epoch and the start of the next.

    Attributes:
        cells: (image, y, x) of every patch (N, 3), or row indices (N, 1).
        batch_size: Cells per batch B.
        seed: Seed of the shuffling.
    """

    cells: Int[np.ndarray, "N A"]
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> Int[np.ndarray, "B A"]:
        epochs, positions = np.divmod(k * self.batch_size + np.arange(self.batch_size), len(self.cells))
        parts = [permutation(self.seed, int(e), len(self.cells))[positions[epochs == e]] for e in np.unique(epochs)]
        return self.cells[np.concatenate(parts)]


@lru_cache(maxsize=8)
def permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, "N"]:
    """Order of the `size` cells in an epoch; cached, because consecutive batches share it."""
    return np.random.default_rng([seed, epoch]).permutation(size).astype(np.int32)


@dataclass(frozen=True)
class RowShare:
    """The part of every batch that one process reads: element k holds consecutive rows of batch k.

    Concatenated over the processes, the parts are the whole batch.

    Attributes:
        batches: Indexable batches of rows.
        batch_size: Rows per batch, over all processes.
        process_index: Index of this process.
        process_count: Number of processes.

    Raises:
        InputError: The batch size is not divisible by the number of processes.
    """

    batches: Any
    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        rows_per_process(self.batch_size, self.process_count)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Int[np.ndarray, "b ..."]:
        count = self.batch_size // self.process_count
        return self.batches[k][self.process_index * count : (self.process_index + 1) * count]


@dataclass(frozen=True)
class ReadBatch(grain.RandomMapTransform):
    """Reads the patches of a batch with random jitter and symmetries.

    Random numbers are drawn for the whole batch, so the result does not depend on the number of processes.

    Attributes:
        read: Reads patches.
        augmentation: The random transformations.
        rows: Rows of the batch that this process reads.
    """

    read: ReadPatches
    augmentation: Augmentation
    rows: slice

    def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Read the patches (B, P, P, C) of cells (B, 3) with random jitter and symmetries."""
        cells, jitter = np.array(element), self.augmentation.jitter_px
        moves = rng.integers(-jitter, jitter + 1, size=(len(cells), 2))
        codes = np.array(self.augmentation.codes)[rng.integers(len(self.augmentation.codes), size=len(cells))]
        if self.read.preprocessing.resize:
            cells[:, 1:] = moves
        else:
            shapes = np.array([self.read.images[image].shape[:2] for image in cells[:, 0]])
            limits = np.maximum(shapes - self.read.preprocessing.patch_size, 0)
            cells[:, 1:] = np.clip(cells[:, 1:] + moves, 0, limits)
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
    """Make the endless dataset of training batches.

    Args:
        cells: (image, y, x) of every patch (N, 3), in px.
        read: Reads patches.
        augmentation: Random transformations of the patches.
        batch_size: Patches per batch, over all processes.
        seed: Seed of the shuffling and the augmentation.
        process_index: Index of this process.
        process_count: Number of processes; each reads consecutive rows of every batch. Concatenated, these are
            bit-identical to the batch of a single process.

    Returns:
        Element k holds the patches (B, P, P, C) of batch k in float32.

    Raises:
        InputError: The batch size is not divisible by the number of processes.
    """
    count = rows_per_process(batch_size, process_count)
    rows = slice(process_index * count, (process_index + 1) * count)
    batches = cast(grain.RandomAccessDataSource, CellBatches(cells, batch_size, seed))
    return grain.MapDataset.source(batches).seed(seed).random_map(ReadBatch(read, augmentation, rows))


@dataclass(frozen=True)
class CellsInOrder:
    """A single pass over the cells: element k holds the cells (B, 3) of batch k; the last batch may be shorter.

    Attributes:
        cells: (image, y, x) of every patch (N, 3), in px.
        batch_size: Cells per batch B.
    """

    cells: Int[np.ndarray, "N 3"]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.cells) // self.batch_size)

    def __getitem__(self, k: int) -> Int[np.ndarray, "B 3"]:
        return self.cells[k * self.batch_size : (k + 1) * self.batch_size]


@dataclass(frozen=True)
class ReadOnce(grain.MapTransform):
    """Reads rows of a batch and their valid pixels; a shorter last batch is padded with rows without valid pixels.

    Attributes:
        read: Reads patches.
        rows: Rows of the batch that this process reads.
    """

    read: ReadPatches
    rows: slice

    def map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read the patches (B, P, P, C) of cells (B, 3) and their valid pixels (B, P, P)."""
        cells, size = np.array(element)[self.rows], self.read.preprocessing.patch_size
        shape = (self.rows.stop - self.rows.start, size, size)
        patches, inside = np.zeros((*shape, self.read.preprocessing.channels), np.float32), np.zeros(shape, bool)
        if len(cells):
            patches[: len(cells)], inside[: len(cells)] = self.read.with_inside(cells)
        return patches, inside


def every_patch_once(
    cells: Int[np.ndarray, "N 3"], read: ReadPatches, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """Make the dataset of a single pass over all patches, in the order of the images.

    Args:
        cells: (image, y, x) of every patch (N, 3), in px.
        read: Reads patches.
        batch_size: Patches per batch, over all processes.
        process_index: Index of this process.
        process_count: Number of processes; each reads consecutive rows of every batch.

    Returns:
        Element k holds the patches (B, P, P, C) of batch k and their valid pixels (B, P, P).

    Raises:
        InputError: The batch size is not divisible by the number of processes.
    """
    count = rows_per_process(batch_size, process_count)
    rows = slice(process_index * count, (process_index + 1) * count)
    batches = cast(grain.RandomAccessDataSource, CellsInOrder(cells, batch_size))
    return grain.MapDataset.source(batches).map(ReadOnce(read, rows))


def rows_per_process(batch_size: int, processes: int) -> int:
    """Number of batch rows that each process reads.

    Args:
        batch_size: Patches per batch, over all processes.
        processes: Number of processes.

    Raises:
        InputError: The batch size is not divisible by the number of processes.
    """
    if batch_size % processes:
        raise InputError(
            f"trainer.batch_size={batch_size} is not divisible by the number of processes, {processes}; "
            "give a multiple of it"
        )
    return batch_size // processes


def iterate(dataset: grain.MapDataset, start: int, *, threads: int, prefetch: int, workers: int = 0) -> Batches:
    """Iterate over batches, read ahead by threads and optionally by worker processes.

    Args:
        dataset: The batches.
        start: Index of the first batch, such as the training step to resume from.
        threads: Reading threads; 0 reads on demand.
        prefetch: Batches to read ahead.
        workers: Worker processes; 0 reads in this process.

    Returns:
        Iterator over the batches.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
    batches = dataset[start:].to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # otherwise Grain's workers crash when they read absl flags
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)


def evenly_spaced(items: Shaped[np.ndarray, "N ..."], count: int) -> Shaped[np.ndarray, "n ..."]:
    """Select at most `count` evenly spaced items, such as the patches for the validation loss.

    Args:
        items: Array with N items along its first axis.
        count: Largest number of items to select.

    Returns:
        The selected items, in order.
    """
    return items[np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]
