"""What prediction writes for one image, each file whole or not at all."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Bool, Float
from matplotlib import colormaps
from PIL import Image
from scipy.ndimage import binary_dilation

from pulmo_jax.types import Detection, ImageTags

OVERLAY_PX = 2048  # longer sides are thinned out in the overlay, which is for eyes
CSV_COLUMNS = (
    "filename", "page", "label", "y", "x", "box_y", "box_x", "box_height", "box_width", "area_px",
    "peak_score", "mean_score", "p_value", "p_value_image",
)  # fmt: skip


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the path and rename, so that nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_map(path: Path, pages: list[np.ndarray], tags: ImageTags) -> None:
    """A TIFF of (H, W) pages, deflate, with the source's resolution and georeference."""
    options: dict[str, Any] = {}
    if tags.resolution is not None:
        *scale, unit = tags.resolution
        options |= {"resolution": tuple(scale), "resolutionunit": unit}
    extra = [(code, dtype, count, value, False) for code, dtype, count, value in tags.geo]

    def write(target: Path) -> None:
        with tifffile.TiffWriter(target, bigtiff=sum(p.nbytes for p in pages) > 2**31) as tiff:
            for page in pages:
                tiff.write(
                    page,
                    compression="zlib",
                    photometric="minisblack",
                    metadata=None,
                    extratags=extra,
                    **options,
                )

    atomically(path, write)


def write_overlay(
    path: Path,
    image: Float[np.ndarray, "H W C"],
    score: Float[np.ndarray, "H W"],
    mask: Bool[np.ndarray, "H W"],
    threshold: float,
) -> None:
    """The image in gray (or RGB) with the score in colour from half the threshold on, and the findings outlined.

    Colours mean the same in every overlay of a run: they are fixed by the threshold, not by the image.
    """
    step = -(-max(score.shape) // OVERLAY_PX)
    image, score, mask = image[::step, ::step], score[::step, ::step], thin_out(mask, step)
    gray = image if image.shape[-1] == 3 else np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    heat = np.nan_to_num(score / threshold - 0.5 if threshold > 0 else mask.astype(np.float32), nan=0.0)
    colour = colormaps["inferno"](np.clip(heat / 2.5, 0, 1))[..., :3]
    alpha = 0.6 * np.clip(heat, 0, 1)[..., None]
    picture = (1 - alpha) * np.clip(gray, 0, 1) + alpha * colour
    picture[binary_dilation(mask) & ~mask] = (0.0, 0.9, 1.0)
    atomically(path, lambda p: Image.fromarray((picture * 255).astype(np.uint8)).save(p, format="PNG"))


def thin_out(mask: Bool[np.ndarray, "H W"], step: int) -> Bool[np.ndarray, "h w"]:
    """One pixel for each block of step x step, set if any of the block's is: no finding is too small to stay."""
    rows, columns = (np.arange(0, size, step) for size in mask.shape)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)


def detection_row(filename: str, page: int, detection: Detection) -> dict[str, Any]:
    values = asdict(detection)
    y, x, height, width = values.pop("box")
    box = {"box_y": y, "box_x": x, "box_height": height, "box_width": width}
    return {"filename": filename, "page": page, **values, **box}
