"""A streaming histogram of scores: quantiles and their confidence intervals in bounded memory.

The bin of a score is given by the sign, the exponent and the first 11 mantissa bits of its float32 representation. Bins
have a relative width of at most 2^-11 at any magnitude and sign, and no range has to be known in advance. Only occupied
bins are stored: memory grows with the dynamic range of the scores, not with their number.

Pixels of one image and images of one patient are correlated, so intervals come from resampling whole groups. The
streaming form is the Poisson ("online") bootstrap: in each replicate the weight of a group is Poisson(1) instead of its
multinomial count (Oza and Russell, "Online bagging and boosting", 2001; Chamandy et al., "Estimating uncertainty for
massive data streams", 2012).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt32

BIN_SHIFT = 12  # dropped bits of the 23-bit mantissa; 11 remain
CELL_SHIFT = 4  # 2^4 bins per cell; cells correspond to bfloat16 values
SIGN_BIT = np.uint32(1 << 31)


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """Counts of finite float32 scores, with Poisson-bootstrap replicates of the counts by group.

    The histogram is immutable: `add` and `merge` return a new one. The result depends only on scores and group names,
    not on the order of the additions or on how the work was divided (fractional weights: up to rounding).

    Attributes:
        bin: Keys of the occupied bins, ascending.
        count: Number of scores, or sum of their weights, in each bin.
        low: Smallest score in each bin; a bin with a single value is exact.
        high: Largest score in each bin.
        cell: Keys of the occupied cells, blocks of 16 bins.
        replicate: Count of each cell in R bootstrap replicates. Within a cell a replicate is distributed over the bins
            like the main count, which saves a factor of 16 in memory.
        n: Number of scores.
        groups: Names of the groups that contributed.
        seed: Seed of the bootstrap weights.
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
        """An empty histogram.

        Args:
            replicates: Number of bootstrap replicates R.
            seed: Seed of the bootstrap weights.

        Returns:
            The histogram.
        """
        none, key = np.zeros(0, np.float32), np.zeros(0, np.uint32)
        return ScoreHistogram(key, np.zeros(0), none, none, key, np.zeros((0, replicates)), 0, frozenset(), seed)

    @property
    def n_replicates(self) -> int:
        """Number of bootstrap replicates."""
        return self.replicate.shape[1]

    def add(
        self,
        scores: Float32[np.ndarray, "..."],
        group: str,
        weights: Float64[np.ndarray, "..."] | None = None,
    ) -> "ScoreHistogram":
        """Add the scores of one image.

        Args:
            scores: Finite scores.
            group: Group of the image, such as its patient.
            weights: Positive weight of each score, default 1.

        Returns:
            The updated histogram.

        Raises:
            ValueError: If a score is not finite; callers exclude pixels without a score.
        """
        if scores.size == 0:
            return self
        if weights is None:
            scores = np.sort(scores, axis=None)
        else:
            order = np.argsort(scores, axis=None)
            scores, weights = scores.ravel()[order], weights.ravel()[order]
        if not np.isfinite(scores[[0, -1]]).all():
            raise ValueError(f"scores of group {group!r} are not all finite; exclude pixels without a score")
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
        """Combine two histograms.

        Args:
            other: Histogram with the same seed and number of replicates, so that group weights agree.

        Returns:
            Histogram of all scores.

        Raises:
            ValueError: If seed or number of replicates differ.
        """
        if (self.seed, self.n_replicates) != (other.seed, other.n_replicates):
            raise ValueError("histograms with different seeds or numbers of replicates cannot be merged")
        if other.n == 0 or self.n == 0:
            return self if other.n == 0 else other
        key, at_self, at_other = _union(self.bin, other.bin)
        count = np.zeros(key.size)
        low, high = np.full(key.size, np.inf, np.float32), np.full(key.size, -np.inf, np.float32)
        for part, position in ((self, at_self), (other, at_other)):
            count[position] += part.count
            low[position] = np.minimum(low[position], part.low)
            high[position] = np.maximum(high[position], part.high)
        cell, at_self, at_other = _union(self.cell, other.cell)
        replicate = np.zeros((cell.size, self.n_replicates))
        replicate[at_self] = self.replicate
        replicate[at_other] += other.replicate
        n, groups = self.n + other.n, self.groups | other.groups
        return ScoreHistogram(key, count, low, high, cell, replicate, n, groups, self.seed)

    def replicate_counts(self) -> Iterator[Float64[np.ndarray, "bins"]]:
        """Iterate over the bin counts of the bootstrap replicates."""
        first = _run_starts(self.bin >> CELL_SHIFT)
        bins_in_cell = np.diff(np.append(first, self.bin.size))
        ratio = self.replicate / np.add.reduceat(self.count, first)[:, None]
        for weight in np.ascontiguousarray(ratio.T):
            yield self.count * np.repeat(weight, bins_in_cell)

    def quantile(self, q: float, count: Float64[np.ndarray, "bins"] | None = None) -> float:
        """Quantile of the scores, interpolated by rank within its bin.

        Args:
            q: Probability in [0, 1].
            count: Counts of a replicate in place of the main counts.

        Returns:
            Smallest score that a fraction q of the scores does not exceed; NaN without scores. The value is exactly
            representable in float32, so comparisons with float32 scores are exact.
        """
        rank = np.cumsum(self.count if count is None else count)
        if rank.size == 0 or rank[-1] == 0:
            return np.nan
        target = max(q * rank[-1], np.finfo(np.float64).tiny)  # positive, to skip empty bins
        i = np.searchsorted(rank, target)
        below = rank[i - 1] if i else 0.0
        share = (target - below) / (rank[i] - below)
        low, high = float(self.low[i]), float(self.high[i])
        return float(np.float32(low + share * (high - low)))

    def quantile_interval(self, q: float) -> tuple[float, float] | tuple[None, None]:
        """95 % bootstrap interval of a quantile over groups.

        Args:
            q: Probability in [0, 1].

        Returns:
            Lower and upper limit, or (None, None) with fewer than two groups.
        """
        values = np.array([self.quantile(q, count) for count in self.replicate_counts()])
        return percentile_interval(values, len(self.groups))

    def survival(
        self, values: Float32[np.ndarray, "N"], count: Float64[np.ndarray, "bins"] | None = None
    ) -> Float64[np.ndarray, "N"]:
        """Fraction of the scores that are at least as high as each value, linear within a bin.

        Args:
            values: Values at which to evaluate the survival function.
            count: Counts of a replicate in place of the main counts.

        Returns:
            One fraction for each value.
        """
        count = np.append(self.count if count is None else count, 0.0)
        at_least = np.cumsum(count[::-1])[::-1]
        width = np.append(self.high.astype(np.float64) - self.low, 0.0)
        i = np.searchsorted(self.high, values)
        depth = values - np.append(self.low, np.inf)[i]
        inside = np.divide(depth, width[i], out=np.zeros(values.shape), where=width[i] > 0)
        return (at_least[i] - np.clip(inside, 0, 1) * count[i]) / at_least[0]


