"""Shifts of the frames of a stack relative to each other, by cross-correlation."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter
from scipy.signal.windows import tukey

from pulmo_jax.data.preparation.shifting import shift_frames
from pulmo_jax.host.extras import install_command
from pulmo_jax.types import InputError

UPSAMPLING = 50  # shifts are measured to 0.02 px
ROUNDS = 2  # the taper pulls a shift towards 0, so what is left is measured again after shifting
TAPER = 0.3  # share of the cut-out that fades to 0
PLAIN: Any = None  # correlation of the images, not of their phases alone
FLATTENING_PX = 6.0  # scale on which the halo is divided by its local strength


class Target(NamedTuple):
    """What frames are registered with.

    Attributes:
        image: Reference minus its median, weighted (h, w).
        weight: Taper over the local strength of the reference, so that speckles at all separations count (h, w).
        rows: Rows of the cut-out.
        columns: Columns of the cut-out.
    """

    image: Float[np.ndarray, "h w"]
    weight: Float[np.ndarray, "h w"]
    rows: slice
    columns: slice


def make_target(reference: Float[np.ndarray, "H W"], centre: tuple[float, float], half_px: int) -> Target:
    """Prepare a reference image for `register`.

    Args:
        reference: Reference, such as the median frame; NaN count as its median (H, W).
        centre: Centre (y, x) of the cut-out, px.
        half_px: Half the side of the cut-out, px.

    Returns:
        The target.
    """
    rows, columns = (_around(c, half_px, n) for c, n in zip(centre, reference.shape, strict=True))
    image = _levelled(reference[rows, columns])
    strength = np.sqrt(gaussian_filter(image**2, FLATTENING_PX))
    taper = tukey(image.shape[0], TAPER)[:, None] * tukey(image.shape[1], TAPER)
    weight = taper / np.maximum(strength, max(1e-3 * float(strength.max()), np.finfo(float).tiny))
    return Target(image * weight, weight, rows, columns)


def register(frames: Float[np.ndarray, "B H W"], target: Target) -> Float[np.ndarray, "B 2"]:
    """Shift that registers each frame with a target, by upsampled cross-correlation.

    On synthetic stacks with quasi-static speckles and known shifts of up to 1.5 px, the standard deviation of the error
    is 0.017 px and the largest error 0.047 px.

    Args:
        frames: Some of the frames (B, H, W).
        target: See `make_target`.

    Returns:
        Shift (dy, dx) to apply to each frame, px.

    Raises:
        InputError: If scikit-image is not installed.

    Reference:
        Guizar-Sicairos, Thurman, Fienup 2008, Optics Letters 33, 156.
    """
    try:
        from skimage.registration import phase_cross_correlation
    except ImportError:
        raise InputError(
            f"recentre.method=cross_correlation needs scikit-image; install it with: {install_command('prepare')}"
        ) from None
    shifts = np.zeros((len(frames), 2))
    for k, frame in enumerate(frames):
        for _ in range(ROUNDS):
            moved = shift_frames(frame[None], shifts[k : k + 1])[0][target.rows, target.columns]
            found = phase_cross_correlation(
                target.image, _levelled(moved) * target.weight, upsample_factor=UPSAMPLING, normalization=PLAIN
            )
            shifts[k] += found[0]
    return shifts


def _around(centre: float, half_px: int, n: int) -> slice:
    return slice(max(round(centre) - half_px, 0), min(round(centre) + half_px + 1, n))


def _levelled(image: np.ndarray) -> np.ndarray:
    """Image minus its median; 0 at NaN, also if nothing is known."""
    known = np.isfinite(image)
    return np.where(known, image - np.median(image[known]), 0.0) if known.any() else np.zeros(image.shape)
