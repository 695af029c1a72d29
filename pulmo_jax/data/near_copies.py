"""Which images are copies of each other, exact or nearly: what must not stand on both sides of a split.

Exact copies are files of the same bytes. Near copies, such as the same picture saved anew, at another size or quality,
are found by a perceptual hash: the signs of the lowest frequencies of a small gray version about their median (Zauner
2010, "Implementation and benchmarking of perceptual image hash functions", sec. 3.2.1: DCT).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt64
from scipy.fft import dctn

from pulmo_jax.data.transforms import resize_bands

SMALL_PX, FREQUENCIES = 32, 8
NEAR_BITS = 6  # of 63 that near copies may differ in
FLAT = 1e-3  # sd over range: an image of one level looks like no other
AT_ONCE = 512  # images against all


def look_of(page: Shaped[np.ndarray, "H W C"]) -> int:
    """63 bits; 0 for an image of one level, or none that is finite."""
    gray = page.astype(np.float32).mean(-1)
    gray = np.where(np.isfinite(gray), gray, 0)
    low, span = gray.min(), np.ptp(gray)
    if span == 0:
        return 0
    small: Float[np.ndarray, "32 32"] = resize_bands(((gray - low) / span)[..., None], SMALL_PX, SMALL_PX)[..., 0]
    if small.std() < FLAT:
        return 0
    lowest = np.asarray(dctn(small.astype(np.float64), norm="ortho"))[:FREQUENCIES, :FREQUENCIES].ravel()[1:]
    bits = lowest > np.median(lowest)
    return int(sum(1 << i for i in np.flatnonzero(bits).tolist()))


def copies(contents: Sequence[str], looks: UInt64[np.ndarray, "N"], near_bits: int = NEAR_BITS) -> Int[np.ndarray, "N"]:
    """For each image the first one that it is a copy of, through others too; itself if of none."""
    first = np.arange(len(looks))

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = int(first[i])
        return i

    def join(i: int, j: int) -> None:
        a, b = sorted((root(i), root(j)))
        first[b] = a

    seen: dict[str, int] = {}
    for i, content in enumerate(contents):
        join(seen.setdefault(content, i), i)
    shown = np.flatnonzero(looks != 0)
    for start in range(0, shown.size, AT_ONCE):
        some = shown[start : start + AT_ONCE]
        near: Bool[np.ndarray, "A N"] = np.bitwise_count(looks[some, None] ^ looks[shown[start:]]) <= near_bits
        for a, b in np.argwhere(near).tolist():
            if some[a] != shown[start + b]:
                join(int(some[a]), int(shown[start + b]))
    return np.array([root(i) for i in range(len(first))], int)
