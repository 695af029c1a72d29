"""The off-axis PSF: where its source is, how wide it is, and the stamp centred and divided by its flux, in float64."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from pulmo_jax.types import InputError

FluxKind = Literal["none", "peak", "aperture", "fwhm"]
_FWHM_OF_SIGMA = 2 * np.sqrt(2 * np.log(2))
_NARROWEST_FWHM_PX = 0.6  # below it is a hot pixel, and the fit's width and place have no meaning


@dataclass(frozen=True)
class Psf:
    """A PSF for matched filters; a source of flux f adds f * stamp to a frame.

    stamp: an odd square with the source at its middle pixel, divided by `flux`. fwhm_px: geometric mean of the axes.
    flux_kind: what `flux` measures in the stamp that was given. aperture_px: radius of the disc, if it is a disc's.
    offset_px: (dy, dx) from the middle pixel S//2 of that stamp to its source.
    """

    stamp: Float[np.ndarray, "S S"] = field(repr=False)
    fwhm_px: float
    flux: float
    flux_kind: FluxKind
    aperture_px: float | None
    offset_px: tuple[float, float]


def prepare_psf(
    stamp: Float[np.ndarray, "S S"],
    flux: FluxKind = "fwhm",
    aperture_px: float | None = None,
    recentre_px: float = 0.05,
) -> Psf:
    """Centres a PSF and divides it by its flux.

    The source of an odd stamp that is within `recentre_px` of the middle pixel counts as centred, and the pixels stay
    untouched: a centre is not measured better than that. Otherwise the stamp is moved by less than a pixel, by
    trigonometric interpolation, and cut to the largest odd square about the source, so that nothing wraps around.

    flux: "fwhm", in a disc of diameter FWHM (what vip_hci's `normalize_psf` divides by); "aperture", in a disc of
    radius `aperture_px`, pixels on its edge by the share inside; "peak", the value at the middle pixel; "none", 1.
    Raises InputError where there is no source to measure.
    """
    if stamp.shape[0] != stamp.shape[1] or len(stamp) < 3:
        raise InputError(f"the PSF has {stamp.shape[0]} x {stamp.shape[1]} px; a square of at least 3 x 3 px is needed")
    stamp = stamp.astype(np.float64)
    if not np.isfinite(stamp).all() or stamp.max() <= 0 or stamp.sum() <= 0:
        bad = np.sum(~np.isfinite(stamp))
        raise InputError(
            f"the PSF has no positive flux: {bad} of {stamp.size} pixels are not finite, sum {stamp.sum()}"
        )
    centre, fwhm = fit_gaussian(stamp)
    offset = (float(centre[0]) - len(stamp) // 2, float(centre[1]) - len(stamp) // 2)
    if len(stamp) % 2 == 0 or np.hypot(*offset) > recentre_px:
        stamp = _recentred(stamp, centre)
    radius = {"fwhm": fwhm / 2, "aperture": aperture_px}.get(flux)
    divisor = _flux(stamp, flux, radius)
    if not divisor > 0:
        raise InputError(f"the PSF has no positive flux: {divisor} ({flux})")
    return Psf(stamp / divisor, fwhm, divisor, flux, radius, offset)


def fit_gaussian(stamp: Float[np.ndarray, "S S"]) -> tuple[tuple[float, float], float]:
    """Centre (y, x) and FWHM of the elliptical Gaussian that fits the core best, by least squares.

    The core is a square reaching one FWHM from the maximum, that FWHM guessed from the area above half the maximum. The
    Gaussian is A exp(-|L d|^2 / 2), d = (dy, dx) from the centre and L triangular, so that the geometric mean of both
    axes' sigma is 1 / sqrt(det L). Of an Airy pattern that gives 0.97 lambda / D, 6 % less than its own FWHM.
    Raises InputError for what no such Gaussian fits.
    """
    peak_y, peak_x = np.unravel_index(stamp.argmax(), stamp.shape)
    fwhm = np.sqrt(4 / np.pi * np.sum(stamp > stamp.max() / 2))
    half = max(1, round(fwhm))
    rows, columns = (slice(max(0, p - half), p + half + 1) for p in (peak_y, peak_x))
    core = stamp[rows, columns] / stamp.max()
    y, x = np.mgrid[rows, columns][:, : core.shape[0], : core.shape[1]]

    def residual(p: np.ndarray) -> np.ndarray:
        amplitude, cy, cx, l_yy, l_xy, l_xx = p
        dy, dx = y - cy, x - cx
        return (amplitude * np.exp(-((l_yy * dy + l_xy * dx) ** 2 + (l_xx * dx) ** 2) / 2) - core).ravel()

    narrow = _FWHM_OF_SIGMA / fwhm
    fit = least_squares(residual, [1, peak_y, peak_x, narrow, 0, narrow], xtol=1e-12, ftol=1e-12, gtol=1e-12)
    _, cy, cx, l_yy, _, l_xx = fit.x
    width = _FWHM_OF_SIGMA / np.sqrt(max(abs(l_yy * l_xx), 1e-12))
    inside = max(abs(cy - peak_y), abs(cx - peak_x)) <= half and min(cy, cx) >= 0 and max(cy, cx) <= len(stamp) - 1
    if not (fit.success and inside and _NARROWEST_FWHM_PX <= width <= len(stamp)):
        found = f"a Gaussian of FWHM {width:.3g} px at (y, x) = ({cy:.2f}, {cx:.2f})"
        raise InputError(
            f"no point source fits the PSF: the best fit is {found} in a stamp of {len(stamp)} x {len(stamp)} px"
        )
    return (float(cy), float(cx)), float(width)


def shift(stamp: Float[np.ndarray, "S R"], dy: float, dx: float) -> Float[np.ndarray, "S R"]:
    """The stamp moved by (dy, dx) px by trigonometric interpolation; periodic."""
    return _shift_matrix(stamp.shape[0], dy) @ stamp @ _shift_matrix(stamp.shape[1], dx).T


def _shift_matrix(side: int, distance: float) -> np.ndarray:
    """(S, S): the Dirichlet kernel; the highest frequency of an even side counts half, so that the result is real."""
    k = np.arange(1, side // 2 + 1)
    weight = np.where(2 * k == side, 1.0, 2.0)
    pixel = np.arange(side)
    u = pixel[:, None] - distance - pixel
    return (1 + np.cos(2 * np.pi / side * u[..., None] * k) @ weight) / side


def disc_overlap(side: int, centre: tuple[float, float], radius: float) -> Float[np.ndarray, "S S"]:
    """The area of every pixel that lies in a disc; exact. Pixel i reaches from i - 1/2 to i + 1/2."""
    y, x = (np.clip(np.arange(side + 1) - 0.5 - c, -radius, radius) for c in centre)

    def left_of(u: np.ndarray) -> np.ndarray:
        """The area of the disc where its coordinate is below u."""
        return u * np.sqrt(radius**2 - u**2) + radius**2 * (np.arcsin(u / radius) + np.pi / 2)

    # The area below y and left of x, at the corners of the pixels; of corners outside of the disc, what it cuts off.
    below, left = left_of(y)[:, None], left_of(x)[None, :]
    y, x = y[:, None], x[None, :]
    outside = np.where(y > 0, np.where(x > 0, below + left - np.pi * radius**2, left), np.where(x > 0, below, 0))
    inside = (below + left) / 2 - np.pi * radius**2 / 4 + y * x
    area = np.where(y**2 + x**2 < radius**2, inside, outside)
    return np.clip(np.diff(np.diff(area, axis=0), axis=1), 0, 1)


def _recentred(stamp: np.ndarray, centre: tuple[float, float]) -> np.ndarray:
    """Moves the source to the pixel nearest to it and cuts the largest odd square about that."""
    y, x = (round(c) for c in centre)
    half = min(y, x, len(stamp) - 1 - y, len(stamp) - 1 - x)
    if half < 1:
        raise InputError(f"the PSF's source at (y, x) = ({centre[0]:.2f}, {centre[1]:.2f}) is at the edge of its stamp")
    moved = shift(stamp, y - centre[0], x - centre[1])
    return moved[y - half : y + half + 1, x - half : x + half + 1]


def _flux(stamp: np.ndarray, kind: FluxKind, radius: float | None) -> float:
    middle = len(stamp) // 2
    if kind == "none":
        return 1.0
    if kind == "peak":
        return float(stamp[middle, middle])
    if radius is None or not 0 < radius <= len(stamp) / 2:
        raise InputError(
            f"the PSF's flux is asked for in a disc of radius {radius} px; "
            f"in a stamp of {len(stamp)} x {len(stamp)} px a radius up to {len(stamp) / 2} px can be had"
        )
    return float((disc_overlap(len(stamp), (float(middle), float(middle)), radius) * stamp).sum())
