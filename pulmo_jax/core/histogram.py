"""A streaming histogram of scores: quantiles and their confidence intervals in bounded memory.

A score's bin is the sign, the exponent and the first 11 mantissa bits of its float32 pattern, so that bins
have a relative width of 2^-11 or less at any magnitude and sign, and no range need be known beforehand. Only
bins that were seen are kept: memory grows with the dynamic range of the scores, never with their number.

The pixels of an image, and the images of a patient, are correlated: intervals come from resampling whole
groups. In streaming this is the Poisson ("online") bootstrap: in every replicate a group weighs Poisson(1)
instead of the number of times that a multinomial resampling draws it (Oza & Russell, "Online bagging and
boosting", 2001; Chamandy et al., "Estimating uncertainty for massive data streams", 2012).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt32

BIN_SHIFT = 12  # mantissa bits dropped of 23: 11 remain
CELL_SHIFT = 4  # bins to a cell: 2^4, so that cells are the values of bfloat16
SIGN_BIT = np.uint32(1 << 31)


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """Counts of finite float32 scores, and Poisson-bootstrap replicates of these counts by group.

    bin, count: the bins seen, ascending, and the scores (or the sum of their weights) in each.
    low, high: the least and the greatest score in a bin; a bin with one value only is thus exact.
    cell, replicate: blocks of 16 bins, and their counts in every replicate. Within a cell a replicate is
        taken to be spread over the bins as the main count is, which saves 16 times the memory.
    n: scores added; groups: names of those that they came from.

    Nothing mutates: `add` and `merge` return a new histogram. The result depends on the scores and group
    names alone, not on the order or on how the work was divided (fractional weights: up to rounding).
    """

    bin: UInt32[np.ndarray, "bins"]
    count: Float64[np.ndarray, "bins"]
    low: Float32[np.ndarray, "bins"]
    high: Float32[np.ndarray, "bins"]
    cell: UInt32[np.ndarray, "cells"]
    replicate: Float64[np.ndarray, "cells R"]
    n: int
    groups: frozenset[str]
    seed: int

    @staticmethod
    def empty(replicates: int = 200, seed: int = 0) -> "ScoreHistogram":
        none, key = np.zeros(0, np.float32), np.zeros(0, np.uint32)
        return ScoreHistogram(key, np.zeros(0), none, none, key, np.zeros((0, replicates)), 0, frozenset(), seed)

    @property
    def n_replicates(self) -> int:
        return self.replicate.shape[1]

    def add(
        self,
        scores: Float32[np.ndarray, "..."],
        group: str,
        weights: Float64[np.ndarray, "..."] | None = None,
    ) -> "ScoreHistogram":
        """With the scores of one image of `group`, each counting 1 or its positive weight.

        Raises ValueError if a score is not finite: which pixels do not count is the caller's to say.
        """
        if scores.size == 0:
            return self
        if weights is None:
            scores = np.sort(scores, axis=None)
        else:
            order = np.argsort(scores, axis=None)
            scores, weights = scores.ravel()[order], weights.ravel()[order]
        if not np.isfinite(scores[[0, -1]]).all():
            raise ValueError(f"scores of {group!r} are not all finite: leave out the pixels without one")
        return self.merge(self._of_sorted(scores, group, weights))

    def _of_sorted(self, scores: np.ndarray, group: str, weights: np.ndarray | None) -> "ScoreHistogram":
        key = _bin_key(scores)
        first = _run_starts(key)
        end = np.append(first[1:], scores.size)
        count = (end - first).astype(np.float64) if weights is None else np.add.reduceat(weights, first)
        key = key[first]
        cell_first = _run_starts(key >> CELL_SHIFT)
        weight = group_weights(group, self.n_replicates, self.seed)
        return ScoreHistogram(
            bin=key,
            count=count,
            low=scores[first],
            high=scores[end - 1],
            cell=key[cell_first] >> CELL_SHIFT,
            replicate=np.outer(np.add.reduceat(count, cell_first), weight),
            n=scores.size,
            groups=frozenset([group]),
            seed=self.seed,
        )

    def merge(self, other: "ScoreHistogram") -> "ScoreHistogram":
        """Of both; they must share seed and number of replicates, so that a group weighs the same in both."""
        if (self.seed, self.n_replicates) != (other.seed, other.n_replicates):
            raise ValueError("histograms with different seeds or numbers of replicates cannot be merged")
        if other.n == 0 or self.n == 0:
            return self if other.n == 0 else other
        key, mine, theirs = _union(self.bin, other.bin)
        count = np.zeros(key.size)
        low, high = np.full(key.size, np.inf, np.float32), np.full(key.size, -np.inf, np.float32)
        for part, at in ((self, mine), (other, theirs)):
            count[at] += part.count
            low[at] = np.minimum(low[at], part.low)
            high[at] = np.maximum(high[at], part.high)
        cell, mine, theirs = _union(self.cell, other.cell)
        replicate = np.zeros((cell.size, self.n_replicates))
        replicate[mine] = self.replicate
        replicate[theirs] += other.replicate
        n, groups = self.n + other.n, self.groups | other.groups
        return ScoreHistogram(key, count, low, high, cell, replicate, n, groups, self.seed)

    def replicate_counts(self) -> Iterator[Float64[np.ndarray, "bins"]]:
        """The counts in every bootstrap replicate, one after the other."""
        first = _run_starts(self.bin >> CELL_SHIFT)
        bins_in_cell = np.diff(np.append(first, self.bin.size))
        ratio = self.replicate / np.add.reduceat(self.count, first)[:, None]
        for weight in np.ascontiguousarray(ratio.T):
            yield self.count * np.repeat(weight, bins_in_cell)

    def quantile(self, q: float, count: Float64[np.ndarray, "bins"] | None = None) -> float:
        """The least score that a share q of the scores does not exceed, interpolated by rank within its bin.

        count: those of a replicate instead of the main ones. The value is a float32's, so that comparing it
        with float32 scores rounds nothing. NaN without scores.
        """
        rank = np.cumsum(self.count if count is None else count)
        if rank.size == 0 or rank[-1] == 0:
            return np.nan
        target = max(q * rank[-1], np.finfo(np.float64).tiny)  # above 0, to pass over bins that count nothing
        i = np.searchsorted(rank, target)
        below = rank[i - 1] if i else 0.0
        share = (target - below) / (rank[i] - below)
        low, high = float(self.low[i]), float(self.high[i])
        return float(np.float32(low + share * (high - low)))

    def quantile_interval(self, q: float) -> tuple[float, float] | tuple[None, None]:
        """95 % interval of a quantile over groups, or (None, None) with fewer than two."""
        values = np.array([self.quantile(q, count) for count in self.replicate_counts()])
        return percentile_interval(values, len(self.groups))

    def survival(
        self, values: Float32[np.ndarray, "N"], count: Float64[np.ndarray, "bins"] | None = None
    ) -> Float64[np.ndarray, "N"]:
        """Share of the scores >= each value, linear within the bin that the value falls in."""
        count = np.append(self.count if count is None else count, 0.0)
        at_least = np.cumsum(count[::-1])[::-1]
        width = np.append(self.high.astype(np.float64) - self.low, 0.0)
        i = np.searchsorted(self.high, values)
        depth = values - np.append(self.low, np.inf)[i]
        inside = np.divide(depth, width[i], out=np.zeros(values.shape), where=width[i] > 0)
        return (at_least[i] - np.clip(inside, 0, 1) * count[i]) / at_least[0]


def group_weights(group: str, replicates: int, seed: int) -> Int64[np.ndarray, "R"]:
    """What a group weighs in every bootstrap replicate: Poisson(1), the same wherever the group turns up."""
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "big")]).poisson(1.0, replicates)


def percentile_interval(replicates: Float64[np.ndarray, "R"], n_groups: int) -> tuple[float, float] | tuple[None, None]:
    """The central 95 % of the bootstrap replicates that are defined (not NaN); too narrow below ten groups.

    (None, None) with fewer than two groups, or without a replicate.
    """
    defined = replicates[~np.isnan(replicates)]
    if n_groups < 2 or defined.size == 0:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _bin_key(scores: Float32[np.ndarray, "N"]) -> UInt32[np.ndarray, "N"]:
    """The leading bits of a map from float32 to uint32 that keeps the order."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes +0
    return np.where(bits >= SIGN_BIT, ~bits, bits | SIGN_BIT) >> BIN_SHIFT


def _run_starts(ascending: np.ndarray) -> Int64[np.ndarray, "runs"]:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])[: ascending.size])


def _union(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sorted union of two sorted sets, and where the members of each are in it."""
    merged = np.sort(np.concatenate([a, b]), kind="stable")  # merges two sorted runs; np.union1d hashes
    union = merged[_run_starts(merged)]
    return union, np.searchsorted(union, a), np.searchsorted(union, b)
