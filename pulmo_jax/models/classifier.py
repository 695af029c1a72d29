"""A small convolutional network that tells classes of images apart."""

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pulmo_jax.models.blocks import Block, Conv, Norm


class Stage(nnx.Module):
    """A convolution, rectified, perhaps normalised before; residual blocks; then the greatest of each 2x2 pixels.

    Normalised by image, a small set is learnt by heart sooner: how strong a feature is says much, and is lost by it.
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
        x = jnp.maximum(x[:, ::2], x[:, 1::2])  # slices: on a CPU its gradient takes half the time of a window's
        return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


class ClassifierNet(nnx.Module):
    """Stages, each at half the resolution of the one before; then the mean and the greatest value of each feature over
    the image, and a linear layer that begins at 0.

    channels: of the images. widths: features of each stage; multiples of 8 with norm or blocks. The side of the images
    must be a multiple of 2**len(widths).
    """

    def __init__(
        self, *, n_classes: int, channels: int, widths: tuple[int, ...], norm: bool, blocks: int, rngs: nnx.Rngs
    ):
        steps = pairwise((channels, *widths))
        self.stages = nnx.List([Stage(fine, coarse, norm, blocks, rngs=rngs) for fine, coarse in steps])
        self.head = nnx.Linear(2 * widths[-1], n_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def features(self, x: Float[Array, "B H W C"], first: int = 0, last: int | None = None) -> Float[Array, "B h w F"]:
        """What the stages from `first` to before `last` make of images, or of the features of the stage before."""
        for stage in list(self.stages)[first:last]:
            x = stage(x)
        return x

    def logits(
        self,
        features: Float[Array, "B h w F"],
        drop: Callable[[Float[Array, "B D"]], Float[Array, "B D"]] = lambda pooled: pooled,
    ) -> Float[Array, "B classes"]:
        """drop: what is done to the pooled features before the last layer, as dropout is."""
        pooled = jnp.concatenate([features.mean((1, 2)), features.max((1, 2))], -1)
        return self.head(drop(pooled.astype(jnp.float32)))

    def __call__(self, images: Float[Array, "B S S C"]) -> Float[Array, "B classes"]:
        return self.logits(self.features(images))


def dropout(key: jax.Array, rate: float) -> Callable[[Float[Array, "B D"]], Float[Array, "B D"]]:
    """Each value kept with probability 1 - rate, and then that much larger (Srivastava et al. 2014)."""

    def drop(pooled: Float[Array, "B D"]) -> Float[Array, "B D"]:
        kept = jax.random.bernoulli(key, 1 - rate, pooled.shape)
        return jnp.where(kept, pooled / (1 - rate), 0)

    return drop
