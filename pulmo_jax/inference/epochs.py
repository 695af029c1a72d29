"""From the maps of several epochs to what they show together: searched, judged against noise alone, characterised."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.ndimage import distance_transform_edt

from pulmo_jax.core.kepler import Orbit, Shape, orbit_through
from pulmo_jax.evaluation.field_threshold import FieldThreshold, field_threshold
from pulmo_jax.inference.orbits import OrbitSamples, draw_shapes, sample_orbits
from pulmo_jax.methods.paco.epochs import (
    EpochMap,
    Epochs,
    Flux,
    Found,
    Star,
    criterion,
    look_up,
    pixel,
    prepare,
    refine,
    sample,
    search,
    track,
    tracks,
    turned,
)

REFINED = 24  # highest tracks of the search that are refined, in every field
STEP_FWHM = 1 / 3  # between the places at the reference date that orbits are tried through
TRIALS, NEIGHBOURS = 100, 5  # orbits that the coverage is measured with, from as many places near each
GAUSSIAN_FWHM = 2 * np.sqrt(2 * np.log(2))

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How it is searched. star: None for a fixed place. shapes: orbits tried through every place. fields: of noise that
    the threshold rests on; level: probability of a false alarm anywhere in the field. single_threshold: of the SNR, for
    one epoch by itself, of which there is but one field of noise."""

    star: Star | None = None
    flux: Flux = "free"
    shapes: int = 1024
    fields: int = 200
    level: float = 0.05
    single_threshold: float = 5.0
    max_sources: int = 5
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Track:
    """What was found along one track, best first.

    sky: (north, east) at each epoch, arcsec; places: (y, x) in its map; a, b: there. criterion: of the flux as planned.
    snr_combined: sum b / sqrt(sum a), and flux: sum b / sum a with flux_std, of a flux that does not change. start_std:
    errors of `sky` at the reference date, of the samples or, without orbits, from the criterion's curvature, NaN where
    that is none. orbit and samples: with orbits alone.
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
        """Of each epoch, NaN where it has no value."""
        return np.where(self.a > 0, self.b / np.sqrt(np.where(self.a > 0, self.a, 1)), np.nan)


@dataclass(frozen=True, eq=False)
class Combined:
    """criterion, snr_combined: maps (H, W) on the first epoch's pixels, by where the source stood at the reference
    date; with orbits, of the best one through each place. threshold: of the criterion, the higher one of `nulls`: of
    fields of reversed-angle maps, and of the maps themselves turned against each other; none for one epoch. best: the
    highest track, whether or not it is above. coverage: the share of its criterion, before refinement, that the nearest
    orbit tried leaves to an orbit drawn from the prior, sorted; empty without orbits. n_tracks: tried in every field.
    """

    criterion: Float[np.ndarray, "H W"]
    snr_combined: Float[np.ndarray, "H W"]
    threshold: float
    nulls: tuple[FieldThreshold, ...]
    found: list[Track]
    best: Track
    coverage: Float[np.ndarray, "Q"]
    n_tracks: int
    caveats: tuple[str, ...] = ()

    def false_alarm(self, value: float) -> float:
        """The probability that noise alone reaches this criterion anywhere, by the null that has it higher; NaN for one
        epoch."""
        return max((null.false_alarm(value) for null in self.nulls), default=float("nan"))

    def extrapolated(self, value: float) -> float:
        """The same by Gumbel's law."""
        return max((null.extrapolated(value) for null in self.nulls), default=float("nan"))


@dataclass(frozen=True, eq=False)
class Bank:
    """All tracks that are tried: every shape through every start. pixels: of the starts, among the first map's, flat;
    tracks: where they stand in every epoch."""

    starts: Float[Array, "N 2"]
    pixels: Int[np.ndarray, "N"]
    shapes: Shape
    tracks: Int[Array, "N M E"]


class Fields(NamedTuple):
    """R fields: of each epoch one of several maps, and the angle by which it is turned about the star."""

    which: Int[Array, "R E"]
    turns: Float[Array, "R E"]


