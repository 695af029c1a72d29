"""Convolutional classifier for small data sets, regularised by strong random augmentation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from pulmo_jax.core import jitter
from pulmo_jax.core.contrast import asymmetry, local_zscore, zscore
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.classes import Batch
from pulmo_jax.models.classifier import ClassifierNet, dropout
from pulmo_jax.types import InputError

MAPPED = 2  # number of stages before the features that the saliency map explains


@dataclass(frozen=True)
class ClassifierNetwork:
    """Convolutional classifier; implements methods.classes.Classifier and Trained.

    Attributes:
        n_classes: Number of classes.
        class_weights: Weight of each class in the loss, with mean 1 over the training images.
        network: Factory (n_classes, channels, rngs) -> model with `features`, `logits` and `stride` as in
            `ClassifierNet`.
    """

    n_classes: int
    class_weights: tuple[float, ...]
    network: Callable[..., Any] = ClassifierNet
    size: Annotated[int, Field(ge=16, le=1024, description="side length of the resized images, px")] = 48
    dropout: Annotated[float, Field(ge=0, lt=1, description="dropout rate of the last features")] = 0.3
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="label smoothing: probability spread over all classes")
    ] = 0.1
    mixup: Annotated[
        float, Field(ge=0, description="mixup: pairs are blended with weights from Beta(mixup, mixup); 0: off")
    ] = 0.4
    asymmetry: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...],
        Field(description="sds of the blurred mirror-asymmetry input channels, in image side lengths"),
    ] = (0.01, 0.03)
    local_contrast: Annotated[
        float,
        Field(ge=0, le=1, description="sd of the local-contrast input channel, in image side lengths; 0: no channel"),
    ] = 0.0
    rotation_deg: Annotated[float, Field(ge=0, description="augmentation: sd of the rotation, degrees")] = 15.0
    scale: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of the scale")] = 0.1
    aspect: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of the aspect ratio")] = 0.08
    shear: Annotated[float, Field(ge=0, description="augmentation: sd of the shear")] = 0.08
    shift: Annotated[float, Field(ge=0, description="augmentation: sd of the shift, in image side lengths")] = 0.06
    flip: Annotated[float, Field(ge=0, le=1, description="augmentation: fraction of mirrored images")] = 0.5
    gamma: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of gamma")] = 0.3
    shading: Annotated[float, Field(ge=0, description="augmentation: sd of smooth shading, relative to the range")] = (
        0.15
    )
    noise: Annotated[float, Field(ge=0, description="augmentation: sd of pixel noise, relative to the range")] = 0.05
    views: Annotated[
        int,
        Field(
            ge=1, le=64, description="test-time augmentation: number of averaged views; the first is the image itself"
        ),
    ] = 4
    flip_average: Annotated[bool, Field(description="also average over the mirror image")] = True

    def __post_init__(self) -> None:
        if self.size % self.skeleton.stride:
            raise InputError(f"method.size={self.size}: this model needs a multiple of {self.skeleton.stride}")

    def normal_alone(self) -> bool:
        """Return False: training uses all classes."""
        return False

    def member(self, key: Key[Array, ""]) -> Any:
        """Create a network with random initial parameters."""
        channels = 1 + len(self.asymmetry) + (self.local_contrast > 0)
        return self.network(n_classes=self.n_classes, channels=channels, rngs=nnx.Rngs(params=key))

    @cached_property
    def skeleton(self) -> Any:
        """Abstract network: shapes and dtypes without values."""
        return nnx.eval_shape(lambda: self.member(jax.random.key(0)))

    @cached_property
    def graph(self) -> nnx.GraphDef[Any]:
        """Static structure of the network."""
        return nnx.graphdef(self.skeleton)

    def init(self, key: Key[Array, ""]) -> Params:
        """Return random initial parameters."""
        return nnx.state(self.member(key), nnx.Param)

    # --- learning

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the weighted cross-entropy with label smoothing of augmented images under mixup.

        The weight of an image is that of its class; mixup blends the weights of a pair in proportion.

        Args:
            params: Parameters.
            batch: Working images and class indices.
            key: Random key of augmentation, mixup and dropout.

        Returns:
            The mean loss, nats.

        Reference:
            Zhang et al. 2018, "mixup", Eq. 1.
        """
        images, labels = batch
        look, move, side, blend, drop = jax.random.split(key, 5)
        changed = jitter.random_intensity(look, zscore(images), gamma=self.gamma, field=self.shading, noise=self.noise)
        x = self.moved(self.channels(changed), move, side)
        targets = jax.nn.one_hot(labels, self.n_classes) * jnp.asarray(self.class_weights)
        if self.mixup:
            share = jax.random.beta(blend, self.mixup, self.mixup, (len(images), 1))
            share = jnp.maximum(share, 1 - share)  # pairs with the reversed batch: each image dominates once
            x = share[..., None, None] * x + (1 - share)[..., None, None] * x[::-1]
            targets = share * targets + (1 - share) * targets[::-1]
        return self.cross_entropy(self.of_channels(params, x, drop), targets).mean()

    def cross_entropy(self, logits: Float[Array, "B classes"], targets: Float[Array, "B classes"]) -> Float[Array, "B"]:
        """Compute the cross-entropy of each image with label smoothing.

        Args:
            logits: Class logits.
            targets: Class probabilities times the class weights.

        Returns:
            The losses, nats.

        Reference:
            Szegedy et al. 2016, Sec. 7.
        """
        spread = targets.sum(-1, keepdims=True) / self.n_classes
        smooth = (1 - self.label_smoothing) * targets + self.label_smoothing * spread
        return -(smooth * jax.nn.log_softmax(logits)).sum(-1)

    def moved(self, x: Float[Array, "B S S C"], move: Key[Array, ""], side: Key[Array, ""]) -> Float[Array, "B S S C"]:
        """Apply random affine transforms and left-right flips to the input channels.

        The asymmetry channels must be computed before: they assume an upright image with a central midline.

        Args:
            x: Input channels.
            move: Random key of the affine transforms.
            side: Random key of the flips.

        Returns:
            The transformed channels.
        """
        x = warped(x, self.affine(move, len(x)))
        flipped = jax.random.bernoulli(side, self.flip, (len(x), 1, 1, 1))
        return jnp.where(flipped, x[:, :, ::-1], x)

    def affine(self, key: Key[Array, ""], count: int) -> jitter.Affine:
        """Draw random affine transforms from the augmentation settings."""
        return jitter.random_affine(
            key,
            count,
            self.size,
            rotation_deg=self.rotation_deg,
            scale=self.scale,
            aspect=self.aspect,
            shear=self.shear,
            shift=self.shift,
        )

    def validation_losses(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """Compute the class-weighted cross-entropy of each image without label smoothing, nats."""
        images, labels = batch
        targets = jax.nn.one_hot(labels, self.n_classes) * jnp.asarray(self.class_weights)
        return -(targets * jax.nn.log_softmax(self.logits(params, images))).sum(-1)

    # --- prediction

    def logits(self, params: Params, images: Float[Array, "B S S"]) -> Float[Array, "B classes"]:
        """Compute log-probabilities averaged over test-time augmentation.

        Probabilities are averaged over affine views and, with `flip_average`, over mirror images. The views are fixed,
        so the prediction does not depend on the other images of the batch.

        Args:
            params: Parameters.
            images: Working images.

        Returns:
            Logarithms of the mean class probabilities.
        """
        x = self.channels(images)
        x = jnp.concatenate([x, x[:, :, ::-1]]) if self.flip_average else x
        turns = self.affine(jax.random.key(0), self.views - 1)
        turned = [warped(x, jax.tree.map(lambda a, i=i: jnp.repeat(a[i, None], len(x), 0), turns))
                  for i in range(self.views - 1)]  # fmt: skip
        log_p = jax.nn.log_softmax(self.of_channels(params, jnp.concatenate([x, *turned])))
        each = log_p.reshape(-1, len(images), self.n_classes)
        return jax.nn.logsumexp(each, axis=0) - jnp.log(len(each))

    def saliency(self, params: Params, images: Float[Array, "B S S"], which: Int[Array, "B"]) -> Float[Array, "B S S"]:
        """Compute HiResCAM maps of the features after the second stage, whose cells are 4 px wide.

        A cell's value is the positive part of the sum over channels of features times gradient, where the gradient is
        that of the class logit minus the mean logit. Values are interpolated bilinearly between cells. Departures:
        unlike Grad-CAM (Selvaraju et al. 2017), gradients are not averaged over the image; unlike both methods, the
        maps use an early stage, because cells of the last one are a third of an image wide. In a network without
        normalisation the later stages are piecewise linear, so the map sums to that difference of logits, apart from
        biases and clipped negative values.

        Args:
            params: Parameters.
            images: Working images.
            which: Index of the class to explain, for each image.

        Returns:
            Non-negative maps, logits per cell.

        Reference:
            Draelos & Carin 2020, arXiv:2011.08891, Eq. 4.
        """
        network = nnx.merge(self.graph, params)
        features = network.features(self.channels(images), last=MAPPED)

        def margin(features: jax.Array) -> jax.Array:
            logits = network.logits(network.features(features, first=MAPPED))
            return jnp.take_along_axis(logits - logits.mean(-1, keepdims=True), which[:, None], axis=1).sum()

        heat = jax.nn.relu((jax.grad(margin)(features) * features).sum(-1)).astype(jnp.float32)
        return jax.image.resize(heat, images.shape, "linear")

    def of_channels(
        self, params: Params, x: Float[Array, "B S S C"], drop: Key[Array, ""] | None = None
    ) -> Float[Array, "B classes"]:
        """Compute logits from input channels; `drop` is the random key of dropout, None: no dropout."""
        network = nnx.merge(self.graph, params)
        features = network.features(x)
        return network.logits(features) if drop is None else network.logits(features, dropout(drop, self.dropout))

    def channels(self, images: Float[Array, "B S S"]) -> Float[Array, "B S S C"]:
        """Compute the input channels: z-normalised image, mirror asymmetries and, if enabled, local contrast."""
        whole = zscore(images)
        seen = [whole, *(asymmetry(whole, share * self.size) for share in self.asymmetry)]
        seen += [local_zscore(whole, self.local_contrast * self.size)] if self.local_contrast else []
        return jnp.stack(seen, -1)


def warped(x: Float[Array, "B S S C"], affine: jitter.Affine) -> Float[Array, "B S S C"]:
    """Apply one affine transform per image to all of its channels."""
    return jax.vmap(lambda channel: jitter.warp_images(channel, affine), in_axes=-1, out_axes=-1)(x)
