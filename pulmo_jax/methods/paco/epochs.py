"""Several epochs of one star combined, along orbits or at a fixed place: PACOME.

Dallant, Langlois, Flasseur, Thiébaut 2023 (A&A 679, A38), "D23". Of each epoch the maps a and b are sampled where the
source stood at that date. With a flux of its own at every epoch, none negative, twice the log-likelihood ratio is the
sum over the epochs of max(b, 0)^2 / a (D23's criterion); with one flux at all epochs it is max(sum b, 0)^2 / sum a.

Between pixels, maps are cubic splines through every pixel. b has the width of the PSF's autocorrelation: for a Gaussian
of 4.6 px the criterion so found between pixels is wrong by less than 1e-3 of itself (bilinear: 0.07). The search looks
maps up on a grid FINE times finer, which loses at most 0.5 % of a criterion; refinement does not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from scipy.ndimage import distance_transform_edt

from pulmo_jax.core import spline
from pulmo_jax.core.kepler import Shape, orbit_through, sky_position

FINE = 4
STEPS, STEP_SIZE = 100, 0.07  # of the refinement, in pixels, radians and the like
OPEN_SHARE = 1e-3  # how close to the ends of their ranges eccentricity and inclination begin their refinement

Flux = Literal["free", "constant"]


class EpochMap(NamedTuple):
    """One epoch's maps (H, W) and where they lie on the sky; NaN where there is no value.

    centre: the star, (y, x). north: angle of north from the x axis toward y, radians. scale: arcsec per pixel. days:
    since the reference date.
    """

    a: Float[np.ndarray, "H W"]
    b: Float[np.ndarray, "H W"]
    centre: tuple[float, float]
    north: float
    scale: float
    days: float = 0.0


class Epochs(NamedTuple):
    """E epochs made ready, in frames of one size. coefficients: of the splines of a and b; fine: both on the finer
    grid, 0 where unknown."""

    coefficients: Float[Array, "E 2 H W"]
    fine: Float[Array, "E fineH fineW 2"]
    known: Bool[Array, "E H W"]
    centre: Float[Array, "E 2"]
    north: Float[Array, "E"]
    scale: Float[Array, "E"]
    days: Float[Array, "E"]


class Star(NamedTuple):
    """What orbits are drawn about. mass: solar; semi_major_axis: least and largest, au; eccentricity: the same."""

    mass: float
    parallax_mas: float
    semi_major_axis: tuple[float, float] = (0.0, np.inf)
    eccentricity: tuple[float, float] = (0.0, 0.5)


class Found(NamedTuple):
    """The best track near each of several others. start: (north, east) at the reference date, arcsec."""

    criterion: Float[Array, "*batch"]
    start: Float[Array, "*batch 2"]
    shape: Shape


def prepare(maps: Sequence[EpochMap]) -> Epochs:
    """Splines through the maps, what is NaN filled from the nearest pixel so that it does not spread."""
    side = [max(3, *(m.a.shape[axis] for m in maps)) for axis in (0, 1)]
    padded = [np.stack([_pad(m.a, side), _pad(m.b, side)]) for m in maps]
    known = np.stack([np.isfinite(ab).all(0) & (ab[0] > 0) for ab in padded])
    filled = np.stack([_fill(ab, ok) for ab, ok in zip(padded, known, strict=True)])
    coefficients = jax.jit(spline.coefficients)(jnp.asarray(filled, float))
    rows, columns = (_finer(n) for n in side)
    fine = jnp.moveaxis(rows @ coefficients @ columns.T, 1, -1)
    inside = _finer_known(known)
    angles = np.array([[m.north, m.scale, m.days] for m in maps], float).T
    return Epochs(
        coefficients,
        jnp.where(inside[..., None], fine, 0),
        jnp.asarray(known),
        jnp.asarray([m.centre for m in maps], float),
        *map(jnp.asarray, angles),
    )


def _pad(image: np.ndarray, side: Sequence[int]) -> np.ndarray:
    return np.pad(image, [(0, n - m) for n, m in zip(side, image.shape, strict=True)], constant_values=np.nan)


def _fill(maps: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not known.any():
        return np.zeros_like(maps)
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return maps[:, *np.asarray(nearest)]


def _finer(n: int) -> Float[Array, "fine n"]:
    """From spline coefficients to values every 1 / FINE of a pixel."""
    place = np.arange((n - 1) * FINE + 1) / FINE
    whole = np.minimum(place.astype(int), n - 1)
    matrix = np.zeros((len(place), n))
    for offset, weight in enumerate(spline.weights(jnp.asarray(place - whole))):
        np.add.at(matrix, (np.arange(len(place)), _mirrored(whole - 1 + offset, n)), np.asarray(weight))
    return jnp.asarray(matrix)


def _mirrored(index: Int[np.ndarray, "..."] | Int[Array, "..."], n: int) -> Int[np.ndarray, "..."] | Int[Array, "..."]:
    return (n - 1) - abs((n - 1) - abs(index))


def _finer_known(known: Bool[np.ndarray, "E H W"]) -> Bool[np.ndarray, "E fineH fineW"]:
    """Whether the pixels around a place are all known."""
    for axis in (1, 2):
        place = np.arange((known.shape[axis] - 1) * FINE + 1)
        known = np.take(known, place // FINE, axis) & np.take(known, -(-place // FINE), axis)
    return known


def pixel(epochs: Epochs, north: Float[Array, "E"], sky: Float[Array, "*batch E 2"]) -> Float[Array, "*batch E 2"]:
    """(y, x) in each epoch's map of (north, east), arcsec. north: its direction, radians."""
    sin, cos = jnp.sin(north), jnp.cos(north)
    up, left = sky[..., 0] / epochs.scale, sky[..., 1] / epochs.scale
    return epochs.centre + jnp.stack([up * sin + left * cos, up * cos - left * sin], -1)


