"""Landmark detection by an ensemble of small networks, trained from scratch in one vectorised program.

Each member predicts a heat map per landmark, whose mean is the position (models/landmark_net.py). Members share the
batches but have independent initial parameters and augmentation; `vmap` runs them in one program. The prediction is the
mean over members and over the image and its mirror image. Its covariance is that of the mixture: the mean covariance of
the heat maps plus the covariance of the predicted positions (Lakshminarayanan et al. 2017, "Deep ensembles", Sec. 2.4).
A Gaussian shape model of the training landmarks then gives the joint posterior of all points (core/shape_model.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from pulmo_jax.core import jitter
from pulmo_jax.core.contrast import local_zscore, zscore
from pulmo_jax.core.shape_model import ShapeModel, point_covariances, posterior_from_gaussians
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.landmark_losses import LandmarkLoss, laplace
from pulmo_jax.methods.located import Located
from pulmo_jax.models.landmark_net import LandmarkNet, cell_centres
from pulmo_jax.types import InputError

Batch = tuple[Float[Array, "B S S"], Float[Array, "B K 2"]]
LEAST_SD_PX = 0.1  # added in quadrature to the heat-map covariance, so that no landmark is free of error


@dataclass(frozen=True)
class LandmarkNetwork:
    """Ensemble of heat-map networks; implements methods.located.Locator and Trained.

    Attributes:
        n_landmarks: Number of landmarks K.
        mirror: Index of the landmark that each one becomes under left-right reflection (`mirror_permutation`).
        shapes: Shape model of the training images, working px; required by `shape_prior`.
        network: Factory (n_landmarks, channels, rngs) -> model that maps (B, S, S, C) to logits of heat maps
            (B, h, w, K); the side S must be a multiple of its `stride`.
        loss: Function of displacement= (B, K, 2), in % of the side, and covariance= (B, K, 2, 2), in %^2, that returns
            a value per landmark.
    """

    n_landmarks: int
    mirror: tuple[int, ...]
    shapes: ShapeModel | None = field(compare=False)
    network: Callable[..., Any] = LandmarkNet
    size: Annotated[int, Field(ge=32, le=1024, description="side length of the resized images, px")] = 192
    members: Annotated[int, Field(ge=1, le=32, description="networks in the ensemble")] = 3
    seed: Annotated[int, Field(ge=0, description="random seed of the initial parameters")] = 0
    local_contrast: Annotated[
        float,
        Field(ge=0, le=1, description="sd of the local-contrast input channel, in image side lengths; 0: no channel"),
    ] = 0.0625
    loss: LandmarkLoss = laplace
    rotation_deg: Annotated[float, Field(ge=0, description="augmentation: sd of the rotation, degrees")] = 8.0
    scale: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of the scale")] = 0.12
    aspect: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of the aspect ratio")] = 0.12
    shear: Annotated[float, Field(ge=0, description="augmentation: sd of the shear")] = 0.05
    shift: Annotated[float, Field(ge=0, description="augmentation: sd of the shift, in image side lengths")] = 0.05
    flip: Annotated[float, Field(ge=0, le=1, description="augmentation: fraction of mirrored images")] = 0.5
    gamma: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of gamma")] = 0.4
    shading: Annotated[float, Field(ge=0, description="augmentation: sd of smooth shading, relative to the range")] = (
        0.2
    )
    noise: Annotated[float, Field(ge=0, description="augmentation: sd of pixel noise, relative to the range")] = 0.03
    flip_average: Annotated[bool, Field(description="average the landmarks over the image and its mirror image")] = True
    shape_prior: Annotated[bool, Field(description="combine the heat maps with a Gaussian shape prior")] = True

    def __post_init__(self) -> None:
        if self.size % self.skeleton.stride:
            raise InputError(f"method.size={self.size}: this model needs a multiple of {self.skeleton.stride}")
        if sorted(self.mirror) != list(range(self.n_landmarks)):
            raise InputError(f"mirror={list(self.mirror)}: it must hold each of 0 to {self.n_landmarks - 1} once")

    def member(self, key: Key[Array, ""]) -> Any:
        """Create a network with random initial parameters."""
        channels = 2 if self.local_contrast else 1
        return self.network(n_landmarks=self.n_landmarks, channels=channels, rngs=nnx.Rngs(params=key))

    @cached_property
    def skeleton(self) -> Any:
        """Abstract network: shapes and dtypes without values."""
        return nnx.eval_shape(lambda: self.member(jax.random.key(0)))

    @cached_property
    def graph(self) -> nnx.GraphDef[Any]:
        """Static structure of the network."""
        return nnx.graphdef(self.skeleton)

    def init(self) -> Params:
        """Return the initial parameters of all members, stacked along a leading axis."""
        keys = jax.random.split(jax.random.key(self.seed), self.members)
        return jax.vmap(lambda key: nnx.state(self.member(key), nnx.Param))(keys)

    # --- learning

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the loss, averaged over landmarks and images, then over members.

        Landmarks that the augmentation moves out of the image are excluded.

        Args:
            params: Parameters of all members.
            batch: Working images and landmarks (y, x), working px.
            key: Random key of the augmentation.

        Returns:
            The mean loss.
        """
        keys = jax.random.split(key, self.members)
        return jax.vmap(self._member_loss, in_axes=(0, None, 0))(params, batch, keys).mean()

    def _member_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        images, points = self.jittered(batch, key)
        found = self._heat(params, images)
        percent = 100 / self.size
        losses = self.loss(displacement=(found.points - points) * percent, covariance=found.covariance * percent**2)
        inside = ((points >= 0) & (points <= self.size - 1)).all(-1)
        return jnp.where(inside, losses, 0).sum() / jnp.maximum(inside.sum(), 1)

    def jittered(self, batch: Batch, key: Key[Array, ""]) -> Batch:
        """Augment a batch by random affine transforms, intensity changes and left-right flips."""
        images, points = batch
        move, flip, look = jax.random.split(key, 3)
        affine = jitter.random_affine(
            move,
            len(images),
            self.size,
            rotation_deg=self.rotation_deg,
            scale=self.scale,
            aspect=self.aspect,
            shear=self.shear,
            shift=self.shift,
        )
        images, points = jitter.warp_images(images, affine), jitter.warp_points(points, affine, self.size)
        images = jitter.random_intensity(look, images, gamma=self.gamma, field=self.shading, noise=self.noise)
        flipped = jax.random.bernoulli(flip, self.flip, (len(images),))
        return jitter.mirrored_where(flipped, images, points, jnp.asarray(self.mirror))

    # --- prediction

    def locate(self, params: Params, images: Float[Array, "B S S"]) -> Located:
        """Predict landmarks from the mixture over members and mirror images, with the shape prior if enabled.

        Args:
            params: Parameters of all members.
            images: Working images.

        Returns:
            Mean and covariance of the mixture, or of the posterior under the shape model; working px.
        """
        both = jnp.concatenate([images, images[..., ::-1]]) if self.flip_average else images
        found = jax.vmap(self._heat, in_axes=(0, None))(params, both)
        if self.flip_average:
            plain, mirrored = (jax.tree.map(lambda a, at=at: a[:, at], found) for at in halves(len(images)))
            found = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), plain, self._unmirrored(mirrored))
        seen = pooled(found)
        seen = Located(seen.points, seen.covariance + LEAST_SD_PX**2 * jnp.eye(2))
        if not self.shape_prior:
            return seen
        assert self.shapes is not None
        return shaped(seen, self.shapes)

    def _unmirrored(self, found: Located) -> Located:
        """Map predictions on mirror images back to the original images."""
        mirror = jnp.asarray(self.mirror)
        points = jax.vmap(lambda points: jitter.mirror_points(points, self.size, mirror))(found.points)
        return Located(points, found.covariance[..., mirror, :, :] * jnp.array([[1, -1], [-1, 1]]))

    def _heat(self, params: Params, images: Float[Array, "B S S"]) -> Located:
        """Predict mean and covariance of one member's heat maps, working px."""
        whole = zscore(images)
        seen = [whole, local_zscore(whole, self.local_contrast * self.size)] if self.local_contrast else [whole]
        logits = nnx.merge(self.graph, params)(jnp.stack(seen, -1))
        return moments(jax.nn.softmax(logits.reshape(len(images), -1, self.n_landmarks), axis=1), self.size)


