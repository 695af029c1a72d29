"""Landmark heat maps from a small U-Net (Ronneberger et al. 2015, MICCAI) with residual blocks.

Each heat map is a probability distribution over the cells of a coarse grid, and its mean is the landmark position (Sun
et al. 2018, "Integral human pose regression"; Nibali et al. 2018, DSNT). Errors can therefore be smaller than a cell.
"""

from itertools import pairwise
from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from pulmo_jax.models.blocks import Block, Conv, Norm


class LandmarkNet(nnx.Module):
    """Logits of one heat map per landmark, at twice the stride of the first layer.

    The side of the images must be a multiple of `stride`, that of the coarsest features.

    Args:
        n_landmarks: Number of landmarks K.
        channels: Number of channels of the images.
        rngs: Random streams for the initialisation.
        stem_stride: Stride of the first layer, 2 or 4.
        widths: Features after the first layer and after each downsampling; multiples of 8.
        blocks: Residual blocks after each downsampling.
    """

    def __init__(
        self,
        *,
        n_landmarks: int,
        channels: int,
        rngs: nnx.Rngs,
        stem_stride: Annotated[
            Literal[2, 4], Field(description="stride of the first layer; the heat maps have twice this stride")
        ] = 4,
        widths: Annotated[
            tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...],
            Field(
                min_length=3,
                max_length=10,
                description="number of features of the first layer and after each downsampling",
            ),
        ] = (16, 32, 64, 128, 128),
        blocks: Annotated[int, Field(ge=1, le=32, description="number of residual blocks after each downsampling")] = 1,
    ):
        self.stride = stem_stride * 2 ** (len(widths) - 1)
        steps = list(pairwise(widths))
        self.stem = Conv(channels, widths[0], 2 * stem_stride, stem_stride, rngs=rngs)
        self.norms = nnx.List([Norm(fine) for fine, _ in steps])
        self.down = nnx.List([Conv(fine, coarse, stride=2, rngs=rngs) for fine, coarse in steps])
        self.blocks = nnx.List([nnx.List([Block(coarse, rngs=rngs) for _ in range(blocks)]) for _, coarse in steps])
        self.up = nnx.List([Conv(coarse, fine, 1, rngs=rngs) for fine, coarse in steps[1:]])
        self.merge = nnx.List([Block(fine, rngs=rngs) for fine, _ in steps[1:]])
        self.last = Norm(widths[1])
        self.head = nnx.Linear(widths[1], n_landmarks, rngs=rngs)

    def __call__(self, images: Float[Array, "B S S C"]) -> Float[Array, "B h w K"]:
        x, scales = self.stem(images), []
        for norm, down, blocks in zip(self.norms, self.down, self.blocks, strict=True):
            x = down(nnx.silu(norm(x)))
            for block in blocks:
                x = block(x)
            scales.append(x)
        for finer, up, merge in reversed(list(zip(scales, self.up, self.merge, strict=False))):
            x = merge(finer + upsample_2x(up(x)))
        return self.head(nnx.silu(self.last(x)))


def upsample_2x(x: Float[Array, "B H W F"]) -> Float[Array, "B y x F"]:
    """Nearest-neighbour upsampling by a factor of 2.

    Args:
        x: B feature maps.

    Returns:
        Feature maps of twice the height and width.
    """
    batch, height, width, features = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, features))
    return wide.reshape(batch, 2 * height, 2 * width, features)


def cell_centres(count: int, side: int) -> Float[Array, "h"]:
    """Centres of the cells of a regular grid along one axis.

    Args:
        count: Number of cells.
        side: Length of the axis in pixels.

    Returns:
        Coordinates in pixels.
    """
    return (jnp.arange(count) + 0.5) * (side / count) - 0.5
