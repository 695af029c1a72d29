"""Joint fit of one source in all channels: common position, and flux per channel (F18, Algorithm 3 and Sect. 3.3)."""

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
        place: Position (y, x) on the sky grid, px.
        place_covariance: Covariance of the position under independent noise between channels, px^2; NaN if no channel
            constrains the position.
        flux: Unbiased flux in each channel, in units of its PSF.
        flux_std: Standard deviation of the flux from the likelihood, in the same units.
        each: Fit of each channel, in the pixels and flux units of that channel.
    """

    place: Float[np.ndarray, "2"]
    place_covariance: Float[np.ndarray, "2 2"]
    flux: Float[np.ndarray, "L"]
    flux_std: Float[np.ndarray, "L"]
    each: tuple[Fit, ...]


class Sky(NamedTuple):
    """Transformation between the sky grid and the derotated maps of the channels.

    Attributes:
        centre: Centre of rotation (y, x) on the sky grid, px.
        centres: Centre of rotation (y, x) in each channel, px.
        scales: Magnification of each channel relative to the sky grid.
    """

    centre: Float[Array, "2"]
    centres: Float[Array, "L 2"]
    scales: Float[Array, "L"]

    def in_channels(self, place: Float[Array, "2"]) -> Float[Array, "L 2"]:
        """Convert a position (y, x) on the sky grid to each channel's map, px."""
        return self.centres + (place - self.centre) * self.scales[:, None]

    def from_channels(self, places: Float[Array, "L 2"]) -> Float[Array, "L 2"]:
        """Convert a position (y, x) in each channel's map to the sky grid, px."""
        return self.centre + (places - self.centres) / self.scales[:, None]


class _State(NamedTuple):
    place: Array  # position of the last fit
    fits: Fit  # fit of every channel at that position
    information: Array  # Fisher information on the position
    target: Array  # position of the next fit
    settled: Array
    fitted: Array  # number of fits


def fit_source(channels: Channels, settings: Settings, start: Float[np.ndarray, "2"]) -> SourceFit:
    """Fit one source jointly in all channels, in one program with one transfer to the host (see `fit_jointly`).

    Args:
        channels: The observation.
        settings: Settings of the noise model.
        start: Initial position (y, x) on the sky grid, px.

    Returns:
        Position and fluxes.
    """
    return read_fit(channels, launch_fit(channels, settings, start))


def launch_fit(
    channels: Channels, settings: Settings, start: Float[np.ndarray, "2"]
) -> tuple[Float[Array, "2"], Float[Array, "2 2"], Fit]:
    """Dispatch `fit_jointly` to the device asynchronously; `read_fit` retrieves the result.

    Args:
        channels: The observation.
        settings: Settings of the noise model.
        start: Initial position (y, x) on the sky grid, px.

    Returns:
        The arrays of `fit_jointly`, possibly still being computed.
    """
    stacks, patches = prepare_channels(channels, settings)
    dtype = stacks[0].deviations.dtype
    centres = [observation.centre for observation in channels.each]
    sky = Sky(*(jnp.asarray(values, dtype) for values in (channels.centre, centres, channels.scales)))
    return fit_jointly(stacks, patches, sky, jnp.asarray(start, dtype))


def read_fit(channels: Channels, found: tuple[Float[Array, "2"], Float[Array, "2 2"], Fit]) -> SourceFit:
    """Transfer the result of `launch_fit` to the host and convert fluxes to the units of the channels' PSFs.

    Args:
        channels: The observation.
        found: Result of `launch_fit`.

    Returns:
        Position and fluxes.
    """
    place, covariance, fits = jax.device_get(found)
    units = np.array([observation.unit for observation in channels.each])
    flux_std = units * np.sqrt(fits.covariance[:, 2, 2].astype(float))
    each = tuple(jax.tree.map(lambda values, k=k: values[k], fits) for k in range(len(units)))
    return SourceFit(place.astype(float), covariance.astype(float), units * fits.flux.astype(float), flux_std, each)


def prepare_channels(channels: Channels, settings: Settings) -> tuple[tuple[Stack, ...], tuple[Patch, ...]]:
    """Prepare every channel for computations along tracks (see `stack.prepare`)."""
    stacks, patches = zip(*(prepare(observation, settings) for observation in channels.each), strict=True)
    return stacks, patches


