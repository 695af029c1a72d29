"""What prediction writes for one image, each file whole or not at all."""

import csv
import io
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
from pulmo_jax.types import Detection, ImageTags

OVERLAY_PX = 2048  # longer sides are thinned out in the overlay, which is for eyes
OVERLAY_ROWS = 256  # coloured at a time
OUTLINE = (0, 229, 255)
STRIP_BYTES = 2**20  # of a map before compression
DEFLATE_LEVEL = 1  # maps are noise in their last digits: level 6 takes 1.5 times as long for 0.2 % less
CSV_COLUMNS = (
    "filename", "page", "label", "y", "x", "box_y", "box_x", "box_height", "box_width", "area_px",
    "peak_score", "mean_score", "p_value", "p_value_image",
)  # fmt: skip


PageWriter = Callable[[tuple[int, int], np.dtype, Callable[[slice], np.ndarray]], None]


def as_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table as text. Numbers to 8 digits; what is not finite stays an empty cell."""
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: float | int | str) -> str:
    if isinstance(value, int | str):
        return str(value)
    return f"{value:.8g}" if np.isfinite(value) else ""


@contextmanager
def open_map(path: Path, tags: ImageTags, size_bytes: int) -> Iterator[PageWriter]:
    """A TIFF of (H, W) pages, deflate, with the source's resolution and georeference; there when the block ends well.

    size_bytes: of all its pages before compression. Yields the function that appends a page: it takes (H, W), dtype and
    a function from a slice of rows to their values, which is called for one strip at a time.
    """
    with replacing(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=size_bytes > 2**31) as tiff:
        yield partial(_write_page, tiff, tags)


def _write_page(
    tiff: tifffile.TiffWriter,
    tags: ImageTags,
    shape: tuple[int, int],
    dtype: np.dtype,
    values_of: Callable[[slice], np.ndarray],
) -> None:
    options: dict[str, Any] = {}
    if tags.resolution is not None:
        *scale, unit = tags.resolution
        options |= {"resolution": tuple(scale), "resolutionunit": unit}
    rows = max(1, STRIP_BYTES // (shape[1] * dtype.itemsize))
    strips = (np.asarray(values_of(slice(y, y + rows)), dtype).tobytes() for y in range(0, shape[0], rows))
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
    """Every how manyth pixel of an image of (H, W, ...) its overlay shows."""
    return -(-max(shape[:2]) // OVERLAY_PX)


def write_overlay(
    path: Path,
    image: Float[np.ndarray, "h w C"],
    score: Float[np.ndarray, "H W"],
    mask: Bool[np.ndarray, "H W"],
    threshold: float,
) -> None:
    """The image in gray (or RGB) with the score in colour from half the threshold on, and the findings outlined.

    image: every `overlay_step`-th pixel of it, normalised. Colours mean the same in every overlay of a run: they are
    fixed by the threshold, not by the image.
    """
    step = overlay_step(score.shape)
    score, mask = score[::step, ::step], thin_out(mask, step)
    picture = np.empty((*score.shape, 3), np.uint8)
    for top in range(0, len(score), OVERLAY_ROWS):  # colours in floats take ten times the memory of the picture
        rows = slice(top, top + OVERLAY_ROWS)
        picture[rows] = _coloured(image[rows], score[rows], mask[rows], np.float32(threshold)) * 255
    picture[binary_dilation(mask) & ~mask] = OUTLINE
    atomically(path, lambda p: Image.fromarray(picture).save(p, format="PNG"))


def _coloured(image: np.ndarray, score: np.ndarray, mask: np.ndarray, threshold: np.float32) -> np.ndarray:
    """(h, w, 3) float32, 0 to 1."""
    gray = image if image.shape[-1] == 3 else np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    heat = np.nan_to_num(score / threshold - np.float32(0.5) if threshold > 0 else mask.astype(np.float32), nan=0.0)
    colour = colormaps["inferno"](np.clip(heat / 2.5, 0, 1), bytes=True)[..., :3] / np.float32(255)
    alpha = np.float32(0.6) * np.clip(heat, 0, 1)[..., None]
    return (1 - alpha) * np.clip(gray, 0, 1) + alpha * colour


def thin_out(mask: Bool[np.ndarray, "H W"], step: int) -> Bool[np.ndarray, "h w"]:
    """One pixel for each block of step x step, set if any of the block's is: no finding is too small to stay."""
    rows, columns = (np.arange(0, size, step) for size in mask.shape)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)


def detection_row(filename: str, page: int, detection: Detection) -> dict[str, Any]:
    values = asdict(detection)
    y, x, height, width = values.pop("box")
    box = {"box_y": y, "box_x": x, "box_height": height, "box_width": width}
    return {"filename": filename, "page": page, **values, **box}
