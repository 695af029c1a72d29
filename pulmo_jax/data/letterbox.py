"""Images of any size in one square, by scale and shift alone, and points there and back."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from pulmo_jax.data.transforms import finite, resize_bands


class Letterbox(NamedTuple):
    """Where an image of (H, W) pixels lies in a square: the place of its upper left corner, and the scales (y, x).

    A place p in the image, pixel centres at whole numbers, is `(p + 0.5) * scale + corner - 0.5` in the square.
    """

    corner: tuple[int, int]
    scale: tuple[float, float]

    def to_square(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        return (points + 0.5) * self.scale + np.array(self.corner) - 0.5

    def to_image(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        return (points + 0.5 - np.array(self.corner)) / self.scale - 0.5


def letterbox_of(shape: tuple[int, ...], size: int) -> Letterbox:
    """The longer side fills the square. The sides are whole pixels, so the two scales may differ a little."""
    height, width = (max(1, round(side * size / max(shape[:2]))) for side in shape[:2])
    return Letterbox(((size - height) // 2, (size - width) // 2), (height / shape[0], width / shape[1]))


def into_square(image: Shaped[np.ndarray, "H W C"], size: int) -> Float[np.ndarray, "S S"]:
    """The image in gray, shrunk or enlarged, its edges drawn out where it does not fill the square; file's units."""
    gray = to_gray(image)
    (top, left), scale = letterbox_of(gray.shape, size)
    height, width = (round(side * s) for side, s in zip(gray.shape, scale, strict=True))
    small = resize_bands(gray[..., None], height, width)[..., 0]
    return np.pad(small, [(top, size - height - top), (left, size - width - left)], mode="edge")


def to_gray(image: Shaped[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W"]:
    """Mean of the bands without an alpha band (the last of two or four); what is no number becomes the mean."""
    bands = image[..., :-1] if image.shape[-1] in (2, 4) else image
    gray = bands.astype(np.float32).mean(axis=-1)
    known = finite(gray[..., None])
    return gray if known.all() else np.where(known, gray, gray[known].mean() if known.any() else np.float32(0))


def to_bytes(image: Shaped[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W"]:
    """In gray, to be looked at: all but the darkest and the brightest 0.5 % of the pixels spread over 0 to 255."""
    gray = to_gray(image)
    low, high = np.percentile(gray, [0.5, 99.5])
    return (np.clip((gray - low) / max(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)
