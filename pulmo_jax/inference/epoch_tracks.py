"""A source along its track through several epochs: flux and SNR at each epoch, and position errors."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.core.kepler import Orbit, orbit_through
from pulmo_jax.inference.epoch_plan import Plan
from pulmo_jax.inference.orbits import OrbitSamples, sample_orbits
from pulmo_jax.methods.paco.epochs import Epochs, Flux, Star, criterion, pixel, sample
from pulmo_jax.methods.paco.orbit_search import Found, track


@dataclass(frozen=True, eq=False)
class Track:
    """A source along its best track.

    Attributes:
        criterion: Criterion, with free or constant flux as in the settings of the search.
        snr_combined: sum b / sqrt(sum a), the SNR of a constant flux.
        flux: sum b / sum a, the estimate of a constant flux.
        flux_std: Standard deviation of `flux`.
        sky: Offset (north, east) from the star at each epoch, arcsec.
        places: Position (y, x) in the map of each epoch, px.
        a: Likelihood term a at each epoch; 0 where the map has no value.
        b: Likelihood term b at each epoch.
        start_std: Standard deviation of (north, east) at the reference date, arcsec: from the samples or, for a fixed
            position, from the curvature of the criterion; NaN if it is not at a maximum.
        orbit: The best orbit; None for a fixed position.
        samples: Posterior samples of the orbit; None for a fixed position.
    """

    criterion: float
    snr_combined: float
    flux: float
    flux_std: float
    sky: Float[np.ndarray, "E 2"]
    places: Float[np.ndarray, "E 2"]
    a: Float[np.ndarray, "E"]
    b: Float[np.ndarray, "E"]
    start_std: Float[np.ndarray, "2"]
    orbit: Orbit | None = None
    samples: OrbitSamples | None = field(default=None, repr=False)

    @property
    def snr(self) -> Float[np.ndarray, "E"]:
        """SNR at each epoch; NaN where the map has no value."""
        return np.where(self.a > 0, self.b / np.sqrt(np.where(self.a > 0, self.a, 1)), np.nan)


class Along(NamedTuple):
    """Maps sampled along one track, on the device.

    Attributes:
        sky: Offset (north, east) at each epoch, arcsec.
        places: Position (y, x) in the map of each epoch, px.
        terms: Likelihood terms a and b at each epoch.
        orbit: The orbit; None for a fixed position.
    """

    sky: Float[Array, "E 2"]
    places: Float[Array, "E 2"]
    terms: Float[Array, "E 2"]
    orbit: Orbit | None


def follow(epochs: Epochs, best: Found, star: Star | None) -> Along:
    """Sample the maps along a track.

    Args:
        epochs: Maps of all epochs.
        best: The track.
        star: The star; None for a fixed position.

    Returns:
        Samples along the track.
    """
    sky, _ = track(best.start, best.shape, epochs.days, star)
    orbit = None if star is None else orbit_through(best.shape, best.start[0], best.start[1], star.parallax_mas)
    return Along(sky, pixel(epochs, epochs.north, sky), sample(epochs, sky), orbit)


def as_track(best: Found, along: Along) -> Track:
    """Convert host arrays to a track, without position errors.

    Args:
        best: The track.
        along: Samples along it, on the host.

    Returns:
        Track whose `start_std` is NaN.
    """
    a, b = np.asarray(along.terms).T
    total = a.sum()
    known = total > 0
    return Track(
        criterion=float(best.criterion),
        snr_combined=float(b.sum() / np.sqrt(total)) if known else float("nan"),
        flux=float(b.sum() / total) if known else float("nan"),
        flux_std=float(1 / np.sqrt(total)) if known else float("nan"),
        sky=np.asarray(along.sky),
        places=np.asarray(along.places),
        a=a,
        b=b,
        start_std=np.full(2, np.nan),
        orbit=along.orbit,
    )


def with_errors(epochs: Epochs, best: Found, found: Track, fwhm_px: float, plan: Plan) -> Track:
    """Add posterior samples of the orbit and their spread or, for a fixed position, its error.

    Args:
        epochs: Maps of all epochs.
        best: The track.
        found: Source along it.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        plan: Settings of the search.

    Returns:
        Source with errors.
    """
    if plan.star is None:
        curvature = -np.asarray(half_hessian(epochs, jnp.asarray(best.start), plan.flux))
        return replace(found, start_std=std_from(curvature))
    samples = sample_orbits(epochs, np.asarray(best.start), best.shape, plan.star, plan.flux, fwhm_px, plan.seed)
    return replace(found, start_std=samples.starts.std(0), samples=samples)


@partial(jax.jit, static_argnames="flux")
def half_hessian(epochs: Epochs, start: Float[Array, "2"], flux: Flux) -> Float[Array, "2 2"]:
    """Hessian of half the criterion, a log-likelihood, with respect to a fixed position, 1/arcsec^2.

    Args:
        epochs: Maps of all epochs.
        start: Offset (north, east), arcsec.
        flux: Whether the flux is free at every epoch, or constant.

    Returns:
        The Hessian.
    """

    def log_likelihood(place: Array) -> Array:
        return criterion(sample(epochs, jnp.broadcast_to(place, (len(epochs.north), 2))), flux) / 2

    return jax.hessian(log_likelihood)(start)


def std_from(curvature: Float[np.ndarray, "2 2"]) -> Float[np.ndarray, "2"]:
    """Standard deviations from the negative Hessian of a log-likelihood; NaN unless it is positive definite."""
    if not np.isfinite(curvature).all() or np.linalg.eigvalsh(curvature).min() <= 0:
        return np.full(2, np.nan)
    return np.sqrt(np.diag(np.linalg.inv(curvature)))
