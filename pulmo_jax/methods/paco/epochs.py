"""Multi-epoch combination for one star: spline interpolation of maps, sky coordinates, and the criterion of PACOME.

Dallant, Langlois, Flasseur, Thiébaut 2023 (A&A 679, A38), "D23". The maps a and b of each epoch are sampled at the
position of the source at that date. For a non-negative flux that is free at every epoch, twice the log-likelihood ratio
is the sum over the epochs of max(b, 0)^2 / a (D23's criterion); for a constant flux it is max(sum b, 0)^2 / sum a.

Maps are interpolated by cubic splines. b has the width of the PSF's autocorrelation: for a Gaussian PSF of 4.6 px FWHM
the relative error of the interpolated criterion is below 1e-3 (bilinear interpolation: 0.07). The search
(`orbit_search`) uses a grid FINE times finer, which loses at most 0.5 % of the criterion; its refinement uses splines.

The precision is that of JAX when `prepare` is called. Orbits need float64, which `inference.epochs.combine` enables.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.ndimage import distance_transform_edt

from pulmo_jax.core import spline

FINE = 4
AT_PIXELS = np.array([[1, 4, 1, 0], [0, 1, 4, 1]]) / 6  # values at two pixels from four spline coefficients

Flux = Literal["free", "constant"]


class EpochMap(NamedTuple):
    """Maps of one epoch and their astrometry.

    Attributes:
        a: Likelihood term a; NaN where undefined.
        b: Likelihood term b; NaN where undefined.
        centre: Position (y, x) of the star, px.
        north: Direction of north from the x axis toward y, radians.
        scale: Pixel scale, arcsec/px.
        days: Days since the reference date.
    """

    a: Float[np.ndarray, "H W"]
    b: Float[np.ndarray, "H W"]
    centre: tuple[float, float]
    north: float
    scale: float
    days: float = 0.0


class Epochs(NamedTuple):
    """Maps of E epochs, padded to a common size.

    Attributes:
        coefficients: Spline coefficients of a and b.
        fine: a and b on a grid FINE times finer; 0 where undefined.
        known: Pixels at which a and b are defined.
        centre: Position (y, x) of the star, px.
        north: Direction of north from the x axis toward y, radians.
        scale: Pixel scale, arcsec/px.
        days: Days since the reference date.
    """

    coefficients: Float[Array, "E 2 H W"]
    fine: Float[Array, "E fineH fineW 2"]
    known: Bool[Array, "E H W"]
    centre: Float[Array, "E 2"]
    north: Float[Array, "E"]
    scale: Float[Array, "E"]
    days: Float[Array, "E"]


class Star(NamedTuple):
    """Host star, and the allowed range of orbits.

    Attributes:
        mass: Mass, solar masses.
        parallax_mas: Parallax, milliarcsec.
        semi_major_axis: Minimum and maximum semi-major axis, au.
        eccentricity: Minimum and maximum eccentricity.
    """

    mass: float
    parallax_mas: float
    semi_major_axis: tuple[float, float] = (0.0, np.inf)
    eccentricity: tuple[float, float] = (0.0, 0.5)


def prepare(maps: Sequence[EpochMap]) -> Epochs:
    """Fit splines to the maps of all epochs; undefined pixels take the nearest value, so that NaNs do not spread."""
    side = [max(3, *(epoch.a.shape[axis] for epoch in maps)) for axis in (0, 1)]
    padded = [np.stack([_pad(epoch.a, side), _pad(epoch.b, side)]) for epoch in maps]
    known = np.stack([np.isfinite(ab).all(0) & (ab[0] > 0) for ab in padded])
    filled = np.stack([_fill(ab, ok) for ab, ok in zip(padded, known, strict=True)])
    rows, columns = (jnp.asarray(_finer(n), float) for n in side)
    lowest = jnp.asarray(_finer_lowest(filled[:, 0]), float)
    known_finer = jnp.asarray(_finer_known(known))
    coefficients, fine = _interpolate(jnp.asarray(filled, float), rows, columns, known_finer, lowest)
    north, scale, days = np.array([[epoch.north, epoch.scale, epoch.days] for epoch in maps], float).T
    centre = np.array([epoch.centre for epoch in maps], float)
    return Epochs(coefficients, fine, jnp.asarray(known), *map(jnp.asarray, (centre, north, scale, days)))


@jax.jit
def _interpolate(
    maps: Float[Array, "E 2 H W"],
    rows: Float[Array, "fineH H"],
    columns: Float[Array, "fineW W"],
    known: Bool[Array, "E fineH fineW"],
    lowest: Float[Array, "E fineH fineW"],
) -> tuple[Float[Array, "E 2 H W"], Float[Array, "E fineH fineW 2"]]:
    """Compute spline coefficients, and their values on the finer grid; a is at least `lowest`.

    Where a changes by a factor of 100 between pixels, as close to the star, its spline undershoots. An a near 0 would
    give a criterion b^2 / a that exceeds those of all sources.
    """
    coefficients = spline.coefficients(maps)
    fine = jnp.moveaxis(rows @ coefficients @ columns.T, 1, -1)
    fine = fine.at[..., 0].max(lowest)
    return coefficients, jnp.where(known[..., None], fine, 0)


def _pad(image: Float[np.ndarray, "h w"], side: Sequence[int]) -> Float[np.ndarray, "H W"]:
    return np.pad(image, [(0, n - m) for n, m in zip(side, image.shape, strict=True)], constant_values=np.nan)


def _fill(maps: Float[np.ndarray, "2 H W"], known: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "2 H W"]:
    if not known.any():
        return np.zeros_like(maps)
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return maps[:, *np.asarray(nearest)]


def _finer(n: int) -> Float[np.ndarray, "fine n"]:
    """Compute the matrix from n spline coefficients to values with a spacing of 1 / FINE px."""
    place = np.arange((n - 1) * FINE + 1) / FINE
    whole = np.minimum(place.astype(int), n - 1)
    matrix = np.zeros((len(place), n))
    for offset, weight in enumerate(spline.weights(place - whole)):
        np.add.at(matrix, (np.arange(len(place)), _mirrored(whole - 1 + offset, n)), weight)
    return matrix


def _mirrored(index: Int[np.ndarray, "..."] | Int[Array, "..."], n: int) -> Int[np.ndarray, "..."] | Int[Array, "..."]:
    return (n - 1) - abs((n - 1) - abs(index))


def _finer_known(known: Bool[np.ndarray, "E H W"]) -> Bool[np.ndarray, "E fineH fineW"]:
    """Mask the positions of the finer grid whose surrounding pixels are all defined."""
    for axis in (1, 2):
        place = np.arange((known.shape[axis] - 1) * FINE + 1)
        known = np.take(known, place // FINE, axis) & np.take(known, -(-place // FINE), axis)
    return known


def _finer_lowest(a: Float[np.ndarray, "E H W"]) -> Float[np.ndarray, "E fineH fineW"]:
    """Lowest a of the pixels around each position of the finer grid."""
    for axis in (1, 2):
        place = np.arange((a.shape[axis] - 1) * FINE + 1)
        a = np.minimum(np.take(a, place // FINE, axis), np.take(a, -(-place // FINE), axis))
    return a


def pixel(epochs: Epochs, north: Float[Array, "E"], sky: Float[Array, "*batch E 2"]) -> Float[Array, "*batch E 2"]:
    """Convert sky offsets to positions in each epoch's map.

    Args:
        epochs: The maps.
        north: Direction of north in each map, radians.
        sky: Offsets (north, east) from the star at each epoch, arcsec.

    Returns:
        The positions (y, x), px.
    """
    sin, cos = jnp.sin(north), jnp.cos(north)
    up, left = sky[..., 0] / epochs.scale, sky[..., 1] / epochs.scale
    return epochs.centre + jnp.stack([up * sin + left * cos, up * cos - left * sin], -1)


def nearest(epochs: Epochs, north: Float[Array, "E"], sky: Float[Array, "*batch E 2"]) -> Int[Array, "*batch E"]:
    """Find the nearest point of each epoch's finer grid.

    Args:
        epochs: The maps.
        north: Direction of north in each map, radians.
        sky: Offsets (north, east) from the star at each epoch, arcsec.

    Returns:
        Flat indices of the points; the number of points for positions outside the map.
    """
    _, height, width, _ = epochs.fine.shape
    place = jnp.floor(pixel(epochs, north, sky) * FINE + 0.5).astype(jnp.int32)
    y, x = place[..., 0], place[..., 1]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return jnp.where(inside, y * width + x, height * width)


def look_up(epochs: Epochs, sky: Float[Array, "*batch E 2"]) -> Float[Array, "*batch E 2"]:
    """Look up a and b at the nearest points of the finer grid; 0 where undefined.

    Args:
        epochs: The maps.
        sky: Offsets (north, east) from the star at each epoch, arcsec.

    Returns:
        a and b at each epoch.
    """
    return cells_of(epochs.fine)[jnp.arange(len(epochs.north)), nearest(epochs, epochs.north, sky)]


def cells_of(fine: Float[Array, "E fineH fineW K"]) -> Float[Array, "E cells K"]:
    """Flatten the finer grid and append a cell of 0 for positions outside the map."""
    return jnp.pad(fine.reshape(len(fine), -1, fine.shape[-1]), [(0, 0), (0, 1), (0, 0)])


@jax.jit
def turned(epochs: Epochs, angles: Float[Array, "E"]) -> Epochs:
    """Rotate the sky of each epoch about the star; spline coefficients are left unchanged.

    Args:
        epochs: The maps.
        angles: Rotation angle of each epoch, radians.

    Returns:
        The epochs with a rotated finer grid and a rotated direction of north.
    """
    _, height, width, _ = epochs.fine.shape
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1) / FINE
    up, along = jnp.moveaxis(grid[:, :, None] - epochs.centre, -1, 0)
    sin, cos = jnp.sin(epochs.north), jnp.cos(epochs.north)
    sky = epochs.scale[:, None] * jnp.stack([up * sin + along * cos, up * cos - along * sin], -1)
    north = epochs.north + angles
    index = nearest(epochs, north, sky).reshape(-1, len(angles)).T
    fine = jax.vmap(lambda cells, at: cells[at])(cells_of(epochs.fine), index)
    return epochs._replace(fine=fine.reshape(epochs.fine.shape), north=north)


def sample(epochs: Epochs, sky: Float[Array, "E 2"]) -> Float[Array, "E 2"]:
    """Evaluate the splines of a and b; 0 where a surrounding pixel is undefined. Differentiable in the position.

    Args:
        epochs: The maps.
        sky: Offsets (north, east) from the star at each epoch, arcsec.

    Returns:
        a and b at each epoch.
    """
    return jax.vmap(_sample_one)(epochs.coefficients, epochs.known, pixel(epochs, epochs.north, sky))


def _sample_one(
    coefficients: Float[Array, "2 H W"], known: Bool[Array, "H W"], place: Float[Array, "2"]
) -> Float[Array, "2"]:
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
    block = coefficients[:, rows[:, None], columns[None]]
    a, b = jnp.einsum("kij,i,j->k", block, along_y, along_x)
    pixels = AT_PIXELS @ block[0] @ AT_PIXELS.T  # a of the four pixels around the position, its lower bound
    return jnp.where(inside, jnp.stack([jnp.maximum(a, pixels.min()), b]), 0)


def criterion(terms: Float[Array, "*batch E 2"], flux: Flux = "free") -> Float[Array, "*batch"]:
    """Compute twice the log-likelihood ratio between presence and absence of a source (D23).

    Args:
        terms: a and b at each epoch; epochs with a = 0 are ignored.
        flux: "free": independent flux at every epoch; "constant": common flux.

    Returns:
        The criterion.
    """
    a, b = terms[..., 0], terms[..., 1]
    if flux == "constant":
        a, b = a.sum(-1, keepdims=True), b.sum(-1, keepdims=True)
    return jnp.where(a > 0, jnp.maximum(b, 0) ** 2 / jnp.where(a > 0, a, 1), 0).sum(-1)
