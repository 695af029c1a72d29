"""Convolutions and residual blocks (He et al. 2016, ECCV) that stay fast under `vmap` over networks, also on a CPU."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float
from pydantic import Field

GROUP = 8  # features per normalisation group

Dtype = Annotated[
    Literal["float32", "bfloat16"], Field(description="floating-point type of activations; parameters stay float32")
]
Remat = Annotated[bool, Field(description="recompute activations in the backward pass: less memory, more time")]


def rematerialised(
    remat: bool, function: Callable[..., jax.Array], module: nnx.Module, *arguments: Any
) -> Float[Array, "..."]:
    """Apply one part of a network, whose activations are recomputed in the backward pass if `remat` is set.

    Only the inputs of the part are kept for the backward pass, so memory falls only if a network is applied as several
    parts: its peak is the inputs of all parts and the activations of the largest one. XLA may recompute early on a CPU:
    the temporary memory of a training step of a U-Net falls from 108 to 104 MiB there, although the activations kept
    fall from 199 to 29 MiB (jax 0.9).

    Args:
        remat: Whether to recompute.
        function: Function of the module and the arguments.
        module: The part of the network.
        *arguments: Arrays, or None.

    Returns:
        Value of the function.

    Reference:
        Chen et al. 2016, arXiv:1604.06174.
    """
    if not remat:
        return function(module, *arguments)
    graph, state = nnx.split(module)  # nnx.remat fails inside a plain jax.grad
    return jax.checkpoint(lambda state, *rest: function(nnx.merge(graph, state), *rest))(state, *arguments)


def linear(layer: nnx.Linear, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
    """Apply a linear layer in the data type of its input."""
    assert layer.bias is not None  # nnx.Linear has one by default
    return x @ layer.kernel[...].astype(x.dtype) + layer.bias[...].astype(x.dtype)


def unrolled_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Unroll `vmap` of a function into separate calls within one program on a CPU.

    XLA turns a batch of convolutions with different kernels into a grouped convolution. This is three times slower on a
    CPU, but faster on a GPU, which a single small network does not fill.

    Args:
        function: Function of arrays.

    Returns:
        The function with this batching rule.
    """
    batched = custom_vmap(function)

    @batched.def_vmap
    def several(count: int, is_batched: list[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        if jax.default_backend() != "cpu":
            axes = [0 if b else None for b in is_batched]
            result = jax.vmap(function, axes)(*arguments)
            return result, jax.tree.map(lambda _: True, result)
        calls = [[a[i] if b else a for a, b in zip(arguments, is_batched, strict=True)] for i in range(count)]
        results = [batched(*call) for call in calls]
        return jax.tree.map(lambda *r: jnp.stack(r), *results), jax.tree.map(lambda _: True, results[0])

    return batched


def _plain(stride: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=layout)


def _plain_backward(stride: int, x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(partial(_plain, stride), x, kernel)[1](g)


STRIDES = (1, 2, 4)
FORWARD = {stride: unrolled_vmap(partial(_plain, stride)) for stride in STRIDES}
BACKWARD = {stride: unrolled_vmap(partial(_plain_backward, stride)) for stride in STRIDES}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(stride: int, x: Float[Array, "B H W I"], kernel: Float[Array, "h w I O"]) -> Float[Array, "B y x O"]:
    """Strided convolution with zero padding that is fast under `vmap` over kernels.

    Args:
        stride: Stride, 1, 2 or 4.
        x: B feature maps.
        kernel: Convolution kernel.

    Returns:
        Feature maps at every `stride`-th pixel.
    """
    return FORWARD[stride](x, kernel)


def _convolve_forward(stride: int, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(stride, x, kernel), (x, kernel)


def _convolve_backward(stride: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, ...]:
    return BACKWARD[stride](*saved, g)


convolve.defvjp(_convolve_forward, _convolve_backward)


class Conv(nnx.Module):
    """Square convolution without bias.

    Args:
        inputs: Number of input features.
        outputs: Number of output features.
        size: Side of the kernel in pixels.
        stride: Stride, 1, 2 or 4.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, *, rngs: nnx.Rngs):
        self.stride = stride
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (size, size, inputs, outputs)))

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B y x O"]:
        return convolve(self.stride, x, self.kernel[...].astype(x.dtype))


class Norm(nnx.Module):
    """Group normalisation (Wu and He 2018), independent of the other images in the batch.

    Args:
        features: Number of features, a multiple of 8.
    """

    def __init__(self, features: int):
        self.groups = features // GROUP
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        batch, height, width, features = x.shape
        per_pixels = x.reshape(batch, height * width, features).astype(
            jnp.float32
        )  # bfloat16 is too coarse for the moments
        mean, square = per_pixels.mean(1), (per_pixels**2).mean(1)
        grouped = (batch, self.groups, GROUP)
        mean = mean.reshape(grouped).mean(-1, keepdims=True)
        variance = square.reshape(grouped).mean(-1, keepdims=True) - mean**2
        gain = self.scale[...].reshape(grouped[1:]) / jnp.sqrt(jnp.maximum(variance, 0) + 1e-5)
        offset = self.bias[...].reshape(grouped[1:]) - mean * gain
        return (per_pixels * gain.reshape(batch, 1, -1) + offset.reshape(batch, 1, -1)).reshape(x.shape).astype(x.dtype)


class Block(nnx.Module):
    """Pre-activation residual block with two 3 x 3 convolutions.

    Args:
        features: Number of features, a multiple of 8.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List([Norm(features), Norm(features)])
        self.convs = nnx.List([Conv(features, features, rngs=rngs), Conv(features, features, rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(nnx.silu(norm(y)))
        return x + y
