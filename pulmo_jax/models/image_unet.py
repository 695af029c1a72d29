"""U-Net from images to images (Ronneberger et al. 2015, MICCAI), for denoising and diffusion.

The first layer rearranges blocks of `stem` x `stem` pixels to features and the last one back, and skips are added
instead of concatenated, as in models.unet. With a time, its sinusoidal embedding scales and shifts the normalised
features of every residual block (Nichol and Dhariwal 2021, ICML, Sec. 3; FiLM: Perez et al. 2018, AAAI). The feature
maps chosen by `attention_px` are followed by self-attention over their cells (Vaswani et al. 2017, NeurIPS). The last
convolution of every residual block, the output of attention and the head start at zero (Dhariwal and Nichol 2021,
NeurIPS, Appendix), so that the network starts as one that returns zero.
"""

from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from pulmo_jax.models.blocks import Conv, Dtype, Norm, Remat, linear, rematerialised
from pulmo_jax.models.unet import WIDEST, BlockHead, blocks_to_features, depth_for, upsample

TIME_STEPS = 1000.0  # time 1 is embedded as step 1000 of a transformer's positions
LONGEST_PERIOD = 10_000.0
MOST_CELLS = 16  # largest side of the coarsest feature map that has self-attention by default


class TimedBlock(nnx.Module):
    """Pre-activation residual block with 3 x 3 convolutions, modulated by an embedding of time.

    Args:
        features: Number of features, a multiple of 8.
        layers: Number of convolutions.
        embedding: Size of the embedding of time; 0: without time.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, features: int, layers: int, embedding: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List([Norm(features) for _ in range(layers)])
        self.convs = nnx.List([Conv(features, features, rngs=rngs) for _ in range(layers)])
        self.convs[-1].kernel = nnx.Param(jnp.zeros_like(self.convs[-1].kernel[...]))
        self.film = nnx.List(
            [nnx.Linear(embedding, 2 * features, rngs=rngs) for _ in range(layers if embedding else 0)]
        )

    def __call__(self, x: Float[Array, "B H W F"], time: Float[Array, "B E"] | None) -> Float[Array, "B H W F"]:
        y = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            y = norm(y)
            if time is not None:
                scale, shift = jnp.split(self.film[i](time)[:, None, None].astype(y.dtype), 2, -1)
                y = y * (1 + scale) + shift
            y = conv(jax.nn.relu(y))
        return x + y


class SelfAttention(nnx.Module):
    """Residual multi-head self-attention over the cells of a feature map.

    Args:
        features: Number of features, a multiple of 8.
        heads: Number of heads, a divisor of `features`.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        self.heads, self.norm = heads, Norm(features)
        self.inputs = nnx.Linear(features, 3 * features, rngs=rngs)
        self.output = nnx.Linear(features, features, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        batch, height, width, features = x.shape
        cells = self.norm(x).reshape(batch, height * width, features)
        inputs = linear(self.inputs, cells).reshape(batch, -1, 3, self.heads, features // self.heads)
        mixed = jax.nn.dot_product_attention(inputs[:, :, 0], inputs[:, :, 1], inputs[:, :, 2])
        return x + linear(self.output, mixed.reshape(cells.shape)).reshape(x.shape)


class Scale(nnx.Module):
    """Residual block of one scale, with self-attention if `heads` is above 0; arguments as in `TimedBlock`."""

    def __init__(self, features: int, layers: int, embedding: int, heads: int, *, rngs: nnx.Rngs):
        self.block = TimedBlock(features, layers, embedding, rngs=rngs)
        self.attention = nnx.List([SelfAttention(features, heads, rngs=rngs)] if heads else [])

    def __call__(self, x: Float[Array, "B H W F"], time: Float[Array, "B E"] | None) -> Float[Array, "B H W F"]:
        x = self.block(x, time)
        for attention in self.attention:
            x = attention(x)
        return x


class ImageUNet(nnx.Module):
    """U-Net whose output has the size of its input, with `outputs` values per pixel and channel.

    Args:
        patch_size: Side of the square input in pixels.
        channels: Number of channels of the input.
        rngs: Random streams for the initialisation.
        outputs: Number of values per pixel and channel.
        timed: Whether the network takes the time of a diffusion process.
        width: Features of the first scale; they double with each scale up to a factor of 8.
        depth: Number of scales; None: down to a side of about 6 cells.
        stem: Side of the blocks of pixels, 1, 2 or 4.
        layers: Convolutions at each scale, in the encoder and in the decoder.
        attention_px: Sides of the feature maps with self-attention, in cells; None: that of the coarsest one if it is
            at most 16, otherwise none.
        heads: Number of attention heads.
        dtype: Data type of the computation; parameters are float32.
        remat: Recompute activations in the backward pass.

    Raises:
        ValueError: If the patches cannot be halved `depth` - 1 times, no feature map has a side in `attention_px`, or
            the heads do not divide the features.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        rngs: nnx.Rngs,
        outputs: int = 1,
        timed: bool = False,
        width: Annotated[
            int, Field(ge=8, le=512, multiple_of=8, description="features of the first scale; deeper scales up to 8x")
        ] = 16,
        depth: Annotated[
            int | None, Field(ge=1, le=8, description="number of scales; null: down to about 6 cells per patch side")
        ] = None,
        stem: Annotated[
            Literal[1, 2, 4], Field(description="side of the pixel blocks that the first scale sees, px")
        ] = 2,
        layers: Annotated[int, Field(ge=1, le=16, description="3 x 3 convolutions at each scale")] = 2,
        attention_px: Annotated[
            tuple[int, ...] | None,
            Field(
                description="sides of the feature maps with self-attention, in cells; []: none; null: the coarsest "
                "one, if its side is at most 16"
            ),
        ] = None,
        heads: Annotated[int, Field(ge=1, le=64, description="number of attention heads")] = 4,
        dtype: Dtype = "float32",
        remat: Remat = False,
    ):
        depth = depth or depth_for(patch_size, stem)
        require_divisible(patch_size, stem, depth)
        self.patch_size, self.channels = patch_size, channels
        self.stem, self.timed, self.dtype, self.remat = stem, timed, dtype, remat
        self.features = tuple(width * min(2**i, WIDEST) for i in range(depth))
        attended = attended_scales([patch_size // (stem * 2**i) for i in range(depth)], attention_px)
        for features, here in zip(self.features, attended, strict=True):
            if here and features % heads:
                raise ValueError(f"model.heads={heads} does not divide the {features} features of a scale")
        embedding = 4 * width if timed else 0
        sizes = [(width, embedding), (embedding, embedding)] if timed else []
        self.embed = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in sizes])

        def scale(i: int) -> Scale:
            return Scale(self.features[i], layers, embedding, heads if attended[i] else 0, rngs=rngs)

        pairs = list(zip(self.features, self.features[1:], strict=False))
        self.first = Conv(channels * stem**2, width, rngs=rngs)
        self.down = nnx.List([Conv(fine, coarse, stride=2, rngs=rngs) for fine, coarse in pairs])
        self.up = nnx.List([Conv(coarse, fine, size=1, rngs=rngs) for fine, coarse in pairs])
        self.encoder = nnx.List([scale(i) for i in range(depth)])
        self.decoder = nnx.List([scale(i) for i in range(depth - 1)])
        self.last = Norm(width)
        self.head = BlockHead(width, channels * outputs, stem, rngs=rngs)
        self.head.conv.kernel = nnx.Param(jnp.zeros_like(self.head.conv.kernel[...]))

    def __call__(self, x: Float[Array, "B P P C"], time: Float[Array, "B"] | None = None) -> Float[Array, "B P P O"]:
        """Apply the network.

        Args:
            x: Images.
            time: Time of each image, 0 for clean data to 1 for pure noise; only if the network is timed.

        Returns:
            `outputs` values per pixel and channel, in float32, grouped by output: the first C are those of the first.
        """
        if (time is not None) != self.timed:
            raise ValueError(f"the network is {'' if self.timed else 'not '}timed: time={time}")
        return self.maps(x, time)[-1]

    def feature_maps(self, x: Float[Array, "B P P C"]) -> list[Float[Array, "B h w F"]]:
        """Feature maps of the encoder at time 0, finest first, in float32."""
        time = jnp.zeros(len(x)) if self.timed else None
        return [features.astype(jnp.float32) for features in self.maps(x, time)[:-1]]

    def maps(self, x: Float[Array, "B P P C"], time: Float[Array, "B"] | None) -> list[Float[Array, "B _ _ _"]]:
        """Feature maps of the encoder, finest first, then the output of the network."""
        embedded = self._embedding(time) if time is not None else None
        apply = partial(rematerialised, self.remat, Scale.__call__)
        x = self.first(blocks_to_features(x.astype(self.dtype), self.stem))
        x = apply(self.encoder[0], x, embedded)
        found = [x]
        for down, scale in zip(self.down, list(self.encoder)[1:], strict=True):
            x = apply(scale, down(x), embedded)
            found.append(x)
        for skip, up, scale in reversed(list(zip(found, self.up, self.decoder, strict=False))):
            x = apply(scale, skip + upsample(up(x), 2), embedded)
        return [*found, rematerialised(self.remat, ImageUNet._output, self, x)]

    def _output(self, x: Float[Array, "B h w F"]) -> Float[Array, "B P P O"]:
        """Pixels from the features of the finest scale."""
        return self.head(jax.nn.relu(self.last(x)).astype(jnp.float32))

    def _embedding(self, time: Float[Array, "B"]) -> Float[Array, "B E"]:
        """Two layers on the sinusoids of the time."""
        x = sinusoids(time, self.embed[0].in_features)
        return nnx.silu(self.embed[1](nnx.silu(self.embed[0](x))))


def sinusoids(time: Float[Array, "B"], size: int) -> Float[Array, "B E"]:
    """Embed times by cosines and sines of geometrically spaced frequencies.

    Args:
        time: Times, 0 to 1.
        size: Size of the embedding, even.

    Returns:
        Cosines, then sines.

    Reference:
        Vaswani et al. 2017, NeurIPS, Sec. 3.5, with 1000 * time as the position.
    """
    frequencies = jnp.exp(-jnp.log(LONGEST_PERIOD) * jnp.arange(size // 2) / (size // 2))
    phase = TIME_STEPS * time[:, None] * frequencies
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1)


def attended_scales(sides: list[int], attention_px: tuple[int, ...] | None) -> list[bool]:
    """Choose the scales with self-attention.

    Args:
        sides: Side of the feature map of each scale in cells, finest first.
        attention_px: Sides to choose; None: the coarsest one if it is at most 16.

    Returns:
        Whether each scale has self-attention.

    Raises:
        ValueError: If a chosen side is not that of a scale.
    """
    if attention_px is None:
        return [side == sides[-1] <= MOST_CELLS for side in sides]
    unknown = [side for side in attention_px if side not in sides]
    if unknown:
        raise ValueError(
            f"model.attention_px={list(attention_px)}: no feature map has {unknown[0]} cells per side; the sides at "
            f"this patch size, model.stem and model.depth are {sides}"
        )
    return [side in attention_px for side in sides]


def require_divisible(patch_size: int, stem: int, depth: int) -> None:
    """Raise ValueError unless the side of the patches is a multiple of the side of a cell of the coarsest scale."""
    coarsest = stem * 2 ** (depth - 1)
    if patch_size % coarsest:
        raise ValueError(
            f"data.patch_size={patch_size}: must be a multiple of {coarsest} px, the side of a cell of the coarsest "
            f"scale at model.stem={stem} and model.depth={depth}"
        )
