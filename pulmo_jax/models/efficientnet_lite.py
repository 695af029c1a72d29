"""EfficientNet-Lite0 (Tan and Le 2019, ICML; the Lite variant of TensorFlow), the encoder with pretrained weights.

Inverted bottlenecks of 1 x 1, depthwise and 1 x 1 convolutions with ReLU6, without squeeze-and-excitation. Batch
normalisation has the statistics of the pretraining: each convolution is followed by a scale and an offset per feature,
into which they are folded. Layers therefore do not depend on the other images of a batch, in training as well.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from pulmo_jax.models.blocks import convolve
from pulmo_jax.models.depthwise import depthwise


class Blocks(NamedTuple):
    """Consecutive blocks with the same kernel; the first one has the stride and changes the number of features."""

    repeats: int
    size: int
    stride: int
    expansion: int
    inputs: int
    outputs: int


STEM = 32
HEAD = 1280
BLOCKS = (
    Blocks(1, 3, 1, 1, STEM, 16),
    Blocks(2, 3, 2, 6, 16, 24),
    Blocks(2, 5, 2, 6, 24, 40),
    Blocks(3, 3, 2, 6, 40, 80),
    Blocks(3, 5, 1, 6, 80, 112),
    Blocks(4, 5, 2, 6, 112, 192),
    Blocks(1, 3, 1, 6, 192, 320),
)
COUNT = sum(blocks.repeats for blocks in BLOCKS)
SCALES = (0, 2, 4, 10, 15)  # last block of each resolution


class ScaledConv(nnx.Module):
    """Convolution followed by a scale and an offset of each feature.

    Args:
        inputs: Number of input features; 1 if each of several has a kernel of its own.
        outputs: Number of output features.
        size: Side of the kernel in pixels.
        stride: Stride, 1 or 2.
        is_depthwise: Whether each feature has a kernel of its own.
        rngs: Random streams for the initialisation.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 1,
        stride: int = 1,
        *,
        is_depthwise: bool = False,
        rngs: nnx.Rngs,
    ):
        self.stride, self.is_depthwise = stride, is_depthwise
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (size, size, inputs, outputs)))
        self.scale, self.bias = nnx.Param(jnp.ones(outputs)), nnx.Param(jnp.zeros(outputs))

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B y x O"]:
        kernel = (self.kernel[...] * self.scale[...]).astype(x.dtype)
        if self.is_depthwise:
            x = depthwise(self.stride, x, kernel[:, :, 0])
        elif kernel.shape[0] == 1:
            x = x @ kernel[0, 0]
        else:
            x = convolve(self.stride, x, kernel)
        return x + self.bias[...].astype(x.dtype)


