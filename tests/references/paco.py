"""PACO as its equations stand, location by location, in float64: the slow second opinion on the package's own.

Flasseur, Denis, Thiébaut & Langlois (2018), A&A 618, A138. Cubes are (T, H, W), angles in degrees, coordinates (y, x)
in px from 0; the PSF is an odd stamp with its peak in the middle pixel. Nothing here comes from the package.
"""

import functools

import numpy as np
import scipy.linalg
import scipy.ndimage

# A position that is a whole or half pixel on paper must not fall to either side by its last bits.
TIE_PX = 1e-9


def disc(radius):
    """Offsets (K, 2) of the pixels within `radius` px of the middle one, row by row."""
    reach = range(-int(radius), int(radius) + 1)
    return np.array([(dy, dx) for dy in reach for dx in reach if dy**2 + dx**2 <= radius**2])


def shift_psf(psf, dy, dx, offsets):
    """The PSF moved by (dy, dx) px, each () or (T,), read at `offsets` (K, 2) from the middle: (K,) or (T, K).

    The stamp's trigonometric interpolation, as a plain sum over its S x S frequencies.
    """
    size = len(psf)
    k = np.arange(size) - size // 2  # frequencies, and pixels from the middle
    dft = np.exp(-2j * np.pi * np.outer(k, k) / size)
    spectrum = dft @ psf @ dft.T / size**2
    (ys, at_y), (xs, at_x) = (np.unique(o, return_inverse=True) for o in offsets.T)
    rows = np.exp(2j * np.pi * (ys - np.asarray(dy)[..., None])[..., None] * k / size)
    cols = np.exp(2j * np.pi * k[:, None] * (xs - np.asarray(dx)[..., None])[..., None, :] / size)
    return (rows @ spectrum @ cols).real[..., at_y, at_x]


def tracks(angles_deg, y, x, centre):
    """Where the source at (y, x) of the derotated map stands in each frame, (T, 2)."""
    theta = np.arctan2(y - centre[0], x - centre[1]) - np.deg2rad(angles_deg)
    r = np.hypot(y - centre[0], x - centre[1])
    return np.stack([centre[0] + r * np.sin(theta), centre[1] + r * np.cos(theta)], axis=-1)


def patches(cube, y, x, offsets):
    """(T, K): the pixels at `offsets` from (y, x)."""
    return cube[:, y + offsets[:, 0], x + offsets[:, 1]]


def statistics(cube, y, x, offsets):
    """Mean (K,) and sample covariance (K, K), over T and not T - 1, of the patch at (y, x)."""
    r = patches(cube, y, x, offsets)
    m = r.sum(axis=0) / len(r)
    S = sum(np.outer(d, d) for d in r - m) / len(r)
    return m, S


def rho_paco(S, T):
    """The paper's shrinkage factor towards diag(S)."""
    trace_sq = np.trace(S @ S)
    diagonal_sq = (np.diag(S) ** 2).sum()
    below = (T + 1) * (trace_sq - diagonal_sq)
    if below <= 0:  # S is diagonal: every factor gives the same C
        return 1.0
    return float(np.clip((trace_sq + np.trace(S) ** 2 - 2 * diagonal_sq) / below, 0, 1))


def learn(cube, y, x, offsets):
    """Mean (K,) and precision C^-1 (K, K) of the patch at (y, x)."""
    m, S = statistics(cube, y, x, offsets)
    rho = rho_paco(S, len(cube))
    C = (1 - rho) * S + rho * np.diag(np.diag(S))
    return m, scipy.linalg.cho_solve(scipy.linalg.cho_factor(C), np.eye(len(C)))


def usable_locations(cube, offsets):
    """(H, W): the whole patch lies in the frame, every pixel is finite in all frames and varies in time."""
    finite = np.isfinite(cube)
    filled = np.where(finite, cube, 0.0)
    good = finite.all(axis=0) & (filled.max(axis=0) > filled.min(axis=0))
    usable = np.zeros_like(good)
    reach = np.abs(offsets).max()
    for y in range(reach, good.shape[0] - reach):
        for x in range(reach, good.shape[1] - reach):
            usable[y, x] = good[y + offsets[:, 0], x + offsets[:, 1]].all()
    return usable


