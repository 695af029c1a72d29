"""Parts of the methods that reconstruct normal patches: config fields, training noise, residual and score map.

A method class takes over a function by assignment, such as `residual = reconstruction_residual`.
"""

from typing import Annotated, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field

from pulmo_jax.methods.base import Params
from pulmo_jax.methods.losses import ImageLoss, l1, l2, ms_ssim, ssim
from pulmo_jax.methods.score_maps import Extent, smooth_within

Score = Literal["local_mean", "l2", "l1", "ssim", "ms_ssim"]
# Per pixel and channel; for local_mean the signed difference, which `smoothed_score` smooths and squares.
RESIDUALS: dict[Score, ImageLoss] = {
    "local_mean": jnp.subtract,
    "l2": l2,
    "l1": l1,
    "ssim": ssim,
    "ms_ssim": ms_ssim,
}

ResidualScore = Annotated[
    Score,
    Field(
        description="l2, l1, ssim, ms_ssim: the smoothed squared, absolute, SSIM or multi-scale SSIM residual; "
        "local_mean: the square of the smoothed signed residual"
    ),
]
SmoothPx = Annotated[float, Field(ge=0, le=100, description="sigma of the Gaussian smoothing of the score, px")]
NoiseSigma = Annotated[
    float, Field(ge=0, description="standard deviation of the coarse training noise to remove; 0: none")
]
NoiseCellPx = Annotated[int, Field(ge=1, description="cell size of the training noise, px")]


@runtime_checkable
class Reconstructing(Protocol):
    """A method that takes over functions of this module."""

    @property
    def score(self) -> Score:
        """Kind of the residual."""
        ...

    @property
    def smooth_px(self) -> float:
        """Standard deviation of the Gaussian smoothing of the score, px."""
        ...

    def reconstruct(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P C"]:
        """Estimate the normal version of each patch."""
        ...


def reconstruction_residual(
    self: Reconstructing, params: Params, patches: Float[Array, "B P P C"]
) -> Float[Array, "B P P C"]:
    """Compute the residual of the selected score per pixel and channel; see `methods.base.Method.residual`."""
    return RESIDUALS[self.score](patches, self.reconstruct(params, patches))


def smoothed_score_map(
    self: Reconstructing,
    residual: Float[Array, "H W C"],
    foreground: Bool[Array, "H W"],
    extent: Extent | None = None,
) -> Float[Array, "H W"]:
    """Compute the selected score; see `methods.base.Method.score_map`."""
    return smoothed_score(residual, foreground, self.score, self.smooth_px, extent)


def smoothed_score(
    residual: Float[Array, "H W C"],
    foreground: Bool[Array, "H W"],
    score: Score,
    smooth_px: float,
    extent: Extent | None = None,
) -> Float[Array, "H W"]:
    """Smooth a residual within the foreground and average it over channels; see `methods.base.Method.score_map`.

    Args:
        residual: Residual of `RESIDUALS`.
        foreground: Pixels to be scored.
        score: Kind of the residual; a local mean is squared after smoothing.
        smooth_px: Standard deviation of the Gaussian, px.
        extent: Position of the image in the arrays. Default: the arrays hold exactly one image.

    Returns:
        Score, NaN outside the foreground.
    """
    smooth = smooth_within(residual, foreground, smooth_px, extent)
    values: Array = (smooth**2 if score == "local_mean" else smooth).mean(-1)
    return jnp.where(foreground, values, jnp.nan)


def with_coarse_noise(
    batch: Float[Array, "B P P C"], key: Key[Array, ""], sigma: float, cell_px: int
) -> Float[Array, "B P P C"]:
    """Add coarse noise to patches.

    Args:
        batch: Patches, normalised intensities.
        key: Random key.
        sigma: Standard deviation of the noise at the nodes of its grid, normalised intensity; 0: none.
        cell_px: Cell size of the grid, px.

    Returns:
        Noisy patches.
    """
    return batch + sigma * coarse_noise(key, batch.shape, cell_px) if sigma else batch


def coarse_noise(key: Key[Array, ""], shape: tuple[int, ...], cell_px: int) -> Float[Array, "B H W C"]:
    """Draw coarse noise: unit Gaussian noise on a grid, upsampled bilinearly.

    Args:
        key: Random key.
        shape: Output shape (B, H, W, C).
        cell_px: Cell size of the grid, px.

    Returns:
        The noise.

    Reference:
        Kascenas et al. 2022, Sec. 3.
    """
    batch, height, width, channels = shape
    grid = (batch, -(-height // cell_px), -(-width // cell_px), channels)
    return jax.image.resize(jax.random.normal(key, grid), shape, "linear")
