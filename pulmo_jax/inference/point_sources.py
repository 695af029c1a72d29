"""Detection of point sources in a rotating stack: iterative detection, fit and removal of the brightest source.

A stack has one channel for each wavelength; angular differential imaging has a single one (`methods.paco.channels`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pulmo_jax.evaluation.null_field import NullProfile, separation_map
from pulmo_jax.inference.blank_positions import blank_places, blank_terms, error_factor
from pulmo_jax.inference.search_noise import Noise, correlation_of, noise_of
from pulmo_jax.inference.source_properties import Candidate, SourceSpectrum, describe, probability_of
from pulmo_jax.methods.paco import LikelihoodMaps, Observation, Settings
from pulmo_jax.methods.paco.channels import Channels, as_channels, channel_maps
from pulmo_jax.methods.paco.joint import SourceFit, fit_source, launch_fit, read_fit
from pulmo_jax.methods.paco.maps import footprint
from pulmo_jax.methods.paco.removal import subtract, without, without_sources
from pulmo_jax.methods.paco.spectral import Combination, as_spectra, combine_maps
from pulmo_jax.types import PointSource, ProgressTracker, Say

__all__ = [
    "NORTH_DEG", "Candidate", "Noise", "Search", "SourceSpectrum", "error_factor", "find_sources", "highest",
    "probability_of", "subtract", "without", "without_sources",
]  # fmt: skip

REFINEMENTS = 2  # rounds of fits of every source with all others removed
NORTH_DEG = 90.0  # direction of north, +y, in the derotated map, degrees from the x axis toward y


@dataclass(frozen=True, eq=False)
class Search:
    """Result of a search.

    Attributes:
        maps: Maps of the original stack, channels combined.
        sources: Sources, brightest first.
        fits: Position and unbiased fluxes of each source.
        residual: The stack without the sources.
        null: Source-free noise maps: maps of the residual with reversed angles, computed in the same way.
        profile: Standard deviation of the null SNR by separation.
        snr_calibrated: SNR divided by that standard deviation.
        n_patch: Number of pixels of a patch.
        caveats: Limitations of the results.
        combination: Combination of the channels.
        template: Index of the spectrum with the highest SNR at every pixel; -1 where there is none.
        spectra: Spectrum of each source.
    """

    maps: LikelihoodMaps
    sources: list[PointSource]
    fits: list[SourceFit]
    residual: Channels
    null: LikelihoodMaps
    profile: NullProfile
    snr_calibrated: Float[np.ndarray, "H W"]
    n_patch: int
    caveats: tuple[str, ...]
    combination: Combination
    template: Int[np.ndarray, "H W"]
    spectra: list[SourceSpectrum]


class Rule(NamedTuple):
    """Criterion for peaks to be sources.

    Attributes:
        threshold: Minimum SNR of a source, in units of `spread`.
        spread: Standard deviation of the null SNR at every pixel; 1 for the theoretical SNR.
        max_sources: Maximum number of sources.
    """

    threshold: float
    spread: Float[np.ndarray, "H W"]
    max_sources: int


def find_sources(
    observation: Observation | Channels,
    settings: Settings,
    threshold: float = 5.0,
    calibrated: bool = False,
    max_sources: int = 20,
    north_deg: float = NORTH_DEG,
    say: Say = lambda text: None,
    track: ProgressTracker = lambda items, total: items,
    spectra: Float[np.ndarray, "M L"] | None = None,
) -> Search:
    """Detect, characterise and remove sources, brightest first.

    Args:
        observation: Rotating stack of one or more channels.
        settings: Settings of the noise model and the maps.
        threshold: Minimum SNR of a source.
        calibrated: Whether the threshold applies to the SNR divided by the spread of the empirical null.
        max_sources: Maximum number of sources.
        north_deg: Direction of north in the derotated map, degrees from the x axis toward y.
        say: Called with a line of text before each stage.
        track: Shows progress over an iterable of known length.
        spectra: Spectra of possible sources, for each of the channels given; at every pixel, the one with the highest
            SNR is selected. A flat one by default.

    Returns:
        Sources, maps, residual and null. A peak within one FWHM of a known source is regarded as a residual of that
        source.

    Raises:
        InputError: If a spectrum does not fit the channels, or no patch fits into the frames.
    """
    channels = as_channels(observation)
    spectra = as_spectra(spectra, len(channels.kept))[:, channels.kept]
    each = channel_maps(channels, settings, track=track)
    say("null map with reversed angles")
    nulls = channel_maps(channels, settings, reversed_angles=True, track=track)
    combination = Combination(*correlation_of(nulls, channels), spectra)
    noise = noise_of(nulls, channels, combination)
    separation = separation_map(channels.shape, channels.centre)
    spread = noise.profile.std_at(separation) if calibrated else np.ones(channels.shape)
    rule = Rule(threshold, spread, max_sources)
    maps, template = combine_maps(each, separation, combination)
    found = search_peaks(channels, settings, (maps, template), combination, rule, say, track)
    found = refine(channels, settings, found)
    residual = without_sources(channels, [candidate.fit for candidate in found])
    if found:
        say("null map without the sources")
        noise = noise_of(channel_maps(residual, settings, reversed_angles=True, track=track), channels, combination)
    described = describe_all(found, residual, settings, noise, combination, north_deg)
    caveats = (*channels.caveats, *(caveat for caveat in maps.caveats if caveat not in channels.caveats))
    if len(found) == max_sources:
        caveats += (f"the search stopped at {max_sources} sources; there may be more",)
    return Search(
        maps=maps,
        sources=[source for source, _ in described],
        fits=[candidate.fit for candidate in found],
        residual=residual,
        null=noise.null,
        profile=noise.profile,
        snr_calibrated=maps.snr / noise.profile.std_at(separation),
        n_patch=max(len(footprint(each.psf, settings.patch_radius_px)) for each in channels.each),
        caveats=caveats,
        combination=combination,
        template=template,
        spectra=[spectrum for _, spectrum in described],
    )


def search_peaks(
    channels: Channels,
    settings: Settings,
    maps: tuple[LikelihoodMaps, Int[np.ndarray, "H W"]],
    combination: Combination,
    rule: Rule,
    say: Say,
    track: ProgressTracker,
) -> list[Candidate]:
    """Detect sources iteratively: fit a source to the highest SNR peak, remove it, and compute the maps again.

    Args:
        channels: The observation.
        settings: Settings of the noise model and the maps.
        maps: Maps of the observation, channels combined, and the index of the best spectrum at every pixel.
        combination: Combination of the channels.
        rule: Criterion for sources.
        say: Called with a line of text for every source.
        track: Shows progress over an iterable of known length.

    Returns:
        Sources in the order of detection.
    """
    separation = separation_map(channels.shape, channels.centre)
    (current, template), residual = maps, channels
    found: list[Candidate] = []
    free = np.ones(channels.shape, bool)
    while len(found) < rule.max_sources:
        if (pixel := highest(current.snr / rule.spread, free, rule.threshold)) is None:
            break
        say(f"a source near (y, x) = {pixel}, SNR {current.snr[pixel]:.1f}")
        fit = fit_source(residual, settings, np.array(pixel, float))
        snr, flux, flux_std = (float(values[pixel]) for values in (current.snr, current.flux, current.flux_std))
        found.append(Candidate(pixel, snr, flux, flux_std, int(template[pixel]), fit))
        free &= separation_map(channels.shape, (float(pixel[0]), float(pixel[1]))) > channels.fwhm_px
        residual = without_sources(channels, [candidate.fit for candidate in found])
        current, template = combine_maps(channel_maps(residual, settings, track=track), separation, combination)
    return found


def highest(snr: Float[np.ndarray, "H W"], free: Bool[np.ndarray, "H W"], threshold: float) -> tuple[int, int] | None:
    """Pixel with the highest value among the free ones; None if the value is below the threshold."""
    values = np.where(free & np.isfinite(snr), snr, -np.inf)
    y, x = np.unravel_index(values.argmax(), values.shape)
    return (int(y), int(x)) if values[y, x] >= threshold else None


def refine(channels: Channels, settings: Settings, found: Sequence[Candidate]) -> list[Candidate]:
    """Fit every source again with all others removed, in REFINEMENTS rounds; a single source is unchanged.

    The fits of a round are dispatched together and read together.

    Args:
        channels: The observation.
        settings: Settings of the noise model and the maps.
        found: Sources.

    Returns:
        Sources with new fits.
    """
    found = list(found)
    for _ in range(REFINEMENTS * (len(found) > 1)):
        started = []
        for number, candidate in enumerate(found):
            others = [other.fit for k, other in enumerate(found) if k != number]
            started.append(launch_fit(without_sources(channels, others), settings, candidate.fit.place))
        fits = [read_fit(channels, fit) for fit in started]
        found = [replace(candidate, fit=fit) for candidate, fit in zip(found, fits, strict=True)]
    return found


def describe_all(
    found: Sequence[Candidate],
    residual: Channels,
    settings: Settings,
    noise: Noise,
    combination: Combination,
    north_deg: float,
) -> list[tuple[PointSource, SourceSpectrum]]:
    """Characterise every source with the scatter of the flux at blank positions (see `describe`)."""
    places = [candidate.fit.place for candidate in found]
    blanks = blank_terms(residual, settings, [blank_places(residual, place, places) for place in places])
    return [
        describe(number + 1, candidate, residual, terms, noise, combination, north_deg)
        for number, (candidate, terms) in enumerate(zip(found, blanks, strict=True))
    ]
