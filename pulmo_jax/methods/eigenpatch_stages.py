"""One scale of the eigenpatch search with a shape prior: energies of all anchors, their weights, the posterior.

A template that fits everywhere says little. So each anchor has four energies (Moghaddam & Pentland 1997, IEEE PAMI
19:696): outside and within the subspace of patches at the landmark, and of patches anywhere in its region. Their
weighted sum is minus the logarithm of the likelihood; the weights are those of a softmax over the anchors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.lib.stride_tricks import sliding_window_view
from scipy.optimize import minimize

from pulmo_jax.core import pca, shape_model
from pulmo_jax.core.pca import Subspace
from pulmo_jax.core.shape_model import ShapeModel
from pulmo_jax.methods.located import Located

NOWHERE = -1e9  # logarithm of the likelihood of an anchor outside its region
LEAST = 1e-12  # variance of a direction that training patches do not have


class Scale(NamedTuple):
    """pixel: working px for each px of this scale. template: its side, px of this scale, odd. iterations, damping: of
    the posterior. The rest is of the fit alone; see `Eigenpatch`."""

    pixel: int
    template: int
    iterations: int
    damping: float
    variance: float
    folds: int
    background: int
    ridge: float


class Stage(NamedTuple):
    """All landmarks on one scale, in its px, padded to one size.

    centre: of the square of a x a anchors where nothing is known yet. inside: the anchors that count. offset: mean of
    training points minus their anchors, working px. landmark, anywhere: subspaces of patches there. weights: of the
    residual and within energies of the first, then of the second.
    """

    centre: Int[Array, "K 2"]
    inside: Bool[Array, "K a a"]
    offset: Float[Array, "2"]
    landmark: Subspace
    anywhere: Subspace
    weights: Float[Array, "K 4"]


class Maps(NamedTuple):
    energies: Float[Array, "K B A 4"]
    places: Float[Array, "B K A 2"]  # of the anchors, working px


def nearest_anchors(points: Float[np.ndarray, "N K 2"], pixel: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixel of the scale that each point lies on (one of the image), and the mean of what is lost, working px."""
    anchors = np.clip(np.floor((points + 0.5) / pixel), 0, side // pixel - 1).astype(np.int32)
    return anchors, (points - working_px(anchors, pixel)).mean((0, 1))


def working_px(anchors, pixel: int):
    return (anchors + 0.5) * pixel - 0.5


def boxes(anchors: Int[np.ndarray, "N K 2"]) -> tuple[np.ndarray, np.ndarray]:
    """Centre of the training positions' bounding boxes, and which anchors of a square around it lie in the box."""
    low, high = anchors.min(0), anchors.max(0)
    centre = (low + high) // 2
    reach = int((high - centre).max())
    near = np.arange(-reach, reach + 1) + centre[..., None]
    within = (near >= low[..., None]) & (near <= high[..., None])
    return centre.astype(np.int32), within[:, 0, :, None] & within[:, 1, None, :]


def around(stage: Stage, pixel: int, side: int, points: Float[Array, "B K 2"]) -> Int[Array, "B K 2"]:
    """The anchors nearest to points in working px."""
    anchors = jnp.round((points - stage.offset + 0.5) / pixel - 0.5).astype(jnp.int32)
    return jnp.clip(anchors, 0, side // pixel - 1)


def shrink_images(images: Float[Array, "B S S"], pixel: int) -> Float[Array, "B s s"]:
    """The mean of every pixel x pixel block."""
    count, side, _ = images.shape
    return images.reshape(count, side // pixel, pixel, side // pixel, pixel).mean((2, 4))


def padded(images, margin: int):
    """The edge's values go on outside: landmarks may be at the edge."""
    xp = np if isinstance(images, np.ndarray) else jnp
    return xp.pad(images, ((0, 0), (margin, margin), (margin, margin)), mode="edge")


def search(stage: Stage, how: Scale, images: Float[Array, "B S S"], points: Float[Array, "B K 2"] | None) -> Maps:
    """Energies of all anchors of all landmarks in all images. points: what is known so far, working px."""
    size, reach = stage.inside.shape[-1], stage.inside.shape[-1] // 2
    small = shrink_images(images, how.pixel)
    start = jnp.broadcast_to(stage.centre, (len(images), *stage.centre.shape))
    centres = start if points is None else around(stage, how.pixel, images.shape[-1], points)
    margin = reach + how.template // 2
    wide, side = padded(small, margin), size + how.template - 1

    def of_landmark(part: tuple[Array, Subspace, Subspace]) -> Array:
        corners, landmark, anywhere = part
        cut = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1]), (side, side)))
        regions = cut(wide, corners)
        pairs = [pca.window_energies(of, regions, how.template) for of in (landmark, anywhere)]
        rests = [jnp.maximum(of.rest, LEAST) for of in (landmark, anywhere)]
        parts = [part for e, rest in zip(pairs, rests, strict=True) for part in (e.residual / rest, e.within)]
        return jnp.stack(parts, -1).reshape(len(images), size**2, 4)

    # The corner of the wide image's window is the centre less both half widths, and the margin is just that.
    energies = jax.lax.map(of_landmark, (centres.swapaxes(0, 1), stage.landmark, stage.anywhere))
    grid = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    return Maps(energies, working_px(centres[:, :, None] + grid, how.pixel) + stage.offset)


