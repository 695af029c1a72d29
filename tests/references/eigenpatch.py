"""Eigenpatches by slow loops in float64: contrast pixel by pixel, residuals anchor by anchor, the published search."""

import numpy as np


def sahs(image: np.ndarray) -> np.ndarray:
    values = [float(v) for v in image.ravel()]
    mean = sum(values) / len(values)
    above, below = [v - mean for v in values if v > mean], [v - mean for v in values if v < mean]
    high = mean + 2.5 * (sum(d * d for d in above) / len(above)) ** 0.5
    low = mean - 2.0 * (sum(d * d for d in below) / len(below)) ** 0.5
    return np.array([255 * (min(max(v, low), high) - low) / (high - low) for v in values]).reshape(image.shape)


def clahe(levels: np.ndarray, tiles: int, clip: float) -> np.ndarray:
    """OpenCV's definition, of whole numbers 0-255; the side is a multiple of `tiles`."""
    size = len(levels) // tiles
    limit = max(int(clip * size * size / 256), 1)
    tables = np.zeros((tiles, tiles, 256))
    for i in range(tiles):
        for j in range(tiles):
            counts = [0] * 256
            for v in levels[i * size : (i + 1) * size, j * size : (j + 1) * size].ravel():
                counts[int(v)] += 1
            excess = sum(max(count - limit, 0) for count in counts)
            counts = [min(count, limit) + excess // 256 for count in counts]
            rest = excess % 256
            step, at = max(256 // max(rest, 1), 1), 0
            while rest > 0 and at < 256:
                counts[at] += 1
                at, rest = at + step, rest - 1
            total = 0
            for level in range(256):
                total += counts[level]
                tables[i, j, level] = round(total * 255 / size**2)
    found = np.zeros(levels.shape)
    for y, x in np.ndindex(*levels.shape):
        v, u = y / size - 0.5, x / size - 0.5
        i, j = int(np.floor(v)), int(np.floor(u))
        for di, dj in np.ndindex(2, 2):
            share = (v - i if di else 1 - v + i) * (u - j if dj else 1 - u + j)
            row, column = min(max(i + di, 0), tiles - 1), min(max(j + dj, 0), tiles - 1)
            found[y, x] += share * tables[row, column, int(levels[y, x])]
    return found


def principal_components(samples: np.ndarray, kept: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, components and variances, by the eigenvectors of the covariance."""
    mean = samples.mean(0)
    covariance = sum(np.outer(x - mean, x - mean) for x in samples) / len(samples)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    count = 1
    while values[:count].sum() < kept * values.sum():
        count += 1
    return mean, vectors[:, :count].T, values[:count]


def residual_map(image: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Squared error of the reconstruction of every window of the size of the mean (h, w)."""
    rows, columns = mean.shape
    flat_mean, flat = mean.ravel(), components.reshape(len(components), -1)
    found = np.zeros((len(image) - rows + 1, image.shape[1] - columns + 1))
    for y, x in np.ndindex(*found.shape):
        patch = image[y : y + rows, x : x + columns].ravel()
        reconstruction = flat_mean + (flat @ (patch - flat_mean)) @ flat
        found[y, x] = ((patch - reconstruction) ** 2).sum()
    return found


def locate(images: np.ndarray, anchors: np.ndarray, tests: np.ndarray, kept: float) -> np.ndarray:
    """The published search: (B, K, 2) anchors of smallest residual. anchors: of the training images, (N, K, 2)."""
    found = np.zeros((len(tests), anchors.shape[1], 2))
    for k in range(anchors.shape[1]):
        low, high = anchors[:, k].min(0), anchors[:, k].max(0)
        rows, columns = np.array(images.shape[1:]) - (high - low)
        cut = []
        for image, (y, x) in zip(images, anchors[:, k] - low, strict=True):
            cut.append(image[y : y + rows, x : x + columns].ravel())
        mean, components, _ = principal_components(np.array(cut, np.float64), kept)
        for b, image in enumerate(tests):
            residual = residual_map(image, mean.reshape(rows, columns), components)
            found[b, k] = low + np.unravel_index(residual.argmin(), residual.shape)
    return found
