"""Images in the lung frame, in their own bands and depth, and maps of the frame back in the image."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tifffile
from jaxtyping import Float, Shaped
from scipy.ndimage import map_coordinates

from pulmo_jax.core.lung_frame import LungFrame, source_points, to_frame
from pulmo_jax.host.files import atomically

AT_ONCE = 2**16  # pixels


def into_frame(
    image: Shaped[np.ndarray, "H W C"], points: Float[np.ndarray, "K 2"], frame: LungFrame
) -> Shaped[np.ndarray, "S S C"]:
    """(S, S, C) in the image's dtype: piecewise affine, 0 where the frame shows what is outside of the image.

    points: the landmarks, px of the image. An image with many more pixels than the frame is averaged down before.
    """
    factor = max(1, int(spacing(points, frame)))
    small = shrunk(image, factor)
    places = places_in_image(jnp.asarray((points + 0.5) / factor - 0.5, jnp.float32), frame)
    warped = sampled(small, np.asarray(places), 0.0)
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        return np.clip(np.rint(warped), limits.min, limits.max).astype(image.dtype)
    return np.asarray(warped).astype(image.dtype)


def spacing(points: Float[np.ndarray, "K 2"], frame: LungFrame) -> float:
    """How many px of the image one px of the frame takes, by the size of the shapes."""
    return float(np.linalg.norm(points - points.mean(0)) / np.linalg.norm(frame.points - frame.points.mean(0)))


def shrunk(image: Shaped[np.ndarray, "H W C"], factor: int) -> Float[np.ndarray, "h w C"]:
    """Means of blocks; the last ones, where the sides are no multiples, of fewer pixels."""
    rows, columns = (np.arange(0, side, factor) for side in image.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float32), rows, axis=0), columns, axis=1)
    counts = np.outer(*(np.diff([*edges, side]) for edges, side in zip((rows, columns), image.shape, strict=False)))
    return sums / counts[..., None].astype(np.float32)


@jax.jit
def places_in_image(points: jax.Array, frame: LungFrame) -> jax.Array:
    return source_points(points, frame)


def sampled(image: Shaped[np.ndarray, "H W C"], places: Float[np.ndarray, "*P 2"], fill: float) -> np.ndarray:
    """All bands between the four nearest pixels, (*P, C); by SciPy, which needs no program for each size of image."""
    where = np.moveaxis(places, -1, 0)
    bands = [map_coordinates(image[..., band], where, order=1, mode="nearest") for band in range(image.shape[-1])]
    outside = np.any((places < -0.5) | (places > np.array(image.shape[:2]) - 0.5), axis=-1)
    return np.where(outside[..., None], np.float32(fill), np.stack(bands, -1))


def out_of_frame(
    aligned: Float[np.ndarray, "S S"], points: Float[np.ndarray, "K 2"], frame: LungFrame, shape: tuple[int, int]
) -> Float[np.ndarray, "H W"]:
    """A map of the frame as it lies in the image; NaN where the frame does not reach."""
    pixels = np.moveaxis(np.indices(shape, np.float32), 0, -1).reshape(-1, 2)
    places = [
        np.asarray(
            places_in_frame(
                jnp.asarray(filled(pixels[first : first + AT_ONCE])), jnp.asarray(points, jnp.float32), frame
            )
        )
        for first in range(0, len(pixels), AT_ONCE)
    ]
    return sampled(aligned[..., None], np.concatenate(places)[: len(pixels)], np.nan).reshape(shape)


@jax.jit
def places_in_frame(pixels: jax.Array, points: jax.Array, frame: LungFrame) -> jax.Array:
    return to_frame(pixels, points, frame)


def filled(pixels: np.ndarray) -> np.ndarray:
    """To AT_ONCE of them, so that one program serves all."""
    return np.concatenate([pixels, np.zeros((AT_ONCE - len(pixels), 2), pixels.dtype)])


def write_image(path: Path, image: Shaped[np.ndarray, "H W C"]) -> None:
    """A deflated TIFF, whole or not at all."""
    write_pages(path, image[None])


def write_pages(path: Path, pages: Shaped[np.ndarray, "N H W C"]) -> None:
    """The same, of images of one shape."""
    bands = pages.shape[-1]
    kind: dict[str, Any] = {"photometric": "rgb" if bands == 3 else "minisblack"}
    if bands > 1:
        kind["planarconfig"] = "contig"  # else bands might be taken for rows
    if bands not in (1, 3):
        kind["extrasamples"] = ("unspecified",) * (bands - 1)
    pixels = pages[..., 0] if bands == 1 else pages
    pixels = pixels[0] if len(pages) == 1 else pixels
    atomically(path, lambda temporary: tifffile.imwrite(temporary, pixels, compression="zlib", **kind))
