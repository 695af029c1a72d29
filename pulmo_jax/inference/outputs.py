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
from jaxtyping import Bool, Float, Shaped, UInt8
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation

from pulmo_jax.host.files import atomically, replacing
from pulmo_jax.host.tables import csv_text
from pulmo_jax.types import Detection, ImageTags

OVERLAY_PX = 2048  # longest side of an overlay; larger images are subsampled
OVERLAY_ROWS = 256  # rows coloured at a time, which bounds the memory
OUTLINE = (0, 229, 255)
BACKGROUND, INK = 0, (255, 255, 255)  # of the legend
COLOUR_RANGE = (0.5, 3.0)  # scores of the first and last colour, as multiples of the threshold
LEGEND_EM = 32  # least width of the legend in font sizes
STRIP_BYTES = 2**20  # size of a TIFF strip before compression
DEFLATE_LEVEL = 1  # the low bits of maps are noise: level 6 takes 1.5 times as long and saves 0.2 %
CSV_COLUMNS = (
    "filename", "page", "label", "y", "x", "box_y", "box_x", "box_height", "box_width", "area_px",
    "peak_score", "mean_score", "p_value", "p_value_image",
)  # fmt: skip


ScaleBar = Callable[[int], tuple[float, str]]  # columns of an image -> length of a scale bar in columns, and its label
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
    rows = max(1, STRIP_BYTES // (shape[1] * dtype.itemsize))
    strips = (np.asarray(read_rows(slice(y, y + rows)), dtype) for y in range(0, shape[0], rows))
    tiff.write(
        map(deflated, strips),
        shape=shape,
        dtype=dtype,
        rowsperstrip=rows,
        compression="zlib",
        photometric="minisblack",
        metadata=None,
        **tag_options(tags),
    )


def deflated(rows: Shaped[np.ndarray, "h W *K"]) -> bytes:
    """Compress the rows of a TIFF strip."""
    return bytes(imagecodecs.deflate_encode(rows.tobytes(), DEFLATE_LEVEL))


def tag_options(tags: ImageTags) -> dict[str, Any]:
    """Arguments of `TiffWriter.write` for the resolution and georeference of the source image."""
    options: dict[str, Any] = {
        "extratags": [(code, kind, count, value, False) for code, kind, count, value in tags.geo]
    }
    if tags.resolution is not None:
        *scale, unit = tags.resolution
        options |= {"resolution": tuple(scale), "resolutionunit": unit}
    return options


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
    scale: ScaleBar | None = None,
) -> None:
    """Write the image in grey (or RGB) with coloured scores and outlined findings above a legend, as PNG.

    Colours start at half the threshold. They depend on the threshold and not on the image, so they have the same
    meaning in all overlays of a run. The image is in the upper left corner, pixel by pixel.

    Args:
        path: Output file.
        image: Normalised image, subsampled by `overlay_step`.
        score: Score map at full resolution.
        mask: Mask of the findings at full resolution.
        threshold: Pixel threshold.
        scale: Chooses a scale bar for a number of columns of the score map; None: the size of a pixel is unknown.
    """
    step = overlay_step(score.shape)
    score, mask = score[::step, ::step], subsample_mask(mask, step)
    height, width = score.shape
    size = font_px(width)
    picture = np.full((height + legend_height(size), max(width, LEGEND_EM * size), 3), BACKGROUND, np.uint8)
    for top in range(0, height, OVERLAY_ROWS):  # in blocks: float colours take ten times the memory of the picture
        rows = slice(top, min(top + OVERLAY_ROWS, height))
        picture[rows, :width] = _coloured(image[rows], score[rows], mask[rows], np.float32(threshold)) * 255
    picture[:height, :width][binary_dilation(mask) & ~mask] = OUTLINE
    picture[height:] = draw_legend(picture.shape[1], size, threshold, scale, step, width)
    atomically(path, lambda p: Image.fromarray(picture).save(p, format="PNG"))


def _coloured(image: np.ndarray, score: np.ndarray, mask: np.ndarray, threshold: np.float32) -> np.ndarray:
    """Image blended with the colours of the scores, (h, w, 3) float32 in [0, 1]."""
    gray = image if image.shape[-1] == 3 else np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)
    low, high = (np.float32(times) for times in COLOUR_RANGE)
    heat = np.nan_to_num(score / threshold - low if threshold > 0 else mask.astype(np.float32), nan=0.0)
    colour = colormaps["inferno"](np.clip(heat / (high - low), 0, 1), bytes=True)[..., :3] / np.float32(255)
    alpha = np.float32(0.6) * np.clip(heat, 0, 1)[..., None]
    return (1 - alpha) * np.clip(gray, 0, 1) + alpha * colour


def font_px(width: int) -> int:
    """Font size of the legend of an overlay of this width, px."""
    return max(12, width // 80)


def legend_height(size: int) -> int:
    """Height of the legend with this font size, px."""
    return 4 * size


def draw_legend(
    width: int, size: int, threshold: float, scale: ScaleBar | None, step: int, image_width: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw the legend of an overlay: colours of the scores, outline of a finding, and a scale bar.

    Args:
        width: Width of the legend, px.
        size: Font size, px.
        threshold: Pixel threshold.
        scale: Chooses the scale bar; None for none.
        step: Columns of the score map per pixel of the picture.
        image_width: Width of the image in the picture, px.

    Returns:
        The picture of the legend.
    """
    legend = Image.new("RGB", (width, legend_height(size)), (BACKGROUND,) * 3)
    draw, font = ImageDraw.Draw(legend), ImageFont.load_default(size)
    x, top, bar = size // 2, size // 2, 12 * size
    if threshold > 0:
        low, high = COLOUR_RANGE
        scores = np.linspace(low * threshold, high * threshold, bar, dtype=np.float32)[None]
        grey = np.full((1, bar, 1), 0.5, np.float32)
        strip = _coloured(grey, scores, np.zeros((1, bar), bool), np.float32(threshold)) * 255
        legend.paste(Image.fromarray(np.repeat(strip.astype(np.uint8), size, axis=0)), (x, top))
        for times, anchor in ((low, "lt"), (1.0, "mt"), (high, "rt")):
            at = x + int((times - low) / (high - low) * (bar - 1))
            draw.line([(at, top), (at, top + size + size // 4)], fill=INK)
            draw.text((at, top + size + size // 2), f"{times:g}", fill=INK, font=font, anchor=anchor)
        draw.text((x + bar + size // 2, top), "score / threshold", fill=INK, font=font)
        draw.text((x + bar + size // 2, top + 5 * size // 4), f"threshold {threshold:.3g}", fill=INK, font=font)
    x += bar + 10 * size
    draw.rectangle((x, top, x + size, top + size), outline=OUTLINE, width=max(1, size // 8))
    draw.text((x + 3 * size // 2, top), "finding", fill=INK, font=font)
    if scale is not None:
        length, label = scale(min(image_width, 20 * size) * step)
        y = top + 2 * size
        draw.line([(x, y), (x + max(1, round(length / step)) - 1, y)], fill=INK, width=max(2, size // 6))
        draw.text((x, y + size // 4), label, fill=INK, font=font)
    return np.asarray(legend)


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
