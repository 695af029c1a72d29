"""Slow references of figures of merit: their definitions over full arrays, threshold by threshold."""

from collections.abc import Callable, Sequence

import numpy as np


def regions(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """The pixels of every 8-connected region, by flood fill."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    found = []
    while left:
        stack, region = [left.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
        found.append(region)
    return found


def region_overlap_area(scores: Sequence[np.ndarray], truths: Sequence[np.ndarray], limit: float) -> float:
    """AUPRO: the overlap per region, averaged over regions, integrated over the false-positive rate."""
    in_regions = [
        [score[y, x] for y, x in region]
        for score, truth in zip(scores, truths, strict=True)
        for region in regions(truth)
    ]
    normal = np.concatenate([score[~truth] for score, truth in zip(scores, truths, strict=True)])
    area, last_fpr, last_overlap = 0.0, 0.0, 0.0
    for threshold in np.unique(np.concatenate([s.ravel() for s in scores]))[::-1]:
        fpr = np.mean(normal >= threshold)
        overlap = np.mean([np.mean(np.array(region) >= threshold) for region in in_regions])
        if fpr >= limit:
            at_limit = last_overlap + (overlap - last_overlap) * (limit - last_fpr) / (fpr - last_fpr)
            return float((area + (limit - last_fpr) * (last_overlap + at_limit) / 2) / limit)
        area += (fpr - last_fpr) * (last_overlap + overlap) / 2
        last_fpr, last_overlap = fpr, overlap
    raise AssertionError("the false-positive rate ends at 1")


def dice(called: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * np.sum(called & truth) / (np.sum(called) + np.sum(truth)))


def best_dice(scores: np.ndarray, truth: np.ndarray) -> float:
    return max(dice(scores >= threshold, truth) for threshold in np.unique(scores))


def group_bootstrap(
    by_group: Sequence[np.ndarray],
    statistic: Callable[[np.ndarray], float],
    replicates: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """The textbook's: as many groups as there are, drawn with replacement, their rows pooled each time."""
    n = len(by_group)
    values = [statistic(np.concatenate([by_group[i] for i in rng.integers(n, size=n)])) for _ in range(replicates)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
