"""One source at a time: what the patches along its track say of it, with the source itself put in or taken out.

The noise along the track is learnt from the stack plus a chosen multiple of the source, so the same few lines inject a
source (throughput), take one away (F18, Algorithm 3) and fit its place.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

from pulmo_jax.core import covariance, geometry, likelihood, patches, psf, robust
from pulmo_jax.methods.paco.maps import footprint
from pulmo_jax.methods.paco.observation import Observation
from pulmo_jax.methods.paco.settings import Settings, ShrinkageName

LOCATIONS_AT_ONCE = 16
MAX_ITERATIONS = 60
FLUX_TOLERANCE = 1e-3  # of a flux's standard deviation
PLACE_TOLERANCE_PX = 1e-3
LARGEST_STEP_PX = 0.25  # of a place in one iteration
LARGEST_SLOPE = 0.95  # of Algorithm 3's iteration that is believed


class Stack(NamedTuple):
    """An observation's arrays. whole: the locations that exist; n: independent frames of each pixel."""

    deviations: Float[Array, "T pixels"]
    usable: Bool[Array, "pixels"]
    whole: Bool[Array, "pixels"]
    n: Float[Array, "pixels"]
    stamp: Float[Array, "S S"]
    angles_deg: Float[Array, "T"]
    centre: Float[Array, "2"]


class Patch(NamedTuple):
    """What the computation along a track is compiled for. weights_error: of robust mode, None in others."""

    shrinkage: ShrinkageName
    rho: float | None
    offsets: tuple[tuple[int, int], ...]
    shape: tuple[int, int]
    weights_error: float | None = None


class Trail(NamedTuple):
    """The pixels (row, column) nearest to a track in each frame, and whether a whole patch lies there."""

    pixel: Int[Array, "T 2"]
    usable: Bool[Array, "T"]


class Noise(NamedTuple):
    """Mean and Cholesky factor of the covariance of the patch at each frame's place on a track, in that frame: in
    robust mode s_t L."""

    mean: Float[Array, "T P"]
    lower: Float[Array, "T P P"]


class Fit(NamedTuple):
    """A source's place in the derotated map, its flux in units of the stack's deviations, and how well they are known.

    covariance: of (y, x, flux), the inverse of Fisher's information. a, b: terms of the likelihood at the end.
    iterations: how many were made; MAX_ITERATIONS says that it did not settle.
    """

    y: Float[Array, ""]
    x: Float[Array, ""]
    flux: Float[Array, ""]
    covariance: Float[Array, "3 3"]
    a: Float[Array, ""]
    b: Float[Array, ""]
    iterations: Int[Array, ""]


def prepare(of: Observation, settings: Settings) -> tuple[Stack, Patch]:
    offsets = footprint(of.psf, settings.patch_radius_px)
    whole = patches.whole_patches(of.usable, offsets, settings.usable_share)
    dtype, flat = of.deviations.dtype, of.deviations.reshape(len(of.deviations), -1)
    effective = settings.frames == "effective"
    stack = Stack(
        flat,
        jnp.asarray(of.usable.ravel()),
        jnp.asarray(whole.ravel()),
        jax.jit(covariance.effective_frames)(flat) if effective else jnp.full(flat.shape[1], len(flat), dtype),
        jnp.asarray(of.psf.stamp, dtype),
        jnp.asarray(of.angles_deg, dtype),
        jnp.asarray(of.centre, dtype),
    )
    places = tuple((int(dy), int(dx)) for dy, dx in offsets)
    weights_error = settings.weights_error if settings.mode == "robust" else None
    return stack, Patch(settings.shrinkage, settings.rho, places, of.shape, weights_error)


def positions(stack: Stack, place: Float[Array, "2"]) -> Float[Array, "T 2"]:
    return jnp.stack(geometry.frame_position(place[0], place[1], stack.angles_deg, stack.centre), axis=-1)


def trail_of(stack: Stack, place: Float[Array, "2"], patch: Patch) -> Trail:
    pixel, _ = geometry.nearest(positions(stack, place))
    inside = ((pixel >= 0) & (pixel < jnp.array(patch.shape))).all(-1)
    pixel = jnp.where(inside[:, None], pixel, 0)
    usable = inside & stack.whole[pixel[:, 0] * patch.shape[1] + pixel[:, 1]]
    # Where nothing can be computed any whole patch stands in, and its frame does not count.
    instead = jnp.stack(jnp.divmod(jnp.argmax(stack.whole), patch.shape[1])).astype(jnp.int32)
    return Trail(jnp.where(usable[:, None], pixel, instead), usable)


