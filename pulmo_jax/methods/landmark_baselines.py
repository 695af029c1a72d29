"""Landmark baselines: mean shape, ridge regression and RBF kernel ridge regression on z-normalised pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.linalg import solve
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GroupKFold

from pulmo_jax.core import contrast
from pulmo_jax.types import InputError

SIDE = 64
FOLDS = 5
RIDGE_ALPHAS = tuple(10.0**power for power in range(-4, 2))  # for a linear kernel with a mean diagonal of 1
RBF_ALPHAS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RBF_WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # in units of the median squared distance between images


class Baselines(NamedTuple):
    """Fitted baselines.

    Attributes:
        mean: Mean shape (y, x), working px.
        pixels: Z-normalised pixels of the training images.
        ridge: Weights of the pixels, and the intercept as the last row; working px.
        width: Width of the kernel exp(-d^2 / width).
        duals: Dual weights of the training images in kernel ridge regression, working px.
    """

    mean: Float[np.ndarray, "K 2"]
    pixels: Float[np.ndarray, "N P"]
    ridge: Float[np.ndarray, "inputs D"]
    width: Float[np.ndarray, ""]
    duals: Float[np.ndarray, "N D"]

    def locate(self, images: Float[np.ndarray, "B S S"]) -> dict[str, Float[np.ndarray, "B K 2"]]:
        """Predict landmarks with every baseline.

        Args:
            images: Working images.

        Returns:
            Points (y, x) by baseline name: `mean shape`, `ridge`, `kernel ridge`; working px.
        """
        x = normalised_pixels(images)
        moves = {
            "mean shape": np.zeros((len(x), self.mean.size), np.float32),
            "ridge": x @ self.ridge[:-1] + self.ridge[-1],
            "kernel ridge": rbf(x, self.pixels, float(self.width)) @ self.duals,
        }
        return {
            name: (move.reshape(-1, *self.mean.shape) + self.mean).astype(np.float32) for name, move in moves.items()
        }


def normalised_pixels(images: Float[np.ndarray, "B S S"]) -> Float[np.ndarray, "B P"]:
    """Resize images to 64x64 px and normalise each to mean 0 and standard deviation 1."""
    arrays = jnp.asarray(images, jnp.float32)
    if images.shape[1] != SIDE:
        arrays = jax.image.resize(arrays, (len(images), SIDE, SIDE), "linear", antialias=True)
    return np.asarray(contrast.zscore(arrays)).reshape(len(images), -1)


def rbf(a: Float[np.ndarray, "A P"], b: Float[np.ndarray, "B P"], width: float) -> Float[np.ndarray, "A B"]:
    """Compute the radial basis function kernel exp(-d^2 / width) between the rows of two arrays."""
    return np.exp(-euclidean_distances(a, b, squared=True) / width)


def fit_baselines(
    images: Float[np.ndarray, "N S S"],
    points: Float[np.ndarray, "N K 2"],
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Baselines:
    """Fit all baselines; five-fold cross-validation selects alpha and the kernel width by mean error.

    Args:
        images: Training images.
        points: Landmarks (y, x), working px.
        seed: Random seed of the folds.
        groups: Group of each image; a group stays in one fold. None: every image is a group.

    Returns:
        The fitted baselines.

    Raises:
        InputError: If there are fewer groups than folds.
    """
    groups = [str(i) for i in range(len(images))] if groups is None else groups
    if len(set(groups)) < FOLDS:
        raise InputError(
            f"landmark baselines: {len(images)} training image(s) in {len(set(groups))} group(s) given; at least "
            f"{FOLDS} are needed: add images, or change data.group_regex."
        )
    shuffled = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = list(shuffled.split(points, groups=groups))
    x, mean = normalised_pixels(images), points.mean(0)
    centred = x - x.mean(0)
    scale = float((centred**2).sum(1).mean()) or 1.0
    linear, alpha = best_kernel({1.0: centred @ centred.T / scale}, RIDGE_ALPHAS, points, folds)
    weights = centred.T @ dual_weights(linear, points, alpha) / scale
    squared = euclidean_distances(x, squared=True)
    typical = float(np.median(squared[~np.eye(len(x), dtype=bool)])) or 1.0
    radials = {width * typical: np.exp(-squared / (width * typical)) for width in RBF_WIDTHS}
    kernel, alpha = best_kernel(radials, RBF_ALPHAS, points, folds)
    width = next(width for width, radial in radials.items() if radial is kernel)
    arrays = (
        mean, x, np.concatenate([weights, -x.mean(0)[None] @ weights]), width, dual_weights(kernel, points, alpha)
    )  # fmt: skip
    return Baselines(*(np.asarray(array, np.float32) for array in arrays))


def best_kernel(
    kernels: dict[float, Float[np.ndarray, "N N"]],
    alphas: tuple[float, ...],
    points: Float[np.ndarray, "N K 2"],
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[Float[np.ndarray, "N N"], float]:
    """Select kernel and alpha by cross-validation.

    Args:
        kernels: Kernel matrices of the training images, by kernel width.
        alphas: Candidate ridge penalties.
        points: Landmarks (y, x), working px.
        folds: Training and held-out image indices of each fold.

    Returns:
        The kernel and alpha of smallest mean held-out error.
    """
    pairs = [(kernel, alpha) for kernel in kernels.values() for alpha in alphas]
    errors = [np.mean([held_out_error(*pair, points, *fold) for fold in folds]) for pair in pairs]
    return pairs[int(np.argmin(errors))]


def dual_weights(
    kernel: Float[np.ndarray, "N N"], points: Float[np.ndarray, "N K 2"], alpha: float
) -> Float[np.ndarray, "N D"]:
    """Compute the dual weights (kernel + alpha I)^-1 (points - mean).

    Args:
        kernel: Kernel matrix of the training images.
        points: Landmarks (y, x), working px.
        alpha: Ridge penalty.

    Returns:
        Weights of the training images for the D = 2 K coordinates, working px.
    """
    moves = (points - points.mean(0)).reshape(len(points), -1)
    return solve(kernel + alpha * np.eye(len(kernel), dtype=kernel.dtype), moves, assume_a="pos")


def held_out_error(kernel: np.ndarray, alpha: float, points: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """Compute the mean landmark error on held-out images, working px."""
    move = kernel[np.ix_(test, train)] @ dual_weights(kernel[np.ix_(train, train)], points[train], alpha)
    found = points[train].mean(0) + move.reshape(len(test), -1, 2)
    return float(np.linalg.norm(found - points[test], axis=-1).mean())
