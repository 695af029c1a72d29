"""A small convolutional network for image classification."""

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key
from pydantic import Field

from pulmo_jax.models.blocks import Block, Conv, Dtype, Norm


class Stage(nnx.Module):
    """Convolution, optional normalisation, ReLU, residual blocks and 2 x 2 max pooling.

    Normalisation makes the network memorise small training sets sooner: it discards the magnitude of the features,
    which is informative.

    Args:
        inputs: Number of input features.
        outputs: Number of output features.
        norm: Whether to normalise.
        blocks: Number of residual blocks.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, inputs: int, outputs: int, norm: bool, blocks: int, *, rngs: nnx.Rngs):
        self.conv, self.bias = Conv(inputs, outputs, rngs=rngs), nnx.Param(jnp.zeros(outputs))
        self.norms = nnx.List([Norm(outputs)] if norm else [])
        self.blocks = nnx.List([Block(outputs, rngs=rngs) for _ in range(blocks)])

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        x = self.conv(x) + self.bias[...].astype(x.dtype)
        for norm in self.norms:
            x = norm(x)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x = block(x)
        x = jnp.maximum(
            x[:, ::2], x[:, 1::2]
        )  # slices instead of a pooling window: the gradient takes half the time on a CPU
        return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


class ClassifierNet(nnx.Module):
    """Stages that each halve the resolution, global mean and max pooling, and a linear layer initialised at 0.

    The side of the images must be a multiple of `stride`.

    Args:
        n_classes: Number of classes.
        channels: Number of channels of the images.
        rngs: Random streams for the initialisation.
        widths: Features of each stage; multiples of 8.
        norm: Normalisation of the features: none, or group.
        blocks: Residual blocks per stage.
        dtype: Of the computation; parameters stay float32.
    """

    def __init__(
        self,
        *,
        n_classes: int,
        channels: int,
        rngs: nnx.Rngs,
        widths: Annotated[
            tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...],
            Field(
                min_length=2,
                max_length=10,
                description="number of features of each stage; each stage halves the resolution",
            ),
        ] = (16, 32, 64, 64),
        norm: Annotated[
            Literal["none", "group"], Field(description="normalisation of the features of each stage")
        ] = "none",
        blocks: Annotated[int, Field(ge=0, le=32, description="number of residual blocks in each stage")] = 0,
        dtype: Dtype = "float32",
    ):
        self.stride, self.dtype, steps = 2 ** len(widths), dtype, pairwise((channels, *widths))
        self.stages = nnx.List([Stage(fine, coarse, norm == "group", blocks, rngs=rngs) for fine, coarse in steps])
        self.head = nnx.Linear(2 * widths[-1], n_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def features(self, x: Float[Array, "B H W C"], first: int = 0, last: int | None = None) -> Float[Array, "B h w F"]:
        """Apply a range of stages.

        Args:
            x: Images, or the features of stage `first` - 1.
            first: First stage to apply.
            last: Stage at which to stop, exclusive.

        Returns:
            Features.
        """
        x = x.astype(self.dtype)
        for stage in list(self.stages)[first:last]:
            x = stage(x)
        return x

    def logits(
        self,
        features: Float[Array, "B h w F"],
        drop: Callable[[Float[Array, "B D"]], Float[Array, "B D"]] = lambda pooled: pooled,
    ) -> Float[Array, "B classes"]:
        """Class logits from the features of the last stage.

        Args:
            features: Features of the last stage.
            drop: Function applied to the pooled features before the last layer, such as dropout.

        Returns:
            Logits.
        """
        pooled = jnp.concatenate([features.mean((1, 2)), features.max((1, 2))], -1)
        return self.head(drop(pooled.astype(jnp.float32)))

    def __call__(self, images: Float[Array, "B S S C"]) -> Float[Array, "B classes"]:
        return self.logits(self.features(images))


def dropout(key: Key[Array, ""], rate: float) -> Callable[[Float[Array, "B D"]], Float[Array, "B D"]]:
    """Dropout as a function of pooled features.

    Args:
        key: Random key.
        rate: Probability of setting a value to 0; the others are divided by 1 - rate.

    Returns:
        The function.

    Reference:
        Srivastava et al. 2014.
    """

    def drop(pooled: Float[Array, "B D"]) -> Float[Array, "B D"]:
        keep = jax.random.bernoulli(key, 1 - rate, pooled.shape)
        return jnp.where(keep, pooled / (1 - rate), 0)

    return drop
