"""Channels combined: flux and SNR of a source with a given spectrum, in noise that is correlated between channels.

Flasseur, Denis, Thiébaut, Langlois 2020 (A&A 637, A9), "F20". Each channel l gives the likelihood terms a_l and b_l of
a source at a position. In units of their own noise, s_l = b_l / sqrt(a_l), the channels have unit variance and the
spectral correlation R; a source of flux f and spectrum g adds f u_l, u_l = sqrt(a_l) g_l. So, by generalised least
squares,

    a = u' R^-1 u,   b = u' R^-1 s,   flux = b / a,   SNR = b / sqrt(a),

computed from whitened values L^-1 u and L^-1 s with R = L L' (Cholesky). With one channel that is a_1 and b_1.

R depends on the separation r: speckles move outward with the wavelength, so two channels see the same speckle at a
position only where r |lambda - lambda'| / lambda is less than its width. A single R for the whole field would treat
channels close to the star as more independent than they are, and overstate the SNR there. So R is measured in annuli.
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

CLIP = 3.0  # robust standard deviations at which the first estimate of R clips
KEPT_SHARE = 0.975  # share of normal values, by Mahalanobis distance, that later estimates keep
ROUNDS = 3  # later estimates
TIE = 1e-9  # difference in SNR that counts: with a single channel left all spectra are equal, and the first one wins
MIN_INDEPENDENT = 50  # independent values of an annulus
PER_CHANNEL = 5  # and at least as many for every channel
MAD_TO_STD = 1.4826
LEAST_SHRINKAGE = 1e-3  # without it, channels that are copies of each other would have a singular R


class Combination(NamedTuple):
    """How channels are combined.

    Attributes:
        separation_px: Separations at which R is known, px.
        correlation: R there, positive definite; linear between them, constant beyond.
        spectra: M spectra that are tried, each of mean 1.
    """

    separation_px: Float[np.ndarray, "K"]
    correlation: Float[np.ndarray, "K L L"]
    spectra: Float[np.ndarray, "M L"]

    def at(self, separation_px: float) -> Float[np.ndarray, "L L"]:
        """R at a separation, interpolated; a mean of positive definite matrices is positive definite."""
        place = np.interp(separation_px, self.separation_px, np.arange(len(self.separation_px)))
        low = int(place)
        high, share = min(low + 1, len(self.correlation) - 1), place - low
        return (1 - share) * self.correlation[low] + share * self.correlation[high]

    def only(self, template: int) -> "Combination":
        """The same with a single spectrum."""
        return self._replace(spectra=self.spectra[template : template + 1])


def independent(spectra: Float[np.ndarray, "M L"]) -> Combination:
    """Combination of channels with independent noise."""
    return Combination(np.zeros(1), np.eye(spectra.shape[1])[None], spectra)


class Combined(NamedTuple):
    """Likelihood terms of the channels together.

    Attributes:
        a: Term a of the spectrum with the highest SNR; NaN where no channel has a value.
        b: Term b of that spectrum; NaN where no channel has a value.
        template: Number of that spectrum; -1 where no channel has a value.
    """

    a: Float[np.ndarray, "*shape"]
    b: Float[np.ndarray, "*shape"]
    template: Int[np.ndarray, "*shape"]


def as_spectra(values: Float[np.ndarray, "M L"] | None, n_channels: int) -> Float[np.ndarray, "M L"]:
    """Scales spectra to a mean of 1, so that a source's flux is its mean over the channels.

    Args:
        values: M spectra; None for a flat one.
        n_channels: Number of channels L.

    Returns:
        The spectra.

    Raises:
        InputError: A spectrum has another length, negative values, values that are not finite, or is 0 everywhere.
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
    """Combines channels at every position (F20), with R at its separation rounded to pixels.

    A channel is left out where it is NaN or its a is not positive; the others are combined by their part of R.

    Args:
        a: Term a of each channel.
        b: Term b of each channel.
        separation_px: Separation from the centre, px.
        using: How the channels are combined.

    Returns:
        The terms of all channels together.
    """
    shape, n = a.shape[1:], int(np.prod(a.shape[1:]))
    flat_a, flat_b = (values.reshape(len(values), n) for values in (a, b))
    ring = np.round(separation_px).reshape(1, n)
    kinds, which = np.unique(
        np.concatenate([ring, np.isfinite(flat_a) & (flat_a > 0)]), axis=1, return_inverse=True
    )  # positions with the same R and the same channels
    sums, template = np.full((2, n), np.nan), np.full(n, -1)
    for number, kind in enumerate(kinds.T):
        seen = kind[1:] > 0
        if not seen.any():
            continue
        at = np.flatnonzero(which.ravel() == number)
        r, spectra = using.at(kind[0])[np.ix_(seen, seen)], using.spectra[:, seen]
        sums[:, at], template[at] = combine_seen(flat_a[np.ix_(seen, at)], flat_b[np.ix_(seen, at)], r, spectra)
    return Combined(sums[0].reshape(shape), sums[1].reshape(shape), template.reshape(shape))