def combine(
    maps: Sequence[EpochMap], nulls: Sequence[EpochMap], fwhm_px: float, plan: Plan, say: Say = lambda text: None
) -> Combined:
    """Search, calibrate, characterise; to be called under `jax.enable_x64`.

    maps, nulls: of each epoch, that of the reference date first; nulls from reversed angles, sources taken out.
    fwhm_px: of the PSF, in the first one's pixels. Sources are taken one by one, the highest first; what lies within
    one FWHM of it is left out of every epoch before the next is looked for.
    """
    left = prepare(maps)
    bank = make_bank(maps[0], left, fwhm_px, plan)
    say(f"{len(bank.starts)} places at the first date, {len(bank.shapes.omega)} tracks through each")
    noise = ()
    if len(maps) > 1:
        say(f"noise: {plan.fields} fields of reversed-angle maps, as many of the maps themselves, turned")
        peaks = (reversed_maxima(maps, nulls, bank, plan), own_maxima(maps, fwhm_px, bank, plan))
        noise = tuple(field_threshold(values, plan.level) for values in peaks)
    threshold = max((null.value for null in noise), default=plan.single_threshold**2)
    values, which, best = highest(left, bank, plan)
    images = [as_image(v, bank.pixels, maps[0]) for v in (values, combined_snr(left, bank, which, plan))]
    first = now = describe(left, best, plan)
    found: list[Track] = []
    while now.criterion > threshold and len(found) < plan.max_sources:
        say(f"a source near (y, x) = ({now.places[0, 0]:.1f}, {now.places[0, 1]:.1f}), criterion {now.criterion:.1f}")
        found.append(with_errors(left, best, now, fwhm_px, plan))
        maps = [without(m, place, fwhm_px * maps[0].scale / m.scale) for m, place in zip(maps, now.places, strict=True)]
        left = prepare(maps)
        _, _, best = highest(left, bank, plan)
        now = describe(left, best, plan)
    full = now.criterion > threshold
    caveats = (f"the search stopped at {len(found)} sources; there are more peaks",) if full else ()
    covered = coverage(left, bank, fwhm_px, plan) if plan.star else np.ones(0)
    return Combined(
        images[0], images[1], threshold, noise, found, found[0] if found else first, covered,
        len(bank.starts) * len(bank.shapes.omega), caveats,
    )  # fmt: skip


def make_bank(reference: EpochMap, epochs: Epochs, fwhm_px: float, plan: Plan) -> Bank:
    """Every pixel for a fixed place; for orbits every third of a FWHM, where the first epoch has a value."""
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


def reversed_maxima(
    maps: Sequence[EpochMap], nulls: Sequence[EpochMap], bank: Bank, plan: Plan
) -> Float[np.ndarray, "R"]:
    """The highest criterion of each field of noise.

    Of each epoch the null map, the same with b negated, or the map itself with b negated, drawn at random: three draws
    of the noise, which is as often below 0 as above, and no source. All but the first epoch are turned about the star,
    by angles of their own, so that what happens to coincide is drawn anew.
    """
    pool = [*(prepare(kind) for kind in (nulls, [negated(m) for m in nulls], [negated(m) for m in maps]))]
    return maxima(pool, draw_fields(plan, len(maps), len(pool)), bank, plan)


def own_maxima(maps: Sequence[EpochMap], fwhm_px: float, bank: Bank, plan: Plan) -> Float[np.ndarray, "R"]:
    """The highest criterion of each field in which the maps themselves are turned against each other.

    Under noise that is alike in all directions these are as likely as the maps as they are, so a threshold on them is
    exact (a permutation test), whatever noise the reversed angles may miss; a faint source makes it conservative,
    because it coincides with noise there. What a single epoch shows by itself is left out. (Of 77 sets of five maps of
    noise, 64 px wide, searched along orbits with 39 fields at level 0.05, reversed angles let 11 through, this 4.)
    """
    quiet = [without_peaks(m, fwhm_px * maps[0].scale / m.scale, plan.single_threshold) for m in maps]
    return maxima([prepare(quiet)], draw_fields(plan, len(maps), 1), bank, plan)


