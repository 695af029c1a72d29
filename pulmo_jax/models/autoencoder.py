"""A convolutional autoencoder whose strides equal its kernels.

Strided convolutions that do not overlap are one matrix product over rearranged pixels, forwards and backwards. All the
rearranging is done once, to the pixels that come in and to those that go out: between them, layers only change shapes.
On two CPU cores a training step of 64 patches of 64x64 takes 12 ms so (experiments/benchmarks/train_step.py). Measured
when it still took 19: 52 ms with a residual 3x3 convolution at each scale, 167 ms with the usual stride-2 3x3 layers
and 350 ms where these are transposed (layers.py there). On the sample CT 1,500 steps of the first kind reached a lower
loss than 500 of the second.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

COARSEST_PX = 4  # the side at which the encoder stops halving


def by_blocks(x: Float[Array, "B H W C"], strides: Sequence[int]) -> Float[Array, "B N C"]:
    """Pixels in the order in which strided layers gather them, finest stride first: the first layer's block of
    strides[0]^2 pixels is consecutive, so is the second's block of strides[1]^2 such blocks, and so on.

    Stride by stride: XLA compiles one transposition of all axes into gigabytes of code.
    """
    batch, side, _, channels = x.shape
    for stride in strides:
        side //= stride
        x = x.reshape(batch, side, stride, side, stride, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, -1, channels)


def by_pixels(x: Float[Array, "B N C"], strides: Sequence[int], side: int) -> Float[Array, "B H W C"]:
    """The inverse of by_blocks; side: of the image in coarsest blocks."""
    batch, _, channels = x.shape
    for stride in reversed(strides):
        x = x.reshape(batch, side, side, stride, stride, -1).transpose(0, 1, 3, 2, 4, 5)
        side *= stride
    return x.reshape(batch, side, side, channels)


@jax.custom_vjp
def affine(x: Float[Array, "N I"], kernel: Float[Array, "I O"], bias: Float[Array, "O"]) -> Float[Array, "N O"]:
    """x @ kernel + bias. Its gradient sums over rows by a matrix product, which XLA does not do by itself: its own sum,
    on a CPU, takes longer than the products."""
    return x @ kernel + bias


def _affine_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return affine(x, kernel, bias), (x, kernel)


def _affine_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = saved
    return g @ kernel.T, x.T @ g, (jnp.ones((1, len(g)), g.dtype) @ g)[0]


affine.defvjp(_affine_forward, _affine_backward)


def strides_for(patch_size: int) -> list[int]:
    """Strides of the encoder's layers: 4, then 2 while the side stays even and at least COARSEST_PX."""
    if patch_size < 8 or patch_size % 4:
        raise ValueError(f"data.patch_size is {patch_size}; it must be a multiple of 4, at least 8")
    strides, side = [4], patch_size // 4
    while side % 2 == 0 and side // 2 >= COARSEST_PX:
        strides.append(2)
        side //= 2
    return strides


class ConvAutoencoder(nnx.Module):
    """Encoder, a dense bottleneck of `latent` numbers, and the mirrored decoder.

    patch_size: side of the square input, a multiple of 4; the depth follows it (64 gives 4x4 after three layers).
    channels: bands of the input, any number.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        rngs: nnx.Rngs,
        latent: Annotated[int, Field(ge=1, description="size of the bottleneck")] = 64,
        width: Annotated[int, Field(ge=1, description="features of the first layer; doubled up to 4x")] = 32,
        dtype: Annotated[
            Literal["float32", "bfloat16"],
            Field(description="dtype of the computation; parameters stay float32"),
        ] = "float32",
        remat: Annotated[
            bool, Field(description="recompute activations in the backward pass: less memory, more time")
        ] = False,
    ):
        self.patch_size, self.channels = patch_size, channels
        self.strides = tuple(strides_for(patch_size))
        self.features = tuple(width * min(2**i, 4) for i in range(len(self.strides)))
        self.dtype, self.remat = dtype, remat
        side = patch_size
        for stride in self.strides:
            side //= stride
        self.coarse = (side, side, self.features[-1])

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, rngs=rngs)

        wide = [channels, *self.features]
        self.down = nnx.List([linear(s * s * a, b) for s, a, b in zip(self.strides, wide, wide[1:], strict=False)])
        self.up = nnx.List([linear(b, s * s * a) for s, a, b in zip(self.strides, wide, wide[1:], strict=False)])
        size = side * side * self.features[-1]
        self.to_latent, self.from_latent = linear(size, latent), linear(latent, size)

    def encode(self, x: Float[Array, "B P P C"]) -> Float[Array, "B D"]:
        batch, x = x.shape[0], by_blocks(x, self.strides)
        for layer in self.down:
            x = nnx.silu(self._apply(layer, x))
        return self._apply(self.to_latent, x.reshape(batch, -1))

    def feature_maps(self, x: Float[Array, "B P P C"]) -> list[Float[Array, "B h w F"]]:
        """What each layer of the encoder gives, finest first, float32."""
        batch, x = x.shape[0], by_blocks(x, self.strides)
        maps = []
        for i, layer in enumerate(self.down):
            x = nnx.silu(self._apply(layer, x))
            blocks = x.reshape(batch, -1, self.features[i])
            maps.append(by_pixels(blocks, self.strides[i + 1 :], self.coarse[0]).astype(jnp.float32))
        return maps

    def decode(self, z: Float[Array, "B D"]) -> Float[Array, "B P P C"]:
        x = nnx.silu(self._apply(self.from_latent, z))
        for i in reversed(range(len(self.strides))):
            x = self._apply(self.up[i], x)
            if i > 0:  # the last layer gives pixels, which have no bound
                x = nnx.silu(x)
        return by_pixels(x.reshape(len(z), -1, self.channels), self.strides, self.coarse[0])

    def _apply(self, layer: nnx.Linear, x: Float[Array, "..."]) -> Float[Array, "N O"]:
        """To as many consecutive numbers at a time as the layer takes."""
        dtype = jnp.dtype(self.dtype)
        rows = x.reshape(-1, layer.in_features).astype(dtype)
        assert layer.bias is not None  # nnx.Linear has one by default
        return affine(rows, layer.kernel[...].astype(dtype), layer.bias[...].astype(dtype))

    def __call__(self, x: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """The reconstruction, float32."""

        graph, state = nnx.split(self)

        def forward(state: nnx.State, x: jax.Array) -> jax.Array:
            model = nnx.merge(graph, state)
            return model.decode(model.encode(x))

        run = jax.checkpoint(forward) if self.remat else forward  # nnx.remat fails inside a plain jax.grad
        return run(state, x).astype(jnp.float32)
