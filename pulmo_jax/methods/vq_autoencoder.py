"""Anomaly detection by the reconstruction error of a vector-quantised autoencoder (VQ-VAE) of normal patches.

The encoder turns a patch into a grid of latent vectors, each of which is replaced by the nearest vector of a codebook;
the decoder reconstructs the patch from them. The codebook follows the latent vectors by exponential moving averages,
and codes that are hardly used are restarted at latent vectors that the codebook describes badly.

A transformer that models the codes of normal patches is trained in a second run (`methods/tokens.py`); it needs
`encode_codes`, `decode_codes`, `n_codes` and `code_side`.

Departures from the papers: the commitment loss is the mean over the D features of a latent vector instead of the sum,
as in the authors' implementation (Sonnet), so `commitment` is D times the beta of van den Oord et al.; restarted codes
are drawn by their squared distance from the codebook instead of uniformly; and the threshold of a restart falls below
one latent vector per batch if a batch has fewer than 1 / `DEAD_SHARE` latent vectors per code.

Reference:
    van den Oord, Vinyals, Kavukcuoglu 2017, "Neural discrete representation learning", NeurIPS: Eq. 3 (loss, of which
    the codebook term is replaced by moving averages) and Appendix A.1 (moving averages).
    Dhariwal et al. 2020, "Jukebox", Sec. 3: random restarts of codes whose average use is below a threshold.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from pulmo_jax.methods.base import Params
from pulmo_jax.methods.losses import ImageLoss, l1
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
from pulmo_jax.types import ImageStatistic, InputError

DEAD = 1.0  # a code with a lower average use (latent vectors per batch) is restarted,
DEAD_SHARE = 0.1  # if the use is also below this share of the mean use of all codes
SMOOTHING = 1e-5  # epsilon of the Laplace smoothing of the counts


@runtime_checkable
class LatentGrid(Protocol):
    """A model with an encoder to a square grid of latent vectors and a decoder.

    Attributes:
        code_side: Side h of the grid.
        code_features: Number of features D of a latent vector.
    """

    code_side: int
    code_features: int

    def encode(self, x: Float[Array, "B P P C"]) -> Float[Array, "B h h D"]:
        """Encode patches."""
        ...

    def decode(self, z: Float[Array, "B h h D"]) -> Float[Array, "B P P C"]:
        """Decode latent vectors."""
        ...


@dataclass(frozen=True)
class VqAutoencoder:
    """Vector-quantised autoencoder; implements methods.base.Method and TracksStatistics.

    The parameters are {"network", "codes"}; "codes" has the moving averages "counts" (K,) and "sums" (K, D).

    Attributes:
        network: A `LatentGrid` with its initial parameters.
        loss: Function of image= and reconstruction=, both (B, P, P, C), that returns a value per pixel and channel.

    Raises:
        InputError: If the network has no grid of latent vectors.
    """

    network: nnx.Module
    loss: ImageLoss = l1
    n_codes: Annotated[int, Field(ge=2, le=65536, description="number of codes in the codebook")] = 32
    commitment: Annotated[
        float, Field(ge=0, description="weight of the mean squared difference of a latent vector and its code")
    ] = 0.25
    code_decay: Annotated[float, Field(ge=0, lt=1, description="decay of the moving averages of the codebook")] = 0.95
    score: ResidualScore = "local_mean"
    smooth_px: SmoothPx = 4.0
    image_statistic: ImageStatistic = "combined"
    noise_sigma: NoiseSigma = 0.0
    noise_cell_px: NoiseCellPx = 16

    frozen: ClassVar[tuple[str, ...]] = ("codes",)  # changed by `update_statistics` only

    def __post_init__(self) -> None:
        if not isinstance(self.network, LatentGrid):
            name = type(self.network).__name__
            raise InputError(f"model: {name} has no grid of latent vectors to quantise; give model=vq_autoencoder")

    @property
    def code_side(self) -> int:
        """Side of the square grid of codes of a patch."""
        return self._latent_grid.code_side

    @property
    def _latent_grid(self) -> LatentGrid:
        assert isinstance(self.network, LatentGrid)  # checked in __post_init__
        return self.network

    def init(self) -> Params:
        """Copy the initial parameters of the network; all codes are dead, so the first batch initialises them."""
        features = self._latent_grid.code_features
        codes = {"counts": jnp.zeros(self.n_codes), "sums": jnp.zeros((self.n_codes, features))}
        return {"network": initial_params(self.network), "codes": codes}

    def encode_codes(self, params: Params, patches: Float[Array, "B P P C"]) -> Int[Array, "B h h"]:
        """Encode patches as codes.

        Args:
            params: Parameters.
            patches: Patches, normalised intensities.

        Returns:
            Index of the nearest code of each latent vector, in 0 to n_codes - 1.
        """
        return nearest(self._built(params).encode(patches), codebook(params["codes"]))

    def decode_codes(self, params: Params, codes: Int[Array, "B h h"]) -> Float[Array, "B P P C"]:
        """Decode codes.

        Args:
            params: Parameters.
            codes: Index of the code of each cell.

        Returns:
            Patches, normalised intensities.
        """
        return self._built(params).decode(codebook(params["codes"])[codes])

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Encode and decode patches, normalised intensities."""
        return self.decode_codes(params, self.encode_codes(params, patches))

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean reconstruction loss plus the weighted commitment loss; see `loss_and_statistics`."""
        return self.loss_and_statistics(params, batch, key)[0]

    def loss_and_statistics(
        self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Compute the training loss, and the statistics of the batch that update the codebook.

        Args:
            params: Parameters.
            batch: Normal patches, normalised intensities.
            key: Random key for noise and restarts.

        Returns:
            The mean loss, and the statistics for `update_statistics`.

        Reference:
            van den Oord et al. 2017, Eq. 3, without its second term (the codebook follows moving averages).
        """
        noise_key, restart_key = jax.random.split(key)
        noisy = with_coarse_noise(batch, noise_key, self.noise_sigma, self.noise_cell_px)
        network, vectors = self._built(params), codebook(params["codes"])
        z = network.encode(noisy)
        codes = nearest(z, vectors)
        quantised = vectors[codes]
        straight_through = z + jax.lax.stop_gradient(quantised - z)
        reconstruction = self.loss(image=batch, reconstruction=network.decode(straight_through)).mean()
        loss = reconstruction + self.commitment * ((z - quantised) ** 2).mean()
        return loss, statistics(jax.lax.stop_gradient(z), quantised, codes, self.n_codes, restart_key)

    def update_statistics(self, params: Params, seen: dict[str, Any]) -> Params:
        """Update the moving averages of the codebook, and restart codes with an average use below `least_use`.

        Args:
            params: Parameters after the gradient step.
            seen: Statistics of the batch; see `statistics`.

        Returns:
            Parameters with the updated codebook.

        Reference:
            van den Oord et al. 2017, Eqs. 6 and 7; Dhariwal et al. 2020, Sec. 3.
        """
        codes, decay = params["codes"], self.code_decay
        counts = decay * codes["counts"] + (1 - decay) * seen["counts"]
        sums = decay * codes["sums"] + (1 - decay) * seen["sums"]
        least = least_use(seen["counts"])
        dead = counts < least
        restarted = {
            "counts": jnp.where(dead, least, counts),
            "sums": jnp.where(dead[:, None], least * seen["drawn"], sums),
        }
        return {**params, "codes": restarted}

    residual = reconstruction_residual
    score_map = smoothed_score_map

    @property
    def halo_px(self) -> int:
        """Radius of the smoothing kernel, px."""
        return smoothing_radius(self.smooth_px)

    def _built(self, params: Params) -> Any:
        """Network with the given parameters."""
        return with_params(self.network, params["network"])


