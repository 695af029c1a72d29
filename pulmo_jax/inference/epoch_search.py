"""Search of one field: all orbit shapes through all positions, then refinement of the highest tracks."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.ndimage import distance_transform_edt

from pulmo_jax.core.kepler import Shape
from pulmo_jax.inference.epoch_plan import Plan
from pulmo_jax.inference.epoch_tracks import Along, Track, as_track, follow
from pulmo_jax.inference.orbits import draw_shapes
from pulmo_jax.methods.paco.epochs import EpochMap, Epochs, Flux, Star, look_up
from pulmo_jax.methods.paco.orbit_search import Found, refine, search, track, tracks

REFINED = 24  # highest tracks of a search that are refined
STEP_FWHM = 1 / 3  # between positions at the reference date through which orbits are tried


@dataclass(frozen=True, eq=False)
class Bank:
    """All tracks of a search: M shapes through each of N positions at the reference date.

    Attributes:
        starts: Offsets (north, east) from the star at the reference date, arcsec.
        pixels: Flat indices of the starts in the first epoch's map.
        shapes: Orbit shapes, M of each parameter.
        tracks: Points along each track, indices of `methods.paco.epochs.nearest`.
    """

    starts: Float[Array, "N 2"]
    pixels: Int[np.ndarray, "N"]
    shapes: Shape
    tracks: Int[Array, "N M E"]


class Peak(NamedTuple):
    """Result of searching one field.

    Attributes:
        values: Maximum criterion over the shapes, for each start.
        snr: sum b / sqrt(sum a) along the same tracks; NaN where no epoch has a value.
        best: Refined track with the maximum criterion.
        track: Flux and SNR along it.
    """

    values: Float[np.ndarray, "N"]
    snr: Float[np.ndarray, "N"]
    best: Found
    track: Track


def make_bank(reference: EpochMap, epochs: Epochs, fwhm_px: float, plan: Plan) -> Bank:
    """Make the tracks of a search.

    A fixed position is tried at every pixel. Orbits are tried through every third of a FWHM where the first epoch has a
    value.

    Args:
        reference: Maps of the first epoch.
        epochs: Maps of all epochs.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        plan: Settings of the search.

    Returns:
        The tracks.
    """
    height, width = reference.a.shape
    step = 1 if plan.star is None else max(1, round(STEP_FWHM * fwhm_px))
    y, x = np.mgrid[:height, :width]
    up, along = y - reference.centre[0], x - reference.centre[1]
    chosen = (y % step == 0) & (x % step == 0)
    if plan.star is not None:
        chosen &= np.isfinite(reference.a + reference.b) & (np.hypot(up, along) > 0.5)
    sin, cos = np.sin(reference.north), np.cos(reference.north)
    north, east = up * sin + along * cos, up * cos - along * sin
    starts = jnp.asarray(reference.scale * np.stack([north, east], -1)[chosen])
    shapes = draw_shapes(1 if plan.star is None else plan.shapes, plan.star, plan.seed)
    return Bank(starts, np.flatnonzero(chosen), shapes, tracks(epochs, starts, shapes, plan.star))


def highest(epochs: Epochs, bank: Bank, plan: Plan) -> Peak:
    """Search one field for its track with the highest criterion, in one program and one transfer.

    Args:
        epochs: Maps of all epochs.
        bank: Tracks that are searched.
        plan: Settings of the search.

    Returns:
        Result of the search.
    """
    found = search_and_follow(epochs, bank.starts, bank.shapes, bank.tracks, plan.star, plan.flux)
    values, snr, best, along = jax.device_get(found)
    return Peak(values, snr, best, as_track(best, along))


@partial(jax.jit, static_argnames=("star", "flux"))
def search_and_follow(
    epochs: Epochs,
    starts: Float[Array, "N 2"],
    shapes: Shape,
    index: Int[Array, "N M E"],
    star: Star | None,
    flux: Flux,
) -> tuple[Float[Array, "N"], Float[Array, "N"], Found, Along]:
    """Criterion and combined SNR of each start, the best track, and the maps along it."""
    values, which, best = search_and_refine(epochs, starts, shapes, index, star, flux)
    snr = snr_along(epochs, starts, jax.tree.map(lambda part: part[which], shapes), star)
    return values, snr, best, follow(epochs, best, star)


def search_and_refine(
    epochs: Epochs,
    starts: Float[Array, "N 2"],
    shapes: Shape,
    index: Int[Array, "N M E"],
    star: Star | None,
    flux: Flux,
) -> tuple[Float[Array, "N"], Int[Array, "N"], Found]:
    """Maximum criterion and its shape for each start, and the best of the REFINED highest tracks after refinement."""
    values, which = search(epochs, index, flux)
    top = jax.lax.top_k(values, min(REFINED, len(values)))[1]
    found = refine(epochs, starts[top], jax.tree.map(lambda part: part[which[top]], shapes), star, flux)
    return values, which, jax.tree.map(lambda part: part[found.criterion.argmax()], found)


def snr_along(epochs: Epochs, starts: Float[Array, "N 2"], shapes: Shape, star: Star | None) -> Float[Array, "N"]:
    """sum b / sqrt(sum a) along one track from each start; NaN where no epoch has a value."""
    sky, _ = jax.vmap(lambda start, shape: track(start, shape, epochs.days, star))(starts, shapes)
    terms = look_up(epochs, sky).sum(-2)
    a, b = terms[:, 0], terms[:, 1]
    return jnp.where(a > 0, b / jnp.sqrt(jnp.where(a > 0, a, 1)), jnp.nan)


def as_image(
    values: Float[np.ndarray, "N"], index: Int[np.ndarray, "N"], reference: EpochMap
) -> Float[np.ndarray, "H W"]:
    """Map values of the starts to the pixels of the first epoch by nearest-neighbour interpolation.

    Args:
        values: Value of each start.
        index: Flat index of its pixel.
        reference: Maps of the first epoch.

    Returns:
        The image; NaN where the epoch has no value, unless every pixel is a start.
    """
    image = np.full(reference.a.size, np.nan)
    image[index] = values
    image = image.reshape(reference.a.shape)
    if len(index) == image.size:
        return image
    nearest = distance_transform_edt(np.isnan(image), return_distances=False, return_indices=True)
    return np.where(np.isfinite(reference.a + reference.b), image[*np.asarray(nearest)], np.nan)
