"""What a landmark method has to beat: the mean shape, ridge and RBF kernel ridge on z-normalised pixels."""

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
RIDGE_ALPHAS = tuple(10.0**power for power in range(-4, 2))  # of a linear kernel whose mean diagonal is 1
RBF_ALPHAS = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RBF_WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # in median squared distances


class Baselines(NamedTuple):
    """mean: shape, working px. pixels: of the training images, z-normalised. ridge: intercept (the last row) and
    weights of pixels. width: of the kernel exp(-d^2 / width). duals: its weights of the training images."""

    mean: Float[np.ndarray, "K 2"]
    pixels: Float[np.ndarray, "N P"]
    ridge: Float[np.ndarray, "inputs D"]
    width: Float[np.ndarray, ""]
    duals: Float[np.ndarray, "N D"]

    def locate(self, images: Float[np.ndarray, "B S S"]) -> dict[str, Float[np.ndarray, "B K 2"]]:
        """Points by name: `mean shape`, `ridge`, `kernel ridge`; working px."""
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
    """Each image at 64x64 px, mean 0 and standard deviation 1."""
    arrays = jnp.asarray(images, jnp.float32)
    if images.shape[1] != SIDE:
        arrays = jax.image.resize(arrays, (len(images), SIDE, SIDE), "linear", antialias=True)
    return np.asarray(contrast.zscore(arrays)).reshape(len(images), -1)


def rbf(a: Float[np.ndarray, "A P"], b: Float[np.ndarray, "B P"], width: float) -> Float[np.ndarray, "A B"]:
    return np.exp(-euclidean_distances(a, b, squared=True) / width)


def fit_baselines(
    images: Float[np.ndarray, "N S S"],
    points: Float[np.ndarray, "N K 2"],
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Baselines:
    """seed: of the five folds by whose mean error alpha and the width are chosen; groups stay together in them, and
    without their names each image is one.

    Raises InputError for fewer groups than folds.
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
    """The kernel and alpha of least mean error on the second part of each fold, learnt on the first."""
    pairs = [(kernel, alpha) for kernel in kernels.values() for alpha in alphas]
    errors = [np.mean([held_out_error(*pair, points, *fold) for fold in folds]) for pair in pairs]
    return pairs[int(np.argmin(errors))]


def dual_weights(
    kernel: Float[np.ndarray, "N N"], points: Float[np.ndarray, "N K 2"], alpha: float
) -> Float[np.ndarray, "N D"]:
    """(kernel + alpha)^-1 (points - mean)."""
    moves = (points - points.mean(0)).reshape(len(points), -1)
    return solve(kernel + alpha * np.eye(len(kernel), dtype=kernel.dtype), moves, assume_a="pos")


def held_out_error(kernel: np.ndarray, alpha: float, points: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    move = kernel[np.ix_(test, train)] @ dual_weights(kernel[np.ix_(train, train)], points[train], alpha)
    found = points[train].mean(0) + move.reshape(len(test), -1, 2)
    return float(np.linalg.norm(found - points[test], axis=-1).mean())