def without_peaks(of: EpochMap, radius_px: float, threshold: float) -> EpochMap:
    """The maps with nothing within this radius of a pixel whose SNR is above the threshold."""
    peaks = of.b > threshold * np.sqrt(of.a)
    if not peaks.any():
        return of
    near = np.asarray(distance_transform_edt(~peaks)) <= radius_px
    return of._replace(a=np.where(near, np.nan, of.a), b=np.where(near, np.nan, of.b))


def draw_fields(plan: Plan, n_epochs: int, n_maps: int) -> Fields:
    rng = np.random.default_rng(plan.seed)
    turns = 2 * np.pi * rng.random((plan.fields, n_epochs))
    turns[:, 0] = 0
    return Fields(jnp.asarray(rng.integers(n_maps, size=turns.shape)), jnp.asarray(turns))


def negated(of: EpochMap) -> EpochMap:
    return of._replace(b=-of.b)


def maxima(pool: Sequence[Epochs], fields: Fields, bank: Bank, plan: Plan) -> Float[np.ndarray, "R"]:
    """Of each field the highest criterion, refined as it is in the maps themselves."""
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *pool)
    peaks = []
    for which, turns in zip(*fields, strict=True):
        field_ = turned(choose(stacked, which), turns)
        _, _, found = search_and_refine(field_, bank.starts, bank.shapes, bank.tracks, plan.star, plan.flux)
        peaks.append(float(found.criterion))
    return np.array(peaks)


@jax.jit
def choose(pool: Epochs, which: Int[Array, "E"]) -> Epochs:
    """Of each epoch one of the maps that are stacked."""
    every = jnp.arange(len(which))
    return jax.tree.map(lambda part: part[which, every], pool)


def highest(epochs: Epochs, bank: Bank, plan: Plan) -> tuple[np.ndarray, Array, Found]:
    """The criterion from each start, the shape that has it, and the best track of all, refined."""
    values, which, best = search_and_refine(epochs, bank.starts, bank.shapes, bank.tracks, plan.star, plan.flux)
    return np.asarray(values), which, best


@partial(jax.jit, static_argnames=("star", "flux"))
def search_and_refine(
    epochs: Epochs, starts: Array, shapes: Shape, index: Array, star: Star | None, flux: Flux
) -> tuple[Array, Array, Found]:
    values, which = search(epochs, index, flux)
    top = jax.lax.top_k(values, min(REFINED, len(values)))[1]
    found = refine(epochs, starts[top], jax.tree.map(lambda v: v[which[top]], shapes), star, flux)
    return values, which, jax.tree.map(lambda v: v[found.criterion.argmax()], found)


def combined_snr(epochs: Epochs, bank: Bank, which: Array, plan: Plan) -> Float[np.ndarray, "N"]:
    """Sum b / sqrt(sum a) along the best track from each start, NaN where no epoch has a value."""
    shapes = jax.tree.map(lambda v: v[which], bank.shapes)
    return np.asarray(snr_along(epochs, bank.starts, shapes, plan.star))


@partial(jax.jit, static_argnames="star")
def snr_along(epochs: Epochs, starts: Array, shapes: Shape, star: Star | None) -> Array:
    sky, _ = jax.vmap(lambda s, h: track(s, h, epochs.days, star))(starts, shapes)
    terms = look_up(epochs, sky).sum(-2)
    a, b = terms[:, 0], terms[:, 1]
    return jnp.where(a > 0, b / jnp.sqrt(jnp.where(a > 0, a, 1)), jnp.nan)


def as_image(values: Float[np.ndarray, "N"], index: Int[np.ndarray, "N"], like: EpochMap) -> Float[np.ndarray, "H W"]:
    """On the first epoch's pixels, each with the value of the nearest place that was tried."""
    image = np.full(like.a.size, np.nan)
    image[index] = values
    image = image.reshape(like.a.shape)
    if len(index) == image.size:
        return image
    nearest = distance_transform_edt(np.isnan(image), return_distances=False, return_indices=True)
    return np.where(np.isfinite(like.a + like.b), image[*np.asarray(nearest)], np.nan)


