"""Noise of a search, from maps with reversed angles: its correlation between channels, its spread, false alarms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from pulmo_jax.evaluation.null_field import (
    FALSE_ALARM_FLOOR,
    MANY,
    NullProfile,
    correlation_area,
    field_false_alarm,
    null_profile,
    ratio_at,
    separation_map,
    significance,
)
from pulmo_jax.inference.spectral_trials import effective_trials, snr_of_each
from pulmo_jax.methods.paco import LikelihoodMaps
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.spectral import Combination, combine_maps, correlation_by_separation


@dataclass(frozen=True, eq=False)
class Noise:
    """Empirical null distribution of a search.

    Attributes:
        null: Maps with reversed angles, of the best spectrum at every pixel.
        profile: Standard deviation of the null SNR of a single spectrum, by separation.
        field: Null SNR of that spectrum divided by its standard deviation: a field of unit variance.
        trials: Effective number of spectra that were tried (see `effective_trials`).
        refit_gain: Ratio of debiased SNR to SNR of the map for peaks of the noise (see `candidates.refit_gain`).
    """

    null: LikelihoodMaps
    profile: NullProfile
    field: Float[np.ndarray, "H W"]
    trials: float
    refit_gain: float = 1.0

    def significance(
        self, snr: Float[np.ndarray, "*shape"] | float, separation_px: Float[np.ndarray, "*shape"] | float
    ) -> Float[np.ndarray, "*shape"]:
        """Gaussian significance of an SNR in the empirical null of its separation (see `null_field.significance`)."""
        n = np.interp(separation_px, self.profile.separation_px, self.profile.n)
        return significance(snr / self.profile.std_at(separation_px), n)

    def factor(self, separation_px: float) -> float:
        """Ratio of empirical to formal standard deviation, with the error of its mean (Mawet et al. 2014)."""
        n = np.interp(separation_px, self.profile.separation_px, self.profile.n)
        return float(self.profile.std_at(separation_px) * np.sqrt(1 + 1 / n))

    def ratio_at(self, significance: float, separation_px: float) -> float:
        """SNR that has a given significance at a separation (the inverse of `significance`)."""
        n = np.interp(separation_px, self.profile.separation_px, self.profile.n)
        return float(ratio_at(significance, n) * self.profile.std_at(separation_px))

    def false_alarm(self, value: float) -> float:
        """Probability that noise alone has a peak of at least this significance anywhere, with any of the spectra.

        Args:
            value: Significance of the peak.

        Returns:
            The probability, at least FALSE_ALARM_FLOOR.
        """
        single = np.minimum(field_false_alarm(value, self.field), 1 - 1e-16)
        return max(float(-np.expm1(self.trials * np.log1p(-single))), FALSE_ALARM_FLOOR)


def correlation_of(
    nulls: Sequence[LikelihoodMaps], channels: Channels
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K L L"]]:
    """Correlation R of the channels' null SNR by separation, beyond one FWHM and where all channels have a value.

    Args:
        nulls: Maps of each channel with reversed angles.
        channels: The observation.

    Returns:
        K separations, px, and R at each; the identity where it cannot be measured.
    """
    snr, separation = np.stack([null.snr for null in nulls]), separation_map(channels.shape, channels.centre)
    known = np.isfinite(snr).all(0) & (separation > channels.fwhm_px)
    if len(snr) == 1 or not known.any():
        return np.zeros(1), np.eye(len(snr))[None]
    area = np.mean([correlation_area(np.where(known, values, np.nan)) for values in snr])
    return correlation_by_separation(snr[:, known], separation[known], float(area))


def noise_of(nulls: Sequence[LikelihoodMaps], channels: Channels, combination: Combination) -> Noise:
    """Measure the noise of a search from the null maps of the channels.

    The maximum SNR over several spectra has neither unit variance nor a normal tail. The standard deviation is
    therefore that of a single spectrum, the one with the largest spread of the null, and the trials are counted
    separately.

    Args:
        nulls: Maps of each channel with reversed angles.
        channels: The observation.
        combination: Combination of the channels.

    Returns:
        The noise.
    """
    separation = separation_map(channels.shape, channels.centre)
    together, _ = combine_maps(nulls, separation, combination)
    each = snr_of_each(nulls, channels, combination)
    alone = each[np.isfinite(each).any((1, 2))]
    profiles = [null_profile(snr, channels.centre, channels.fwhm_px) for snr in alone]
    widest = int(np.argmax([profile.std.mean() for profile in profiles]))
    std = profiles[widest].std_at(separation)
    return Noise(together, profiles[widest], alone[widest] / std, effective_trials(alone))


def theoretical(noise: Noise) -> Noise:
    """Noise of unit variance, as the likelihood assumes it: the significance of an SNR is the SNR itself."""
    profile = noise.profile
    ones, many = np.ones_like(profile.std), np.full_like(profile.std, MANY)
    return replace(noise, profile=replace(profile, std=ones, low=ones, high=ones, n=many))
