"""Unbiased flux of known sources in each epoch, and in all epochs together.

The flux b / a of the maps is biased low, because a source contributes to the noise statistics. Algorithm 3 (F18,
Flasseur et al. 2018, A&A 618, A138) removes this bias but needs the frames. The position of a source is not fitted: it
is that of its track.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.stats import chi2

from pulmo_jax.methods.paco import Settings
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.joint import SourceFit, prepare_channels
from pulmo_jax.methods.paco.removal import without_sources
from pulmo_jax.methods.paco.source_fit import characterise
from pulmo_jax.methods.paco.spectral import Combination, Combined, combine

ROUNDS = 2  # fits of every source with all others removed
BLANKS = 24  # positions without a source at the separation of a source
MIN_BLANKS = 4
NOWHERE_PX = -1e6  # position outside all frames, used as padding


@dataclass(frozen=True)
class Flux:
    """Flux of a source and its errors; NaN if it could not be measured.

    Attributes:
        value: Debiased flux.
        std: Standard deviation from the likelihood.
        std_empirical: Standard deviation from blank positions at the same separation; NaN where there are too few.
    """

    value: float = float("nan")
    std: float = float("nan")
    std_empirical: float = float("nan")


@dataclass(frozen=True)
class JointFlux:
    """Constant flux in several epochs: their mean, weighted by the empirical errors.

    Attributes:
        flux: The mean and its errors.
        epochs: Number of epochs with a flux and an empirical error.
        chi2: Sum of the squared deviations from the mean in units of the empirical errors.
        probability: Probability of at least this chi2 if the flux is constant; NaN for fewer than two epochs.
    """

    flux: Flux
    epochs: int
    chi2: float
    probability: float


def joint_flux(fluxes: Sequence[Flux]) -> JointFlux:
    """Average the fluxes of several epochs.

    Args:
        fluxes: Flux in each epoch; those without a value or an empirical error are left out.

    Returns:
        The mean; NaN without any epoch.
    """
    known = [one for one in fluxes if np.isfinite([one.value, one.std_empirical]).all() and one.std_empirical > 0]
    if not known:
        return JointFlux(Flux(), 0, float("nan"), float("nan"))
    value, std, empirical = (np.array([getattr(f, k) for f in known]) for k in ("value", "std", "std_empirical"))
    weight = empirical**-2
    mean = float((weight * value).sum() / weight.sum())
    formal = float(np.sqrt((weight**2 * std**2).sum()) / weight.sum())
    misfit = float((weight * (value - mean) ** 2).sum())
    probability = float(chi2.sf(misfit, len(known) - 1)) if len(known) > 1 else float("nan")
    return JointFlux(Flux(mean, formal, float(weight.sum() ** -0.5)), len(known), misfit, probability)


def fluxes_at(
    channels: Channels, settings: Settings, places: Float[np.ndarray, "N 2"], using: Sequence[Combination]
) -> list[Flux]:
    """Measure the debiased flux of sources at given positions, and its scatter at blank positions.

    Args:
        channels: The observation.
        settings: Settings of the noise model.
        places: Positions (y, x) on the sky grid, px.
        using: Combination of the channels for the one spectrum of each source.

    Returns:
        Flux of each source, in units of the PSF; NaN outside of the field.
    """
    if not len(places):
        return []
    fits = fits_at(channels, settings, places)
    for _ in range(ROUNDS * (len(places) > 1)):
        fits = [
            fits_at(without_sources(channels, [*fits[:number], *fits[number + 1 :]]), settings, place[None])[0]
            for number, place in enumerate(places)
        ]
    residual, fluxes = without_sources(channels, fits), []
    for fit, combination in zip(fits, using, strict=True):
        total = total_of([fit], channels, combination)
        blanks = blank_places(channels, fit.place, places)
        empty = total_of(fits_at(residual, settings, blanks), channels, combination)
        std = float(1 / np.sqrt(total.a[0]))
        fluxes.append(Flux(float(total.b[0] / total.a[0]), std, std * scatter(empty.b / np.sqrt(empty.a))))
    return fluxes


def total_of(fits: Sequence[SourceFit], channels: Channels, using: Combination) -> Combined:
    """Combine the fluxes of the channels of N fits."""
    flux, std = (
        np.reshape([getattr(fit, k) for fit in fits], (-1, len(channels.each))).T for k in ("flux", "flux_std")
    )
    separation = np.array([np.hypot(*(fit.place - np.array(channels.centre))) for fit in fits], float)
    return combine(std**-2.0, flux * std**-2.0, separation, using)


def blank_places(
    channels: Channels, place: Float[np.ndarray, "2"], taken: Float[np.ndarray, "N 2"]
) -> Float[np.ndarray, "M 2"]:
    """Positions on the sky at the separation of `place`, more than one FWHM from known sources.

    Args:
        channels: The observation.
        place: Position (y, x), px.
        taken: Positions of the known sources, px.

    Returns:
        At most BLANKS positions, at least one FWHM apart.
    """
    dy, dx = place - np.array(channels.centre)
    separation, start = np.hypot(dy, dx), np.arctan2(dy, dx)
    n = int(min(BLANKS, 2 * np.pi * separation // channels.fwhm_px))
    directions = start + 2 * np.pi * (np.arange(n) + 0.5) / max(n, 1)
    blanks = np.array(channels.centre) + separation * np.stack([np.sin(directions), np.cos(directions)], -1)
    return blanks[np.linalg.norm(blanks[:, None] - taken, axis=-1).min(1, initial=np.inf) > channels.fwhm_px]


def scatter(pulls: Float[np.ndarray, "N"]) -> float:
    """Standard deviation of normalised fluxes, which is 1 in theory, corrected for the small sample.

    Args:
        pulls: Fluxes divided by their formal errors; values that are not finite are ignored.

    Returns:
        Standard deviation; NaN for fewer than MIN_BLANKS values.

    Reference:
        Mawet et al. 2014, ApJ 792, 97.
    """
    pulls = pulls[np.isfinite(pulls)]
    return float(pulls.std(ddof=1) * np.sqrt(1 + 1 / len(pulls))) if len(pulls) >= MIN_BLANKS else float("nan")


def fits_at(channels: Channels, settings: Settings, places: Float[np.ndarray, "N 2"]) -> list[SourceFit]:
    """Fit the flux of a source at each of N fixed positions, independently of the others (F18, Algorithm 3)."""
    stacks, patches = prepare_channels(channels, settings)
    padded = np.concatenate([places, np.full((-len(places) % BLANKS, 2), NOWHERE_PX)])  # one program for any number
    found = []
    for number, (stack, patch) in enumerate(zip(stacks, patches, strict=True)):
        at = jnp.asarray(channels.in_channel(number, padded), stack.deviations.dtype)
        found.append(characterise(stack, at, patch, move=False))
    found, units = jax.device_get(found), np.array([observation.unit for observation in channels.each])
    fits = []
    for number, place in enumerate(places):
        each = tuple(jax.tree.map(lambda values, n=number: values[n], fit) for fit in found)
        root_a = np.array([float(fit.throughput) * np.sqrt(float(fit.a)) for fit in each])
        std = np.where(root_a > 0, units / np.where(root_a > 0, root_a, 1), np.nan)
        flux = units * np.array([float(fit.flux) for fit in each])
        fits.append(SourceFit(place, np.full((2, 2), np.nan), flux, std, each))
    return fits
