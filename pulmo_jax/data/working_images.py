"""Images as landmark methods see them: letterboxed into squares of one size, in a temporary file."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from pulmo_jax.data.images import ImageRef, Reader, Skipped
from pulmo_jax.data.letterbox import Letterbox, into_square, letterbox_of
from pulmo_jax.data.samples import cache_folder
from pulmo_jax.data.scratch import room
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class WorkingImages:
    """Images in squares of `size` px. pixels: (N, S, S) float32, file's units, in a temporary file without a name."""

    refs: tuple[ImageRef, ...]
    pixels: np.ndarray
    boxes: tuple[Letterbox, ...]

    def to_square(self, points: Float[np.ndarray, "N K 2"]) -> Float[np.ndarray, "N K 2"]:
        return np.stack([box.to_square(shape) for box, shape in zip(self.boxes, points, strict=True)])

    def to_images(self, points: Float[np.ndarray, "N K 2"]) -> Float[np.ndarray, "N K 2"]:
        return np.stack([box.to_image(shape) for box, shape in zip(self.boxes, points, strict=True)])

    @property
    def scales(self) -> Float[np.ndarray, "N 2"]:
        """Working px in one px of each image, (y, x)."""
        return np.array([box.scale for box in self.boxes])


def read_working(
    refs: Sequence[ImageRef], size: int, max_image_mb: int, threads: int, track: Any
) -> tuple[WorkingImages, list[Skipped]]:
    """Every image once, by threads, into a file that vanishes with the process; and those that could not be read."""
    reader = Reader(max_image_mb)

    def square(ref: ImageRef) -> np.ndarray | Skipped:
        try:
            return into_square(reader.image(ref), size)
        except InputError as error:
            return Skipped(ref.title, str(error))

    pixels = square_room(len(refs), size)
    kept, skipped = [], []
    with ThreadPoolExecutor(threads) as pool:
        for ref, result in zip(refs, track(pool.map(square, refs), len(refs)), strict=True):
            if isinstance(result, Skipped):
                skipped.append(result)
            else:
                pixels[len(kept)] = result
                kept.append(ref)
    reader.close()
    boxes = tuple(letterbox_of(ref.shape, size) for ref in kept)
    return WorkingImages(tuple(kept), pixels[: len(kept)], boxes), skipped


def square_room(count: int, size: int) -> Float[np.ndarray, "N S S"]:
    """In a temporary file, so that memory does not grow with the number of images."""
    folder, needed = cache_folder(), count * size**2 * 4
    try:
        return np.frombuffer(room(folder, max(needed, 1)), np.float32, count * size**2).reshape(count, size, size)
    except OSError as error:
        raise InputError(
            f"{folder}: no room for {needed / 2**20:.0f} MiB of shrunk images ({error.strerror}); make "
            "room or give another folder with PULMO_JAX_CACHE"
        ) from error


def working_image(ref: ImageRef, pixels: Shaped[np.ndarray, "H W C"], size: int) -> WorkingImages:
    """One image in a square of `size` px."""
    return WorkingImages((ref,), into_square(pixels, size)[None], (letterbox_of(ref.shape, size),))
