"""Principal components of patches for every landmark and every cross-validation fold, in one program.

Means and scatter matrices are computed once per fold and merged over the images outside each fold (Chan, Golub &
LeVeque 1983), so each patch is read once, whatever the number of folds. With more samples than pixels, an
eigendecomposition of the scatter matrix costs less than a singular value decomposition of the samples. It uses float64,
because the scatter matrix squares the condition number.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core.pca import Subspace
from pulmo_jax.types import InputError


class Eigen(NamedTuple):
    """Principal components for L landmarks and S = F + 1 image sets: the images outside each of F folds, and all.

    Attributes:
        mean: Mean patch.
        vectors: Components as rows, in order of decreasing variance.
        variances: Population variance (1/N) of each component.
        n_kept: Number of components that retain the requested fraction of the variance.
    """

    mean: Float[Array, "L S P"]
    vectors: Float[Array, "L S P P"]
    variances: Float[Array, "L S P"]
    n_kept: Int[Array, "L S"]


def fold_rows(fold: Int[np.ndarray, "N"]) -> Int[np.ndarray, "F n"]:
    """Return the image indices of each fold, padded with -1 to the size of the largest fold."""
    rows = [np.flatnonzero(fold == number) for number in range(fold.max() + 1)]
    most = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, most - len(row)), constant_values=-1) for row in rows])


def patch_subspaces(
    images: Float[Array, "N H W"],
    corners: Int[np.ndarray, "N B K 2"],
    side: int,
    fold: Int[np.ndarray, "N"],
    kept: float,
) -> Subspace:
    """Compute principal components of square patches, for the images outside each fold and for all images.

    Args:
        images: Images, padded so that every patch lies inside.
        corners: First pixel (y, x) of B patches per image for each of K landmarks, px.
        side: Side length of the patches, px; P = side^2.
        fold: Fold of each image.
        kept: Fraction of the variance retained by the components.

    Returns:
        Subspaces with leading axes (F + 1, K), of which the last set holds all images. Subspaces with fewer components
        are padded with zero components of variance 1.

    Raises:
        InputError: If a set has fewer than two patches, or identical ones only.
    """
    rows = fold_rows(fold)
    numbers = (rows >= 0).sum(1) * corners.shape[1]
    if (least := min(numbers.sum() - numbers.max(), numbers.sum())) < 2:
        raise InputError(f"principal components: {least} sample(s) given; at least 2 are needed: add images.")
    with jax.enable_x64(True):
        found = eigen_patches(images, jnp.asarray(corners, jnp.int32), jnp.asarray(rows, jnp.int32), side, kept)
        count, total = jax.device_get((found.n_kept, found.variances.sum(-1)))
        if not (total > 0).all():
            raise InputError("principal components: all samples are the same; give images that differ.")
        return truncate(found, int(count.max()))


@partial(jax.jit, static_argnames=("side", "kept"))
def eigen_patches(
    images: Float[Array, "N H W"],
    corners: Int[Array, "N B K 2"],
    rows: Int[Array, "F n"],
    side: int,
    kept: float,
) -> Eigen:
    """Compute the moments of the patches per fold, merge them and decompose them; in float64 if enabled.

    Args:
        images: Images, padded so that every patch lies inside.
        corners: First pixel (y, x) of each patch, px.
        rows: Image indices of each fold, padded with -1.
        side: Side length of the patches, px.
        kept: Fraction of the variance retained by the components.

    Returns:
        The components of each landmark and set.
    """
    n_folds, n_patches = len(rows), corners.shape[1]
    sets = 1 - jnp.eye(n_folds + 1, n_folds, dtype=float)  # folds in each set; the last set has all of them
    inside = jnp.repeat(rows >= 0, n_patches, axis=1)

    def cut(number: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(images, (number, corner[0], corner[1]), (1, side, side)).ravel()

    def of_landmark(corners: Int[Array, "N B 2"]) -> Eigen:
        numbers = jnp.repeat(rows, n_patches, axis=1)
        patches = jax.vmap(jax.vmap(cut))(numbers, corners[rows].reshape(n_folds, -1, 2)).astype(float)
        n, mean, scatter = jax.vmap(fold_moments)(patches, inside)
        return merge_folds(sets, n, mean, scatter, kept)

    return jax.lax.map(of_landmark, jnp.moveaxis(corners, 2, 0))


def fold_moments(
    patches: Float[Array, "n P"], inside: Bool[Array, "n"]
) -> tuple[Float[Array, ""], Float[Array, "P"], Float[Array, "P P"]]:
    """Compute count, mean and scatter matrix sum (x - mean)(x - mean)' of the patches that are not padding."""
    n = inside.sum().astype(patches.dtype)
    mean = jnp.where(inside[:, None], patches, 0).sum(0) / n
    deviations = jnp.where(inside[:, None], patches - mean, 0)
    return n, mean, deviations.T @ deviations


def merge_folds(
    sets: Float[Array, "S F"],
    n: Float[Array, "F"],
    mean: Float[Array, "F P"],
    scatter: Float[Array, "F P P"],
    kept: float,
) -> Eigen:
    """Compute principal components of unions of folds.

    Args:
        sets: 1 for the folds in each set, otherwise 0.
        n: Number of patches in each fold.
        mean: Mean of each fold.
        scatter: Scatter matrix of each fold.
        kept: Fraction of the variance retained by the components.

    Returns:
        The components of each set.
    """
    total = sets @ n
    means = (sets * n) @ mean / total[:, None]
    steps = mean - means[:, None]  # (S, F, P)
    between = jnp.einsum("sf,sfp,sfq->spq", sets * n, steps, steps)
    covariance = (jnp.einsum("sf,fpq->spq", sets, scatter) + between) / total[:, None, None]
    values, vectors = jnp.linalg.eigh(covariance)
    values, vectors = values[:, ::-1], jnp.swapaxes(vectors[:, :, ::-1], 1, 2)
    rank = jnp.minimum(total, values.shape[1]).astype(jnp.int32)[:, None]
    variances = jnp.where(jnp.arange(values.shape[1]) < rank, jnp.maximum(values, 0), 0)
    shares = jnp.cumsum(variances, axis=1) / variances.sum(1, keepdims=True)
    count = jnp.minimum((shares < kept).sum(1, keepdims=True) + 1, rank)[:, 0]
    return Eigen(means, vectors, variances, count)


@partial(jax.jit, static_argnames="most")
def truncate(found: Eigen, most: int) -> Subspace:
    """Truncate to at most `most` components and convert to float32 subspaces, with the sets as the first axis."""
    n_pixels = found.variances.shape[-1]
    number = jnp.arange(n_pixels)
    chosen = number < found.n_kept[..., None]
    left = jnp.where(chosen, 0, found.variances).sum(-1)
    rest = left / jnp.maximum(n_pixels - found.n_kept, 1)
    least = jnp.finfo(found.variances.dtype).eps * found.variances[..., :1]  # lower bound at rounding level
    variances = jnp.where(chosen, jnp.maximum(found.variances, least), 1)[..., :most]
    components = jnp.where(chosen[..., None], found.vectors, 0)[..., :most, :]
    leaves = (found.mean, components, variances, rest)
    return Subspace(*(jnp.swapaxes(leaf, 0, 1).astype(jnp.float32) for leaf in leaves))
