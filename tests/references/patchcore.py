"""PatchCore by loops in float64, from the equations of the publication."""

import numpy as np


def greedy(points: np.ndarray, count: int, first: int = 0) -> tuple[list[int], float]:
    """Indices of the greedy coreset, and the largest distance of a point from it."""
    chosen = [first]
    distance = np.linalg.norm(points - points[first], axis=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return chosen, float(distance.max())


def pooled(maps: np.ndarray, side: int) -> np.ndarray:
    """Mean over the neighbours of each pixel that exist."""
    reach, (height, width) = side // 2, maps.shape[:2]
    mean = np.empty(maps.shape)
    for y in range(height):
        for x in range(width):
            some = maps[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
            mean[y, x] = some.reshape(-1, maps.shape[-1]).mean(0)
    return mean


def score(query: np.ndarray, bank: np.ndarray, neighbours: int) -> float:
    """Distance of a vector from the bank, re-weighted by the neighbours in the bank of its nearest one."""
    nearest = int(np.linalg.norm(bank - query, axis=1).argmin())
    around = np.argsort(np.linalg.norm(bank - bank[nearest], axis=1))[:neighbours]
    distance = np.linalg.norm(query - bank[nearest])
    if neighbours == 1:
        return float(distance)
    powers = np.exp([np.linalg.norm(query - bank[i]) for i in around])
    return float((1 - np.exp(distance) / powers.sum()) * distance)