def centre_of(cube, centre):
    return (cube.shape[1] // 2, cube.shape[2] // 2) if centre is None else centre


def nearest_pixels(positions, usable):
    """Of the positions (T, 2): their pixels (T, 2), and which of those are usable (T,)."""
    n = np.floor(positions + 0.5 + TIE_PX).astype(int)
    inside = ((n >= 0) & (n < usable.shape)).all(axis=1)
    return n, inside & usable[tuple(np.where(inside[:, None], n, 0).T)]


def finish(a, b):
    """All maps from the sums a and b, which are NaN where no frame is usable."""
    return {"a": a, "b": b, "snr": b / np.sqrt(a), "flux": b / a, "flux_std": 1 / np.sqrt(a)}


def source_sums(cube, positions, psf, offsets, usable, learned_at):
    """a and b of the source that stands at `positions` (T, 2); NaN if no frame is usable.

    `learned_at(y, x)` gives the mean and the precision of the patch at that pixel.
    """
    n, kept = nearest_pixels(positions, usable)
    if not kept.any():
        return np.nan, np.nan
    delta = positions - n
    h = shift_psf(psf, delta[:, 0], delta[:, 1], offsets)
    a = b = 0.0
    for t in np.flatnonzero(kept):
        ny, nx = n[t]
        m, precision = learned_at(ny, nx)
        w = precision @ h[t]
        a += w @ h[t]
        b += w @ (cube[t, ny + offsets[:, 0], nx + offsets[:, 1]] - m)
    return a, b


def exact_maps(cube, angles_deg, psf, radius, centre=None):
    """Algorithm 1: the PSF at its exact place in every frame. Maps (H, W): a, b, snr, flux, flux_std."""
    offsets = disc(radius)
    usable = usable_locations(cube, offsets)
    learned_at = functools.cache(lambda y, x: learn(cube, y, x, offsets))
    sums = np.empty((2, *usable.shape))
    for y, x in np.ndindex(usable.shape):
        positions = tracks(angles_deg, y, x, centre_of(cube, centre))
        sums[:, y, x] = source_sums(cube, positions, psf, offsets, usable, learned_at)
    return finish(sums[0], sums[1])


def fast_maps(cube, angles_deg, psf, radius, centre=None):
    """Algorithm 2: a and b of a source on every pixel, then summed along the tracks by cubic splines.

    The splines pass through the rectangle in which whole patches fit, mirrored at its edges; an unusable location in it
    has the value of the nearest usable one. A frame counts where the four locations around the track are usable.
    """
    offsets = disc(radius)
    usable = usable_locations(cube, offsets)
    h = shift_psf(psf, 0.0, 0.0, offsets)
    a_n, b_n = np.full(usable.shape, np.nan), np.full(cube.shape, np.nan)
    for y, x in np.argwhere(usable):
        m, precision = learn(cube, y, x, offsets)
        w = precision @ h
        a_n[y, x] = w @ h
        b_n[:, y, x] = (patches(cube, y, x, offsets) - m) @ w

    reach = np.abs(offsets).max()
    inner = np.s_[reach : usable.shape[0] - reach, reach : usable.shape[1] - reach]
    _, (row, col) = scipy.ndimage.distance_transform_edt(~usable[inner], return_indices=True)
    a_n, b_n = a_n[inner][row, col], b_n[(slice(None), *inner)][:, row, col]

    a, b = np.zeros(usable.shape), np.zeros(usable.shape)
    yx = np.array(list(np.ndindex(usable.shape)))
    padded = np.pad(usable, ((0, 1), (0, 1)))
    for t, angle in enumerate(angles_deg):
        positions = np.array([tracks(np.array([angle]), y, x, centre_of(cube, centre))[0] for y, x in yx])
        base = np.floor(positions + TIE_PX).astype(int)
        inside = ((base >= 0) & (base < usable.shape)).all(axis=1)
        low = np.where(inside[:, None], base, 0)
        kept = inside & np.all([padded[low[:, 0] + i, low[:, 1] + j] for i in (0, 1) for j in (0, 1)], axis=0)
        at = (positions[kept] - reach).T
        for total, image in ((a, a_n), (b, b_n[t])):
            total[tuple(yx[kept].T)] += scipy.ndimage.map_coordinates(image, at, order=3, mode="mirror")
    none = a == 0
    a[none], b[none] = np.nan, np.nan
    return finish(a, b)


def inject(cube, angles_deg, psf, y, x, flux, centre=None):
    """The cube with a source of this flux at (y, x) of the derotated map; stamps are cropped at the frame's edge."""
    out, reach = cube.copy(), len(psf) // 2
    stamp = np.array(list(np.ndindex(psf.shape))) - reach
    for frame, p in zip(out, tracks(angles_deg, y, x, centre_of(cube, centre)), strict=True):
        n = np.floor(p + 0.5 + TIE_PX).astype(int)
        (dy, dx), pixels = p - n, n + stamp
        inside = ((pixels >= 0) & (pixels < frame.shape)).all(axis=1)
        frame[tuple(pixels[inside].T)] += flux * shift_psf(psf, dy, dx, stamp[inside])
    return out


def unbiased_flux(cube, angles_deg, psf, radius, y, x, iterations=50, centre=None):
    """Algorithm 3 at (y, x): flux and its formal standard deviation, learned with the source itself taken away.

    The first iteration, from flux 0, is the exact map's own flux.
    """
    offsets = disc(radius)
    usable = usable_locations(cube, offsets)
    positions = tracks(angles_deg, y, x, centre_of(cube, centre))
    flux, a = 0.0, np.nan
    for _ in range(iterations):
        without = inject(cube, angles_deg, psf, y, x, -flux, centre)
        learned_at = functools.cache(lambda ny, nx, without=without: learn(without, ny, nx, offsets))
        a, b = source_sums(cube, positions, psf, offsets, usable, learned_at)
        flux = b / a
    return flux, 1 / np.sqrt(a)


def update(cube, angles_deg, psf, radius, start, parameters, centre=None):
    """One step of the fit of (y, x, flux), and the covariance of a single estimate.

    The noise is learnt without the source of these parameters, on the pixels nearest to the track of `start`. The flux
    becomes b / a, and the place moves by Fisher scoring with that flux fitted too. All derivatives are differences.
    """
    offsets, step = disc(radius), 1e-5
    y, x, flux = parameters
    centre = centre_of(cube, centre)
    pixels, kept = nearest_pixels(tracks(angles_deg, *start, centre), usable_locations(cube, offsets))
    without = inject(cube, angles_deg, psf, y, x, -flux, centre)
    learned = {tuple(n): learn(without, *n, offsets) for n in np.unique(pixels[kept], axis=0)}
    means, precisions = (np.array([learned[tuple(n)][k] for n in pixels[kept]]) for k in (0, 1))

    def source(y, x):
        delta = (tracks(angles_deg, y, x, centre) - pixels)[kept]
        return shift_psf(psf, delta[:, 0], delta[:, 1], offsets)

    t, n = np.flatnonzero(kept)[:, None], pixels[kept][:, None] + offsets
    data, h = cube[t, n[..., 0], n[..., 1]] - means, source(y, x)
    weighted = np.einsum("tij,tj->ti", precisions, h)
    new = (weighted * data).sum() / (weighted * h).sum()
    slopes = [source(y + step, x) - source(y - step, x), source(y, x + step) - source(y, x - step)]
    design = np.stack([new * slopes[0] / (2 * step), new * slopes[1] / (2 * step), h], -1)
    white = np.einsum("tij,tjk->tik", precisions, design)
    covariance = np.linalg.inv(np.einsum("tik,til->kl", white, design))
    score = np.einsum("tik,ti->k", white[..., :2], data - new * h)
    return np.append(np.array([y, x]) + covariance[:2, :2] @ score, new), covariance
