"""The star's position from the radial symmetry of its halo, with an uncertainty."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

SECTORS = 12  # of the jackknife; each is wider than a speckle
INFLATION = 1.3  # of the jackknife's standard error: pulls have standard deviations of 0.9 to 1.2 on simulated halos
ROUNDS, SETTLED_PX, LARGEST_STEP_PX = 40, 0.01, 2.0
DAMPED_FROM, DAMPING = 8, 0.5  # Huber weights and the rings of pixels can make full steps alternate
HUBER = 1.5  # residuals beyond this many standard deviations, as of a companion, have less weight
SMOOTHING_PX = 1.0
FEWEST_PIXELS = 4  # in a ring that contributes to the radial profile
FEWEST_RINGS = 5
LEAST_AGREEMENT = 0.9  # correlation of the radial profiles in even and odd sectors; of noise it is lower
LARGEST_CONDITION = 1e6  # of the normal equations; above it the centre is not determined


@dataclass(frozen=True)
class HaloCentre:
    """Position about which a halo is symmetric.

    Attributes:
        y: Row, px.
        x: Column, px.
        y_std: Standard error of the row, px.
        x_std: Standard error of the column, px.
    """

    y: float
    x: float
    y_std: float
    x_std: float

    def offset_from(self, centre: tuple[float, float]) -> tuple[float, float]:
        """Distance from another position.

        Args:
            centre: The other position (y, x), px.

        Returns:
            Distance in px, and in standard errors (Mahalanobis distance).
        """
        dy, dx = self.y - centre[0], self.x - centre[1]
        return float(np.hypot(dy, dx)), float(np.hypot(dy / self.y_std, dx / self.x_std))


class Normal(NamedTuple):
    """Normal equations of a step by sector, and how well the sectors' profiles agree.

    Attributes:
        matrix: Matrices (SECTORS, 2, 2).
        right: Right-hand sides (SECTORS, 2).
        agreement: Correlation of the radial profiles in even and in odd sectors.
    """

    matrix: np.ndarray
    right: np.ndarray
    agreement: float

    def step(self, without: int | None) -> np.ndarray | None:
        """Step (dy, dx) of all sectors but one; None if it is not determined."""
        used = np.arange(SECTORS) != without
        matrix = self.matrix[used].sum(axis=0)
        if not np.isfinite(matrix).all() or not np.linalg.cond(matrix) <= LARGEST_CONDITION:
            return None
        return np.linalg.solve(matrix, self.right[used].sum(axis=0))


def halo_centre(
    image: Float[np.ndarray, "H W"], start: tuple[float, float], inner_px: float, outer_px: float
) -> HaloCentre | None:
    """Find the position about which the halo in an annulus is symmetric: that of least azimuthal variance.

    About a wrong centre c, a halo with the radial profile f leaves the residuals I(p) - f(|p - c|) = -delta . grad f to
    first order, with delta the error of c. Gauss-Newton steps with Huber weights solve for delta. Its standard errors
    are those of the jackknife over sectors: they include static speckles and asymmetries of the halo, which the noise
    of the mean frame does not.

    Args:
        image: Mean frame; NaN are left out (H, W).
        start: Approximate centre (y, x), px.
        inner_px: Inner radius of the annulus, px; behind a coronagraph, larger than its mask.
        outer_px: Outer radius, px.

    Returns:
        The centre; None if the image has no halo there, or the steps do not converge.
    """
    smooth, radii = _smoothed(image), (inner_px, outer_px)
    whole = _fit(smooth, np.array(start, float), radii, None)
    if whole is None or not whole[1].agreement >= LEAST_AGREEMENT:
        return None
    parts = [_fit(smooth, whole[0], radii, sector) for sector in range(SECTORS)]
    each = [part[0] for part in parts if part is not None]
    if len(each) < SECTORS:
        return None
    y_std, x_std = INFLATION * np.sqrt(SECTORS - 1) * np.std(each, axis=0)
    return HaloCentre(float(whole[0][0]), float(whole[0][1]), float(y_std), float(x_std))


def _fit(
    image: np.ndarray, centre: np.ndarray, radii: tuple[float, float], without: int | None
) -> tuple[np.ndarray, Normal] | None:
    """Centre without the equations of one sector, and the last normal equations; None without convergence."""
    for number in range(ROUNDS):
        normal = _linearise(image, centre, *radii)
        step = None if normal is None else normal.step(without)
        if normal is None or step is None:
            return None
        length = float(np.hypot(*step))
        full = 1.0 if number < DAMPED_FROM else DAMPING
        centre = centre + step * min(full, LARGEST_STEP_PX / max(length, SETTLED_PX))
        if length < SETTLED_PX:
            return centre, normal
    return None


def _smoothed(image: np.ndarray) -> np.ndarray:
    """Image smoothed by a narrow Gaussian, which leaves out its NaN."""
    known = np.isfinite(image)
    weight = gaussian_filter(known.astype(float), SMOOTHING_PX)
    values = gaussian_filter(np.where(known, image, 0.0).astype(float), SMOOTHING_PX)
    return np.where(known, values / np.where(known, weight, 1), np.nan)


def _linearise(image: np.ndarray, centre: np.ndarray, inner_px: float, outer_px: float) -> Normal | None:
    """Normal equations about a trial centre; None if the annulus has too few pixels."""
    y, x = np.indices(image.shape)
    dy, dx = y - centre[0], x - centre[1]
    r = np.hypot(dy, dx)
    used = np.isfinite(image) & (r >= max(inner_px, 1)) & (r <= outer_px)
    dy, dx, r, values = dy[used], dx[used], r[used], image[used]
    if len(r) == 0:
        return None
    ring = (r - r.min()).astype(int)
    full = np.bincount(ring) >= FEWEST_PIXELS
    if full.sum() < FEWEST_RINGS:
        return None
    count = np.maximum(np.bincount(ring), 1)
    radius, profile = (np.bincount(ring, part)[full] / count[full] for part in (r, values))
    contrast = float(np.ptp(profile))
    if not 0 < contrast < np.inf:
        return None
    residual = values - np.interp(r, radius, profile)
    slope = np.interp(r, radius, np.gradient(profile, radius))
    scale = np.sqrt(np.bincount(ring, residual**2) / count)[ring]
    scale = np.maximum(scale, 1e-6 * contrast)
    weight = 1 / (scale * np.maximum(scale, np.abs(residual) / HUBER))
    by_y, by_x = -slope / r * dy, -slope / r * dx
    sector = np.minimum((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * SECTORS, SECTORS - 1).astype(int)
    yy, yx, xx, right_y, right_x = (
        np.bincount(sector, weight * part, SECTORS)
        for part in (by_y**2, by_y * by_x, by_x**2, by_y * residual, by_x * residual)
    )
    matrix = np.stack([yy, yx, yx, xx], axis=1).reshape(SECTORS, 2, 2)
    return Normal(matrix, np.stack([right_y, right_x], axis=1), _agreement(ring, values, sector % 2 == 0))


def _agreement(ring: np.ndarray, values: np.ndarray, even: np.ndarray) -> float:
    """Correlation of the mean of the rings in even and in odd sectors; 0 if it is not defined."""
    known, means = [], []
    for part in (even, ~even):
        count = np.bincount(ring[part], minlength=ring.max() + 1)
        known.append(count > 1)
        means.append(np.bincount(ring[part], values[part], ring.max() + 1) / np.maximum(count, 1))
    first, second = (mean[known[0] & known[1]] for mean in means)
    if len(first) < FEWEST_RINGS or first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
