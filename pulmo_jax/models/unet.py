"""U-Net (Ronneberger et al. 2015, MICCAI): an encoder of features at several scales, and a decoder with skips.

The first layer rearranges blocks of `stem` x `stem` pixels to features and the last one back, so only one narrow
convolution runs at the full resolution: on two CPU cores most of the time of a U-Net is spent there. A decoder stage
adds the upsampled, projected features of the coarser scale to those of the encoder, instead of concatenating them,
which halves its operations. The layers between the scales were compared in speed
(experiments/benchmarks/unet_layers.md); upsampling is bilinear, because the outlines of predictions otherwise show the
cells of the coarser scales. The decoder takes the features of any `Encoder`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from pulmo_jax.models.blocks import GROUP, Conv, Dtype, Norm, convolve

COARSEST_PX = 6  # least side of the features at which the encoder stops downsampling
PIXEL_FEATURES = 8  # features of a pixel before its logits
WIDEST = 8  # largest number of features, as a multiple of that of the first scale


@runtime_checkable
class Encoder(Protocol):
    """Features of an image at several scales, finest first.

    Attributes:
        channels: Number of features at each scale.
        strides: Side of a cell of each scale in pixels of the image.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, x: Float[Array, "B H W C"]) -> Sequence[Float[Array, "B _ _ _"]]:
        """Compute the features (B, H / stride, W / stride, channels) of each scale."""
        ...


class Offset(nnx.Module):
    """Offset of each feature, in the place of a normalisation.

    Args:
        features: Number of features.
    """

    def __init__(self, features: int):
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        return x + self.bias[...].astype(x.dtype)


