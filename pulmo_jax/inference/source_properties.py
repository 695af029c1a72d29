"""Properties of a detected source with empirical errors: position, flux, spectrum, false-alarm probability."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import chi2

from pulmo_jax.evaluation.selection_bias import without_selection
from pulmo_jax.inference.candidates import Candidate, debiased, debiased_snr, significance_of
from pulmo_jax.inference.search_noise import Noise
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.joint import SourceFit
from pulmo_jax.methods.paco.spectral import Combination, combine
from pulmo_jax.types import PointSource

NEAR = 1.5  # significance above the threshold up to which a flux is flagged as near it


@dataclass(frozen=True, eq=False)
class SourceSpectrum:
    """Unbiased flux of a source in every channel, in units of the channel's PSF (F18, Algorithm 3).

    Attributes:
        label: Number of the source, from 1.
        wavelengths: Wavelength of each channel.
        flux: Flux in each channel.
        flux_std: Standard deviation from the likelihood.
        flux_std_empirical: The same times the standard deviation of the null SNR at the separation of the source.
        template: Index of the spectrum with which the source was detected.
        template_probability: Probability of fluxes at least as far from that spectrum, if it is the source's own; NaN
            where it cannot be computed. If it is small, the combined flux, which assumes the spectrum, is unreliable.
    """

    label: int
    wavelengths: Float[np.ndarray, "L"]
    flux: Float[np.ndarray, "L"]
    flux_std: Float[np.ndarray, "L"]
    flux_std_empirical: Float[np.ndarray, "L"]
    template: int
    template_probability: float


def describe(
    label: int,
    candidate: Candidate,
    channels: Channels,
    noise: Noise,
    combination: Combination,
    north_deg: float,
    threshold: float,
) -> tuple[PointSource, SourceSpectrum]:
    """Characterise a source with empirical errors.

    The likelihood neglects the temporal correlation of the noise and the uncertainty of a covariance estimated from few
    frames. The standard deviation of the null SNR at the separation of the source measures both: it is the factor by
    which the formal errors of flux and position are multiplied.

    Args:
        label: Number of the source, from 1.
        candidate: The source.
        channels: The observation.
        noise: Noise of the search.
        combination: Combination of the channels.
        north_deg: Direction of north, degrees from the x axis toward y.
        threshold: Minimum significance of a source, for the correction of the selection bias.

    Returns:
        The source and its spectrum.
    """
    fit, combination = candidate.fit, combination.only(candidate.template)
    offset = fit.place - np.array(channels.centre)
    separation = float(np.hypot(*offset))
    factor = float(noise.factor(separation))
    covariance = fit.place_covariance * excess(fit, combination.at(separation)) * factor**2
    radial, tangential = along_and_across(covariance, offset)
    total = combine(fit.flux_std**-2, fit.flux * fit.flux_std**-2, np.array(separation), combination)
    flux, flux_std = float(total.b / total.a), float(1 / np.sqrt(total.a))
    significance = significance_of(candidate, channels, combination, noise)
    fixed_std = float(1 / np.sqrt(debiased(fit, channels, combination).a))
    lowest = noise.ratio_at(threshold, separation) * noise.refit_gain * fixed_std
    corrected, corrected_std = without_selection(flux, flux_std * factor, lowest)
    source = PointSource(
        label=label,
        y=float(fit.place[0]),
        x=float(fit.place[1]),
        y_std=float(np.sqrt(covariance[0, 0])),
        x_std=float(np.sqrt(covariance[1, 1])),
        separation_px=separation,
        separation_px_std=radial,
        position_angle_deg=float(np.mod(np.rad2deg(np.arctan2(*offset)) - north_deg, 360)),
        position_angle_deg_std=float(np.rad2deg(np.arctan2(tangential, separation))),
        snr=candidate.snr,
        snr_debiased=debiased_snr(fit, channels, combination),
        snr_calibrated=significance,
        flux=candidate.flux,
        flux_std=candidate.flux_std,
        flux_debiased=flux,
        flux_debiased_std=flux_std,
        flux_debiased_std_empirical=flux_std * factor,
        flux_corrected=corrected,
        flux_corrected_std=corrected_std,
        near_threshold=significance < threshold + NEAR,
        false_alarm_probability=noise.false_alarm(significance),
    )
    return source, spectrum_of(label, candidate, channels, factor, flux, combination.at(separation), combination)


def spectrum_of(
    label: int,
    candidate: Candidate,
    channels: Channels,
    factor: float,
    flux: float,
    correlation: Float[np.ndarray, "L L"],
    combination: Combination,
) -> SourceSpectrum:
    """Flux of every channel with its empirical error, and its agreement with the spectrum of the search."""
    fit = candidate.fit
    empirical = fit.flux_std * factor
    agreement = probability_of((fit.flux - flux * combination.spectra[0]) / empirical, correlation)
    return SourceSpectrum(label, channels.wavelengths, fit.flux, fit.flux_std, empirical, candidate.template, agreement)


def along_and_across(covariance: Float[np.ndarray, "2 2"], offset: Float[np.ndarray, "2"]) -> tuple[float, float]:
    """Standard deviations of a position along and across the direction of `offset` from the star, px."""
    along = offset / max(float(np.hypot(*offset)), 1e-9)
    across = np.array([along[1], -along[0]])
    radial, tangential = (float(np.sqrt(u @ covariance @ u)) for u in (along, across))
    return radial, tangential


def probability_of(misfit: Float[np.ndarray, "L"], correlation: Float[np.ndarray, "L L"]) -> float:
    """Probability of a misfit r at least as large after one parameter was fitted.

    r' R^-1 r is chi-squared distributed with L - 1 degrees of freedom.

    Args:
        misfit: Residual of each channel over its standard deviation; channels that are not finite are ignored.
        correlation: Correlation R of the channels' noise.

    Returns:
        The probability; NaN for fewer than two channels.
    """
    seen = np.isfinite(misfit)
    r = misfit[seen]
    if len(r) < 2:
        return float("nan")
    return float(chi2.sf(r @ np.linalg.solve(correlation[np.ix_(seen, seen)], r), len(r) - 1))


def excess(fit: SourceFit, correlation: Float[np.ndarray, "L L"]) -> float:
    """Factor by which correlated noise increases the variance of the position, a sum over channels.

    Each channel has its SNR u as its weight, so the factor is u' R u / u' u.
    """
    u = np.nan_to_num(fit.flux / fit.flux_std)
    return float(u @ correlation @ u / (u @ u)) if u.any() else 1.0
