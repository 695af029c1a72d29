"""Search with several spectra: noise of each, effective number of trials, and the threshold that accounts for them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

from pulmo_jax.evaluation.null_field import NullProfile, null_profile, separation_map
from pulmo_jax.methods.paco import LikelihoodMaps
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.spectral import Combination, combine_each

SIGNIFICANCE = 5.0  # SNR for which the trials are counted; they increase slowly with it
DRAWS = 2000  # simulated sets of SNR for each spectrum
JITTER = 1e-6  # keeps the conditional covariance positive definite for spectra that are alike


def snr_of_each(maps: Sequence[LikelihoodMaps], channels: Channels, using: Combination) -> Float[np.ndarray, "M H W"]:
    """SNR map of each spectrum.

    Args:
        maps: Maps of each channel.
        channels: The observation.
        using: Combination of the channels.

    Returns:
        The maps; NaN where a spectrum has no signal in any valid channel.
    """
    separation = separation_map(channels.shape, channels.centre)
    a, b = combine_each(np.stack([m.a for m in maps]), np.stack([m.b for m in maps]), separation, using)
    return b / np.sqrt(a)


def with_spread(nulls: Sequence[LikelihoodMaps], channels: Channels, combination: Combination) -> Combination:
    """Measure the standard deviation of the null SNR of each spectrum, relative to that of the first one.

    R is estimated from few values and shrunk toward the identity, so spectra that differ between neighbouring channels
    have a smaller null SNR than smooth ones, by up to 40 % in strongly correlated noise. Without this correction the
    comparison of the spectra at a position, and one threshold for all of them, would favour the smooth spectra.

    Args:
        nulls: Maps of each channel with reversed angles.
        channels: The observation.
        combination: Combination of the channels.

    Returns:
        The combination with the spread; unchanged for a single spectrum.
    """
    if len(combination.spectra) == 1:
        return combination
    snr = snr_of_each(nulls, channels, combination._replace(spread_px=None, spread=None))
    valid = np.isfinite(snr).any((1, 2))
    at = np.arange(1.0, np.hypot(*channels.shape))
    separation = separation_map(channels.shape, channels.centre)
    spread, reference = np.ones((len(snr), len(at))), None
    for number in np.flatnonzero(valid):
        profile = null_profile(snr[number], channels.centre, channels.fwhm_px)
        reference = profile.std_at(at) if reference is None else reference
        spread[number] = inner_spread(snr[number], separation, profile, at, channels.fwhm_px) / reference
    return combination._replace(spread_px=at, spread=spread)


def inner_spread(
    snr: Float[np.ndarray, "H W"],
    separation: Float[np.ndarray, "H W"],
    profile: NullProfile,
    at: Float[np.ndarray, "J"],
    fwhm_px: float,
) -> Float[np.ndarray, "J"]:
    """Standard deviation of a null SNR by separation, measured also inside the first annulus of its profile.

    There R is that of larger separations, and noise that it does not describe has a null SNR of up to 9 for spectra
    that differ between neighbouring channels. Each ring has few independent values, so its root mean square, corrected
    for their number, only replaces a smaller value of the profile.

    Args:
        snr: Null SNR.
        separation: Separation of every pixel from the centre, px.
        profile: Profile of the null SNR.
        at: Separations, px.
        fwhm_px: FWHM of the PSF, px.

    Returns:
        Standard deviation at these separations.
    """
    spread = profile.std_at(at).copy()
    for number in np.flatnonzero(at < profile.separation_px[0]):
        ring = snr[np.isfinite(snr) & (abs(separation - at[number]) <= fwhm_px / 4)]
        if ring.size:
            n_independent = max(2.0, 2 * np.pi * at[number] / fwhm_px)
            spread[number] = max(spread[number], np.sqrt((ring**2).mean() * (1 + 1 / n_independent)))
    return spread


def effective_trials(
    null_snr: Float[np.ndarray, "M *shape"], significance: float = SIGNIFICANCE, seed: int = 0
) -> float:
    """Effective number of independent trials of M correlated statistics: P(any > t) / P(one > t).

    The maximum of M normal variables with the correlation of the null SNR exceeds t with the probability
    sum_m P(z_m > t) E[1 / N | z_m > t], where N is the number of variables above t. The expectation is a mean over
    draws of z_m beyond t and of the others given z_m, so the estimate is precise for every t (importance sampling of a
    union). Bounds from eigenvalues (Cheverud, Li and Ji) do not depend on t and are too low in the tail: even strongly
    correlated variables seldom exceed a high t together.

    Args:
        null_snr: Null SNR of each spectrum at the same positions; spectra without any value do not count.
        significance: t, in standard deviations.
        seed: Seed of the draws.

    Returns:
        The number, between 1 and M.

    Reference:
        Adler, Blanchet & Liu 2012, Annals of Applied Probability 22, 1167; Owen, Maximov & Chertkov 2019, Electronic
        Journal of Statistics 13, 231.
    """
    values = null_snr.reshape(len(null_snr), -1)
    values = values[np.isfinite(values).any(1)]
    values = values[:, np.isfinite(values).all(0)]
    if len(values) < 2 or values.shape[1] < 2:
        return float(max(1, len(values)))
    correlation, rng = np.corrcoef(values), np.random.default_rng(seed)
    others = rng.standard_normal((len(values), DRAWS))
    beyond = norm.isf(norm.sf(significance) * rng.random(DRAWS))
    shares = [share_of_union(correlation, number, beyond, others, significance) for number in range(len(values))]
    return float(np.clip(sum(shares), 1, len(values)))


def share_of_union(
    correlation: Float[np.ndarray, "M M"],
    number: int,
    beyond: Float[np.ndarray, "D"],
    others: Float[np.ndarray, "M D"],
    significance: float,
) -> float:
    """E[1 / N | z_m > t] of `effective_trials`.

    Args:
        correlation: Correlation of the variables.
        number: m.
        beyond: Draws of z_m beyond t.
        others: Draws of independent standard normal variables.
        significance: t.

    Returns:
        The mean of 1 / N over the draws.
    """
    slope = correlation[:, number]
    conditional = correlation - np.outer(slope, slope) + JITTER * np.eye(len(slope))
    draws = slope[:, None] * beyond + np.linalg.cholesky(conditional) @ others
    draws[number] = beyond
    return float((1 / (draws >= significance).sum(0).clip(1)).mean())


def trials_threshold(threshold: float, trials: float) -> float:
    """Threshold at which the best of several trials has the false-alarm probability of one trial at `threshold`.

    Args:
        threshold: Threshold of a single trial, in standard deviations.
        trials: Effective number of trials.

    Returns:
        The threshold Q^-1(Q(threshold) / trials), Q being the upper tail of the normal distribution.

    Example:
        >>> round(trials_threshold(5.0, 10), 2)
        5.43
    """
    return float(norm.isf(norm.sf(threshold) / trials)) if trials > 1 else threshold
