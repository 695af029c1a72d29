"""Coverage of the prior by the tried orbits (mismatch of a template bank, Owen 1996, PRD 53, 6749)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.core.kepler import Shape
from pulmo_jax.inference.epoch_plan import Plan
from pulmo_jax.inference.epoch_search import STEP_FWHM, Bank
from pulmo_jax.inference.orbits import draw_shapes
from pulmo_jax.methods.paco.epochs import Epochs, Star
from pulmo_jax.methods.paco.orbit_search import track

TRIALS, NEIGHBOURS = 100, 5  # orbits drawn from the prior, and starts near each that are compared with it
GAUSSIAN_FWHM = 2 * np.sqrt(2 * np.log(2))  # in standard deviations


def coverage(epochs: Epochs, bank: Bank, fwhm_px: float, plan: Plan) -> Float[np.ndarray, "Q"]:
    """Fraction of the criterion of an orbit drawn from the prior that the nearest tried orbit retains.

    For a PSF of standard deviation sigma, the criterion decreases as exp(-d^2 / 2 sigma^2) with the distance d between
    the two orbits; this is averaged over the epochs and maximised over the orbits through the nearest starts.

    Args:
        epochs: Maps of all epochs.
        bank: Tracks that are searched.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        plan: Settings of the search; with a star.

    Returns:
        Fraction for each of TRIALS orbits, sorted.

    Reference:
        Owen 1996, PRD 53, 6749.
    """
    assert plan.star is not None
    rng = np.random.default_rng(plan.seed + 1)
    scale, starts = jax.device_get((epochs.scale, bank.starts))
    unit = float(scale[0])
    step = max(1, round(STEP_FWHM * fwhm_px))
    sigma = fwhm_px / GAUSSIAN_FWHM * unit
    places = starts[rng.integers(len(starts), size=TRIALS)]
    places = jnp.asarray(places + unit * step * (rng.random((TRIALS, 2)) - 0.5))
    shapes = draw_shapes(TRIALS, plan.star, plan.seed + 2)
    shares = kept_shares(epochs, places, shapes, bank.starts, bank.shapes, jnp.asarray(sigma), plan.star)
    return np.sort(np.asarray(shares))


@partial(jax.jit, static_argnames="star")
def kept_shares(
    epochs: Epochs,
    places: Float[Array, "Q 2"],
    shapes: Shape,
    starts: Float[Array, "N 2"],
    tried: Shape,
    sigma: Float[Array, ""],
    star: Star,
) -> Float[Array, "Q"]:
    """Fraction of the criterion that the nearest tried orbit retains (see `coverage`); sigma in arcsec."""

    def kept(pair: tuple[Array, Shape]) -> Array:
        place, shape = pair
        true, _ = track(place, shape, epochs.days, star)
        near = starts[jax.lax.top_k(-((starts - place) ** 2).sum(-1), min(NEIGHBOURS, len(starts)))[1]]
        tracks = jax.vmap(lambda start: jax.vmap(lambda s: track(start, s, epochs.days, star)[0])(tried))(near)
        return jnp.exp(-((tracks - true) ** 2).sum(-1) / (2 * sigma**2)).mean(-1).max()

    return jnp.asarray(jax.lax.map(kept, (places, shapes)))
