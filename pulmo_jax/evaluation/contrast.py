"""How faint a source would still be found, by separation: injections into the stack, whole rings at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.evaluation.null_field import NullProfile
from pulmo_jax.methods.paco import Observation, Settings
from pulmo_jax.methods.paco.channels import Channels, as_channels
from pulmo_jax.methods.paco.spectral import Combination, combine, independent
from pulmo_jax.methods.paco.tracks import Patch, Stack, inject, prepare

ROUNDS = 4  # of injections, each at the limit that the one before found
LARGEST_STEP = 4.0  # of the flux from one round to the next
NEAR_ENOUGH = 0.1  # of the threshold, for a limit to count as found
GOLDEN_ANGLE = np.pi * (3 - 5**0.5)  # from ring to ring, so that no direction is favoured

Track = Callable[[Iterable, int], Iterable]
Injected = Callable[[Float[np.ndarray, "N"]], tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]]


@dataclass(frozen=True, eq=False)
class Contrast:
    """Limits by separation, each the median over the directions of its ring.

    limit: threshold / sqrt(a), of a source that the statistics do not know, in units of the PSF. throughput: share of
    an injected source's SNR that is left, at the limit; flux_throughput: the same of its flux b / a; `_std`: their
    mean and scatter over the directions. limit_corrected: limit / throughput, at which a source's SNR is on average
    the threshold, so that half of them are found; NaN where no flux reaches it. n: directions used.
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
    of: Observation | Channels,
    settings: Settings,
    threshold: float = 5.0,
    n_directions: int = 12,
    n_rings: int = 12,
    null: NullProfile | None = None,
    track: Track = lambda items, total: items,
    using: Combination | None = None,
) -> Contrast:
    """Inject sources at the limit of detection and see what is left of them.

    of: with the sources that were found taken out. null: its spread of the SNR, where detections are judged by the
    calibrated SNR; the limit is then that many times higher or lower. Self-subtraction depends on the flux injected, so
    each ring is injected ROUNDS times, ending at the limit itself. using: how the channels are combined, None for one
    channel. Injected are sources of the first of its spectra, alone looked for; fluxes are means over channels.
    """
    channels = as_channels(of)
    using = (using or independent(np.ones((1, len(channels.each))))).only(0)
    prepared = [prepare(each, settings) for each in channels.each]
    separations = common_separations(channels, [stack for stack, _ in prepared], n_rings)
    rows = []
    for k, separation in track(list(enumerate(separations)), len(separations)):
        directions = 2 * np.pi * np.arange(n_directions) / n_directions + k * GOLDEN_ANGLE
        places = np.array(channels.centre) + separation * np.stack([np.sin(directions), np.cos(directions)], -1)
        level = threshold * (1.0 if null is None else float(null.std_at(separation)))
        if (row := limit_of(injections(channels, prepared, places, using), len(places), level)) is not None:
            rows.append((separation, level, *row))
    return Contrast(*(np.array(rows).T if rows else np.zeros((9, 0))))


def common_separations(channels: Channels, stacks: list[Stack], n_rings: int) -> Float[np.ndarray, "R"]:
    """On the sky, those of the channel whose field is the smallest."""
    each = []
    for of, scale, stack in zip(channels.each, channels.scales, stacks, strict=True):
        whole = np.asarray(stack.whole).reshape(of.shape)
        each.append(ring_separations(whole, of.centre, channels.fwhm_px * float(scale), n_rings) / scale)
    return min(each, key=lambda separations: separations[-1])


def injections(
    channels: Channels, prepared: list[tuple[Stack, Patch]], places: Float[np.ndarray, "N 2"], using: Combination
) -> Injected:
    """The function from fluxes to a and b of sources put at these places of the sky, channels combined."""

    def with_sources(fluxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms = []
        for number, (of, (stack, patch)) in enumerate(zip(channels.each, prepared, strict=True)):
            at = jnp.asarray(channels.in_channel(number, places), stack.deviations.dtype)
            a, b = injected(stack, patch, at, fluxes * using.spectra[0, number] / of.unit)
            terms.append((a / of.unit**2, b / of.unit))
        separation = np.linalg.norm(places - np.array(channels.centre), axis=-1)
        a, b = np.moveaxis(np.array(terms), 1, 0)
        combined = combine(a, b, separation, using)
        return np.nan_to_num(combined.a), np.nan_to_num(combined.b)

    return with_sources


def limit_at(
    stack: Stack, patch: Patch, places: Float[np.ndarray, "N 2"], level: float
) -> tuple[float, float, float, float, float, float, int] | None:
    """A ring's limit and limit_corrected in units of the deviations, the throughputs with their scatter, and n; None
    where no place on it is seen in any frame. limit_corrected is NaN where most directions have none."""
    at = jnp.asarray(places, stack.deviations.dtype)
    return limit_of(lambda fluxes: injected(stack, patch, at, fluxes), len(places), level)


def limit_of(
    with_sources: Injected, n_places: int, level: float
) -> tuple[float, float, float, float, float, float, int] | None:
    """The same of any function from fluxes to a and b at the places, in its units."""
    a, b = with_sources(np.zeros(n_places))
    seen = a > 0
    if not seen.any():
        return None
    a, b = np.where(seen, a, 1), np.where(seen, b, 0)

    def gains(fluxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a source of each flux adds to the SNR and to b / a."""
        a_with, b_with = with_sources(fluxes)
        a_with = np.where(seen, a_with, 1)
        return b_with / np.sqrt(a_with) - b / np.sqrt(a), b_with / a_with - b / a

    raw = fluxes = level / np.sqrt(a)
    for _ in range(ROUNDS):
        step = level / np.maximum(gains(fluxes)[0], level / LARGEST_STEP)
        fluxes = fluxes * np.clip(step, 1 / LARGEST_STEP, LARGEST_STEP)
    gain, flux_gain = gains(fluxes)
    share, flux_share = gain * raw / (fluxes * level), flux_gain / fluxes
    reached = abs(gain / level - 1) < NEAR_ENOUGH
    corrected = float(np.median(np.where(reached, fluxes * level / np.where(reached, gain, 1), np.inf)[seen]))
    return (
        float(np.median(raw[seen])), corrected if np.isfinite(corrected) else float("nan"), float(share[seen].mean()),
        float(share[seen].std()), float(flux_share[seen].mean()), float(flux_share[seen].std()), int(seen.sum()),
    )  # fmt: skip


def injected(
    stack: Stack, patch: Patch, at: Array, fluxes: Float[np.ndarray, "N"]
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    a, b = inject(stack, at, jnp.asarray(fluxes, at.dtype), patch)
    return np.asarray(a, np.float64), np.asarray(b, np.float64)


def ring_separations(whole: np.ndarray, centre: tuple[float, float], fwhm: float, n: int) -> Float[np.ndarray, "R"]:
    """At most n, from one FWHM to the farthest circle that lies in the field, at least one FWHM apart."""
    y, x = np.nonzero(whole)
    farthest = min(centre[0] - y.min(), y.max() - centre[0], centre[1] - x.min(), x.max() - centre[1])
    count = int(np.clip((farthest - fwhm) // fwhm + 1, 1, n))
    return np.linspace(min(fwhm, max(farthest, 1)), max(farthest, 1), count)


def throughput_map(contrast: Contrast, shape: tuple[int, int], centre: tuple[float, float]) -> Float[np.ndarray, "H W"]:
    """flux_throughput at every pixel, by its separation."""
    y, x = np.indices(shape)
    return np.interp(np.hypot(y - centre[0], x - centre[1]), contrast.separation_px, contrast.flux_throughput)
