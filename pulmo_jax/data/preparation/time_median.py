"""Median of an image stack over time."""

import numpy as np
from jaxtyping import Float

STRIP_BYTES = 2**24


def strips(frames: Float[np.ndarray, "T H W"]) -> list[slice]:
    """Slices of rows in which all frames together take at most STRIP_BYTES in float64, but at least one row."""
    rows = max(1, STRIP_BYTES // (8 * len(frames) * frames.shape[2]))
    return [slice(start, min(start + rows, frames.shape[1])) for start in range(0, frames.shape[1], rows)]


def known_median(values: Float[np.ndarray, "T *shape"]) -> Float[np.ndarray, "*shape"]:
    """Median of the known values along the first axis.

    Args:
        values: Values, NaN where unknown.

    Returns:
        The median; NaN where nothing is known.
    """
    if not np.isnan(values).any():
        return np.median(values, axis=0)
    ordered = np.sort(values, axis=0)  # NaN last
    count = (~np.isnan(values)).sum(axis=0)
    low, high = (np.take_along_axis(ordered, k[None], axis=0)[0] for k in (np.maximum(count - 1, 0) // 2, count // 2))
    return np.where(count > 0, low / 2 + high / 2, np.nan).astype(values.dtype)


def median_frame(frames: Float[np.ndarray, "T H W"]) -> Float[np.ndarray, "H W"]:
    """Median over time, in strips of rows that bound the memory.

    Args:
        frames: Frames; values that are not finite are left out (T, H, W).

    Returns:
        The median; NaN where nothing is known.
    """
    parts = [frames[:, rows] for rows in strips(frames)]
    return np.concatenate([known_median(np.where(np.isfinite(part), part, np.nan)) for part in parts])
