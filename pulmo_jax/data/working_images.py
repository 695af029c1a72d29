"""Working images of landmark methods: grey images letterboxed into squares, in a temporary file."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from pulmo_jax.data.images import ImageRef, Skipped
from pulmo_jax.data.letterbox import Letterbox, fit_letterbox, into_square
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.scratch import allocate_file
from pulmo_jax.data.sources.formats import Format
from pulmo_jax.host.cache import cache_folder
from pulmo_jax.types import InputError


@dataclass(frozen=True)
class WorkingImages:
    """Images letterboxed into squares.

    Attributes:
        refs: The N images.
        pixels: Grey pixels (N, S, S) in the unit of the files.
        boxes: Position of each image in its square.
    """

    refs: tuple[ImageRef, ...]
    pixels: Float[np.ndarray, "N S S"]
    boxes: tuple[Letterbox, ...]

    def to_square(self, points: Float[np.ndarray, "N K 2"]) -> Float[np.ndarray, "N K 2"]:
        """Transform landmarks (y, x) from px of the images to px of the squares."""
        return np.stack([box.to_square(shape) for box, shape in zip(self.boxes, points, strict=True)])

    def to_images(self, points: Float[np.ndarray, "N K 2"]) -> Float[np.ndarray, "N K 2"]:
        """Transform landmarks (y, x) from px of the squares to px of the images."""
        return np.stack([box.to_image(shape) for box, shape in zip(self.boxes, points, strict=True)])

    @property
    def scales(self) -> Float[np.ndarray, "N 2"]:
        """Scale factors (y, x) of each image, px of the square per px of the image."""
        return np.array([box.scale for box in self.boxes])


def read_working(
    refs: Sequence[ImageRef],
    size: int,
    max_image_mb: int,
    threads: int,
    track: Any,
    formats: Sequence[Format] = (),
) -> tuple[WorkingImages, list[Skipped]]:
    """Read images and letterbox them into squares in a temporary file.

    Args:
        refs: The images.
        size: Side of the squares in px.
        max_image_mb: Limit on the decoded size of a page in MiB.
        threads: Number of reading threads.
        track: Wraps an iterable of known length to show progress.
        formats: User-defined image formats, in addition to the built-in ones.

    Returns:
        The working images, and the images that cannot be read with the reason.

    Raises:
        InputError: The disk has not enough space.
    """
    reader = Reader(max_image_mb, formats)

    def square(ref: ImageRef) -> np.ndarray | Skipped:
        try:
            return into_square(reader.image(ref), size)
        except InputError as error:
            return Skipped(ref.title, str(error))

    pixels = allocate_squares(len(refs), size)
    kept, skipped = [], []
    with ThreadPoolExecutor(threads) as pool:
        for ref, result in zip(refs, track(pool.map(square, refs), len(refs)), strict=True):
            if isinstance(result, Skipped):
                skipped.append(result)
            else:
                pixels[len(kept)] = result
                kept.append(ref)
    reader.close()
    boxes = tuple(fit_letterbox(ref.shape, size) for ref in kept)
    return WorkingImages(tuple(kept), pixels[: len(kept)], boxes), skipped


def allocate_squares(count: int, size: int) -> Float[np.ndarray, "N S S"]:
    """Allocate images in a temporary file, so that memory use does not grow with their number.

    Args:
        count: Number of images N.
        size: Side S of the squares in px.

    Returns:
        Array (N, S, S) backed by the file.

    Raises:
        InputError: The disk has not enough space.
    """
    folder, needed = cache_folder(), count * size**2 * 4
    try:
        buffer = allocate_file(folder, max(needed, 1))
    except OSError as error:
        raise InputError(
            f"{folder}: no space for {needed / 2**20:.0f} MiB of downsampled images ({error.strerror}); free some or "
            "set another folder with PULMO_JAX_CACHE"
        ) from error
    return np.frombuffer(buffer, np.float32, count * size**2).reshape(count, size, size)


def working_image(ref: ImageRef, pixels: Shaped[np.ndarray, "H W C"], size: int) -> WorkingImages:
    """Letterbox a single image into a square.

    Args:
        ref: The image.
        pixels: Its pixels (H, W, C).
        size: Side of the square in px.
    """
    return WorkingImages((ref,), into_square(pixels, size)[None], (fit_letterbox(ref.shape, size),))
