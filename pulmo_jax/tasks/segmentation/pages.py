"""Segmentation of one page of an image file: from the file to all its output files in one pass over its rows."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from pulmo_jax.data.codes import UNLABELLED
from pulmo_jax.data.file_rows import FileRows, Rows
from pulmo_jax.data.image_scale import for_image
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import Preprocessing, preprocess
from pulmo_jax.inference.class_maps import ClassMapper, class_masks, numbered
from pulmo_jax.inference.component_table import PixelArea, component_rows, write_polygons
from pulmo_jax.inference.components import Component, OpenComponents
from pulmo_jax.inference.map_files import block_rows, in_blocks, write_map
from pulmo_jax.inference.outputs import deflated, overlay_step, subsample_mask
from pulmo_jax.runs.records import Record
from pulmo_jax.tasks.segmentation.overlays import as_colours, write_overlay

MASK, PROBABILITIES, POLYGONS, OVERLAY = (
    "masks/{}.tif", "probabilities/{}.tif", "polygons/{}.geojson", "overlays/{}.png"
)  # fmt: skip


@dataclass
class Page:
    """What the rows of a page have given so far.

    Attributes:
        mapper: Mapper of the run.
        open: Open components of each class.
        step: Pixels of the image for one pixel of the overlay along each axis.
        strips: Compressed strips of the mask.
        area_px: Pixels of each class.
        n_missing: Missing pixels.
        masks: Rows of the overlay's masks of the classes.
        picture: Rows of the overlay's picture.
    """

    mapper: ClassMapper
    open: list[OpenComponents]
    step: int
    strips: list[bytes] = field(default_factory=list)
    area_px: np.ndarray | int = 0
    n_missing: int = 0
    masks: list[Bool[np.ndarray, "h w K"]] = field(default_factory=list)
    picture: list[UInt8[np.ndarray, "h w 3"]] = field(default_factory=list)

    def add(self, probabilities: Float32[np.ndarray, "h W K"]) -> None:
        """Append the probabilities of some rows."""
        mapper = self.mapper
        inside = class_masks(probabilities, mapper.thresholds, mapper.classes)
        codes = numbered(inside, probabilities, mapper.classes)
        self.strips.append(deflated(codes))
        self.area_px = self.area_px + inside.sum((0, 1))
        self.n_missing += int((codes == UNLABELLED).sum())
        self.open = [
            one.add(inside[..., k], np.ascontiguousarray(probabilities[..., k])) for k, one in enumerate(self.open)
        ]
        coarse = [subsample_mask(inside[..., k], self.step) for k in range(inside.shape[2])]
        self.masks.append(np.stack(coarse, axis=-1))

    def draw(self, pixels: np.ndarray, how: Preprocessing) -> None:
        """Append some rows of the image to the picture."""
        self.picture.append(as_colours(preprocess(pixels[:: self.step, :: self.step], None, how)))


def write_page(
    mapper: ClassMapper,
    reader: Reader,
    ref: ImageRef,
    output: Path,
    name: str,
    *,
    min_area_px: int = 1,
    min_probability: float = 0.0,
    probabilities: bool = True,
    polygons: bool = True,
    overlays: bool = True,
) -> Record:
    """Segment a page and write its files.

    Args:
        mapper: Mapper of the run.
        reader: Reader of the images.
        ref: The page.
        output: Output folder.
        name: Name of its files.
        min_area_px: Smallest area of a listed component.
        min_probability: Smallest highest probability of a listed component.
        probabilities: Whether to write the probabilities.
        polygons: Whether to write the outlines of the components.
        overlays: Whether to write a picture.

    Returns:
        Record of the page.

    Raises:
        InputError: If the file cannot be read.
    """
    rows, tags, classes = FileRows(reader, ref), reader.tags(ref), mapper.classes
    shape, step = (*ref.shape[:2], len(classes)), overlay_step(ref.shape)
    start = OpenComponents(min_area_px, min_probability, outlined=polygons)
    page, height = Page(mapper, [start] * len(classes), step), block_rows(shape, step)
    blocks = passed(page, rows, height, for_image(mapper.hows[0], rows) if overlays else None)
    if probabilities:
        missing = "nan" if np.issubdtype(ref.dtype, np.floating) else ""
        strips, flat = map(deflated, blocks), shape if len(classes) > 1 else shape[:2]
        write_map(output / PROBABILITIES.format(name), flat, np.float32, strips, height, tags, missing, classes.names)
    else:
        deque(blocks, maxlen=0)
    missing = str(UNLABELLED) if page.n_missing or ref.stored_dtype else ""
    write_map(output / MASK.format(name), shape[:2], np.uint8, page.strips, height, tags, missing)
    found = [one.finish() for one in page.open]
    listed = component_rows(ref.name, ref.page, classes.names, found, PixelArea.of(tags))
    if polygons:
        write_polygons(output / POLYGONS.format(name), listed, found, tags)
    if overlays:
        picture, masks = np.concatenate(page.picture), np.concatenate(page.masks)
        write_overlay(output / OVERLAY.format(name), picture, masks, classes.names)
    return {"images": [entry(ref, page, found)], "components": listed}


def passed(page: Page, pixels: Rows, height: int, how: Preprocessing | None) -> Iterator[Float32[np.ndarray, "h W *K"]]:
    """Map an image block by block, and pass every block on after the page has used it.

    Args:
        page: The page.
        pixels: The image.
        height: Rows of a block.
        how: Preprocessing for the picture; None for no picture.

    Yields:
        Probabilities (h, W) of one class, or (h, W, K) of several.
    """
    for top, block in in_blocks(page.mapper.strips(pixels), height):
        page.add(block)
        if how is not None:
            page.draw(pixels[top : top + len(block)], how)
        yield block if block.shape[2] > 1 else block[..., 0]


def entry(ref: ImageRef, page: Page, found: list[tuple[Component, ...]]) -> dict[str, Any]:
    """Entry of a page in summary.json."""
    names, area_px = page.mapper.classes.names, np.asarray(page.area_px).tolist()
    return {
        "filename": ref.name,
        "page": ref.page,
        "n_pixels": ref.shape[0] * ref.shape[1],
        "n_missing": page.n_missing,
        "classes": {
            name: {"area_px": area, "components": len(components)}
            for name, area, components in zip(names, area_px, found, strict=True)
        },
    }
