"""Segmentation by a network with a logit per class and pixel, trained on randomly augmented patches."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, UInt8
from pydantic import Field

from pulmo_jax.core import jitter
from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.segmentation_losses import Loss, combined, probabilities
from pulmo_jax.methods.segmenter import Batch
from pulmo_jax.models.unet import UNet
from pulmo_jax.types import InputError

SIDE = re.compile(r"(?<![a-z])(left|right)(?![a-z])", re.IGNORECASE)  # in the name of a class


@dataclass(frozen=True)
class SegmentationNetwork:
    """Network with a logit per class and pixel; implements methods.segmenter.Segmenter.

    Attributes:
        classes: Classes of the run.
        patch_size: Side of the patches, px.
        channels: Number of bands.
        network: Factory (patch_size, channels, n_classes, rngs) -> model with `scales` and `stride` as in `UNet`.
        loss: Loss of a batch; see `segmentation_losses`.
    """

    classes: Classes
    patch_size: int
    channels: int
    network: Callable[..., Any] = UNet
    loss: Loss = combined
    rotation_deg: Annotated[float, Field(ge=0, description="augmentation: sd of the rotation, degrees")] = 15.0
    scale: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of the scale")] = 0.15
    aspect: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of the aspect ratio")] = 0.1
    shear: Annotated[float, Field(ge=0, description="augmentation: sd of the shear")] = 0.1
    shift: Annotated[float, Field(ge=0, description="augmentation: sd of the shift, in patch sides")] = 0.08
    flips: Annotated[
        Literal["none", "horizontal", "all"] | None,
        Field(
            description="augmentation: no, left-right or all reflections and quarter turns; null: left-right, unless "
            "the name of a class says left or right"
        ),
    ] = None
    contrast: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of the contrast")] = 0.4
    brightness: Annotated[
        float, Field(ge=0, description="augmentation: sd of an intensity offset, normalised units")
    ] = 0.2
    gamma: Annotated[float, Field(ge=0, description="augmentation: sd of the logarithm of gamma")] = 0.5
    noise: Annotated[float, Field(ge=0, description="augmentation: sd of pixel noise, normalised units")] = 0.05

    def __post_init__(self) -> None:
        if self.patch_size % self.skeleton.stride:
            raise InputError(
                f"data.patch_size={self.patch_size}: this model needs a multiple of {self.skeleton.stride}"
            )

    @property
    def symmetries(self) -> str:
        """Reflections of the augmentation: `flips` or its default."""
        sides = any(SIDE.search(name) for name in self.classes.names)
        return self.flips or ("none" if sides else "horizontal")

    @property
    def mirrored(self) -> bool:
        """Whether the augmentation has reflections."""
        return self.symmetries != "none"

    def member(self, key: Key[Array, ""]) -> Any:
        """Create a network with random initial parameters."""
        return self.network(
            patch_size=self.patch_size,
            channels=self.channels,
            n_classes=self.classes.n_outputs,
            rngs=nnx.Rngs(params=key),
        )

    @cached_property
    def skeleton(self) -> Any:
        """Abstract network: shapes and dtypes without values."""
        return nnx.eval_shape(lambda: self.member(jax.random.key(0)))

    @cached_property
    def graph(self) -> nnx.GraphDef[Any]:
        """Static structure of the network."""
        return nnx.graphdef(self.skeleton)

    def init(self, key: Key[Array, ""]) -> Params:
        """Return random initial parameters."""
        return nnx.state(self.member(key), nnx.Param)

    # --- learning

    def train_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the loss of augmented patches.

        With deep supervision, every coarser scale has the same loss on its cells; scale i has the weight 2^-i, and the
        weights have sum 1.

        Args:
            params: Parameters.
            batch: Normalised patches and the codes of their pixels.
            key: Random key of the augmentation.

        Returns:
            The mean loss of the batch.

        Reference:
            Isensee et al. 2021, nnU-Net, Methods, for the weights of the scales.
        """
        return self.batch_loss(params, *self.augmented(*batch, key))

    def batch_loss(
        self, params: Params, patches: Float[Array, "B P P C"], codes: UInt8[Array, "B P P"]
    ) -> Float[Array, ""]:
        """Compute the loss of patches without augmentation."""
        scales = nnx.merge(self.graph, params).scales(patches)
        weights = [2.0**-i for i in range(len(scales))]
        terms = (w * self.loss_of(logits, codes) for w, logits in zip(weights, scales, strict=True))
        return sum(terms, jnp.zeros(())) / sum(weights)

    def loss_of(self, logits: Float[Array, "B h w M"], codes: UInt8[Array, "B P P"]) -> Float[Array, ""]:
        """Compute the loss of logits of one scale; a cell has the class of the pixel at its centre."""
        stride = codes.shape[1] // logits.shape[1]
        codes = codes[:, stride // 2 :: stride, stride // 2 :: stride]
        inside, labelled = self.truth(codes)
        return self.loss(logits=logits, inside=inside, labelled=labelled, exclusive=not self.classes.overlapping)

    def truth(self, codes: UInt8[Array, "*grid"]) -> tuple[Float[Array, "*grid M"], Bool[Array, "*grid"]]:
        """Membership of pixels in the classes of the logits, and whether they are labelled."""
        inside = jnp.asarray(self.classes.memberships)[codes]
        if not self.classes.overlapping:
            inside = jnp.concatenate([1 - inside.sum(-1, keepdims=True), inside], -1)
        return inside, codes != UNLABELLED

    def augmented(
        self, patches: Float[Array, "B P P C"], codes: UInt8[Array, "B P P"], key: Key[Array, ""]
    ) -> tuple[Float[Array, "B P P C"], UInt8[Array, "B P P"]]:
        """Apply random flips, affine transforms and changes of intensity; pixels from outside become unlabelled."""
        turn, move, look = jax.random.split(key, 3)
        if self.symmetries != "none":
            patches, codes = jitter.random_symmetry(turn, patches, codes, turns=self.symmetries == "all")
        if any((self.rotation_deg, self.scale, self.aspect, self.shear, self.shift)):
            affine = jitter.random_affine(
                move,
                len(patches),
                self.patch_size,
                rotation_deg=self.rotation_deg,
                scale=self.scale,
                aspect=self.aspect,
                shear=self.shear,
                shift=self.shift,
            )
            patches, codes = jitter.warp_labelled(patches, codes, affine, UNLABELLED)
        return self.recoloured(patches, look), codes

    def recoloured(self, patches: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, "B P P C"]:
        """Change contrast, brightness and gamma of each patch at random, and add noise.

        Gamma acts on values between 0 and 1, the range of normalised intensities; values outside are unchanged by it.
        """
        keys = jax.random.split(key, 4)
        one = (len(patches), 1, 1, 1)
        log_gamma, log_gain, offset = (jax.random.normal(k, one) for k in keys[:3])
        unit = jnp.clip(patches, 1e-6, 1.0)
        patches = jnp.where((patches > 0) & (patches < 1), unit ** jnp.exp(self.gamma * log_gamma), patches)
        patches = 0.5 + (patches - 0.5) * jnp.exp(self.contrast * log_gain) + self.brightness * offset
        return patches + self.noise * jax.random.normal(keys[3], patches.shape) if self.noise else patches

    def validation_loss(self, params: Params, batch: Batch) -> Float[Array, "B"]:
        """Compute the loss of each patch without augmentation."""
        return jax.vmap(lambda patch, codes: self.batch_loss(params, patch[None], codes[None]))(*batch)

    # --- prediction

    def probabilities(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the uncalibrated probabilities of the classes, background first if they are exclusive."""
        return probabilities(nnx.merge(self.graph, params)(patches), not self.classes.overlapping)
