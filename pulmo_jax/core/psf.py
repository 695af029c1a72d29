"""Subpixel evaluation of point-spread functions: trigonometric interpolation of a stamp, and expansion in its shift.

A stamp is a square of odd side S with its source at the middle pixel S//2. The interpolation is periodic, so it is
evaluated only within half a side of the source.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.polynomial import chebyshev

MAX_DEGREE = 24
ERROR_GRID = 17  # shifts per axis at which the error of an expansion is measured; its nodes lie between them


def dirichlet(distance: Float[Array, "*shape"], period: int) -> Float[Array, "*shape"]:
    """Kernel of trigonometric interpolation: 1 at 0, 0 at the other integers.

    Written as a sum of cosines, because sin(pi u) / (S sin(pi u / S)) has no derivative at 0 in floating point.

    Args:
        distance: Distance from a sample, px.
        period: Number of samples S, odd.

    Returns:
        The kernel's values.
    """
    k = jnp.arange(1, period // 2 + 1)
    return (1 + 2 * jnp.cos(2 * jnp.pi / period * distance[..., None] * k).sum(-1)) / period


def interpolation_matrix(
    pixels: Int[np.ndarray, "n"], shift_px: Float[Array, "*batch"], side: int
) -> Float[Array, "*batch n S"]:
    """Interpolation weights of a stamp's pixels along one axis, at integer pixels around a source with subpixel offset.

    S dirichlet(n - m - s) = 1 + 2 sum_k [cos(w_k (n - m)) cos(w_k s) + sin(w_k (n - m)) sin(w_k s)], w_k = 2 pi k / S:
    a product of a constant matrix with S terms of the shift, instead of n S^2 / 2 cosines for every shift.

    Args:
        pixels: Pixels n relative to the reference pixel of the shift.
        shift_px: Offset s of the source from the reference pixel, px.
        side: Side S of the stamp, px.

    Returns:
        Matrices that map the stamp's pixels m to the given pixels.
    """
    frequency = 2 * np.pi / side * np.arange(1, side // 2 + 1)
    distance = pixels[:, None] - (np.arange(side) - side // 2)
    phase = frequency[:, None, None] * distance
    waves = np.concatenate([np.ones((1, *distance.shape)), 2 * np.cos(phase), 2 * np.sin(phase)]) / side
    angle = shift_px[..., None] * jnp.asarray(frequency, shift_px.dtype)
    terms = jnp.concatenate([jnp.ones_like(shift_px)[..., None], jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return jnp.einsum("...k,knm->...nm", terms, jnp.asarray(waves, shift_px.dtype))


def sample(
    stamp: Float[Array, "S S"], pixels: Int[np.ndarray, "n"], shifts: Float[Array, "*batch 2"]
) -> Float[Array, "*batch n n"]:
    """Evaluate the stamp, with its source shifted, on a square of integer pixels.

    Args:
        stamp: PSF stamp.
        pixels: Rows and columns of the square, relative to the reference pixel of the shifts.
        shifts: Offsets (dy, dx) of the source from the reference pixel, px.

    Returns:
        Values on the square, for every shift.
    """
    along_y, along_x = (interpolation_matrix(pixels, shifts[..., axis], stamp.shape[0]) for axis in (0, 1))
    return jnp.einsum("...nS,SR,...mR->...nm", along_y, stamp, along_x)


def shift(stamp: Float[Array, "S S"], shifts: Float[Array, "*batch 2"]) -> Float[Array, "*batch S S"]:
    """Shift the source of a stamp away from its middle pixel.

    Args:
        stamp: PSF stamp.
        shifts: Offsets (dy, dx) of the source, px.

    Returns:
        Shifted stamp for every shift.
    """
    return sample(stamp, np.arange(stamp.shape[0]) - stamp.shape[0] // 2, shifts)


def render(
    stamps: Float[Array, "T S S"], corner: Int[Array, "T 2"], y: Int[Array, "..."], x: Int[Array, "..."]
) -> Float[Array, "*pixels T"]:
    """Evaluate a source at the same pixels of every frame; 0 outside its stamp.

    Args:
        stamps: Stamp of the source in each frame.
        corner: Pixel (y, x) of each frame at the first pixel of its stamp.
        y: Rows of the pixels; broadcast against the frames, which are the last axis.
        x: Columns of the pixels.

    Returns:
        Values of the source at every pixel and frame.
    """
    side = stamps.shape[-1]
    row, column = y - corner[:, 0], x - corner[:, 1]
    inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    flat = (jnp.arange(len(stamps)) * side + jnp.clip(row, 0, side - 1)) * side + jnp.clip(column, 0, side - 1)
    return jnp.where(inside, stamps.reshape(-1)[flat], 0)


class ShiftExpansion(NamedTuple):
    """PSF on a footprint of P pixels, as a polynomial in a shift of up to half a pixel.

    h(shift)[p] = sum_j T_ky[j](2 dy) T_kx[j](2 dx) templates[j, p], with Chebyshev polynomials T and ky + kx at most
    `degree`. A quadratic form h' G h is such a polynomial of twice the degree:
    sum_q terms(2 degree)[q] sum_ij product[q, i, j] G_ij.

    Attributes:
        degree: Highest total degree.
        templates: Coefficients of the J terms.
        product: Expansion of the product of terms i and j in the Q terms of twice the degree.
        neglected: Largest error of each pixel over all shifts.
        error: Largest norm of the error over all shifts, relative to the largest norm of the PSF.
    """

    degree: int
    templates: Float[np.ndarray, "J P"]
    product: Float[np.ndarray, "Q J J"]
    neglected: Float[np.ndarray, "P"]
    error: float


def orders(degree: int) -> tuple[Int[np.ndarray, "J"], Int[np.ndarray, "J"]]:
    """Degrees of the J terms of an expansion.

    Args:
        degree: Highest total degree.

    Returns:
        Degrees (ky, kx) in y and x of each term, with ky + kx <= degree.
    """
    pairs = [(ky, kx) for ky in range(degree + 1) for kx in range(degree + 1 - ky)]
    ky, kx = np.array(pairs).T
    return ky, kx


def terms(
    shift_y: Float[Array, "*shape"], shift_x: Float[Array, "*shape"], degree: int
) -> list[Float[Array, "*shape"]]:
    """Evaluate the J terms of an expansion.

    Args:
        shift_y: Shift along y, px, at most half a pixel.
        shift_x: Shift along x, px.
        degree: Highest total degree.

    Returns:
        Terms as a list, whose items XLA keeps in registers.
    """
    along_y, along_x = chebyshev_up_to(2 * shift_y, degree), chebyshev_up_to(2 * shift_x, degree)
    return [along_y[i] * along_x[j] for i, j in zip(*orders(degree), strict=True)]


def linear_terms(degree: int) -> list[int]:
    """Indices of the terms of total degree up to `degree` among those up to `2 degree`.

    Args:
        degree: Highest total degree.

    Returns:
        Index of each of the J terms.
    """
    place = {pair: i for i, pair in enumerate(zip(*(k.tolist() for k in orders(2 * degree)), strict=True))}
    return [place[pair] for pair in zip(*(k.tolist() for k in orders(degree)), strict=True)]


def chebyshev_up_to(u: Float[Array, "*shape"], degree: int) -> list[Float[Array, "*shape"]]:
    """Chebyshev polynomials T_0 to T_degree by their three-term recurrence.

    Args:
        u: Arguments in [-1, 1].
        degree: Highest degree.

    Returns:
        Values of the degree + 1 polynomials.
    """
    polynomials = [jnp.ones_like(u), u]
    for _ in range(degree - 1):
        polynomials.append(2 * u * polynomials[-1] - polynomials[-2])
    return polynomials[: degree + 1]


def expand(stamp: Float[np.ndarray, "S S"], offsets: Int[np.ndarray, "P 2"], tolerance: float) -> ShiftExpansion:
    """Expand a PSF in its shift, to the lowest degree that meets a tolerance.

    The coefficients of a band-limited stamp decrease geometrically with the degree, faster for a wider source.

    Args:
        stamp: PSF stamp.
        offsets: Footprint, offsets (dy, dx) from the middle pixel.
        tolerance: Largest error allowed, relative to the norm of the PSF.

    Returns:
        The expansion.

    Raises:
        ValueError: Degree 24 does not meet the tolerance.

    Reference:
        Trefethen 2013, Approximation Theory and Approximation Practice, chapter 8.
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


