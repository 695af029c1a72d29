"""Letterboxing: fit images of any size into a square by scaling and shifting, and transform points both ways."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from pulmo_jax.data.transforms import finite, resize_bands


class Letterbox(NamedTuple):
    """Position of an image in a square.

    A point p of the image, with pixel centres at integers, is at `(p + 0.5) * scale + corner - 0.5` in the square.

    Attributes:
        corner: Upper left corner (y, x) of the image in the square, in px.
        scale: Scale factors (y, x), square px per image px.
    """

    corner: tuple[int, int]
    scale: tuple[float, float]

    def to_square(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        """Transform points (y, x) from px of the image to px of the square."""
        return (points + 0.5) * self.scale + np.array(self.corner) - 0.5

    def to_image(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        """Transform points (y, x) from px of the square to px of the image."""
        return (points + 0.5 - np.array(self.corner)) / self.scale - 0.5


def fit_letterbox(shape: tuple[int, ...], size: int) -> Letterbox:
    """Fit the longer side of an image to a square.

    Args:
        shape: Image shape (H, W, ...) in px.
        size: Side of the square in px.

    Returns:
        The position of the image. Its sides are rounded to whole pixels, so the two scales may differ slightly.
    """
    height, width = (max(1, round(side * size / max(shape[:2]))) for side in shape[:2])
    return Letterbox(((size - height) // 2, (size - width) // 2), (height / shape[0], width / shape[1]))


def into_square(image: Shaped[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "S S"]:
    """Convert an image to grey and resize it to fit a square.

    Args:
        image: Pixels (H, W, C) in any unit.
        size: Side of the square in px.

    Returns:
        Grey image (S, S) in the unit of the input; margins repeat the edge pixels.
    """
    gray = to_gray(image)
    (top, left), scale = fit_letterbox(gray.shape, size)
    height, width = (round(side * s) for side, s in zip(gray.shape, scale, strict=True))
    small = resize_bands(gray[..., None], height, width)[..., 0]
    return np.pad(small, [(top, size - height - top), (left, size - width - left)], mode="edge")


def to_gray(image: Shaped[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W"]:
    """Average the bands of an image, without an alpha band (the last of two or four).

    Args:
        image: Pixels (H, W, C) in any unit.

    Returns:
        Grey image (H, W) in float32; pixels that are not finite become the mean of the others.
    """
    bands = image[..., :-1] if image.shape[-1] in (2, 4) else image
    gray = bands.astype(np.float32).mean(axis=-1)
    known = finite(gray[..., None])
    return gray if known.all() else np.where(known, gray, gray[known].mean() if known.any() else np.float32(0))


def to_bytes(image: Shaped[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W"]:
    """Convert an image to 8-bit grey for display.

    Args:
        image: Pixels (H, W, C) in any unit.

    Returns:
        Grey image (H, W); the 0.5 % and 99.5 % quantiles map to 0 and 255.
    """
    gray = to_gray(image)
    low, high = np.percentile(gray, [0.5, 99.5])
    return (np.clip((gray - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
