"""Whole images resized to small squares, and batches of them for training several networks in parallel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.ndimage import binary_opening

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.letterbox import fit_letterbox, into_square, to_gray
from pulmo_jax.data.pipeline import CellBatches, MapDataset, RowShare, grain
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scratch import Scratch
from pulmo_jax.data.transforms import finite, resize_bands
from pulmo_jax.host.cache import cache_folder
from pulmo_jax.types import Window

MIN_BRIGHTNESS = 0.1  # of the grey-level range: brighter pixels are content
MIN_CONTENT = 0.02  # fraction of content pixels in a row or column that is not border
MIN_SIDE = 0.2  # smallest fraction of the image side that remains; otherwise the image is not cropped


def content_window(image: Shaped[np.ndarray, "H W C"]) -> Window:
    """Find the content of an image, without a dark border around it.

    Args:
        image: Pixels (H, W, C) in any unit.

    Returns:
        Window of the content in px; the whole image if there is no such border.
    """
    gray = to_gray(image)
    low, high = np.percentile(gray, [1, 99])
    known = finite(image)  # missing pixels, such as a transparent border, are not content
    bright = binary_opening(known & (gray > low + MIN_BRIGHTNESS * (high - low)))  # removes specks and letters
    spans = []
    for axis, length in ((1, gray.shape[0]), (0, gray.shape[1])):
        content = np.flatnonzero(bright.mean(axis) > MIN_CONTENT)
        crop = content.size > MIN_SIDE * length
        spans.append((int(content[0]), int(content[-1]) + 1) if crop else (0, length))
    (top, bottom), (left, right) = spans
    return Window(top, left, bottom - top, right - left)


def square_of(image: Shaped[np.ndarray, "H W C"], size: int, crop: bool) -> Float[np.ndarray, "S S"]:
    """Convert an image, or its content, to grey and resize it to fit a square.

    Args:
        image: Pixels (H, W, C) in any unit.
        size: Side of the square in px.
        crop: Whether to remove a dark border first (see `content_window`).

    Returns:
        Grey image (S, S) in the unit of the input.
    """
    y, x, h, w = window_of(image, crop)
    return into_square(image[y : y + h, x : x + w], size)


def window_of(image: Shaped[np.ndarray, "H W C"], crop: bool) -> Window:
    """Window of the image that `square_of` uses, in px."""
    return content_window(image) if crop else Window(0, 0, *image.shape[:2])


def onto_image(square: Float[np.ndarray, "S S"], shape: tuple[int, ...], window: Window) -> Float[np.ndarray, "H W"]:
    """Map values of a square back to the original image.

    Args:
        square: Values on the square (S, S), such as a saliency map.
        shape: Shape (H, W, ...) of the original image.
        window: Window of the image that the square shows, in px.

    Returns:
        Values on the image (H, W), 0 outside the window.
    """
    y, x, h, w = window
    (top, left), (scale_y, scale_x) = fit_letterbox((h, w), len(square))
    inside = square[top : top + round(h * scale_y), left : left + round(w * scale_x)]
    out = np.zeros(shape[:2], np.float32)
    out[y : y + h, x : x + w] = resize_bands(inside[..., None].astype(np.float32), h, w)[..., 0]
    return out


@dataclass(frozen=True)
class Squares:
    """Images resized to squares, each read on first access and cached in a temporary file.

    Attributes:
        refs: The images.
        size: Side of the squares in px.
        crop: Whether to remove dark borders first (see `content_window`).
        reader: Reads the images.
        cache: The cached squares.
        slots: Index of each image in `cache` (N,).
    """

    refs: Sequence[ImageRef]
    size: int
    crop: bool
    reader: Reader
    cache: Scratch
    slots: Int[np.ndarray, "N"]

    @staticmethod
    def empty(refs: Sequence[ImageRef], size: int, crop: bool, reader: Reader) -> "Squares":
        """Make an empty cache for images.

        Args:
            refs: The images.
            size: Side of the squares in px.
            crop: Whether to remove dark borders first.
            reader: Reads the images.

        Raises:
            InputError: The disk has not enough space.
        """
        cache = Scratch([(size, size)] * len(refs), [np.dtype(np.float32)] * len(refs), cache_folder())
        return Squares(refs, size, crop, reader, cache, np.arange(len(refs)))

    def subset(self, rows: Int[np.ndarray, "_"]) -> "Squares":
        """Select images; the cache is shared.

        Args:
            rows: Row indices of the images.

        Returns:
            The selected images.
        """
        return replace(self, refs=[self.refs[row] for row in rows], slots=self.slots[rows])

    def get(self, row: int, image: Shaped[np.ndarray, "H W C"] | None = None) -> Float[np.ndarray, "S S"]:
        """Get one square.

        Args:
            row: Row index of the image.
            image: Its pixels (H, W, C), if already read.

        Returns:
            Read-only grey image (S, S) in the unit of the file.

        Raises:
            InputError: The file cannot be read.
        """

        def make() -> np.ndarray:
            return square_of(self.reader.image(self.refs[row]) if image is None else image, self.size, self.crop)

        return self.cache.get(int(self.slots[row]), make)

    def stack(self, rows: Int[np.ndarray, "*b"]) -> Float[np.ndarray, "*b S S"]:
        """Stack the squares of images into a new array.

        Args:
            rows: Row indices of the images.

        Returns:
            Squares (*b, S, S).
        """
        out = np.empty((rows.size, self.size, self.size), np.float32)
        for square, row in zip(out, rows.ravel().tolist(), strict=True):
            square[...] = self.get(row)
        return out.reshape(*rows.shape, self.size, self.size)


@dataclass(frozen=True)
class MemberRows:
    """An endless sequence of batches of row indices: element k is batch k (B, M), with one column per network.

    Attributes:
        columns: Batches of each of the M networks, shuffled independently.
    """

    columns: list[CellBatches]

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, k: int) -> Int[np.ndarray, "B M"]:
        return np.stack([column[k][:, 0] for column in self.columns], axis=1)


@dataclass(frozen=True)
class ReadSquares(grain.MapTransform):
    """Maps row indices (B, M) to images (B, M, S, S) and labels (B, M).

    Attributes:
        stack: Maps row indices to images.
        labels: Class index of each image (N,).
    """

    stack: Callable[[np.ndarray], np.ndarray]
    labels: Int[np.ndarray, "N"]

    def map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: Int[np.ndarray, "B M"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read the images (B, M, S, S) and labels (B, M) of a batch."""
        rows = np.asarray(element)
        return self.stack(rows), self.labels[rows]


