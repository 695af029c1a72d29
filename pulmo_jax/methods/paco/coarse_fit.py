"""Least-squares fit of a source that is far brighter than the noise: the initial values of `source_fit`.

A bright source dominates the covariance of the patches that it crosses. Algorithm 3 of F18 removes it from there, but
converges slowly from a flux of 0. A fit without any covariance has large errors, which do not depend on the flux.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pulmo_jax.core.shape_model import inverse_2x2
from pulmo_jax.methods.paco.stack import Patch, Stack
from pulmo_jax.methods.paco.tracks import own_patches, passing_source, template, trail_of

STEPS = 8
LARGEST_STEP_PX = 0.5
REACH_PX = 2.5  # largest change of a coordinate
RIDGE = 1e-6


def least_squares(stack: Stack, patch: Patch, start: Float[Array, "2"]) -> tuple[Float[Array, "2"], Float[Array, ""]]:
    """Fit position and flux of a source to the frames minus their mean, with equal weight for every pixel.

    Args:
        stack: Arrays of the observation.
        patch: Static settings.
        start: Initial position (y, x) in the derotated map, px.

    Returns:
        Position (y, x), px, and flux in units of the deviations, by Gauss-Newton iteration.
    """
    trail = trail_of(stack, start, patch)
    data, usable = own_patches(stack, trail, patch)

    def flux_of(h: Array) -> Array:
        return (h * data).sum() / (h * h).sum()

    def model(place: Array) -> Array:
        at = passing_source(stack, place, patch)
        mean = jnp.asarray(jax.lax.map(lambda centre: at(centre).mean(0), trail.distinct))
        return jnp.where(
            usable, template(stack, trail, place, patch) - mean.at[trail.visit].get(mode="fill", fill_value=jnp.nan), 0
        )

    def step(_: Array | int, place: Array) -> Array:
        h, slopes = model(place), jax.jacfwd(model)(place)
        flux = flux_of(h)
        slopes -= h[..., None] * jnp.einsum("tp,tpi->i", h, slopes) / (h * h).sum()  # the flux is fitted too
        normal = jnp.einsum("tpi,tpj->ij", slopes, slopes)
        normal += RIDGE * jnp.trace(normal) * jnp.eye(2, dtype=normal.dtype)
        gradient = jnp.einsum("tpi,tp->i", slopes, data - flux * h) / flux
        moved = jnp.clip(jnp.nan_to_num(inverse_2x2(normal) @ gradient), -LARGEST_STEP_PX, LARGEST_STEP_PX)
        return jnp.clip(place + moved, start - REACH_PX, start + REACH_PX)

    place = jax.lax.fori_loop(0, STEPS, step, start)
    return place, flux_of(model(place))
