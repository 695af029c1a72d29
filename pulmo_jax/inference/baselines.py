"""Trivial baseline scores, reported next to every result; a useful method must outperform them.

Each baseline maps (pixels, foreground, preprocessing) to a float32 score map (H, W), NaN outside the foreground. Its
image score is the mean of the map.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from pulmo_jax.core.tiling import rounded
from pulmo_jax.data.transforms import Preprocessing, brightness, finite
from pulmo_jax.methods.score_maps import Extent, smooth_within

LOCAL_MEAN_PX = 4.0  # sd of the Gaussian; default smoothing of the autoencoder's score

Baseline = Callable[[np.ndarray, np.ndarray | None, Preprocessing], np.ndarray]


def intensity(
    pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None, preprocessing: Preprocessing
) -> Float[np.ndarray, "H W"]:
    """Brightness of the pixel, the mean over its channels.

    Args:
        pixels: Image.
        foreground: Foreground; None: all pixels.
        preprocessing: Preprocessing of the run.

    Returns:
        Score map.
    """
    return _within(brightness(pixels), pixels, foreground)


def local_intensity(
    pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None, preprocessing: Preprocessing
) -> Float[np.ndarray, "H W"]:
    """Brightness smoothed within the foreground.

    Args:
        pixels: Image.
        foreground: Foreground; None: all pixels.
        preprocessing: Preprocessing of the run.

    Returns:
        Score map.
    """
    height, width = pixels.shape[:2]
    padding = (0, rounded(height) - height), (0, rounded(width) - width)  # one program serves similar sizes
    image, inside = (np.pad(a, padding) for a in (brightness(pixels), _inside(pixels, foreground)))
    smooth = smooth_within(
        jnp.asarray(image)[..., None], jnp.asarray(inside), LOCAL_MEAN_PX, Extent(0, height, 0, width)
    )
    return _within(np.asarray(smooth)[:height, :width, 0], pixels, foreground)


def z_score(
    pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None, preprocessing: Preprocessing
) -> Float[np.ndarray, "H W"]:
    """Absolute deviation from the mean of the training foreground in standard deviations, averaged over channels.

    For a channel that was constant in training, such as an opaque alpha channel, the deviation is in the units of the
    file.

    Args:
        pixels: Image.
        foreground: Foreground; None: all pixels.
        preprocessing: Preprocessing of the run.

    Returns:
        Score map.
    """
    distance, bands = np.zeros(pixels.shape[:2], np.float32), pixels.shape[2]
    with np.errstate(over="ignore"):
        for c, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
            band = np.abs(pixels[..., c].astype(np.float32) - np.float32(mean))
            distance += band / np.float32(std if std > 0 else 1)
        return _within(distance / bands, pixels, foreground)


BASELINES: dict[str, Baseline] = {
    "intensity": intensity,
    "local intensity": local_intensity,
    "z-score": z_score,
}


def baseline_image_score(scores: Float[np.ndarray, "H W"]) -> float:
    """Image score of a baseline.

    Args:
        scores: Score map.

    Returns:
        Mean of the map; NaN if no pixel has a score.
    """
    return float(np.nanmean(scores, dtype=np.float64)) if np.isfinite(scores).any() else float("nan")


def _inside(pixels: np.ndarray, foreground: np.ndarray | None) -> np.ndarray:
    """Finite pixels in the foreground."""
    return finite(pixels) if foreground is None else foreground & finite(pixels)


def _within(scores: np.ndarray, pixels: np.ndarray, foreground: np.ndarray | None) -> np.ndarray:
    """Set the score of invalid and background pixels to NaN."""
    return np.where(_inside(pixels, foreground), scores, np.float32(np.nan)).astype(np.float32)
