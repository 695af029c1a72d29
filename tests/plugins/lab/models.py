"""A model: one strided convolution down, one up."""

from typing import Annotated

from flax import nnx
from pydantic import Field


class Tiny(nnx.Module):
    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        rngs: nnx.Rngs,
        width: Annotated[int, Field(ge=1, description="number of features")] = 4,
    ):
        self.down = nnx.Conv(channels, width, (4, 4), strides=4, rngs=rngs)
        self.up = nnx.ConvTranspose(width, channels, (4, 4), strides=4, rngs=rngs)

    def __call__(self, x):
        return self.up(nnx.relu(self.down(x)))
