"""One source in all channels: its common position, and its flux in each (F18, Algorithm 3 and Sect. 3.3)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pulmo_jax.core.shape_model import inverse_2x2
from pulmo_jax.methods.paco.batching import map_channels
from pulmo_jax.methods.paco.channels import Channels
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.methods.paco.source_fit import (
    LARGEST_STEP_PX,
    PLACE_TOLERANCE_PX,
    Fit,
    characterise_one,
    place_score,
    whiten_source,
)
from pulmo_jax.methods.paco.stack import Patch, Stack, prepare
from pulmo_jax.methods.paco.tracks import learn, own_patches, trail_of

MAX_STEPS = 10


class SourceFit(NamedTuple):
    """Position of a source on the sky and its flux in every channel.

    Attributes:
        place: Position (y, x) on the sky's pixels.
        place_covariance: Covariance of the position, px^2, for channels with independent noise; NaN where no channel
            constrains it.
        flux: Unbiased flux in each channel, in units of its PSF.
        flux_std: Standard deviation of the flux, from the likelihood.
        each: The fit of each channel, in the channel's own pixels and units.
    """

    place: Float[np.ndarray, "2"]
    place_covariance: Float[np.ndarray, "2 2"]
    flux: Float[np.ndarray, "L"]
    flux_std: Float[np.ndarray, "L"]
    each: tuple[Fit, ...]


class Sky(NamedTuple):
    """How the channels' derotated maps lie on the sky's pixels.

    Attributes:
        centre: Centre of rotation (y, x) on the sky, px.
        centres: Centre of rotation in each channel, px.
        scales: Factor by which each channel's frames are larger than the sky.
    """

    centre: Float[Array, "2"]
    centres: Float[Array, "L 2"]
    scales: Float[Array, "L"]

    def in_channels(self, place: Float[Array, "2"]) -> Float[Array, "L 2"]:
        """Position of a place of the sky in each channel's map."""
        return self.centres + (place - self.centre) * self.scales[:, None]

    def from_channels(self, places: Float[Array, "L 2"]) -> Float[Array, "L 2"]:
        """Place on the sky of a position in each channel's map."""
        return self.centre + (places - self.centres) / self.scales[:, None]


class _State(NamedTuple):
    place: Array  # of the last fit
    fits: Fit  # of every channel there
    information: Array  # on the place
    target: Array  # of the next fit
    settled: Array
    fitted: Array  # how many times


def fit_source(channels: Channels, settings: Settings, start: Float[np.ndarray, "2"]) -> SourceFit:
    """Fits one source in all channels; one program and one transfer (see `fit_jointly`).

    Args:
        channels: The observation.
        settings: How the noise is learnt.
        start: First position (y, x) on the sky's pixels.

    Returns:
        Position and fluxes.
    """
    return read_fit(channels, launch_fit(channels, settings, start))


def launch_fit(
    channels: Channels, settings: Settings, start: Float[np.ndarray, "2"]
) -> tuple[Float[Array, "2"], Float[Array, "2 2"], Fit]:
    """Starts `fit_jointly` on the device, without waiting for its result."""
    stacks, patches = prepare_channels(channels, settings)
    dtype = stacks[0].deviations.dtype
    centres = [observation.centre for observation in channels.each]
    sky = Sky(*(jnp.asarray(values, dtype) for values in (channels.centre, centres, channels.scales)))
    return fit_jointly(stacks, patches, sky, jnp.asarray(start, dtype))


def read_fit(channels: Channels, found: tuple[Float[Array, "2"], Float[Array, "2 2"], Fit]) -> SourceFit:
    """Reads what `launch_fit` started, in the units of the channels' PSFs."""
    place, covariance, fits = jax.device_get(found)
    units = np.array([observation.unit for observation in channels.each])
    flux_std = units * np.sqrt(fits.covariance[:, 2, 2].astype(float))
    each = tuple(jax.tree.map(lambda values, k=k: values[k], fits) for k in range(len(units)))
    return SourceFit(place.astype(float), covariance.astype(float), units * fits.flux.astype(float), flux_std, each)


def prepare_channels(channels: Channels, settings: Settings) -> tuple[tuple[Stack, ...], tuple[Patch, ...]]:
    """Arranges every channel for computations along tracks."""
    stacks, patches = zip(*(prepare(observation, settings) for observation in channels.each), strict=True)
    return stacks, patches


