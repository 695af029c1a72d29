"""Whole images in small squares, read once, and batches of them for several networks at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.ndimage import binary_opening

from pulmo_jax.data.images import ImageRef, Reader
from pulmo_jax.data.letterbox import into_square, letterbox_of, to_gray
from pulmo_jax.data.pipeline import CellBatches, MapDataset, RowShare, grain
from pulmo_jax.data.samples import cache_folder
from pulmo_jax.data.scratch import Scratch
from pulmo_jax.data.transforms import resize_bands
from pulmo_jax.types import Window

BRIGHT, FEW = 0.1, 0.02  # of the range of grays: what is no border; of a row or column: so many such pixels
LEAST_SIDE = 0.2  # of the image that is left of it at least


def content_window(image: Shaped[np.ndarray, "H W C"]) -> Window:
    """What is left of an image without the dark border around its content; all of it where that is no border."""
    gray = to_gray(image)
    low, high = np.percentile(gray, [1, 99])
    bright = binary_opening(gray > low + BRIGHT * (high - low))  # specks and letters are no content
    spans = []
    for axis, length in ((1, gray.shape[0]), (0, gray.shape[1])):
        filled = np.flatnonzero(bright.mean(axis) > FEW)
        inside = filled.size > LEAST_SIDE * length
        spans.append((int(filled[0]), int(filled[-1]) + 1) if inside else (0, length))
    (top, bottom), (left, right) = spans
    return Window(top, left, bottom - top, right - left)


def square_of(image: Shaped[np.ndarray, "H W C"], size: int, crop: bool) -> Float[np.ndarray, "S S"]:
    """The image, or its content, in gray in a square; file's units."""
    y, x, h, w = window_of(image, crop)
    return into_square(image[y : y + h, x : x + w], size)


def window_of(image: Shaped[np.ndarray, "H W C"], crop: bool) -> Window:
    return content_window(image) if crop else Window(0, 0, *image.shape[:2])


def onto_image(square: Float[np.ndarray, "S S"], shape: tuple[int, ...], window: Window) -> Float[np.ndarray, "H W"]:
    """A map of a square back where its pixels came from, 0 around the window that was cut out."""
    y, x, h, w = window
    (top, left), (tall, wide) = letterbox_of((h, w), len(square))
    inside = square[top : top + round(h * tall), left : left + round(w * wide)]
    out = np.zeros(shape[:2], np.float32)
    out[y : y + h, x : x + w] = resize_bands(inside[..., None].astype(np.float32), h, w)[..., 0]
    return out


@dataclass(frozen=True)
class Squares:
    """Images in squares of `size` px, each read when first asked for and kept in a temporary file without a name."""

    refs: Sequence[ImageRef]
    size: int
    crop: bool
    reader: Reader
    kept: Scratch
    places: Int[np.ndarray, "N"]  # in `kept`

    @staticmethod
    def empty(refs: Sequence[ImageRef], size: int, crop: bool, reader: Reader) -> "Squares":
        kept = Scratch([(size, size)] * len(refs), [np.dtype(np.float32)] * len(refs), cache_folder())
        return Squares(refs, size, crop, reader, kept, np.arange(len(refs)))

    def of(self, rows: Int[np.ndarray, "_"]) -> "Squares":
        """Some of them."""
        return replace(self, refs=[self.refs[row] for row in rows], places=self.places[rows])

    def get(self, row: int, image: Shaped[np.ndarray, "H W C"] | None = None) -> Float[np.ndarray, "S S"]:
        """Not to be written to. image: given where it has been read already. Raises InputError for a file that cannot
        be read."""

        def make() -> np.ndarray:
            return square_of(self.reader.image(self.refs[row]) if image is None else image, self.size, self.crop)

        return self.kept.get(int(self.places[row]), make)

    def stack(self, rows: Int[np.ndarray, "*b"]) -> Float[np.ndarray, "*b S S"]:
        out = np.empty((rows.size, self.size, self.size), np.float32)
        for square, row in zip(out, rows.ravel().tolist(), strict=True):
            square[...] = self.get(row)
        return out.reshape(*rows.shape, self.size, self.size)


@dataclass(frozen=True)
class MemberRows:
    """Element k, of endlessly many, is the rows (B, M) of batch k: each column one network's own, shuffled in every
    epoch of its own."""

    columns: list[CellBatches]

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, k: int) -> Int[np.ndarray, "B M"]:
        return np.stack([column[k][:, 0] for column in self.columns], axis=1)


@dataclass(frozen=True)
class ReadSquares(grain.MapTransform):
    """Rows (B, M) -> images (B, M, S, S) and their labels (B, M)."""

    stack: Callable[[np.ndarray], np.ndarray]
    labels: Int[np.ndarray, "N"]

    def map(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, element: Int[np.ndarray, "B M"]
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(element)
        return self.stack(rows), self.labels[rows]


def member_rows(training: Sequence[Int[np.ndarray, "_"]], batch_size: int, seeds: Sequence[int]) -> MemberRows:
    """training: the rows that each network learns from."""
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
    """Batches for all networks, or a process's share of the rows of each."""
    share = RowShare(rows, batch_size, process_index, process_count)
    return MapDataset.source(cast(grain.RandomAccessDataSource, share)).map(ReadSquares(squares.stack, labels))
