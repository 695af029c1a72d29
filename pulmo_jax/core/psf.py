"""A point source between pixels: the trigonometric interpolation of a stamp, and its expansion in the shift.

A stamp is square with an odd side S and its source at the middle pixel S//2. Its interpolation is periodic, so values
are asked for within half a side of the source.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.polynomial import chebyshev

MAX_DEGREE = 24
ERROR_GRID = 17  # shifts per axis on which an expansion's error is measured; its nodes lie between these


def dirichlet(distance: Float[Array, "*shape"], period: int) -> Float[Array, "*shape"]:
    """The kernel of trigonometric interpolation over an odd number of samples: 1 at 0, 0 at other integers.

    As a sum of cosines, and not as sin(pi u) / (S sin(pi u / S)), so that it has derivatives at 0.
    """
    k = jnp.arange(1, period // 2 + 1)
    return (1 + 2 * jnp.cos(2 * jnp.pi / period * distance[..., None] * k).sum(-1)) / period


def sample(
    stamp: Float[Array, "S S"], y: Float[Array, "*batch n"], x: Float[Array, "*batch m"]
) -> Float[Array, "*batch n m"]:
    """The interpolated stamp on the grid of rows y and columns x, counted from its source."""
    along_y, along_x = sample_matrix(y, stamp.shape[0]), sample_matrix(x, stamp.shape[0])
    return jnp.einsum("...nS,SR,...mR->...nm", along_y, stamp, along_x)


def sample_matrix(position: Float[Array, "*batch n"], side: int) -> Float[Array, "*batch n S"]:
    """What each of the stamp's pixels along an axis contributes at positions counted from its source."""
    return dirichlet(position[..., None] - (jnp.arange(side) - side // 2), side)


def shift(stamp: Float[Array, "S S"], shifts: Float[Array, "*batch 2"]) -> Float[Array, "*batch S S"]:
    """The stamp with its source moved by (dy, dx) px from the middle pixel, for each shift."""
    pixel = jnp.arange(stamp.shape[0]) - stamp.shape[0] // 2
    return sample(stamp, pixel - shifts[..., :1], pixel - shifts[..., 1:])


def render(
    stamps: Float[Array, "T S S"], corner: Int[Array, "T 2"], y: Int[Array, "..."], x: Int[Array, "..."]
) -> Float[Array, "*pixels T"]:
    """What the source of frame t, drawn by stamps[t] with its first pixel at corner[t], gives pixel (y, x) of it.

    y, x: broadcast against the frames, which are the last axis. Zero outside the stamp.
    """
    side = stamps.shape[-1]
    row, column = y - corner[:, 0], x - corner[:, 1]
    inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    flat = (jnp.arange(len(stamps)) * side + jnp.clip(row, 0, side - 1)) * side + jnp.clip(column, 0, side - 1)
    return jnp.where(inside, stamps.reshape(-1)[flat], 0)


class ShiftExpansion(NamedTuple):
    """The stamp on a footprint, for a source up to half a pixel from the middle, as a polynomial in the shift.

    h(shift)[p] = sum_j T_ky[j](2 dy) T_kx[j](2 dx) templates[j, p], with Chebyshev's polynomials T and ky + kx at most
    `degree`; product[q, i, j] says how the product of terms i and j falls on the terms of twice the degree, so that a
    quadratic form h' G h is itself such a polynomial: sum_q terms(2 degree)[q] sum_ij product[q, i, j] G_ij.
    neglected[p]: the largest |h - stamp| of a pixel over the shifts; error: the largest norm of that over the stamp's.
    """

    degree: int
    templates: Float[np.ndarray, "J P"]
    product: Float[np.ndarray, "Q J J"]
    neglected: Float[np.ndarray, "P"]
    error: float


def orders(degree: int) -> tuple[Int[np.ndarray, "J"], Int[np.ndarray, "J"]]:
    """(ky, kx) of every term of a total degree."""
    pairs = [(ky, kx) for ky in range(degree + 1) for kx in range(degree + 1 - ky)]
    ky, kx = np.array(pairs).T
    return ky, kx


def terms(
    shift_y: Float[Array, "*shape"], shift_x: Float[Array, "*shape"], degree: int
) -> list[Float[Array, "*shape"]]:
    """Every one of the J terms of an expansion, at shifts within half a pixel. A list, which XLA keeps in registers."""
    along_y, along_x = chebyshev_up_to(2 * shift_y, degree), chebyshev_up_to(2 * shift_x, degree)
    return [along_y[i] * along_x[j] for i, j in zip(*orders(degree), strict=True)]


def linear_terms(degree: int) -> list[int]:
    """Where the terms of a degree stand among those of twice the degree."""
    place = {pair: i for i, pair in enumerate(zip(*(k.tolist() for k in orders(2 * degree)), strict=True))}
    return [place[pair] for pair in zip(*(k.tolist() for k in orders(degree)), strict=True)]


def chebyshev_up_to(u: Float[Array, "*shape"], degree: int) -> list[Float[Array, "*shape"]]:
    """T_0 … T_degree by their recurrence."""
    polynomials = [jnp.ones_like(u), u]
    for _ in range(degree - 1):
        polynomials.append(2 * u * polynomials[-1] - polynomials[-2])
    return polynomials[: degree + 1]


def expand(stamp: Float[np.ndarray, "S S"], offsets: Int[np.ndarray, "P 2"], tolerance: float) -> ShiftExpansion:
    """The expansion of the lowest degree whose error is at most `tolerance`.

    The coefficients fall geometrically with the degree for a band-limited stamp (Trefethen, Approximation Theory and
    Approximation Practice, 2013, ch. 8), faster the wider the source is. Raises ValueError where degree 24 is not
    enough.
    """
    truth = sample_footprint(stamp, offsets, np.linspace(-0.5, 0.5, ERROR_GRID))
    scale = np.linalg.norm(truth, axis=-1).max()
    coefficients = chebyshev_coefficients(stamp, offsets)
    grid = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, ERROR_GRID)], indexing="ij")).reshape(2, -1)
    along_y, along_x = (chebyshev.chebvander(u, MAX_DEGREE) for u in grid)
    for degree in range(1, MAX_DEGREE + 1):
        ky, kx = orders(degree)
        templates = coefficients[ky, kx]
        residual = truth.reshape(-1, len(offsets)) - (along_y[:, ky] * along_x[:, kx]) @ templates
        error = float(np.linalg.norm(residual, axis=-1).max() / scale)
        if error <= tolerance:
            return ShiftExpansion(degree, templates, products(degree), abs(residual).max(0), error)
    raise ValueError(f"even of degree {MAX_DEGREE} a shift expansion errs by more than {tolerance:.1e}")


