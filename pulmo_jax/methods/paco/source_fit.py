"""Fit of position and unbiased flux of a source, jointly in all channels (F18, Algorithm 3 and Sect. 3.3)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core import likelihood
from pulmo_jax.core.shape_model import inverse_2x2
from pulmo_jax.methods.paco.batching import map_channels, map_sources
from pulmo_jax.methods.paco.coarse_fit import least_squares
from pulmo_jax.methods.paco.stack import Patch, Stack
from pulmo_jax.methods.paco.tracks import Noise, Trail, learn, own_patches, template, trail_of

MAX_ITERATIONS = 60
FLUX_TOLERANCE = 1e-3  # in units of the standard deviation of the flux
PLACE_TOLERANCE = 0.01  # in units of the standard deviation of the position
ROUNDING = 1e-5  # relative change of the flux, and of the position in px, below which an iteration stops, too
LARGEST_STEP_PX = 0.25  # maximum change of a coordinate per iteration
LARGEST_SLOPE = 0.98  # upper bound on the slope in the secant step
LARGEST_GAIN = 20.0  # upper bound on the extrapolation of the position
RIDGE = 1e-6  # added to the normalised Fisher matrix before it is factorised


class Fit(NamedTuple):
    """Position in the derotated map and flux of a source, with their errors.

    Attributes:
        y: Row, px.
        x: Column, px.
        flux: Flux in units of the stack's deviations; NaN if no frame has a patch on the track.
        covariance: Covariance of (y, x, flux) with that of the noise model propagated (see `propagated`); px and flux.
        a: Likelihood term a at the last iteration.
        b: Likelihood term b at the last iteration.
        throughput: Fraction of a small change of the flux that a single pass, with the source in its own noise model,
            recovers; 1 / (throughput sqrt(a)) is the standard deviation of the flux at a fixed position.
        iterations: Number of iterations; MAX_ITERATIONS without convergence.
    """

    y: Float[Array, "*N"]
    x: Float[Array, "*N"]
    flux: Float[Array, "*N"]
    covariance: Float[Array, "*N 3 3"]
    a: Float[Array, "*N"]
    b: Float[Array, "*N"]
    throughput: Float[Array, "*N"]
    iterations: Int[Array, "*N"]

    @property
    def snr(self) -> Float[Array, "*N"]:
        """Flux in units of its standard deviation at a fixed position; for a faint source the SNR of the map."""
        return self.flux * jnp.sqrt(self.a) * self.throughput


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


class Estimate(NamedTuple):
    """Estimate of a source in one channel, with the noise learnt without a source of given position and flux.

    Attributes:
        flux: Flux b / a.
        score: Gradient of the log-likelihood with respect to the position, 1/px.
        covariance: Covariance of (y, x, flux), the inverse of the Fisher information.
        a: Likelihood term a.
        b: Likelihood term b.
    """

    flux: Float[Array, ""]
    score: Float[Array, "2"]
    covariance: Float[Array, "3 3"]
    a: Float[Array, ""]
    b: Float[Array, ""]


class Climb(NamedTuple):
    """State of the iteration.

    Attributes:
        start: Initial position on the sky, whose track selects the patches.
        place: Position on the sky.
        fluxes: Flux in each channel, subtracted before the noise is learnt.
        a: Likelihood term a of each channel.
        before: Fluxes and resulting estimates of the previous iteration.
        moves: Position and Fisher step of the previous iteration.
        iteration: Number of iterations.
        settled: Whether the iteration has converged.
    """

    start: Float[Array, "*N 2"]
    place: Float[Array, "*N 2"]
    fluxes: Float[Array, "*N L"]
    a: Float[Array, "*N L"]
    before: tuple[Float[Array, "*N L"], Float[Array, "*N L"]]
    moves: tuple[Float[Array, "*N 2"], Float[Array, "*N 2"]]
    iteration: Int[Array, "*N"]
    settled: Bool[Array, "*N"]


@partial(jax.jit, static_argnames=("patch",))
def characterise(stack: Stack, places: Float[Array, "N 2"], patch: Patch, move: bool | Bool[Array, ""] = True) -> Fit:
    """Fit position and unbiased flux of the sources nearest to N positions in one channel, independently of each other.

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
    sky = Sky(stack.centre, stack.centre[None], jnp.ones(1, stack.centre.dtype))
    zero = jnp.zeros(1, stack.centre.dtype)

    def fit_one(patch: Patch, place: Array) -> Fit:
        end = climb([stack], (patch,), sky, place, zero, move)
        return jax.tree.map(lambda leaf: leaf[0], as_fit([stack], (patch,), sky, end))

    with jax.default_matmul_precision("highest"):
        return map_sources(fit_one, stack.deviations, patch, places.astype(stack.centre.dtype))