def nearest(epochs: Epochs, north: Float[Array, "E"], sky: Float[Array, "*batch E 2"]) -> Int[Array, "*batch E"]:
    """The index among an epoch's places of the finer grid, one more than all of them outside."""
    _, height, width, _ = epochs.fine.shape
    place = jnp.floor(pixel(epochs, north, sky) * FINE + 0.5).astype(jnp.int32)
    y, x = place[..., 0], place[..., 1]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return jnp.where(inside, y * width + x, height * width)


def look_up(epochs: Epochs, sky: Float[Array, "*batch E 2"]) -> Float[Array, "*batch E 2"]:
    """a and b at the nearest places of the finer grid, 0 where there is no value."""
    return _cells(epochs.fine)[jnp.arange(len(epochs.north)), nearest(epochs, epochs.north, sky)]


def _cells(fine: Float[Array, "E fineH fineW K"]) -> Float[Array, "E cells K"]:
    """Flat, with a place for what lies outside, which tells nothing."""
    return jnp.pad(fine.reshape(len(fine), -1, fine.shape[-1]), [(0, 0), (0, 1), (0, 0)])


@jax.jit
def turned(epochs: Epochs, angles: Float[Array, "E"]) -> Epochs:
    """Each epoch's sky turned about the star by an angle of its own, radians."""
    _, height, width, _ = epochs.fine.shape
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1) / FINE
    up, along = jnp.moveaxis(grid[:, :, None] - epochs.centre, -1, 0)
    sin, cos = jnp.sin(epochs.north), jnp.cos(epochs.north)
    sky = epochs.scale[:, None] * jnp.stack([up * sin + along * cos, up * cos - along * sin], -1)
    north = epochs.north + angles
    index = nearest(epochs, north, sky).reshape(-1, len(angles)).T
    fine = jax.vmap(lambda cells, at: cells[at])(_cells(epochs.fine), index)
    return epochs._replace(fine=fine.reshape(epochs.fine.shape), north=north)


def sample(epochs: Epochs, sky: Float[Array, "E 2"]) -> Float[Array, "E 2"]:
    """a and b on the splines, 0 where not all pixels around are known. Can be differentiated."""
    return jax.vmap(_sample_one)(epochs.coefficients, epochs.known, pixel(epochs, epochs.north, sky))


def _sample_one(coefficients: Array, known: Array, place: Array) -> Array:
    height, width = known.shape
    whole = jnp.floor(place).astype(jnp.int32)
    low, high = whole, jnp.ceil(place).astype(jnp.int32)
    inside = (low >= 0).all() & (high[0] < height) & (high[1] < width)
    safe = jnp.where(inside, jnp.stack([low, high]), 0)
    inside &= known[safe[:, 0][:, None], safe[:, 1][None]].all()
    rows, columns = (
        _mirrored(at - 1 + jnp.arange(4), n) for at, n in zip(jnp.where(inside, whole, 0), known.shape, strict=True)
    )
    along_y, along_x = (jnp.stack(spline.weights(part)) for part in place - whole)
    values = jnp.einsum("kij,i,j->k", coefficients[:, rows[:, None], columns[None]], along_y, along_x)
    return jnp.where(inside, values, 0)


def criterion(terms: Float[Array, "*batch E 2"], flux: Flux = "free") -> Float[Array, "*batch"]:
    """Twice the log-likelihood ratio of a source to none (D23), from a and b at each epoch; a = 0 tells nothing."""
    a, b = terms[..., 0], terms[..., 1]
    if flux == "constant":
        a, b = a.sum(-1, keepdims=True), b.sum(-1, keepdims=True)
    return jnp.where(a > 0, jnp.maximum(b, 0) ** 2 / jnp.where(a > 0, a, 1), 0).sum(-1)


