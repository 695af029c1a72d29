"""The star's position from the radial symmetry of its halo, with an uncertainty."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

SECTORS = 8  # of the jackknife; each is wider than a speckle
INFLATION = 1.3  # of the jackknife's standard error, so that 60 synthetic stacks have pulls of standard deviation 1
ROUNDS, SETTLED_PX, LARGEST_STEP_PX = 40, 0.01, 2.0
DAMPED_FROM, DAMPING = 8, 0.5  # Huber weights and the rings of pixels can make full steps alternate
HUBER = 1.5  # residuals beyond this many standard deviations, as of a companion, have less weight
SMOOTHING_PX = 1.0
FEWEST_PIXELS = 4  # in a ring that contributes to the radial profile
FEWEST_RINGS = 3
LARGEST_CONDITION = 1e6  # of the normal equations; above it the image has no halo


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
    """Normal equations of the step, by sector: `matrix` (SECTORS, 2, 2) and `right` (SECTORS, 2)."""

    matrix: np.ndarray
    right: np.ndarray

    def step(self) -> np.ndarray | None:
        """Solution (dy, dx) of all sectors together; None if it is not determined."""
        matrix = self.matrix.sum(axis=0)
        if not np.isfinite(matrix).all() or np.linalg.cond(matrix) > LARGEST_CONDITION:
            return None
        return np.linalg.solve(matrix, self.right.sum(axis=0))

    def standard_errors(self) -> tuple[float, float]:
        """Errors (y, x) of the solution, px, by leaving out one sector at a time."""
        each = [np.linalg.solve(self.matrix.sum(axis=0) - m, self.right.sum(axis=0) - r)
                for m, r in zip(self.matrix, self.right, strict=True)]  # fmt: skip
        y, x = INFLATION * np.sqrt(SECTORS - 1) * np.std(each, axis=0)
        return float(y), float(x)


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
    smooth, centre = _smoothed(image), np.array(start, float)
    for number in range(ROUNDS):
        normal = _linearise(smooth, centre, inner_px, outer_px)
        step = None if normal is None else normal.step()
        if normal is None or step is None:
            return None
        length = float(np.hypot(*step))
        full = 1.0 if number < DAMPED_FROM else DAMPING
        centre = centre + step * min(full, LARGEST_STEP_PX / max(length, SETTLED_PX))
        if length < SETTLED_PX:
            return HaloCentre(float(centre[0]), float(centre[1]), *normal.standard_errors())
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
    count = np.maximum(np.bincount(ring), 1)
    full = np.bincount(ring) >= FEWEST_PIXELS
    if full.sum() < FEWEST_RINGS:
        return None
    radius, profile = (np.bincount(ring, part)[full] / count[full] for part in (r, values))
    residual = values - np.interp(r, radius, profile)
    slope = np.interp(r, radius, np.gradient(profile, radius))
    scale = np.sqrt(np.bincount(ring, residual**2) / count)[ring]
    scale = np.maximum(scale, 1e-6 * max(float(scale.max()), np.finfo(float).tiny))
    weight = 1 / (scale * np.maximum(scale, np.abs(residual) / HUBER))
    design = -(slope / r)[:, None] * np.stack([dy, dx], axis=1)
    sector = np.minimum((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * SECTORS, SECTORS - 1).astype(int)
    matrix, right = np.zeros((SECTORS, 2, 2)), np.zeros((SECTORS, 2))
    np.add.at(matrix, sector, weight[:, None, None] * design[:, :, None] * design[:, None, :])
    np.add.at(right, sector, (weight * residual)[:, None] * design)
    return Normal(matrix, right)
