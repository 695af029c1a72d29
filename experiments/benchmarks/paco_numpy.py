"""PACO in vectorised float64 NumPy and SciPy: the reference implementation of the PACO benchmarks.

Flasseur, Denis, Thiébaut & Langlois (2018), A&A 618, A138. As an experienced NumPy user would write it: covariances
from the products of whole image rows (the mean belongs to a pixel, so a covariance belongs to a pair of pixels,
whichever patch they are in), batched Cholesky solves, cubic convolution along the tracks by flat indices, and for the
exact maps a basis of the sub-pixel PSFs. It imports nothing from the package; its definitions are those of the slow
reference in tests/references/paco.py. SciPy must be new enough for `solve` on stacks of matrices (1.17 does it without
a loop).
"""

import numpy as np
import scipy.linalg
import scipy.ndimage
from numpy.lib.stride_tricks import as_strided, sliding_window_view

TIE_PX = 1e-9  # a position that is a whole or half pixel on paper must not fall to either side by its last bits
CHEBYSHEV_DEGREE = 8  # of the PSF as a function of its sub-pixel shift
BASIS_TOLERANCE = 1e-4  # singular values of the PSF basis below this share of the largest are dropped: 3e-4 in SNR


def fast_maps(cube, angles_deg, psf, radius, centre=None):
    """Algorithm 2. Cube (T, H, W), odd PSF stamp; maps (H, W) in a dict: a, b, snr, flux, flux_std."""
    offsets = disc(radius)
    rows_hwt, usable = centred_rows(cube, offsets)
    h = shifted_psfs(psf, np.zeros(1), np.zeros(1), offsets)
    solved = solve_rows(rows_hwt, h.T, offsets)  # (h, w, K, 1): C^-1 h at every location with a full patch
    a = (h @ solved).ravel()
    b = correlate(rows_hwt, solved, offsets)[..., 0]  # (T, h * w)
    # One complex image holds both maps, so that one gather serves both.
    summed = np.zeros(cube.shape[1] * cube.shape[2], complex)
    count = np.zeros(summed.shape, int)
    inner = inner_part(usable, offsets)
    full = np.zeros(inner.shape, bool)  # by the second tap: all 16 taps are usable
    if min(inner.shape) >= 4:
        full[1:-2, 1:-2] = sliding_window_view(inner, (4, 4)).all(axis=(2, 3))
    reach = np.abs(offsets).max()
    image = np.empty(a.shape, complex)
    image.real = np.where(inner.ravel(), a, 0)
    for positions, b_t in zip(tracks(cube, angles_deg, centre), b, strict=True):
        image.imag = b_t
        positions = positions - reach
        base = np.floor(positions + TIE_PX).astype(int)
        kept, index = look_up(full, base)
        ky, kx = keys_weights((positions - base)[:, kept])
        total = 0
        for i in range(4):
            line = index + (i - 1) * inner.shape[1] - 1
            total = total + ky[i] * sum(kx[j] * image.take(line + j) for j in range(4))
        summed[kept] += total
        count[kept] += 1
    return finish(np.real(summed), np.imag(summed), count, usable.shape)


def exact_maps(cube, angles_deg, psf, radius, centre=None):
    """Algorithm 1, the PSF at its exact place in every frame; arguments and maps as for `fast_maps`."""
    offsets = disc(radius)
    rows_hwt, usable = centred_rows(cube, offsets)
    basis, coefficients = psf_basis(psf, offsets)  # (K, D), (Q, D)
    solved = solve_rows(rows_hwt, basis, offsets)  # (h, w, K, D)
    i, j = np.triu_indices(basis.shape[1])
    gram = np.einsum("kd,hwke->hwde", basis, solved, optimize=True)[..., i, j] * np.where(i == j, 1, 2)
    gram = gram.reshape(-1, len(i))
    b = correlate(rows_hwt, solved, offsets)  # (T, h * w, D)
    a_sum, b_sum = np.zeros((2, usable.size))
    count = np.zeros(usable.size, int)
    inner = inner_part(usable, offsets)
    reach = np.abs(offsets).max()
    for positions, b_t in zip(tracks(cube, angles_deg, centre), b, strict=True):
        positions = positions - reach
        nearest = np.floor(positions + 0.5 + TIE_PX).astype(int)
        kept, index = look_up(inner, nearest)
        c = chebyshev_terms((positions - nearest)[:, kept]) @ coefficients
        a_sum[kept] += np.einsum("pk,pk,pk->p", c[:, i], c[:, j], gram[index])
        b_sum[kept] += np.einsum("pd,pd->p", c, b_t[index])
        count[kept] += 1
    return finish(a_sum, b_sum, count, usable.shape)


