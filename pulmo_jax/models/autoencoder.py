"""A convolutional autoencoder whose strides equal its kernel sizes.

Strided convolutions without overlap are matrix products over rearranged pixels, in the forward and the backward pass.
All pixels are rearranged once at the input and once at the output; between them, layers only reshape. A training step
of 64 patches of 64 x 64 takes 12 ms on two CPU cores (experiments/benchmarks/train_step.py). Alternatives were measured
when it still took 19 ms: 52 ms with a residual 3x3 convolution at each scale, 167 ms with ordinary stride-2 3x3 layers,
and 350 ms with their transposed counterparts in the decoder (layers.py in the same folder). On the sample CT, 1,500
steps of the chosen network reached a lower loss than 500 steps of the one with residual convolutions.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from pulmo_jax.models.blocks import Dtype, Remat, rematerialised

COARSEST_PX = 4  # side of the feature map at which the encoder stops downsampling


def to_block_order(x: Float[Array, "B H W C"], strides: Sequence[int]) -> Float[Array, "B N C"]:
    """Reorder pixels into the order in which the strided layers consume them.

    The blocks of the first layer, strides[0]^2 pixels, are contiguous; so are those of the second layer, strides[1]^2
    blocks of the first, and so on. The axes are transposed one stride at a time, because XLA compiles a single
    transposition of all axes into gigabytes of code.

    Args:
        x: Square images.
        strides: Stride of each layer, finest first.

    Returns:
        Pixels in block order.
    """
    batch, side, _, channels = x.shape
    for stride in strides:
        side //= stride
        x = x.reshape(batch, side, stride, side, stride, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, channels)


def to_pixel_order(x: Float[Array, "B N C"], strides: Sequence[int], side: int) -> Float[Array, "B H W C"]:
    """Inverse of `to_block_order`.

    Args:
        x: Pixels in block order.
        strides: Stride of each layer, finest first.
        side: Side of the image in units of the coarsest blocks.

    Returns:
        Square images.
    """
    batch, _, channels = x.shape
    for stride in reversed(strides):
        x = x.reshape(batch, side, side, stride, stride, -1).transpose(0, 1, 3, 2, 4, 5)
        side *= stride
    return x.reshape(batch, side, side, channels)


@jax.custom_vjp
def affine(x: Float[Array, "N I"], kernel: Float[Array, "I O"], bias: Float[Array, "O"]) -> Float[Array, "N O"]:
    """Affine map x @ kernel + bias with a fast gradient.

    The gradient of the bias is computed as a matrix product; XLA's reduction over rows takes longer on a CPU than the
    products.

    Args:
        x: N rows.
        kernel: Weights.
        bias: Bias.

    Returns:
        N rows.
    """
    return x @ kernel + bias


def _affine_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return affine(x, kernel, bias), (x, kernel)


def _affine_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = saved
    return g @ kernel.T, x.T @ g, (jnp.ones((1, len(g)), g.dtype) @ g)[0]


affine.defvjp(_affine_forward, _affine_backward)


def strides_for(patch_size: int) -> list[int]:
    """Strides of the encoder: 4, then 2 while the side stays even and at least `COARSEST_PX`.

    Args:
        patch_size: Side of the input in pixels.

    Returns:
        Stride of each layer.

    Raises:
        ValueError: If the side is not a multiple of 4 or is below 8.
    """
    if patch_size < 8 or patch_size % 4:
        raise ValueError(f"data.patch_size={patch_size}: must be a multiple of 4 and at least 8")
    strides, side = [4], patch_size // 4
    while side % 2 == 0 and side // 2 >= COARSEST_PX:
        strides.append(2)
        side //= 2
    return strides


class ConvAutoencoder(nnx.Module):
    """Encoder, bottleneck and mirrored decoder.

    A dense bottleneck is one vector per patch. A spatial one has a vector for each cell of the coarsest feature map,
    4 x 4 cells for most patch sizes, and its layers are 1 x 1 convolutions.

    Args:
        patch_size: Side of the square input in pixels, a multiple of 4. It determines the depth: 64 gives a 4 x 4
            feature map after three layers.
        channels: Number of channels of the input.
        rngs: Random streams for the initialisation.
        outputs: Number of values per pixel and channel, such as 2 for a mean and a variance.
        moments: Number of values per latent number, such as 2 for a mean and a variance.
        latent: Size of a latent vector.
        width: Features of the first layer; they double with each layer up to a factor of 4.
        bottleneck: dense or spatial.
        dtype: Data type of the computation; parameters are float32.
        remat: Recompute activations in the backward pass.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        rngs: nnx.Rngs,
        outputs: int = 1,
        moments: int = 1,
        latent: Annotated[int, Field(ge=1, description="number of features of the bottleneck")] = 64,
        width: Annotated[
            int, Field(ge=1, description="number of features of the first layer; deeper layers have up to 4x")
        ] = 32,
        bottleneck: Annotated[
            Literal["dense", "spatial"],
            Field(description="one latent vector per patch, or one per cell of the coarsest feature map"),
        ] = "dense",
        dtype: Dtype = "float32",
        remat: Remat = False,
    ):
        self.patch_size, self.channels, self.outputs, self.moments = patch_size, channels, outputs, moments
        self.strides = tuple(strides_for(patch_size))
        self.features = tuple(width * min(2**i, 4) for i in range(len(self.strides)))
        self.dtype, self.remat = dtype, remat
        side = patch_size
        for stride in self.strides:
            side //= stride
        self.coarse = (side, side, self.features[-1])

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, rngs=rngs)

        into, out_of = [channels, *self.features], [outputs * channels, *self.features]
        self.down = nnx.List([linear(s * s * a, b) for s, a, b in zip(self.strides, into, into[1:], strict=False)])
        self.up = nnx.List([linear(b, s * s * a) for s, a, b in zip(self.strides, out_of, out_of[1:], strict=False)])
        size = self.features[-1] * (side**2 if bottleneck == "dense" else 1)
        self.latent_shape = (latent,) if bottleneck == "dense" else (side, side, latent)
        self.to_latent, self.from_latent = linear(size, moments * latent), linear(latent, size)

    def encode_moments(self, x: Float[Array, "B P P C"]) -> Float[Array, "M B *D"]:
        """Encode patches to all values of each latent number.

        Args:
            x: B square patches.

        Returns:
            M = `moments` arrays of latent vectors in float32, (B, latent) or (B, h, w, latent).
        """
        batch, x = x.shape[0], to_block_order(x, self.strides)
        for layer in self.down:
            x = self._activated(layer, x)
        x = self._affine(self.to_latent, x).reshape(batch, *self.latent_shape[:-1], self.moments, -1)
        return jnp.moveaxis(x, -2, 0).astype(jnp.float32)

    def encode(self, x: Float[Array, "B P P C"]) -> Float[Array, "B *D"]:
        """Encode patches.

        Args:
            x: B square patches.

        Returns:
            Latent vectors, (B, latent) or (B, h, w, latent); the first value of each latent number.
        """
        return self.encode_moments(x)[0]

    def feature_maps(self, x: Float[Array, "B P P C"]) -> list[Float[Array, "B h w F"]]:
        """Feature maps of the encoder.

        Args:
            x: B square patches.

        Returns:
            Output of each layer, finest first, in float32.
        """
        batch, x = x.shape[0], to_block_order(x, self.strides)
        maps = []
        for i, layer in enumerate(self.down):
            x = self._activated(layer, x)
            blocks = x.reshape(batch, -1, self.features[i])
            maps.append(to_pixel_order(blocks, self.strides[i + 1 :], self.coarse[0]).astype(jnp.float32))
        return maps

    def decode(self, z: Float[Array, "B *D"]) -> Float[Array, "B P P V"]:
        """Decode latent vectors.

        Args:
            z: Latent vectors, (B, latent) or (B, h, w, latent).

        Returns:
            Reconstructed patches in float32; with several outputs, the channels of the first output come first.
        """
        x = self._activated(self.from_latent, z)
        for layer in reversed(list(self.up)[1:]):
            x = self._activated(layer, x)
        x = self._affine(self.up[0], x)  # no activation: pixel values are unbounded
        x = x.reshape(len(z), -1, self.outputs * self.channels)
        return to_pixel_order(x, self.strides, self.coarse[0]).astype(jnp.float32)

    def _activated(self, layer: nnx.Linear, x: Float[Array, "..."]) -> Float[Array, "N O"]:
        """Apply a layer and the activation."""
        return rematerialised(self.remat, lambda layer, x: nnx.silu(self._affine(layer, x)), layer, x)

    def _affine(self, layer: nnx.Linear, x: Float[Array, "..."]) -> Float[Array, "N O"]:
        """Apply a layer to consecutive groups of as many numbers as it has inputs."""
        dtype = jnp.dtype(self.dtype)
        rows = x.reshape(-1, layer.in_features).astype(dtype)
        assert layer.bias is not None  # nnx.Linear has one by default
        return affine(rows, layer.kernel[...].astype(dtype), layer.bias[...].astype(dtype))

    def __call__(self, x: Float[Array, "B P P C"]) -> Float[Array, "B P P V"]:
        """Reconstruct patches.

        Args:
            x: B square patches.

        Returns:
            Reconstructions in float32, as from `decode`.
        """
        return self.decode(self.encode(x))