def posterior(shape: ShapeModel, stage: Stage, how: Scale, maps: Maps) -> Located:
    """Of all points of an image together."""

    def of_one(logits: Array, places: Array) -> Located:
        found = shape_model.posterior_from_maps(shape, logits, places, float(how.pixel), how.iterations, how.damping)
        return Located(found.points, shape_model.point_covariances(found.covariance))

    logits = -jnp.einsum("kbaf,kf->bka", maps.energies, stage.weights)
    logits = jnp.where(stage.inside.reshape(len(stage.inside), -1), logits, NOWHERE)
    return jax.vmap(of_one)(logits, maps.places)


def fit_stage(
    how: Scale,
    reach: int | None,
    images: Float[np.ndarray, "N S S"],
    points: Float[np.ndarray, "N K 2"],
    shape: ShapeModel,
    found: Float[np.ndarray, "N K 2"] | None,
    fold: Int[np.ndarray, "N"],
    seed: int,
) -> tuple[Stage, Float[np.ndarray, "N K 2"]]:
    """The stage, and where it finds the training points by components that have not seen them: where the next searches.

    reach: px of the scale around `found`; None: the first stage, which searches the training positions' boxes.
    fold: of each image.
    """
    anchors, offset = nearest_anchors(points, how.pixel, images.shape[-1])
    centre, inside = boxes(anchors)
    if reach is not None:
        inside = np.ones((len(centre), 2 * reach + 1, 2 * reach + 1), bool)
    empty = Subspace(*[jnp.zeros(0)] * 4)
    arrays = (jnp.asarray(centre), jnp.asarray(inside), jnp.asarray(offset, jnp.float32))
    stage = Stage(*arrays, empty, empty, jnp.zeros((len(centre), 4)))
    known = None if found is None else jnp.asarray(found)
    centres = np.tile(centre, (len(images), 1, 1))
    if known is not None:
        centres = np.asarray(around(stage, how.pixel, images.shape[-1], known))
    landmark, anywhere = _subspaces(how, images, anchors, centres, inside, fold, seed)
    maps = _unseen(stage, how, jnp.asarray(images), known, landmark, anywhere, fold)
    weights = _weights(how, maps, anchors - centres, inside, shape)
    last = [jax.tree.map(lambda leaf: leaf[-1], of) for of in (landmark, anywhere)]
    stage = stage._replace(landmark=last[0], anywhere=last[1], weights=jnp.asarray(weights, jnp.float32))
    located = jax.jit(lambda stage, maps: posterior(shape, stage, how, maps))(stage, maps)
    return stage, np.asarray(located.points)


