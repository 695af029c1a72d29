"""Distance of images from the nearest of a set of patches, as a check for copies of the training images."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SYMMETRIES = 8


class Nearest(NamedTuple):
    """The nearest patch of each image.

    Attributes:
        distance: Root mean square difference of the image from the patch, in the unit of the images.
        position: Index of the patch.
        patch: The patch, turned and mirrored like the image.
    """

    distance: Float[np.ndarray, "N"]
    position: Int[np.ndarray, "N"]
    patch: Float[np.ndarray, "N P P C"]


def nearest_patch(
    images: Float[np.ndarray, "N P P C"], patches: Float[np.ndarray, "M P P C"], symmetries: bool = False
) -> Nearest:
    """Find the nearest patch of each image by the root mean square difference.

    Args:
        images: Square images.
        patches: Patches of the same size.
        symmetries: Whether the eight rotations and reflections of every patch count as patches, too.

    Returns:
        Distance and patch for each image.
    """
    turned = [symmetry(images, code) for code in range(SYMMETRIES if symmetries else 1)]
    flat, squares = patches.reshape(len(patches), -1), (patches**2).sum((1, 2, 3))
    gaps = np.stack([squares - 2 * image.reshape(len(image), -1) @ flat.T for image in turned])  # up to |image|^2
    code, index = np.unravel_index(gaps.transpose(1, 0, 2).reshape(len(images), -1).argmin(1), gaps.shape[::2])
    found = np.stack([inverse(patches[i], c) for i, c in zip(index, code.tolist(), strict=True)])
    return Nearest(np.sqrt(((images - found) ** 2).mean((1, 2, 3))), index, found)


def symmetry(images: Float[np.ndarray, "N P P C"], code: int) -> Float[np.ndarray, "N P P C"]:
    """Rotate images by `code` % 4 quarter turns, and mirror them for codes from 4."""
    turned = np.rot90(images, code % 4, axes=(1, 2))
    return turned[:, :, ::-1] if code >= 4 else turned


def inverse(image: Float[np.ndarray, "P P C"], code: int) -> Float[np.ndarray, "P P C"]:
    """Invert `symmetry` of one image."""
    return np.rot90(image[:, ::-1] if code >= 4 else image, -(code % 4))
