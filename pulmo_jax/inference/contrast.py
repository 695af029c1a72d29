"""Contrast curves: the fluxes at which sources injected at a separation are detected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pulmo_jax.inference.candidates import LOW_BRIGHT, LOW_CLOSE, brightness, debiased, is_close_at
from pulmo_jax.inference.point_sources import Search
from pulmo_jax.inference.search_noise import Noise, theoretical
from pulmo_jax.inference.spectral_trials import trials_threshold
from pulmo_jax.methods.paco import Settings
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.joint import Injected, Prepared, fit_sources, is_near, prepare_channels
from pulmo_jax.methods.paco.removal import with_injection
from pulmo_jax.methods.paco.spectral import Combination, combine
from pulmo_jax.methods.paco.stack import Stack
from pulmo_jax.methods.paco.tracks import inject_channels
from pulmo_jax.types import ProgressTracker

ROUNDS = 4  # of injections, each at the limit that the one before it found; the first at threshold / sqrt(a)
LARGEST_STEP = 4.0  # largest factor between the fluxes of two rounds
NEAR_ENOUGH = 0.1  # relative distance from the threshold within which a limit counts as reached
GOLDEN_ANGLE = np.pi * (3 - 5**0.5)  # rotates each ring against the one before, so that no direction is favoured
MULTIPLES = (1.0, 10.0, 100.0, 1e4)  # of the limit, at which detection is tested
HALF, MOST = 0.5, 0.95  # shares of the directions
AROUND_PX = 1.5  # distance from a source at which its peak in the map is looked for, besides its own position
N_AROUND = 6
REFERENCE = 1  # index of the multiple at which the limit of the fits is measured

Terms = tuple[Float[np.ndarray, "R N"], Float[np.ndarray, "R N"]]
Injection = Callable[..., Terms]  # from fluxes (R, N) to a and b of sources at fixed positions (see `injections`)


@dataclass(frozen=True, eq=False)
class Contrast:
    """Fluxes of injected sources that the search detects, in R rings around the centre, in units of the PSF.

    The fluxes tested in a ring are `MULTIPLES` of its limit. A range starts at a limit and ends at the highest tested
    flux up to which all are detected in the same share of the directions. NaN: no flux is detected in so many.

    Attributes:
        separation_px: Radius of each ring, px.
        threshold: Theoretical SNR that has the significance of a detection there.
        limit: threshold / sqrt(a): the limit if the source were not part of its noise statistics.
        half_low: Lowest flux detected in half of the directions.
        half_high: Highest tested flux detected in half of the directions.
        most_low: Lowest flux detected in 95 % of the directions.
        most_high: Highest tested flux detected in 95 % of the directions.
        tested_high: Highest tested flux.
        flux_throughput: Fraction of the flux of an injected source that b / a recovers near the limit.
        flux_throughput_std: Its standard deviation over the directions.
        n: Number of directions used.
    """

    separation_px: Float[np.ndarray, "R"]
    threshold: Float[np.ndarray, "R"]
    limit: Float[np.ndarray, "R"]
    half_low: Float[np.ndarray, "R"]
    half_high: Float[np.ndarray, "R"]
    most_low: Float[np.ndarray, "R"]
    most_high: Float[np.ndarray, "R"]
    tested_high: Float[np.ndarray, "R"]
    flux_throughput: Float[np.ndarray, "R"]
    flux_throughput_std: Float[np.ndarray, "R"]
    n: Float[np.ndarray, "R"]


@dataclass(frozen=True, eq=False)
class Rings:
    """Positions of the injections and their criterion of detection.

    Attributes:
        places: Positions (y, x) on the sky, px.
        separations: Radius of each ring, px.
        levels: SNR that has the significance of a detection.
        lowest: SNR that a candidate for a refit needs; infinite far from the star, where none is refitted.
        seen: Positions that some frame covers.
    """

    places: Float[np.ndarray, "R N 2"]
    separations: Float[np.ndarray, "R"]
    levels: Float[np.ndarray, "R 1"]
    lowest: Float[np.ndarray, "R 1"]
    seen: Bool[np.ndarray, "R N"]


def contrast_curve(
    search: Search,
    settings: Settings,
    threshold: float = 5.0,
    calibrated: bool = True,
    n_directions: int = 8,
    n_rings: int = 12,
    track: ProgressTracker = lambda items, total: items,
) -> Contrast:
    """Inject sources into the residual of a search, and apply the criterion of the search to them.

    A source is detected by its SNR in the map, or, near the star, by a refit of the peak that it makes there.

    Args:
        search: Result of the search.
        settings: Settings of the noise model.
        threshold: Minimum significance of a source.
        calibrated: Whether the significance is that in the empirical null, or the theoretical SNR.
        n_directions: Number of injections in each ring, N.
        n_rings: Largest number of rings.
        track: Shows progress over an iterable of known length.

    Returns:
        The fluxes that are detected; rings that no frame covers are omitted. Sources have the first spectrum of the
        search, and fluxes are means over the channels.
    """
    channels, using = search.residual, search.combination.only(0)
    noise = search.noise if calibrated else theoretical(search.noise)
    threshold = trials_threshold(threshold, search.noise.trials)
    prepared = prepare_channels(channels, settings)
    separations = common_separations(channels, prepared[0], n_rings)
    angle = 2 * np.pi * np.arange(n_directions) / n_directions + np.arange(len(separations))[:, None] * GOLDEN_ANGLE
    places = np.array(channels.centre) + separations[:, None, None] * np.stack([np.sin(angle), np.cos(angle)], -1)
    inject = injections(channels, prepared, places, using)
    a, b = inject(np.zeros(angle.shape))
    close = is_close_at(separations, channels)
    rings = Rings(
        places=places,
        separations=separations,
        levels=ratios(noise, threshold, separations),
        lowest=np.where(close[:, None], ratios(noise, min(LOW_CLOSE, threshold), separations), np.inf),
        seen=a > 0,
    )
    start = np.where(rings.seen, a, 1), np.where(rings.seen, b, 0)
    near = all(is_near(channels, separation) for separation in separations[close])
    refits = Refits(channels, settings, using, noise, prepare_channels(channels, settings, near))
    return measured(rings, start, inject, refits, track)


def ratios(noise: Noise, significance: float, separations: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R 1"]:
    """SNR of a given significance at every separation."""
    return np.array([noise.ratio_at(significance, float(separation)) for separation in separations])[:, None]


@dataclass(frozen=True, eq=False)
class Refits:
    """Refits of injected sources.

    Attributes:
        channels: The observation without the known sources.
        settings: Settings of the noise model.
        using: Combination of the channels, with the spectrum of the injected sources.
        noise: Noise of the search.
        prepared: Arrays and static settings of the channels, for positions near the star.
    """

    channels: Channels
    settings: Settings
    using: Combination
    noise: Noise
    prepared: Prepared

    def peak(
        self, places: Float[np.ndarray, "R N 2"], fluxes: Float[np.ndarray, "R N"]
    ) -> tuple[Float[np.ndarray, "R N"], Float[np.ndarray, "R N 2"]]:
        """Highest SNR of the map at an injected source or around it, where the peak of a bright one lies, and place."""
        if not len(places):
            return np.zeros(fluxes.shape), places
        inject = injections(self.channels, self.prepared, places, self.using)
        angles = 2 * np.pi * np.arange(N_AROUND) / N_AROUND
        offsets = [(0.0, 0.0), *zip(AROUND_PX * np.sin(angles), AROUND_PX * np.cos(angles), strict=True)]
        snr = np.array([snr_of(inject(fluxes, offset)) for offset in offsets])
        return snr.max(0), places + np.array(offsets)[snr.argmax(0)]

    def bright(self, places: Float[np.ndarray, "R 2"], fluxes: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R"]:
        """Value of the least-squares map at each of R injected sources, in units of its spread."""
        found = []
        for place, flux in zip(places, fluxes, strict=True):
            injected = with_injection(self.channels, place, flux * self.using.spectra[0])
            y, x = np.round(place).astype(int)
            found.append(brightness(injected, self.settings)[y, x])
        return np.array(found)

    def snr(
        self, places: Float[np.ndarray, "N 2"], fluxes: Float[np.ndarray, "N"], peaks: Float[np.ndarray, "N 2"]
    ) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
        """Inject sources one by one, and refit the peak of each.

        Args:
            places: Positions (y, x) on the sky, px.
            fluxes: Fluxes in units of the PSF, means over the channels.
            peaks: Positions of their peaks in the map, px.

        Returns:
            Debiased SNR of noise peaks of the same significance, and its increase with the flux; 0 if the fit is
            farther than one FWHM from the source.
        """
        if not len(places):
            return np.zeros(0), np.zeros(0)
        injected = Injected(places, fluxes[:, None] * self.using.spectra[0])
        fits = fit_sources(self.channels, self.settings, np.round(peaks), injected)
        rows = []
        for place, fit in zip(places, fits, strict=True):
            total = debiased(fit, self.channels, self.using)
            root_a, b = float(np.sqrt(total.a)), float(total.b)
            near = np.linalg.norm(fit.place - place) < self.channels.fwhm_px and root_a > 0
            rows.append((b / root_a, root_a) if near else (0.0, 0.0))
        snr, slope = np.array(rows).T / self.noise.refit_gain
        return snr, slope


def measured(rings: Rings, start: Terms, inject: Injection, refits: Refits, track: ProgressTracker) -> Contrast:
    """Measure the limits of every ring, then detection at multiples of them.

    Args:
        rings: Positions and criterion.
        start: Terms a and b without sources.
        inject: Function from fluxes to a and b.
        refits: Refits of injected sources.
        track: Shows progress over an iterable of known length.

    Returns:
        The contrast of the rings that some frame covers.
    """
    raw, seen = rings.levels / np.sqrt(start[0]), rings.seen
    by_map, linear, flux_share = limits_in_map(rings, start, inject, track)
    typical = np.where(np.isfinite(by_map), by_map, linear)
    medians = [np.median(row[ok]) if ok.any() else 1.0 for row, ok in zip(typical, seen, strict=True)]
    reference = np.array(medians)[:, None] * np.ones_like(raw)
    close = np.isfinite(rings.lowest[:, 0])
    by_fit, found = np.full(raw.shape, np.inf), np.zeros((len(MULTIPLES), *raw.shape), bool)
    for number, multiple in track(list(enumerate(MULTIPLES)), len(MULTIPLES)):
        fluxes = multiple * reference
        found[number] = seen & (snr_of(inject(fluxes)) >= rings.levels)
        if number < REFERENCE:
            continue
        candidate, peaks = np.zeros(raw.shape, bool), rings.places.copy()
        height, peaks[close] = refits.peak(rings.places[close], fluxes[close])
        strong = refits.bright(rings.places[close, 0], fluxes[close, 0]) >= LOW_BRIGHT
        candidate[close] = (height >= rings.lowest[close]) | strong[:, None]
        hidden = seen & candidate & (~found[number] | (number == REFERENCE))
        snr, slope = refits.snr(rings.places[hidden], fluxes[hidden], peaks[hidden])
        level = np.broadcast_to(rings.levels, raw.shape)[hidden]
        found[number][hidden] |= snr >= level
        if number == REFERENCE:  # the debiased SNR is linear in the flux
            limit = fluxes[hidden] - (snr - level) / np.where(slope > 0, slope, np.nan)
            by_fit[hidden] = np.where(limit > 0, limit, np.inf)
    at_limit, _ = refits.peak(rings.places[close], np.where(np.isfinite(by_fit), by_fit, 0)[close])
    at_least = np.where(np.isfinite(by_fit), by_fit, np.inf)[close].min(1, initial=np.inf)
    strong = refits.bright(rings.places[close, 0], np.where(np.isfinite(at_least), at_least, 0)) >= LOW_BRIGHT
    by_fit[close] = np.where((at_limit >= rings.lowest[close]) | strong[:, None], by_fit[close], np.inf)
    limits = np.where(seen, np.minimum(by_map, by_fit), np.nan)
    found[:REFERENCE] |= reference * np.array(MULTIPLES[:REFERENCE])[:, None, None] >= limits
    rows = [
        (
            separation, float(level[0]), float(np.median(raw_limit[seen])),
            *range_of(limit[seen], fluxes, found_[:, seen], HALF),
            *range_of(limit[seen], fluxes, found_[:, seen], MOST),
            fluxes[-1], float(share[seen].mean()), float(share[seen].std()), int(seen.sum()),
        )
        for separation, level, raw_limit, limit, fluxes, found_, share, seen in zip(
            rings.separations, rings.levels, raw, limits, reference[:, :1] * MULTIPLES, np.moveaxis(found, 1, 0),
            flux_share, rings.seen, strict=True,
        )
        if seen.any()
    ]  # fmt: skip
    return Contrast(*(np.array(rows).T if rows else np.zeros((11, 0))))


def snr_of(terms: Terms) -> Float[np.ndarray, "R N"]:
    """SNR from the terms a and b; -inf where no frame covers the position."""
    a, b = terms
    return np.where(a > 0, b / np.sqrt(np.where(a > 0, a, 1)), -np.inf)


def limits_in_map(
    rings: Rings, start: Terms, inject: Injection, track: ProgressTracker
) -> tuple[Float[np.ndarray, "R N"], Float[np.ndarray, "R N"], Float[np.ndarray, "R N"]]:
    """Find the flux at which the SNR in the map reaches the level of a detection.

    Self-subtraction depends on the injected flux, so that all rings are injected ROUNDS times, ending at the limit.

    Args:
        rings: Positions and criterion.
        start: Terms a and b without sources.
        inject: Function from fluxes to a and b.
        track: Shows progress over an iterable of known length.

    Returns:
        The limit, infinite where no flux reaches the level; its linear extrapolation from a faint source; and the
        fraction of the flux that b / a recovers.
    """
    a, b = start
    base, flux_base = b / np.sqrt(a), b / a
    needed = np.maximum(rings.levels - base, rings.levels / LARGEST_STEP)
    fluxes = needed / np.sqrt(a)
    linear = limit = fluxes
    gain = flux_share = np.zeros(fluxes.shape)
    for number in track(range(ROUNDS), ROUNDS):
        a_with, b_with = (np.where(rings.seen, part, 1) for part in inject(fluxes))
        gain, flux_share = b_with / np.sqrt(a_with) - base, (b_with / a_with - flux_base) / fluxes
        step = np.clip(needed / np.maximum(gain, needed / LARGEST_STEP), 1 / LARGEST_STEP, LARGEST_STEP)
        limit = fluxes * needed / np.where(gain > 0, gain, np.nan)
        linear = np.nan_to_num(limit, nan=np.nanmax(fluxes)) if number == 0 else linear
        fluxes = fluxes * step
    return np.where(abs(gain / needed - 1) < NEAR_ENOUGH, limit, np.inf), linear, flux_share


def range_of(
    limits: Float[np.ndarray, "N"], fluxes: Float[np.ndarray, "M"], detected: Bool[np.ndarray, "M N"], share: float
) -> tuple[float, float]:
    """Range of fluxes that are detected in a share of the directions of a ring.

    Args:
        limits: Lowest flux detected in each direction; infinite where none is.
        fluxes: Tested fluxes, ascending.
        detected: Whether each is detected in each direction.
        share: Share of the directions.

    Returns:
        The limit reached in that share, and the highest tested flux up to which all above the limit are detected in
        it; NaN without any.
    """
    low = float(np.sort(limits)[int(np.ceil(share * len(limits))) - 1])
    if not np.isfinite(low):
        return float("nan"), float("nan")
    above = [(flux, found.mean() >= share) for flux, found in zip(fluxes, detected, strict=True) if flux > low]
    high = low
    for flux, enough in above:
        if not enough:
            break
        high = float(flux)
    return low, high


def common_separations(channels: Channels, stacks: Sequence[Stack], n_rings: int) -> Float[np.ndarray, "R"]:
    """Radii of the rings on the sky, from the channel with the smallest field.

    Args:
        channels: Observations of all channels.
        stacks: Prepared stack of each channel.
        n_rings: Largest number of rings.

    Returns:
        Radii of R rings, px.
    """
    each = []
    for observation, scale, stack in zip(channels.each, channels.scales, stacks, strict=True):
        whole = np.asarray(stack.whole).reshape(observation.shape)
        fwhm_px = channels.fwhm_px * float(scale)
        each.append(ring_separations(whole, observation.centre, fwhm_px, n_rings) / scale)
    return min(each, key=lambda separations: separations[-1])


def injections(
    channels: Channels, prepared: Prepared, places: Float[np.ndarray, "R N 2"], using: Combination
) -> Injection:
    """Function from fluxes to a and b of sources injected at fixed positions, channels combined.

    Args:
        channels: The observation.
        prepared: Its arrays and static settings.
        places: Positions (y, x) on the sky, px.
        using: How the channels are combined.

    Returns:
        The function of the fluxes and of the offset (y, x) from the source, px, at which a and b are computed; every
        call is one program and one transfer.
    """
    flat = places.reshape(-1, 2)
    units = np.array([observation.unit for observation in channels.each])[:, None]
    shares = using.spectra[0][:, None] / units
    dtype = prepared[0][0].deviations.dtype

    def in_channels(points: np.ndarray) -> Array:
        return jnp.asarray(np.stack([channels.in_channel(k, points) for k in range(len(units))]), dtype)

    def with_sources(fluxes: np.ndarray, offset: tuple[float, float] = (0.0, 0.0)) -> Terms:
        at = flat + np.array(offset)
        scaled = jnp.asarray(fluxes.ravel() * shares, dtype)
        terms = inject_channels(*prepared, in_channels(flat), scaled, in_channels(at))
        a, b = (part.astype(float) for part in jax.device_get(terms))
        separation = np.linalg.norm(at - np.array(channels.centre), axis=-1)
        combined = combine(a / units**2, b / units, separation, using)
        a, b = (np.nan_to_num(part).reshape(fluxes.shape) for part in (combined.a, combined.b))
        return a, b

    return with_sources


def ring_separations(
    whole: Bool[np.ndarray, "H W"], centre: tuple[float, float], fwhm: float, n: int
) -> Float[np.ndarray, "R"]:
    """Radii of rings from one FWHM to the largest circle within the field, at least one FWHM apart.

    Args:
        whole: Pixels on which a patch can be centred.
        centre: Centre of rotation (y, x), px.
        fwhm: FWHM of the PSF, px.
        n: Largest number of rings.

    Returns:
        The radii, px.
    """
    y, x = np.nonzero(whole)
    farthest = min(centre[0] - y.min(), y.max() - centre[0], centre[1] - x.min(), x.max() - centre[1])
    count = int(np.clip((farthest - fwhm) // fwhm + 1, 1, n))
    return np.linspace(min(fwhm, max(farthest, 1)), max(farthest, 1), count)


def throughput_map(contrast: Contrast, shape: tuple[int, int], centre: tuple[float, float]) -> Float[np.ndarray, "H W"]:
    """Flux throughput at every pixel, interpolated in its separation from the centre.

    Args:
        contrast: Contrast curve.
        shape: Height and width of the map in px.
        centre: Centre of rotation (y, x), px.

    Returns:
        Throughput map.
    """
    y, x = np.indices(shape)
    return np.interp(np.hypot(y - centre[0], x - centre[1]), contrast.separation_px, contrast.flux_throughput)
