"""Two classes told apart by a model of one of them: how far an image is from the normal ones is its score."""

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
from pulmo_jax.methods.classes import Batch, Params
from pulmo_jax.methods.patch_gaussian import Locations, PatchGaussian
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.models.identity import Identity
from pulmo_jax.types import InputError

TOP = 0.01  # of an image's pixels, whose mean is its score
TINY = 1e-12  # a score has a logarithm


def require_two(n_classes: int) -> None:
    if n_classes != 2:
        raise InputError(
            f"method: an anomaly method needs two classes, but there are {n_classes}; put all abnormal "
            "images into one folder, or use method=classifier"
        )


def image_logits(maps: Float[Array, "B S S"], normal: int) -> Float[Array, "B 2"]:
    """0 for the normal class and, for the other, the logarithm of the mean of the highest pixels of the map."""
    count = max(1, round(TOP * maps.shape[1] * maps.shape[2]))
    highest = jax.lax.top_k(maps.reshape(len(maps), -1), count)[0]
    score = jnp.log(jnp.maximum(highest.mean(-1), TINY))
    return jnp.stack([jnp.zeros_like(score), score] if normal == 0 else [score, jnp.zeros_like(score)], -1)


@dataclass(frozen=True)
class AutoencoderAnomaly:
    """What an autoencoder of normal images cannot reproduce; implements methods.classes.Trained."""

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
    smooth_px: Annotated[float, Field(ge=0, description="sigma of the smoothing of the signed residual, px")] = 2.0

    def __post_init__(self) -> None:
        require_two(self.n_classes)

    def normal_alone(self) -> bool:
        return True

    def network(self, key: Key[Array, ""]) -> ConvAutoencoder:
        return ConvAutoencoder(
            patch_size=self.size, channels=1, rngs=nnx.Rngs(params=key), latent=self.latent, width=self.width
        )

    @cached_property
    def method(self) -> Autoencoder:
        skeleton = nnx.eval_shape(lambda: self.network(jax.random.key(0)))
        return Autoencoder(skeleton, noise_sigma=self.noise_sigma, noise_cell_px=self.noise_cell_px)

    def init(self, key: Key[Array, ""]) -> Params:
        return nnx.state(self.network(key), nnx.Param)

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        """Of a batch that holds normal images alone."""
        turn, noise = jax.random.split(key)
        images = zscore(batch[0])
        flipped = jax.random.bernoulli(turn, 0.5, (len(images), 1, 1))
        return self.method.train_loss(params, jnp.where(flipped, images[..., ::-1], images)[..., None], noise)

    def validation_losses(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        images = zscore(batch[0])[..., None]
        return ((images - self.method.reconstruct(params, images)) ** 2).mean((1, 2, 3))

    def maps(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
        images = zscore(images)[..., None]
        residual = images - self.method.reconstruct(params, images)
        return blurred(residual[..., 0], self.smooth_px) ** 2

    def logits(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B 2"]:
        return image_logits(self.maps(params, images), self.normal)

    def saliency(self, params: Params, images: Float[Array, "B S S"], which: Int[Array, "B"]) -> Float[Array, "B S S"]:
        """The score map, whatever the class."""
        return self.maps(params, images)


@dataclass(frozen=True)
class GaussianAnomaly:
    """What a Gaussian of patches of normal images finds unlikely; implements methods.classes.ClosedForm."""

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
        _ = self.method  # judges the windows

    @cached_property
    def method(self) -> PatchGaussian:
        pixels: Any = Identity(patch_size=self.size, channels=1, rngs=nnx.Rngs(0))
        return PatchGaussian(pixels, window_px=self.window_px, stride_px=self.stride_px, locations=self.locations)

    def normal_alone(self) -> bool:
        return True

    @cached_property
    def compiled(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(update, finish), compiled once for all networks that are fitted."""

        def update(counted: Params, images: Float[Array, "B S S"], count: Int[Array, ""]) -> Params:
            inside = jnp.broadcast_to((jnp.arange(len(images)) < count)[:, None, None], images.shape)
            return self.method.update(counted, zscore(images)[..., None], inside)

        return jax.jit(update, donate_argnums=0), jax.jit(self.method.finish)

    def fit(self, batches: Iterable[Float[Array, "_ S S"]]) -> Params:
        """Parameters from normal images.

        Args:
            batches: shorter ones are filled up to the size of the first one, so that one program serves all.

        Raises:
            InputError: the images do not vary at all.
        """
        (update, finish), counted, size = self.compiled, self.method.init(), 0
        for images in batches:
            size, count = size or len(images), len(images)
            filled = images if count >= size else images[np.minimum(np.arange(size), count - 1)]
            counted = update(counted, filled, count)
        self.method.caveats(counted)
        return finish(counted)

    def skeleton(self) -> Params:
        return jax.eval_shape(lambda: self.method.finish(self.method.init()))

    def validation_losses(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """The mean squared Mahalanobis distance of each image's patches."""
        return self.maps(params, batch[0]).mean((1, 2))

    def maps(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B S S"]:
        return self.method.residual(params, zscore(images)[..., None])[..., 0]

    def logits(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B 2"]:
        return image_logits(self.maps(params, images), self.normal)

    def saliency(self, params: Params, images: Float[Array, "B S S"], which: Int[Array, "B"]) -> Float[Array, "B S S"]:
        """The score map, whatever the class."""
        return self.maps(params, images)