def halves(count: int) -> tuple[slice, slice]:
    """Return the slices of the first `count` rows and of the rest."""
    return slice(None, count), slice(count, None)


def moments(heat: Float[Array, "B N K"], size: int) -> Located:
    """Compute mean and covariance of heat maps.

    Args:
        heat: Probabilities over the N cells of a square grid that covers the image, summing to 1 over the cells.
        size: Side length of the square image, px.

    Returns:
        Means (y, x) in px and covariances in px^2.
    """
    side = round(heat.shape[1] ** 0.5)
    centres = cell_centres(side, size)
    y, x = jnp.repeat(centres, side), jnp.tile(centres, side)
    points = jnp.einsum("bnk,nd->bkd", heat, jnp.stack([y, x], -1))
    dy, dx = y[:, None] - points[:, None, :, 0], x[:, None] - points[:, None, :, 1]
    yy, yx, xx = ((heat * product).sum(1) for product in (dy * dy, dy * dx, dx * dx))
    covariance = jnp.stack([jnp.stack([yy, yx], -1), jnp.stack([yx, xx], -1)], -2)
    return Located(points, covariance)


def pooled(found: Located) -> Located:
    """Pool predictions into mean and covariance of their mixture.

    Args:
        found: Predictions with a leading axis of M mixture components, px.

    Returns:
        Mean of the points, and mean of the covariances plus covariance of the points.
    """
    points = found.points.mean(0)
    apart = found.points - points
    between = jnp.einsum("mbkd,mbke->bkde", apart, apart) / len(apart)
    return Located(points, found.covariance.mean(0) + between)


def shaped(found: Located, model: ShapeModel) -> Located:
    """Compute the posterior under a shape model, with independent Gaussian errors of the landmarks.

    Args:
        found: Measured points and their error covariances, working px.
        model: Shape model, working px.

    Returns:
        Posterior means and marginal covariances, working px.
    """
    posterior = jax.vmap(posterior_from_gaussians, in_axes=(None, 0, 0))(model, found.points, found.covariance)
    return Located(posterior.points, jax.vmap(point_covariances)(posterior.covariance))


def mirror_permutation(points: Float[np.ndarray, "N K 2"]) -> Int[np.ndarray, "K"]:
    """Estimate the permutation of landmarks under left-right reflection.

    The permutation is the assignment of least summed squared distance between the mean shape and its mirror image about
    the vertical through its centre. Landmarks that are not assigned mutually keep their index. A shape without
    left-right symmetry should therefore be trained and evaluated without flips.

    Args:
        points: Landmarks (y, x) of the training images, px.

    Returns:
        Index of the landmark that each one becomes.
    """
    mean = points.mean(0)
    reflected = np.stack([mean[:, 0], 2 * mean[:, 1].mean() - mean[:, 1]], -1)
    cost = ((mean[:, None] - reflected[None]) ** 2).sum(-1)
    mirror = linear_sum_assignment(cost)[1]
    own = np.arange(len(mirror))
    return np.where(mirror[mirror] == own, mirror, own)
