"""Fields of noise alone, made from the epochs' own maps: how high the highest criterion of each is."""

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

FIELDS_AT_ONCE = 16  # in one program; an interrupt is heard between two of them


class Fields(NamedTuple):
    """How R fields of noise are composed.

    Attributes:
        which: For each epoch, the number of one of several maps.
        turns: Angle by which that map is rotated about the star, radians.
    """

    which: Int[Array, "R E"]
    turns: Float[Array, "R E"]


def thresholds(
    maps: Sequence[EpochMap], nulls: Sequence[EpochMap], fwhm_px: float, bank: Bank, plan: Plan
) -> tuple[FieldThreshold, ...]:
    """Thresholds from maps with reversed angles and from the maps themselves; none for a single epoch."""
    if len(maps) == 1:
        return ()
    peaks = (reversed_maxima(maps, nulls, bank, plan), own_maxima(maps, fwhm_px, bank, plan))
    return tuple(field_threshold(values, plan.level) for values in peaks)


def reversed_maxima(
    maps: Sequence[EpochMap], nulls: Sequence[EpochMap], bank: Bank, plan: Plan
) -> Float[np.ndarray, "R"]:
    """Highest criterion of each field of maps with reversed angles.

    Each epoch contributes its null map, the null map with b negated, or its own map with b negated, drawn at random:
    three realisations of noise, which is as often negative as positive, without a source. All but the first epoch are
    rotated about the star by random angles, so that chance coincidences are drawn anew.

    Args:
        maps: Maps of each epoch.
        nulls: Maps of each epoch with reversed angles.
        bank: Tracks that are tried.
        plan: What is searched for.

    Returns:
        The highest criterion of each of `plan.fields` fields.
    """
    pool = [prepare(kind) for kind in (nulls, [negated(null) for null in nulls], [negated(own) for own in maps])]
    return maxima(pool, draw_fields(plan, len(maps), len(pool)), bank, plan)


def own_maxima(maps: Sequence[EpochMap], fwhm_px: float, bank: Bank, plan: Plan) -> Float[np.ndarray, "R"]:
    """Highest criterion of each field in which the maps themselves are rotated against each other.

    If the noise is isotropic, these fields are as likely as the maps as they are, so a threshold on them is exact (a
    permutation test), whatever noise the reversed angles miss. A faint source makes it conservative, because it
    coincides with noise there. What a single epoch detects is left out. (Of 77 sets of five maps of noise, 64 px wide,
    searched along orbits with 39 fields at level 0.05, reversed angles let 11 through, this test 4.)

    Args:
        maps: Maps of each epoch.
        fwhm_px: FWHM of the PSF in the first epoch, px.
        bank: Tracks that are tried.
        plan: What is searched for.

    Returns:
        The highest criterion of each of `plan.fields` fields.
    """
    quiet = [without_peaks(own, fwhm_px * maps[0].scale / own.scale, plan.single_threshold) for own in maps]
    return maxima([prepare(quiet)], draw_fields(plan, len(maps), 1), bank, plan)


def without_peaks(epoch: EpochMap, radius_px: float, threshold: float) -> EpochMap:
    """Removes the surroundings, within a radius, of every pixel whose SNR is above the threshold."""
    peaks = epoch.b > threshold * np.sqrt(epoch.a)
    if not peaks.any():
        return epoch
    near = np.asarray(distance_transform_edt(~peaks)) <= radius_px
    return epoch._replace(a=np.where(near, np.nan, epoch.a), b=np.where(near, np.nan, epoch.b))


def without(epoch: EpochMap, place: Float[np.ndarray, "2"], radius_px: float) -> EpochMap:
    """Removes the surroundings of a position (y, x), px, within a radius."""
    y, x = np.indices(epoch.a.shape)
    near = np.hypot(y - place[0], x - place[1]) <= radius_px
    return epoch._replace(a=np.where(near, np.nan, epoch.a), b=np.where(near, np.nan, epoch.b))


def negated(epoch: EpochMap) -> EpochMap:
    """The maps with b negated."""
    return epoch._replace(b=-epoch.b)


def draw_fields(plan: Plan, n_epochs: int, n_maps: int) -> Fields:
    """Draws the composition of `plan.fields` fields; the first epoch is not rotated."""
    rng = np.random.default_rng(plan.seed)
    turns = 2 * np.pi * rng.random((plan.fields, n_epochs))
    turns[:, 0] = 0
    return Fields(jnp.asarray(rng.integers(n_maps, size=turns.shape)), jnp.asarray(turns))


def maxima(pool: Sequence[Epochs], fields: Fields, bank: Bank, plan: Plan) -> Float[np.ndarray, "R"]:
    """Highest criterion of each field, refined as in the maps themselves; all are read in one transfer.

    Args:
        pool: The maps that fields are composed of.
        fields: Their composition.
        bank: Tracks that are tried.
        plan: What is searched for.

    Returns:
        The highest criterion of each field.
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
    """Maps of one kind after another along a leading axis."""
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
    """Highest criterion of some of the fields."""

    def of_field(number: Array) -> Array:
        epochs = turned(choose(pool, fields.which[number]), fields.turns[number])
        return search_and_refine(epochs, starts, shapes, index, star, flux)[2].criterion

    return jax.lax.map(of_field, some)


def choose(pool: Epochs, which: Int[Array, "E"]) -> Epochs:
    """For each epoch one of the stacked maps."""
    every = jnp.arange(len(which))
    return jax.tree.map(lambda part: part[which, every], pool)
