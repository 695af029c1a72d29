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

from pulmo_jax.data.transforms import finite

SMALL_PX, FREQUENCIES = 32, 8
NEAR_BITS = 6  # of 63 that near copies may differ in
FLAT = 1e-3  # sd over range: an image of one level looks like no other
EXACT = 1e-6  # of the largest frequency: closer to the median, as those of a symmetric image are, a sign is rounding
COSINES: Float[np.ndarray, "8 32"] = np.asarray(dct(np.eye(SMALL_PX), axis=0, norm="ortho"))[:FREQUENCIES]
AT_ONCE = 512  # images against all


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
    near = copies(contents, looks, near_bits)
    same = copies(groups, np.zeros(len(groups), np.uint64))
    root = np.arange(len(groups))
    while True:  # until neither link changes anything
        before = root.copy()
        for link in (near, same):
            lowest = np.full(len(groups), len(groups))
            np.minimum.at(lowest, link, root)
            root = lowest[link]
        if (root == before).all():
            return [str(groups[i]) for i in root.tolist()]


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