def plain_fast_maps(cube, angles_deg, psf, radius, centre=None):
    """Algorithm 2 as one writes it down: patches, covariances by matrix products, Cholesky, scipy's cubic splines.

    Frames without bad pixels only; tracks that leave the field of full patches are mirrored at its edge.
    """
    offsets = disc(radius)
    reach, (T, H, W) = np.abs(offsets).max(), cube.shape
    deviations = (cube - cube.mean(axis=0)).reshape(T, -1).T  # (H W, T)
    inner = np.arange(H * W).reshape(H, W)[reach : H - reach, reach : W - reach]
    h = shifted_psfs(psf, np.zeros(1), np.zeros(1), offsets)[0]
    a, b = np.empty(inner.shape), np.empty((T, *inner.shape))
    diagonal = np.arange(len(offsets))
    for y, row in enumerate(inner):  # a row at a time: all patches at once would take 0.8 GB
        d = deviations[row[:, None] + offsets @ (W, 1)]  # (w, K, T)
        S = d @ d.transpose(0, 2, 1) / T
        variance = S[:, diagonal, diagonal]
        trace_sq, diagonal_sq = (S**2).sum(axis=(1, 2)), (variance**2).sum(axis=1)
        rho = (trace_sq + variance.sum(axis=1) ** 2 - 2 * diagonal_sq) / ((T + 1) * (trace_sq - diagonal_sq))
        S *= 1 - np.clip(rho, 0, 1)[:, None, None]
        S[:, diagonal, diagonal] = variance
        lower = np.linalg.cholesky(S)
        w = np.linalg.solve(
            lower.transpose(0, 2, 1), np.linalg.solve(lower, np.broadcast_to(h[:, None], (len(S), len(h), 1)))
        )
        a[y], b[:, y] = (h @ w)[:, 0], (w.transpose(0, 2, 1) @ d)[:, 0].T
    total = np.zeros((2, H * W))
    a_spline = scipy.ndimage.spline_filter(a, order=3, mode="mirror")
    for positions, b_t in zip(tracks(cube, angles_deg, centre), b, strict=True):
        at = positions - reach
        total[0] += scipy.ndimage.map_coordinates(a_spline, at, order=3, mode="mirror", prefilter=False)
        total[1] += scipy.ndimage.map_coordinates(b_t, at, order=3, mode="mirror")
    return finish(*total, np.ones(H * W, int), (H, W))


def disc(radius):
    reach = int(radius)
    offsets = np.indices((2 * reach + 1,) * 2).reshape(2, -1).T - reach
    return offsets[(offsets**2).sum(axis=1) <= radius**2]


def centred_rows(cube, offsets):
    """The cube without its mean, (H, W, T), zero where a pixel is unusable; and the usable locations (H, W)."""
    finite = np.isfinite(cube).all(axis=0)
    rows = np.ascontiguousarray(np.where(finite, cube, 0).transpose(1, 2, 0))
    good = finite & (rows.max(axis=2) > rows.min(axis=2))
    rows -= rows.mean(axis=2, keepdims=True)
    rows[~good] = 0
    reach, usable = np.abs(offsets).max(), np.zeros_like(good)
    full = np.ones((good.shape[0] - 2 * reach, good.shape[1] - 2 * reach), bool)
    for dy, dx in offsets + reach:
        full &= good[dy : dy + full.shape[0], dx : dx + full.shape[1]]
    usable[reach:-reach, reach:-reach] = full
    return rows, usable


def inner_part(usable, offsets):
    reach = np.abs(offsets).max()
    return usable[reach:-reach, reach:-reach]


def solve_rows(rows_hwt, rhs, offsets):
    """C^-1 rhs, (h, w, K, D), at the locations with a full patch, row by row so that the covariances stay in cache."""
    H, W, T = rows_hwt.shape
    reach, K = np.abs(offsets).max(), len(offsets)
    side = 2 * reach + 1
    # Products of each image row with itself and the `side - 1` below; rows below the frame are zero.
    padded = np.concatenate([rows_hwt, np.zeros((side - 1, W, T))])
    gram = np.matmul(rows_hwt, row_blocks(padded, side).transpose(0, 2, 1))  # (H, W, side * W)
    gram /= T
    # Where the covariance of patch pixels i and j stands, counted from the location's own place in `gram`.
    (yi, xi), (yj, xj) = (offsets[:, None] + reach).transpose(2, 0, 1), (offsets[None] + reach).transpose(2, 0, 1)
    swap = yi > yj
    yi, xi, yj, xj = (np.where(swap, v, u) for u, v in ((yi, yj), (xi, xj), (yj, yi), (xj, xi)))
    place = yi * gram[0].size + xi * side * W + (yj - yi) * W + xj
    index = np.arange(W - 2 * reach)[:, None, None] * (side * W + 1) + place
    diagonal = np.arange(K)
    flat = gram.ravel()
    out = np.empty((H - 2 * reach, W - 2 * reach, K, rhs.shape[1]))
    for y in range(len(out)):
        S = flat[y * gram[0].size :].take(index)
        variance = S[:, diagonal, diagonal]
        trace_sq = np.einsum("nij,nij->n", S, S)
        diagonal_sq = (variance**2).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            rho = (trace_sq + variance.sum(axis=1) ** 2 - 2 * diagonal_sq) / ((T + 1) * (trace_sq - diagonal_sq))
        rho = np.clip(np.where(trace_sq > diagonal_sq, rho, 1), 0, 1)
        S *= (1 - rho)[:, None, None]
        # An unusable pixel has variance 0; any other keeps the matrix regular, and the location is not used.
        largest = variance.max(axis=1, keepdims=True)
        S[:, diagonal, diagonal] = np.where(variance > 0, variance, np.where(largest > 0, largest, 1))
        out[y] = scipy.linalg.solve(S, rhs, assume_a="pos", overwrite_a=True)
    return out


