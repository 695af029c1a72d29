"""Which images are copies of each other, exact or nearly: what must not stand on both sides of a split.

Exact copies are files of the same bytes. Near copies, such as the same picture saved anew, at another size or quality,
are found by a perceptual hash: the signs of the lowest frequencies of a small gray version about their median (Zauner
2010, "Implementation and benchmarking of perceptual image hash functions", sec. 3.2.1: DCT).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt64
from scipy.fft import dct
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from pulmo_jax.data.transforms import finite

SMALL_PX, FREQUENCIES = 32, 8
NEAR_BITS = 6  # of 63 that near copies may differ in
FLAT = 1e-3  # sd over range: an image of one level looks like no other
EXACT = 1e-6  # of the largest frequency: closer to the median, as those of a symmetric image are, a sign is rounding
COSINES: Float[np.ndarray, "8 32"] = np.asarray(dct(np.eye(SMALL_PX), axis=0, norm="ortho"))[:FREQUENCIES]
AT_ONCE = 2**17  # pairs of images


def look_of(page: Shaped[np.ndarray, "H W C"]) -> int:
    """63 bits; 0 for an image of one level, or none that is finite."""
    height, width, channels = page.shape
    if not np.issubdtype(page.dtype, np.integer):
        page = np.where(finite(page)[..., None], page, 0)
    span = float(page.max()) - float(page.min())
    rows = shrinking(height) @ page.reshape(height, -1).astype(np.float32)
    columns = rows.reshape(SMALL_PX, width, channels).swapaxes(0, 1)
    both = shrinking(width) @ columns.reshape(width, -1)
    small: Float[np.ndarray, "32 32"] = both.reshape(SMALL_PX, SMALL_PX, channels).mean(-1, dtype=np.float64).T
    if span == 0 or small.std() / span < FLAT:
        return 0
    lowest = (COSINES @ small @ COSINES.T).ravel()[1:]
    bits = lowest - np.sort(lowest)[lowest.size // 2] > EXACT * np.abs(lowest).max()
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


@lru_cache(maxsize=128)
def shrinking(size: int) -> csr_array:
    """(SMALL_PX, size): bilinear, with an anti-aliasing support when shrinking, as Pillow's, which takes twice the time
    for an image of floats. A column has two values."""
    step = size / SMALL_PX
    centres = (np.arange(SMALL_PX)[:, None] + 0.5) * step
    weights = np.clip(1 - np.abs(np.arange(size) + 0.5 - centres) / max(step, 1), 0, None)
    return csr_array((weights / weights.sum(1, keepdims=True)).astype(np.float32))


def joined_groups(
    groups: Sequence[str], contents: Sequence[str], looks: UInt64[np.ndarray, "N"], near_bits: int = NEAR_BITS
) -> list[str]:
    """Groups that hold copies of each other become one, under the name of that of their first image."""
    first = joined(copies(contents, looks, near_bits), np.arange(len(groups)), first_of_equal(groups))
    return [str(groups[i]) for i in first.tolist()]


def copies(contents: Sequence[str], looks: UInt64[np.ndarray, "N"], near_bits: int = NEAR_BITS) -> Int[np.ndarray, "N"]:
    """For each image the first one that it is a copy of, through others too; itself if of none."""
    first = first_of_equal(contents)
    shown = np.flatnonzero(looks != 0)
    rows = max(1, AT_ONCE // max(1, shown.size))
    for start in range(0, shown.size, rows):
        some, others = shown[start : start + rows], shown[start:]
        near: Bool[np.ndarray, "A N"] = np.bitwise_count(looks[some, None] ^ looks[others]) <= near_bits
        a, b = np.nonzero(near)
        first = joined(first, some[a], others[b])
    return first


def joined(first: Int[np.ndarray, "N"], a: Int[np.ndarray, "P"], b: Int[np.ndarray, "P"]) -> Int[np.ndarray, "N"]:
    """The first image of each one's set, once those of a and of b, pair by pair, have become one."""
    apart = first[a] != first[b]
    if not apart.any():
        return first
    link = first[a[apart]], first[b[apart]]
    graph = csr_array((np.ones(link[0].size, bool), link), shape=(first.size, first.size))
    part = connected_components(graph, directed=False)[1]
    return np.unique(part, return_index=True)[1][part][first]


def first_of_equal(values: Sequence[str]) -> Int[np.ndarray, "N"]:
    """For each value the place where it stands first."""
    places: dict[str, int] = {}
    return np.array([places.setdefault(value, i) for i, value in enumerate(values)], int)
