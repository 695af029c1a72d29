"""Mean and covariance of small patches from few samples: sample covariance, shrinkage, factorisation.

Everything works on one location; `vmap` makes it many. Covariances are of the population form (1/T), as in Flasseur et
al. 2018 (A&A 618, A138), here "F18". Shrinkage is toward the diagonal: C = (1 - rho) S + rho diag(S), F18 eq. 10.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular
from jaxtyping import Array, Bool, Float, Int

PRODUCT_FRAMES, PRODUCT_ROWS = 16, 32  # of a block of lagged products: one that stays in a core's cache
CV_FACTORS = tuple(np.round(1 / (1 + np.exp(-np.linspace(-5, 4, 10))), 4).tolist())  # 0.007 … 0.982
PIVOT_EPS = 10  # a pivot below this many roundings of its variance is none


def sample_covariance(deviations: Float[Array, "T P"], weights: Float[Array, "T"] | None = None) -> Float[Array, "P P"]:
    """S = sum_t w_t d_t d_t' with weights that sum to one, 1/T each by default (F18 eq. 8)."""
    left = deviations / len(deviations) if weights is None else deviations * (weights / weights.sum())[:, None]
    return left.T @ deviations


def lagged_products(deviations: Float[Array, "T H W"], lag: Int[np.ndarray, "L 2"]) -> Float[Array, "L H W"]:
    """(1/T) sum_t d_t(p) d_t(p + lag) at every pixel p, 0 where p + lag lies outside.

    The mean is one per pixel, so the entries of all patches' covariances are these products: L T H W multiplications
    and not P^2 T H W. Worked in blocks of rows and frames that stay in the cache.
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

    def of_rows(top: Array) -> Array:
        def add_frames(total: Array, block: Array) -> tuple[Array, None]:
            near = jax.lax.dynamic_slice_in_dim(block, top, rows + reach, axis=1)
            here = near[:, :rows, reach : reach + width]

            def of_lag(step: Array) -> Array:
                there = jax.lax.dynamic_slice(near, (0, step[0], reach + step[1]), here.shape)
                return (here * there).sum(0)

            return total + jax.lax.map(of_lag, jnp.asarray(lag)), None

        start = jnp.zeros((len(lag), rows, width), deviations.dtype)
        return jax.lax.scan(add_frames, start, blocks)[0]

    products = jax.lax.map(of_rows, jnp.arange(n_rows) * rows)
    return jnp.swapaxes(products, 0, 1).reshape(len(lag), -1, width)[:, :height] / frames


class Moments(NamedTuple):
    """Number, mean and co-moment sum (x - mean)(x - mean)' of samples; merged exactly, in any order."""

    n: Float[Array, ""]
    mean: Float[Array, "P"]
    comoment: Float[Array, "P P"]


