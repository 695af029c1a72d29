"""Device arrays and static settings of an observation for computations along tracks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pulmo_jax.core import covariance, patches
from pulmo_jax.methods.paco.observation import Observation
from pulmo_jax.methods.paco.plan import footprint, step_bytes
from pulmo_jax.methods.paco.settings import Settings, ShrinkageName


class Stack(NamedTuple):
    """Arrays of an observation, with its frames flattened.

    Attributes:
        deviations: Frames minus their temporal mean, in units of the observation's `unit`.
        usable: Usable pixels.
        whole: Pixels on which a patch can be centred.
        n: Number of independent frames at each pixel.
        stamp: PSF stamp.
        angles_deg: Angle of each frame, degrees.
        centre: Centre of rotation (y, x), px.
    """

    deviations: Float[Array, "T pixels"]
    usable: Bool[Array, "pixels"]
    whole: Bool[Array, "pixels"]
    n: Float[Array, "pixels"]
    stamp: Float[Array, "S S"]
    angles_deg: Float[Array, "T"]
    centre: Float[Array, "2"]


class Patch(NamedTuple):
    """Static settings of a computation along tracks; each distinct value is compiled once.

    Attributes:
        shrinkage: Estimator of the shrinkage factor.
        rho: The shrinkage factor if it is fixed, otherwise None.
        offsets: Footprint of a patch (dy, dx), px.
        shape: Height and width of the frames, px.
        weights_error: Relative tolerance of the frame weights in robust mode; None in the other modes.
        step_bytes: Working memory of one step, bytes.
        n_distinct: Upper bound on the different patches along a track (see `tracks.distinct_pixels`), at most T.
    """

    shrinkage: ShrinkageName
    rho: float | None
    offsets: tuple[tuple[int, int], ...]
    shape: tuple[int, int]
    weights_error: float | None = None
    step_bytes: int = 2**23
    n_distinct: int = 2**31

    @property
    def extent_px(self) -> int:
        """Larger side length of a frame, px."""
        return max(self.shape)


def prepare(observation: Observation, settings: Settings) -> tuple[Stack, Patch]:
    """Prepare an observation for computations along tracks.

    Args:
        observation: The observation.
        settings: Settings of the noise model.

    Returns:
        Device arrays and static settings.
    """
    offsets = footprint(observation.psf, settings.patch_radius_px)
    whole = patches.whole_patches(observation.usable, offsets, settings.usable_share)
    dtype = observation.deviations.dtype
    deviations, n = flatten(observation.deviations, settings.frames == "effective")
    stack = Stack(
        deviations,
        jnp.asarray(observation.usable.ravel()),
        jnp.asarray(whole.ravel()),
        n,
        jnp.asarray(observation.psf.stamp, dtype),
        jnp.asarray(observation.angles_deg, dtype),
        jnp.asarray(observation.centre, dtype),
    )
    places = tuple((int(dy), int(dx)) for dy, dx in offsets)
    weights_error = settings.weights_error if settings.mode == "robust" else None
    budget = step_bytes(settings.memory_mb * 2**20)
    return stack, Patch(settings.shrinkage, settings.rho, places, observation.shape, weights_error, budget)


@partial(jax.jit, static_argnames="effective")
def flatten(
    deviations: Float[Array, "T H W"], effective: bool
) -> tuple[Float[Array, "T pixels"], Float[Array, "pixels"]]:
    """Flatten frames, and determine the number of independent frames at each pixel.

    Args:
        deviations: Frames minus their temporal mean.
        effective: Whether to use the effective number of temporally correlated frames instead of T.

    Returns:
        The flattened frames, and the number of independent frames.
    """
    flat = deviations.reshape(len(deviations), -1)
    n = covariance.effective_frames(flat) if effective else jnp.full(flat.shape[1], len(flat), flat.dtype)
    return flat, n
