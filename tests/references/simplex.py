"""Simplex noise pixel by pixel in float64: the vertices of the triangle are found by distance, not by comparison."""

import math

import numpy as np


def gradient(i: int, j: int, seed: int) -> tuple[float, float]:
    """Gradient (y, x) of a vertex: the hash's bits 0 and 1 are signs, bit 2 tells which component is the larger."""
    low = 0xFFFFFFFF
    bits = ((i * 0x9E3779B1 + j * 0x85EBCA77) & low) ^ seed
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & low
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & low
    bits ^= bits >> 16
    small, large = (-1 if bits & 1 else 1), (-2 if bits & 2 else 2)
    return (small, large) if bits & 4 else (large, small)


def one_octave(rows: np.ndarray, columns: np.ndarray, seed: int) -> np.ndarray:
    """Sum over every vertex within reach, however many; normalised by a numerical mean of the squares."""
    found = np.empty((len(rows), len(columns)))
    for r, y in enumerate(rows):
        for c, x in enumerate(columns):
            found[r, c] = value(float(y), float(x), seed)
    return found / math.sqrt(variance())


def value(y: float, x: float, seed: int) -> float:
    total = 0.0
    for i, j, dy, dx in near(y, x):
        gy, gx = gradient(i, j, seed)
        total += max(0.0, 0.5 - dy**2 - dx**2) ** 4 * (gy * dy + gx * dx)
    return total


def near(y: float, x: float):
    """Vertices (i, j) around a point, and its distance from each."""
    skew, unskew = (math.sqrt(3) - 1) / 2, (3 - math.sqrt(3)) / 6
    first_i, first_j = math.floor(y + skew * (x + y)), math.floor(x + skew * (x + y))
    for i in range(first_i - 2, first_i + 4):
        for j in range(first_j - 2, first_j + 4):
            dy, dx = y - (i - unskew * (i + j)), x - (j - unskew * (i + j))
            if dy**2 + dx**2 < 0.5:
                yield i, j, dy, dx


def variance(points: int = 60) -> float:
    """Mean over the unit cell of the lattice of the variance over gradients, which have the mean square 5 / 2."""
    unskew = (3 - math.sqrt(3)) / 6
    total = 0.0
    for u in (np.arange(points) + 0.5) / points:
        for v in (np.arange(points) + 0.5) / points:
            y, x = u - unskew * (u + v), v - unskew * (u + v)
            total += sum((0.5 - dy**2 - dx**2) ** 8 * 2.5 * (dy**2 + dx**2) for _, _, dy, dx in near(y, x))
    return total / points**2
