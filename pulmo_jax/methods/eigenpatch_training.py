"""Fit of one scale of the eigenpatch search: patch subspaces, and the weights of their energies.

The weights are those of a softmax over the anchors, fitted to out-of-fold energies of the training images.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import minimize

from pulmo_jax.core import shape_model
from pulmo_jax.core.pca import Subspace
from pulmo_jax.core.shape_model import ShapeModel
from pulmo_jax.methods.eigenpatch_stages import (
    NOWHERE,
    Maps,
    Scale,
    Stage,
    around,
    boxes,
    nearest_anchors,
    padded,
    posterior,
    search,
    shrink_images,
)
from pulmo_jax.methods.eigenpatch_subspaces import fold_rows, patch_subspaces


def fit_stage(
    how: Scale,
    reach: int | None,
    images: Float[Array, "N S S"],
    points: Float[np.ndarray, "N K 2"],
    shape: ShapeModel,
    found: Float[Array, "N K 2"] | None,
    fold: Int[np.ndarray, "N"],
    seed: int,
) -> tuple[Stage, Float[Array, "N K 2"]]:
    """Fit one scale.

    Args:
        how: Settings of the scale.
        reach: Search radius about `found`, px of the scale; None for the first scale, which searches the bounding boxes
            of the training positions.
        images: Training images.
        points: Their landmarks (y, x), working px.
        shape: Shape model, working px.
        found: Out-of-fold estimates of the previous scale, working px; None for the first scale.
        fold: Fold of each image.
        seed: Random seed of the background patches.

    Returns:
        The fitted scale, and its estimates of the training landmarks with out-of-fold components, working px.
    """
    anchors, offset = nearest_anchors(points, how.pixel, images.shape[-1])
    centre, inside = boxes(anchors)
    if reach is not None:
        inside = np.ones((len(centre), 2 * reach + 1, 2 * reach + 1), bool)
    empty = Subspace(*[jnp.zeros(0)] * 4)
    arrays = (jnp.asarray(centre), jnp.asarray(inside), jnp.asarray(offset, jnp.float32))
    stage = Stage(*arrays, empty, empty, jnp.zeros((len(centre), 4)))
    centres = np.tile(centre, (len(images), 1, 1))
    if found is not None:
        centres = np.asarray(around(stage, how.pixel, images.shape[-1], found))
    landmark, anywhere = subspaces(how, images, anchors, centres, inside, fold, seed)
    maps = unseen_energies(stage, how, images, found, landmark, anywhere, jnp.asarray(fold_rows(fold)))
    weights = fit_weights(how, maps, anchors - centres, inside, shape)
    last = [jax.tree.map(lambda leaf: leaf[-1], subspace) for subspace in (landmark, anywhere)]
    stage = stage._replace(landmark=last[0], anywhere=last[1], weights=jnp.asarray(weights, jnp.float32))
    return stage, posterior(shape, stage, how, maps).points


def fold_of(groups: Sequence[str], folds: int) -> Int[np.ndarray, "N"]:
    """Assign images to folds round-robin by group; the images of a group share a fold."""
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([order[group] % folds for group in groups])


def subspaces(
    how: Scale,
    images: Float[Array, "N S S"],
    anchors: Int[np.ndarray, "N K 2"],
    centres: Int[np.ndarray, "N K 2"],
    inside: Bool[np.ndarray, "K a a"],
    fold: Int[np.ndarray, "N"],
    seed: int,
) -> tuple[Subspace, Subspace]:
    """Fit subspaces of landmark patches and of background patches from the search regions.

    Args:
        how: Settings of the scale.
        images: Training images.
        anchors: Anchors of the landmarks, px of the scale.
        centres: Centres of the search windows, px of the scale.
        inside: Anchors of the windows that belong to the search region.
        fold: Fold of each image.
        seed: Random seed of the background patches.

    Returns:
        Landmark and background subspaces, with leading axes (folds + 1, K): without each fold, then for all images.
    """
    half, reach = how.template // 2, inside.shape[-1] // 2
    wide = padded(shrink_images(images, how.pixel), half + reach)
    far = background_anchors(how.background, centres, inside, seed)
    corners = (anchors[:, None] + reach, far + reach)
    landmark, anywhere = (patch_subspaces(wide, part, how.template, fold, how.variance) for part in corners)
    return landmark, anywhere


def background_anchors(
    count: int, centres: Int[np.ndarray, "N K 2"], inside: Bool[np.ndarray, "K a a"], seed: int
) -> Int[np.ndarray, "N B K 2"]:
    """Draw random anchors from each landmark's search region.

    Args:
        count: Number B of anchors per image and landmark.
        centres: Centres of the search windows, px of the scale.
        inside: Anchors of the windows that belong to the search region.
        seed: Random seed.

    Returns:
        The anchors (y, x), px of the scale.
    """
    rng = np.random.default_rng(seed)
    n_images, reach = len(centres), inside.shape[-1] // 2
    drawn = []
    for k in range(len(inside)):
        steps = np.argwhere(inside[k]) - reach
        chosen = steps[rng.integers(0, len(steps), n_images * count)].reshape(n_images, count, 2)
        drawn.append(centres[:, None, k] + chosen)
    return np.stack(drawn, axis=2)


@partial(jax.jit, static_argnames="how")
def unseen_energies(
    stage: Stage,
    how: Scale,
    images: Float[Array, "N S S"],
    known: Float[Array, "N K 2"] | None,
    landmark: Subspace,
    anywhere: Subspace,
    rows: Int[Array, "F n"],
) -> Maps:
    """Compute out-of-fold energies: those of every image under components fitted without its fold.

    Args:
        stage: The scale, without subspaces.
        how: Its settings.
        images: Training images.
        known: Current estimates (y, x), working px; None on the first scale.
        landmark: Subspaces of landmark patches, with leading axes (folds + 1, K).
        anywhere: Subspaces of background patches, with the same axes.
        rows: Image indices of each fold, padded with -1.

    Returns:
        The energies and the positions of the anchors.
    """

    def of_fold(part: tuple[Subspace, Subspace, Array]) -> Maps:
        at_landmark, in_region, numbers = part
        near = None if known is None else known[numbers]
        return search(stage._replace(landmark=at_landmark, anywhere=in_region), how, images[numbers], near)

    without_one = (jax.tree.map(lambda leaf: leaf[:-1], subspace) for subspace in (landmark, anywhere))
    maps = jax.lax.map(of_fold, (*without_one, rows))
    slot = jnp.zeros(len(images), jnp.int32)
    flat = jnp.where(rows.ravel() >= 0, rows.ravel(), len(images))
    slot = slot.at[flat].set(jnp.arange(rows.size, dtype=jnp.int32), mode="drop")  # position of each image in `rows`
    energies = jnp.moveaxis(maps.energies, 0, 1)
    energies = energies.reshape(len(energies), -1, *energies.shape[3:])
    return Maps(energies[:, slot], maps.places.reshape(-1, *maps.places.shape[2:])[slot])


def fit_weights(
    how: Scale,
    maps: Maps,
    steps: Int[np.ndarray, "N K 2"],
    inside: Bool[np.ndarray, "K a a"],
    shape: ShapeModel,
) -> Float[np.ndarray, "K 4"]:
    """Fit the weights of every landmark's energies, with its marginal distribution under the shape model as the prior.

    Args:
        how: Settings of the scale.
        maps: Out-of-fold energies of the training images.
        steps: True anchors minus the centres of the search windows, px of the scale.
        inside: Anchors of the windows that belong to the search region.
        shape: Shape model, working px.

    Returns:
        The weights.
    """
    reach, size = inside.shape[-1] // 2, inside.shape[-1]
    variances = shape_model.point_covariances(shape.lower @ shape.lower.T)
    precisions, mean, maps = jax.device_get((shape_model.inverse_2x2(variances), shape.mean, maps))
    weights = []
    for k in range(len(inside)):
        seen = (abs(steps[:, k]) <= reach).all(-1)
        index = steps[seen, k] + reach
        move = maps.places[seen, k] - mean[k]
        prior = -np.einsum("nai,ij,naj->na", move, precisions[k].astype(float), move) / 2
        prior = np.where(inside[k].ravel(), prior, NOWHERE)
        energies = np.asarray(maps.energies[k], np.float64)[seen]
        weights.append(softmax_weights(energies, prior, index[:, 0] * size + index[:, 1], how.ridge))
    return np.array(weights)


def softmax_weights(
    energies: Float[np.ndarray, "N A F"], log_prior: Float[np.ndarray, "N A"], true: Int[np.ndarray, "N"], ridge: float
) -> Float[np.ndarray, "F"]:
    """Fit weights w by maximum likelihood of the true anchors, with p(a) proportional to prior(a) exp(-w' energies(a)).

    The problem is convex.

    Args:
        energies: F energies of A anchors in N images.
        log_prior: Log-prior of each anchor, up to a constant.
        true: Index of the true anchor in each image.
        ridge: Ridge penalty on the weights of energies standardised to unit standard deviation.

    Returns:
        The weights.
    """
    spread = energies.std((0, 1))
    scaled = -energies / np.where(spread > 0, spread, 1)
    image = np.arange(len(true))
    at_true = scaled[image, true]

    def cost(w: np.ndarray) -> tuple[float, np.ndarray]:
        logits = scaled @ w + log_prior
        logits -= logits.max(1, keepdims=True)
        share = np.exp(logits)
        total = share.sum(1, keepdims=True)
        loss = (np.log(total[:, 0]) - logits[image, true]).mean() + ridge * w @ w
        expected = np.matmul((share / total)[:, None], scaled)[:, 0]
        return loss, (expected - at_true).mean(0) + 2 * ridge * w

    found = minimize(cost, np.zeros(energies.shape[-1]), jac=True, method="L-BFGS-B").x
    return found / np.where(spread > 0, spread, 1)
