"""Gaussian model of normal patches: one mean and covariance per location, or pooled over all locations.

This is the noise model of PACO (Flasseur et al. 2018, A&A 618, A138) for ordinary images. For an anomaly of unknown
shape the score is the Mahalanobis distance: on pixels this is the RX detector (Reed & Yu 1990, IEEE TASSP 38:1760), on
network features per location PaDiM (Defard et al. 2021, ICPR). For a known shape it is the matched filter, b / sqrt(a).

The fit needs no gradient descent: one pass over the normal images accumulates sample count, mean and co-moments, which
can be merged across machines. Departures from PaDiM: analytic shrinkage of the covariance instead of a ridge of 0.01,
a factorisation instead of an inverse, and a network trained on the same images.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field

from pulmo_jax.core import covariance, likelihood, patches
from pulmo_jax.core.covariance import Moments
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.score_maps import Extent
from pulmo_jax.methods.windows import OfWindows, exact_products, spread
from pulmo_jax.types import InputError

Score = Literal["mahalanobis", "matched"]
Polarity = Literal["both", "bright", "dark"]
ShrinkageName = Literal["paco", "oas", "fixed"]  # estimators that need only the covariance and the sample count
LOCATIONS_AT_ONCE = 64
SIGNED = {"both": jnp.abs, "bright": jnp.positive, "dark": jnp.negative}  # detection statistic from the SNR


class Gaussian(NamedTuple):
    """Fitted Gaussian of one location or of N, in normalised units.

    Attributes:
        n: Number of samples.
        mean: Mean.
        whitener: L^-1 for the shrunk covariance L L'.
        log_determinant: Logarithm of the determinant of L L'.
        shrinkage: Shrinkage weight rho of the diagonal.
        singular: Whether the covariance was not positive definite and its diagonal was used.
    """

    n: Float[Array, "*N"]
    mean: Float[Array, "*N D"]
    whitener: Float[Array, "*N D D"]
    log_determinant: Float[Array, "*N"]
    shrinkage: Float[Array, "*N"]
    singular: Bool[Array, "*N"]


@dataclass(frozen=True)
class PatchGaussian(OfWindows):
    """Gaussian model of pixels, features or residuals; implements methods.base.Method, Accumulated, Detailed.

    See `OfWindows` for the vectors.
    """

    stride_px: Annotated[
        int | None,
        Field(ge=1, description="spacing of the windows, px of the feature maps; null: 4, or 1 with score=matched"),
    ] = None
    smooth_px: Annotated[
        float | None,
        Field(ge=0, le=100, description="sigma of the smoothing of the score, px; null: 2, or 0 with score=matched"),
    ] = None
    merge_runs: Annotated[
        tuple[str, ...], Field(description="finished runs of the same method whose statistics are merged into this one")
    ] = ()
    shrinkage: Annotated[ShrinkageName, Field(description="estimator of the weight of the diagonal (shrinkage)")] = (
        "paco"
    )
    rho: Annotated[float | None, Field(ge=0, le=1, description="weight of the diagonal for shrinkage=fixed")] = None
    floor: Annotated[
        float, Field(gt=0, le=1, description="minimum sd of a dimension relative to the mean sd, for constant regions")
    ] = 0.01
    score: Annotated[
        Score, Field(description="mahalanobis: squared distance per dimension; matched: SNR of Gaussian blobs")
    ] = "mahalanobis"
    blob_sigmas_px: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...],
        Field(min_length=1, max_length=32, description="sigmas of the blobs for score=matched, px"),
    ] = (1.0, 1.5, 2.0)
    polarity: Annotated[Polarity, Field(description="detect bright blobs, dark blobs, or both")] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.shrinkage == "fixed") != (self.rho is not None):
            raise InputError(
                f"method.rho={self.rho} with method.shrinkage={self.shrinkage}: fixed needs a rho, others none"
            )
        if self.score == "matched" and self.cell_px > 1:
            raise InputError("method.score=matched needs pixels or a residual, not features")
        if self.score == "matched" and max(self.blob_sigmas_px) > self.window_px / 3:
            raise InputError(
                f"method.blob_sigmas_px={list(self.blob_sigmas_px)}: a blob must fit into its window of "
                f"{self.window_px} px, sigma at most a third of it"
            )

    @property
    def stride(self) -> int:
        """Spacing of the windows, px of the maps; default 1 for a matched filter, which tests every position."""
        return self.stride_px or (1 if self.score == "matched" else 4)

    @property
    def smoothing(self) -> float:
        """Sigma of the score smoothing, px; 0 by default for a matched filter, since smoothing lowers the peak SNR."""
        return (0.0 if self.score == "matched" else 2.0) if self.smooth_px is None else self.smooth_px

    def init(self) -> Params:
        """Return the parameters of network and base, and empty moments."""
        shape = (self.rows**2,) if self.locations == "each" else ()
        d = self.dimensions
        empty = Moments(jnp.zeros(shape), jnp.zeros((*shape, d)), jnp.zeros((*shape, d, d)))
        return {**self._start(), "moments": empty}

    @exact_products
    def update(self, params: Params, batch: Float[Array, "B P P C"], inside: Bool[Array, "B P P"]) -> Params:
        """Add the windows of a batch that lie completely in the foreground to the moments."""
        x = self.vectors(params, batch)
        d, weights = x.shape[-1], self.whole(inside).astype(x.dtype)
        if self.locations == "pooled":
            moments = covariance.merge(params["moments"], covariance.moments(x.reshape(-1, d), weights.ravel()))
        else:
            by_place = jnp.moveaxis(x.reshape(len(x), -1, d), 0, 1), weights.reshape(len(x), -1).T
            at_once = self.memory_mb * 2**20 // (3 * x.dtype.itemsize * d * (d + len(x)))
            moments = covariance.add_samples(params["moments"], *by_place, at_once)
        return {**params, "moments": moments}

    @exact_products
    def finish(self, params: Params) -> Params:
        """Compute the Gaussians from the accumulated moments."""
        moments: Moments = params["moments"]
        floor = self.floor**2 * variances(moments).mean()
        if self.locations == "pooled":
            gaussian = self._fit(moments, floor)
        else:
            gaussian = jax.lax.map(lambda one: self._fit(one, floor), moments, batch_size=LOCATIONS_AT_ONCE)
        return {**{name: part for name, part in params.items() if name != "moments"}, "gaussian": gaussian}

    def caveats(self, params: Params) -> tuple[str, ...]:
        """Describe limitations of the fit, from its moments. Raises InputError without windows or without variation."""
        moments: Moments = params["moments"]
        if not float(moments.n.max()):
            raise InputError(
                f"no window of {self.window_side} px lies completely in the foreground; give a smaller method.window_px"
            )
        if not float(variances(moments).max()):
            raise InputError("the training images are constant: there is no normal variation to model")
        least, d = int(moments.n.min()), self.dimensions
        where = "" if self.locations == "pooled" else " at some locations"
        if least >= 2 * d:
            return ()
        return (
            f"{least} windows{where} for a covariance of {d} dimensions: shrinkage dominates; give more images, "
            "or a smaller method.window_px or method.n_features",
        )

    def _fit(self, moments: Moments, floor: Float[Array, ""]) -> Gaussian:
        s = covariance.covariance(moments._replace(n=jnp.maximum(moments.n, 1)))
        s = s + jnp.diag(jnp.maximum(floor - jnp.diag(s), 0))
        rho = covariance.shrinkage_factor(self.shrinkage, self.rho)(s, s[:0], moments.n)
        lower, singular = covariance.factorise(covariance.shrink(s, rho), jnp.diag(s) > 0)
        whitener = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(s), dtype=s.dtype), lower=True)
        log_determinant = 2 * jnp.log(jnp.diag(lower)).sum()
        return Gaussian(moments.n, moments.mean, whitener, log_determinant, rho, singular)

    def train_loss(self, params: Params, batch: Float[Array, "B P P C"], key: Key[Array, ""]) -> Float[Array, ""]:
        """Compute the mean negative log-likelihood of the windows, nats per dimension."""
        gaussian, d = params["gaussian"], self.dimensions
        distance = self.distances(params, batch)
        log_determinant = jnp.broadcast_to(gaussian.log_determinant.reshape(-1), (self.rows**2,))
        return 0.5 * (distance.mean() + log_determinant.mean()) / d + 0.5 * jnp.log(2 * jnp.pi)

    def distances(self, params: Params, x: Float[Array, "B P P C"]) -> Float[Array, "B R S"]:
        """Compute squared Mahalanobis distances of all windows; chi-squared with D degrees of freedom if Gaussian."""
        return (self.whitened(params, x) ** 2).sum(-1)

    @exact_products
    def whitened(self, params: Params, x: Float[Array, "B P P C"]) -> Float[Array, "B R S D"]:
        """Compute whitened deviations L^-1 (v - mean) of all windows."""
        gaussian, v = params["gaussian"], self.vectors(params, x)
        if self.locations == "pooled":
            return (v - gaussian.mean) @ gaussian.whitener.T
        batch, *grid, d = v.shape
        deviations = v.reshape(batch, -1, d) - gaussian.mean
        return jnp.einsum("bnd,ned->bne", deviations, gaussian.whitener).reshape(batch, *grid, d)

    def residual(self, params: Params, patches: Float[Array, "B P P C"]) -> Float[Array, "B P P M"]:
        """Compute the squared distance per dimension, about 1 in normal regions, or SNR and amplitude of each blob."""
        if self.score == "matched":
            return self.to_pixels(jnp.concatenate(self.blob_terms(params, patches), axis=-1))
        return self.to_pixels(self.distances(params, patches)[..., None] / self.dimensions)

    @exact_products
    def blob_terms(
        self, params: Params, x: Float[Array, "B P P C"]
    ) -> tuple[Float[Array, "B R S J"], Float[Array, "B R S J"]]:
        """Compute SNR b / sqrt(a) and amplitude b / a (normalised units) of J blobs at every window."""
        gaussian, v = params["gaussian"], self.vectors(params, x)
        templates = jnp.asarray(blobs(self.window_px, self.blob_sigmas_px, len(self.chosen)), v.dtype)
        whitened = jnp.einsum("...ed,jd->...je", gaussian.whitener, templates)  # L^-1 h
        weights = jnp.einsum("...ed,...je->...jd", gaussian.whitener, whitened)  # C^-1 h
        grid = () if self.locations == "pooled" else v.shape[1:3]
        mean, a, weights = (part.reshape(*grid, *part.shape[part.ndim - kept :]) for part, kept in (
            (gaussian.mean, 1), ((whitened**2).sum(-1), 1), (weights, 2)))  # fmt: skip
        b = jnp.einsum("...d,...jd->...j", v - mean, weights)
        a = jnp.broadcast_to(a, b.shape)
        return likelihood.snr(a, b), likelihood.flux(a, b)

    @property
    def detail_names(self) -> tuple[str, ...]:
        return ("amplitude", "blob_sigma") if self.score == "matched" else ()

    def detail_maps(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W K"]:
        """Map amplitude (normalised units) and sigma (px) of the blob with the largest SNR under the polarity."""
        if self.score != "matched":
            return residual[..., :0]
        snr, amplitude = jnp.split(residual, 2, axis=-1)
        best = jnp.argmax(SIGNED[self.polarity](snr), axis=-1)
        height = jnp.take_along_axis(amplitude, best[..., None], axis=-1)[..., 0]
        sigma = jnp.asarray(self.blob_sigmas_px, snr.dtype)[best]
        return jnp.stack([height, sigma], axis=-1)

    def to_pixels(self, at_windows: Float[Array, "B R S M"]) -> Float[Array, "B P P M"]:
        """Interpolate window values to pixels; a matched filter takes the nearest window, which preserves peaks."""
        if self.score != "matched":
            return super().to_pixels(at_windows)
        size, along_side = self.network.patch_size, (self.rows, self.window_side, self.stride * self.cell_px)
        return spread(jnp.asarray(patches.nearest_weights(*along_side, size), at_windows.dtype), at_windows)

    def score_map(
        self, residual: Float[Array, "H W M"], foreground: Bool[Array, "H W"], extent: Extent | None = None
    ) -> Float[Array, "H W"]:
        """Smooth the score over complete windows; windows on the foreground edge matter only where none is near."""
        score = residual[..., 0]
        if self.score == "matched":
            score = SIGNED[self.polarity](residual[..., : len(self.blob_sigmas_px)]).max(axis=-1)
        return self.smoothed(score, foreground, extent)


def variances(moments: Moments) -> Float[Array, "*N D"]:
    """Compute the population variance (1/n) of every dimension."""
    return jnp.diagonal(moments.comoment, axis1=-2, axis2=-1) / jnp.maximum(moments.n, 1)[..., None]


def blobs(side: int, sigmas_px: tuple[float, ...], channels: int) -> Float[np.ndarray, "J D"]:
    """Render J Gaussian blobs of height 1 at the central pixel of a window, identical in all channels."""
    distance = np.arange(side) - side // 2
    radius_squared = distance[:, None] ** 2 + distance**2
    shapes = [np.exp(-radius_squared / (2 * sigma**2)) for sigma in sigmas_px]
    return np.stack([np.repeat(shape[..., None], channels, axis=-1).ravel() for shape in shapes])


def merged(a: Params, b: Params) -> Params:
    """Merge the moments of two runs on different images with the same network."""
    join = covariance.merge if a["moments"].n.ndim == 0 else jax.vmap(covariance.merge)
    return {**a, "moments": join(a["moments"], b["moments"])}
