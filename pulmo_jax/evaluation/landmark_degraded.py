"""Degraded copies of labelled images with known landmarks, for the errors on images unlike the training images."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

from pulmo_jax.core.jitter import Affine, warp_images, warp_points

TURNS_DEG = (15.0, 30.0, 60.0, 90.0, 180.0, 270.0)
ZOOMS = (0.6, 1.6)
SHIFTS = ((0.2, 0.1), (-0.1, -0.2))  # in image side lengths
NOISES = (1.0, 3.0)  # in standard deviations of the image
BLUR = 1 / 24  # in image side lengths


class Degraded(NamedTuple):
    """Degraded images.

    Attributes:
        images: Pixels.
        points: Their landmarks (y, x), px.
    """

    images: Float[np.ndarray, "N S S"]
    points: Float[np.ndarray, "N K 2"]


def degraded(
    images: Float[np.ndarray, "N S S"], points: Float[np.ndarray, "N K 2"], seed: int
) -> list[tuple[str, Degraded]]:
    """Degrade images in every way: turned, turned over, zoomed, shifted, inverted, blurred, noisy, half covered.

    Args:
        images: Square images.
        points: Their landmarks (y, x), px.
        seed: Seed of the noise.

    Returns:
        Name and images of every kind; landmarks move with their images.
    """
    rng = np.random.default_rng(seed)
    spread, mean = images.std((1, 2), keepdims=True), images.mean((1, 2), keepdims=True)
    lowest, highest = images.min((1, 2), keepdims=True), images.max((1, 2), keepdims=True)
    side = images.shape[-1]
    lower = (np.arange(side) >= side // 2)[:, None]
    moved = [(f"turned by {angle:g} degrees", turn(angle), (0.0, 0.0)) for angle in TURNS_DEG]
    moved += [(f"zoomed by {zoom:g}", np.eye(2) / zoom, (0.0, 0.0)) for zoom in ZOOMS]
    moved += [(f"shifted by {shift}", np.eye(2), shift) for shift in SHIFTS]
    moved += [("upside down", np.diag([-1.0, 1.0]), (0.0, 0.0))]
    changed = {"inverted": lowest + highest - images, "half covered": np.where(lower, mean, images)}
    changed |= {f"noise of {times:g} sd": images + times * spread * rng.normal(size=images.shape) for times in NOISES}
    changed["blurred"] = gaussian_filter(images, (0, BLUR * side, BLUR * side))
    kinds = [(name, move(images, points, matrix, shift)) for name, matrix, shift in moved]
    return kinds + [(name, Degraded(pixels.astype(np.float32), points)) for name, pixels in changed.items()]


def turn(angle_deg: float) -> Float[np.ndarray, "2 2"]:
    """Rotation matrix of (y, x)."""
    angle = np.deg2rad(angle_deg)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def move(
    images: Float[np.ndarray, "N S S"],
    points: Float[np.ndarray, "N K 2"],
    matrix: Float[np.ndarray, "2 2"],
    shift: tuple[float, float],
) -> Degraded:
    """Transform images and their landmarks.

    Args:
        images: Square images.
        points: Their landmarks (y, x), px.
        matrix: Linear part of the map from new to old pixels about the centre.
        shift: Its translation (y, x), in image side lengths.

    Returns:
        Transformed images; edges repeat.
    """
    n, side = len(images), images.shape[-1]
    map_ = Affine(
        jnp.asarray(np.tile(matrix, (n, 1, 1)), jnp.float32),
        jnp.asarray(np.tile(np.array(shift) * side, (n, 1)), jnp.float32),
    )
    warped = warp_images(jnp.asarray(images, jnp.float32), map_)
    return Degraded(np.asarray(warped), np.asarray(warp_points(jnp.asarray(points, jnp.float32), map_, side)))
