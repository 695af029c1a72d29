"""Variational autoencoder of normal patches (Kingma and Welling 2014, "Auto-encoding variational Bayes", ICLR).

The encoder returns mean m and log variance s of a Gaussian for each latent number; training decodes a draw from it.
The loss is the reconstruction loss, averaged over pixels and channels, plus `kl_weight` times the Kullback-Leibler
divergence from the standard normal distribution, averaged over latent numbers. For squared differences of N values and
D latent numbers this is the negative evidence lower bound, times a constant, for pixel noise of variance
`kl_weight` N / (2 D); directions in which normal patches vary less than that are not encoded.

Departures from the paper: s is bounded smoothly to +-`LOG_VARIANCE_BOUND`; with `noise_sigma` above 0 the network
learns to remove coarse noise, as in `methods.autoencoder`. Scores use the reconstruction from the latent mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
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
from pulmo_jax.methods.score_maps import smoothing_radius
from pulmo_jax.types import ImageStatistic

LOG_VARIANCE_BOUND = 10.0


class Latent(Protocol):
    """Network with an encoder and a decoder, such as `models.autoencoder.ConvAutoencoder` with moments=2.

    Attributes:
        latent_shape: Shape of the latent array of one patch.
    """

    latent_shape: tuple[int, ...]

    def encode_moments(self, x: Float[Array, "B P P C"]) -> Float[Array, "2 B *D"]:
        """Encode patches to mean and log variance of each latent number."""
        ...

    def decode(self, z: Float[Array, "B *D"]) -> Float[Array, "B P P C"]:
        """Decode latent arrays."""
        ...


@dataclass(frozen=True)
class VariationalAutoencoder:
    """Variational autoencoder; implements methods.base.Method and Generative.

    Attributes:
        network: Model with its initial parameters, with the functions of `Latent`.
        loss: Function of image= and reconstruction=, both (B, P, P, C), that returns a value per pixel and channel.
    """

    NETWORK: ClassVar[Mapping[str, int]] = {"moments": 2}

    network: Any
    loss: ImageLoss = l2
    kl_weight: Annotated[
        float,
        Field(
            ge=0,
            description="weight of the mean KL divergence per latent number, relative to the mean loss per pixel",
        ),
    ] = 0.0005
    score: ResidualScore = "local_mean"
    smooth_px: SmoothPx = 4.0
    image_statistic: ImageStatistic = "combined"
    noise_sigma: NoiseSigma = 0.2
    noise_cell_px: NoiseCellPx = 16

    def init(self) -> Params:
        """Copy the initial parameters of the network."""
        return initial_params(self.network)

    def posterior(
        self, params: Params, patches: Float[Array, "B P P C"]
    ) -> tuple[Float[Array, "B *D"], Float[Array, "B *D"]]:
        """Compute mean and log variance of the latent numbers.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            Mean and log variance.
        """
        mean, s = with_params(self.network, params).encode_moments(patches)
        return mean, LOG_VARIANCE_BOUND * jnp.tanh(s / LOG_VARIANCE_BOUND)

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Decode the mean of the latent numbers, normalised intensities."""
        network = with_params(self.network, params)
        return network.decode(network.encode_moments(patches)[0])

    def feature_maps(self, params: Params, patches: Float[Array, "B P P C"]) -> list[Float[Array, "B _ _ _"]]:
        """Compute the feature maps of the encoder, finest first."""
        return with_params(self.network, params).feature_maps(patches)

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean loss of patches with added coarse noise, decoded from a draw of the latent numbers."""
        noise, draw = jax.random.split(key)
        noisy = with_coarse_noise(batch, noise, self.noise_sigma, self.noise_cell_px)
        mean, s = self.posterior(params, noisy)
        z = mean + jnp.exp(s / 2) * jax.random.normal(draw, mean.shape)
        reconstruction = with_params(self.network, params).decode(z)
        return (
            self.loss(image=batch, reconstruction=reconstruction).mean() + self.kl_weight * divergence(mean, s).mean()
        )

    def sample(self, params: Params, key: Key[Array, ""], count: int) -> Float[Array, "N P P C"]:
        """Decode draws from the standard normal distribution; see `methods.base.Generative`."""
        z = jax.random.normal(key, (count, *self.network.latent_shape))
        return with_params(self.network, params).decode(z)

    @property
    def sampling_calls(self) -> int:
        """One evaluation of the decoder."""
        return 1

    residual = reconstruction_residual
    score_map = smoothed_score_map

    @property
    def halo_px(self) -> int:
        """Radius of the smoothing kernel, px."""
        return smoothing_radius(self.smooth_px)


def divergence(mean: Float[Array, "*D"], log_variance: Float[Array, "*D"]) -> Float[Array, "*D"]:
    """Compute the Kullback-Leibler divergence of Gaussians from the standard normal distribution, nats.

    Args:
        mean: Means.
        log_variance: Logarithms of the variances.

    Returns:
        One value per Gaussian.

    Reference:
        Kingma and Welling 2014, Appendix B.
    """
    return (jnp.exp(log_variance) + mean**2 - 1 - log_variance) / 2