def best_fit(stacks: Sequence[Stack], patches: tuple[Patch, ...], sky: Sky, start: Float[Array, "2"]) -> Fit:
    """Fit a source of any flux near `start` in all channels: the more significant result of two initial values.

    The iteration from zero flux finds faint sources. A source that is far brighter than the noise shapes the noise
    model until most of its flux is removed from it; least squares find its position and flux first.

    Args:
        stacks: Arrays of each channel.
        patches: Static settings of each channel.
        sky: Transformation between the sky grid and the channels.
        start: Initial position (y, x) on the sky grid, px.

    Returns:
        The fit of every channel.
    """
    coarse = map_channels(least_squares, stacks, patches, sky.in_channels(start))
    places, fluxes = (jnp.stack(part) for part in zip(*coarse, strict=True))
    sound = jnp.isfinite(fluxes) & jnp.isfinite(places).all(-1)
    weights = jnp.where(sound, fluxes, 0) ** 2
    bright = (weights @ jnp.where(sound[:, None], sky.from_channels(places), 0)) / jnp.where(
        weights.sum() > 0, weights.sum(), 1
    )
    starts = jnp.stack([start, jnp.where(weights.sum() > 0, bright, start)])
    begins = jnp.stack([jnp.zeros_like(fluxes), jnp.where(sound, fluxes, 0)])
    ends = jax.lax.map(lambda begin: climb(stacks, patches, sky, *begin, move=True), (starts, begins))
    snr = jnp.nan_to_num(ends.fluxes * jnp.sqrt(ends.a), nan=0, posinf=0, neginf=0)
    best = jnp.argmax((jnp.maximum(snr, 0) ** 2).sum(-1))
    return as_fit(stacks, patches, sky, jax.tree.map(lambda leaf: leaf[best], ends))


