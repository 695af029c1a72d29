"""Output files of prediction for a single image, each written atomically."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from jaxtyping import Bool, Float
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import binary_dilation

from pulmo_jax.host.files import atomically, replacing
from pulmo_jax.host.tables import csv_text
from pulmo_jax.types import Detection, ImageTags

OVERLAY_PX = 2048  # longest side of an overlay; larger images are subsampled
OVERLAY_ROWS = 256  # rows coloured at a time, which bounds the memory
OUTLINE = (0, 229, 255)
STRIP_BYTES = 2**20  # size of a TIFF strip before compression
DEFLATE_LEVEL = 1  # the low bits of maps are noise: level 6 takes 1.5 times as long and saves 0.2 %
CSV_COLUMNS = (
    "filename", "page", "label", "y", "x", "box_y", "box_x", "box_height", "box_width", "area_px",
    "peak_score", "mean_score", "p_value", "p_value_image",
)  # fmt: skip


PageWriter = Callable[[tuple[int, int], np.dtype, Callable[[slice], np.ndarray]], None]  # see `open_map`


def as_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Format a table as CSV.

    Args:
        columns: Column names.
        rows: One mapping from column name to value per row.

    Returns:
        CSV text; numbers have 8 significant digits, and non-finite numbers give an empty cell.
    """
    return csv_text(columns, ([row[name] for name in columns] for row in rows), ".8g")


@contextmanager
def open_map(path: Path, tags: ImageTags, size_bytes: int) -> Iterator[PageWriter]:
    """Open a deflate-compressed TIFF of (H, W) pages with the resolution and georeference of the source image.

    The file appears under its name when the block ends without an error.

    Args:
        path: Output file.
        tags: Resolution and georeference.
        size_bytes: Size of all pages before compression; decides between TIFF and BigTIFF.

    Yields:
        Function that appends a page. It takes the shape (H, W), the data type, and a function from a slice of rows to
        their values, which is called one strip at a time.
    """
    with replacing(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=size_bytes > 2**31) as tiff:
        yield partial(_write_page, tiff, tags)


def _write_page(
    tiff: tifffile.TiffWriter,
    tags: ImageTags,
    shape: tuple[int, int],
    dtype: np.dtype,
    read_rows: Callable[[slice], np.ndarray],
) -> None:
    """Write one page of a TIFF in deflate-compressed strips."""
    options: dict[str, Any] = {}
    if tags.resolution is not None:
        *scale, unit = tags.resolution
        options |= {"resolution": tuple(scale), "resolutionunit": unit}
    rows = max(1, STRIP_BYTES // (shape[1] * dtype.itemsize))
    strips = (np.asarray(read_rows(slice(y, y + rows)), dtype).tobytes() for y in range(0, shape[0], rows))
    tiff.write(
        (bytes(imagecodecs.deflate_encode(strip, DEFLATE_LEVEL)) for strip in strips),
        shape=shape,
        dtype=dtype,
        rowsperstrip=rows,
        compression="zlib",
        photometric="minisblack",
        metadata=None,
        extratags=[(code, dtype, count, value, False) for code, dtype, count, value in tags.geo],
        **options,
    )


def overlay_step(shape: tuple[int, ...]) -> int:
    """Subsampling step of the overlay of an image.

    Args:
        shape: Shape (H, W, ...) of the image.

    Returns:
        The overlay shows every n-th pixel along each axis.
    """
    return -(-max(shape[:2]) // OVERLAY_PX)


def write_overlay(
    path: Path,
    image: Float[np.ndarray, "h w C"],
    score: Float[np.ndarray, "H W"],
    mask: Bool[np.ndarray, "H W"],
    threshold: float,
) -> None:
    """Write the image in grey (or RGB) with coloured scores and outlined findings, as PNG.

    Colours start at half the threshold. They depend on the threshold and not on the image, so they have the same
    meaning in all overlays of a run.

    Args:
        path: Output file.
        image: Normalised image, subsampled by `overlay_step`.
        score: Score map at full resolution.
        mask: Mask of the findings at full resolution.
        threshold: Pixel threshold.
    """
    step = overlay_step(score.shape)
    score, mask = score[::step, ::step], subsample_mask(mask, step)
    picture = np.empty((*score.shape, 3), np.uint8)
    for top in range(0, len(score), OVERLAY_ROWS):  # in blocks: float colours take ten times the memory of the picture
        rows = slice(top, top + OVERLAY_ROWS)
        picture[rows] = _coloured(image[rows], score[rows], mask[rows], np.float32(threshold)) * 255
    picture[binary_dilation(mask) & ~mask] = OUTLINE
    atomically(path, lambda p: Image.fromarray(picture).save(p, format="PNG"))


def _coloured(image: np.ndarray, score: np.ndarray, mask: np.ndarray, threshold: np.float32) -> np.ndarray:
    """Image blended with the colours of the scores, (h, w, 3) float32 in [0, 1]."""
    gray = image if image.shape[-1] == 3 else np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    heat = np.nan_to_num(score / threshold - np.float32(0.5) if threshold > 0 else mask.astype(np.float32), nan=0.0)
    colour = colormaps["inferno"](np.clip(heat / 2.5, 0, 1), bytes=True)[..., :3] / np.float32(255)
    alpha = np.float32(0.6) * np.clip(heat, 0, 1)[..., None]
    return (1 - alpha) * np.clip(gray, 0, 1) + alpha * colour


def subsample_mask(mask: Bool[np.ndarray, "H W"], step: int) -> Bool[np.ndarray, "h w"]:
    """Subsample a mask so that no finding disappears.

    Args:
        mask: Mask.
        step: Side of a block in pixels.

    Returns:
        True for each block that contains a pixel of the mask.
    """
    rows, columns = (np.arange(0, size, step) for size in mask.shape)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)


def detection_row(filename: str, page: int, detection: Detection) -> dict[str, Any]:
    """One row of detections.csv.

    Args:
        filename: Image file.
        page: Page of the file.
        detection: Finding.

    Returns:
        Values by column name, see `CSV_COLUMNS`.
    """
    values = asdict(detection)
    y, x, height, width = values.pop("box")
    box = {"box_y": y, "box_x": x, "box_height": height, "box_width": width}
    return {"filename": filename, "page": page, **values, **box}
