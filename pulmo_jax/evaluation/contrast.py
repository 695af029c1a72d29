"""Contrast curves: the flux at which half of the sources injected at a separation are detected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from pulmo_jax.evaluation.null_field import NullProfile
from pulmo_jax.methods.paco import Observation, Settings
from pulmo_jax.methods.paco.channels import Channels, as_channels
from pulmo_jax.methods.paco.joint import prepare_channels
from pulmo_jax.methods.paco.spectral import Combination, combine, independent
from pulmo_jax.methods.paco.stack import Patch, Stack
from pulmo_jax.methods.paco.tracks import inject, inject_channels
from pulmo_jax.types import ProgressTracker

ROUNDS = 5  # of injections, each at the limit that the one before it found; the first at threshold / sqrt(a)
LARGEST_STEP = 4.0  # largest factor between the fluxes of two rounds
NEAR_ENOUGH = 0.1  # relative distance from the threshold within which a limit counts as reached
GOLDEN_ANGLE = np.pi * (3 - 5**0.5)  # rotates each ring against the one before, so that no direction is favoured

Terms = tuple[Float[np.ndarray, "R N"], Float[np.ndarray, "R N"]]
Injected = Callable[[Float[np.ndarray, "R N"]], Terms]  # from fluxes to a and b of sources injected at fixed positions
Limit = tuple[float, float, float, float, float, float, int]


@dataclass(frozen=True, eq=False)
class Contrast:
    """Detection limits of R rings around the centre, each the median over its directions.

    Attributes:
        separation_px: Radius of each ring, px.
        threshold: Lowest SNR of a detection.
        limit: threshold / sqrt(a), in units of the PSF: the limit if the source were not part of its noise statistics.
        limit_corrected: limit / throughput, the flux at which the SNR is on average the threshold, so that half of the
            sources are detected; NaN where no flux reaches it.
        throughput: Fraction of the SNR of an injected source that is recovered at the limit; mean over directions.
        throughput_std: Its standard deviation over the directions.
        flux_throughput: Fraction of the flux of an injected source that b / a recovers.
        flux_throughput_std: Its standard deviation over the directions.
        n: Number of directions used.
    """

    separation_px: Float[np.ndarray, "R"]
    threshold: Float[np.ndarray, "R"]
    limit: Float[np.ndarray, "R"]
    limit_corrected: Float[np.ndarray, "R"]
    throughput: Float[np.ndarray, "R"]
    throughput_std: Float[np.ndarray, "R"]
    flux_throughput: Float[np.ndarray, "R"]
    flux_throughput_std: Float[np.ndarray, "R"]
    n: Float[np.ndarray, "R"]


def contrast_curve(
    observation: Observation | Channels,
    settings: Settings,
    threshold: float = 5.0,
    n_directions: int = 12,
    n_rings: int = 12,
    null: NullProfile | None = None,
    track: ProgressTracker = lambda items, total: items,
    using: Combination | None = None,
) -> Contrast:
    """Inject sources at the detection limit and measure their throughput.

    Self-subtraction depends on the injected flux, so all rings are injected ROUNDS times, ending at the limit.

    Args:
        observation: A rotating stack without its known sources, of one channel or several.
        settings: Settings of the noise model.
        threshold: Lowest SNR of a detection.
        n_directions: Number of injections on each ring, N.
        n_rings: Largest number of rings.
        null: Spread of the empirical null, if detections are thresholded in calibrated SNR.
        track: Shows progress over an iterable of known length.
        using: Combination of the channels; sources have the first of its spectra, and fluxes are means over the
            channels. By default channels are independent and the spectrum is flat.

    Returns:
        The limits; rings that no frame covers are omitted.
    """
    channels = as_channels(observation)
    using = (using or independent(np.ones((1, len(channels.each))))).only(0)
    stacks, patches = prepare_channels(channels, settings)
    separations = common_separations(channels, stacks, n_rings)
    angle = 2 * np.pi * np.arange(n_directions) / n_directions + np.arange(len(separations))[:, None] * GOLDEN_ANGLE
    offsets = separations[:, None, None] * np.stack([np.sin(angle), np.cos(angle)], -1)
    levels = threshold * (np.ones_like(separations) if null is None else null.std_at(separations))
    with_sources = injections(channels, (stacks, patches), np.array(channels.centre) + offsets, using)
    found = limits_of(with_sources, (len(separations), n_directions), levels, track)
    rows = [
        (separation, level, *limit)
        for separation, level, limit in zip(separations, levels, found, strict=True)
        if limit is not None
    ]
    return Contrast(*(np.array(rows).T if rows else np.zeros((9, 0))))


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
    channels: Channels,
    prepared: tuple[tuple[Stack, ...], tuple[Patch, ...]],
    places: Float[np.ndarray, "R N 2"],
    using: Combination,
) -> Injected:
    """Function from fluxes to a and b of sources injected at fixed positions, channels combined.

    Args:
        channels: The observation.
        prepared: Its arrays and static settings.
        places: Positions (y, x) on the sky, px.
        using: How the channels are combined.

    Returns:
        The function; every call is one program and one transfer.
    """
    flat = places.reshape(-1, 2)
    separation = np.linalg.norm(flat - np.array(channels.centre), axis=-1)
    units = np.array([observation.unit for observation in channels.each])[:, None]
    shares = using.spectra[0][:, None] / units
    dtype = prepared[0][0].deviations.dtype
    at = jnp.asarray(np.stack([channels.in_channel(k, flat) for k in range(len(units))]), dtype)

    def with_sources(fluxes: np.ndarray) -> Terms:
        in_channels = jnp.asarray(fluxes.ravel() * shares, dtype)
        a, b = (part.astype(float) for part in jax.device_get(inject_channels(*prepared, at, in_channels)))
        combined = combine(a / units**2, b / units, separation, using)
        a, b = (np.nan_to_num(part).reshape(fluxes.shape) for part in (combined.a, combined.b))
        return a, b

    return with_sources


def limit_at(stack: Stack, patch: Patch, places: Float[np.ndarray, "N 2"], level: float) -> Limit | None:
    """Detection limit of one ring in one channel (see `limits_of`), in units of the deviations.

    Args:
        stack: Arrays of the observation.
        patch: Static settings.
        places: Positions (y, x) of the injections, px.
        level: Lowest SNR of a detection.

    Returns:
        The limit; None where no frame sees any of the positions.
    """
    at = jnp.asarray(places, stack.deviations.dtype)

    def with_sources(fluxes: np.ndarray) -> Terms:
        a, b = jax.device_get(inject(stack, at, jnp.asarray(fluxes[0], at.dtype), patch))
        return a[None].astype(float), b[None].astype(float)

    return limits_of(with_sources, (1, len(places)), np.array([level]))[0]


def limits_of(
    with_sources: Injected,
    shape: tuple[int, int],
    levels: Float[np.ndarray, "R"],
    track: ProgressTracker = lambda items, total: items,
) -> list[Limit | None]:
    """Compute the detection limit of every ring.

    Args:
        with_sources: Function from fluxes to the likelihood terms a and b of the injected sources.
        shape: Numbers of rings and of directions.
        levels: Lowest SNR of a detection on each ring.
        track: Shows progress over an iterable of known length.

    Returns:
        For each ring: limit, corrected limit, throughput and its standard deviation over the directions, throughput of
        the flux and its standard deviation, and the number of directions; None where no frame covers any position.
    """
    a, b = with_sources(np.zeros(shape))
    seen = a > 0
    a, b = np.where(seen, a, 1), np.where(seen, b, 0)

    def gains(fluxes: np.ndarray) -> Terms:
        """Increase of the SNR and of b / a due to a source of each flux."""
        a_with, b_with = with_sources(fluxes)
        a_with = np.where(seen, a_with, 1)
        return b_with / np.sqrt(a_with) - b / np.sqrt(a), b_with / a_with - b / a

    level = levels[:, None]
    raw = fluxes = level / np.sqrt(a)
    gain = flux_gain = np.broadcast_to(level, shape)
    for _ in track(range(ROUNDS), ROUNDS):
        step = level / np.maximum(gain, level / LARGEST_STEP)
        fluxes = fluxes * np.clip(step, 1 / LARGEST_STEP, LARGEST_STEP)
        gain, flux_gain = gains(fluxes)
    share, flux_share = gain * raw / (fluxes * level), flux_gain / fluxes
    reached = abs(gain / level - 1) < NEAR_ENOUGH
    corrected = np.where(reached, fluxes * level / np.where(reached, gain, 1), np.inf)
    return [summarise(*ring) for ring in zip(raw, corrected, share, flux_share, seen, strict=True)]


def summarise(
    raw: Float[np.ndarray, "N"],
    corrected: Float[np.ndarray, "N"],
    share: Float[np.ndarray, "N"],
    flux_share: Float[np.ndarray, "N"],
    seen: Bool[np.ndarray, "N"],
) -> Limit | None:
    """Summarise a ring by medians and means over its covered directions (see `limits_of`).

    Args:
        raw: Detection limit in each direction.
        corrected: Detection limit corrected for throughput.
        share: Throughput of the SNR.
        flux_share: Throughput of the flux.
        seen: Directions that some frame covers.

    Returns:
        The summary; None if no direction is covered.
    """
    if not seen.any():
        return None
    middle = float(np.median(corrected[seen]))
    return (
        float(np.median(raw[seen])), middle if np.isfinite(middle) else float("nan"), float(share[seen].mean()),
        float(share[seen].std()), float(flux_share[seen].mean()), float(flux_share[seen].std()), int(seen.sum()),
    )  # fmt: skip


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