@partial(jax.jit, static_argnames=("patches",))
def fit_jointly(
    stacks: Sequence[Stack], patches: tuple[Patch, ...], sky: Sky, start: Float[Array, "2"]
) -> tuple[Float[Array, "2"], Float[Array, "2 2"], Fit]:
    """Finds the position of the highest likelihood of all channels, within 1 px of `start`, and the unbiased fluxes.

    Each channel first finds the position by itself. From the mean of these, weighted by their Fisher information,
    Fisher scoring goes on with the sum of all gradients; the fluxes are fitted again at every step.

    Args:
        stacks: Arrays of each channel.
        patches: Static settings of each channel.
        sky: How the channels lie on the sky.
        start: First position (y, x) on the sky's pixels.

    Returns:
        The position, its covariance (NaN where no channel constrains it), and the fit of every channel.
    """

    def step(state: _State) -> _State:
        first = state.fitted == 0  # every channel by itself
        fits, scores = fit_channels(stacks, patches, sky.in_channels(state.target), first)
        weights = information(fits, sky.scales)
        total, gradient = weights.sum(0), (sky.scales[:, None] * jnp.nan_to_num(scores)).sum(0)
        alone = sky.from_channels(jnp.stack([fits.y, fits.x], -1)) - start
        pull = jnp.einsum("lij,lj->i", weights, jnp.nan_to_num(alone))
        move = jnp.clip(solve(total, gradient), -LARGEST_STEP_PX, LARGEST_STEP_PX)
        climbed = jnp.clip(state.target + move, start - 1, start + 1)
        target = jnp.where(first, start + solve(total, pull), climbed)
        settled = ~first & (abs(move).max() < PLACE_TOLERANCE_PX)
        return _State(state.target, fits, total, target, settled, state.fitted + 1)

    with jax.default_matmul_precision("highest"):
        end = jax.lax.while_loop(lambda s: ~s.settled & (s.fitted < MAX_STEPS + 2), step, begin(len(stacks), start))
    known = determinant(end.information) > 0
    covariance = jnp.where(
        known, inverse_2x2(jnp.where(known, end.information, jnp.eye(2, dtype=start.dtype))), jnp.nan
    )
    return end.place, covariance, end.fits


def begin(n_channels: int, start: Float[Array, "2"]) -> _State:
    """State before the first fit."""
    zeros = jnp.zeros(n_channels, start.dtype)
    fits = Fit(
        zeros, zeros, zeros, jnp.zeros((n_channels, 3, 3), start.dtype), zeros, zeros, jnp.zeros(n_channels, jnp.int32)
    )
    information = jnp.zeros((2, 2), start.dtype)
    return _State(start, fits, information, start, jnp.zeros((), bool), jnp.zeros((), jnp.int32))


def fit_channels(
    stacks: Sequence[Stack], patches: tuple[Patch, ...], places: Float[Array, "L 2"], move: Bool[Array, ""]
) -> tuple[Fit, Float[Array, "L 2"]]:
    """Fit of every channel, and the gradient of its log-likelihood in the position, 1/px."""

    def fit_channel(stack: Stack, patch: Patch, place: Array) -> tuple[Fit, Array]:
        fit = characterise_one(stack, place, patch, move)
        return fit, score_at(stack, patch, jnp.stack([fit.y, fit.x]), fit.flux)

    found = map_channels(fit_channel, stacks, patches, places)
    fits, scores = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return fits, scores


def score_at(stack: Stack, patch: Patch, place: Float[Array, "2"], flux: Float[Array, ""]) -> Float[Array, "2"]:
    """Gradient of the log-likelihood in the position, with the noise learnt without the source, 1/px."""
    trail = trail_of(stack, place, patch)
    data, usable = own_patches(stack, trail, patch)
    noise = learn(stack, trail, place, -flux, patch)
    return place_score(whiten_source(stack, trail, place, noise, data, usable, patch), flux)


def information(fits: Fit, scales: Float[Array, "L"]) -> Float[Array, "L 2 2"]:
    """Fisher information of each channel on the place on the sky, its flux being unknown; 0 where it sees nothing."""
    covariance = fits.covariance[:, :2, :2]
    sound = jnp.isfinite(covariance).all((1, 2)) & (determinant(covariance) > 0)
    safe = jnp.where(sound[:, None, None], covariance, jnp.eye(2, dtype=covariance.dtype))
    return jnp.where(sound[:, None, None], inverse_2x2(safe) * scales[:, None, None] ** 2, 0)


def determinant(matrix: Float[Array, "*L 2 2"]) -> Float[Array, "*L"]:
    """Determinants of 2 x 2 matrices."""
    return matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]


def solve(total: Float[Array, "2 2"], vector: Float[Array, "2"]) -> Float[Array, "2"]:
    """Step of Fisher scoring; 0 where there is no information."""
    known = determinant(total) > 0
    return jnp.where(known, inverse_2x2(jnp.where(known, total, jnp.eye(2, dtype=total.dtype))) @ vector, 0)