def fold_of(groups: Sequence[str], folds: int) -> Int[np.ndarray, "N"]:
    """Of each image, in turn; those of a group are in one fold."""
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([order[group] % folds for group in groups])


def _subspaces(how: Scale, images, anchors, centres, inside, fold, seed: int) -> tuple[Subspace, Subspace]:
    """Of patches at the landmarks and anywhere, with leading axes (folds + 1, K); the last is of all images."""
    rng = np.random.default_rng(seed)
    half, reach = how.template // 2, inside.shape[-1] // 2
    small = np.asarray(shrink_images(jnp.asarray(images), how.pixel))
    windows = sliding_window_view(padded(small, half + reach), (how.template,) * 2, axis=(1, 2))
    image = np.arange(len(images))
    many = np.repeat(image, how.background)
    pairs = []
    for k in range(anchors.shape[1]):
        at = np.argwhere(inside[k]) - reach
        far = centres[many, k] + at[rng.integers(0, len(at), len(many))]
        there = windows[image, anchors[:, k, 0] + reach, anchors[:, k, 1] + reach].reshape(len(image), -1)
        anywhere = windows[many, far[:, 0] + reach, far[:, 1] + reach].reshape(len(many), -1)
        for held_out in range(how.folds + 1):
            seen = fold != held_out
            pairs.append((pca.fit(there[seen], how.variance), pca.fit(anywhere[seen[many]], how.variance)))
    shape = (anchors.shape[1], how.folds + 1)
    both = [pca.stack([pair[i] for pair in pairs]) for i in range(2)]
    split = lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]).swapaxes(0, 1)  # noqa: E731
    return jax.tree.map(split, both[0]), jax.tree.map(split, both[1])


def _unseen(stage: Stage, how: Scale, images: Array, known: Array | None, landmark, anywhere, fold) -> Maps:
    """The energies of every image by the components of the folds that it is not in."""
    energies = jax.jit(lambda stage, images, points: search(stage, how, images, points))
    parts, order = [], []
    for held_out in range(how.folds):
        some = np.flatnonzero(fold == held_out)
        of_fold = [jax.tree.map(lambda leaf, i=held_out: leaf[i], of) for of in (landmark, anywhere)]
        near = None if known is None else known[some]
        parts.append(energies(stage._replace(landmark=of_fold[0], anywhere=of_fold[1]), images[some], near))
        order.append(some)
    back = np.argsort(np.concatenate(order))
    joined = jnp.concatenate([part.energies for part in parts], 1)[:, back]
    return Maps(joined, jnp.concatenate([part.places for part in parts])[back])


def _weights(how: Scale, maps: Maps, steps, inside, shape: ShapeModel) -> Float[np.ndarray, "K 4"]:
    """steps: of the true anchors from the searched squares' centres."""
    reach, size = inside.shape[-1] // 2, inside.shape[-1]
    variances = shape_model.point_covariances(shape.lower @ shape.lower.T)
    precisions = np.asarray(shape_model.inverse_2x2(variances), np.float64)
    weights = []
    for k in range(len(inside)):
        seen = (abs(steps[:, k]) <= reach).all(-1)
        index = steps[seen, k] + reach
        move = np.asarray(maps.places)[seen, k] - np.asarray(shape.mean[k])
        prior = -np.einsum("nai,ij,naj->na", move, precisions[k], move) / 2
        prior = np.where(inside[k].ravel(), prior, NOWHERE)
        energies = np.asarray(maps.energies[k], np.float64)[seen]
        weights.append(softmax_weights(energies, prior, index[:, 0] * size + index[:, 1], how.ridge))
    return np.array(weights)


def softmax_weights(
    energies: Float[np.ndarray, "N A F"], log_prior: Float[np.ndarray, "N A"], true: Int[np.ndarray, "N"], ridge: float
) -> Float[np.ndarray, "F"]:
    """w that makes the true anchors likeliest where p(a) goes as prior(a) exp(-w' energies(a)); convex. ridge: of the
    weights of energies of standard deviation 1."""
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