def learn(stack: Stack, trail: Trail, place: Float[Array, "2"], flux: Float[Array, ""], patch: Patch) -> Noise:
    """The noise along the trail in the stack plus `flux` times a source at `place`."""
    offsets = np.array(patch.offsets)
    flat = patches.flat_offsets(offsets, patch.shape[1])
    shrinkage = covariance.shrinkage_factor(patch.shrinkage, patch.rho)
    pixel, shift = geometry.nearest(positions(stack, place))
    stamps, corner = psf.shift(stack.stamp, shift), pixel - len(stack.stamp) // 2

    def at(frame_and_centre: tuple[Array, Array]) -> Noise:
        frame, centre = frame_and_centre
        y, x = (centre + offsets).T
        location = centre[0] * patch.shape[1] + centre[1]
        usable = stack.usable[location + flat]
        source = psf.render(stamps, corner, y[:, None], x[:, None]).T  # (T, P)
        samples = patches.extract(stack.deviations, location, flat) + flux * jnp.where(usable, source, 0)
        if patch.weights_error is not None:
            fit = robust.scale_mixture(samples, stack.n[location], shrinkage, patch.weights_error)
            return Noise(fit.statistics.mean, fit.statistics.factor.lower / jnp.sqrt(fit.weights[frame]))
        mean = samples.mean(0)
        s = covariance.sample_covariance(samples - mean)
        rho = shrinkage(s, samples - mean, stack.n[location])
        return Noise(mean, covariance.factorise(covariance.shrink(s, rho), jnp.diag(s) > 0).lower)

    # Whole batches only: XLA would compile a smaller last one a second time.
    n_frames = len(trail.pixel)
    frames = jnp.minimum(jnp.arange(n_frames + -n_frames % LOCATIONS_AT_ONCE), n_frames - 1)
    noise = jax.lax.map(at, (frames, trail.pixel[frames]), batch_size=LOCATIONS_AT_ONCE)
    return Noise(noise.mean[:n_frames], noise.lower[:n_frames])


def own_patches(stack: Stack, trail: Trail, patch: Patch) -> tuple[Float[Array, "T P"], Bool[Array, "T P"]]:
    """Each frame's own patch on the trail, and which of its pixels count."""
    flat = patches.flat_offsets(np.array(patch.offsets), patch.shape[1])
    index = (trail.pixel[:, 0] * patch.shape[1] + trail.pixel[:, 1])[:, None] + flat
    return jnp.take_along_axis(stack.deviations, index, axis=1), stack.usable[index] & trail.usable[:, None]


def template(stack: Stack, trail: Trail, place: Float[Array, "2"], patch: Patch) -> Float[Array, "T P"]:
    """The PSF on each frame's patch of a source at `place`; differentiable in it."""
    offsets = np.array(patch.offsets)
    reach = np.arange(offsets.min(), offsets.max() + 1)
    shift = positions(stack, place) - trail.pixel
    grid = psf.sample(stack.stamp, reach - shift[:, :1], reach - shift[:, 1:])
    return grid[:, offsets[:, 0] - reach[0], offsets[:, 1] - reach[0]]


def terms(
    stack: Stack, place: Float[Array, "2"], learnt_flux: Float[Array, ""], seen_flux: Float[Array, ""], patch: Patch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """a and b at `place`, in data with `seen_flux` of a source there added, of noise learnt with `learnt_flux` of it.

    The same flux in both is an injection; -flux and 0 is a step of Algorithm 3.
    """
    trail = trail_of(stack, place, patch)
    noise = learn(stack, trail, place, learnt_flux, patch)
    data, usable = own_patches(stack, trail, patch)
    h = jnp.where(usable, template(stack, trail, place, patch), 0)
    a, b = jax.vmap(likelihood.terms)(h, data + seen_flux * h - noise.mean, noise.lower)
    return jnp.where(trail.usable, a, 0).sum(), jnp.where(trail.usable, b, 0).sum()


@partial(jax.jit, static_argnames=("patch",))
def inject(
    stack: Stack, places: Float[Array, "N 2"], fluxes: Float[Array, "N"], patch: Patch
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """a and b where sources of these fluxes are put into the stack, one at a time."""
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda source: terms(stack, source[0], source[1], source[1], patch), (places, fluxes))


@partial(jax.jit, static_argnames=("patch",))
def characterise(stack: Stack, places: Float[Array, "N 2"], patch: Patch, move: bool | Array = True) -> Fit:
    """Place and unbiased flux of the sources nearest to `places`, one at a time (F18, Algorithm 3, and Sect. 3.3).

    Each iteration learns the noise from the stack without the source as it is known so far, takes the flux b / a in
    the stack as it is, and moves the place up the likelihood's gradient, by Fisher scoring. The flux's fixed point is
    approached by a secant, in a tenth of the paper's iterations. move: False leaves the places as they are.
    """
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda place: characterise_one(stack, place, patch, move), places)


