"""Heat maps of landmarks: a small U-Net (Ronneberger et al. 2015, MICCAI) of residual blocks.

Each landmark's heat map is a probability over the cells of a coarse grid, and its mean the landmark's position (Sun et
al. 2018, "Integral human pose regression"; Nibali et al. 2018, DSNT), so that an error can be finer than a cell.
"""

from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pulmo_jax.models.blocks import Block, Conv, Norm


class LandmarkNet(nnx.Module):
    """Logits of one heat map per landmark, at twice the stride of the first layer.

    channels: of the images. stem_stride: of that layer, 2 or 4. widths: features after it and after each halving,
    multiples of 8. blocks: residual blocks after each halving. The side of the images must be a multiple of the
    coarsest stride, stem_stride * 2**(len(widths) - 1).
    """

    def __init__(
        self,
        *,
        n_landmarks: int,
        channels: int,
        stem_stride: int,
        widths: tuple[int, ...],
        blocks: int,
        rngs: nnx.Rngs,
    ):
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
            x = merge(finer + doubled(up(x)))
        return self.head(nnx.silu(self.last(x)))


def doubled(x: Float[Array, "B H W F"]) -> Float[Array, "B y x F"]:
    """Each pixel repeated to 2x2."""
    batch, height, width, features = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, features))
    return wide.reshape(batch, 2 * height, 2 * width, features)


def grid_px(count: int, side: int) -> Float[Array, "h"]:
    """Centres of `count` cells that cover `side` pixels, px."""
    return (jnp.arange(count) + 0.5) * (side / count) - 0.5
