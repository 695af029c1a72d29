"""Distance of images from the nearest of a set of patches, as a check for copies of the training images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pulmo_jax.data.pipeline import UNCHANGED
from pulmo_jax.data.transforms import flip_and_turn

MIRRORED = 4  # first code of the symmetries that reflect


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
    images: Float[np.ndarray, "N P P C"], patches: Float[np.ndarray, "M P P C"], codes: Sequence[int] = UNCHANGED
) -> Nearest:
    """Find the nearest patch of each image by the root mean square difference.

    Args:
        images: Square images.
        patches: Patches of the same size.
        codes: Symmetries of the square (see `transforms.flip_and_turn`); each patch is compared in all of them.

    Returns:
        Distance and patch for each image.
    """
    turned = [turned_back(images, code) for code in codes]
    flat, squares = patches.reshape(len(patches), -1), (patches**2).sum((1, 2, 3))
    gaps = np.stack([squares - 2 * image.reshape(len(image), -1) @ flat.T for image in turned])  # up to |image|^2
    which, index = np.unravel_index(gaps.transpose(1, 0, 2).reshape(len(images), -1).argmin(1), gaps.shape[::2])
    found = np.stack([flip_and_turn(patches[i], codes[k]) for i, k in zip(index, which.tolist(), strict=True)])
    return Nearest(np.sqrt(((images - found) ** 2).mean((1, 2, 3))), index, found)


def turned_back(images: Float[np.ndarray, "N P P C"], code: int) -> Float[np.ndarray, "N P P C"]:
    """Invert `transforms.flip_and_turn` of images."""
    return np.rot90(images[:, :, ::-1] if code >= MIRRORED else images, -(code % 4), axes=(1, 2))