class _State(NamedTuple):
    place: Array
    flux: Array  # learnt without
    answer: Array  # the b / a that this gives
    before: tuple[Array, Array]  # the iteration before's flux and answer
    covariance: Array
    a: Array
    b: Array
    iteration: Array
    settled: Array


def characterise_one(stack: Stack, start: Float[Array, "2"], patch: Patch, move: bool | Array) -> Fit:
    trail = trail_of(stack, start, patch)
    data, usable = own_patches(stack, trail, patch)
    dtype = stack.deviations.dtype

    def step(state: _State) -> _State:
        noise = learn(stack, trail, state.place, -state.flux, patch)
        deviation = jnp.where(usable, data - noise.mean, 0)
        whiten = jax.vmap(likelihood.whiten)

        def whitened(place: Array) -> Array:
            return whiten(jnp.where(usable, template(stack, trail, place, patch), 0), noise.lower)

        h, seen = whitened(state.place), whiten(deviation, noise.lower)
        a, b = (h * h).sum(), (h * seen).sum()
        answer = b / a
        flux = jnp.where(state.iteration == 0, answer, secant(state.flux, answer, *state.before))

        def log_likelihood(place: Array, flux: Array) -> Array:
            return -0.5 * ((seen - flux * whitened(place)) ** 2).sum()

        slopes = answer * jax.jacfwd(whitened)(state.place)  # (T, P, 2)
        design = jnp.concatenate([slopes, h[..., None]], -1).reshape(-1, 3)
        # In units of each parameter's own error the matrix is well conditioned, whatever the flux's unit.
        unit = 1 / jnp.sqrt((design**2).sum(0))
        fisher = (design * unit).T @ (design * unit)
        covariance_ = cho_solve(cho_factor(fisher + 1e-6 * jnp.eye(3, dtype=dtype)), jnp.eye(3, dtype=dtype))
        covariance_ = covariance_ * unit[:, None] * unit
        score = jax.grad(log_likelihood)(state.place, answer)
        move_by = jnp.where(move, jnp.nan_to_num(covariance_[:2, :2] @ score), 0)
        move_by = jnp.clip(move_by, -LARGEST_STEP_PX, LARGEST_STEP_PX)
        place = jnp.clip(state.place + move_by, start - 1, start + 1)  # on the trail's patches
        settled = (abs(flux - state.flux) * jnp.sqrt(a) < FLUX_TOLERANCE) & (
            abs(place - state.place).max() < PLACE_TOLERANCE_PX
        )
        return _State(place, flux, answer, (state.flux, answer), covariance_, a, b, state.iteration + 1, settled)

    zero = jnp.zeros((), dtype)
    start_state = _State(
        start.astype(dtype), zero, zero, (zero, zero), jnp.eye(3, dtype=dtype), zero, zero,
        jnp.zeros((), jnp.int32), jnp.zeros((), bool),
    )  # fmt: skip
    end = jax.lax.while_loop(lambda s: ~s.settled & (s.iteration < MAX_ITERATIONS), step, start_state)
    return Fit(end.place[0], end.place[1], end.flux, end.covariance, end.a, end.b, end.iteration)


def secant(flux: Array, answer: Array, flux_before: Array, answer_before: Array) -> Array:
    """The flux at which the answer would equal it, on the line through the last two; the answer itself where that line
    is too steep to trust."""
    run = flux - flux_before
    slope = jnp.where(run != 0, (answer - answer_before) / jnp.where(run != 0, run, 1), 0)
    return flux + (answer - flux) / (1 - jnp.clip(slope, 0, LARGEST_SLOPE))
