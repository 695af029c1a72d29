"""One source in all channels: its place, which they share, and its flux in each (F18, Algorithm 3, and Sect. 3.3)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.core import likelihood
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.methods.paco.tracks import (
    LARGEST_STEP_PX,
    PLACE_TOLERANCE_PX,
    Fit,
    Patch,
    Stack,
    characterise,
    learn,
    own_patches,
    prepare,
    template,
    trail_of,
)

MAX_STEPS = 10


class SourceFit(NamedTuple):
    """A source's place on the sky and its flux in every channel.

    place: (y, x). place_covariance: of channels whose noise is independent. flux, flux_std: of each channel, in units
    of its PSF; unbiased. each: the same as the channels have them, in their own pixels and units.
    """

    place: Float[np.ndarray, "2"]
    place_covariance: Float[np.ndarray, "2 2"]
    flux: Float[np.ndarray, "L"]
    flux_std: Float[np.ndarray, "L"]
    each: tuple[Fit, ...]


def fit_source(channels: Channels, settings: Settings, start: Float[np.ndarray, "2"]) -> SourceFit:
    """The place of the highest likelihood of all channels together, within 1 px of `start`, and the unbiased fluxes.

    Each channel first finds the place by itself; from the mean of those, weighted with what each knows, Fisher scoring
    goes on with the sum of all gradients, the fluxes being fitted again at every step.
    """
    prepared = [prepare(of, settings) for of in channels.each]
    alone = [fit_at(channels, k, start, *stack, move=True) for k, stack in enumerate(prepared)]
    weights = [information(fit, scale) for fit, scale in zip(alone, channels.scales, strict=True)]
    ways = [channels.on_sky(k, np.array([fit.y, fit.x], float)) - start for k, fit in enumerate(alone)]
    pull = np.sum([w @ np.nan_to_num(way) for w, way in zip(weights, ways, strict=True)], axis=0)
    place = start + solved(np.sum(weights, axis=0), pull)
    fits, total, slope = likelihood_at(channels, prepared, place)
    for _ in range(MAX_STEPS):
        step = np.clip(solved(total, slope), -LARGEST_STEP_PX, LARGEST_STEP_PX)
        if abs(step).max() < PLACE_TOLERANCE_PX:
            break
        place = np.clip(place + step, start - 1, start + 1)
        fits, total, slope = likelihood_at(channels, prepared, place)
    covariance = np.linalg.inv(total) if np.linalg.det(total) > 0 else np.full((2, 2), np.nan)
    units = np.array([of.unit for of in channels.each])
    flux = units * np.array([float(fit.flux) for fit in fits])
    flux_std = units * np.sqrt([float(fit.covariance[2, 2]) for fit in fits])
    return SourceFit(place, covariance, flux, flux_std, tuple(fits))


def likelihood_at(
    channels: Channels, prepared: list[tuple[Stack, Patch]], place: Float[np.ndarray, "2"]
) -> tuple[list[Fit], Float[np.ndarray, "2 2"], Float[np.ndarray, "2"]]:
    """Every channel's fit at a place of the sky, and the sums of what they know of it and of their gradients."""
    fits = [fit_at(channels, k, place, *stack) for k, stack in enumerate(prepared)]
    total = np.sum([information(fit, scale) for fit, scale in zip(fits, channels.scales, strict=True)], axis=0)
    slopes = [
        scale * np.nan_to_num(np.asarray(place_score(stack, jnp.stack([fit.y, fit.x]), fit.flux, patch), float))
        for fit, scale, (stack, patch) in zip(fits, channels.scales, prepared, strict=True)
    ]
    return fits, total, np.sum(slopes, axis=0)


def fit_at(
    channels: Channels, number: int, place: Float[np.ndarray, "2"], stack: Stack, patch: Patch, move: bool = False
) -> Fit:
    """A channel's own fit at a place of the sky."""
    at = jnp.asarray(channels.in_channel(number, place)[None], stack.deviations.dtype)
    return jax.tree.map(lambda values: values[0], characterise(stack, at, patch, move=move))


def information(fit: Fit, scale: float) -> Float[np.ndarray, "2 2"]:
    """What a channel knows of the place on the sky, its flux being unknown too (Fisher); nothing where it sees none."""
    covariance = np.asarray(fit.covariance[:2, :2], float)
    sound = np.isfinite(covariance).all() and np.linalg.det(covariance) > 0
    return np.linalg.inv(covariance) * scale**2 if sound else np.zeros((2, 2))


def solved(total: Float[np.ndarray, "2 2"], slope: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
    """The step of Fisher scoring; none where nothing is known."""
    return np.linalg.solve(total, slope) if np.linalg.det(total) > 0 else np.zeros(2)


@partial(jax.jit, static_argnames=("patch",))
def place_score(stack: Stack, place: Float[Array, "2"], flux: Float[Array, ""], patch: Patch) -> Float[Array, "2"]:
    """The gradient of the log-likelihood in the place, the noise learnt without the source."""
    with jax.default_matmul_precision("highest"):
        trail = trail_of(stack, place, patch)
        noise = learn(stack, trail, place, -flux, patch)
        data, usable = own_patches(stack, trail, patch)
        whiten = jax.vmap(likelihood.whiten)
        seen = whiten(jnp.where(usable, data - noise.mean, 0), noise.lower)

        def log_likelihood(place: Array) -> Array:
            h = jnp.where(usable, template(stack, trail, place, patch), 0)
            return -0.5 * ((seen - flux * whiten(h, noise.lower)) ** 2).sum()

        return jax.grad(log_likelihood)(place)