def track(
    start: Float[Array, "2"], shape: Shape, days: Float[Array, "E"], star: Star | None
) -> tuple[Float[Array, "E 2"], Bool[Array, ""]]:
    """(north, east) at each date, arcsec, and whether the orbit's size is allowed. Without a star it stands still."""
    if star is None:
        return jnp.broadcast_to(start, (len(days), 2)), jnp.asarray(True)
    orbit = orbit_through(shape, start[0], start[1], star.parallax_mas)
    low, high = star.semi_major_axis
    allowed = (orbit.semi_major_axis >= low) & (orbit.semi_major_axis <= high)
    return jnp.stack(sky_position(orbit, days, star.mass, star.parallax_mas), -1), allowed


@partial(jax.jit, static_argnames="star")
def tracks(epochs: Epochs, starts: Float[Array, "N 2"], shapes: Shape, star: Star | None) -> Int[Array, "N M E"]:
    """Where each of M shapes through each of N starts, (north, east) in arcsec at the reference date, stands in each
    epoch: indices of `nearest`. Shapes of a size that is not allowed are nowhere."""

    def through(start: Array) -> Array:
        sky, allowed = jax.vmap(lambda shape: track(start, shape, epochs.days, star))(shapes)
        index = nearest(epochs, epochs.north, sky)
        return jnp.where(allowed[:, None], index, epochs.fine.shape[1] * epochs.fine.shape[2])

    return jnp.asarray(jax.lax.map(through, starts))


@partial(jax.jit, static_argnames="flux")
def search(epochs: Epochs, index: Int[Array, "N M E"], flux: Flux) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """The highest criterion from each start, and which shape has it; index: from `tracks` of the same epochs, or of
    others on the same pixels."""
    cells, epoch = _cells(epochs.fine), jnp.arange(index.shape[-1])
    if flux == "free":  # one number a place, and no division for every track
        cells = criterion(cells[..., None, :], flux)

        def values(at: Array) -> Array:
            return cells[epoch, at].sum(-1)
    else:

        def values(at: Array) -> Array:
            return criterion(cells[epoch, at], flux)

    def best(at: Array) -> tuple[Array, Array]:
        found = values(at)
        return found.max(), found.argmax()

    return jax.lax.map(best, index)


def refine(epochs: Epochs, starts: Float[Array, "K 2"], shapes: Shape, star: Star | None, flux: Flux) -> Found:
    """The highest criterion near each of K tracks, by gradient (Adam), the best of all steps kept."""
    low, high = (0.0, 1.0) if star is None else star.eccentricity
    unit = epochs.scale[0]

    def unpack(free: Array) -> tuple[Array, Shape]:
        eccentricity = low + (high - low) * jax.nn.sigmoid(free[2])
        return free[:2] * unit, Shape(eccentricity, jnp.tanh(free[3]), free[4], free[5])

    def pack(start: Array, shape: Shape) -> Array:
        share = jnp.clip((shape.eccentricity - low) / max(high - low, 1e-9), OPEN_SHARE, 1 - OPEN_SHARE)
        cos = jnp.clip(shape.cos_inclination, OPEN_SHARE - 1, 1 - OPEN_SHARE)
        rest = jnp.stack([jnp.log(share / (1 - share)), jnp.arctanh(cos), shape.omega, shape.mean_anomaly])
        return jnp.concatenate([start / unit, rest])

    def loss(free: Array) -> Array:
        sky, allowed = track(*unpack(free), epochs.days, star)
        return -jnp.where(allowed, criterion(sample(epochs, sky), flux), 0)

    def one(start: Array, shape: Shape) -> Found:
        free, value = descend(loss, pack(start, shape))
        return Found(-value, *unpack(free))

    return jax.vmap(one)(starts, shapes)


def descend(loss: Callable[[Array], Array], free: Float[Array, "D"]) -> tuple[Float[Array, "D"], Float[Array, ""]]:
    """The lowest loss met on the way down, and where."""
    optimizer = optax.adam(optax.cosine_decay_schedule(STEP_SIZE, STEPS))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        free, state, best, lowest = carry
        value, slope = jax.value_and_grad(loss)(free)
        best, lowest = jnp.where(value < lowest, free, best), jnp.minimum(value, lowest)
        move, state = optimizer.update(jnp.nan_to_num(slope), state)
        return (free + move, state, best, lowest), None

    begin = (free, optimizer.init(free), free, jnp.asarray(jnp.inf, free.dtype))
    (_, _, best, lowest), _ = jax.lax.scan(step, begin, None, length=STEPS)
    return best, lowest