def describe(epochs: Epochs, best: Found, plan: Plan) -> Track:
    sky, _ = track(best.start, best.shape, epochs.days, plan.star)
    a, b = np.asarray(sample(epochs, sky)).T
    total = a.sum()
    orbit = None
    if plan.star is not None:
        orbit = jax.tree.map(
            np.asarray, orbit_through(best.shape, best.start[0], best.start[1], plan.star.parallax_mas)
        )
    return Track(
        criterion=float(best.criterion),
        snr_combined=float(b.sum() / np.sqrt(total)) if total > 0 else float("nan"),
        flux=float(b.sum() / total) if total > 0 else float("nan"),
        flux_std=float(1 / np.sqrt(total)) if total > 0 else float("nan"),
        sky=np.asarray(sky),
        places=np.asarray(pixel(epochs, epochs.north, sky)),
        a=a,
        b=b,
        start_std=np.full(2, np.nan),
        orbit=orbit,
    )


def with_errors(epochs: Epochs, best: Found, found: Track, fwhm_px: float, plan: Plan) -> Track:
    """The spread of its orbits, or of its place."""
    if plan.star is None:
        return replace(found, start_std=place_std(epochs, best.start, plan.flux))
    samples = sample_orbits(epochs, best.start, best.shape, plan.star, plan.flux, fwhm_px, plan.seed)
    return replace(found, start_std=samples.starts.std(0), samples=samples)


def place_std(epochs: Epochs, start: Float[Array, "2"], flux: Flux) -> Float[np.ndarray, "2"]:
    """From the second derivatives of half the criterion, which is a log-likelihood."""

    def log_likelihood(place: Array) -> Array:
        return criterion(sample(epochs, jnp.broadcast_to(place, (len(epochs.north), 2))), flux) / 2

    curvature = -np.asarray(jax.hessian(log_likelihood)(start))
    if not np.isfinite(curvature).all() or np.linalg.eigvalsh(curvature).min() <= 0:
        return np.full(2, np.nan)
    return np.sqrt(np.diag(np.linalg.inv(curvature)))


def without(of: EpochMap, place: Float[np.ndarray, "2"], radius_px: float) -> EpochMap:
    """The maps with nothing within this radius of a place."""
    y, x = np.indices(of.a.shape)
    near = np.hypot(y - place[0], x - place[1]) <= radius_px
    return of._replace(a=np.where(near, np.nan, of.a), b=np.where(near, np.nan, of.b))


def coverage(epochs: Epochs, bank: Bank, fwhm_px: float, plan: Plan) -> Float[np.ndarray, "Q"]:
    """How close to an orbit of the prior the nearest one tried comes: the share of its criterion that is kept.

    That falls as exp(-d^2 / 2 sigma^2) with the distance, for a PSF of standard deviation sigma; meant over the epochs,
    and maximised over the tracks from the nearest places. (Mismatch of a bank of templates, Owen 1996, PRD 53:6749.)
    """
    assert plan.star is not None
    rng = np.random.default_rng(plan.seed + 1)
    unit = float(epochs.scale[0])
    step = max(1, round(STEP_FWHM * fwhm_px))
    sigma = fwhm_px / GAUSSIAN_FWHM * unit
    places = np.asarray(bank.starts)[rng.integers(len(bank.starts), size=TRIALS)]
    places = jnp.asarray(places + unit * step * (rng.random((TRIALS, 2)) - 0.5))
    shapes = draw_shapes(TRIALS, plan.star, plan.seed + 2)
    return np.sort(
        np.asarray(kept_shares(epochs, places, shapes, bank.starts, bank.shapes, jnp.asarray(sigma), plan.star))
    )


@partial(jax.jit, static_argnames="star")
def kept_shares(
    epochs: Epochs, places: Array, shapes: Shape, starts: Array, tried: Shape, sigma: Array, star: Star
) -> Array:
    def kept(pair: tuple[Array, Shape]) -> Array:
        place, shape = pair
        true, _ = track(place, shape, epochs.days, star)
        near = starts[jax.lax.top_k(-((starts - place) ** 2).sum(-1), min(NEIGHBOURS, len(starts)))[1]]
        tracks = jax.vmap(lambda s: jax.vmap(lambda h: track(s, h, epochs.days, star)[0])(tried))(near)
        return jnp.exp(-((tracks - true) ** 2).sum(-1) / (2 * sigma**2)).mean(-1).max()

    return jnp.asarray(jax.lax.map(kept, (places, shapes)))