def climb(
    stacks: Sequence[Stack],
    patches: tuple[Patch, ...],
    sky: Sky,
    start: Float[Array, "2"],
    fluxes: Float[Array, "L"],
    move: bool | Bool[Array, ""],
) -> Climb:
    """Find the position that maximises the joint likelihood of all channels within 1 px of `start`, and the fluxes.

    Each iteration learns the noise from the stack minus the current source model, estimates the flux b / a in the
    original stack, and updates the position by Fisher scoring. The secant method finds the fixed point of the flux in a
    tenth of the iterations of the paper's recursion, and a step of Barzilai and Borwein (1988) that of the position.

    Args:
        stacks: Arrays of each channel.
        patches: Static settings of each channel.
        sky: Transformation between the sky grid and the channels.
        start: Initial position (y, x) on the sky grid, px.
        fluxes: Initial flux in each channel, in units of its deviations.
        move: Whether the position is fitted too.

    Returns:
        The state at convergence, or after MAX_ITERATIONS.
    """
    trails = sky.in_channels(start)
    reach = 1 / sky.scales.max()  # px; the source stays on the patches of the trail

    def step(state: Climb) -> Climb:
        seen = estimates(stacks, patches, trails, sky.in_channels(state.place), state.fluxes)
        first = state.iteration == 0
        next_fluxes = jnp.where(first, seen.flux, secant(state.fluxes, seen.flux, *state.before))
        weights = information(seen.covariance, sky.scales).sum(0)
        score = (sky.scales[:, None] * jnp.nan_to_num(seen.score)).sum(0)
        newton = jnp.where(move, solve(weights, score), 0)
        gain = jnp.where(first, 1, extrapolation(state.place - state.moves[0], state.moves[1] - newton))
        shift = jnp.clip(gain * newton, -LARGEST_STEP_PX, LARGEST_STEP_PX)
        place = jnp.clip(state.place + shift, start - reach, start + reach)
        change, shift = abs(next_fluxes - state.fluxes), place - state.place
        still = (change * jnp.sqrt(seen.a) < FLUX_TOLERANCE) | (change < ROUNDING * abs(next_fluxes))
        at_rest = (shift @ weights @ shift < PLACE_TOLERANCE**2) | (abs(shift).max() < ROUNDING)
        settled = (still | jnp.isnan(next_fluxes)).all() & at_rest
        return Climb(
            start, place, next_fluxes, seen.a, (state.fluxes, seen.flux), (state.place, newton), state.iteration + 1,
            settled,
        )  # fmt: skip

    def goes_on(state: Climb) -> Array:
        lost = jnp.isnan(state.fluxes).all()  # further iterations cannot recover and would delay the rest of the batch
        return ~state.settled & ~lost & (state.iteration < MAX_ITERATIONS)

    zeros = jnp.zeros_like(fluxes)
    begin = Climb(
        start, start, fluxes, zeros, (zeros, zeros), (start, jnp.zeros_like(start)), jnp.zeros((), jnp.int32),
        jnp.zeros((), bool),
    )  # fmt: skip
    return jax.lax.while_loop(goes_on, step, begin)


def as_fit(stacks: Sequence[Stack], patches: tuple[Patch, ...], sky: Sky, end: Climb) -> Fit:
    """Compute the fit of every channel, with its errors, from the state at convergence."""
    places = sky.in_channels(end.place)
    seen, response = responses(stacks, patches, sky.in_channels(end.start), places, end.fluxes)
    found = end.settled & ~jnp.isnan(end.fluxes).all()
    iterations = jnp.where(found, end.iteration, MAX_ITERATIONS)
    return Fit(
        places[:, 0],
        places[:, 1],
        end.fluxes,
        jax.vmap(propagated)(seen.covariance, response),
        seen.a,
        seen.b,
        1 - response[:, 2, 2],
        jnp.broadcast_to(iterations, end.fluxes.shape),
    )


def estimate(stack: Stack, patch: Patch, trail_place: Array, place: Array, flux: Array) -> Estimate:
    """Estimate a source in one channel with the noise learnt without it.

    Args:
        stack: Arrays of the channel.
        patch: Static settings.
        trail_place: Position (y, x) whose track selects the patches, px.
        place: Position (y, x) of the source, px.
        flux: Flux that is subtracted before the noise is learnt, in units of the deviations.

    Returns:
        The estimate.
    """
    trail = trail_of(stack, trail_place, patch)
    data, usable = own_patches(stack, trail, patch)
    noise = learn(stack, trail, place, -flux, patch)
    seen = whiten_source(stack, trail, place, noise, data, usable, patch)
    a, b = (seen.source * seen.source).sum(), (seen.source * seen.data).sum()
    return Estimate(b / a, place_score(seen, b / a), source_covariance(seen, b / a), a, b)


