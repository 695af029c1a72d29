"""A convolutional encoder and decoder between patches and a square grid of latent vectors, for vector quantisation.

Blocks of pixels become features at once, and all convolutions run at the resolution of the grid, which keeps a training
step fast on a CPU. The decoder ends with a convolution between the pixels of neighbouring blocks.
"""

from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from pulmo_jax.models.blocks import Block, Conv, Dtype, Norm, Remat, rematerialised
from pulmo_jax.models.unet import BlockHead, blocks_to_features


class VqNetwork(nnx.Module):
    """Encoder and decoder of a vector-quantised autoencoder (van den Oord et al. 2017), without its codebook.

    Args:
        patch_size: Side of the square patches in pixels, a multiple of `code_px`.
        channels: Number of channels of the patches.
        rngs: Random streams for the initialisation.
        code_px: Side of the block of pixels that one code stands for.
        code_features: Number of features of a latent vector.
        width: Features of the convolutions, a multiple of 8.
        blocks: Residual blocks of the encoder, and of the decoder.
        dtype: Data type of the computation; parameters are float32.
        remat: Recompute activations in the backward pass.

    Raises:
        ValueError: If `code_px` does not divide the patch size.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        rngs: nnx.Rngs,
        code_px: Annotated[Literal[2, 4, 8], Field(description="side of the pixel block of one code, px")] = 4,
        code_features: Annotated[int, Field(ge=1, le=1024, description="number of features of a code vector")] = 32,
        width: Annotated[int, Field(ge=8, le=512, multiple_of=8, description="features of the convolutions")] = 32,
        blocks: Annotated[int, Field(ge=0, le=16, description="residual blocks of encoder and of decoder")] = 2,
        dtype: Dtype = "float32",
        remat: Remat = False,
    ):
        if patch_size % code_px:
            raise ValueError(f"data.patch_size={patch_size}: must be a multiple of model.code_px={code_px}")
        self.code_px, self.code_features, self.code_side = code_px, code_features, patch_size // code_px
        self.dtype, self.remat = dtype, remat
        self.first = Conv(channels * code_px**2, width, size=1, rngs=rngs)
        self.encoder = nnx.List([Block(width, rngs=rngs) for _ in range(blocks)])
        self.encoded, self.to_latent = Norm(width), Conv(width, code_features, size=1, rngs=rngs)
        self.from_latent = Conv(code_features, width, rngs=rngs)
        self.decoder = nnx.List([Block(width, rngs=rngs) for _ in range(blocks)])
        self.decoded, self.head = Norm(width), BlockHead(width, channels, code_px, rngs=rngs)

    def encode(self, x: Float[Array, "B P P C"]) -> Float[Array, "B h h D"]:
        """Encode patches.

        Args:
            x: B square patches.

        Returns:
            Latent vectors in float32, h = P / code_px.
        """
        x = self.first(blocks_to_features(x.astype(self.dtype), self.code_px))
        for block in self.encoder:
            x = rematerialised(self.remat, Block.__call__, block, x)
        return rematerialised(self.remat, VqNetwork._latents, self, x).astype(jnp.float32)

    def _latents(self, x: Float[Array, "B h h W"]) -> Float[Array, "B h h D"]:
        """Latent vectors from the features of the encoder."""
        return self.to_latent(nnx.silu(self.encoded(x)))

    def decode(self, z: Float[Array, "B h h D"]) -> Float[Array, "B P P C"]:
        """Decode latent vectors.

        Args:
            z: Grids of latent vectors.

        Returns:
            Reconstructed patches in float32.
        """
        x = self.from_latent(z.astype(self.dtype))
        for block in self.decoder:
            x = rematerialised(self.remat, Block.__call__, block, x)
        return rematerialised(self.remat, VqNetwork._pixels, self, x).astype(jnp.float32)

    def _pixels(self, x: Float[Array, "B h h W"]) -> Float[Array, "B P P C"]:
        """Patches from the features of the decoder."""
        return self.head(nnx.silu(self.decoded(x)))

    def __call__(self, x: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Reconstruct patches from latent vectors that are not quantised."""
        return self.decode(self.encode(x))