def correlate(rows_hwt, weights, offsets):
    """Sums over the patch of weights (h, w, K, D) times the centred pixels, (T, h * w, D): a banded product per row."""
    h, w, _, D = weights.shape
    side, (_, W, T) = 2 * np.abs(offsets).max() + 1, rows_hwt.shape
    dy, dx = (offsets + side // 2).T
    columns = np.arange(w)[:, None]
    banded = np.zeros((w, D, side * W))  # the same places are written for every row
    out = np.empty((T, h, w * D))
    for y, block in enumerate(row_blocks(rows_hwt, side)):
        banded[columns, :, dy * W + columns + dx] = weights[y]
        out[:, y] = (banded.reshape(w * D, -1) @ block).T
    return out.reshape(T, h * w, D)


def row_blocks(rows_hwt, side):
    """A view (H - side + 1, side * W, T): `side` image rows from each row on."""
    H, W, T = rows_hwt.shape
    return as_strided(
        rows_hwt, (H - side + 1, side * W, T), (rows_hwt.strides[0], *rows_hwt.strides[1:]), writeable=False
    )


def tracks(cube, angles_deg, centre):
    """Per frame, where a source on each pixel of the derotated map stands: (2, H * W)."""
    _, H, W = cube.shape
    cy, cx = (H // 2, W // 2) if centre is None else centre
    dy, dx = (np.indices((H, W)) - np.array([cy, cx])[:, None, None]).reshape(2, -1)
    for angle in np.deg2rad(angles_deg):
        c, s = np.cos(angle), np.sin(angle)
        yield np.stack([cy + dy * c - dx * s, cx + dx * c + dy * s])


def look_up(mask, pixels):
    """Which of the pixels (2, N) lie in the mask, as indices (n,), and where those stand in the flat mask (n,)."""
    y, x = pixels
    inside = (y >= 0) & (y < mask.shape[0]) & (x >= 0) & (x < mask.shape[1])
    index = np.where(inside, y * mask.shape[1] + x, 0)
    kept = np.flatnonzero(inside & mask.take(index))
    return kept, index[kept]


def keys_weights(f):
    """Weights (2, 4, n) of Keys' cubic convolution (a = -1/2) at the fractions f (2, n)."""
    f2, f3 = f**2, f**3
    weights = (-f3 + 2 * f2 - f, 3 * f3 - 5 * f2 + 2, -3 * f3 + 4 * f2 + f, f3 - f2)
    return np.stack(weights, axis=1) / 2


def shifted_psfs(psf, dy, dx, offsets):
    """The PSF shifted by (dy, dx), each (N,), by trigonometric interpolation, read at the offsets: (N, K)."""
    half = len(psf) // 2
    k, pixels = np.arange(1, half + 1), np.arange(-half, half + 1)

    def kernel(shift, at):  # the Dirichlet kernel, (N, K, S)
        u = at[:, None] - shift[:, None, None] - pixels
        return (1 + 2 * np.cos(2 * np.pi / len(psf) * u[..., None] * k).sum(axis=-1)) / len(psf)

    return np.einsum("nki,ij,nkj->nk", kernel(dy, offsets[:, 0]), psf, kernel(dx, offsets[:, 1]), optimize=True)


def chebyshev_terms(delta):
    """T_p(2 dy) T_q(2 dx) for p + q up to the degree, delta (2, N) in half pixels either way: (N, Q)."""
    ty, tx = np.polynomial.chebyshev.chebvander(2 * delta, CHEBYSHEV_DEGREE)
    p, q = np.indices((CHEBYSHEV_DEGREE + 1,) * 2).reshape(2, -1)
    low = p + q <= CHEBYSHEV_DEGREE
    return ty[:, p[low]] * tx[:, q[low]]


def psf_basis(psf, offsets):
    """Basis (K, D) and coefficients (Q, D): the PSF shifted by delta is basis @ (chebyshev_terms(delta) @ coef)."""
    nodes = np.cos(np.pi * (np.arange(16) + 0.5) / 16) / 2
    delta = np.stack(np.meshgrid(nodes, nodes, indexing="ij")).reshape(2, -1)
    fitted = np.linalg.lstsq(chebyshev_terms(delta), shifted_psfs(psf, delta[0], delta[1], offsets))[0]  # (Q, K)
    u, s, vt = np.linalg.svd(fitted, full_matrices=False)
    keep = s > BASIS_TOLERANCE * s[0]
    return vt[keep].T, u[:, keep] * s[keep]


def finish(a, b, count, shape):
    a, b = (np.where(count > 0, v, np.nan).reshape(shape) for v in (a, b))
    return {"a": a, "b": b, "snr": b / np.sqrt(a), "flux": b / a, "flux_std": 1 / np.sqrt(a)}
