"""Flux at source-free (blank) positions; its scatter is the empirical error of a flux at the same separation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pulmo_jax.methods.paco import Observation, Settings
from pulmo_jax.methods.paco.channels import Channels, as_channels
from pulmo_jax.methods.paco.joint import prepare_channels
from pulmo_jax.methods.paco.source_fit import Fit, characterise_channels

BLANKS = 24  # positions at the separation of a source
MIN_BLANKS = 4
NOWHERE_PX = -1e6  # position outside all frames, used as padding

Terms = tuple[Float[np.ndarray, "L M"], Float[np.ndarray, "L M"]]


def blank_places(
    channels: Channels, place: Float[np.ndarray, "2"], taken: Sequence[Float[np.ndarray, "2"]]
) -> Float[np.ndarray, "N 2"]:
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
    apart = np.linalg.norm(blanks[:, None] - np.reshape(taken, (-1, 2)), axis=-1).min(1, initial=np.inf)
    return blanks[apart > channels.fwhm_px]


def blank_terms(channels: Channels, settings: Settings, sets: Sequence[Float[np.ndarray, "_ 2"]]) -> list[Terms]:
    """Likelihood terms a and b of the unbiased flux b / a at every position of several sets, in every channel.

    One program serves all sets, and the results are read once.

    Args:
        channels: The observation without its sources.
        settings: How the noise is learnt.
        sets: Positions (y, x) on the sky, px, at most BLANKS in each set.

    Returns:
        a and b for each set; without columns for a set of fewer than MIN_BLANKS positions.
    """
    enough = [number for number, places in enumerate(sets) if len(places) >= MIN_BLANKS]
    terms: list[Terms] = [(np.ones((len(channels.each), 0)), np.ones((len(channels.each), 0))) for _ in sets]
    if not enough:
        return terms
    stacks, patches = prepare_channels(channels, settings)
    fits = []
    for number in enough:
        padded = np.full((BLANKS, 2), NOWHERE_PX)
        padded[: len(sets[number])] = sets[number]
        in_channels = np.stack([channels.in_channel(k, padded) for k in range(len(stacks))])
        at = jnp.asarray(in_channels, stacks[0].deviations.dtype)
        found = characterise_channels(stacks, patches, at, move=False)
        fits.append((found.a, found.flux))
    units = np.array([observation.unit for observation in channels.each])[:, None]
    for number, (a, flux) in zip(enough, jax.device_get(fits), strict=True):
        a, flux = (values[:, : len(sets[number])].astype(float) for values in (a, flux))
        terms[number] = (a / units**2, a * flux / units)
    return terms


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


def error_factor(
    observation: Observation, settings: Settings, place: tuple[float, float], fits: Sequence[Fit]
) -> float:
    """Scatter of the unbiased flux relative to its formal error, at blank positions of the same separation.

    Args:
        observation: The observation without its sources.
        settings: Settings of the noise model.
        place: Position (y, x), px.
        fits: Known sources, whose surroundings are excluded.

    Returns:
        The factor; NaN for fewer than MIN_BLANKS positions.

    Reference:
        Mawet et al. 2014, ApJ 792, 97.
    """
    channels = as_channels(observation)
    taken = [np.array([float(fit.y), float(fit.x)]) for fit in fits]
    [(a, b)] = blank_terms(channels, settings, [blank_places(channels, np.array(place), taken)])
    return scatter((b / np.sqrt(a))[0])
