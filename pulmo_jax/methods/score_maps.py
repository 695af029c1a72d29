"""From what a method measures at every pixel to its score: smoothing inside the foreground, and one number an image."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import gaussian_filter

ImageStatistic = Literal["max", "mean", "top1"]
MIN_WEIGHT = 1e-6


def smooth_within(
    maps: Float[np.ndarray, "H W M"], foreground: Bool[np.ndarray, "H W"], sigma_px: float
) -> Float[np.ndarray, "H W M"]:
    """Gaussian smoothing that neither leaks in from the background nor fades towards it (normalised convolution,
    Knutsson & Westin 1993)."""
    values = maps if foreground.all() else np.where(foreground[..., None], maps, np.float32(0))
    if sigma_px == 0:
        return values
    radius = smoothing_radius(sigma_px)
    smooth = gaussian_filter(values, sigma_px, axes=(0, 1), radius=radius)
    if values is maps:  # the weight is 1 at every pixel
        return smooth
    weight = gaussian_filter(foreground.astype(np.float32), sigma_px, radius=radius)
    return smooth / np.maximum(weight, MIN_WEIGHT)[..., None]


def smoothing_radius(sigma_px: float) -> int:
    """Where the Gaussian is cut off, px."""
    return int(4 * sigma_px + 0.5)


def image_statistic(scores: Float[np.ndarray, "H W"], kind: ImageStatistic) -> float:
    """The highest finite score, the mean of all, or the mean of the top 1 %; NaN where there is none."""
    if kind == "top1":
        values = scores[np.isfinite(scores)]
        keep = max(1, values.size // 100)
        return float(np.partition(values, -keep)[-keep:].mean(dtype=np.float64)) if values.size else float("nan")
    highest, total, count = -np.inf, 0.0, 0
    for row in scores:  # one by one: a copy of the finite ones of a large image would be as large again
        values = row[np.isfinite(row)]
        highest = max(highest, values.max(initial=-np.inf))
        total, count = total + values.sum(dtype=np.float64), count + values.size
    if count == 0:
        return float("nan")
    return float(highest if kind == "max" else total / count)
