"""Off-axis PSFs: measure position and width, centre the stamp and normalise its flux, in float64."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from pulmo_jax.core.pytrees import register_pytree
from pulmo_jax.types import InputError

FluxKind = Literal["none", "peak", "aperture", "fwhm"]
_FWHM_OF_SIGMA = 2 * np.sqrt(2 * np.log(2))
_MIN_FWHM_PX = 0.6  # narrower fits are hot pixels, with a meaningless width and position


@dataclass(frozen=True)
class Psf:
    """A PSF for matched filtering: a source of flux f adds f * stamp to a frame. A JAX pytree of its stamp.

    Attributes:
        stamp: Normalised PSF, an odd square with the source on the central pixel (S, S).
        fwhm_px: Full width at half maximum in px, geometric mean over both axes.
        flux: Flux of the original stamp, by which `stamp` is divided.
        flux_kind: Definition of `flux` (see `prepare_psf`).
        aperture_px: Radius of the aperture in px, if the flux is an aperture flux.
        offset_px: Offset (dy, dx) in px of the source from pixel S // 2 of the original stamp.
    """

    stamp: Float[np.ndarray, "S S"] = field(repr=False)
    fwhm_px: float
    flux: float
    flux_kind: FluxKind
    aperture_px: float | None
    offset_px: tuple[float, float]


register_pytree(Psf, ("stamp",), ("fwhm_px", "flux", "flux_kind", "aperture_px", "offset_px"))


def prepare_psf(
    stamp: Float[np.ndarray, "S S"],
    flux: FluxKind = "fwhm",
    aperture_px: float | None = None,
    recentre_px: float = 0.05,
) -> Psf:
    """Centre a PSF and divide it by its flux.

    An odd stamp whose source is within `recentre_px` of the central pixel is left as it is, because centres are not
    measured more accurately. Any other stamp is shifted by less than a pixel, by trigonometric interpolation, and
    cropped to the largest odd square around the source, so that nothing wraps around.

    Args:
        stamp: Image of the off-axis star (S, S).
        flux: Definition of the flux. "fwhm": in a disc of diameter FWHM (as `normalize_psf` of vip_hci). "aperture":
            in a disc of radius `aperture_px`; pixels on its edge count by the area inside. "peak": value of the
            central pixel. "none": 1.
        aperture_px: Radius of the aperture in px.
        recentre_px: Largest offset in px that is not corrected.

    Returns:
        The normalised PSF.

    Raises:
        InputError: The stamp is not square or shows no source.
    """
    if stamp.shape[0] != stamp.shape[1] or len(stamp) < 3:
        raise InputError(
            f"the PSF has {stamp.shape[0]} x {stamp.shape[1]} px; it must be a square of at least 3 x 3 px"
        )
    stamp = stamp.astype(np.float64)
    if not np.isfinite(stamp).all() or stamp.max() <= 0 or stamp.sum() <= 0:
        bad = np.sum(~np.isfinite(stamp))
        raise InputError(
            f"the PSF has no positive flux: {bad} of {stamp.size} pixels are not finite, sum {stamp.sum()}; "
            "give an off-axis image of the star"
        )
    centre, fwhm = fit_gaussian(stamp)
    offset = (float(centre[0]) - len(stamp) // 2, float(centre[1]) - len(stamp) // 2)
    if len(stamp) % 2 == 0 or np.hypot(*offset) > recentre_px:
        stamp = _recentred(stamp, centre)
    radius = {"fwhm": fwhm / 2, "aperture": aperture_px}.get(flux)
    divisor = _flux(stamp, flux, radius)
    if not divisor > 0:
        raise InputError(f"the PSF has no positive flux: {divisor} ({flux}); subtract its background")
    return Psf(stamp / divisor, fwhm, divisor, flux, radius, offset)


def fit_gaussian(stamp: Float[np.ndarray, "S S"]) -> tuple[tuple[float, float], float]:
    """Fit an elliptical Gaussian to the core of a PSF by least squares.

    The core is a square that extends one FWHM from the maximum; this FWHM is estimated from the area above half the
    maximum. The Gaussian is A exp(-|L d|^2 / 2), with d = (dy, dx) the offset from the centre and L triangular, so the
    geometric mean of the two sigmas is 1 / sqrt(det L). For an Airy pattern the result is 0.97 lambda / D, 6 % below
    its true FWHM.

    Args:
        stamp: Image of a point source (S, S).

    Returns:
        Centre (y, x) and FWHM, both in px.

    Raises:
        InputError: No such Gaussian fits the stamp.
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
    if not (fit.success and inside and _MIN_FWHM_PX <= width <= len(stamp)):
        best = f"a Gaussian of FWHM {width:.3g} px at (y, x) = ({cy:.2f}, {cx:.2f})"
        raise InputError(
            f"the PSF shows no point source: the best fit is {best} in a stamp of {len(stamp)} x {len(stamp)} "
            "px; give an off-axis image of the star"
        )
    return (float(cy), float(cx)), float(width)


