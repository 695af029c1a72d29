"""Trivial scores that stand beside every result: a method that does not beat them is worth nothing.

Each takes (pixels, foreground, preprocessing) and gives a map of (H, W), float32, NaN outside the foreground. Their
image score is the mean of the map.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Shaped

from pulmo_jax.data.transforms import Preprocessing, brightness, finite
from pulmo_jax.methods.score_maps import smooth_within

LOCAL_MEAN_PX = 4.0  # the default smoothing of the autoencoder's score

Baseline = Callable[[np.ndarray, np.ndarray | None, Preprocessing], np.ndarray]


def intensity(
    pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None, how: Preprocessing
) -> Float[np.ndarray, "H W"]:
    """The pixel's own brightness, the mean of its bands."""
    return _within(brightness(pixels), pixels, foreground)


def local_intensity(
    pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None, how: Preprocessing
) -> Float[np.ndarray, "H W"]:
    """Brightness smoothed within the foreground."""
    inside = _inside(pixels, foreground)
    return _within(smooth_within(brightness(pixels)[..., None], inside, LOCAL_MEAN_PX)[..., 0], pixels, foreground)


def z_score(
    pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None, how: Preprocessing
) -> Float[np.ndarray, "H W"]:
    """Distance from the mean of the training foreground in standard deviations, mean over the bands.

    A band that was constant in training (an opaque alpha channel) has none: its distance is in the files' units.
    """
    distance, bands = np.zeros(pixels.shape[:2], np.float32), pixels.shape[2]
    with np.errstate(over="ignore"):
        for c, (mean, std) in enumerate(zip(how.mean, how.std, strict=True)):
            band = np.abs(pixels[..., c].astype(np.float32) - np.float32(mean))
            distance += band / np.float32(std if std > 0 else 1)
        return _within(distance / bands, pixels, foreground)


BASELINES: dict[str, Baseline] = {
    "intensity": intensity,
    "local intensity": local_intensity,
    "z-score": z_score,
}


def baseline_image_score(scores: Float[np.ndarray, "H W"]) -> float:
    """Mean of the map; NaN where nothing was scored."""
    return float(np.nanmean(scores, dtype=np.float64)) if np.isfinite(scores).any() else float("nan")


def _inside(pixels: np.ndarray, foreground: np.ndarray | None) -> np.ndarray:
    return finite(pixels) if foreground is None else foreground & finite(pixels)


def _within(scores: np.ndarray, pixels: np.ndarray, foreground: np.ndarray | None) -> np.ndarray:
    return np.where(_inside(pixels, foreground), scores, np.float32(np.nan)).astype(np.float32)
