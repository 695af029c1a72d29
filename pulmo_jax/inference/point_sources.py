"""Detection of point sources in a rotating stack: iterative detection, fit and removal of the most significant source.

A stack has one channel for each wavelength; angular differential imaging has a single one (`methods.paco.channels`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pulmo_jax.evaluation.null_field import NullProfile, separation_map
from pulmo_jax.inference.candidates import (
    Candidate,
    brightness,
    fit_candidates,
    peaks,
    refit_gain,
    significance_of,
    strongest,
)
from pulmo_jax.inference.search_noise import Noise, correlation_of, noise_of, theoretical
from pulmo_jax.inference.source_properties import SourceSpectrum, describe
from pulmo_jax.inference.spectral_trials import trials_threshold, with_spread
from pulmo_jax.methods.paco import LikelihoodMaps, Observation, Settings
from pulmo_jax.methods.paco.channels import Channels, as_channels, channel_maps
from pulmo_jax.methods.paco.joint import SourceFit, fit_sources
from pulmo_jax.methods.paco.maps import footprint
from pulmo_jax.methods.paco.removal import without_sources
from pulmo_jax.methods.paco.spectral import Combination, as_spectra, combine_maps
from pulmo_jax.types import PointSource, ProgressTracker, Say

REFINEMENTS = 2  # rounds of fits of every source with all others removed
APART = 4.0  # FWHM between the separations of sources that do not affect each other
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
        noise: The noise that significance refers to.
        snr_calibrated: Gaussian significance of the SNR in the empirical null at its separation (Student's t).
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
    noise: Noise
    snr_calibrated: Float[np.ndarray, "H W"]
    n_patch: int
    caveats: tuple[str, ...]
    combination: Combination
    template: Int[np.ndarray, "H W"]
    spectra: list[SourceSpectrum]


class Residual(NamedTuple):
    """The stack without the known sources.

    Attributes:
        channels: The observation.
        maps: Its maps, channels combined.
        template: Index of the spectrum with the highest SNR at every pixel; -1 where there is none.
        noise: Its noise, from maps with reversed angles.
    """

    channels: Channels
    maps: LikelihoodMaps
    template: Int[np.ndarray, "H W"]
    noise: Noise


class Criterion(NamedTuple):
    """Criterion for peaks to be sources.

    Attributes:
        threshold: Minimum significance.
        calibrated: Whether the significance is that in the empirical null, or the theoretical SNR.
        max_sources: Maximum number of sources.
    """

    threshold: float
    calibrated: bool
    max_sources: int

    def noise(self, residual: Residual) -> Noise:
        """Noise that the significance refers to."""
        return residual.noise if self.calibrated else theoretical(residual.noise)


def find_sources(
    observation: Observation | Channels,
    settings: Settings,
    threshold: float = 5.0,
    calibrated: bool = True,
    max_sources: int = 20,
    north_deg: float = NORTH_DEG,
    say: Say = lambda text: None,
    track: ProgressTracker = lambda items, total: items,
    spectra: Float[np.ndarray, "M L"] | None = None,
) -> Search:
    """Detect, characterise and remove sources, the most significant first.

    In each round, the local maxima of the SNR map are refitted with a noise model that excludes them (see
    `inference.candidates`). The most significant one is a source if it reaches the threshold. It is removed from the
    stack, and the maps and the null are computed again. Sources that do not reach the threshold in the final null are
    discarded.

    Args:
        observation: Rotating stack of one or more channels.
        settings: Settings of the noise model and the maps.
        threshold: Minimum significance of a source with a single spectrum; with several it is raised (see
            `trials_threshold`) so that the false-alarm probability stays the same.
        calibrated: Whether the threshold applies to the significance in the empirical null (Student's t), or to the
            theoretical SNR.
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

    def survey(known: Sequence[Candidate], combination: Combination | None = None) -> tuple[Residual, Combination]:
        residual = without_sources(channels, [candidate.fit for candidate in known])
        each = channel_maps(residual, settings, track=track)
        say("null map with reversed angles" + " without the sources" * bool(known))
        nulls = channel_maps(residual, settings, reversed_angles=True, track=track)
        using = combination or with_spread(nulls, channels, Combination(*correlation_of(nulls, channels), spectra))
        maps, template = combine_maps(each, separation_map(channels.shape, channels.centre), using)
        return Residual(residual, maps, template, noise_of(nulls, channels, using)), using

    first, combination = survey([])
    threshold = trials_threshold(threshold, first.noise.trials)
    criterion = Criterion(threshold, calibrated, max_sources)
    current, found, fitted = first, list[Candidate](), dict[tuple[int, int], Candidate]()
    while len(found) < max_sources:
        best = next_source(current, settings, combination, criterion, found, fitted)
        if best is None:
            break
        found = refine(channels, settings, [*found, best], 1)
        say(f"a source near (y, x) = ({best.fit.place[0]:.1f}, {best.fit.place[1]:.1f})")
        fitted = far_from(best, fitted, channels)
        current, _ = survey(found, combination)
    reached_limit = len(found) == max_sources > 0
    if len(found) > 1:
        found = refine(channels, settings, found, REFINEMENTS - 1)
        current, _ = survey(found, combination)
    gain = refit_gain(current.channels, settings, combination, current.noise) if found else 1.0
    while found:
        noise = replace(criterion.noise(current), refit_gain=gain)
        values = [significance_of(one, channels, combination, noise) for one in found]
        if min(values) >= threshold:
            break
        found = refine(channels, settings, [one for k, one in enumerate(found) if k != int(np.argmin(values))], 1)
        current, _ = survey(found, combination)
    noise = replace(current.noise, refit_gain=gain)
    described = [
        describe(number + 1, candidate, current.channels, noise, combination, north_deg, threshold)
        for number, candidate in enumerate(found)
    ]
    caveats = (*channels.caveats, *(caveat for caveat in first.maps.caveats if caveat not in channels.caveats))
    if reached_limit:
        caveats += (f"the search stopped at {max_sources} sources; there may be more",)
    separation = separation_map(channels.shape, channels.centre)
    return Search(
        maps=first.maps,
        sources=[source for source, _ in described],
        fits=[candidate.fit for candidate in found],
        residual=current.channels,
        null=noise.null,
        profile=noise.profile,
        noise=noise,
        snr_calibrated=noise.significance(first.maps.snr, separation),
        n_patch=max(len(footprint(each.psf, settings.patch_radius_px)) for each in channels.each),
        caveats=caveats,
        combination=combination,
        template=first.template,
        spectra=[spectrum for _, spectrum in described],
    )


def next_source(
    residual: Residual,
    settings: Settings,
    combination: Combination,
    criterion: Criterion,
    found: Sequence[Candidate],
    fitted: dict[tuple[int, int], Candidate],
) -> Candidate | None:
    """Find the most significant source of a residual stack.

    Args:
        residual: The stack without the known sources.
        settings: Settings of the noise model and the maps.
        combination: Combination of the channels.
        criterion: Criterion for sources.
        found: Known sources.
        fitted: Candidates fitted in earlier rounds that no known source affects; extended by this round's.

    Returns:
        The source; None if no candidate reaches the threshold.
    """
    channels, noise = residual.channels, criterion.noise(residual)
    significance = noise.significance(residual.maps.snr, separation_map(channels.shape, channels.centre))
    pixels = peaks(significance, brightness(channels, settings), channels, found, criterion.threshold)
    new = [pixel for pixel in pixels if pixel not in fitted]
    fitted |= {one.pixel: one for one in fit_candidates(channels, settings, residual.maps, residual.template, new)}
    best, value = strongest([fitted[pixel] for pixel in pixels], channels, combination, noise, found)
    return best if value >= criterion.threshold else None


def far_from(
    source: Candidate, fitted: dict[tuple[int, int], Candidate], channels: Channels
) -> dict[tuple[int, int], Candidate]:
    """Keep the candidates whose separation differs from that of a source by more than APART FWHM.

    Their patches and those of the source never overlap, so that its removal does not change them.
    """

    def separation(candidate: Candidate) -> float:
        return float(np.linalg.norm(candidate.fit.place - np.array(channels.centre)))

    limit = APART * channels.fwhm_px
    return {pixel: one for pixel, one in fitted.items() if abs(separation(one) - separation(source)) > limit}


def refine(channels: Channels, settings: Settings, found: Sequence[Candidate], rounds: int) -> list[Candidate]:
    """Fit every source again with all others removed; a single source is unchanged.

    Args:
        channels: The observation.
        settings: Settings of the noise model and the maps.
        found: Sources.
        rounds: Number of rounds.

    Returns:
        Sources with new fits.
    """
    found = list(found)
    for _ in range(rounds * (len(found) > 1)):
        fits = []
        for number, candidate in enumerate(found):
            others = [other.fit for k, other in enumerate(found) if k != number]
            fits += fit_sources(without_sources(channels, others), settings, candidate.fit.place[None])
        found = [replace(candidate, fit=fit) for candidate, fit in zip(found, fits, strict=True)]
    return found