class Stage(nnx.Module):
    """3 x 3 convolutions of one scale, each with a normalisation and a rectifier.

    In a residual stage these precede the convolutions, and the input is added to their result (He et al. 2016, ECCV).

    Args:
        features: Number of features, a multiple of 8.
        layers: Number of convolutions.
        norm: Normalisation: group or none.
        residual: Whether to add the input.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, features: int, layers: int, norm: str, residual: bool, *, rngs: nnx.Rngs):
        self.residual = residual
        self.norms = nnx.List([normalisation(norm, features) for _ in range(layers)])
        self.convs = nnx.List([Conv(features, features, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(jax.nn.relu(norm(y))) if self.residual else jax.nn.relu(norm(conv(y)))
        return x + y if self.residual else y


def normalisation(kind: str, features: int) -> Norm | Offset:
    """Normalisation of the features: group, or an offset only."""
    return Norm(features) if kind == "group" else Offset(features)


class ConvEncoder(nnx.Module):
    """Convolutional encoder: blocks of pixels become features, then each scale halves the resolution.

    Args:
        patch_size: Side of the patches in pixels, which determines the depth unless it is given.
        channels: Number of channels of the images.
        rngs: Random streams for the initialisation.
        width: Features of the first scale; they double with each scale up to a factor of 8.
        depth: Number of scales; None: down to a side of about 6 cells.
        stem: Side of the blocks of pixels, 1, 2 or 4.
        layers: Convolutions at each scale.
        norm: Normalisation of the features: group or none.
        residual: Whether the convolutions of a scale add their input.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        rngs: nnx.Rngs,
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
        norm: Annotated[Literal["group", "none"], Field(description="normalisation of the features")] = "group",
        residual: Annotated[bool, Field(description="whether the convolutions of a scale add their input")] = True,
    ):
        depth = depth or depth_for(patch_size, stem)
        self.channels = tuple(width * min(2**i, WIDEST) for i in range(depth))
        self.strides = tuple(stem * 2**i for i in range(depth))
        self.stem = stem
        self.first = Conv(channels * stem**2, width, rngs=rngs)
        self.down = nnx.List(
            [Conv(fine, coarse, stride=2, rngs=rngs) for fine, coarse in zip(self.channels, self.channels[1:])]  # noqa: B905
        )
        self.stages = nnx.List([Stage(features, layers, norm, residual, rngs=rngs) for features in self.channels])

    def __call__(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ _"]]:
        x = self.stages[0](self.first(blocks_to_features(x, self.stem)))
        found = [x]
        for down, stage in zip(self.down, list(self.stages)[1:], strict=True):
            x = stage(down(x))
            found.append(x)
        return found


class Decoder(nnx.Module):
    """Decoder of the features of an encoder, from the coarsest scale to the finest.

    Args:
        channels: Number of features of the encoder at each scale, finest first.
        width: Largest number of features of the decoder at the finest scale; it doubles with each scale.
        layers: Convolutions at each scale.
        norm: Normalisation: group or none.
        residual: Whether the convolutions of a scale add their input.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, channels: Sequence[int], width: int, layers: int, norm: str, residual: bool, *, rngs: nnx.Rngs):
        self.channels = tuple(rounded(min(c, width * 2**i)) for i, c in enumerate(channels))
        self.lateral = nnx.List(
            [
                Conv(encoded, own, size=1, rngs=rngs) if encoded != own else Identity()
                for encoded, own in zip(channels, self.channels, strict=True)
            ]
        )
        pairs = zip(self.channels[1:], self.channels[:-1], strict=True)
        self.up = nnx.List([Conv(coarse, fine, size=1, rngs=rngs) for coarse, fine in pairs])
        self.stages = nnx.List([Stage(c, layers, norm, residual, rngs=rngs) for c in self.channels[:-1]])

    def __call__(self, features: Sequence[Float[Array, "B _ _ _"]]) -> list[Float[Array, "B _ _ _"]]:
        """Decode the features; returns those of each scale, finest first."""
        lateral = [layer(x) for layer, x in zip(self.lateral, features, strict=True)]
        found = [lateral[-1]]
        for skip, up, stage in reversed(list(zip(lateral, self.up, self.stages, strict=False))):
            projected = up(found[0])
            found.insert(0, stage(skip + upsample(projected, skip.shape[1] // projected.shape[1])))
        return found


class Identity(nnx.Module):
    """Returns its input."""

    def __call__(self, x: Float[Array, "B H W F"]) -> Float[Array, "B H W F"]:
        return x


class UNet(nnx.Module):
    """Logits of the classes of every pixel.

    The side of the images must be a multiple of `stride`, the coarsest one.

    Args:
        patch_size: Side of the patches in pixels.
        channels: Number of channels of the images.
        n_classes: Number of logits per pixel.
        rngs: Random streams for the initialisation.
        encoder: Factory (patch_size, channels, rngs) -> `Encoder`.
        width: Largest number of features of the decoder at the finest scale.
        layers: Convolutions of the decoder at each scale.
        norm: Normalisation in the decoder: group or none.
        residual: Whether the convolutions of a scale of the decoder add their input.
        deep_supervision: Number of further scales that have logits of their own in training.
        dtype: Data type of the computation; parameters are float32.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        channels: int,
        n_classes: int,
        rngs: nnx.Rngs,
        encoder: Callable[..., Any] = ConvEncoder,
        width: Annotated[
            int, Field(ge=8, le=512, multiple_of=8, description="most features of the decoder's finest scale")
        ] = 16,
        layers: Annotated[int, Field(ge=1, le=16, description="3 x 3 convolutions of the decoder at each scale")] = 2,
        norm: Annotated[Literal["group", "none"], Field(description="normalisation in the decoder")] = "group",
        residual: Annotated[
            bool, Field(description="whether the decoder's convolutions of a scale add their input")
        ] = True,
        deep_supervision: Annotated[
            int, Field(ge=0, le=8, description="number of coarser scales with a loss of their own")
        ] = 0,
        dtype: Dtype = "float32",
    ):
        self.dtype = dtype
        self.encoder = encoder(patch_size=patch_size, channels=channels, rngs=rngs)
        self.decoder = Decoder(self.encoder.channels, width, layers, norm, residual, rngs=rngs)
        self.strides = self.encoder.strides[: 1 + deep_supervision]
        self.stride = self.encoder.strides[-1]
        self.last = nnx.List([normalisation(norm, own) for own in self.decoder.channels[: len(self.strides)]])
        self.heads = nnx.List(
            [nnx.Linear(own, n_classes, rngs=rngs) for own in self.decoder.channels[1 : len(self.strides)]]
        )
        self.head = BlockHead(self.decoder.channels[0], n_classes, self.strides[0], rngs=rngs)

    def scales(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ K"]]:
        """Compute logits at the resolution of the image and, with deep supervision, at coarser scales.

        Args:
            x: Images.

        Returns:
            Logits (B, H, W, K), then (B, H / stride, W / stride, K) of the next scales, in float32.
        """
        decoded = self.decoder(self.encoder(x.astype(self.dtype)))
        fine, *coarser = (jax.nn.relu(norm(d)) for norm, d in zip(self.last, decoded, strict=False))
        return [self.head(fine), *(head(d.astype(jnp.float32)) for head, d in zip(self.heads, coarser, strict=True))]

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W K"]:
        """Compute logits at the resolution of the image, in float32."""
        return self.head(jax.nn.relu(self.last[0](self.decoder(self.encoder(x.astype(self.dtype)))[0])))


class BlockHead(nnx.Module):
    """Logits of the pixels of blocks: features of each pixel from those of its block, then a 3 x 3 convolution.

    The convolution joins the pixels of neighbouring blocks; without it, outlines show the pattern of the blocks.

    Args:
        features: Number of features of a block.
        n_classes: Number of logits per pixel.
        side: Side of a block in pixels.
        rngs: Random streams for the initialisation.
    """

    def __init__(self, features: int, n_classes: int, side: int, *, rngs: nnx.Rngs):
        self.side = side
        self.split = nnx.Linear(features, PIXEL_FEATURES * side**2, rngs=rngs)
        self.conv, self.bias = Conv(PIXEL_FEATURES, n_classes, rngs=rngs), nnx.Param(jnp.zeros(n_classes))

    def __call__(self, x: Float[Array, "B h w F"]) -> Float[Array, "B H W K"]:
        pixels = jax.nn.relu(self.split(x))
        kernel = block_kernel(self.conv.kernel[...], self.side).astype(pixels.dtype)
        logits = features_to_blocks(convolve(1, pixels, kernel), self.side)
        return logits.astype(jnp.float32) + self.bias[...]


def block_kernel(kernel: Float[Array, "3 3 I O"], side: int) -> Float[Array, "3 3 _ _"]:
    """Kernel between blocks of pixels that equals a 3 x 3 convolution of the pixels.

    On a CPU, the few features of single pixels take longer than the products with zeros of whole blocks.

    Args:
        kernel: Convolution kernel of the pixels.
        side: Side of the blocks in pixels.

    Returns:
        Kernel (3, 3, side^2 I, side^2 O), in the order of `blocks_to_features`.
    """
    block, source, target = np.ogrid[-1:2, :side, :side]
    tap = side * block + source - target + 1  # along one axis
    tap = np.where((tap >= 0) & (tap < 3), tap, 3)  # 3: a tap of zeros
    padded = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    whole = padded[tap[:, None, :, None, :, None], tap[None, :, None, :, None, :]]  # (by, bx, i, j, i', j', I, O)
    whole = whole.transpose(0, 1, 2, 3, 6, 4, 5, 7)
    return whole.reshape(3, 3, side**2 * kernel.shape[2], side**2 * kernel.shape[3])


def depth_for(patch_size: int, stem: int) -> int:
    """Number of scales of the encoder: halvings while the side stays even and at least `COARSEST_PX`, and one.

    Args:
        patch_size: Side of the patches in pixels.
        stem: Side of the blocks of pixels of the first scale.

    Example:
        >>> depth_for(192, 2)
        5
    """
    side, depth = patch_size // stem, 1
    while side % 2 == 0 and side // 2 >= COARSEST_PX and depth < 7:
        side, depth = side // 2, depth + 1
    return depth


def rounded(features: int) -> int:
    """Round a number of features down to whole normalisation groups, at least one."""
    return max(GROUP, features // GROUP * GROUP)


def blocks_to_features(x: Float[Array, "B H W C"], side: int) -> Float[Array, "B h w F"]:
    """Rearrange blocks of side x side pixels to features (space to depth)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // side, width // side, side * side * channels)


def features_to_blocks(x: Float[Array, "B h w F"], side: int) -> Float[Array, "B H W C"]:
    """Rearrange features to blocks of side x side pixels (depth to space): the inverse of `blocks_to_features`."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height, width, side, side, features // side**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * side, width * side, features // side**2)


def upsample(x: Float[Array, "B H W F"], factor: int) -> Float[Array, "B y x F"]:
    """Upsample bilinearly by a power of two; the borders are padded with the nearest cell.

    Args:
        x: B feature maps.
        factor: Power of two.

    Returns:
        Feature maps of `factor` times the height and width.

    Example:
        >>> upsample(jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1), 2)[0, 0, :, 0].tolist()
        [0.0, 1.0, 3.0, 4.0]
    """
    while factor > 1:
        x, factor = doubled(doubled(x, 1), 2), factor // 2
    return x


def doubled(x: Float[Array, "B H W F"], axis: int) -> Float[Array, "B y x F"]:
    """Upsample one axis by a factor of two: each half of a cell has 1/4 of the neighbour on its side."""
    length = x.shape[axis]
    part = partial(jax.lax.slice_in_dim, x, axis=axis)
    before = jnp.concatenate([part(0, 1), part(0, length - 1)], axis)
    after = jnp.concatenate([part(1, length), part(length - 1, length)], axis)
    halves = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    return halves.reshape(*x.shape[:axis], 2 * length, *x.shape[axis + 1 :])