def moments(samples: Float[Array, "T P"], weights: Float[Array, "T"] | None = None) -> Moments:
    """weights: of each sample, 1 by default; their sum is n."""
    w = jnp.ones(len(samples), samples.dtype) if weights is None else weights
    n = w.sum()
    mean = w @ samples / jnp.where(n > 0, n, 1)
    deviations = samples - mean
    return Moments(n, mean, (w[:, None] * deviations).T @ deviations)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together (Chan, Golub, LeVeque 1983, The American Statistician 37:242)."""
    n = a.n + b.n
    share = jnp.where(n > 0, b.n / jnp.maximum(n, 1), 0)
    step = b.mean - a.mean
    comoment = a.comoment + b.comoment + a.n * share * jnp.outer(step, step)
    return Moments(n, a.mean + share * step, comoment)


def add_at_places(of: Moments, samples: Float[Array, "N B P"], weights: Float[Array, "N B"], at_once: int) -> Moments:
    """The moments of N places, each with its own B samples more. Worked on `at_once` places at a time, in the memory
    that `of` has where the caller gives it away."""
    n = len(samples)
    size = int(np.clip(at_once, 1, n))

    def add_some(i: Array, state: Moments) -> Moments:
        start = jnp.minimum(i * size, n - size)
        new = jnp.arange(size) + start >= i * size  # the last part begins early, to be as large as the others
        some, x, w = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), (state, samples, weights)
        )
        more = jax.vmap(lambda m, x, w: merge(m, moments(x, w)))(some, x, w * new[:, None])
        return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, 0), state, more)

    return jax.lax.fori_loop(0, -(-n // size), add_some, of)


def covariance(of: Moments) -> Float[Array, "P P"]:
    return of.comoment / of.n


def shrink(s: Float[Array, "P P"], rho: Float[Array, ""] | float) -> Float[Array, "P P"]:
    """The off-diagonal entries times 1 - rho, the diagonal untouched (F18 eq. 10)."""
    return (1 - rho) * s + rho * jnp.diag(jnp.diag(s))


def _square_sums(s: Float[Array, "P P"]) -> tuple[Array, Array, Array]:
    """tr(S^2), tr(S)^2 and sum_i S_ii^2."""
    diagonal = jnp.diag(s)
    return (s * s).sum(), diagonal.sum() ** 2, (diagonal**2).sum()


def paco_shrinkage(s: Float[Array, "P P"], n: Float[Array, ""] | float) -> Float[Array, ""]:
    """F18 eq. 12: [tr(S^2) + tr(S)^2 - 2 sum S_ii^2] / [(n + 1)(tr(S^2) - sum S_ii^2)], clipped to [0, 1].

    n: number of frames, or the number of independent ones that they are worth. The fixed point of OAS for a diagonal
    target (Chen et al. 2010). 1 where no two pixels are correlated.
    """
    of_square, square_of, diagonal = _square_sums(s)
    correlated = of_square - diagonal
    rho = (of_square + square_of - 2 * diagonal) / ((n + 1) * jnp.where(correlated > 0, correlated, 1))
    return jnp.where(correlated > 0, jnp.clip(rho, 0, 1), 1.0)


def correlation(s: Float[Array, "P P"]) -> Float[Array, "P P"]:
    """S over its standard deviations; rows of no variance are 0."""
    variance = jnp.diag(s)
    scale = jnp.where(variance > 0, 1 / jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
    return s * scale[:, None] * scale


def oas_shrinkage(s: Float[Array, "P P"], n: Float[Array, ""] | float) -> Float[Array, ""]:
    """Oracle approximating shrinkage (Chen, Wiesel, Eldar, Hero 2010, IEEE TSP 58:5016, eq. 23) of the correlation
    matrix toward the identity, in scikit-learn's form; for S that is toward its diagonal."""
    r = correlation(s)
    size = (jnp.diag(s) > 0).sum()
    mean_square, mean = (r * r).sum() / size**2, jnp.trace(r) / size
    spread = (n + 1) * (mean_square - mean**2 / size)
    return jnp.where(spread > 0, jnp.clip((mean_square + mean**2) / jnp.where(spread > 0, spread, 1), 0, 1), 1.0)


def ledoit_wolf_shrinkage(s: Float[Array, "P P"], deviations: Float[Array, "T P"]) -> Float[Array, ""]:
    """Ledoit & Wolf 2004 (J. Multivariate Analysis 88:365, lemma 3.2-3.5) for standardised pixels, whose target is the
    identity; for S that is its diagonal. scikit-learn's estimate on centred, standardised samples."""
    variance = jnp.diag(s)
    frames, size = len(deviations), (variance > 0).sum()
    energy = (deviations**2 * jnp.where(variance > 0, 1 / jnp.where(variance > 0, variance, 1), 0)).sum(-1)
    r = correlation(s)
    distance = (r * r).sum() - jnp.trace(r) ** 2 / size
    error = ((energy**2).mean() - (r * r).sum()) / frames
    return jnp.where(distance > 0, jnp.clip(error / jnp.where(distance > 0, distance, 1), 0, 1), 1.0)


