"""Log-likelihood of one source as a function of position, flux, PSF and orientation, differentiable in all of them.

The model is F18's (Eq. 13): the patch r_t around the source in frame t is Gaussian, r_t ~ N(m + flux h_t, C), and the
frames are independent. h_t is the PSF at the sub-pixel position in frame t; m and C belong to the patch's location.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from pulmo_jax.core import geometry, likelihood
from pulmo_jax.core import psf as point_spread
from pulmo_jax.data.psf import Psf
from pulmo_jax.methods.paco import tracks
from pulmo_jax.methods.paco.observation import Observation
from pulmo_jax.methods.paco.settings import Settings
from pulmo_jax.methods.paco.stack import Patch, Stack, prepare
from pulmo_jax.methods.paco.tracks import Noise, Trail

Number = float | int | np.floating | Shaped[Array, ""] | Shaped[np.ndarray, ""]
Stamp = Psf | Float[Array, "S S"] | Float[np.ndarray, "S S"] | None
DEFAULT = Settings()


class TrackNoise(NamedTuple):
    """Covariances of the patches along a track, as constants, and the frames' means.

    Attributes:
        trail: The patches.
        mean: Mean of the frames in each patch, with the source in it.
        lower: Cholesky factor of the covariance without the source; in robust mode that of s_t^2 C.
    """

    trail: Trail
    mean: Float[Array, "T P"]
    lower: Float[Array, "T P P"]


class Source(NamedTuple):
    """A source in the units of a stack.

    Attributes:
        place: Position (y, x) in the derotated map, px.
        flux: Flux, in units of the deviations.
    """

    place: Float[Array, "2"]
    flux: Float[Array, ""]


def log_likelihood(
    observation: Observation,
    y: Number,
    x: Number,
    flux: Number,
    psf: Stamp = None,
    north: Number = 0.0,
    *,
    reference: tuple[Number, Number] | Float[Array, "2"] | Float[np.ndarray, "2"] | None = None,
    noise: TrackNoise | None = None,
    settings: Settings = DEFAULT,
) -> Float[Array, ""]:
    """Gaussian log-likelihood of the frames' patches along the track of one source.

    A pure function: `jax.jit`, `vmap`, `grad` and `hessian` work in y, x, flux, psf and north, and in the observation,
    which is a pytree.

    Noise. By default mean and covariance of every patch are learnt from the frames minus the source (F18, Algorithm 3)
    and depend on all arguments; in robust mode the frame weights are differentiated implicitly (second
    derivatives by `jax.hessian` or `jacfwd`, not by `jacrev` of `grad`). With `noise` the
    covariances are constants and the likelihood is profiled over the means. Use that for estimates and errors: it is
    faster; its maximum has a smaller error, since the covariance of a patch rests on all frames but is compared with
    one; and its curvature gives errors that include the loss to self-subtraction, which 1 / sqrt(a) neglects
    (measured in docs/statistics/point_sources.md).

    Patches. They are centred on the pixels nearest to the track, which change in steps, and are constants in every
    derivative. The value jumps where a pixel changes, because the new patch contains other data. Values at two
    positions are comparable only with one `reference` or `noise`, which fixes the patches; the function is then smooth
    within about half a FWHM of that position.

    Args:
        observation: The stack.
        y: Row of the source in the derotated map, px.
        x: Column, px.
        flux: Flux in units of the PSF.
        psf: PSF of a source of flux 1; that of the observation by default. An array is an odd square stamp with the
            source on the central pixel. The footprint of a patch remains that of the observation's PSF.
        north: Additional rotation of the field, degrees: a source at angle theta = atan2(y - cy, x - cx) of the map is
            at theta + north - angle in a frame. A prior on it expresses the uncertainty of true north or of the
            rotator's offset; the data determine only theta + north.
        reference: Position (y, x) in the derotated map at north = 0 whose track fixes the patches; by default that of
            the source, as a constant.
        noise: Constant covariances, from `track_noise`; they fix the patches too.
        settings: Settings of the noise model.

    Returns:
        The log-likelihood of the frames in their own unit; 0 if no frame has a patch.

    Raises:
        InputError: If the patch radius of the settings exceeds the observation's PSF.

    Reference:
        Flasseur et al. 2018, A&A 618, A138, Eq. 13 and Algorithm 3.
    """
    return _log_likelihood(observation, y, x, flux, psf, north, reference, noise, settings=settings)


@partial(jax.jit, static_argnames=("settings",))
def _log_likelihood(
    observation: Observation, y: Number, x: Number, flux: Number, psf: Stamp, north: Number,
    reference: tuple | Array | np.ndarray | None, noise: TrackNoise | None, settings: Settings,
) -> Array:  # fmt: skip
    with jax.default_matmul_precision("highest"):
        stack, patch, source = prepare_source(observation, y, x, flux, psf, north, settings)
        if noise is not None:
            return log_density(stack, source, noise, patch) + log_volume(stack, noise.trail, observation, patch)
        if reference is None:  # the same place in the map at north = 0
            turned = geometry.frame_position(source.place[0], source.place[1], -jnp.asarray(north), stack.centre)
            at = jax.lax.stop_gradient(jnp.stack(turned))
        else:
            at = jnp.stack([jnp.asarray(value, stack.deviations.dtype) for value in reference])
        unturned = stack._replace(angles_deg=stack.angles_deg + jnp.asarray(north, stack.deviations.dtype))
        trail = tracks.trail_of(unturned, at, patch)
        learnt = tracks.learn(stack, trail, source.place, -source.flux, patch)
        return gaussian(stack, source, trail, learnt, patch) + log_volume(stack, trail, observation, patch)


def track_noise(
    observation: Observation,
    y: Number,
    x: Number,
    flux: Number,
    psf: Stamp = None,
    north: Number = 0.0,
    *,
    settings: Settings = DEFAULT,
) -> TrackNoise:
    """Learn the noise along the track of a source, without the source (F18, Algorithm 3).

    Args:
        observation: The stack.
        y: Row of the source in the derotated map, px.
        x: Column, px.
        flux: Flux of the source, which is removed, in units of the PSF.
        psf: PSF, as in `log_likelihood`.
        north: Additional rotation of the field, degrees.
        settings: Settings of the noise model.

    Returns:
        Covariances and means, for `log_likelihood`.
    """
    return _track_noise(observation, y, x, flux, psf, north, settings=settings)


@partial(jax.jit, static_argnames=("settings",))
def _track_noise(
    observation: Observation, y: Number, x: Number, flux: Number, psf: Stamp, north: Number, settings: Settings
) -> TrackNoise:
    with jax.default_matmul_precision("highest"):
        stack, patch, source = prepare_source(observation, y, x, flux, psf, north, settings)
        return learn_noise(stack, source, patch)


def prepare_source(
    observation: Observation, y: Number, x: Number, flux: Number, psf: Stamp, north: Number, settings: Settings
) -> tuple[Stack, Patch, Source]:
    """Convert the arguments of `log_likelihood` to arrays and static settings of computations along tracks."""
    stack, patch = prepare(observation, settings)
    dtype = stack.deviations.dtype
    stamp = stack.stamp if psf is None else jnp.asarray(psf.stamp if isinstance(psf, Psf) else psf, dtype)
    stack = stack._replace(stamp=stamp, angles_deg=stack.angles_deg - jnp.asarray(north, dtype))
    place = jnp.stack([jnp.asarray(y, dtype), jnp.asarray(x, dtype)])
    return stack, patch, Source(place, jnp.asarray(flux, dtype) / jnp.asarray(observation.unit, dtype))


def learn_noise(stack: Stack, source: Source, patch: Patch) -> TrackNoise:
    """Learn the noise along the track of a source, without the source (see `track_noise`)."""
    trail = tracks.trail_of(stack, source.place, patch)
    learnt = tracks.learn(stack, trail, source.place, -source.flux, patch)
    return TrackNoise(trail, learnt.mean + source.flux * mean_source(stack, source.place, trail, patch), learnt.lower)


def log_density(stack: Stack, source: Source, noise: TrackNoise, patch: Patch) -> Float[Array, ""]:
    """Log-likelihood of a source under given covariances, profiled over the mean, in the units of the stack.

    Args:
        stack: Arrays of the observation.
        source: The source.
        noise: Covariances and means.
        patch: Static settings.

    Returns:
        The log-likelihood.
    """
    linear, quadratic = flux_terms(stack, source.place, noise, patch)
    absent = gaussian(stack, Source(source.place, jnp.zeros_like(source.flux)), noise.trail, noise, patch)
    return absent + source.flux * linear - source.flux**2 * quadratic / 2


def flux_terms(
    stack: Stack, place: Float[Array, "2"], noise: TrackNoise, patch: Patch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Terms of the log-likelihood that are linear and quadratic in the flux, profiled over the mean.

    With e_t = r_t - flux h_t, the sum over all frames of (e_t - m)' C^-1 (e_t - m) is smallest for m the mean of e_t.
    It is then, with d_t = r_t minus its mean and H the mean of h_t over the frames, that without a source minus

        sum_t 2 flux h_t' C^-1 d_t - flux^2 h_t' C^-1 (h_t - H),

    in which h_t occurs only on the patch that the source covers. The maximum over the flux is the fixed point of
    Algorithm 3 for this C, and H is what self-subtraction removes. In robust mode H should be weighted as the mean of
    the frames; it is not.

    Args:
        stack: Arrays of the observation.
        place: Position (y, x) of the source in the derotated map, px.
        noise: Covariances and means.
        patch: Static settings.

    Returns:
        The sums of h' C^-1 d and of h' C^-1 (h - H) over the frames.
    """
    data, usable = tracks.own_patches(stack, noise.trail, patch)
    h = tracks.template(stack, noise.trail, place, patch)
    kept = h - mean_source(stack, place, noise.trail, patch)
    triple = jnp.where(usable[:, None], jnp.stack([h, data - noise.mean, kept], 1), 0)
    h, d, kept = jnp.moveaxis(jax.vmap(likelihood.whiten)(triple, noise.lower), 1, 0)
    return (h * d).sum(), (h * kept).sum()


