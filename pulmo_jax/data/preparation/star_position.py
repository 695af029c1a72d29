"""Position of the star in a frame: from its own peak, or from the satellite spots that a coronagraph's pupil makes."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from pulmo_jax.data.psf import fit_gaussian
from pulmo_jax.types import InputError

FWHM_OF_SIGMA = 2 * np.sqrt(2 * np.log(2))
SATURATION_SHARE, SATURATION_AREA = 0.005, 0.03  # plateau: pixels so close to the maximum, and its area in FWHM^2
LEAST_PLATEAU_PX = 4
DOMINANCE = 2.0  # of a star's peak over everything else within the search radius
SYMMETRY_PX = 2.0  # largest distance of the crossing of two diagonals from the middle of each
WIDTH_RATIO = 2.0  # largest ratio of the fitted width and that of the PSF
TOLERANCES: dict[str, Any] = {"xtol": 1e-5, "ftol": 1e-7, "max_nfev": 60}
INSTEAD = "use recentre.method=satellite_spots or cross_correlation"


def peak_position(
    image: Float[np.ndarray, "H W"], start: tuple[float, float], radius_px: int, fwhm_px: float | None
) -> tuple[float, float]:
    """Position of an unsaturated star that is not behind a coronagraph, by a Gaussian fit to its core.

    Args:
        image: Frame; NaN count as background (H, W).
        start: Approximate position (y, x), px.
        radius_px: The star is within this distance, px.
        fwhm_px: Full width at half maximum of the PSF, px; None if unknown.

    Returns:
        Position (y, x), px.

    Raises:
        InputError: If the peak is saturated, does not dominate its surroundings as behind a coronagraph, or is no PSF.
    """
    part, (low_y, low_x) = _cut_out(image, start, radius_px)
    side = max(part.shape)
    square = np.zeros((side, side))
    square[: part.shape[0], : part.shape[1]] = np.maximum(part - np.median(part), 0)
    if not square.max() > 0:
        raise InputError(f"there is no star within {radius_px} px of (y, x) = ({start[0]:g}, {start[1]:g})")
    expected = fwhm_px or np.sqrt(4 / np.pi * np.sum(square > square.max() / 2))
    plateau = int(np.sum(square >= (1 - SATURATION_SHARE) * square.max()))
    if plateau > max(LEAST_PLATEAU_PX, SATURATION_AREA * expected**2):
        raise InputError(f"the star is saturated: {plateau} pixels have its maximum; {INSTEAD}")
    try:
        (y, x), width = fit_gaussian(square)
    except InputError:
        raise InputError(f"the star's core is no single peak, as behind a coronagraph; {INSTEAD}") from None
    rows, columns = np.indices(square.shape)
    beside = square[np.hypot(rows - y, columns - x) > 1.5 * max(expected, width)].max(initial=0)
    if square.max() < DOMINANCE * beside:
        raise InputError(
            f"the brightest peak is only {square.max() / beside:.1f} times the next one beside it: the star is behind "
            f"a coronagraph or saturated; {INSTEAD}"
        )
    if fwhm_px and not 1 / WIDTH_RATIO < width / fwhm_px < WIDTH_RATIO:
        raise InputError(f"the star's core has a FWHM of {width:.1f} px, the PSF of {fwhm_px:.1f} px; {INSTEAD}")
    return y + low_y, x + low_x


def spot_position(
    image: Float[np.ndarray, "H W"], start: tuple[float, float], radius_px: int, fwhm_px: float
) -> tuple[float, float]:
    """Position of a satellite spot, by a fit of an elliptical Gaussian on a tilted background.

    Args:
        image: Frame (H, W).
        start: Approximate position (y, x), px.
        radius_px: Half the side of the fitted square, px.
        fwhm_px: Full width at half maximum of the PSF, px.

    Returns:
        Position (y, x), px.

    Raises:
        InputError: If there is no spot.
    """
    part, (low_y, low_x) = _cut_out(image, start, radius_px)
    y, x = np.indices(part.shape) - np.array([start[0] - low_y, start[1] - low_x])[:, None, None]
    level, height = float(np.median(part)), float(np.ptp(part))
    if not height > 0:
        raise InputError(f"there is no satellite spot near (y, x) = ({start[0]:g}, {start[1]:g})")
    peak = np.unravel_index(np.argmax(part), part.shape)
    narrow = FWHM_OF_SIGMA / fwhm_px

    def residual(p: np.ndarray) -> np.ndarray:
        amplitude, cy, cx, l_yy, l_xy, l_xx, base, slope_y, slope_x = p
        dy, dx = y - cy, x - cx
        spot = amplitude * np.exp(-((l_yy * dy + l_xy * dx) ** 2 + (l_xx * dx) ** 2) / 2)
        return (spot + base + slope_y * y + slope_x * x - (part - level) / height).ravel()

    first = [1, y[peak], x[peak], narrow, 0, narrow, 0, 0, 0]
    fit = least_squares(residual, first, x_scale=[1, 1, 1, narrow, narrow, narrow, 1, 0.1, 0.1], **TOLERANCES)
    amplitude, cy, cx, l_yy, _, l_xx = fit.x[:6]
    width = FWHM_OF_SIGMA / np.sqrt(max(abs(l_yy * l_xx), 1e-12))
    noise = 1.4826 * np.median(np.abs(fit.fun - np.median(fit.fun)))
    outside = max(abs(cy), abs(cx)) > radius_px
    if outside or amplitude < 3 * noise or not 0.5 * fwhm_px < width < 3 * fwhm_px:
        raise InputError(
            f"there is no satellite spot within {radius_px} px of (y, x) = ({start[0]:g}, {start[1]:g}); give "
            "recentre.spots as [[Y,X],...] in the frames"
        )
    return float(cy + start[0]), float(cx + start[1])


def crossing(spots: Float[np.ndarray, "4 2"]) -> tuple[float, float]:
    """Crossing of the two diagonals of four spots, in any order.

    Args:
        spots: Positions (y, x), px.

    Returns:
        The crossing (y, x), px.

    Raises:
        InputError: If the spots are no quadrangle, or not symmetric about the crossing.
    """
    around = spots - spots.mean(axis=0)
    a, b, c, d = spots[np.argsort(np.arctan2(*around.T))]
    directions = np.stack([c - a, b - d], axis=1)
    lengths = np.linalg.norm(directions, axis=0)
    if abs(np.linalg.det(directions)) < 0.1 * np.prod(lengths) or lengths.min() == 0:
        raise InputError("recentre.spots: the four spots are no quadrangle about the star, whose diagonals cross at it")
    y, x = a + np.linalg.solve(directions, b - a)[0] * (c - a)
    asymmetry = max(float(np.hypot(*(np.array([y, x]) - (p + q) / 2))) for p, q in ((a, c), (b, d)))
    if asymmetry > SYMMETRY_PX:
        raise InputError(
            f"the diagonals of the four spots do not halve each other ({asymmetry:.1f} px off): something else was "
            "taken for a spot; check recentre.spots and recentre.radius_px"
        )
    return float(y), float(x)


def _cut_out(image: np.ndarray, start: tuple[float, float], radius_px: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Part of an image about a position, with its median for NaN, and its lowest row and column."""
    low = [max(round(p) - radius_px, 0) for p in start]
    high = [min(round(p) + radius_px + 1, n) for p, n in zip(start, image.shape, strict=True)]
    part = image[low[0] : high[0], low[1] : high[1]].astype(float)
    if min(part.shape, default=0) < 5 or not np.isfinite(part).any():
        raise InputError(f"(y, x) = ({start[0]:g}, {start[1]:g}) lies outside the frames or where nothing is known")
    return np.where(np.isfinite(part), part, np.nanmedian(part)), (low[0], low[1])
