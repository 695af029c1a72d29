"""Networks for landmarks, for classes and for features on the encoder EfficientNet-Lite0, pretrained or not."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from pulmo_jax.models.blocks import Block, Conv, Dtype, Norm
from pulmo_jax.models.efficientnet_lite import SCALES, EfficientNetLite0, RateDecay, TrainFrom, Weights
from pulmo_jax.models.landmark_net import upsample_2x

Width = Annotated[int, Field(ge=8, le=512, multiple_of=8, description="features of the decoder (landmarks)")]
HeatStride = Annotated[Literal[4, 8, 16], Field(description="side of a cell of the heat maps, px (landmarks)")]


class HeatMapNet(nnx.Module):
    """Logits of one heat map per landmark: an encoder, and a decoder that adds the features of each scale.

    Args:
        encoder: Encoder.
        n_landmarks: Number of landmarks K.
        width: Features of the decoder.
        heat_stride: Side of a cell of the heat maps, px.
        dtype: Data type of the computation; parameters are float32.
        rngs: Random streams for the initialisation.
    """

    def __init__(
        self,
        encoder: EfficientNetLite0,
        n_landmarks: int,
        width: int,
        heat_stride: int,
        dtype: Dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.encoder, self.dtype, self.stride = encoder, dtype, encoder.strides[-1]
        first = encoder.strides.index(heat_stride)
        self.scales = SCALES[first:]
        self.lateral = nnx.List([Conv(features, width, 1, rngs=rngs) for features in encoder.channels[first:]])
        self.merge = nnx.List([Block(width, rngs=rngs) for _ in self.scales])
        self.last, self.head = Norm(width), nnx.Linear(width, n_landmarks, rngs=rngs)

    def __call__(self, images: Float[Array, "B S S C"]) -> Float[Array, "B h w K"]:
        features = self.encoder.taps(images.astype(self.dtype), self.scales)
        *finer, (coarsest, lateral, merge) = zip(features, self.lateral, self.merge, strict=True)
        x = merge(lateral(coarsest))
        for skip, lateral, merge in reversed(finer):
            x = merge(lateral(skip) + upsample_2x(x))
        return self.head(nnx.silu(self.last(x)).astype(jnp.float32))


class EncoderClassifier(nnx.Module):
    """Class logits from the global mean and maximum of the last features; stages as in models.classifier.ClassifierNet.

    Args:
        encoder: Encoder.
        n_classes: Number of classes.
        dtype: Data type of the computation; parameters are float32.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, encoder: EfficientNetLite0, n_classes: int, dtype: Dtype, *, rngs: nnx.Rngs):
        self.encoder, self.dtype, self.stride = encoder, dtype, 1  # images of any size
        pooled = 2 * encoder.channels[-1]
        self.head = nnx.Linear(pooled, n_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def features(self, x: Float[Array, "B H W C"], first: int = 0, last: int | None = None) -> Float[Array, "B h w F"]:
        """Apply a range of stages, each of which halves the resolution; see ClassifierNet.features."""
        ends = [0, *(tap + 1 for tap in SCALES)]
        return self.encoder.part(x.astype(self.dtype), ends[first], ends[len(SCALES) if last is None else last])

    def logits(
        self,
        features: Float[Array, "B h w F"],
        drop: Callable[[Float[Array, "B D"]], Float[Array, "B D"]] = lambda pooled: pooled,
    ) -> Float[Array, "B classes"]:
        """Class logits from the features of the last stage; see ClassifierNet.logits."""
        pooled = jnp.concatenate([features.mean((1, 2)), features.max((1, 2))], -1)
        return self.head(drop(pooled.astype(jnp.float32)))

    def __call__(self, images: Float[Array, "B S S C"]) -> Float[Array, "B classes"]:
        return self.logits(self.features(images))


class EncoderFeatures(nnx.Module):
    """Features of an encoder that is not trained; implements methods.windows.FeatureNetwork.

    Args:
        encoder: Encoder.
        patch_size: Side of the patches in pixels.
        channels: Number of channels of the patches.
        blocks: Numbers of the blocks whose features are used, ascending.
        dtype: Data type of the computation; parameters are float32.

    Raises:
        ValueError: If the cells of a block do not divide the patches, or blocks do not ascend.
    """

    def __init__(
        self, encoder: EfficientNetLite0, patch_size: int, channels: int, blocks: tuple[int, ...], dtype: Dtype
    ):
        if list(blocks) != sorted(set(blocks)):
            raise ValueError(f"model.blocks={list(blocks)}: give each block once, in ascending order")
        coarsest = next(stride for tap, stride in zip(SCALES, encoder.strides, strict=True) if blocks[-1] <= tap)
        if patch_size % coarsest:
            raise ValueError(
                f"data.patch_size={patch_size}: the features of block {blocks[-1]} have cells of {coarsest} px; give a "
                f"multiple of {coarsest}, or model.blocks of a finer resolution"
            )
        self.encoder, self.blocks, self.dtype = encoder, blocks, dtype
        self.patch_size, self.channels = patch_size, channels

    def feature_maps(self, x: Float[Array, "B P P C"]) -> list[Float[Array, "B _ _ _"]]:
        """Compute the features of the blocks, float32."""
        found = self.encoder.taps(x.astype(self.dtype), self.blocks)
        return [features.astype(jnp.float32) for features in found]

    def __call__(self, x: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        return x


BlockNumbers = Annotated[
    tuple[Annotated[int, Field(ge=0, le=15)], ...],
    Field(min_length=1, max_length=16, description="blocks of the encoder whose features are used, ascending"),
]


def efficientnet_lite0_features(
    *,
    patch_size: int,
    channels: int,
    rngs: nnx.Rngs,
    weights: Weights = "imagenet",
    blocks: BlockNumbers = (4, 10),
    dtype: Dtype = "float32",
) -> EncoderFeatures:
    """Build the features of EfficientNet-Lite0 for models of the normal.

    Args:
        patch_size: Side of the patches in pixels, a multiple of the side of the cells: 4 px up to block 2, 8 px up to
            block 4, 16 px up to block 10, 32 px after it.
        channels: Number of channels of the images, best normalised to mean 0 and sd 1.
        rngs: Random streams for the initialisation.
        weights: Weights of the encoder.
        blocks: Blocks whose features are used.
        dtype: Data type of the computation; parameters are float32.

    Returns:
        The network.
    """
    encoder = EfficientNetLite0(channels=channels, rngs=rngs, weights=weights, train_from="none")
    return EncoderFeatures(encoder, patch_size, channels, blocks, dtype)


def efficientnet_lite0_pooled(
    *,
    patch_size: int,
    channels: int,
    rngs: nnx.Rngs,
    weights: Weights = "imagenet",
    blocks: BlockNumbers = (4, 10, 15),
    dtype: Dtype = "float32",
) -> EncoderFeatures:
    """Build the features of EfficientNet-Lite0 for the classification of images: of cells of 8, 16 and 32 px.

    Args:
        patch_size: See `efficientnet_lite0_features`.
        channels: Number of channels of the images, best normalised to mean 0 and sd 1.
        rngs: Random streams for the initialisation.
        weights: Weights of the encoder.
        blocks: Blocks whose features are used.
        dtype: Data type of the computation; parameters are float32.

    Returns:
        The network.
    """
    return efficientnet_lite0_features(
        patch_size=patch_size, channels=channels, rngs=rngs, weights=weights, blocks=blocks, dtype=dtype
    )


def efficientnet_lite0(
    *,
    channels: int,
    rngs: nnx.Rngs,
    n_landmarks: int | None = None,
    n_classes: int | None = None,
    weights: Weights = "imagenet",
    train_from: TrainFrom = "all",
    rate_decay: RateDecay = 0.9,
    width: Width = 64,
    heat_stride: HeatStride = 8,
    dtype: Dtype = "float32",
) -> Any:
    """Build the network of a task on EfficientNet-Lite0.

    Args:
        channels: Number of channels of the images, best normalised to mean 0 and sd 1.
        rngs: Random streams for the initialisation.
        n_landmarks: Number of landmarks, for a `HeatMapNet`.
        n_classes: Number of classes, for an `EncoderClassifier`.
        weights: Weights of the encoder, with which a training begins.
        train_from: First part of the encoder that is trained; those before keep their weights.
        rate_decay: Factor of the learning rate from a block of the encoder to the one before.
        width: Features of the decoder (landmarks).
        heat_stride: Side of a cell of the heat maps, px (landmarks).
        dtype: Data type of the computation; parameters are float32.

    Returns:
        The network.
    """
    encoder = EfficientNetLite0(
        channels=channels, rngs=rngs, weights=weights, train_from=train_from, rate_decay=rate_decay
    )
    if n_landmarks is not None:
        return HeatMapNet(encoder, n_landmarks, width, heat_stride, dtype, rngs=rngs)
    assert n_classes is not None  # each task gives one of the two
    return EncoderClassifier(encoder, n_classes, dtype, rngs=rngs)
