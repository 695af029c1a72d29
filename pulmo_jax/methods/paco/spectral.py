"""Spectral combination: flux and SNR of a source with a given spectrum, in noise correlated between channels.

Flasseur, Denis, Thiébaut, Langlois 2020 (A&A 637, A9), "F20". Each channel l gives the likelihood terms a_l and b_l of
a source at a position. The normalised values s_l = b_l / sqrt(a_l) have unit variance and the spectral correlation R; a
source of flux f and spectrum g adds f u_l, u_l = sqrt(a_l) g_l. Generalised least squares gives

    a = u' R^-1 u,   b = u' R^-1 s,   flux = b / a,   SNR = b / sqrt(a),

computed from whitened values L^-1 u and L^-1 s with R = L L' (Cholesky). With one channel this reduces to a_1 and b_1.

R depends on the separation r: speckles move outward with the wavelength, so a speckle correlates two channels at a
position only where r |lambda - lambda'| / lambda is less than its width. A single R for the whole field would
underestimate the correlation close to the star and overestimate the SNR there. R is therefore measured in annuli.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import solve_triangular
from scipy.stats import chi2

from pulmo_jax.core import covariance
from pulmo_jax.methods.paco.maps import LikelihoodMaps
from pulmo_jax.types import InputError

CLIP = 3.0  # clipping threshold of the initial estimate of R, robust standard deviations
KEPT_SHARE = 0.975  # fraction of normal values, by Mahalanobis distance, that the refined estimates retain
ROUNDS = 3  # number of refinements
TIE = 1e-9  # minimum difference in SNR: with a single remaining channel all spectra tie, and the first one is chosen
MIN_INDEPENDENT = 50  # minimum number of independent values per annulus
PER_CHANNEL = 5  # minimum number of independent values per annulus and channel
MAD_TO_STD = 1.4826
LEAST_SHRINKAGE = 1e-3  # keeps R positive definite for identical channels


class Combination(NamedTuple):
    """Noise correlation and candidate spectra for the combination of channels.

    Attributes:
        separation_px: Separations from the star at which R is known, px.
        correlation: R at these separations, positive definite; interpolated linearly, constant outside their range.
        spectra: M candidate spectra, each of mean 1.
        spread_px: Separations from the star at which `spread` is known, px.
        spread: Standard deviation of the null SNR of each spectrum relative to that of the first one, by which its SNR
            is divided; None for 1.
    """

    separation_px: Float[np.ndarray, "K"]
    correlation: Float[np.ndarray, "K L L"]
    spectra: Float[np.ndarray, "M L"]
    spread_px: Float[np.ndarray, "J"] | None = None
    spread: Float[np.ndarray, "M J"] | None = None

    def at(self, separation_px: float) -> Float[np.ndarray, "L L"]:
        """Interpolate R at a separation, px; a weighted mean of positive definite matrices is positive definite."""
        place = np.interp(separation_px, self.separation_px, np.arange(len(self.separation_px)))
        low = int(place)
        high, share = min(low + 1, len(self.correlation) - 1), place - low
        return (1 - share) * self.correlation[low] + share * self.correlation[high]

    def spread_at(self, separation_px: float) -> Float[np.ndarray, "M"]:
        """Interpolate the relative spread of every spectrum at a separation, px."""
        if self.spread is None or self.spread_px is None:
            return np.ones(len(self.spectra))
        return np.array([np.interp(separation_px, self.spread_px, row) for row in self.spread])

    def only(self, template: int) -> "Combination":
        """Return a copy with the spectrum of index `template` only."""
        one = slice(template, template + 1)
        return self._replace(spectra=self.spectra[one], spread=None if self.spread is None else self.spread[one])


def independent(spectra: Float[np.ndarray, "M L"]) -> Combination:
    """Return the combination of channels with independent noise (R = I)."""
    return Combination(np.zeros(1), np.eye(spectra.shape[1])[None], spectra)


class Combined(NamedTuple):
    """Likelihood terms of the combined channels.

    Attributes:
        a: Term a of the spectrum with the highest SNR; NaN where no channel has a value.
        b: Term b of that spectrum; NaN where no channel has a value.
        template: Index of that spectrum; -1 where no channel has a value.
    """

    a: Float[np.ndarray, "*shape"]
    b: Float[np.ndarray, "*shape"]
    template: Int[np.ndarray, "*shape"]


def as_spectra(values: Float[np.ndarray, "M L"] | None, n_channels: int) -> Float[np.ndarray, "M L"]:
    """Normalise spectra to a mean of 1, so that a source's flux is its mean over the channels.

    Args:
        values: M spectra, in any unit; None for a flat one.
        n_channels: Number of channels L.

    Returns:
        The spectra.

    Raises:
        InputError: If a spectrum has a wrong length, negative or non-finite values, or is 0 everywhere.
    """
    if values is None:
        return np.ones((1, n_channels))
    if values.shape[1] != n_channels:
        raise InputError(
            f"the spectrum has {values.shape[1]} values, there are {n_channels} channels; give one for each"
        )
    for number, spectrum in enumerate(values):
        if not np.isfinite(spectrum).all() or (spectrum < 0).any() or not spectrum.any():
            raise InputError(
                f"spectrum {number} (counted from 0) of {len(values)} has values from {spectrum.min():g} to "
                f"{spectrum.max():g}; fluxes that are finite, not negative and not all 0 are needed"
            )
    return values / values.mean(1, keepdims=True)


def combine(
    a: Float[np.ndarray, "L *shape"],
    b: Float[np.ndarray, "L *shape"],
    separation_px: Float[np.ndarray, "*shape"],
    using: Combination,
) -> Combined:
    """Combine channels at every position (F20) for the spectrum with the highest SNR there (see `combine_each`).

    Args:
        a: Term a of each channel.
        b: Term b of each channel.
        separation_px: Separation from the centre, px.
        using: Noise correlation and candidate spectra.

    Returns:
        The combined terms.
    """
    terms = combine_each(a, b, separation_px, using)
    with np.errstate(invalid="ignore", divide="ignore"):
        snr = np.where(terms[0] > 0, terms[1] / np.sqrt(terms[0]), -np.inf)
    best = (snr >= snr.max(0) - TIE).argmax(0)  # the first one of a tie
    known = snr.max(0) > -np.inf
    chosen = np.where(known, np.take_along_axis(terms, best[None, None], axis=1)[:, 0], np.nan)
    return Combined(chosen[0], chosen[1], np.where(known, best, -1))


def combine_each(
    a: Float[np.ndarray, "L *shape"],
    b: Float[np.ndarray, "L *shape"],
    separation_px: Float[np.ndarray, "*shape"],
    using: Combination,
) -> Float[np.ndarray, "2 M *shape"]:
    """Combine channels at every position for each of the spectra (F20), with R at its separation rounded to pixels.

    A channel is excluded where its a is NaN or not positive; the others are combined by their submatrix of R. Positions
    with the same R and the same channels are computed together, for all spectra at once.

    Args:
        a: Term a of each channel.
        b: Term b of each channel.
        separation_px: Separation from the centre, px.
        using: Noise correlation and candidate spectra.

    Returns:
        Terms a and b of each spectrum; NaN where it has no signal in any valid channel.
    """
    shape, n = a.shape[1:], int(np.prod(a.shape[1:]))
    flat_a, flat_b = (values.reshape(len(values), n) for values in (a, b))
    ring = np.round(separation_px).reshape(1, n)
    kinds, which = np.unique(
        np.concatenate([ring, np.isfinite(flat_a) & (flat_a > 0)]), axis=1, return_inverse=True
    )  # groups of positions with the same R and the same valid channels
    terms = np.full((2, len(using.spectra), n), np.nan)
    for number, kind in enumerate(kinds.T):
        seen = kind[1:] > 0
        if not seen.any():
            continue
        at = np.flatnonzero(which.ravel() == number)
        r, spectra = using.at(kind[0])[np.ix_(seen, seen)], using.spectra[:, seen]
        found = combine_seen(flat_a[np.ix_(seen, at)], flat_b[np.ix_(seen, at)], r, spectra)
        terms[:, :, at] = found / using.spread_at(kind[0])[:, None] ** 2
    return terms.reshape(2, len(using.spectra), *shape)


def combine_seen(
    a: Float[np.ndarray, "L N"],
    b: Float[np.ndarray, "L N"],
    r: Float[np.ndarray, "L L"],
    spectra: Float[np.ndarray, "M L"],
) -> Float[np.ndarray, "2 M N"]:
    """Combine channels that all have a value.

    Args:
        a: Term a of each channel at N positions.
        b: Term b of each channel.
        r: Correlation R of the channels.
        spectra: Candidate spectra.

    Returns:
        Terms a and b of each spectrum; NaN for a spectrum that is 0 in these channels.
    """
    root, (n_spectra, n_channels) = np.sqrt(a), spectra.shape
    whiten = solve_triangular(np.linalg.cholesky(r), np.eye(len(r)), lower=True)  # L^-1, of a small triangular matrix
    s = whiten @ (b / root)
    u = (whiten * spectra[:, None]).reshape(-1, n_channels) @ root  # L^-1 (sqrt(a) g) of all spectra g in one product
    u = u.reshape(n_spectra, n_channels, -1)
    terms = np.stack([(u * u).sum(1), (u * s).sum(1)])
    terms[:, ~spectra.any(1)] = np.nan
    return terms


def combine_maps(
    maps: Sequence[LikelihoodMaps], separation_px: Float[np.ndarray, "H W"], using: Combination
) -> tuple[LikelihoodMaps, Int[np.ndarray, "H W"]]:
    """Combine the maps of all channels.

    Args:
        maps: Maps of each channel.
        separation_px: Separation of every pixel from the centre, px.
        using: Noise correlation and candidate spectra.

    Returns:
        The combined maps, and the index of the spectrum with the highest SNR at every pixel. `n_frames` is the sum over
        the channels, `shrinkage` the mean, `singular` the union; `psf_error` and `snr_error` are the maxima.
    """
    a, b, template = combine(np.stack([m.a for m in maps]), np.stack([m.b for m in maps]), separation_px, using)
    rho = np.stack([m.shrinkage for m in maps])
    known = np.isfinite(rho)
    together = replace(
        maps[0],
        a=a,
        b=b,
        snr=b / np.sqrt(a),
        flux=b / a,
        flux_std=1 / np.sqrt(a),
        n_frames=np.sum([m.n_frames for m in maps], axis=0),
        shrinkage=np.where(known.any(0), np.where(known, rho, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan),
        singular=np.any([m.singular for m in maps], axis=0),
        psf_error=max(m.psf_error for m in maps),
        snr_error=max(m.snr_error for m in maps),
        caveats=tuple(merge_caveats([m.caveats for m in maps])),
    )
    return together, template


def merge_caveats(caveats: Sequence[Sequence[str]]) -> list[str]:
    """Merge the caveats of channels: each is listed once, with its channel indices unless it applies to all."""
    channels: dict[str, list[int]] = {}
    for number, sentences in enumerate(caveats):
        for sentence in sentences:
            channels.setdefault(sentence, []).append(number)
    return [
        sentence if len(numbers) == len(caveats) else f"channel {', '.join(map(str, numbers))}: {sentence}"
        for sentence, numbers in channels.items()
    ]


def correlation_by_separation(
    snr: Float[np.ndarray, "L N"], separation_px: Float[np.ndarray, "N"], area: float
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K L L"]]:
    """Estimate R in annuli that are as narrow as the required sample size allows.

    An annulus has at least MIN_INDEPENDENT independent values, and PER_CHANNEL per channel, unless the field has fewer.

    Args:
        snr: SNR of each channel at N source-free positions.
        separation_px: Separation of each position from the centre, px.
        area: Number of pixels per independent value.

    Returns:
        Mean separation (px) and R of each of K annuli.
    """
    order = np.argsort(separation_px, kind="stable")
    least = max(MIN_INDEPENDENT, PER_CHANNEL * len(snr)) * max(1.0, area)
    annuli = np.array_split(order, max(1, int(len(order) // least)))
    each = [spectral_correlation(snr[:, annulus], len(annulus) / max(1.0, area)) for annulus in annuli]
    return np.array([separation_px[annulus].mean() for annulus in annuli]), np.stack(each)


def spectral_correlation(snr: Float[np.ndarray, "L N"], n_independent: float) -> Float[np.ndarray, "L L"]:
    """Estimate R robustly; the result is positive definite.

    Positions whose squared Mahalanobis distance exceeds the 97.5 % quantile of normal values are rejected, which
    excludes residual sources. This leaves the correlation of normal values unchanged, because the rejection limit is an
    ellipsoid of R itself. The estimate is shrunk toward the identity by OAS, and by at least LEAST_SHRINKAGE.

    Args:
        snr: SNR of each channel at N positions.
        n_independent: Number of independent values among them.

    Returns:
        R; the identity if there are no more positions than channels.

    Reference:
        Chen et al. 2010, IEEE TSP 58, 5016.
    """
    n_channels, n = snr.shape
    if n <= n_channels:
        return np.eye(n_channels)
    z = snr - np.median(snr, axis=1, keepdims=True)
    z /= MAD_TO_STD * np.median(abs(z), axis=1, keepdims=True)
    r = regularise(correlation(np.clip(z, -CLIP, CLIP)), n_independent)
    limit = chi2.ppf(KEPT_SHARE, n_channels)
    for _ in range(ROUNDS):
        distance = (solve_triangular(np.linalg.cholesky(r), z, lower=True) ** 2).sum(0)
        near = distance <= limit
        if near.sum() <= n_channels:
            break
        r = regularise(correlation(z[:, near]), n_independent)
    return r


def correlation(z: Float[np.ndarray, "L N"]) -> Float[np.ndarray, "L L"]:
    """Compute the sample correlation of the rows."""
    deviations = z - z.mean(1, keepdims=True)
    s = deviations @ deviations.T
    unit = 1 / np.sqrt(np.diag(s))
    return s * unit[:, None] * unit


def regularise(r: Float[np.ndarray, "L L"], n: float) -> Float[np.ndarray, "L L"]:
    """Shrink a correlation matrix estimated from n independent samples toward the identity."""
    rho = max(float(covariance.oas_shrinkage(jnp.asarray(r), n)), LEAST_SHRINKAGE)
    return (1 - rho) * r + rho * np.eye(len(r))
