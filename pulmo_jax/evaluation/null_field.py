"""Noise of a signal-to-noise map: its standard deviation by separation, and the false-alarm probability of a peak."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import norm
from scipy.stats import t as student

from pulmo_jax.types import InputError

CLIP = 5.0  # robust standard deviations beyond which a null value is considered the residual of a source
MAD_TO_STD = 1.4826
MIN_VALUES = 12  # smallest number of values of a map
FALSE_ALARM_FLOOR = 1e-6  # lowest probability of a false alarm that is quoted: no null field samples the tail beyond it
MANY = 1e9  # degrees of freedom that are indistinguishable from infinitely many
LEAST_TAIL = 1e-290  # lowest tail probability that float64 inverts
MIN_INDEPENDENT = 10  # independent values of an annulus, below which its spread is too uncertain to divide by


@dataclass(frozen=True, eq=False)
class NullProfile:
    """Spread of an empirical null SNR in R annuli about the centre.

    Attributes:
        separation_px: Mean radius of each annulus, px.
        mean: Mean of the values in each.
        std: Standard deviation of the values in each.
        low: Lower end of its 95 % confidence interval.
        high: Upper end of its 95 % confidence interval.
        n: Number of independent values in each.
    """

    separation_px: Float[np.ndarray, "R"]
    mean: Float[np.ndarray, "R"]
    std: Float[np.ndarray, "R"]
    low: Float[np.ndarray, "R"]
    high: Float[np.ndarray, "R"]
    n: Float[np.ndarray, "R"]

    def std_at(self, separation_px: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
        """Standard deviation at a separation, interpolated between the annuli and constant beyond them.

        Args:
            separation_px: Separation from the centre, px.

        Returns:
            Standard deviation of the SNR.
        """
        return np.asarray(np.interp(separation_px, self.separation_px, self.std))


def separation_map(shape: tuple[int, int], centre: tuple[float, float]) -> Float[np.ndarray, "H W"]:
    """Distance of every pixel from the centre.

    Args:
        shape: Height and width of the map in px.
        centre: Centre (y, x), px.

    Returns:
        Distances, px.
    """
    y, x = np.indices(shape)
    return np.hypot(y - centre[0], x - centre[1])


def null_profile(null_snr: Float[np.ndarray, "H W"], centre: tuple[float, float], fwhm_px: float) -> NullProfile:
    """Measures the spread of a null SNR map in annuli that are two FWHM wide and one FWHM apart.

    Annuli of fewer than MIN_INDEPENDENT independent values do not count; if none has as many, the whole map is one
    annulus. Values beyond CLIP robust standard deviations, the residuals of sources, do not count either.

    Args:
        null_snr: SNR map of data with reversed angles; NaN where there is no value.
        centre: Centre of rotation (y, x), px.
        fwhm_px: FWHM of the PSF, px.

    Returns:
        The spread by separation.

    Raises:
        InputError: The map has fewer than MIN_VALUES values.
    """
    separation, known = separation_map(null_snr.shape, centre), np.isfinite(null_snr)
    if known.sum() < MIN_VALUES:
        raise InputError(f"the map has {int(known.sum())} values, too few to say what its noise is")
    area = max(1.0, correlation_area(null_snr))
    middles = np.arange(fwhm_px, separation[known].max() + fwhm_px, fwhm_px)
    annuli = [known & (abs(separation - middle) <= fwhm_px) for middle in middles]
    enough = [annulus for annulus in annuli if annulus.sum() / area >= MIN_INDEPENDENT]
    rows = [(separation[annulus].mean(), *spread_of(null_snr[annulus], area)) for annulus in enough or [known]]
    return NullProfile(*np.array(rows).T)


def spread_of(values: Float[np.ndarray, "N"], area: float) -> tuple[float, float, float, float, float]:
    """Mean, standard deviation with its 95 % confidence interval, and number of independent values, after clipping.

    Args:
        values: Values of an annulus.
        area: Number of pixels for each independent value.

    Returns:
        Mean, standard deviation, lower and upper end of its interval, number of independent values.
    """
    middle = np.median(values)
    robust = MAD_TO_STD * np.median(abs(values - middle))
    values = values[abs(values - middle) <= CLIP * robust] if robust > 0 else values
    n = max(2.0, values.size / area)
    std = float(values.std() * np.sqrt(n / (n - 1)))
    error = 1.96 / np.sqrt(2 * n)  # of the logarithm of a standard deviation
    return float(values.mean()), std, float(std * np.exp(-error)), float(std * np.exp(error)), n


def significance(
    ratio: Float[np.ndarray, "*shape"] | float, n: Float[np.ndarray, "*shape"] | float
) -> Float[np.ndarray, "*shape"]:
    """Convert an SNR over an estimated standard deviation to the Gaussian significance of equal probability.

    The standard deviation comes from n independent values. The ratio, divided by sqrt(1 + 1/n) for the error of their
    mean, therefore follows Student's t with n - 1 degrees of freedom, whose tail is heavier than the Gaussian one.
    Where the tail probability underflows, Wallace's approximation replaces the exact conversion.

    Args:
        ratio: SNR divided by the empirical standard deviation.
        n: Number of independent values, above 1.

    Returns:
        The value that a Gaussian of unit variance exceeds with the same probability: 5 means 5 sigma at every
        separation.

    Reference:
        Mawet et al. 2014, ApJ 792, 97; Wallace 1959, Ann. Math. Stat. 30, 1124.

    Example:
        >>> round(float(significance(5.0, 1e9)), 3), round(float(significance(5.0, 12.0)), 3)
        (5.0, 3.455)
    """
    value, degrees = np.asarray(ratio) / np.sqrt(1 + 1 / np.asarray(n)), np.minimum(np.asarray(n) - 1.0, MANY)
    size = abs(value)
    tail = student.sf(size, degrees)
    wallace = (8 * degrees + 1) / (8 * degrees + 3) * np.sqrt(degrees * np.log1p(size**2 / degrees))
    return np.asarray(np.sign(value) * np.where(tail > LEAST_TAIL, norm.isf(np.maximum(tail, LEAST_TAIL)), wallace))


def ratio_at(
    significance_: Float[np.ndarray, "*shape"] | float, n: Float[np.ndarray, "*shape"] | float
) -> Float[np.ndarray, "*shape"]:
    """Invert `significance`: the SNR over its empirical standard deviation that has a given significance.

    Args:
        significance_: Gaussian significance, at most 37.
        n: Number of independent values behind the standard deviation.

    Returns:
        The ratio.
    """
    n = np.asarray(n)
    return np.asarray(student.isf(norm.sf(significance_), n - 1.0) * np.sqrt(1 + 1 / n))


def null_values(
    null_snr: Float[np.ndarray, "H W"], centre: tuple[float, float], fwhm_px: float
) -> tuple[Float[np.ndarray, "N"], int]:
    """Select the values of a null map beyond one FWHM; closer to the centre a source does not rotate out of its PSF.

    Args:
        null_snr: SNR map; NaN where there is no value.
        centre: Centre of rotation (y, x), px.
        fwhm_px: FWHM of the PSF, px.

    Returns:
        The values, and the number of independent ones among them.
    """
    outside = separation_map(null_snr.shape, centre) > fwhm_px
    values = null_snr[outside & np.isfinite(null_snr)]
    return values, max(2, int(values.size / max(1.0, correlation_area(null_snr))))


def correlation_area(field: Float[np.ndarray, "H W"]) -> float:
    """Number of pixels per independent value: the sum of the squared autocorrelation over all lags up to 12 px.

    Args:
        field: Map; values that are not finite are ignored.

    Returns:
        The number of pixels.
    """
    values = np.where(np.isfinite(field), field - np.nanmean(field), 0)
    known = np.isfinite(field).astype(float)
    shape = [2 * n for n in field.shape]
    power, pairs = (abs(np.fft.rfft2(image, shape)) ** 2 for image in (values, known))
    correlation = np.fft.irfft2(power, shape) / np.maximum(np.fft.irfft2(pairs, shape), 1)
    correlation /= correlation[0, 0]
    reach = min(12, *(n - 1 for n in field.shape))
    near = np.roll(correlation, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
    return float((near**2).sum())


def field_false_alarm(snr: Float[np.ndarray, "N"] | float, null: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "*N"]:
    """Probability that noise alone has a peak of at least `snr` anywhere in the field.

    It is 1 - exp(-E), where E is the expected Euler characteristic of the excursion set of a smooth Gaussian field, for
    high thresholds the expected number of peaks. The roughness of the field is the variance of the differences between
    neighbouring pixels, so a map of independent pixels is treated too, conservatively.

    Args:
        snr: Height of the peak.
        null: SNR map of noise of unit variance; NaN outside of the field.

    Returns:
        The probability; 1 for an SNR of at most 1.

    Reference:
        Worsley et al. 1996, Human Brain Mapping 4, 58, eq. 3.
    """
    known = np.isfinite(null)
    dy, dx = np.diff(null, axis=0), np.diff(null, axis=1)
    scale = np.nanvar(null)
    roughness = [np.nanmean(d**2) / scale for d in (dy, dx)]
    both = np.nanmean(dy[:, :-1] * dx[:-1]) / scale
    area = known.sum() * np.sqrt(max(roughness[0] * roughness[1] - both**2, 0))
    edge = (perimeter(known) / 4) * (np.sqrt(roughness[0]) + np.sqrt(roughness[1]))
    t = np.maximum(np.asarray(snr, float), 0)
    peaks = np.exp(-(t**2) / 2) * (area * t / (2 * np.pi) ** 1.5 + edge / (2 * np.pi)) + norm.sf(t)
    return np.where(np.asarray(snr) > 1, -np.expm1(-peaks), 1.0)


def perimeter(known: Bool[np.ndarray, "H W"]) -> int:
    """Perimeter of a field, as the number of pixel sides on its boundary.

    Args:
        known: Pixels of the field.

    Returns:
        Number of pixel sides.
    """
    padded = np.pad(known, 1).astype(int)
    return int(abs(np.diff(padded, axis=0)).sum() + abs(np.diff(padded, axis=1)).sum())
