"""One scale of the eigenpatch search with a shape prior: energies of all anchors, and the joint posterior of points.

A template that fits everywhere carries little information. Each anchor therefore has four energies: outside and within
the subspace of landmark patches, and outside and within that of background patches from the search region (Moghaddam &
Pentland 1997, IEEE PAMI 19, 696). Their weighted sum is the negative log-likelihood.
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

NOWHERE = -1e9  # log-likelihood of an anchor outside the search region
LEAST = 1e-12  # lower bound of the residual variance

Pixels = TypeVar("Pixels", Array, np.ndarray)


class Scale(NamedTuple):
    """Settings of one scale; each distinct value is compiled once.

    Attributes:
        pixel: Downsampling factor: side of a pixel of this scale, working px.
        template: Side length of the templates, px of this scale, odd.
        iterations: Number of iterations of the joint posterior.
        damping: Fraction of each iteration's update that is applied.
        variance: Fraction of the variance retained by the components.
        folds: Number of cross-validation folds of the training images.
        background: Number of background patches per image and landmark.
        ridge: Ridge penalty on the weights of the energies.
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
    """Fitted models of all landmarks on one scale, with search windows of a common size.

    Attributes:
        centre: Centre (y, x) of the initial a x a search window, px of the scale.
        inside: Anchors of the window that belong to the search region.
        offset: Mean of training points minus their anchors, working px.
        landmark: Subspace of patches at each landmark.
        anywhere: Subspace of background patches in its search region.
        weights: Weights of the energies: outside and within the landmark subspace, then the background subspace.
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
        energies: Outside and within the landmark subspace, then the background subspace; dimensionless.
        places: Positions (y, x) of the anchors, working px.
    """

    energies: Float[Array, "K B A 4"]
    places: Float[Array, "B K A 2"]


def nearest_anchors(
    points: Float[np.ndarray, "N K 2"], pixel: int, side: int
) -> tuple[Int[np.ndarray, "N K 2"], Float[np.ndarray, "2"]]:
    """Round points to anchors.

    Args:
        points: Positions (y, x), working px.
        pixel: Downsampling factor of the scale.
        side: Side length of the working images, px.

    Returns:
        Anchors, px of the scale, clipped to the image; and the mean of points minus anchors, working px.
    """
    anchors = np.clip(np.floor((points + 0.5) / pixel), 0, side // pixel - 1).astype(np.int32)
    return anchors, (points - working_px(anchors, pixel)).mean((0, 1))


def working_px(anchors: Pixels, pixel: int) -> Pixels:
    """Convert pixels of a scale with downsampling factor `pixel` to the positions of their centres, working px."""
    return (anchors + 0.5) * pixel - 0.5


def boxes(anchors: Int[np.ndarray, "N K 2"]) -> tuple[Int[np.ndarray, "K 2"], Bool[np.ndarray, "K a a"]]:
    """Compute bounding boxes of the training positions.

    Args:
        anchors: Anchors of the training points, px of the scale.

    Returns:
        Centre of each landmark's box, and a mask of the anchors in a square window around it that lie in the box.
    """
    low, high = anchors.min(0), anchors.max(0)
    centre = (low + high) // 2
    reach = int((high - centre).max())
    near = np.arange(-reach, reach + 1) + centre[..., None]
    within = (near >= low[..., None]) & (near <= high[..., None])
    return centre.astype(np.int32), within[:, 0, :, None] & within[:, 1, None, :]


def around(stage: Stage, pixel: int, side: int, points: Float[Array, "B K 2"]) -> Int[Array, "B K 2"]:
    """Find the anchors nearest to points.

    Args:
        stage: The fitted scale.
        pixel: Its downsampling factor.
        side: Side length of the working images, px.
        points: Positions (y, x), working px.

    Returns:
        The anchors, px of the scale, clipped to the image.
    """
    anchors = jnp.round((points - stage.offset + 0.5) / pixel - 0.5).astype(jnp.int32)
    return jnp.clip(anchors, 0, side // pixel - 1)


def shrink_images(images: Float[Array, "B S S"], pixel: int) -> Float[Array, "B s s"]:
    """Downsample images by averaging blocks of pixel x pixel."""
    count, side, _ = images.shape
    return images.reshape(count, side // pixel, pixel, side // pixel, pixel).mean((2, 4))


def padded(images: Float[Array, "B s s"], margin: int) -> Float[Array, "B S S"]:
    """Pad images by their edge values on all sides by `margin` px, because landmarks may lie at the edge."""
    return jnp.pad(images, ((0, 0), (margin, margin), (margin, margin)), mode="edge")


def search(stage: Stage, how: Scale, images: Float[Array, "B S S"], points: Float[Array, "B K 2"] | None) -> Maps:
    """Compute the energies of all anchors of all landmarks in all images.

    Args:
        stage: The fitted scale.
        how: Its settings.
        images: Working images.
        points: Current estimates (y, x) at which the search windows are centred, working px; None: the initial windows.

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

    # Corner of a window: centre minus reach and half template, cancelled by the padding of the same size.
    energies = jax.lax.map(of_landmark, (centres.swapaxes(0, 1), stage.landmark, stage.anywhere))
    grid = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    return Maps(energies, working_px(centres[:, :, None] + grid, how.pixel) + stage.offset)


@partial(jax.jit, static_argnames="how")
def posterior(shape: ShapeModel, stage: Stage, how: Scale, maps: Maps) -> Located:
    """Compute the joint posterior of all points of each image under the shape model.

    Args:
        shape: Shape model, working px.
        stage: The fitted scale.
        how: Its settings.
        maps: Energies and positions of the anchors.

    Returns:
        Posterior means and marginal covariances of the points, working px.
    """

    def of_one(logits: Array, places: Array) -> Located:
        found = shape_model.posterior_from_maps(shape, logits, places, float(how.pixel), how.iterations, how.damping)
        return Located(found.points, shape_model.point_covariances(found.covariance))

    logits = -jnp.einsum("kbaf,kf->bka", maps.energies, stage.weights)
    logits = jnp.where(stage.inside.reshape(len(stage.inside), -1), logits, NOWHERE)
    return jax.vmap(of_one)(logits, maps.places)
