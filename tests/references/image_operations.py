"""Slow float64 references of what is done to images: pixel by pixel, as the definitions read."""

from collections.abc import Callable, Sequence

import numpy as np


def blend_tiles(
    map_of: Callable[[int, int], np.ndarray],
    shape: tuple[int, int],
    starts: tuple[Sequence[int], Sequence[int]],
    weight: np.ndarray,
) -> np.ndarray:
    """Mean over all tiles of map_of(y, x)[i, j] at (y + i, x + j), weighted by weight[i] weight[j]."""
    total, weights = {}, {}
    for y in starts[0]:
        for x in starts[1]:
            values = map_of(y, x).astype(np.float64)
            for i, j in np.ndindex(values.shape[:2]):
                pixel, w = (y + i, x + j), float(weight[i]) * float(weight[j])
                total[pixel] = total.get(pixel, 0.0) + w * values[i, j]
                weights[pixel] = weights.get(pixel, 0.0) + w
    return np.array([[total[y, x] / weights[y, x] for x in range(shape[1])] for y in range(shape[0])])


def smooth_within(image: np.ndarray, foreground: np.ndarray, sigma: float) -> np.ndarray:
    """At every foreground pixel the Gaussian-weighted mean of the foreground, out to 4 sigma; edges are mirrored.

    image: (H, W); NaN outside the foreground.
    """
    radius = int(4 * sigma + 0.5)
    values, inside = (np.pad(a.astype(np.float64), radius, mode="symmetric") for a in (image, foreground))
    offset = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * sigma**2))
    result = np.full(image.shape, np.nan)
    for y, x in np.argwhere(foreground):
        window = slice(y, y + 2 * radius + 1), slice(x, x + 2 * radius + 1)
        weight = kernel * inside[window]
        result[y, x] = (weight * np.where(inside[window] > 0, values[window], 0)).sum() / weight.sum()
    return result


def bilinear_weights(inputs: int, outputs: int) -> np.ndarray:
    """(outputs, inputs): what each input weighs in each output of an enlargement; pixel centres at halves."""
    weights = np.zeros((outputs, inputs))
    for i in range(outputs):
        position = (i + 0.5) * inputs / outputs - 0.5
        for k in range(inputs):
            weights[i, k] = max(0.0, 1 - abs(position - k))
    return weights / weights.sum(axis=1, keepdims=True)


def cells(
    inside: np.ndarray, starts: tuple[Sequence[int], Sequence[int]], size: int, min_share: float
) -> list[list[int]]:
    """(y, x) of the windows of which at least min_share, and at least one pixel, is inside; windows end with the
    image."""
    found = []
    for y in starts[0]:
        for x in starts[1]:
            window = inside[y : y + size, x : x + size]
            if window.any() and window.sum() >= min_share * window.size:
                found.append([int(y), int(x)])
    return found
