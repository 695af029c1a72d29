"""Autoencoder that predicts the standard deviation of its own error at every pixel (AE-U).

The network returns a mean and a log variance s for each pixel and channel. Training minimises the negative
log-likelihood of a Gaussian, exp(-s) r^2 + s for a residual r. Edges and vessels, whose exact position cannot be
predicted, get a large variance and no longer dominate the score (Mao, Xue, Wang, Li, Yang, Zhang 2020, "Abnormality
detection in chest X-ray images using uncertainty prediction autoencoders", MICCAI).

Departures from the paper: the variance is exp(s) + `least_sd`^2, which bounds the loss from below and keeps its
gradient finite for every s; residual and variance are blended over tiles before one is divided by the other; with
`noise_sigma` above 0 the network learns to remove coarse noise, as in `methods.autoencoder`. By default the score
smooths the signed residual before squaring it, and divides by the predicted standard deviation to the power of
`whitening` = 0.5: the network predicts a large deviation for strong anomalies too, which full whitening hides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field

from pulmo_jax.methods.base import Params
from pulmo_jax.methods.networks import initial_params, with_params
from pulmo_jax.methods.reconstruction import (
    NoiseCellPx,
    NoiseSigma,
    SmoothPx,
    smoothed_score,
    with_coarse_noise,
)
from pulmo_jax.methods.score_maps import Extent, smoothing_radius
from pulmo_jax.types import ImageStatistic

Score = Literal["local_mean", "l2"]


@dataclass(frozen=True)
class UncertainAutoencoder:
    """Autoencoder with a predicted variance; implements methods.base.Method and Detailed.

    Attributes:
        network: Model with its initial parameters; maps (B, P, P, C) to (B, P, P, 2 C), means before log variances.
    """

    NETWORK: ClassVar[Mapping[str, int]] = {"outputs": 2}

    network: nnx.Module
    score: Annotated[
        Score,
        Field(
            description="l2: the smoothed squared residual; local_mean: the square of the smoothed signed residual; "
            "both divided by the predicted deviation before smoothing"
        ),
    ] = "local_mean"
    whitening: Annotated[
        float,
        Field(ge=0, le=1, description="power of the predicted standard deviation that divides the residual; 1: whole"),
    ] = 0.5
    smooth_px: SmoothPx = 4.0
    image_statistic: ImageStatistic = "combined"
    noise_sigma: NoiseSigma = 0.2
    noise_cell_px: NoiseCellPx = 16
    least_sd: Annotated[
        float, Field(gt=0, description="lower bound of the predicted standard deviation, normalised intensity")
    ] = 0.01

    def init(self) -> Params:
        """Copy the initial parameters of the network."""
        return initial_params(self.network)

    def predict(
        self, params: Params, patches: Float[Array, "B P P C"]
    ) -> tuple[Float[Array, "B P P C"], Float[Array, "B P P C"]]:
        """Predict mean and log variance of every pixel.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            Mean, and logarithm of the variance exp(s) + least_sd^2.
        """
        mean, s = jnp.split(with_params(self.network, params)(patches), 2, axis=-1)
        return mean, jnp.logaddexp(s, 2 * jnp.log(self.least_sd))

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Predict the mean of every pixel, normalised intensities."""
        return self.predict(params, patches)[0]

    def feature_maps(self, params: Params, patches: Float[Array, "B P P C"]) -> list[Float[Array, "B _ _ _"]]:
        """Compute the feature maps of the encoder, finest first."""
        return with_params(self.network, params).feature_maps(patches)

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean negative log-likelihood of patches with added coarse noise, without its constant."""
        noisy = with_coarse_noise(batch, key, self.noise_sigma, self.noise_cell_px)
        mean, s = self.predict(params, noisy)
        return (jnp.exp(-s) * (batch - mean) ** 2 + s).mean()  # Mao et al. 2020, Eq. 2, per pixel

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the signed residuals of all channels, then their predicted variances."""
        mean, s = self.predict(params, patches)
        return jnp.concatenate([patches - mean, jnp.exp(s)], axis=-1)

    @property
    def halo_px(self) -> int:
        """Radius of the smoothing kernel, px."""
        return smoothing_radius(self.smooth_px)

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Divide by the predicted deviation and smooth; see `methods.base.Method.score_map`."""
        difference, variance = jnp.split(residual, 2, axis=-1)
        variance = jnp.maximum(variance, self.least_sd**2)  # values outside the image are arbitrary
        whitened = difference / variance ** (self.whitening / 2)
        values = whitened if self.score == "local_mean" else whitened**2
        return smoothed_score(values, foreground, self.score, self.smooth_px, extent)

    @property
    def detail_names(self) -> tuple[str, ...]:
        """Name of the map of predicted standard deviations."""
        return ("predicted_sd",)

    def detail_maps(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W 1"]:
        """Compute the predicted standard deviation: root of the mean variance of the channels, normalised intensity."""
        return jnp.sqrt(jnp.split(residual, 2, axis=-1)[1].mean(-1, keepdims=True))
