"""Properties of a detected source with empirical errors: position, flux, spectrum, false-alarm probability."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import chi2

from pulmo_jax.inference.blank_positions import Terms, scatter
from pulmo_jax.inference.search_noise import Noise
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.joint import SourceFit
from pulmo_jax.methods.paco.spectral import Combination, Combined, combine
from pulmo_jax.types import PointSource


@dataclass(frozen=True, eq=False)
class SourceSpectrum:
    """Unbiased flux of a source in every channel, in units of the channel's PSF (F18, Algorithm 3).

    Attributes:
        label: Number of the source, from 1.
        wavelengths: Wavelength of each channel.
        flux: Flux in each channel.
        flux_std: Standard deviation from the likelihood.
        flux_std_empirical: Standard deviation from blank positions at the same separation; NaN where there are too few.
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


@dataclass(frozen=True)
class Candidate:
    """A peak of the SNR map and the source fitted to it.

    Attributes:
        pixel: Row and column of the peak.
        snr: SNR there, with brighter sources removed.
        flux: Flux b / a of the map there.
        flux_std: Standard deviation of that flux.
        template: Index of the spectrum with the highest SNR.
        fit: Position and unbiased fluxes.
    """

    pixel: tuple[int, int]
    snr: float
    flux: float
    flux_std: float
    template: int
    fit: SourceFit


@dataclass(frozen=True, eq=False)
class Errors:
    """Empirical errors of a source.

    Attributes:
        factor: Ratio of empirical to formal standard deviation of the combined flux; NaN if unknown.
        factors: The same ratio in each channel.
        place_covariance: Covariance of the position (y, x), px^2.
        radial_px: Standard deviation of the separation, px.
        tangential_px: Standard deviation perpendicular to it, px.
    """

    factor: float
    factors: Float[np.ndarray, "L"]
    place_covariance: Float[np.ndarray, "2 2"]
    radial_px: float
    tangential_px: float


def describe(
    label: int,
    candidate: Candidate,
    channels: Channels,
    blanks: Terms,
    noise: Noise,
    combination: Combination,
    north_deg: float,
) -> tuple[PointSource, SourceSpectrum]:
    """Characterise a source with empirical errors.

    The likelihood neglects the temporal correlation of the noise and the uncertainty of a covariance estimated from
    few frames. The flux is therefore also measured at blank positions of the same separation: the ratio of its scatter
    to its formal error is the correction factor of the formal errors of flux and position.

    Args:
        label: Number of the source, from 1.
        candidate: The source.
        channels: The observation.
        blanks: Likelihood terms at the blank positions, without any source.
        noise: Noise of the search.
        combination: Combination of the channels.
        north_deg: Direction of north, degrees from the x axis toward y.

    Returns:
        The source and its spectrum.
    """
    fit, combination = candidate.fit, combination.only(candidate.template)
    offset = fit.place - np.array(channels.centre)
    separation = float(np.hypot(*offset))
    errors = empirical_errors(fit, offset, blanks, combination)
    total = combine(fit.flux_std**-2, fit.flux * fit.flux_std**-2, np.array(separation), combination)
    calibrated = float(candidate.snr / noise.profile.std_at(separation))
    source = PointSource(
        label=label,
        y=float(fit.place[0]),
        x=float(fit.place[1]),
        y_std=float(np.sqrt(errors.place_covariance[0, 0])),
        x_std=float(np.sqrt(errors.place_covariance[1, 1])),
        separation_px=separation,
        separation_px_std=errors.radial_px,
        position_angle_deg=float(np.mod(np.rad2deg(np.arctan2(*offset)) - north_deg, 360)),
        position_angle_deg_std=float(np.rad2deg(np.arctan2(errors.tangential_px, separation))),
        snr=candidate.snr,
        snr_calibrated=calibrated,
        flux=candidate.flux,
        flux_std=candidate.flux_std,
        flux_debiased=float(total.b / total.a),
        flux_debiased_std=float(1 / np.sqrt(total.a)),
        flux_debiased_std_empirical=float(1 / np.sqrt(total.a)) * errors.factor,
        false_alarm_probability=noise.false_alarm(calibrated),
    )
    return source, spectrum_of(label, candidate, channels, errors, total, combination.at(separation), combination)


def spectrum_of(
    label: int,
    candidate: Candidate,
    channels: Channels,
    errors: Errors,
    total: Combined,
    correlation: Float[np.ndarray, "L L"],
    combination: Combination,
) -> SourceSpectrum:
    """Flux of every channel with its empirical error, and its agreement with the spectrum of the search."""
    fit = candidate.fit
    empirical = fit.flux_std * errors.factors
    misfit = fit.flux - float(total.b / total.a) * combination.spectra[0]
    agreement = probability_of(misfit / empirical, correlation)
    return SourceSpectrum(label, channels.wavelengths, fit.flux, fit.flux_std, empirical, candidate.template, agreement)


def empirical_errors(fit: SourceFit, offset: Float[np.ndarray, "2"], blanks: Terms, combination: Combination) -> Errors:
    """Errors of the likelihood, scaled by the scatter at blank positions.

    Args:
        fit: Position and fluxes of the source.
        offset: Its position relative to the centre of rotation, px.
        blanks: Likelihood terms at the blank positions.
        combination: How the channels are combined, with the spectrum of the source alone.

    Returns:
        The errors; those of the position are formal where the scatter is unknown.
    """
    a, b = blanks
    separation = float(np.hypot(*offset))
    together = combine(a, b, np.full(a.shape[1], separation), combination)
    factor, *factors = (scatter(pulls) for pulls in (together.b / np.sqrt(together.a), *(b / np.sqrt(a))))
    widening = excess(fit, combination.at(separation)) * (factor if np.isfinite(factor) else 1.0) ** 2
    covariance = fit.place_covariance * widening
    along = offset / max(separation, 1e-9)
    across = np.array([along[1], -along[0]])
    radial, tangential = (float(np.sqrt(u @ covariance @ u)) for u in (along, across))
    return Errors(factor, np.array(factors), covariance, radial, tangential)


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
