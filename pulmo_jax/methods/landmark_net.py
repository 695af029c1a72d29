"""Landmarks by an ensemble of small networks, trained from scratch in one program.

Each member gives every landmark a heat map, whose mean is the position (models/landmark_net.py). All members see the
same batches under jitter of their own, from initial parameters of their own; `vmap` over them makes one program. The
answer is the mean over members and over the image and its mirror image; its covariance is that of their mixture: the
mean spread of the heat maps plus the spread between answers (Lakshminarayanan et al. 2017, "Deep ensembles", Sec. 2.4).
A Gaussian of the training shapes then says what all points together make likely (core/shape_model.py).
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
from pulmo_jax.methods.landmark_losses import LandmarkLoss, laplace
from pulmo_jax.methods.located import Located, Params
from pulmo_jax.models.landmark_net import LandmarkNet, cell_centres
from pulmo_jax.types import InputError

Batch = tuple[Float[Array, "B S S"], Float[Array, "B K 2"]]
LEAST_SD_PX = 0.1  # of a landmark: none is known without error


@dataclass(frozen=True)
class LandmarkNetwork:
    """Implements methods.located.Locator and Trained.

    mirror: which landmark each one becomes in the image reflected left to right (`mirror_permutation`).
    shapes: of the training images, working px; `shape_prior` needs it.
    network: (n_landmarks, channels, rngs) -> model, which maps (B, S, S, C) to logits of heat maps (B, h, w, K); the
        side S must be a multiple of its `stride`.
    loss: called with displacement= (B, K, 2) and covariance= (B, K, 2, 2), in % of the side; a value per landmark.
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
        """A network with initial parameters."""
        channels = 2 if self.local_contrast else 1
        return self.network(n_landmarks=self.n_landmarks, channels=channels, rngs=nnx.Rngs(params=key))

    @cached_property
    def skeleton(self) -> Any:
        """A network without values."""
        return nnx.eval_shape(lambda: self.member(jax.random.key(0)))

    @cached_property
    def graph(self) -> nnx.GraphDef[Any]:
        return nnx.graphdef(self.skeleton)

    def init(self) -> Params:
        """Of all members: every array has a leading axis."""
        keys = jax.random.split(jax.random.key(self.seed), self.members)
        return jax.vmap(lambda key: nnx.state(self.member(key), nnx.Param))(keys)

    # --- learning

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        """Mean over members, images and landmarks; landmarks that the jitter moved out of the image do not count."""
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
        """The batch as a member sees it: moved, mirrored, with other intensities."""
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

    # --- locating

    def locate(self, params: Params, images: Float[Array, "B S S"]) -> Located:
        """The mean over members and mirror images and the covariance of the mixture of their heat maps, or what the
        shape makes of them."""
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
        mirror = jnp.asarray(self.mirror)
        points = jax.vmap(lambda points: jitter.mirror_points(points, self.size, mirror))(found.points)
        return Located(points, found.covariance[..., mirror, :, :] * jnp.array([[1, -1], [-1, 1]]))

    def _heat(self, params: Params, images: Float[Array, "B S S"]) -> Located:
        """Mean and covariance of one member's heat maps, px."""
        whole = zscore(images)
        seen = [whole, local_zscore(whole, self.local_contrast * self.size)] if self.local_contrast else [whole]
        logits = nnx.merge(self.graph, params)(jnp.stack(seen, -1))
        return moments(jax.nn.softmax(logits.reshape(len(images), -1, self.n_landmarks), axis=1), self.size)


def halves(count: int) -> tuple[slice, slice]:
    """The first so many rows, and those after them."""
    return slice(None, count), slice(count, None)


def moments(heat: Float[Array, "B N K"], size: int) -> Located:
    """Mean and covariance of probabilities over the cells of a square grid that covers a square image of `size` px."""
    side = round(heat.shape[1] ** 0.5)
    centres = cell_centres(side, size)
    y, x = jnp.repeat(centres, side), jnp.tile(centres, side)
    points = jnp.einsum("bnk,nd->bkd", heat, jnp.stack([y, x], -1))
    dy, dx = y[:, None] - points[:, None, :, 0], x[:, None] - points[:, None, :, 1]
    yy, yx, xx = ((heat * product).sum(1) for product in (dy * dy, dy * dx, dx * dx))
    covariance = jnp.stack([jnp.stack([yy, yx], -1), jnp.stack([yx, xx], -1)], -2)
    return Located(points, covariance)


def pooled(found: Located) -> Located:
    """Of answers (M, B, ...): their mean; the mean of their covariances plus the covariance of their points."""
    points = found.points.mean(0)
    apart = found.points - points
    between = jnp.einsum("mbkd,mbke->bkde", apart, apart) / len(apart)
    return Located(points, found.covariance.mean(0) + between)


def shaped(found: Located, model: ShapeModel) -> Located:
    """The posterior where each landmark was seen with an independent Gaussian error of its covariance."""
    posterior = jax.vmap(posterior_from_gaussians, in_axes=(None, 0, 0))(model, found.points, found.covariance)
    return Located(posterior.points, jax.vmap(point_covariances)(posterior.covariance))


def mirror_permutation(points: Float[np.ndarray, "N K 2"]) -> Int[np.ndarray, "K"]:
    """Which landmark each one becomes under reflection: the assignment with the least squared distances between
    the mean shape and its mirror image about the vertical through its centre.

    Landmarks that it does not assign to each other both ways stay what they are; so does every one where a shape has
    no left and right, and then jitter and averages had better not flip.
    """
    mean = points.mean(0)
    reflected = np.stack([mean[:, 0], 2 * mean[:, 1].mean() - mean[:, 1]], -1)
    cost = ((mean[:, None] - reflected[None]) ** 2).sum(-1)
    mirror = linear_sum_assignment(cost)[1]
    own = np.arange(len(mirror))
    return np.where(mirror[mirror] == own, mirror, own)
