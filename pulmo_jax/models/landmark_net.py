"""Heat maps of landmarks: a small U-Net (Ronneberger et al. 2015, MICCAI) of residual blocks (He et al. 2016, ECCV).

Each landmark's heat map is a probability over the cells of a coarse grid, and its mean the landmark's position (Sun et
al. 2018, "Integral human pose regression"; Nibali et al. 2018, DSNT), so that an error can be finer than a cell.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

GROUP = 8  # features that are normalised together


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of which `vmap` makes several calls in one program.

    XLA would make a grouped convolution of convolutions with different kernels: on a CPU three times slower.
    """
    batched = custom_vmap(function)

    @batched.def_vmap
    def several(count: int, is_batched: list[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        each = [[a[i] if b else a for a, b in zip(arguments, is_batched, strict=True)] for i in range(count)]
        results = [batched(*one) for one in each]
        return jax.tree.map(lambda *r: jnp.stack(r), *results), jax.tree.map(lambda _: True, results[0])

    return batched


def _plain(stride: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=layout)


def _plain_backward(stride: int, x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(partial(_plain, stride), x, kernel)[1](g)


STRIDES = (1, 2, 4)
FORWARD = {stride: one_by_one(partial(_plain, stride)) for stride in STRIDES}
BACKWARD = {stride: one_by_one(partial(_plain_backward, stride)) for stride in STRIDES}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(stride: int, x: Float[Array, "B H W I"], kernel: Float[Array, "h w I O"]) -> Float[Array, "B y x O"]:
    """A convolution at every `stride`-th pixel, 1, 2 or 4, zeros around the image; fast under vmap over kernels."""
    return FORWARD[stride](x, kernel)


def _convolve_forward(stride: int, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(stride, x, kernel), (x, kernel)


def _convolve_backward(stride: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, ...]:
    return BACKWARD[stride](*saved, g)


convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(nnx.Module):
    """A convolution of size x size px, without bias."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs):
        self.stride = stride
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (size, size, inputs, outputs)))

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B y x O"]:
        return convolve(self.stride, x, self.kernel[...])


class Norm(nnx.Module):
    """Group normalisation (Wu & He 2018): of no other image than its own."""

    def __init__(self, features: int):
        self.groups = features // GROUP
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        batch, height, width, features = x.shape
        per_pixels = x.reshape(batch, height * width, features)
        mean, square = per_pixels.mean(1), (per_pixels**2).mean(1)
        grouped = (batch, self.groups, GROUP)
        mean = mean.reshape(grouped).mean(-1, keepdims=True)
        variance = square.reshape(grouped).mean(-1, keepdims=True) - mean**2
        gain = self.scale[...].reshape(grouped[1:]) / jnp.sqrt(jnp.maximum(variance, 0) + 1e-5)
        offset = self.bias[...].reshape(grouped[1:]) - mean * gain
        return (per_pixels * gain.reshape(batch, 1, -1) + offset.reshape(batch, 1, -1)).reshape(x.shape)


class Block(nnx.Module):
    """Adds to its input what two convolutions find in it."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List([Norm(features), Norm(features)])
        self.convs = nnx.List([Conv(features, features, rngs=rngs), Conv(features, features, rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(nnx.silu(norm(y)))
        return x + y


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