def centred(stamp: Float[np.ndarray, "S S"], offsets: Int[np.ndarray, "P 2"]) -> ShiftExpansion:
    """Of degree 0: the stamp where it is."""
    template = stamp[tuple((offsets + len(stamp) // 2).T)]
    return ShiftExpansion(0, template[None], np.ones((1, 1, 1)), np.zeros(len(offsets)), 0.0)


def chebyshev_coefficients(stamp: Float[np.ndarray, "S S"], offsets: Int[np.ndarray, "P 2"]) -> np.ndarray:
    """(n, n, P): coefficients of T_i(2 dy) T_j(2 dx), by interpolation at Chebyshev's nodes."""
    nodes = chebyshev.chebpts1(MAX_DEGREE + 9)
    values = sample_footprint(stamp, offsets, nodes / 2)
    weights = chebyshev.chebvander(nodes, MAX_DEGREE) * 2 / len(nodes)
    weights[:, 0] /= 2
    return np.einsum("ai,bj,abp->ijp", weights, weights, values)


def sample_footprint(stamp: np.ndarray, offsets: np.ndarray, shifts: np.ndarray) -> Float[np.ndarray, "n n P"]:
    """The stamp on a footprint for a source at every (dy, dx) of shifts x shifts; float64."""
    side = len(stamp)
    k = np.arange(1, side // 2 + 1)
    pixel = np.arange(side) - side // 2
    whole, place = np.unique(offsets, return_inverse=True)
    distance = (whole - shifts[:, None])[..., None] - pixel
    kernel = (1 + 2 * np.cos(2 * np.pi / side * distance[..., None] * k).sum(-1)) / side
    values = np.einsum("ayS,SR,bxR->abyx", kernel, stamp.astype(np.float64), kernel, optimize=True)
    row, column = place.reshape(offsets.shape).T
    return values[:, :, row, column]


def products(degree: int) -> Float[np.ndarray, "Q J J"]:
    """T_i T_j = (T_(i+j) + T_|i-j|) / 2 in each axis, as a tensor on the terms of twice the degree."""
    (ky, kx), (qy, qx) = orders(degree), orders(2 * degree)

    def along(k: np.ndarray, q: np.ndarray) -> np.ndarray:
        plus, minus = k[:, None] + k, abs(k[:, None] - k)
        return ((q[:, None, None] == plus) * 0.5) + ((q[:, None, None] == minus) * 0.5)

    return along(ky, qy) * along(kx, qx)
