"""Fit of position and unbiased flux of a source in one channel (F18, Algorithm 3 and Sect. 3.3)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core import likelihood
from pulmo_jax.methods.paco.batching import map_channels, map_sources
from pulmo_jax.methods.paco.stack import Patch, Stack
from pulmo_jax.methods.paco.tracks import Noise, Trail, learn, own_patches, template, trail_of

MAX_ITERATIONS = 60
FLUX_TOLERANCE = 1e-3  # in units of the standard deviation of the flux
PLACE_TOLERANCE_PX = 1e-3
LARGEST_STEP_PX = 0.25  # maximum change of a coordinate per iteration
LARGEST_SLOPE = 0.95  # upper bound on the slope in the secant step
RIDGE = 1e-6  # added to the normalised Fisher matrix before it is factorised


class Fit(NamedTuple):
    """Position in the derotated map and flux of a source, with their errors.

    Attributes:
        y: Row, px.
        x: Column, px.
        flux: Flux in units of the stack's deviations; NaN if no frame has a patch on the track.
        covariance: Covariance of (y, x, flux), the inverse of the Fisher information; units px and flux.
        a: Likelihood term a at the last iteration.
        b: Likelihood term b at the last iteration.
        iterations: Number of iterations; MAX_ITERATIONS without convergence.
    """

    y: Float[Array, "*N"]
    x: Float[Array, "*N"]
    flux: Float[Array, "*N"]
    covariance: Float[Array, "*N 3 3"]
    a: Float[Array, "*N"]
    b: Float[Array, "*N"]
    iterations: Int[Array, "*N"]


class Whitened(NamedTuple):
    """Whitened model of a source of flux 1 and whitened data, on every pixel of the trail.

    Attributes:
        source: Whitened source of flux 1.
        slopes: Derivatives of the source with respect to the position (y, x), 1/px.
        data: Whitened data minus the mean of the noise.
    """

    source: Float[Array, "T P"]
    slopes: Float[Array, "T P 2"]
    data: Float[Array, "T P"]


class _State(NamedTuple):
    place: Array
    flux: Array  # flux subtracted before the noise is learnt
    answer: Array  # resulting estimate b / a
    before: tuple[Array, Array]  # flux and answer of the previous iteration
    covariance: Array
    a: Array
    b: Array
    iteration: Array
    settled: Array


@partial(jax.jit, static_argnames=("patch",))
def characterise(stack: Stack, places: Float[Array, "N 2"], patch: Patch, move: bool | Bool[Array, ""] = True) -> Fit:
    """Fit position and unbiased flux of the sources nearest to N positions, independently of each other.

    Each iteration learns the noise from the stack minus the current source model, estimates the flux b / a in the
    original stack, and updates the position by Fisher scoring. The secant method finds the fixed point of the flux in a
    tenth of the iterations of the paper's recursion.

    Args:
        stack: Arrays of the observation.
        places: Initial positions (y, x) in the derotated map, px.
        patch: Static settings.
        move: Whether the positions are fitted too.

    Returns:
        The fits, with a leading axis of N sources.

    Reference:
        Flasseur et al. 2018, A&A 618, A138, Algorithm 3 and Sect. 3.3.
    """
    with jax.default_matmul_precision("highest"):
        return characterise_all(stack, patch, places, move)


@partial(jax.jit, static_argnames=("patches", "move"))
def characterise_channels(
    stacks: Sequence[Stack], patches: tuple[Patch, ...], places: Float[Array, "L N 2"], move: bool
) -> Fit:
    """Run `characterise` in every channel, in one program.

    Args:
        stacks: Arrays of each of the L channels.
        patches: Static settings of each channel.
        places: Initial positions (y, x) in each channel's derotated map, px.
        move: Whether the positions are fitted too.

    Returns:
        The fits, with leading axes of L channels and N sources.
    """
    with jax.default_matmul_precision("highest"):
        fits = map_channels(partial(characterise_all, move=move), stacks, patches, places)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fits)


def characterise_all(stack: Stack, patch: Patch, places: Float[Array, "N 2"], move: bool | Bool[Array, ""]) -> Fit:
    """Uncompiled body of `characterise`, for use in larger programs."""
    return map_sources(
        lambda patch, place: characterise_one(stack, place, patch, move), stack.deviations, patch, places
    )


def characterise_one(
    stack: Stack,
    start: Float[Array, "2"],
    patch: Patch,
    move: bool | Bool[Array, ""],
) -> Fit:
    """Fit one source (see `characterise`).

    Args:
        stack: Arrays of the observation.
        start: Initial position (y, x) in the derotated map, px; the fit stays within 1 px of it.
        patch: Static settings.
        move: Whether the position is fitted too.

    Returns:
        The fit.
    """
    dtype = stack.deviations.dtype
    trail = trail_of(stack, start, patch)
    data, usable = own_patches(stack, trail, patch)

    def step(state: _State) -> _State:
        noise = learn(stack, trail, state.place, -state.flux, patch)
        seen = whiten_source(stack, trail, state.place, noise, data, usable, patch)
        a, b = (seen.source * seen.source).sum(), (seen.source * seen.data).sum()
        answer = b / a
        flux = jnp.where(state.iteration == 0, answer, secant(state.flux, answer, *state.before))
        covariance = source_covariance(seen, answer)
        move_by = jnp.where(move, jnp.nan_to_num(covariance[:2, :2] @ place_score(seen, answer)), 0)
        move_by = jnp.clip(move_by, -LARGEST_STEP_PX, LARGEST_STEP_PX)
        place = jnp.clip(state.place + move_by, start - 1, start + 1)  # stay on the patches of the trail
        settled = (abs(flux - state.flux) * jnp.sqrt(a) < FLUX_TOLERANCE) & (
            abs(place - state.place).max() < PLACE_TOLERANCE_PX
        )
        return _State(place, flux, answer, (state.flux, answer), covariance, a, b, state.iteration + 1, settled)

    zero = jnp.zeros((), dtype)
    start_state = _State(
        start.astype(dtype), zero, zero, (zero, zero), jnp.eye(3, dtype=dtype), zero, zero,
        jnp.zeros((), jnp.int32), jnp.zeros((), bool),
    )  # fmt: skip

    def goes_on(state: _State) -> Array:
        lost = jnp.isnan(state.flux)  # further iterations cannot recover and would delay the rest of the batch
        return ~state.settled & ~lost & (state.iteration < MAX_ITERATIONS)

    end = jax.lax.while_loop(goes_on, step, start_state)
    iterations = jnp.where(end.settled, end.iteration, MAX_ITERATIONS)
    return Fit(end.place[0], end.place[1], end.flux, end.covariance, end.a, end.b, iterations)


def whiten_source(
    stack: Stack,
    trail: Trail,
    place: Float[Array, "2"],
    noise: Noise,
    data: Float[Array, "T P"],
    usable: Bool[Array, "T P"],
    patch: Patch,
) -> Whitened:
    """Whiten a source, its derivatives and the data by the noise.

    Args:
        stack: Arrays of the observation.
        trail: Patches along the track.
        place: Position (y, x) of the source in the derotated map, px.
        noise: Noise along the trail.
        data: Deviations of each frame in its patch.
        usable: Pixels that are used; the source, its derivatives and the data are set to 0 elsewhere.
        patch: Static settings.

    Returns:
        The whitened source, derivatives and data.
    """

    def source(place: Array) -> Array:
        return jnp.where(usable, template(stack, trail, place, patch), 0)

    h, slopes = source(place), jax.jacfwd(source)(place)
    vectors = jnp.stack([h, slopes[..., 0], slopes[..., 1], jnp.where(usable, data - noise.mean, 0)], axis=1)
    whitened = jax.vmap(likelihood.whiten)(vectors, noise.lower)
    return Whitened(whitened[:, 0], jnp.moveaxis(whitened[:, 1:3], 1, -1), whitened[:, 3])


def place_score(seen: Whitened, flux: Float[Array, ""]) -> Float[Array, "2"]:
    """Compute the gradient of the log-likelihood -|data - flux source|^2 / 2 with respect to the position, 1/px."""
    return flux * jnp.einsum("tpi,tp->i", seen.slopes, seen.data - flux * seen.source)


def source_covariance(seen: Whitened, flux: Float[Array, ""]) -> Float[Array, "3 3"]:
    """Compute the covariance of (y, x, flux), the inverse of the Fisher information.

    Parameters are normalised to unit Fisher information before inversion, which makes the conditioning independent of
    the unit of the flux.

    Args:
        seen: Whitened source and derivatives.
        flux: Flux of the source, in units of the deviations.

    Returns:
        The covariance; units px and flux.
    """
    design = jnp.concatenate([flux * seen.slopes, seen.source[..., None]], -1).reshape(-1, 3)
    unit = 1 / jnp.sqrt((design**2).sum(0))
    fisher = (design * unit).T @ (design * unit)
    eye = jnp.eye(3, dtype=design.dtype)
    return cho_solve(cho_factor(fisher + RIDGE * eye), eye) * unit[:, None] * unit


def secant(
    flux: Float[Array, ""], answer: Float[Array, ""], flux_before: Float[Array, ""], answer_before: Float[Array, ""]
) -> Float[Array, ""]:
    """Compute the fixed point of the line through the last two iterations of the flux.

    Args:
        flux: Flux subtracted in this iteration.
        answer: Resulting estimate b / a.
        flux_before: Flux subtracted in the previous iteration.
        answer_before: Resulting estimate of the previous iteration.

    Returns:
        The next flux; the slope of the line is limited to [0, LARGEST_SLOPE].
    """
    run = flux - flux_before
    slope = jnp.where(run != 0, (answer - answer_before) / jnp.where(run != 0, run, 1), 0)
    return flux + (answer - flux) / (1 - jnp.clip(slope, 0, LARGEST_SLOPE))
