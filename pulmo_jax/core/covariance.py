"""Mean and covariance of small patches from few samples: sample covariance, shrinkage and factorisation.

All functions handle a single location and are vectorised with `vmap`. Covariances are normalised by the number of
samples (1/T), as in Flasseur et al. 2018 (A&A 618, A138), cited as "F18". Shrinkage is toward the diagonal: C = (1 -
rho) S + rho diag(S), F18 Eq. 10.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Int

PRODUCT_FRAMES, PRODUCT_ROWS = 16, 32  # block size of `lagged_products`; a block fits into the cache of one core
CV_FACTORS = tuple(np.round(1 / (1 + np.exp(-np.linspace(-5, 4, 10))), 4).tolist())  # 0.007 … 0.982
PIVOT_EPS = 10  # a squared Cholesky pivot below PIVOT_EPS machine epsilons times its variance counts as zero


def sample_covariance(deviations: Float[Array, "T P"], weights: Float[Array, "T"] | None = None) -> Float[Array, "P P"]:
    """Weighted sample covariance S = sum_t w_t d_t d_t'.

    Args:
        deviations: Deviations of T samples from their mean.
        weights: Weight of each sample; normalised to sum to one. Default: 1/T each.

    Returns:
        Covariance matrix.

    Reference:
        F18, Eq. 8.
    """
    weighted = deviations / len(deviations) if weights is None else deviations * (weights / weights.sum())[:, None]
    return weighted.T @ deviations


def lagged_products(deviations: Float[Array, "T H W"], lag: Int[np.ndarray, "L 2"]) -> Float[Array, "L H W"]:
    """Temporal mean of the product of each pixel with a neighbour, (1/T) sum_t d_t(p) d_t(p + lag).

    Because the mean is defined per pixel, these products are the entries of the covariances of all patches. They take L
    T H W multiplications instead of P^2 T H W. The computation runs in blocks of rows and frames that stay in the
    cache.

    Args:
        deviations: T frames with the temporal mean of every pixel subtracted.
        lag: L offsets (dy, dx), in pixels, with dy >= 0.

    Returns:
        Mean product for each lag at every pixel p; 0 where p + lag lies outside the image.
    """
    frames, height, width = deviations.shape
    reach = int(abs(lag).max())
    rows = min(PRODUCT_ROWS, height)
    n_rows, n_frames = -(-height // rows), -(-frames // PRODUCT_FRAMES)
    padding = (
        (0, n_frames * PRODUCT_FRAMES - frames),
        (0, n_rows * rows - height + reach),
        (reach, reach),
    )
    blocks = jnp.pad(deviations, padding).reshape(n_frames, PRODUCT_FRAMES, -1, width + 2 * reach)

    def row_block_products(top: Array) -> Array:
        def add_frames(total: Array, block: Array) -> tuple[Array, None]:
            strip = jax.lax.dynamic_slice_in_dim(block, top, rows + reach, axis=1)
            centre = strip[:, :rows, reach : reach + width]

            def product_at(offset: Array) -> Array:
                shifted = jax.lax.dynamic_slice(strip, (0, offset[0], reach + offset[1]), centre.shape)
                return (centre * shifted).sum(0)

            return total + jax.lax.map(product_at, jnp.asarray(lag)), None

        start = jnp.zeros((len(lag), rows, width), deviations.dtype)
        return jax.lax.scan(add_frames, start, blocks)[0]

    products = jax.lax.map(row_block_products, jnp.arange(n_rows) * rows)
    return jnp.swapaxes(products, 0, 1).reshape(len(lag), -1, width)[:, :height] / frames


class Moments(NamedTuple):
    """Sufficient statistics of a Gaussian; `merge` combines them exactly and in any order.

    Attributes:
        n: Number of samples, or the sum of their weights.
        mean: Mean.
        comoment: Sum of (x - mean)(x - mean)'.
    """

    n: Float[Array, ""]
    mean: Float[Array, "P"]
    comoment: Float[Array, "P P"]


def moments(samples: Float[Array, "T P"], weights: Float[Array, "T"] | None = None) -> Moments:
    """Weighted moments of a set of samples.

    Args:
        samples: T samples of P coordinates.
        weights: Weight of each sample, default 1.

    Returns:
        The moments; `n` is the sum of the weights.
    """
    w = jnp.ones(len(samples), samples.dtype) if weights is None else weights
    n = w.sum()
    mean = w @ samples / jnp.where(n > 0, n, 1)
    deviations = samples - mean
    return Moments(n, mean, (w[:, None] * deviations).T @ deviations)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sample sets.

    Args:
        a: Moments of the first set.
        b: Moments of the second set.

    Returns:
        Moments of both sets together.

    Reference:
        Chan, Golub and LeVeque 1983, The American Statistician 37:242.
    """
    n = a.n + b.n
    weight_b = jnp.where(n > 0, b.n / jnp.maximum(n, 1), 0)
    difference = b.mean - a.mean
    comoment = a.comoment + b.comoment + a.n * weight_b * jnp.outer(difference, difference)
    return Moments(n, a.mean + weight_b * difference, comoment)