def member_rows(training: Sequence[Int[np.ndarray, "_"]], batch_size: int, seeds: Sequence[int]) -> MemberRows:
    """Make the batches of row indices of M networks.

    Args:
        training: Row indices of the training images of each network.
        batch_size: Images per batch and network B.
        seeds: Seed of the shuffling of each network.

    Returns:
        Element k holds the row indices (B, M) of batch k.
    """
    parts = zip(training, seeds, strict=True)
    return MemberRows([CellBatches(rows[:, None].astype(np.int32), batch_size, seed) for rows, seed in parts])


def member_batches(
    squares: Squares,
    labels: Int[np.ndarray, "N"],
    rows: MemberRows,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> MapDataset:
    """Make the endless dataset of training batches of M networks.

    Args:
        squares: The N images.
        labels: Class index of each image (N,).
        rows: Row indices of the batches.
        batch_size: Images per batch and network B.
        process_index: Index of this process.
        process_count: Number of processes; each reads consecutive rows of every batch.

    Returns:
        Element k holds the images (B, M, S, S) and labels (B, M) of batch k.

    Raises:
        InputError: The batch size is not divisible by the number of processes.
    """
    share = RowShare(rows, batch_size, process_index, process_count)
    return MapDataset.source(cast(grain.RandomAccessDataSource, share)).map(ReadSquares(squares.stack, labels))
