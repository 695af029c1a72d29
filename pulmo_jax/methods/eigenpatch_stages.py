"""One scale of the eigenpatch search with a shape prior: energies of all anchors, and the posterior of all points.

A template that fits everywhere carries little information. So each anchor has four energies: outside and within the
subspace of patches at the landmark, and of patches anywhere in its region (Moghaddam & Pentland 1997, IEEE PAMI 19,
696). Their weighted sum is minus the logarithm of the likelihood.
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core import pca, shape_model
from pulmo_jax.core.pca import Subspace
from pulmo_jax.core.shape_model import ShapeModel
from pulmo_jax.methods.located import Located

NOWHERE = -1e9  # logarithm of the likelihood of an anchor outside its region
LEAST = 1e-12  # variance of a direction that training patches do not have

Pixels = TypeVar("Pixels", Array, np.ndarray)


class Scale(NamedTuple):
    """Settings of one scale; each distinct value is compiled once.

    Attributes:
        pixel: Working pixels for each pixel of this scale.
        template: Side of the templates, px of this scale, odd.
        iterations: Iterations of the posterior.
        damping: Share of the step that each of these takes.
        variance: Share of the variance that the components keep, in the fit.
        folds: Number of folds of the training images.
        background: Number of patches of each image that represent its region.
        ridge: Ridge penalty on the energies' weights.
    """

    pixel: int
    template: int
    iterations: int
    damping: float
    variance: float
    folds: int
    background: int
    ridge: float


class Stage(NamedTuple):
    """All landmarks on one scale, in its pixels, padded to one size.

    Attributes:
        centre: Centre of the square of a x a anchors that is searched where nothing is known yet.
        inside: Anchors that count.
        offset: Mean of training points minus their anchors, working px.
        landmark: Subspace of patches at each landmark.
        anywhere: Subspace of patches in its region.
        weights: Weights of the energies: residual and within of the first, then of the second.
    """

    centre: Int[Array, "K 2"]
    inside: Bool[Array, "K a a"]
    offset: Float[Array, "2"]
    landmark: Subspace
    anywhere: Subspace
    weights: Float[Array, "K 4"]


class Maps(NamedTuple):
    """Energies of A anchors of each landmark in each image.

    Attributes:
        energies: The four energies.
        places: Positions (y, x) of the anchors, working px.
    """

    energies: Float[Array, "K B A 4"]
    places: Float[Array, "B K A 2"]


def nearest_anchors(
    points: Float[np.ndarray, "N K 2"], pixel: int, side: int
) -> tuple[Int[np.ndarray, "N K 2"], Float[np.ndarray, "2"]]:
    """Rounds points to anchors.

    Args:
        points: Positions (y, x), working px.
        pixel: Working pixels for each pixel of the scale.
        side: Side of the working images, px.

    Returns:
        The pixel of the scale that each point lies on, limited to the image, and the mean of points minus anchors,
        working px.
    """
    anchors = np.clip(np.floor((points + 0.5) / pixel), 0, side // pixel - 1).astype(np.int32)
    return anchors, (points - working_px(anchors, pixel)).mean((0, 1))


def working_px(anchors: Pixels, pixel: int) -> Pixels:
    """Position of the middle of a scale's pixel in working pixels."""
    return (anchors + 0.5) * pixel - 0.5


def boxes(anchors: Int[np.ndarray, "N K 2"]) -> tuple[Int[np.ndarray, "K 2"], Bool[np.ndarray, "K a a"]]:
    """Bounding boxes of the training positions.

    Args:
        anchors: Anchors of the training points.

    Returns:
        Centre of each landmark's box, and which anchors of a square around it lie in the box.
    """
    low, high = anchors.min(0), anchors.max(0)
    centre = (low + high) // 2
    reach = int((high - centre).max())
    near = np.arange(-reach, reach + 1) + centre[..., None]
    within = (near >= low[..., None]) & (near <= high[..., None])
    return centre.astype(np.int32), within[:, 0, :, None] & within[:, 1, None, :]


def around(stage: Stage, pixel: int, side: int, points: Float[Array, "B K 2"]) -> Int[Array, "B K 2"]:
    """Anchors nearest to points in working pixels; side: of the working images."""
    anchors = jnp.round((points - stage.offset + 0.5) / pixel - 0.5).astype(jnp.int32)
    return jnp.clip(anchors, 0, side // pixel - 1)


def shrink_images(images: Float[Array, "B S S"], pixel: int) -> Float[Array, "B s s"]:
    """Averages blocks of pixel x pixel."""
    count, side, _ = images.shape
    return images.reshape(count, side // pixel, pixel, side // pixel, pixel).mean((2, 4))


def padded(images: Float[Array, "B s s"], margin: int) -> Float[Array, "B S S"]:
    """Repeats the edge outside of the images, because landmarks may lie at the edge."""
    return jnp.pad(images, ((0, 0), (margin, margin), (margin, margin)), mode="edge")


def search(stage: Stage, how: Scale, images: Float[Array, "B S S"], points: Float[Array, "B K 2"] | None) -> Maps:
    """Energies of all anchors of all landmarks in all images.

    Args:
        stage: The fitted scale.
        how: Its settings.
        images: Working images.
        points: Points found so far, working px, around which anchors are searched; None: the training regions.

    Returns:
        The energies and the positions of the anchors.
    """
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
        pairs = [pca.window_energies(subspace, regions, how.template) for subspace in (landmark, anywhere)]
        rests = [jnp.maximum(subspace.rest, LEAST) for subspace in (landmark, anywhere)]
        parts = [part for e, rest in zip(pairs, rests, strict=True) for part in (e.residual / rest, e.within)]
        return jnp.stack(parts, -1).reshape(len(images), size**2, 4)

    # The window's corner is the centre minus both half widths, which the margin makes up for.
    energies = jax.lax.map(of_landmark, (centres.swapaxes(0, 1), stage.landmark, stage.anywhere))
    grid = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    return Maps(energies, working_px(centres[:, :, None] + grid, how.pixel) + stage.offset)


@partial(jax.jit, static_argnames="how")
def posterior(shape: ShapeModel, stage: Stage, how: Scale, maps: Maps) -> Located:
    """Posterior of all points of each image together, under the shape model."""

    def of_one(logits: Array, places: Array) -> Located:
        found = shape_model.posterior_from_maps(shape, logits, places, float(how.pixel), how.iterations, how.damping)
        return Located(found.points, shape_model.point_covariances(found.covariance))

    logits = -jnp.einsum("kbaf,kf->bka", maps.energies, stage.weights)
    logits = jnp.where(stage.inside.reshape(len(stage.inside), -1), logits, NOWHERE)
    return jax.vmap(of_one)(logits, maps.places)
