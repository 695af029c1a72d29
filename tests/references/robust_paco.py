"""Robust PACO as its equations stand, frame by frame and location by location, in float64.

Flasseur, Denis, Thiébaut & Langlois (2020), A&A 634, A2: r_t ~ N(m, s_t^2 C). S is the sum over T that the paper has,
of the frames over the s_t that are returned with it. With shrinkage the s_t^2 that follow from it are smaller by a
factor in every iteration, and C larger, without end: the fixed point is of s_t^2 C, which alone is compared, and the
factor is taken out so that nothing overflows. Nothing here comes from the package.
"""

import functools

import numpy as np
import scipy.linalg
from references import paco

LEAST_SCALE = 0.1  # of the median s_t^2
SETTLED = 1e-13


def shrunk(S, n):
    rho = paco.rho_paco(S, n)
    return (1 - rho) * S + rho * np.diag(np.diag(S)), rho


def learn(r, iterations=10_000, settled=SETTLED):
    """Mean (K,), precision (K, K), s_t^-2 (T,) and rho of patches r (T, K); with 0 iterations all s_t are 1."""
    T, K = r.shape
    weights = np.ones(T)

    def with_weights(weights):
        m = sum(w * x for w, x in zip(weights, r, strict=True)) / weights.sum()
        S = sum(w * np.outer(x - m, x - m) for w, x in zip(weights, r, strict=True)) / T
        C, rho = shrunk(S, weights.sum() ** 2 / (weights**2).sum())
        return m, scipy.linalg.cho_solve(scipy.linalg.cho_factor(C), np.eye(K)), rho

    for _ in range(iterations):
        m, precision, _ = with_weights(weights)
        squared = np.array([(x - m) @ precision @ (x - m) / K for x in r])
        squared = np.maximum(squared, LEAST_SCALE * np.median(squared))
        ratio = squared * weights  # constant once only the common factor moves
        weights = 1 / (squared * np.exp(-np.log(squared).mean()))
        if ratio.max() / ratio.min() - 1 < settled:
            break
    else:
        if iterations:
            raise AssertionError(f"not settled in {iterations} iterations")
    m, precision, rho = with_weights(weights)
    return m, precision, weights, rho


def source_sums(cube, positions, psf, offsets, usable, learned_at):
    """a and b of the source at `positions` (T, 2); `learned_at(y, x)` gives what `learn` does of the patch there."""
    n, kept = paco.nearest_pixels(positions, usable)
    if not kept.any():
        return np.nan, np.nan
    delta = positions - n
    h = paco.shift_psf(psf, delta[:, 0], delta[:, 1], offsets)
    a = b = 0.0
    for t in np.flatnonzero(kept):
        m, precision, weights, _ = learned_at(*n[t])
        a += weights[t] * h[t] @ precision @ h[t]
        b += weights[t] * h[t] @ precision @ (cube[t, n[t, 0] + offsets[:, 0], n[t, 1] + offsets[:, 1]] - m)
    return a, b


def learner(cube, offsets):
    return functools.cache(lambda y, x: learn(paco.patches(cube, y, x, offsets)))


def maps(cube, angles_deg, psf, radius, centre=None):
    """Maps (H, W): a, b, snr, flux, flux_std, and shrinkage of every location."""
    offsets = paco.disc(radius)
    usable, learned_at = paco.usable_locations(cube, offsets), learner(cube, offsets)
    sums, rho = np.empty((2, *usable.shape)), np.full(usable.shape, np.nan)
    for y, x in np.ndindex(usable.shape):
        positions = paco.tracks(angles_deg, y, x, paco.centre_of(cube, centre))
        sums[:, y, x] = source_sums(cube, positions, psf, offsets, usable, learned_at)
        if usable[y, x]:
            rho[y, x] = learned_at(y, x)[3]
    return paco.finish(sums[0], sums[1]) | {"shrinkage": rho}


def unbiased_flux(cube, angles_deg, psf, radius, y, x, iterations, centre=None, flux=0.0):
    """Algorithm 3 (see `paco.unbiased_flux`) with robust statistics, from `flux` on."""
    offsets = paco.disc(radius)
    usable = paco.usable_locations(cube, offsets)
    positions = paco.tracks(angles_deg, y, x, paco.centre_of(cube, centre))
    a = np.nan
    for _ in range(iterations):
        without = paco.inject(cube, angles_deg, psf, y, x, -flux, centre)
        a, b = source_sums(cube, positions, psf, offsets, usable, learner(without, offsets))
        flux = b / a
    return flux, 1 / np.sqrt(a)
