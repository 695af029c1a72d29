"""Removal of sources from the frames of a stack."""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.joint import SourceFit
from pulmo_jax.methods.paco.observation import Observation
from pulmo_jax.methods.paco.rendering import subtract
from pulmo_jax.methods.paco.source_fit import Fit

CAPACITY = 8  # the number of sources is padded to a multiple of this, which limits recompilation


def without_sources(channels: Channels, fits: Sequence[SourceFit]) -> Channels:
    """Remove fitted sources from every frame of every channel."""
    each = [[fit.each[number] for fit in fits] for number in range(len(channels.each))]
    return channels.but_with([without(*pair) for pair in zip(channels.each, each, strict=True)])


def without(observation: Observation, fits: Sequence[Fit]) -> Observation:
    """Remove sources from every frame of an observation; non-finite fits are ignored.

    Args:
        observation: The observation.
        fits: Fits of the sources, in the pixels and units of the observation.

    Returns:
        The observation without the sources.
    """
    if not fits:
        return observation
    deviations = observation.deviations
    sources = np.zeros((len(fits) + -len(fits) % CAPACITY, 3))
    sources[: len(fits)] = [[float(fit.y), float(fit.x), float(fit.flux)] for fit in fits]
    arrays = (
        jnp.asarray(values, deviations.dtype)
        for values in (
            observation.psf.stamp, observation.angles_deg, observation.centre, sources[:, :2], sources[:, 2]
        )
    )  # fmt: skip
    left = subtract(deviations, jnp.asarray(observation.usable), *arrays, count=len(fits))
    return replace(observation, deviations=left)


def with_injection(channels: Channels, place: Float[np.ndarray, "2"], fluxes: Float[np.ndarray, "L"]) -> Channels:
    """Add a source to every frame of every channel.

    Args:
        channels: The observation.
        place: Position (y, x) on the sky, px.
        fluxes: Flux in each channel, in units of its PSF.

    Returns:
        The observation with the source.
    """
    each = []
    for number, (one, flux) in enumerate(zip(channels.each, fluxes, strict=True)):
        at = np.append(channels.in_channel(number, place), -flux / one.unit)
        y, x, lost = (jnp.asarray(value, one.deviations.dtype) for value in at)
        nothing = jnp.zeros((), one.deviations.dtype)
        fit = Fit(y, x, lost, jnp.zeros((3, 3)), nothing, nothing, nothing, jnp.zeros((), jnp.int32))
        each.append(without(one, [fit]))
    return channels.but_with(each)