def shift_templates(stamp: Float[Array, "S S"], offsets: Int[np.ndarray, "P 2"], degree: int) -> Float[Array, "J P"]:
    """Coefficients of a shift expansion of given degree, as in `expand`; linear in the stamp, which may be traced.

    Args:
        stamp: PSF stamp.
        offsets: Footprint, offsets (dy, dx) from the middle pixel.
        degree: Highest total degree; 0 for the PSF without a shift, as in `centred`.

    Returns:
        Coefficients of the J terms.
    """
    side = stamp.shape[0]
    if degree == 0:
        return stamp[tuple((offsets + side // 2).T)][None]
    whole, place = np.unique(offsets, return_inverse=True)
    row, column = place.reshape(offsets.shape).T
    along = jnp.asarray(shift_basis(whole, side, degree), stamp.dtype)
    (ky, kx), precision = orders(degree), jax.lax.Precision.HIGHEST
    products = jnp.einsum("jyS,SR,jxR->jyx", along[ky], stamp, along[kx], precision=precision)
    return products[:, row, column]


def shift_basis(pixels: Int[np.ndarray, "n"], side: int, degree: int) -> Float[np.ndarray, "K n S"]:
    """Coefficients of T_k(2 s), k = 0 … degree, of the interpolation weights at `pixels` of a source with offset s.

    Args:
        pixels: Pixels relative to the reference pixel of the shift.
        side: Side S of the stamp, px.
        degree: Highest degree; K = degree + 1.

    Returns:
        Matrices that map the stamp's pixels to the coefficients at the given pixels.
    """
    nodes = chebyshev.chebpts1(MAX_DEGREE + 9)
    frequencies = np.arange(1, side // 2 + 1)
    distance = (pixels - nodes[:, None] / 2)[..., None] - (np.arange(side) - side // 2)
    kernel = (1 + 2 * np.cos(2 * np.pi / side * distance[..., None] * frequencies).sum(-1)) / side
    weights = chebyshev.chebvander(nodes, degree) * 2 / len(nodes)
    weights[:, 0] /= 2
    return np.einsum("ak,ayS->kyS", weights, kernel)


def centred(stamp: Float[np.ndarray, "S S"], offsets: Int[np.ndarray, "P 2"]) -> ShiftExpansion:
    """Expansion of degree 0: the PSF without a shift.

    Args:
        stamp: PSF stamp.
        offsets: Footprint, offsets (dy, dx) from the middle pixel, px.

    Returns:
        The expansion, with zero error at zero shift.
    """
    template = stamp[tuple((offsets + len(stamp) // 2).T)]
    return ShiftExpansion(0, template[None], np.ones((1, 1, 1)), np.zeros(len(offsets)), 0.0)


def chebyshev_coefficients(stamp: Float[np.ndarray, "S S"], offsets: Int[np.ndarray, "P 2"]) -> np.ndarray:
    """Coefficients of T_i(2 dy) T_j(2 dx), by interpolation at the Chebyshev nodes.

    Args:
        stamp: PSF stamp.
        offsets: Footprint, offsets (dy, dx) from the middle pixel, px.

    Returns:
        Coefficients (n, n, P), n = `MAX_DEGREE` + 1.
    """
    nodes = chebyshev.chebpts1(MAX_DEGREE + 9)
    values = sample_footprint(stamp, offsets, nodes / 2)
    weights = chebyshev.chebvander(nodes, MAX_DEGREE) * 2 / len(nodes)
    weights[:, 0] /= 2
    return np.einsum("ai,bj,abp->ijp", weights, weights, values)


def sample_footprint(stamp: np.ndarray, offsets: np.ndarray, shifts: np.ndarray) -> Float[np.ndarray, "n n P"]:
    """Evaluate the stamp on a footprint for all shifts (dy, dx) of a grid, in float64.

    Args:
        stamp: PSF stamp, (S, S).
        offsets: Footprint, offsets (dy, dx) from the middle pixel, (P, 2).
        shifts: Shifts of the grid along each axis, px, (n,).

    Returns:
        Values on the footprint.
    """
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
    """Expansion of products of terms, T_i T_j = (T_(i+j) + T_|i-j|) / 2 along each axis, in terms of twice the degree.

    Args:
        degree: Highest total degree.

    Returns:
        Coefficient of each of the Q terms in the product of terms i and j.
    """
    (ky, kx), (qy, qx) = orders(degree), orders(2 * degree)

    def along(k: np.ndarray, q: np.ndarray) -> np.ndarray:
        plus, minus = k[:, None] + k, abs(k[:, None] - k)
        return ((q[:, None, None] == plus) * 0.5) + ((q[:, None, None] == minus) * 0.5)

    return along(ky, qy) * along(kx, qx)