def mean_source(stack: Stack, place: Float[Array, "2"], trail: Trail, patch: Patch) -> Float[Array, "T P"]:
    """Mean over all frames of a source of flux 1, on the patches of a trail: what self-subtraction removes.

    Args:
        stack: Arrays of the observation.
        place: Position (y, x) of the source in the derotated map, px.
        trail: The patches.
        patch: Static settings.

    Returns:
        The mean on each patch.
    """
    height, width = patch.shape
    side, offsets = len(stack.stamp), np.array(patch.offsets)
    pixel, shift = geometry.nearest(tracks.positions(stack, place), patch.extent_px)
    stamps = point_spread.shift(stack.stamp, shift)
    row, column = jnp.moveaxis(pixel[..., None] - side // 2 + np.arange(side), 1, 0)  # (T, S) each
    index = row[:, :, None] * width + column[:, None]
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    image = jnp.zeros(height * width, stamps.dtype).at[jnp.where(inside, index, 0)].add(jnp.where(inside, stamps, 0))
    location = trail.pixel[:, 0] * width + trail.pixel[:, 1]
    return image[location[:, None] + offsets @ np.array([width, 1])] / len(pixel)


def gaussian(stack: Stack, source: Source, trail: Trail, noise: Noise | TrackNoise, patch: Patch) -> Float[Array, ""]:
    """Log-density of the patches of a trail as independent Gaussians, in the units of the stack.

    Args:
        stack: Arrays of the observation.
        source: The source.
        trail: The patches.
        noise: Mean and Cholesky factor of the covariance of each.
        patch: Static settings.

    Returns:
        The sum over all patches; unusable pixels are left out.
    """
    data, usable = tracks.own_patches(stack, trail, patch)
    model = noise.mean + source.flux * tracks.template(stack, trail, source.place, patch)
    whitened = jax.vmap(likelihood.whiten)(jnp.where(usable, data - model, 0), noise.lower)
    scale = jnp.asarray(jnp.where(usable, jnp.diagonal(noise.lower, axis1=1, axis2=2), 1))
    squares = jnp.where(usable, whitened**2, 0)  # unusable pixels are independent of the others
    return -squares.sum() / 2 - jnp.log(scale).sum() - usable.sum() * jnp.log(2 * jnp.pi) / 2


def log_volume(stack: Stack, trail: Trail, observation: Observation, patch: Patch) -> Float[Array, ""]:
    """Log-Jacobian of the frames' unit: minus log(unit) for every usable pixel of the trail."""
    usable: Bool[Array, "T P"] = tracks.own_patches(stack, trail, patch)[1]
    return -usable.sum() * jnp.log(jnp.asarray(observation.unit, stack.deviations.dtype))
