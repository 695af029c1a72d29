"""Channels combined as the equations stand, place by place, in float64 with an explicit inverse: a second opinion.

Flasseur, Denis, Thiébaut & Langlois (2020), A&A 637, A9. a, b are (L, N), R (L, L), spectra (M, L). Nothing here comes
from the package.
"""

import numpy as np


def combine(a, b, correlation_at, spectra):
    """a, b and the best spectrum's number of N places; `correlation_at(n)` is R there. NaN, -1 where nothing is."""
    rows = []
    for n in range(a.shape[1]):
        seen = [channel for channel in range(len(a)) if np.isfinite(a[channel, n]) and a[channel, n] > 0]
        best = (np.nan, np.nan, -1)
        for number, g in enumerate(spectra):
            if not any(g[channel] for channel in seen):
                continue
            inverse = np.linalg.inv(np.array([[correlation_at(n)[i, j] for j in seen] for i in seen]))
            s = np.array([b[channel, n] / np.sqrt(a[channel, n]) for channel in seen])
            u = np.array([np.sqrt(a[channel, n]) * g[channel] for channel in seen])
            terms = (u @ inverse @ u, u @ inverse @ s, number)
            if best[2] < 0 or terms[1] / np.sqrt(terms[0]) > best[1] / np.sqrt(best[0]) + 1e-9:
                best = terms
        rows.append(best)
    a, b, number = np.array(rows).T
    return a, b, number.astype(int)


def scaled_place(place, centre, scale):
    """Where what stands at `place` of the sky stands in frames scaled about the centre."""
    return centre[0] + (place[0] - centre[0]) * scale, centre[1] + (place[1] - centre[1]) * scale


def draw(rng, correlation, n):
    """(L, N) normal values of unit variance and this correlation."""
    values, vectors = np.linalg.eigh(correlation)
    return vectors @ (np.sqrt(values)[:, None] * rng.standard_normal((len(correlation), n)))