def add_samples(total: Moments, samples: Float[Array, "N B P"], weights: Float[Array, "N B"], chunk: int) -> Moments:
    """Update the moments at N locations with B samples per location.

    The update processes `chunk` locations at a time and reuses the memory of `total` if the caller donates it.

    Args:
        total: Moments at N locations (leading axis N).
        samples: B samples of P coordinates for each location.
        weights: Weight of each sample.
        chunk: Number of locations per step of the loop.

    Returns:
        Updated moments at all locations.
    """
    n = len(samples)
    size = int(np.clip(chunk, 1, n))

    def add_chunk(i: Array, accumulated: Moments) -> Moments:
        start = jnp.minimum(i * size, n - size)
        new = (
            jnp.arange(size) + start >= i * size
        )  # the last chunk overlaps the one before it, so that all have one size
        current, x, w = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), (accumulated, samples, weights)
        )
        updated = jax.vmap(lambda m, x, w: merge(m, moments(x, w)))(current, x, w * new[:, None])
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0), accumulated, updated
        )

    return jax.lax.fori_loop(0, -(-n // size), add_chunk, total)


def covariance(moments: Moments) -> Float[Array, "P P"]:
    """Covariance matrix from moments, normalised by n.

    Args:
        moments: Moments of the samples.

    Returns:
        Covariance matrix.
    """
    return moments.comoment / moments.n


def shrink(s: Float[Array, "P P"], rho: Float[Array, ""] | float) -> Float[Array, "P P"]:
    """Shrink a covariance matrix toward its diagonal.

    Args:
        s: Sample covariance.
        rho: Shrinkage factor in [0, 1].

    Returns:
        Covariance with off-diagonal entries scaled by 1 - rho and the diagonal unchanged.

    Reference:
        F18, Eq. 10.

    Example:
        >>> shrink(jnp.array([[4.0, 2.0], [2.0, 9.0]]), 0.5).tolist()
        [[4.0, 1.0], [1.0, 9.0]]
    """
    return (1 - rho) * s + rho * jnp.diag(jnp.diag(s))


def _square_sums(s: Float[Array, "P P"]) -> tuple[Array, Array, Array]:
    """tr(S^2), tr(S)^2 and sum_i S_ii^2."""
    diagonal = jnp.diag(s)
    return (s * s).sum(), diagonal.sum() ** 2, (diagonal**2).sum()


def paco_shrinkage(s: Float[Array, "P P"], n: Float[Array, ""] | float) -> Float[Array, ""]:
    """Shrinkage factor of PACO: the fixed point of OAS (Chen et al. 2010) for a diagonal target.

    rho = [tr(S^2) + tr(S)^2 - 2 sum S_ii^2] / [(n + 1)(tr(S^2) - sum S_ii^2)], clipped to [0, 1].

    Args:
        s: Sample covariance.
        n: Number of frames, or the effective number of independent frames.

    Returns:
        Shrinkage factor; 1 if no two pixels are correlated.

    Reference:
        F18, Eq. 12.
    """
    trace_of_square, square_of_trace, diagonal_square = _square_sums(s)
    off_diagonal = trace_of_square - diagonal_square
    rho = (trace_of_square + square_of_trace - 2 * diagonal_square) / (
        (n + 1) * jnp.where(off_diagonal > 0, off_diagonal, 1)
    )
    return jnp.where(off_diagonal > 0, jnp.clip(rho, 0, 1), 1.0)


def correlation(s: Float[Array, "P P"]) -> Float[Array, "P P"]:
    """Correlation matrix of a covariance matrix.

    Args:
        s: Covariance matrix.

    Returns:
        Correlation matrix; rows and columns with zero variance are 0.
    """
    variance = jnp.diag(s)
    scale = jnp.where(variance > 0, 1 / jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    return s * scale[:, None] * scale


def oas_shrinkage(s: Float[Array, "P P"], n: Float[Array, ""] | float) -> Float[Array, ""]:
    """Oracle approximating shrinkage (OAS) of the correlation matrix toward the identity.

    For the covariance S this is shrinkage toward its diagonal. The formula is the one that scikit-learn implements.

    Args:
        s: Sample covariance.
        n: Number of samples.

    Returns:
        Shrinkage factor in [0, 1].

    Reference:
        Chen, Wiesel, Eldar and Hero 2010, IEEE TSP 58:5016, Eq. 23.
    """
    r = correlation(s)
    size = (jnp.diag(s) > 0).sum()
    mean_square, mean = (r * r).sum() / size**2, jnp.trace(r) / size
    spread = (n + 1) * (mean_square - mean**2 / size)
    return jnp.where(spread > 0, jnp.clip((mean_square + mean**2) / jnp.where(spread > 0, spread, 1), 0, 1), 1.0)


def ledoit_wolf_shrinkage(s: Float[Array, "P P"], deviations: Float[Array, "T P"]) -> Float[Array, ""]:
    """Ledoit-Wolf shrinkage of the correlation matrix toward the identity.

    For the covariance S this is shrinkage toward its diagonal. Equals scikit-learn's estimate for centred, standardised
    samples.

    Args:
        s: Sample covariance.
        deviations: Deviations of the T samples from their mean.

    Returns:
        Shrinkage factor in [0, 1].

    Reference:
        Ledoit and Wolf 2004, J. Multivariate Analysis 88:365, Lemmas 3.2 to 3.5.
    """
    variance = jnp.diag(s)
    frames, size = len(deviations), (variance > 0).sum()
    energy = (deviations**2 * jnp.where(variance > 0, 1 / jnp.where(variance > 0, variance, 1), 0)).sum(-1)
    r = correlation(s)
    distance = (r * r).sum() - jnp.trace(r) ** 2 / size
    error = ((energy**2).mean() - (r * r).sum()) / frames
    return jnp.where(distance > 0, jnp.clip(error / jnp.where(distance > 0, distance, 1), 0, 1), 1.0)


def cross_validated_shrinkage(deviations: Float[Array, "T P"], folds: int = 4) -> Float[Array, ""]:
    """Shrinkage factor in `CV_FACTORS` that maximises the Gaussian likelihood of held-out frames.

    Folds are blocks of consecutive frames: adjacent frames are correlated, so with random folds their shared noise
    would be treated as structure. Mean and covariance come from the remaining folds.

    Args:
        deviations: Deviations of T frames from their mean.
        folds: Number of folds, at most T.

    Returns:
        Shrinkage factor; the largest candidate if there are too few frames for any fold.
    """
    frames = len(deviations)
    edges = np.linspace(0, frames, min(folds, frames) + 1).astype(int)
    variance = (deviations**2).mean(0)
    x = deviations * jnp.where(variance > 0, 1 / jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    factors = jnp.asarray(CV_FACTORS, x.dtype)
    total = jnp.zeros(len(CV_FACTORS), x.dtype)
    for start, stop in pairwise(edges):
        train, test = jnp.concatenate([x[:start], x[stop:]]), x[start:stop]
        mean = train.mean(0)
        s = sample_covariance(train - mean) + jnp.diag(jnp.where(variance > 0, 0.0, 1.0).astype(x.dtype))
        scatter = sample_covariance(test - mean) * len(test)

        def cost(rho: Array, s: Array = s, scatter: Array = scatter, n: int = len(test)) -> Array:
            lower = jnp.linalg.cholesky(shrink(s, rho))
            log_determinant = 2 * jnp.log(jnp.diag(lower)).sum()
            return n * log_determinant + jnp.trace(cho_solve((lower, True), scatter))

        total += jax.lax.map(cost, factors)
    finite = jnp.isfinite(total)
    best = factors[jnp.argmin(jnp.where(finite, total, jnp.inf))]
    return jnp.where(finite.any(), best, factors[-1])  # no finite likelihood: too few frames


Shrinkage = Callable[[Float[Array, "P P"], Float[Array, "T P"], Float[Array, ""]], Float[Array, ""]]


def shrinkage_factor(name: str, rho: float | None = None) -> Shrinkage:
    """Select a shrinkage estimator by name.

    Args:
        name: "paco", "oas", "ledoit_wolf", "cv" or "fixed".
        rho: Shrinkage factor, used by "fixed" only.

    Returns:
        Function (S, deviations, n) -> rho.
    """
    by_name: dict[str, Shrinkage] = {
        "paco": lambda s, deviations, n: paco_shrinkage(s, n),
        "oas": lambda s, deviations, n: oas_shrinkage(s, n),
        "ledoit_wolf": lambda s, deviations, n: ledoit_wolf_shrinkage(s, deviations),
        "cv": lambda s, deviations, n: cross_validated_shrinkage(deviations),
        "fixed": lambda s, deviations, n: jnp.asarray(rho, s.dtype),
    }
    return by_name[name]


class Factor(NamedTuple):
    """Cholesky factor of a covariance C = L L'.

    Attributes:
        lower: Factor L; that of the diagonal of C if C is singular.
        singular: Whether C is singular to working precision.
    """

    lower: Float[Array, "P P"]
    singular: Bool[Array, ""]


def factorise(c: Float[Array, "P P"], usable: Bool[Array, "P"]) -> Factor:
    """Cholesky factorisation of a covariance with a fallback to its diagonal.

    Unusable pixels are marginalised: they become independent of all others and get unit variance. A covariance that has
    no Cholesky factor, or one with a pivot at rounding level, is singular and replaced by its diagonal, which
    treats the pixels as independent. Callers report the number of such locations.

    Args:
        c: Covariance matrix.
        usable: Pixels that take part.

    Returns:
        The factor, and whether the covariance was singular.
    """
    both = usable[:, None] & usable
    variance = jnp.where(usable, jnp.diag(c), 1)
    return Factor(*_cholesky_or_diagonal(jnp.where(both, c, jnp.diag(variance))))


@jax.custom_jvp
def _cholesky_or_diagonal(c: Array) -> tuple[Array, Array]:
    lower = jax.lax.linalg.cholesky(c, symmetrize_input=False)
    variance, pivots = jnp.diag(c), jnp.diag(lower) ** 2
    sound = jnp.isfinite(lower[-1, -1]) & (pivots > PIVOT_EPS * jnp.finfo(c.dtype).eps * variance).all()
    return jnp.where(sound, lower, jnp.diag(jnp.sqrt(variance))), ~sound


@_cholesky_or_diagonal.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Any]]:
    """Derivative of the Cholesky factor: dL = L Phi(L^-1 dC L^-T), where Phi halves the diagonal of the lower triangle.

    For a singular C it is the derivative of the diagonal's factor; that of the failed factorisation would be NaN.
    Reference: Murray 2016, arXiv:1602.07527, Eq. 8.
    """
    (lower, singular), (dc,) = _cholesky_or_diagonal(*primals), tangents
    dc = jnp.where(singular, jnp.diag(jnp.diag(dc)), dc)
    half = solve_triangular(lower, solve_triangular(lower, (dc + dc.T) / 2, lower=True).T, lower=True)
    phi = jnp.tril(half) - jnp.diag(jnp.diag(half)) / 2
    return (lower, singular), (lower @ phi, np.zeros(singular.shape, jax.dtypes.float0))


def effective_frames(deviations: Float[Array, "T pixels"]) -> Float[Array, "pixels"]:
    """Effective number of independent frames for estimating a covariance from T correlated frames.

    T / (1 + 2 sum_k (1 - k/T) r_k^2), where r_k is the autocorrelation at lag k. The sum ends before the first lag at
    which |r_k| <= 2 / sqrt(T), the level that white noise reaches.

    Args:
        deviations: Deviations of T frames from their temporal mean.

    Returns:
        Effective number of frames for each pixel.

    Reference:
        Bartlett 1946, J. R. Stat. Soc. Suppl. 8:27.
    """
    frames = len(deviations)
    variance = (deviations**2).sum(0)
    scale = 1 / jnp.where(variance > 0, variance, 1)

    def add(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        total, significant = carry
        shifted = jnp.where((jnp.arange(frames) < frames - k)[:, None], jnp.roll(deviations, -k, axis=0), 0)
        r = (deviations * shifted).sum(0) * scale
        significant = significant & (abs(r) > 2 / frames**0.5)
        return (total + jnp.where(significant, (1 - k / frames) * r**2, 0), significant), None

    start = (jnp.zeros_like(variance), jnp.ones(variance.shape, bool))
    (total, _), _ = jax.lax.scan(add, start, jnp.arange(1, max(2, frames // 2)))
    return frames / (1 + 2 * total)
