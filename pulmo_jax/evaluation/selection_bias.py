"""Selection bias of fluxes near the detection threshold, and its correction."""

import numpy as np
from jaxtyping import Float
from scipy.stats import norm

MOST_STD = 8.0  # standard deviations above the lowest flux beyond which selection is negligible
FAINTEST = -30.0  # lowest flux tried, in standard deviations
STEPS = 2001


def without_selection(flux: float, flux_std: float, lowest: float) -> tuple[float, float]:
    """Correct the flux of a source that was detected because it exceeds a threshold.

    The measured flux f of a source of flux F is Gaussian, but it is known only if it reaches the lowest flux f0 of a
    detection, so that faint sources read high. Given the detection, f has the density
    phi((f - F) / s) / (s Phi((F - f0) / s)). The F that maximises it, at least 0, over-corrects; its mean with f is
    nearly unbiased.

    Args:
        flux: Measured flux f.
        flux_std: Its standard deviation s.
        lowest: Lowest flux f0 of a detection.

    Returns:
        The corrected flux and its standard deviation; those given if they are not finite, or far above the threshold.

    Reference:
        Zhong and Prentice 2008, Biostatistics 9, 621.

    Example:
        >>> corrected, error = without_selection(flux=55.0, flux_std=10.0, lowest=50.0)
        >>> round(corrected, 1), round(error, 1)
        (46.8, 14.0)
    """
    if not (np.isfinite([flux, flux_std, lowest]).all() and flux_std > 0) or flux - lowest > MOST_STD * flux_std:
        return flux, flux_std
    edge = lowest / flux_std
    corrected = float(estimates(np.array([max(flux / flux_std, edge)]), edge)[0])
    detected = np.linspace(max(edge, corrected - MOST_STD), max(edge, corrected) + MOST_STD, STEPS)
    density = np.exp(norm.logpdf(detected - corrected) - norm.logsf(edge - corrected))
    squares = (estimates(detected, edge) - corrected) ** 2
    return corrected * flux_std, flux_std * float(np.sqrt(np.average(squares, weights=density)))


def estimates(measured: Float[np.ndarray, "N"], edge: float) -> Float[np.ndarray, "N"]:
    """Mean of a measured flux and its maximum-likelihood estimate given the detection, in standard deviations.

    Args:
        measured: Measured fluxes, at least `edge`.
        edge: Lowest flux of a detection.

    Returns:
        The estimates.
    """
    true = np.linspace(FAINTEST, max(measured.max(), edge) + 1, STEPS)
    expected = true + np.exp(norm.logpdf(edge - true) - norm.logsf(edge - true))  # mean of a detected flux
    return (measured + np.maximum(np.interp(measured, expected, true), 0)) / 2