def least_use(counts: Float[Array, "K"]) -> Float[Array, ""]:
    """Compute the average use below which a code is restarted.

    With an absolute threshold alone, a codebook with more codes than a batch has latent vectors would restart most of
    its codes at every step.

    Args:
        counts: Latent vectors of a batch that are assigned to each code.

    Returns:
        `DEAD`, or `DEAD_SHARE` of the mean use if this is lower; latent vectors per batch.
    """
    return jnp.minimum(DEAD, DEAD_SHARE * counts.sum() / len(counts))


def codebook(codes: Params) -> Float[Array, "K D"]:
    """Compute the vectors of the codes from their moving averages.

    Args:
        codes: "counts" (K,) and "sums" (K, D).

    Returns:
        Code vectors: sums divided by Laplace-smoothed counts.

    Reference:
        van den Oord et al. 2017, Eq. 8; the smoothing is that of the authors' implementation (Sonnet).
    """
    counts = codes["counts"]
    total = counts.sum()
    smoothed = (counts + SMOOTHING) / (total + len(counts) * SMOOTHING) * total
    return codes["sums"] / jnp.maximum(smoothed, SMOOTHING)[:, None]


def nearest(z: Float[Array, "*B D"], vectors: Float[Array, "K D"]) -> Int[Array, "*B"]:
    """Find the nearest code vector of each latent vector; of equally near ones the first.

    Args:
        z: Latent vectors.
        vectors: Code vectors.

    Returns:
        Indices of the codes.
    """
    # |z|^2 is the same for all codes. The rest is a small difference of large numbers: TF32 of GPUs is too coarse.
    products = jnp.matmul(z, vectors.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin((vectors**2).sum(-1) - 2 * products, axis=-1)


def statistics(
    z: Float[Array, "*B D"],
    quantised: Float[Array, "*B D"],
    codes: Int[Array, "*B"],
    n_codes: int,
    key: Key[Array, ""],
) -> dict[str, Any]:
    """Compute the statistics of the latent vectors of a batch, by which the codebook is updated.

    Args:
        z: Latent vectors.
        quantised: Code vector of each.
        codes: Index of the code of each.
        n_codes: Number K of codes.
        key: Random key of the drawn vectors.

    Returns:
        "counts" (K,) and "sums" (K, D) of the latent vectors of each code; "drawn" (K, D), for the codes to be
        restarted: latent vectors drawn at random with replacement, with a probability proportional to the squared
        distance from their code; "metrics" for the log.

    Reference:
        Arthur and Vassilvitskii 2007, "k-means++", SODA: sampling by the squared distance. Drawn uniformly, most
        vectors would come from the background, which one code describes.
    """
    rows = z.reshape(-1, z.shape[-1])
    chosen = jax.nn.one_hot(codes.reshape(-1), n_codes, dtype=rows.dtype)  # a product is faster than a scatter
    counts = chosen.sum(0)
    upto = jnp.cumsum(((z - quantised) ** 2).sum(-1).reshape(-1))
    places = jnp.searchsorted(upto, jax.random.uniform(key, (n_codes,)) * upto[-1])
    return {
        "counts": counts,
        "sums": jnp.matmul(chosen.T, rows, precision=jax.lax.Precision.HIGHEST),
        "drawn": rows[jnp.minimum(places, len(rows) - 1)],
        "metrics": {"perplexity": perplexity(counts), "used_codes": (counts > 0).sum()},
    }


def perplexity(counts: Float[Array, "K"]) -> Float[Array, ""]:
    """Effective number of codes in use: the exponential of the entropy of their frequencies.

    Args:
        counts: Use of each code.

    Returns:
        The perplexity, from 1 to K.
    """
    shares = counts / jnp.maximum(counts.sum(), SMOOTHING)
    return jnp.exp(-jax.scipy.special.xlogy(shares, shares).sum())