class InvertedBottleneck(nnx.Module):
    """Expansion to more features, depthwise convolution, and projection; adds its input where shapes allow.

    Args:
        inputs: Number of input features.
        outputs: Number of output features.
        expansion: Factor of the features in between; 1: without the first convolution.
        size: Side of the depthwise kernel in pixels.
        stride: Stride of the depthwise convolution.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, size: int, stride: int, *, rngs: nnx.Rngs):
        wide = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.expand = nnx.List([ScaledConv(inputs, wide, rngs=rngs)] if expansion > 1 else [])
        self.depthwise = ScaledConv(1, wide, size, stride, is_depthwise=True, rngs=rngs)
        self.project = ScaledConv(wide, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B y x O"]:
        y = x
        for expand in self.expand:
            y = relu6(expand(y))
        y = self.project(relu6(self.depthwise(y)))
        return x + y if self.adds else y


Weights = Annotated[
    str | None,
    Field(description="weights of the encoder: imagenet (17 MB, downloaded once), a file, or null: random ones"),
]
TrainFrom = Annotated[
    str,
    Field(
        pattern=r"^(all|none|block([0-9]|1[0-5]))$",
        description="first part of the encoder that is trained: all, block0 to block15, or none",
    ),
]
RateDecay = Annotated[
    float,
    Field(gt=0, le=1, description="factor of the learning rate from each block of the encoder to the one before"),
]


class EfficientNetLite0(nnx.Module):
    """Features of images at several scales; implements models.unet.Encoder and training.layer_rates.Rated.

    Args:
        channels: Number of channels of the images. Pretrained kernels are for red, green and blue; for other numbers of
            channels see `kernel_for_channels`.
        rngs: Random streams for the initialisation.
        weights: Name or file of the weights with which a training begins, which the training puts in.
        train_from: First part that is trained: all, block0 to block15, or none. Those before keep their weights.
        rate_decay: Factor of the learning rate from a block to the one before.
        head: Whether the 1280 features of the last layer are computed as well.
    """

    def __init__(
        self,
        *,
        channels: int,
        rngs: nnx.Rngs,
        weights: str | None = None,
        train_from: str = "all",
        rate_decay: float = 1.0,
        head: bool = False,
    ):
        self.weights, self.rate_decay, self.first_trained = weights, rate_decay, first_trained(train_from)
        shapes = [shape for part in BLOCKS for shape in shapes_of(part)]
        self.stem = ScaledConv(channels, STEM, 3, 2, rngs=rngs)
        self.blocks = nnx.List([InvertedBottleneck(*shape, rngs=rngs) for shape in shapes])
        self.head = nnx.List([ScaledConv(shapes[-1][1], HEAD, rngs=rngs)] if head else [])
        self.channels = tuple(shapes[tap][1] for tap in SCALES)
        self.strides = tuple(2 ** (1 + i) for i in range(len(SCALES)))

    def rate_of(self, name: str) -> float:
        """Factor of the learning rate of a parameter, such as "blocks.3.project.kernel"; 0: it is not trained."""
        part, _, rest = name.partition(".")
        place = int(rest.partition(".")[0]) if part == "blocks" else {"stem": -1, "head": COUNT}[part]
        return 0.0 if place < self.first_trained else self.rate_decay ** (COUNT - place)

    def part(self, x: Float[Array, "B _ _ _"], start: int, end: int) -> Float[Array, "B _ _ _"]:
        """Apply consecutive blocks.

        Args:
            x: Images, normalised intensities, if `start` is 0; otherwise the features after block `start` - 1.
            start: Number of the first block; 0 includes the first convolution.
            end: Number of the block after the last one.

        Returns:
            Features after the last block, of the data type of the input.
        """
        if start == 0:
            x = without_gradient(relu6(self.stem(x)), self.first_trained > -1)
        for number in range(start, end):
            x = without_gradient(self.blocks[number](x), number < self.first_trained)
        return x

    def taps(self, images: Float[Array, "B H W C"], wanted: Sequence[int]) -> list[Float[Array, "B _ _ _"]]:
        """Compute the features after certain blocks.

        Args:
            images: Images, normalised intensities.
            wanted: Numbers of blocks, from 0, in ascending order; the number of blocks itself is the head.

        Returns:
            Features (B, H / stride, W / stride, channels) of each.
        """
        x, start, found = images, 0, []
        for number in wanted:
            end = min(number + 1, len(self.blocks))
            x = self.part(x, start, end) if end > start else x
            found.append(relu6(self.head[0](x)) if number == len(self.blocks) else x)
            start = end
        return found

    def __call__(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ _"]]:
        """Compute the features of each scale, finest first."""
        return self.taps(x, SCALES)


def without_gradient(x: Float[Array, "*S"], stop: bool) -> Float[Array, "*S"]:
    """Stop the gradient, if wanted."""
    return jax.lax.stop_gradient(x) if stop else x


def pretrained_encoder(
    *,
    patch_size: int,
    channels: int,
    rngs: nnx.Rngs,
    weights: Weights = "imagenet",
    train_from: TrainFrom = "all",
    rate_decay: RateDecay = 0.9,
) -> EfficientNetLite0:
    """Build the encoder of a U-Net; see `EfficientNetLite0`.

    Args:
        patch_size: Side of the patches in pixels, a multiple of 32.
        channels: Number of channels of the images, best normalised to mean 0 and sd 1.
        rngs: Random streams for the initialisation.
        weights: Weights with which a training begins.
        train_from: First part that is trained.
        rate_decay: Factor of the learning rate from a block to the one before.

    Returns:
        The encoder.
    """
    return EfficientNetLite0(
        channels=channels, rngs=rngs, weights=weights, train_from=train_from, rate_decay=rate_decay
    )


def first_trained(train_from: str) -> int:
    """Number of the first block that is trained; -1: the first convolution as well; `COUNT`: none is."""
    if train_from in ("all", "none"):
        return -1 if train_from == "all" else COUNT
    return int(train_from.removeprefix("block"))


def shapes_of(part: Blocks) -> list[tuple[int, int, int, int, int]]:
    """Arguments of `InvertedBottleneck` of consecutive blocks."""
    first = (part.inputs, part.outputs, part.expansion, part.size, part.stride)
    return [first, *[(part.outputs, part.outputs, part.expansion, part.size, 1)] * (part.repeats - 1)]


def relu6(x: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Rectifier that is bounded by 6."""
    return jnp.clip(x, 0, 6)


def kernel_for_channels(kernel: Float[Array, "h w c O"], channels: int) -> Float[Array, "h w C O"]:
    """Adapt the first kernel, such as that for red, green and blue, to images with another number of channels.

    Every channel gets c / C of the mean kernel of the c channels, so that an image whose channels are equal has the
    same features whatever their number. The kernel for the same number of channels is unchanged.

    Args:
        kernel: Kernel for c channels.
        channels: Number C of channels.

    Returns:
        Kernel for C channels.

    Example:
        >>> kernel_for_channels(jnp.array([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1), 1).ravel().tolist()
        [9.0]
    """
    if channels == kernel.shape[2]:
        return kernel
    return jnp.repeat(kernel.sum(2, keepdims=True) / channels, channels, axis=2)
