"""Masks and probabilities of classes as TIFF files, written strip by strip."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import tifffile
from jaxtyping import Shaped

from pulmo_jax.host.console import printable
from pulmo_jax.host.files import replacing
from pulmo_jax.inference.outputs import STRIP_BYTES, tag_options
from pulmo_jax.types import ImageTags

GDAL_METADATA, GDAL_NODATA, ASCII = 42112, 42113, 2
BIG_BYTES = 2**31  # files that may be larger are BigTIFF

Block = Shaped[np.ndarray, "h W *K"]


def write_map(
    path: Path,
    shape: Sequence[int],
    dtype: type,
    strips: Iterable[bytes],
    rows: int,
    tags: ImageTags,
    missing: str = "",
    names: Sequence[str] = (),
) -> None:
    """Write a map as TIFF of one page.

    Args:
        path: Output file; it appears under its name when it is complete.
        shape: (H, W), or (H, W, K) for K bands.
        dtype: Data type of the values.
        strips: Compressed strips (see `outputs.deflated`), taken one at a time.
        rows: Rows of each strip but the last.
        tags: Resolution and georeference of the image.
        missing: Value of missing pixels, as text; "" if there are none.
        names: Names of the bands.
    """
    options: dict[str, Any] = tag_options(tags)
    texts = {GDAL_NODATA: missing, GDAL_METADATA: band_names(names) if names else ""}
    options["extratags"] += [(code, ASCII, 0, text.encode(), True) for code, text in texts.items() if text]
    if len(shape) == 3:
        options |= {"planarconfig": "contig", "extrasamples": ["unspecified"] * (shape[2] - 1)}
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with replacing(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=size > BIG_BYTES) as tiff:
        tiff.write(
            iter(strips),
            shape=tuple(shape),
            dtype=dtype,
            rowsperstrip=rows,
            compression="zlib",
            photometric="minisblack",
            metadata=None,
            **options,
        )


def band_names(names: Sequence[str]) -> str:
    """Names of bands as the metadata that GDAL and QGIS read."""
    items = (
        f'<Item name="DESCRIPTION" sample="{i}" role="description">{escape(printable(name, keep=""))}</Item>'
        for i, name in enumerate(names)
    )
    return f"<GDALMetadata>{''.join(items)}</GDALMetadata>"


def block_rows(shape: Sequence[int], step: int) -> int:
    """Rows of the blocks in which a map is written: a multiple of `step`, about STRIP_BYTES of float32.

    Args:
        shape: Shape (H, W, K) of the map.
        step: Rows of the overlay's pixels.

    Returns:
        Number of rows.
    """
    return step * max(1, STRIP_BYTES // (4 * shape[1] * shape[2] * step))


def in_blocks(strips: Iterable[tuple[int, Block]], rows: int) -> Iterator[tuple[int, Block]]:
    """Regroup strips into blocks of a fixed number of rows.

    Args:
        strips: First row and rows of consecutive strips.
        rows: Rows of each block but the last.

    Yields:
        First row and rows of consecutive blocks.
    """
    top, held = 0, []
    for _, strip in strips:
        held.append(strip)
        if sum(map(len, held)) < rows:
            continue
        joined = np.concatenate(held) if len(held) > 1 else held[0]
        whole = len(joined) - len(joined) % rows
        for first in range(0, whole, rows):
            yield top + first, joined[first : first + rows]
        top, held = top + whole, [joined[whole:]]
    if held and sum(map(len, held)):
        yield top, np.concatenate(held)
