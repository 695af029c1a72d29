"""Patch Gaussians by slow loops in float64: windows, moments, shrinkage, distances, matched filters, score maps."""

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, minimum_filter


def windows(image: np.ndarray, side: int, stride: int) -> list[tuple[int, int, np.ndarray]]:
    """(y, x, vector) of every window of (H, W, C)."""
    height, width, _ = image.shape
    return [
        (y, x, image[y : y + side, x : x + side].ravel().astype(np.float64))
        for y in range(0, height - side + 1, stride)
        for x in range(0, width - side + 1, stride)
    ]


def fit(samples: np.ndarray, floor_variance: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and shrunk covariance (Flasseur et al. 2018, eq. 10 and 12) of (n, D)."""
    n, size = samples.shape
    mean = samples.mean(0)
    s = np.zeros((size, size))
    for sample in samples:
        s += np.outer(sample - mean, sample - mean) / n
    for i in range(size):
        s[i, i] = max(s[i, i], floor_variance)
    of_square, diagonal = np.trace(s @ s), sum(s[i, i] ** 2 for i in range(size))
    rho = (of_square + np.trace(s) ** 2 - 2 * diagonal) / ((n + 1) * (of_square - diagonal))
    rho = min(max(rho, 0.0), 1.0)
    c = (1 - rho) * s + rho * np.diag(np.diag(s))
    return mean, c


def distance(sample: np.ndarray, mean: np.ndarray, c: np.ndarray) -> float:
    return float((sample - mean) @ np.linalg.inv(c) @ (sample - mean))


def blob(side: int, sigma: float, channels: int) -> np.ndarray:
    middle = side // 2
    return np.array(
        [
            np.exp(-((y - middle) ** 2 + (x - middle) ** 2) / (2 * sigma**2))
            for y in range(side)
            for x in range(side)
            for _ in range(channels)
        ]
    )


def matched(sample: np.ndarray, mean: np.ndarray, c: np.ndarray, template: np.ndarray) -> tuple[float, float]:
    """SNR and amplitude."""
    inverse = np.linalg.inv(c)
    a, b = template @ inverse @ template, template @ inverse @ (sample - mean)
    return float(b / np.sqrt(a)), float(b / a)


def score_map(method: Any, residual: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Weighted means (1 for windows inside, 1e-6 for others) by SciPy's filters."""
    signed = abs(residual) if method.polarity == "both" else residual * (1 if method.polarity == "bright" else -1)
    score = signed.max(-1) if method.score == "matched" else residual[..., 0]
    whole = minimum_filter(foreground, method.window_side + method.stride * method.cell_px, mode="nearest")
    weight = np.where(whole, 1.0, 1e-6) * foreground
    radius = int(4 * method.smoothing + 0.5)
    values = np.where(foreground, score, 0.0).astype(np.float64) * weight
    total, weights = (gaussian_filter(a, method.smoothing, radius=radius) for a in (values, weight))
    return np.where(foreground, total / np.maximum(weights, 1e-12), np.nan)
