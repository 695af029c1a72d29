"""Source-free noise fields composed of the epochs' own maps, and the maximum criterion of each."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.ndimage import distance_transform_edt

from pulmo_jax.core.kepler import Shape
from pulmo_jax.evaluation.field_threshold import FieldThreshold, field_threshold
from pulmo_jax.inference.epoch_plan import Plan
from pulmo_jax.inference.epoch_search import Bank, search_and_refine
from pulmo_jax.methods.paco.epochs import EpochMap, Epochs, Flux, Star, prepare, turned

FIELDS_AT_ONCE = 16  # fields per program; interrupts are handled between programs


class Fields(NamedTuple):
    """Composition of R noise fields.

    Attributes:
        which: Index of the map that each epoch contributes.
        turns: Angle by which that map is rotated about the star, radians.
    """

    which: Int[Array, "R E"]
    turns: Float[Array, "R E"]


def thresholds(
    maps: Sequence[EpochMap], nulls: Sequence[EpochMap], fwhm_px: float, bank: Bank, plan: Plan
) -> tuple[FieldThreshold, ...]:
    """Compute the detection thresholds of the two null hypotheses.

    Args:
        maps: Maps of each epoch.
        nulls: Maps of each epoch with reversed angles.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        bank: Tracks that are searched.
        plan: Settings of the search.

    Returns:
        Thresholds from maps with reversed angles and from the maps themselves; empty for a single epoch.
    """
    if len(maps) == 1:
        return ()
    peaks = (reversed_maxima(maps, nulls, bank, plan), own_maxima(maps, fwhm_px, bank, plan))
    return tuple(field_threshold(values, plan.level) for values in peaks)


def reversed_maxima(
    maps: Sequence[EpochMap], nulls: Sequence[EpochMap], bank: Bank, plan: Plan
) -> Float[np.ndarray, "R"]:
    """Maximum criterion of noise fields composed of maps with reversed angles.

    Each epoch contributes its null map, its null map with b negated, or its own map with b negated, drawn at random:
    three source-free realisations of noise that is symmetric about zero. All epochs except the first are rotated about
    the star by random angles, so that every field has new chance coincidences.

    Args:
        maps: Maps of each epoch.
        nulls: Maps of each epoch with reversed angles.
        bank: Tracks that are searched.
        plan: Settings of the search.

    Returns:
        Maximum criterion of each of `plan.fields` fields.
    """
    pool = [prepare(kind) for kind in (nulls, [negated(null) for null in nulls], [negated(own) for own in maps])]
    return maxima(pool, draw_fields(plan, len(maps), len(pool)), bank, plan)


def own_maxima(maps: Sequence[EpochMap], fwhm_px: float, bank: Bank, plan: Plan) -> Float[np.ndarray, "R"]:
    """Maximum criterion of noise fields in which the maps themselves are rotated relative to each other.

    If the noise is isotropic, these fields have the same distribution as the maps, so a threshold on them is exact (a
    permutation test), even for noise that the reversed angles do not reproduce. A faint source makes the threshold
    conservative, because in a rotated field it coincides with noise. Detections in a single epoch are removed. (Of 77
    sets of five noise maps, 64 px wide, searched along orbits with 39 fields at level 0.05, reversed angles gave 11
    false alarms, this test 4.)

    Args:
        maps: Maps of each epoch.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        bank: Tracks that are searched.
        plan: Settings of the search.

    Returns:
        Maximum criterion of each of `plan.fields` fields.
    """
    quiet = [without_peaks(own, fwhm_px * maps[0].scale / own.scale, plan.single_threshold) for own in maps]
    return maxima([prepare(quiet)], draw_fields(plan, len(maps), 1), bank, plan)


def without_peaks(epoch: EpochMap, radius_px: float, threshold: float) -> EpochMap:
    """Mask (NaN) all pixels within a radius of a pixel whose SNR exceeds a threshold.

    Args:
        epoch: Maps of an epoch.
        radius_px: Radius, px.
        threshold: SNR threshold.

    Returns:
        Masked maps.
    """
    peaks = epoch.b > threshold * np.sqrt(epoch.a)
    if not peaks.any():
        return epoch
    near = np.asarray(distance_transform_edt(~peaks)) <= radius_px
    return epoch._replace(a=np.where(near, np.nan, epoch.a), b=np.where(near, np.nan, epoch.b))


def without(epoch: EpochMap, place: Float[np.ndarray, "2"], radius_px: float) -> EpochMap:
    """Mask (NaN) all pixels within a radius of a position.

    Args:
        epoch: Maps of an epoch.
        place: Position (y, x), px.
        radius_px: Radius, px.

    Returns:
        Masked maps.
    """
    y, x = np.indices(epoch.a.shape)
    near = np.hypot(y - place[0], x - place[1]) <= radius_px
    return epoch._replace(a=np.where(near, np.nan, epoch.a), b=np.where(near, np.nan, epoch.b))


def negated(epoch: EpochMap) -> EpochMap:
    """Maps with b negated."""
    return epoch._replace(b=-epoch.b)


def draw_fields(plan: Plan, n_epochs: int, n_maps: int) -> Fields:
    """Draw the composition of `plan.fields` noise fields; the first epoch is not rotated.

    Args:
        plan: Settings of the search.
        n_epochs: Number of epochs.
        n_maps: Number of maps per epoch to choose from.

    Returns:
        The composition.
    """
    rng = np.random.default_rng(plan.seed)
    turns = 2 * np.pi * rng.random((plan.fields, n_epochs))
    turns[:, 0] = 0
    return Fields(jnp.asarray(rng.integers(n_maps, size=turns.shape)), jnp.asarray(turns))


def maxima(pool: Sequence[Epochs], fields: Fields, bank: Bank, plan: Plan) -> Float[np.ndarray, "R"]:
    """Maximum criterion of each noise field, refined as in the search of the maps themselves.

    Args:
        pool: Maps of all epochs, one entry for each kind of map.
        fields: Composition of the fields.
        bank: Tracks that are searched.
        plan: Settings of the search.

    Returns:
        Maximum criterion of each field.
    """
    n = len(fields.turns)
    at_once = min(n, FIELDS_AT_ONCE)
    index = np.minimum(np.arange(n + -n % at_once), n - 1).reshape(-1, at_once)
    stacked, peaks = stack(tuple(pool)), []
    for some in index:
        peaks.append(field_maxima(stacked, fields, jnp.asarray(some), bank.starts, bank.shapes, bank.tracks, plan.star,
                                  plan.flux))  # fmt: skip
        if len(peaks) > 1:
            peaks[-2].block_until_ready()  # not the last one, so that the device always has work
    return np.concatenate(jax.device_get(peaks))[:n]


@jax.jit
def stack(pool: tuple[Epochs, ...]) -> Epochs:
    """Stack the kinds of maps along a new leading axis."""
    return jax.tree.map(lambda *parts: jnp.stack(parts), *pool)


@partial(jax.jit, static_argnames=("star", "flux"))
def field_maxima(
    pool: Epochs,
    fields: Fields,
    some: Int[Array, "F"],
    starts: Float[Array, "N 2"],
    shapes: Shape,
    index: Int[Array, "N M E"],
    star: Star | None,
    flux: Flux,
) -> Float[Array, "F"]:
    """Maximum criterion of the fields with the indices `some`."""

    def of_field(number: Array) -> Array:
        epochs = turned(choose(pool, fields.which[number]), fields.turns[number])
        return search_and_refine(epochs, starts, shapes, index, star, flux)[2].criterion

    return jax.lax.map(of_field, some)


def choose(pool: Epochs, which: Int[Array, "E"]) -> Epochs:
    """For each epoch, select one of the stacked maps."""
    every = jnp.arange(len(which))
    return jax.tree.map(lambda part: part[which, every], pool)
