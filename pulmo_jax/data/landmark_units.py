"""Units of landmark tables: px or shares of the image, and coordinates that do not fit to the images.

In px, pixel centres are at integers from 0. Shares have 0 and 1 (or 100 %) at the edges of the image, so share s of a
width of W px is at s W - 0.5 px.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from pulmo_jax.types import InputError

Units = Literal["px", "fraction", "percent"]
WHOLE = {"fraction": 1, "percent": 100}  # width and height in these units
MAX_SHARE_PX = 1.5  # a table without larger coordinates is not in px
MIN_SIDE_PX = 8  # of images in which landmarks are distinct in px
SMALL_SHARE = 0.5  # of the width and height: if no point is beyond, the table may be that of smaller images
LEAST_ROWS = 5  # for this note


def to_px(
    points: Float[np.ndarray, "N K 2"], sizes: Int[np.ndarray, "N 2"], units: Units
) -> Float[np.ndarray, "N K 2"]:
    """Convert coordinates to px.

    Args:
        points: Landmarks (y, x) in the units of the table.
        sizes: Height and width of each image, px.
        units: Units of the table.

    Returns:
        Landmarks, px.
    """
    return points if units == "px" else points / WHOLE[units] * sizes[:, None] - 0.5


def outside_images(points: Float[np.ndarray, "N K 2"], sizes: Int[np.ndarray, "N 2"]) -> Bool[np.ndarray, "N K"]:
    """Which points (y, x), px, are outside their image of height and width `sizes`."""
    return np.any((points < -0.5) | (points > sizes[:, None] - 0.5), axis=-1)


def check_px(path: Path, points: Float[np.ndarray, "N K 2"], sizes: Int[np.ndarray, "N 2"], first_name: str) -> None:
    """Check that coordinates are px of their images.

    Args:
        path: The table, for messages.
        points: Landmarks (y, x).
        sizes: Height and width of each image, px.
        first_name: Name of the first image.

    Raises:
        InputError: If they seem to be shares of the image, or are mostly outside.
    """
    if np.abs(points).max() <= MAX_SHARE_PX and sizes.min() >= MIN_SIDE_PX:
        raise InputError(
            f"{path}: all coordinates lie between {points.min():.3g} and {points.max():.3g}, which is about one px; "
            "are they shares of the width and height? Set data.units=fraction, which takes 0 to 1"
        )
    share = outside_images(points, sizes).mean()
    if share > 0.5:
        raise InputError(
            f"{path}: {share:.0%} of the points are outside their images{exchanged(points, sizes)}; give the "
            f"coordinates in px of these images, such as {first_name} with {size_text(sizes)}"
        )


def exchanged(points: Float[np.ndarray, "N K 2"], sizes: Int[np.ndarray, "N 2"]) -> str:
    """Remark that x and y seem to be exchanged, as most points outside would then be inside; "" if not."""
    outside = outside_images(points, sizes)
    inside = ~outside_images(points[..., ::-1], sizes)
    return ", but inside if x and y are exchanged" if inside[outside].mean() > 0.5 else ""


def small_extent(
    path: Path, points: Float[np.ndarray, "N K 2"], sizes: Int[np.ndarray, "N 2"], first_name: str
) -> list[str]:
    """Note that all points are in the upper left quarter of their images, as those of smaller images are.

    Args:
        path: The table.
        points: Landmarks (y, x), px.
        sizes: Height and width of each image, px.
        first_name: Name of the first image.

    Returns:
        The note, if it applies.
    """
    if len(points) < LEAST_ROWS or (points > SMALL_SHARE * sizes[:, None]).any():
        return []
    y, x = points.max(axis=(0, 1))
    return [
        f"{path}: all points are in the upper left quarter of their images (x up to {x:.4g}, y up to {y:.4g}; "
        f"{first_name} has {size_text(sizes)}): are they px of these images? Else set data.units=percent, or convert "
        "them"
    ]


def size_text(sizes: Int[np.ndarray, "N 2"]) -> str:
    """Height and width of the first image, for a message."""
    height, width = sizes[0]
    return f"{height} x {width} px (height x width)"