def group_weights(group: str, replicates: int, seed: int) -> Int64[np.ndarray, "R"]:
    """Bootstrap weights of a group, Poisson(1), a deterministic function of its name and the seed.

    Args:
        group: Name of the group.
        replicates: Number of bootstrap replicates R.
        seed: Seed.

    Returns:
        Weight in each replicate.
    """
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "big")]).poisson(1.0, replicates)


def percentile_interval(replicates: Float64[np.ndarray, "R"], n_groups: int) -> tuple[float, float] | tuple[None, None]:
    """Central 95 % of bootstrap replicates; too narrow for fewer than about ten groups.

    Args:
        replicates: Value in each replicate; NaN where it is undefined.
        n_groups: Number of groups that were resampled.

    Returns:
        Lower and upper limit, or (None, None) with fewer than two groups or without a defined replicate.
    """
    defined = replicates[~np.isnan(replicates)]
    if n_groups < 2 or defined.size == 0:
        return None, None
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def _bin_key(scores: Float32[np.ndarray, "N"]) -> UInt32[np.ndarray, "N"]:
    """Leading bits of the order-preserving map from float32 to uint32."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes +0
    return np.where(bits >= SIGN_BIT, ~bits, bits | SIGN_BIT) >> BIN_SHIFT


def _run_starts(ascending: np.ndarray) -> Int64[np.ndarray, "runs"]:
    """Start index of each run of equal values."""
    return np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])[: ascending.size])


def _union(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted union of two sorted sets, and the positions of the members of each in it."""
    merged = np.sort(np.concatenate([a, b]), kind="stable")  # merges two sorted runs; np.union1d hashes
    union = merged[_run_starts(merged)]
    return union, np.searchsorted(union, a), np.searchsorted(union, b)