def combine_seen(
    a: Float[np.ndarray, "L N"], b: Float[np.ndarray, "L N"], r: Float[np.ndarray, "L L"], spectra: np.ndarray
) -> tuple[Float[np.ndarray, "2 N"], Int[np.ndarray, "N"]]:
    """Combines channels that all have a value.

    Args:
        a: Term a of each channel at N positions.
        b: Term b of each channel.
        r: Correlation R of the channels.
        spectra: Spectra that are tried.

    Returns:
        a and b of the spectrum with the highest SNR, and its number.
    """
    lower, root = np.linalg.cholesky(r), np.sqrt(a)
    s = solve_triangular(lower, b / root, lower=True)
    sums, highest, best = np.full((2, a.shape[1]), np.nan), np.full(a.shape[1], -np.inf), np.full(a.shape[1], -1)
    for number, spectrum in enumerate(spectra):
        if not spectrum.any():
            continue  # it is 0 in all channels that have a value
        u = solve_triangular(lower, root * spectrum[:, None], lower=True)
        terms = np.stack([(u * u).sum(0), (u * s).sum(0)])
        snr = terms[1] / np.sqrt(terms[0])
        better = snr > highest + TIE
        sums[:, better], highest[better], best[better] = terms[:, better], snr[better], number
    return sums, best


def combine_maps(
    maps: Sequence[LikelihoodMaps], separation_px: Float[np.ndarray, "H W"], using: Combination
) -> tuple[LikelihoodMaps, Int[np.ndarray, "H W"]]:
    """Combines the maps of all channels.

    Args:
        maps: Maps of each channel.
        separation_px: Separation of every pixel from the centre, px.
        using: How the channels are combined.

    Returns:
        The maps, and the number of the spectrum with the highest SNR at every pixel. n_frames is the sum over the
        channels, shrinkage their mean; singular holds for any of them; the errors are the largest ones.
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
    """Merges the caveats of channels: each is listed once, with its channels (from 0) unless it holds for all."""
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
    """Measures R in annuli as narrow as possible, from the inside out.

    An annulus has at least MIN_INDEPENDENT independent values, and PER_CHANNEL for every channel.

    Args:
        snr: SNR of each channel at N positions without a source.
        separation_px: Separation of each position, px.
        area: Number of pixels for each independent value.

    Returns:
        Mean separation of each of K annuli, and R in it.
    """
    order = np.argsort(separation_px, kind="stable")
    least = max(MIN_INDEPENDENT, PER_CHANNEL * len(snr)) * max(1.0, area)
    annuli = np.array_split(order, max(1, int(len(order) // least)))
    each = [spectral_correlation(snr[:, annulus], len(annulus) / max(1.0, area)) for annulus in annuli]
    return np.array([separation_px[annulus].mean() for annulus in annuli]), np.stack(each)


def spectral_correlation(snr: Float[np.ndarray, "L N"], n_independent: float) -> Float[np.ndarray, "L L"]:
    """Robust estimate of R, positive definite.

    Positions whose Mahalanobis distance only 2.5 % of normal values would exceed do not count, so that remaining
    sources do not either. This leaves the correlation of normal values unchanged, because the limit is an ellipsoid of
    R itself. The estimate is shrunk toward the identity by OAS, and by at least LEAST_SHRINKAGE.

    Args:
        snr: SNR of each channel at N positions.
        n_independent: Number of independent values among them.

    Returns:
        R; the identity for no more positions than channels.

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
    """Sample correlation."""
    deviations = z - z.mean(1, keepdims=True)
    s = deviations @ deviations.T
    unit = 1 / np.sqrt(np.diag(s))
    return s * unit[:, None] * unit


def regularise(r: Float[np.ndarray, "L L"], n: float) -> Float[np.ndarray, "L L"]:
    """Shrinks a correlation of n independent samples toward the identity."""
    rho = max(float(covariance.oas_shrinkage(jnp.asarray(r), n)), LEAST_SHRINKAGE)
    return (1 - rho) * r + rho * np.eye(len(r))
