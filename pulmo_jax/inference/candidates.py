"""Candidate sources: local maxima of the SNR map, each refitted with a noise model that excludes it, and judged.

A source is part of the stack from which its noise is learnt. Far from the star it leaves a patch after a few frames,
and the SNR of the map grows with its flux. Close to the star it does not: the SNR has a maximum of a few units and then
falls with the flux, so that the brightest sources are missed. Algorithm 3 of F18 learns the noise without the source.
Its flux f has the standard deviation s = 1 / (throughput sqrt(a)) (see `source_fit.Fit`), and f / s grows with the flux
without limit; for a faint source it equals the SNR of the map, so that it has the null distribution of the map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import map_coordinates, maximum_filter

from pulmo_jax.core.geometry import rotation_deg
from pulmo_jax.evaluation.null_field import MAD_TO_STD, separation_map
from pulmo_jax.inference.search_noise import Noise
from pulmo_jax.methods.paco import LikelihoodMaps, Settings
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.coarse_fit import least_squares_map
from pulmo_jax.methods.paco.joint import SourceFit, fit_sources, prepare_channels
from pulmo_jax.methods.paco.spectral import Combination, Combined, combine

CLOSE = 4.0  # FWHM that a source moves, and its separation, below which it may hide in its own noise model
LOW_CLOSE = 1.0  # lowest significance of a candidate there; injections of any flux from the limit exceed it
MOST_CLOSE, LEAST_CLOSE = 12, 4  # highest candidates there: of one channel, and of many, whose SNR is combined
LOW_NULL = 2.0  # lowest significance of the peaks of the null that are fitted
MOST_NULL_PEAKS = 8  # highest peaks of the null that are fitted
MIN_PEAKS = 3  # smallest number of peaks of the null that measure their gain
MOST_FAR = 20  # highest peaks elsewhere that are fitted in a round
LOW_BRIGHT = 3.0  # lowest value of a candidate in the least-squares map, in units of its spread


@dataclass(frozen=True)
class Candidate:
    """A peak of the SNR map and the source fitted to it.

    Attributes:
        pixel: Row and column of the peak.
        snr: Highest SNR of the map at the peak or the fitted position, with brighter sources removed.
        flux: Flux b / a of the map at that pixel.
        flux_std: Standard deviation of that flux.
        template: Index of the spectrum with the highest SNR there.
        fit: Position and unbiased fluxes.
    """

    pixel: tuple[int, int]
    snr: float
    flux: float
    flux_std: float
    template: int
    fit: SourceFit


def peaks(
    significance: Float[np.ndarray, "H W"],
    bright: Float[np.ndarray, "H W"],
    channels: Channels,
    taken: Sequence[Candidate],
    threshold: float,
) -> list[tuple[int, int]]:
    """Select the local maxima that may be sources: of the SNR map, and near the star of the least-squares map, too.

    Args:
        significance: Significance of the SNR at every pixel; NaN where there is none.
        bright: Least-squares map in units of its spread (see `brightness`).
        channels: The observation.
        taken: Known sources; peaks within one FWHM of one are its residuals.
        threshold: Lowest significance of a source.

    Returns:
        Pixels (row, column).
    """
    close = is_close(channels)
    known = np.isfinite(significance)
    for source in taken:
        y, x = source.fit.place
        known &= separation_map(channels.shape, (float(y), float(x))) > channels.fwhm_px
    far = ranked(np.where(known & ~close, significance, -np.inf), threshold)
    most = max(LEAST_CLOSE, MOST_CLOSE // len(channels.each))  # a fit takes a time proportional to the channels
    faint = ranked(np.where(known & close, significance, -np.inf), min(LOW_CLOSE, threshold))
    strong = ranked(np.where(known & close, bright, -np.inf), LOW_BRIGHT)
    near = [*strong[: most // 3], *faint[: most - most // 3]]
    return [*far[:MOST_FAR], *dict.fromkeys(near)]


def ranked(values: Float[np.ndarray, "H W"], lowest: float) -> list[tuple[int, int]]:
    """Local maxima of at least a value, the highest first."""
    chosen = (values == maximum_filter(values, 3, mode="constant", cval=-np.inf)) & (values >= lowest)
    return sorted(((y, x) for y, x in np.argwhere(chosen).tolist()), key=lambda pixel: -values[pixel])


def brightness(channels: Channels, settings: Settings) -> Float[np.ndarray, "H W"]:
    """Sum of the least-squares maps of the channels, each in units of its robust spread at the same separation.

    The noise of these maps is large, but a source raises them in proportion to its flux.

    Args:
        channels: The observation, without the known sources.
        settings: Settings of the noise model.

    Returns:
        The map; 0 where a channel has no pixel at that separation.
    """
    separation = separation_map(channels.shape, channels.centre)
    total = np.zeros(channels.shape)
    for number, (stack, patch) in enumerate(zip(*prepare_channels(channels, settings), strict=True)):
        values = np.asarray(least_squares_map(stack, patch), float)
        pixels = np.moveaxis(np.indices(channels.shape), 0, -1).astype(float)
        rows, columns = channels.in_channel(number, pixels).T
        values = map_coordinates(values, (rows.T, columns.T), order=1)
        ring = (separation / channels.fwhm_px).astype(int)
        for k in range(ring.max() + 1):
            inside = ring == k
            middle = np.median(values[inside]) if inside.any() else 0.0
            spread = MAD_TO_STD * np.median(abs(values[inside] - middle)) if inside.any() else 0.0
            total[inside] += (values[inside] - middle) / spread if spread > 0 else 0.0
    return total / np.sqrt(len(channels.each))


def is_close(channels: Channels) -> Bool[np.ndarray, "H W"]:
    """Pixels at which a source stays in a few patches: its separation or its path is shorter than CLOSE FWHM."""
    return is_close_at(separation_map(channels.shape, channels.centre), channels)


def is_close_at(separation_px: Float[np.ndarray, "*shape"], channels: Channels) -> Bool[np.ndarray, "*shape"]:
    """Whether sources at given separations (px) are close to the star (see `is_close`)."""
    arc = max(np.deg2rad(rotation_deg(one.angles_deg)) for one in channels.each)
    return separation_px * min(1.0, float(arc)) <= CLOSE * channels.fwhm_px


def fit_candidates(
    channels: Channels,
    settings: Settings,
    maps: LikelihoodMaps,
    template: Int[np.ndarray, "H W"],
    pixels: Sequence[tuple[int, int]],
) -> list[Candidate]:
    """Fit a source to every peak, in one program.

    Args:
        channels: The observation, without the known sources.
        settings: Settings of the noise model and the maps.
        maps: Its maps, channels combined.
        template: Index of the best spectrum at every pixel.
        pixels: The peaks.

    Returns:
        A candidate for each peak.
    """
    if not pixels:
        return []
    fits = fit_sources(channels, settings, np.array(pixels, float))
    rows = []
    for pixel, fit in zip(pixels, fits, strict=True):
        at = highest_near(maps.snr, pixel, fit.place)
        rows.append(
            Candidate(
                pixel, float(maps.snr[at]), float(maps.flux[at]), float(maps.flux_std[at]), int(template[at]), fit
            )
        )
    return rows


def highest_near(
    snr: Float[np.ndarray, "H W"], pixel: tuple[int, int], place: Float[np.ndarray, "2"]
) -> tuple[int, int]:
    """Find the highest SNR among a peak and the 3 x 3 pixels at the source fitted to it, which may be another peak.

    Args:
        snr: SNR map.
        pixel: Row and column of the peak.
        place: Position (y, x) of the source, px; not finite if there is none.

    Returns:
        Row and column.
    """
    if not np.isfinite(place).all():
        return pixel
    near = np.round(place).astype(int) + np.array(list(np.ndindex(3, 3))) - 1
    near = near[((near >= 0) & (near < snr.shape)).all(1)]
    return max(
        [pixel, *((y, x) for y, x in near.tolist())], key=lambda at: snr[at] if np.isfinite(snr[at]) else -np.inf
    )


def debiased(fit: SourceFit, channels: Channels, combination: Combination) -> Combined:
    """Combine the unbiased fluxes of the channels, each with its standard deviation at a fixed position.

    Args:
        fit: A source.
        channels: The observation.
        combination: Combination of the channels; the spectrum with the highest SNR is chosen.

    Returns:
        The terms a, b and the spectrum: flux b / a of standard deviation 1 / sqrt(a).
    """
    units = np.array([one.unit for one in channels.each])
    root_a = np.array([float(one.throughput) * np.sqrt(float(one.a)) for one in fit.each]) / units
    a = np.where(np.isfinite(root_a) & (root_a > 0) & np.isfinite(fit.flux), root_a**2, np.nan)
    separation = np.array(np.hypot(*(fit.place - np.array(channels.centre))))
    return combine(a, a * fit.flux, separation, combination)


def significance_of(candidate: Candidate, channels: Channels, combination: Combination, noise: Noise) -> float:
    """Significance of a candidate in the null distribution at its separation.

    It is that of its SNR in the map, or of its debiased SNR divided by the gain of noise peaks, whichever is higher.

    Args:
        candidate: A fitted peak.
        channels: The observation.
        combination: Combination of the channels.
        noise: Noise of the search.

    Returns:
        The significance; -inf without a positive flux.
    """
    separation = float(np.hypot(*(candidate.fit.place - np.array(channels.centre))))
    snr = debiased_snr(candidate.fit, channels, combination)
    if not snr > 0:
        return -np.inf
    return float(noise.significance(max(candidate.snr, snr / noise.refit_gain), separation))


def debiased_snr(fit: SourceFit, channels: Channels, combination: Combination) -> float:
    """Combined debiased flux of a source over its standard deviation; NaN without one."""
    total = debiased(fit, channels, combination)
    return float(total.b / np.sqrt(total.a))


def refit_gain(channels: Channels, settings: Settings, combination: Combination, noise: Noise) -> float:
    """Measure by how much the debiased SNR of noise peaks exceeds their SNR in the map.

    A fit moves to the maximum between the pixels, and a noise model without a peak of the noise is a little quieter
    than one with it. The peaks of the null map are fitted as those of the map, with reversed angles.

    Args:
        channels: The observation, without the known sources.
        settings: Settings of the noise model and the maps.
        combination: Combination of the channels.
        noise: Its noise.

    Returns:
        Median ratio over the peaks near the star, at least 1; 1 for fewer than MIN_PEAKS.
    """
    mirrored = channels.but_with([replace(one, angles_deg=-one.angles_deg) for one in channels.each])
    values = noise.significance(noise.null.snr, separation_map(channels.shape, channels.centre))
    pixels = ranked(np.where(is_close(channels) & np.isfinite(values), values, -np.inf), LOW_NULL)[:MOST_NULL_PEAKS]
    if len(pixels) < MIN_PEAKS:
        return 1.0
    fits = fit_sources(mirrored, settings, np.array(pixels, float))
    snr = np.array([debiased_snr(fit, mirrored, combination) for fit in fits])
    ratios = snr / np.array([noise.null.snr[pixel] for pixel in pixels])
    ratios = ratios[np.isfinite(ratios)]
    return max(1.0, float(np.median(ratios))) if len(ratios) >= MIN_PEAKS else 1.0


def strongest(
    candidates: Sequence[Candidate],
    channels: Channels,
    combination: Combination,
    noise: Noise,
    taken: Sequence[Candidate],
) -> tuple[Candidate | None, float]:
    """Select the candidate of the highest significance that is not the residual of a known source.

    Args:
        candidates: Fitted peaks.
        channels: The observation.
        combination: Combination of the channels.
        noise: Noise of the search.
        taken: Known sources.

    Returns:
        The candidate and its significance; None and -inf without candidates.
    """
    best, highest = None, -np.inf
    for candidate in candidates:
        apart = [np.linalg.norm(candidate.fit.place - known.fit.place) > channels.fwhm_px for known in taken]
        value = significance_of(candidate, channels, combination, noise) if all(apart) else -np.inf
        if value > highest:
            best, highest = candidate, value
    return best, highest