def shift(stamp: Float[np.ndarray, "S R"], dy: float, dx: float) -> Float[np.ndarray, "S R"]:
    """Shift an image by trigonometric interpolation, with periodic boundaries.

    Args:
        stamp: Image (S, R).
        dy: Shift along rows in px.
        dx: Shift along columns in px.

    Returns:
        The shifted image (S, R).
    """
    return _shift_matrix(stamp.shape[0], dy) @ stamp @ _shift_matrix(stamp.shape[1], dx).T


def _shift_matrix(side: int, distance: float) -> np.ndarray:
    """Dirichlet kernel (S, S). The highest frequency of an even side has half weight, which keeps the result real."""
    k = np.arange(1, side // 2 + 1)
    weight = np.where(2 * k == side, 1.0, 2.0)
    pixel = np.arange(side)
    u = pixel[:, None] - distance - pixel
    return (1 + np.cos(2 * np.pi / side * u[..., None] * k) @ weight) / side


def disc_overlap(side: int, centre: tuple[float, float], radius: float) -> Float[np.ndarray, "S S"]:
    """Compute the exact area of each pixel inside a disc. Pixel i extends from i - 1/2 to i + 1/2.

    Args:
        side: Side S of the pixel grid in px.
        centre: Centre (y, x) of the disc in px.
        radius: Radius of the disc in px.

    Returns:
        Areas in px^2, between 0 and 1 (S, S).
    """
    y, x = (np.clip(np.arange(side + 1) - 0.5 - c, -radius, radius) for c in centre)

    def left_of(u: np.ndarray) -> np.ndarray:
        """Area of the part of the disc with coordinate below u."""
        return u * np.sqrt((radius - u) * (radius + u)) + radius**2 * (np.arcsin(u / radius) + np.pi / 2)

    # Area of the disc below y and left of x, at the pixel corners; corners outside the disc are treated separately.
    below, left = left_of(y)[:, None], left_of(x)[None, :]
    y, x = y[:, None], x[None, :]
    outside = np.where(y > 0, np.where(x > 0, below + left - np.pi * radius**2, left), np.where(x > 0, below, 0))
    inside = (below + left) / 2 - np.pi * radius**2 / 4 + y * x
    area = np.where(y**2 + x**2 < radius**2, inside, outside)
    return np.clip(np.diff(np.diff(area, axis=0), axis=1), 0, 1)


def _recentred(stamp: np.ndarray, centre: tuple[float, float]) -> np.ndarray:
    """Shift the source to the nearest pixel and crop the largest odd square around it."""
    y, x = (round(c) for c in centre)
    half = min(y, x, len(stamp) - 1 - y, len(stamp) - 1 - x)
    if half < 1:
        raise InputError(
            f"the source of the PSF, at (y, x) = ({centre[0]:.2f}, {centre[1]:.2f}), is at the edge of its stamp; "
            "give a larger stamp"
        )
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
            f"the aperture of the PSF flux has a radius of {radius} px; in a stamp of {len(stamp)} x {len(stamp)} px "
            f"it must be above 0 and at most {len(stamp) / 2} px"
        )
    return float((disc_overlap(len(stamp), (float(middle), float(middle)), radius) * stamp).sum())