def cross_validated_shrinkage(deviations: Float[Array, "T P"], folds: int = 4) -> Float[Array, ""]:
    """The factor of CV_FACTORS under which held-out frames are the likeliest.

    The folds are runs of consecutive frames: neighbours in time are alike, and random folds would call the noise that
    they share structure. Gaussian likelihood, mean and covariance of the other folds.
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
    return jnp.where(finite.any(), best, factors[-1])  # too few frames for any fold


Shrinkage = Callable[[Float[Array, "P P"], Float[Array, "T P"], Float[Array, ""]], Float[Array, ""]]


def shrinkage_factor(name: str, rho: float | None = None) -> Shrinkage:
    """The function (S, deviations, n) -> rho of that name: paco, oas, ledoit_wolf, cv, or fixed at `rho`."""
    by_name: dict[str, Shrinkage] = {
        "paco": lambda s, deviations, n: paco_shrinkage(s, n),
        "oas": lambda s, deviations, n: oas_shrinkage(s, n),
        "ledoit_wolf": lambda s, deviations, n: ledoit_wolf_shrinkage(s, deviations),
        "cv": lambda s, deviations, n: cross_validated_shrinkage(deviations),
        "fixed": lambda s, deviations, n: jnp.asarray(rho, s.dtype),
    }
    return by_name[name]


class Factor(NamedTuple):
    """C = L L' and whether C was singular, in which case L is that of C's diagonal."""

    lower: Float[Array, "P P"]
    singular: Bool[Array, ""]


def factorise(c: Float[Array, "P P"], usable: Bool[Array, "P"]) -> Factor:
    """Cholesky's factor. Unusable pixels are marginalised: they stand alone with unit variance.

    A covariance without one, or with a pivot that is rounding alone, is called singular and replaced by its diagonal:
    the pixels are then taken as independent, and the caller says for how many locations.
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
    """dL = L Phi(L^-1 dC L^-T), Phi the lower half (Murray 2016, arXiv:1602.07527, eq. 8), of the matrix that was
    factorised: the failed Cholesky's own derivative would be NaN."""
    (lower, singular), (dc,) = _cholesky_or_diagonal(*primals), tangents
    dc = jnp.where(singular, jnp.diag(jnp.diag(dc)), dc)
    half = solve_triangular(lower, solve_triangular(lower, (dc + dc.T) / 2, lower=True).T, lower=True)
    phi = jnp.tril(half) - jnp.diag(jnp.diag(half)) / 2
    return (lower, singular), (lower @ phi, np.zeros(singular.shape, jax.dtypes.float0))


def effective_frames(deviations: Float[Array, "T pixels"]) -> Float[Array, "pixels"]:
    """How many independent frames a covariance from T correlated ones is worth: T / (1 + 2 sum_k (1 - k/T) r_k^2).

    r_k: autocorrelation in time (Bartlett 1946, J. R. Stat. Soc. Suppl. 8:27), summed up to the first lag that white
    noise could show, |r_k| <= 2 / sqrt(T).
    """
    frames = len(deviations)
    variance = (deviations**2).sum(0)
    scale = 1 / jnp.where(variance > 0, variance, 1)

    def add(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        total, alive = carry
        later = jnp.where((jnp.arange(frames) < frames - k)[:, None], jnp.roll(deviations, -k, axis=0), 0)
        r = (deviations * later).sum(0) * scale
        alive = alive & (abs(r) > 2 / frames**0.5)
        return (total + jnp.where(alive, (1 - k / frames) * r**2, 0), alive), None

    start = (jnp.zeros_like(variance), jnp.ones(variance.shape, bool))
    (total, _), _ = jax.lax.scan(add, start, jnp.arange(1, max(2, frames // 2)))
    return frames / (1 + 2 * total)