def estimates(
    stacks: Sequence[Stack],
    patches: tuple[Patch, ...],
    trails: Float[Array, "L 2"],
    places: Float[Array, "L 2"],
    fluxes: Float[Array, "L"],
) -> Estimate:
    """Estimate a source in every channel (see `estimate`)."""
    found = map_channels(estimate, stacks, patches, trails, places, fluxes)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def responses(
    stacks: Sequence[Stack],
    patches: tuple[Patch, ...],
    trails: Float[Array, "L 2"],
    places: Float[Array, "L 2"],
    fluxes: Float[Array, "L"],
) -> tuple[Estimate, Float[Array, "L 3 3"]]:
    """Estimate a source in every channel, and the derivative of (y, x, flux) with respect to the source subtracted."""

    def channel(stack: Stack, patch: Patch, trail_place: Array, place: Array, flux: Array) -> tuple[Estimate, Array]:
        def update(parameters: Array) -> tuple[Array, Estimate]:
            seen = estimate(stack, patch, trail_place, parameters[:2], parameters[2])
            return jnp.append(parameters[:2] + seen.covariance[:2, :2] @ seen.score, seen.flux), seen

        response, seen = jax.jacfwd(update, has_aux=True)(jnp.append(place, flux))
        return seen, response

    found = map_channels(channel, stacks, patches, trails, places, fluxes)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def information(covariance: Float[Array, "L 3 3"], scales: Float[Array, "L"]) -> Float[Array, "L 2 2"]:
    """Compute each channel's information on the sky position, marginalised over the flux.

    Args:
        covariance: Covariance of (y, x, flux) in each channel.
        scales: Magnification of each channel relative to the sky grid.

    Returns:
        Information matrices, 1/px^2; 0 for channels that do not constrain the position.
    """
    place = covariance[:, :2, :2]
    sound = jnp.isfinite(place).all((1, 2)) & (determinant(place) > 0)
    safe = jnp.where(sound[:, None, None], place, jnp.eye(2, dtype=place.dtype))
    return jnp.where(sound[:, None, None], inverse_2x2(safe) * scales[:, None, None] ** 2, 0)


def determinant(matrix: Float[Array, "*L 2 2"]) -> Float[Array, "*L"]:
    """Compute determinants of 2 x 2 matrices."""
    return matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]


def solve(total: Float[Array, "2 2"], vector: Float[Array, "2"]) -> Float[Array, "2"]:
    """Compute the Fisher scoring step total^-1 vector, px; 0 if the information matrix is singular."""
    known = determinant(total) > 0
    return jnp.where(known, inverse_2x2(jnp.where(known, total, jnp.eye(2, dtype=total.dtype))) @ vector, 0)


def extrapolation(moved: Float[Array, "2"], change: Float[Array, "2"]) -> Float[Array, ""]:
    """Compute the factor of a Fisher step from the last one (Barzilai and Borwein 1988, IMA J. Numer. Anal. 8, 141).

    The noise model contains a part of the source as long as its position is wrong, which shortens the steps.

    Args:
        moved: Last change of the position, px.
        change: Decrease of the step since then, px.

    Returns:
        |moved|^2 / (moved . change), in [1, LARGEST_GAIN].
    """
    slope = moved @ change
    return jnp.clip(jnp.where(slope > 0, moved @ moved / jnp.where(slope > 0, slope, 1), 1), 1, LARGEST_GAIN)


def propagated(covariance: Float[Array, "3 3"], response: Float[Array, "3 3"]) -> Float[Array, "3 3"]:
    """Propagate the covariance of an estimate of (y, x, flux) to the fixed point of its iteration.

    The noise model is learnt without the source, at the position and flux that are to be estimated. An error dz of
    these changes the estimate by J dz. The fixed point z = g(z, data) therefore has the error (1 - J)^-1 dg.

    Args:
        covariance: Covariance of a single estimate, the inverse of the Fisher information.
        response: Its derivative J with respect to the parameters subtracted.

    Returns:
        The covariance at the fixed point.
    """
    unit = jnp.sqrt(jnp.diag(covariance))
    eye = jnp.eye(3, dtype=covariance.dtype)
    normal = jnp.where(unit > 0, 1 / jnp.where(unit > 0, unit, 1), 0)
    gain = jnp.linalg.inv(eye - normal[:, None] * response * unit)
    return unit[:, None] * (gain @ (normal[:, None] * covariance * normal) @ gain.T) * unit


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
    flux: Float[Array, "*L"],
    answer: Float[Array, "*L"],
    flux_before: Float[Array, "*L"],
    answer_before: Float[Array, "*L"],
) -> Float[Array, "*L"]:
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
