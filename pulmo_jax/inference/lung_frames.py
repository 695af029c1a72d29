"""Warp images of any size, channels and bit depth into the lung frame, and maps of the frame back into the image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tifffile
from jaxtyping import Array, Float, Shaped
from scipy.ndimage import map_coordinates

from pulmo_jax.core.lung_frame import LungFrame, source_points, to_frame
from pulmo_jax.host.files import atomically

CHUNK_PX = 2**16  # pixels mapped per call of the compiled program


def into_frame(
    image: Shaped[np.ndarray, "H W C"], points: Float[np.ndarray, "K 2"], frame: LungFrame
) -> Shaped[np.ndarray, "S S C"]:
    """Warp an image into the lung frame by the piecewise-affine warp.

    An image with many more pixels than the frame is first downsampled by block means.

    Args:
        image: Image.
        points: Landmarks (y, x) in pixels of the image.
        frame: Lung frame.

    Returns:
        The aligned image in the data type of the input; 0 where the frame extends beyond the image.
    """
    factor = max(1, int(spacing(points, frame)))
    small = block_means(image, factor)
    positions = positions_in_image(jnp.asarray((points + 0.5) / factor - 0.5, jnp.float32), frame)
    warped = sample(small, np.asarray(positions), 0.0)
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        return np.clip(np.rint(warped), limits.min, limits.max).astype(image.dtype)
    return np.asarray(warped).astype(image.dtype)


def spacing(points: Float[np.ndarray, "K 2"], frame: LungFrame) -> float:
    """Size of a frame pixel in pixels of the image, from the sizes of the two shapes.

    Args:
        points: Landmarks (y, x) in pixels of the image.
        frame: Lung frame.

    Returns:
        Pixels of the image per pixel of the frame.
    """
    return float(np.linalg.norm(points - points.mean(0)) / np.linalg.norm(frame.points - frame.points.mean(0)))


def block_means(image: Shaped[np.ndarray, "H W C"], factor: int) -> Float[np.ndarray, "h w C"]:
    """Downsample an image by block means.

    Args:
        image: Image.
        factor: Side of a block in pixels; blocks at the lower and right edges may be smaller.

    Returns:
        Downsampled image.
    """
    rows, columns = (np.arange(0, side, factor) for side in image.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float32), rows, axis=0), columns, axis=1)
    counts = np.outer(*(np.diff([*edges, side]) for edges, side in zip((rows, columns), image.shape, strict=False)))
    return sums / counts[..., None].astype(np.float32)


@jax.jit
def positions_in_image(points: Float[Array, "K 2"], frame: LungFrame) -> Float[Array, "S S 2"]:
    """Positions in the image of all pixels of the frame.

    Args:
        points: Landmarks (y, x) in pixels of the image.
        frame: Lung frame.

    Returns:
        Positions (y, x) in pixels of the image.
    """
    return source_points(points, frame)


def sample(
    image: Shaped[np.ndarray, "H W C"], positions: Float[np.ndarray, "*P 2"], fill: float
) -> Float[np.ndarray, "*P C"]:
    """Sample all channels of an image by bilinear interpolation.

    Uses SciPy, because JAX would compile a program for every image size.

    Args:
        image: Image.
        positions: Positions (y, x) in pixels.
        fill: Value outside the image.

    Returns:
        Values of shape (*P, C).
    """
    coordinates = np.moveaxis(positions, -1, 0)
    bands = [map_coordinates(image[..., band], coordinates, order=1, mode="nearest") for band in range(image.shape[-1])]
    outside = np.any((positions < -0.5) | (positions > np.array(image.shape[:2]) - 0.5), axis=-1)
    return np.where(outside[..., None], np.float32(fill), np.stack(bands, -1))


def out_of_frame(
    aligned: Float[np.ndarray, "S S"], points: Float[np.ndarray, "K 2"], frame: LungFrame, shape: tuple[int, int]
) -> Float[np.ndarray, "H W"]:
    """Warp a map from the lung frame back into the image.

    Args:
        aligned: Map in the frame.
        points: Landmarks (y, x) in pixels of the image.
        frame: Lung frame.
        shape: Height and width of the image.

    Returns:
        The map in the image; NaN outside the frame.
    """
    pixels = np.moveaxis(np.indices(shape, np.float32), 0, -1).reshape(-1, 2)
    positions = [
        np.asarray(
            positions_in_frame(
                jnp.asarray(pad_chunk(pixels[first : first + CHUNK_PX])), jnp.asarray(points, jnp.float32), frame
            )
        )
        for first in range(0, len(pixels), CHUNK_PX)
    ]
    return sample(aligned[..., None], np.concatenate(positions)[: len(pixels)], np.nan).reshape(shape)


@jax.jit
def positions_in_frame(
    pixels: Float[Array, "n 2"], points: Float[Array, "K 2"], frame: LungFrame
) -> Float[Array, "n 2"]:
    """Positions in the frame of pixels of the image.

    Args:
        pixels: Pixels (y, x) of the image.
        points: Landmarks (y, x) in pixels of the image.
        frame: Lung frame.

    Returns:
        Positions (y, x) in pixels of the frame.
    """
    return to_frame(pixels, points, frame)


def pad_chunk(pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "m 2"]:
    """Pad to `CHUNK_PX` pixels, so that a single compiled program serves all images.

    Args:
        pixels: At most `CHUNK_PX` pixels (y, x).

    Returns:
        `CHUNK_PX` pixels; the padding is 0.
    """
    return np.concatenate([pixels, np.zeros((CHUNK_PX - len(pixels), 2), pixels.dtype)])


def write_image(path: Path, image: Shaped[np.ndarray, "H W C"], description: str = "") -> None:
    """Write an image as a deflate-compressed TIFF; the file is replaced atomically.

    Args:
        path: Output file.
        image: Image.
        description: Text for the tag ImageDescription; "": none.
    """
    write_pages(path, image[None], description)


def description_of(low: Sequence[int], total: int) -> str:
    """Description of an aligned image that tells of its landmarks of low quality.

    Args:
        low: Number of landmarks of low quality of each page.
        total: Number of landmarks K.

    Returns:
        One line; "" if all landmarks are of good quality.
    """
    pages = [f"{count} of {total}{f' on page {i}' if len(low) > 1 else ''}" for i, count in enumerate(low) if count]
    return f"aligned by landmarks of low quality: {', '.join(pages)}" if pages else ""


def write_pages(path: Path, pages: Shaped[np.ndarray, "N H W C"], description: str = "") -> None:
    """Write images of equal shape as the pages of a deflate-compressed TIFF; the file is replaced atomically.

    Args:
        path: Output file.
        pages: Images.
        description: Text for the tag ImageDescription of the first page; "": none.
    """
    channels = pages.shape[-1]
    options: dict[str, Any] = {"photometric": "rgb" if channels == 3 else "minisblack"}
    if channels > 1:
        options["planarconfig"] = "contig"  # otherwise readers may mistake channels for rows
    if channels not in (1, 3):
        options["extrasamples"] = ("unspecified",) * (channels - 1)
    if description:
        options["description"] = description
    pixels = pages[..., 0] if channels == 1 else pages
    pixels = pixels[0] if len(pages) == 1 else pixels
    atomically(path, lambda temporary: tifffile.imwrite(temporary, pixels, compression="zlib", **options))
