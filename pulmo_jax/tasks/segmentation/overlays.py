"""Pictures of images with the outlines of the classes and a legend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from pulmo_jax.host.console import printable
from pulmo_jax.host.files import atomically
from pulmo_jax.inference.outputs import BACKGROUND, INK, font_px
from pulmo_jax.tasks.segmentation.figures import class_colours

LINE_PX = 500  # an outline is one pixel wide for so many pixels of the longest side
MOST_NAMES = 60  # characters of a class name in the legend


def as_colours(image: Float[np.ndarray, "h w C"]) -> UInt8[np.ndarray, "h w 3"]:
    """Convert a normalised image to a picture: colours of three bands, otherwise grey from the mean of the bands."""
    shown = image if image.shape[-1] == 3 else np.repeat(image.mean(axis=-1, keepdims=True), 3, axis=-1)
    return np.round(255 * np.clip(shown, 0, 1)).astype(np.uint8)


def outlined(picture: UInt8[np.ndarray, "h w 3"], masks: Bool[np.ndarray, "h w K"]) -> UInt8[np.ndarray, "h w 3"]:
    """Draw the outlines of classes, inside their regions, so that the outlines of neighbours do not cover each other.

    Args:
        picture: Picture.
        masks: Pixels of each class.

    Returns:
        New picture.
    """
    drawn, width = picture.copy(), -(-max(picture.shape) // LINE_PX)
    for k, colour in enumerate(class_colours(masks.shape[2])):
        mask = masks[..., k]
        inner = np.asarray(binary_erosion(mask, np.ones((3, 3)), iterations=width, border_value=1), bool)
        drawn[mask > inner] = np.round(255 * np.array(to_rgb(colour)))
    return drawn


def write_overlay(
    path: Path, picture: UInt8[np.ndarray, "h w 3"], masks: Bool[np.ndarray, "h w K"], names: Sequence[str]
) -> None:
    """Write a picture with the outlines of the classes above a legend, as PNG.

    Args:
        path: Output file.
        picture: Picture of the image, which is in the upper left corner, pixel by pixel.
        masks: Pixels of each class.
        names: Names of the classes.
    """
    legend = draw_legend(picture.shape[1], names)
    height, width = picture.shape[:2]
    whole = np.full((height + len(legend), max(width, legend.shape[1]), 3), BACKGROUND, np.uint8)
    whole[:height, :width] = outlined(picture, masks)
    whole[height:, : legend.shape[1]] = legend
    atomically(path, lambda temporary: Image.fromarray(whole).save(temporary, format="PNG"))


def draw_legend(width: int, names: Sequence[str]) -> UInt8[np.ndarray, "h w 3"]:
    """Draw the colours and names of classes in as many lines as needed.

    Args:
        width: Width of the picture, px; a longer entry makes the legend wider.
        names: Names of the classes.

    Returns:
        The legend.
    """
    size = font_px(width)
    font = ImageFont.load_default(size)
    texts = [
        shown if len(shown := printable(name, keep="")) <= MOST_NAMES else shown[:MOST_NAMES] + "…" for name in names
    ]
    entries = [2 * size + int(font.getlength(text)) + size for text in texts]
    places, x, y = [], size // 2, size // 2
    for entry in entries:
        if x > size // 2 and x + entry > width:
            x, y = size // 2, y + 3 * size // 2
        places.append((x, y))
        x += entry
    right = max([width, *(place[0] + entry for place, entry in zip(places, entries, strict=True))])
    legend = Image.new("RGB", (right, y + 2 * size), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(legend)
    for (left, top), text, colour in zip(places, texts, class_colours(len(names)), strict=True):
        box = (left, top, left + size, top + size)
        draw.rectangle(box, outline=tuple(round(255 * c) for c in to_rgb(colour)), width=max(2, size // 6))
        draw.text((left + 3 * size // 2, top), text, fill=INK, font=font)
    return np.asarray(legend)
