"""Binary classification by anomaly detection: a model of the normal class scores the deviation of each image."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from pulmo_jax.core.contrast import blurred, zscore
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.classes import Batch
from pulmo_jax.methods.patch_gaussian import PatchGaussian
from pulmo_jax.methods.windows import Locations
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.models.identity import Identity
from pulmo_jax.types import InputError

TOP = 0.01  # fraction of the pixels, those of highest score, that the image score averages
TINY = 1e-12  # lower bound of scores, for the logarithm


def require_two(n_classes: int) -> None:
    """Raise an InputError unless there are two classes."""
    if n_classes != 2:
        raise InputError(
            f"method: an anomaly method needs two classes, but there are {n_classes}; put all abnormal "
            "images into one folder, or use method=classifier"
        )


def image_logits(maps: Float[Array, "B S S"], normal: int) -> Float[Array, "B 2"]:
    """Convert score maps to logits: 0 for the normal class, the log mean of the top 1 % of pixels for the other.

    Args:
        maps: Non-negative score maps.
        normal: Index of the normal class.

    Returns:
        The logits.
    """
    count = max(1, round(TOP * maps.shape[1] * maps.shape[2]))
    highest = jax.lax.top_k(maps.reshape(len(maps), -1), count)[0]
    score = jnp.log(jnp.maximum(highest.mean(-1), TINY))
    return jnp.stack([jnp.zeros_like(score), score] if normal == 0 else [score, jnp.zeros_like(score)], -1)


@dataclass(frozen=True)
class AutoencoderAnomaly:
    """Reconstruction error of an autoencoder of normal images; implements methods.classes.Trained.

    Attributes:
        n_classes: Number of classes, which must be two.
        normal: Index of the normal class.
    """

    n_classes: int
    normal: int
    size: Annotated[int, Field(ge=32, le=256, multiple_of=8, description="side length of the resized images, px")] = 64
    latent: Annotated[int, Field(ge=1, description="number of features of the bottleneck")] = 32
    width: Annotated[
        int, Field(ge=1, description="number of features of the first layer; deeper layers have up to 4x")
    ] = 32
    noise_sigma: Annotated[
        float, Field(ge=0, description="standard deviation of the training noise to remove; 0: plain autoencoder")
    ] = 0.2
    noise_cell_px: Annotated[int, Field(ge=1, description="cell size of the training noise, px")] = 8
    smooth_px: Annotated[
        float, Field(ge=0, le=100, description="sigma of the smoothing of the signed residual, px")
    ] = 2.0

    def __post_init__(self) -> None:
        require_two(self.n_classes)

    def normal_alone(self) -> bool:
        """Return True: training uses only the normal class."""
        return True

    def network(self, key: Key[Array, ""]) -> ConvAutoencoder:
        """Create an autoencoder with random initial parameters."""
        return ConvAutoencoder(
            patch_size=self.size, channels=1, rngs=nnx.Rngs(params=key), latent=self.latent, width=self.width
        )

    @cached_property
    def method(self) -> Autoencoder:
        """Underlying anomaly-detection method."""
        skeleton = nnx.eval_shape(lambda: self.network(jax.random.key(0)))
        return Autoencoder(skeleton, noise_sigma=self.noise_sigma, noise_cell_px=self.noise_cell_px)

    def init(self, key: Key[Array, ""]) -> Params:
        """Return random initial parameters."""
        return nnx.state(self.network(key), nnx.Param)

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the reconstruction loss of a batch of normal images, with random left-right flips."""
        turn, noise = jax.random.split(key)
        images = zscore(batch[0])
        flipped = jax.random.bernoulli(turn, 0.5, (len(images), 1, 1))
        return self.method.train_loss(params, jnp.where(flipped, images[..., ::-1], images)[..., None], noise)

    def validation_losses(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """Compute the mean squared reconstruction error of each image, in z-normalised units squared."""
        images = zscore(batch[0])[..., None]
        return ((images - self.method.reconstruct(params, images)) ** 2).mean((1, 2, 3))

    def maps(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
        """Compute score maps: squares of the smoothed signed residual, in z-normalised units squared."""
        images = zscore(images)[..., None]
        residual = images - self.method.reconstruct(params, images)
        return blurred(residual[..., 0], self.smooth_px) ** 2

    def logits(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B 2"]:
        """Compute logits from the score maps; that of the normal class is 0."""
        return image_logits(self.maps(params, images), self.normal)

    def saliency(self, params: Params, images: Float[Array, "B S S"], which: Int[Array, "B"]) -> Float[Array, "B S S"]:
        """Return the score maps, which are the same for both classes."""
        return self.maps(params, images)


@dataclass(frozen=True)
class GaussianAnomaly:
    """Mahalanobis distance under a Gaussian of normal patches; implements methods.classes.ClosedForm.

    Attributes:
        n_classes: Number of classes, which must be two.
        normal: Index of the normal class.
    """

    n_classes: int
    normal: int
    size: Annotated[int, Field(ge=32, le=256, description="side length of the resized images, px")] = 64
    window_px: Annotated[int, Field(ge=1, description="side length of the patches, px")] = 8
    stride_px: Annotated[int, Field(ge=1, description="spacing of the patches, px")] = 4
    locations: Annotated[
        Locations, Field(description="pooled: one Gaussian for all patches; each: one per location")
    ] = "pooled"

    def __post_init__(self) -> None:
        require_two(self.n_classes)
        _ = self.method  # validates the windows

    @cached_property
    def method(self) -> PatchGaussian:
        """Underlying anomaly-detection method."""
        pixels: Any = Identity(patch_size=self.size, channels=1, rngs=nnx.Rngs(0))
        return PatchGaussian(pixels, window_px=self.window_px, stride_px=self.stride_px, locations=self.locations)

    def normal_alone(self) -> bool:
        """Return True: training uses only the normal class."""
        return True

    @cached_property
    def compiled(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Compiled (update, finish), shared by all fits."""

        def update(counted: Params, images: Float[Array, "B S S"], count: Int[Array, ""]) -> Params:
            inside = jnp.broadcast_to((jnp.arange(len(images)) < count)[:, None, None], images.shape)
            return self.method.update(counted, zscore(images)[..., None], inside)

        return jax.jit(update, donate_argnums=0), jax.jit(self.method.finish)

    def fit(self, batches: Iterable[Float[Array, "_ S S"]]) -> Params:
        """Fit the Gaussian to normal images.

        Args:
            batches: Batches of working images; shorter ones are padded to the size of the first to avoid recompilation.

        Returns:
            The parameters.

        Raises:
            InputError: If the images do not vary, or none was given.
        """
        (update, finish), counted, size = self.compiled, self.method.init(), 0
        for images in batches:
            size, count = size or len(images), len(images)
            filled = images if count >= size else images[np.minimum(np.arange(size), count - 1)]
            counted = update(counted, filled, count)
        self.method.caveats(counted)
        return finish(counted)

    def skeleton(self) -> Params:
        """Return the structure, shapes and dtypes of the parameters without data."""
        return jax.eval_shape(lambda: self.method.finish(self.method.init()))

    def validation_losses(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """Compute the mean over pixels of the squared Mahalanobis distance per dimension of each image."""
        return self.maps(params, batch[0]).mean((1, 2))

    def maps(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
        """Compute score maps: the squared Mahalanobis distance per dimension at every pixel."""
        return self.method.residual(params, zscore(images)[..., None])[..., 0]

    def logits(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B 2"]:
        """Compute logits from the score maps; that of the normal class is 0."""
        return image_logits(self.maps(params, images), self.normal)

    def saliency(self, params: Params, images: Float[Array, "B S S"], which: Int[Array, "B"]) -> Float[Array, "B S S"]:
        """Return the score maps, which are the same for both classes."""
        return self.maps(params, images)
