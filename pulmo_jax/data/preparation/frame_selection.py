"""Selection of frames: those whose correlation, flux or spread lies far from that of the others."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

MAD_TO_STD = 1.4826
LEAST_SHIFT_PX = 1.0  # offsets of the star that are never an outlier
LARGEST_CORRELATION = 1 - 1e-9
TINY = 1e-100


class Scores(NamedTuple):
    """Scores of frames in an annulus.

    Attributes:
        correlation: Correlation of each frame with the median frame (T,).
        flux: Slope of the regression of the frame on the median frame; 1 for an unchanged halo (T,).
        spread: Standard deviation of the frame minus its regression, relative to that of the median frame (T,).
    """

    correlation: Float[np.ndarray, "T"]
    flux: Float[np.ndarray, "T"]
    spread: Float[np.ndarray, "T"]


def annulus(
    shape: tuple[int, int], centre: tuple[float, float], inner_px: float, outer_px: float
) -> Bool[np.ndarray, "H W"]:
    """Pixels in an annulus.

    Args:
        shape: Height and width, px.
        centre: Centre (y, x), px.
        inner_px: Inner radius, px.
        outer_px: Outer radius, px.

    Returns:
        Mask (H, W).
    """
    y, x = np.indices(shape)
    r = np.hypot(y - centre[0], x - centre[1])
    return (r >= inner_px) & (r <= outer_px)


def score_frames(
    frames: Float[np.ndarray, "B H W"], median: Float[np.ndarray, "H W"], region: Bool[np.ndarray, "H W"]
) -> Scores:
    """Score frames against the median frame; pixels that are NaN in either are left out.

    Args:
        frames: Some of the frames (B, H, W).
        median: Median over all frames (H, W).
        region: Pixels that count, such as an annulus (H, W).

    Returns:
        Scores of these frames; NaN for a frame without known pixels.
    """
    rows = []
    for frame in frames:
        known = region & np.isfinite(frame) & np.isfinite(median)
        if known.sum() < 3:
            rows.append((np.nan,) * 3)
            continue
        x, y = (image[known].astype(float) - image[known].mean(dtype=float) for image in (median, frame))
        xx, yy, xy = (max(x @ x, TINY), max(y @ y, TINY), x @ y)
        rows.append((xy / np.sqrt(xx * yy), xy / xx, np.sqrt(max(yy - xy**2 / xx, 0) / xx)))
    correlation, flux, spread = np.array(rows).reshape(-1, 3).T
    return Scores(correlation, flux, spread)


def outliers(scores: Scores, shifts: Float[np.ndarray, "T 2"], sigma: float) -> dict[str, Bool[np.ndarray, "T"]]:
    """Frames that are unlike the others, in robust standard deviations (median absolute deviation).

    Low correlations (after Fisher's transformation), fluxes on both sides, large spreads (in logarithm), and stars that
    were more than a pixel away from their usual place count. A score that is not finite is an outlier.

    Args:
        scores: Scores of all frames.
        shifts: Shift of each frame, px.
        sigma: Threshold in robust standard deviations.

    Returns:
        Mask of the outliers (T,) by reason.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.arctanh(np.clip(scores.correlation, -LARGEST_CORRELATION, LARGEST_CORRELATION))
        spread = np.log(np.maximum(scores.spread, TINY))
    away = np.hypot(*(shifts - np.nanmedian(shifts, axis=0)).T) if len(shifts) else np.zeros(0)
    return {
        "correlation": ~(_deviation(correlation) >= -sigma),
        "flux": ~(np.abs(_deviation(scores.flux)) <= sigma),
        "spread": ~(_deviation(spread) <= sigma),
        "shift": ~((_deviation(away) <= sigma) | (away <= LEAST_SHIFT_PX)),
    }


def _deviation(values: np.ndarray) -> np.ndarray:
    """Distance from the median in robust standard deviations."""
    middle = np.nanmedian(values)
    spread = MAD_TO_STD * np.nanmedian(np.abs(values - middle))
    return (values - middle) / max(spread, 1e-6 * max(abs(middle), 1e-6))
