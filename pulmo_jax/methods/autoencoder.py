"""Anomaly detection by the reconstruction error of an autoencoder trained on normal patches.

With `noise_sigma` above 0 it is a denoising autoencoder (Kascenas, Pugeault, O'Neil 2022, "Denoising autoencoders for
unsupervised anomaly detection in brain MRI", MIDL): it learns to remove coarse noise added to the input, and thereby
blobs that are absent from normal images. Its network is a U-Net (models.image_unet); with that of
models.autoencoder, it has a bottleneck instead. Departures from the paper: noise over the whole patch, on a fixed
lattice with a node spacing of `noise_cell_px` (the paper: 16 nodes per side) and a standard deviation of `noise_sigma`
at the nodes (less between them); and by default a score that smooths the signed residual before squaring it. The score
of the paper is `score` = l1 without smoothing, in a foreground that is eroded by `erode_px`, then a median filter of
`median_px` = 5.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field

from pulmo_jax.methods.base import Params
from pulmo_jax.methods.losses import ImageLoss, l2
from pulmo_jax.methods.networks import initial_params, with_params
from pulmo_jax.methods.reconstruction import (
    NoiseCellPx,
    NoiseSigma,
    ResidualScore,
    SmoothPx,
    reconstruction_residual,
    smoothed_score_map,
    with_coarse_noise,
)
from pulmo_jax.methods.score_maps import Extent, eroded, median_filtered, smoothing_radius
from pulmo_jax.types import ImageStatistic


@dataclass(frozen=True)
class Autoencoder:
    """Autoencoder with its training loss and score; implements methods.base.Method.

    Attributes:
        network: Model with its initial parameters; maps (B, P, P, C) to the same shape.
        loss: Function of image= and reconstruction=, both (B, P, P, C), that returns a value per pixel and channel.
    """

    network: nnx.Module
    loss: ImageLoss = l2
    score: ResidualScore = "local_mean"
    smooth_px: SmoothPx = 4.0
    image_statistic: ImageStatistic = "combined"
    noise_sigma: NoiseSigma = 0.2
    noise_cell_px: NoiseCellPx = 16
    erode_px: Annotated[
        int,
        Field(ge=1, le=99, description="side of the square that erodes the foreground, px; scores are 0 outside it"),
    ] = 1
    median_px: Annotated[
        Literal[1, 3, 5, 7], Field(description="side of the median filter of the score, px; 1: without")
    ] = 1

    def init(self) -> Params:
        """Copy the initial parameters of the network."""
        return initial_params(self.network)

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Apply the autoencoder to patches, normalised intensities."""
        return with_params(self.network, params)(patches)

    def feature_maps(self, params: Params, patches: Float[Array, "B P P C"]) -> list[Float[Array, "B _ _ _"]]:
        """Compute the feature maps of the network, which must have them."""
        return with_params(self.network, params).feature_maps(patches)

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean reconstruction loss of patches with added coarse noise."""
        noisy = with_coarse_noise(batch, key, self.noise_sigma, self.noise_cell_px)
        reconstruction = self.reconstruct(params, noisy)
        return self.loss(image=batch, reconstruction=reconstruction).mean()

    residual = reconstruction_residual

    @property
    def halo_px(self) -> int:
        """Radius of the smoothing kernel or of the erosion, and of the median filter, px."""
        return max(smoothing_radius(self.smooth_px), self.erode_px // 2) + self.median_px // 2

    def score_map(
        self, residual: Float[Array, "H W C"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Compute the selected score; see `methods.base.Method.score_map`."""
        scores = smoothed_score_map(self, residual, foreground, extent)
        if self.erode_px == self.median_px == 1:
            return scores
        scores = jnp.where(eroded(foreground, self.erode_px, extent), scores, 0)
        filtered: Array = median_filtered(scores, self.median_px, extent)
        return jnp.where(foreground, filtered, jnp.nan)