@partial(jax.jit, static_argnames=("patches",))
def fit_jointly(
    stacks: Sequence[Stack], patches: tuple[Patch, ...], sky: Sky, start: Float[Array, "2"]
) -> tuple[Float[Array, "2"], Float[Array, "2 2"], Fit]:
    """Find the position that maximises the joint likelihood of all channels within 1 px of `start`, and the fluxes.

    Each channel is first fitted independently. The mean of these positions, weighted by their Fisher information, is
    then refined by Fisher scoring on the summed gradient; each step refits the unbiased fluxes.

    Args:
        stacks: Arrays of each channel.
        patches: Static settings of each channel.
        sky: Transformation between the sky grid and the channels.
        start: Initial position (y, x) on the sky grid, px.

    Returns:
        The position (px), its covariance (px^2; NaN if no channel constrains it), and the fit of every channel.
    """

    def step(state: _State) -> _State:
        first = state.fitted == 0  # independent fits
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
    """Return the state before the first fit."""
    zeros = jnp.zeros(n_channels, start.dtype)
    fits = Fit(
        zeros, zeros, zeros, jnp.zeros((n_channels, 3, 3), start.dtype), zeros, zeros, jnp.zeros(n_channels, jnp.int32)
    )
    information = jnp.zeros((2, 2), start.dtype)
    return _State(start, fits, information, start, jnp.zeros((), bool), jnp.zeros((), jnp.int32))


def fit_channels(
    stacks: Sequence[Stack], patches: tuple[Patch, ...], places: Float[Array, "L 2"], move: Bool[Array, ""]
) -> tuple[Fit, Float[Array, "L 2"]]:
    """Fit every channel.

    Args:
        stacks: Arrays of each channel.
        patches: Static settings of each channel.
        places: Initial position (y, x) in each channel's derotated map, px.
        move: Whether the positions are fitted too.

    Returns:
        The fits, and the gradient of each channel's log-likelihood with respect to its position, 1/px.
    """

    def fit_channel(stack: Stack, patch: Patch, place: Array) -> tuple[Fit, Array]:
        fit = characterise_one(stack, place, patch, move)
        return fit, score_at(stack, patch, jnp.stack([fit.y, fit.x]), fit.flux)

    found = map_channels(fit_channel, stacks, patches, places)
    fits, scores = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    return fits, scores


def score_at(stack: Stack, patch: Patch, place: Float[Array, "2"], flux: Float[Array, ""]) -> Float[Array, "2"]:
    """Compute the gradient of the log-likelihood with respect to the position, with noise learnt without the source.

    Args:
        stack: Arrays of the channel.
        patch: Static settings.
        place: Position (y, x) in the derotated map, px.
        flux: Flux of the source, in units of the deviations.

    Returns:
        The gradient, 1/px.
    """
    trail = trail_of(stack, place, patch)
    data, usable = own_patches(stack, trail, patch)
    noise = learn(stack, trail, place, -flux, patch)
    return place_score(whiten_source(stack, trail, place, noise, data, usable, patch), flux)


def information(fits: Fit, scales: Float[Array, "L"]) -> Float[Array, "L 2 2"]:
    """Compute each channel's Fisher information on the sky position, marginalised over the flux.

    Args:
        fits: Fit of each channel.
        scales: Magnification of each channel relative to the sky grid.

    Returns:
        Information matrices, 1/px^2; 0 for channels that do not constrain the position.
    """
    covariance = fits.covariance[:, :2, :2]
    sound = jnp.isfinite(covariance).all((1, 2)) & (determinant(covariance) > 0)
    safe = jnp.where(sound[:, None, None], covariance, jnp.eye(2, dtype=covariance.dtype))
    return jnp.where(sound[:, None, None], inverse_2x2(safe) * scales[:, None, None] ** 2, 0)


def determinant(matrix: Float[Array, "*L 2 2"]) -> Float[Array, "*L"]:
    """Compute determinants of 2 x 2 matrices."""
    return matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]


def solve(total: Float[Array, "2 2"], vector: Float[Array, "2"]) -> Float[Array, "2"]:
    """Compute the Fisher scoring step total^-1 vector, px; 0 if the information matrix is singular."""
    known = determinant(total) > 0
    return jnp.where(known, inverse_2x2(jnp.where(known, total, jnp.eye(2, dtype=total.dtype))) @ vector, 0)
