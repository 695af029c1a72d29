"""Detection of duplicate and near-duplicate images, which must not be separated by a split.

Duplicates are files with the same content. Near-duplicates, such as an image saved again with another size or
quality, are found with a perceptual hash: the signs, relative to their median, of the lowest DCT frequencies of a
small grey version.

Reference:
    Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", sec. 3.2.1.
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
NEAR_BITS = 6  # of 63: near-duplicates differ in at most this many bits
MIN_CONTRAST = 1e-3  # standard deviation over range; flatter images have no hash
MIN_COEFFICIENT = 1e-6  # relative to the largest; closer to the median, as in symmetric images, the sign is rounding
COSINES: Float[np.ndarray, "8 32"] = np.asarray(dct(np.eye(SMALL_PX), axis=0, norm="ortho"))[:FREQUENCIES]
PAIRS_PER_BLOCK = 2**17  # hashes compared at a time, which bounds memory


def perceptual_hash(page: Shaped[np.ndarray, "H W C"]) -> int:
    """Compute the perceptual hash of an image.

    Args:
        page: Pixels (H, W, C) in any unit; missing ones are replaced by the mean of the others.

    Returns:
        63 bits; 0 if the image is constant.
    """
    height, width, channels = page.shape
    if not np.issubdtype(page.dtype, np.integer):
        known = finite(page)
        if not known.all():  # an outline shared by all images would be their hash
            page = np.where(known[..., None], page, page[known].mean(axis=0) if known.any() else 0)
    span = float(page.max()) - float(page.min())
    rows = resize_matrix(height) @ page.reshape(height, -1).astype(np.float32)
    columns = rows.reshape(SMALL_PX, width, channels).swapaxes(0, 1)
    both = resize_matrix(width) @ columns.reshape(width, -1)
    small: Float[np.ndarray, "32 32"] = both.reshape(SMALL_PX, SMALL_PX, channels).mean(-1, dtype=np.float64).T
    if span == 0 or small.std() / span < MIN_CONTRAST:
        return 0
    lowest = (COSINES @ small @ COSINES.T).ravel()[1:]
    bits = lowest - np.sort(lowest)[lowest.size // 2] > MIN_COEFFICIENT * np.abs(lowest).max()
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


@lru_cache(maxsize=128)
def resize_matrix(size: int) -> csr_array:
    """Matrix that resizes an axis, bilinear with anti-aliasing as in Pillow; for float images twice as fast as Pillow.

    Args:
        size: Length of the axis in px.

    Returns:
        Sparse matrix (SMALL_PX, size).
    """
    step = size / SMALL_PX
    centres = (np.arange(SMALL_PX)[:, None] + 0.5) * step
    weights = np.clip(1 - np.abs(np.arange(size) + 0.5 - centres) / max(step, 1), 0, None)
    return csr_array((weights / weights.sum(1, keepdims=True)).astype(np.float32))


def merge_groups(
    groups: Sequence[str], contents: Sequence[str], hashes: UInt64[np.ndarray, "N"], near_bits: int = NEAR_BITS
) -> list[str]:
    """Merge groups that share duplicate or near-duplicate images.

    Args:
        groups: Group of each image, N of them.
        contents: Digest of each file's content, N of them.
        hashes: Perceptual hash of each image (N,); 0 for none.
        near_bits: Largest number of different bits between near-duplicates.

    Returns:
        The new group of each image, named after the group of its first image.
    """
    first = merge_sets(first_duplicates(contents, hashes, near_bits), np.arange(len(groups)), first_occurrences(groups))
    return [str(groups[i]) for i in first.tolist()]


def first_duplicates(
    contents: Sequence[str], hashes: UInt64[np.ndarray, "N"], near_bits: int = NEAR_BITS
) -> Int[np.ndarray, "N"]:
    """Find the connected sets of duplicates and near-duplicates.

    Args:
        contents: Digest of each file's content, N of them.
        hashes: Perceptual hash of each image (N,); 0 for none.
        near_bits: Largest number of different bits between near-duplicates.

    Returns:
        Index of the first image in the set of each image (N,); for an image without duplicates, the index of the image.
    """
    first = first_occurrences(contents)
    hashed = np.flatnonzero(hashes != 0)
    rows = max(1, PAIRS_PER_BLOCK // max(1, hashed.size))
    for start in range(0, hashed.size, rows):
        block, others = hashed[start : start + rows], hashed[start:]
        near: Bool[np.ndarray, "A N"] = np.bitwise_count(hashes[block, None] ^ hashes[others]) <= near_bits
        a, b = np.nonzero(near)
        first = merge_sets(first, block[a], others[b])
    return first


def representatives(
    contents: Sequence[str],
    hashes: UInt64[np.ndarray, "N"],
    labels: Int[np.ndarray, "N"],
    order: Int[np.ndarray, "N"],
    near_bits: int = NEAR_BITS,
) -> Int[np.ndarray, "N"]:
    """Choose the images that are counted when each image and its copies count once.

    Images are taken in the given order. An image that is a copy of an image taken before, with the same label, is not
    taken. Copies of copies are not followed, so a series of similar images, each a near copy of the next only, does not
    shrink to one image.

    Args:
        contents: Digest of each image's content, N of them; pages of one file must differ.
        hashes: Perceptual hash of each image (N,); 0 for none.
        labels: Class of each image (N,).
        order: Order in which the images are taken (N,).
        near_bits: Largest number of different bits between near-duplicates.

    Returns:
        Index of the image as which each image counts (N,); its own index if it is taken.
    """
    linked = first_duplicates(contents, hashes, near_bits)
    counted = np.arange(len(labels))
    shared = np.bincount(linked, minlength=linked.size)[linked] > 1
    taken: dict[tuple[int, int], list[int]] = {}  # by connected set and label
    for i in order[shared[order]].tolist():
        others = taken.setdefault((int(linked[i]), int(labels[i])), [])
        near = np.bitwise_count(hashes[others] ^ hashes[i]) <= near_bits if others and hashes[i] else []
        copies = [other for k, other in enumerate(others)
                  if contents[other] == contents[i] or (len(near) and near[k] and hashes[other])]  # fmt: skip
        if copies:
            counted[i] = copies[0]
        else:
            others.append(i)
    return counted


def merge_sets(first: Int[np.ndarray, "N"], a: Int[np.ndarray, "P"], b: Int[np.ndarray, "P"]) -> Int[np.ndarray, "N"]:
    """Merge the sets of images a[i] and b[i], for each of P pairs.

    Args:
        first: Index of the first image of each image's set (N,).
        a: Images to link (P,).
        b: The images to link them with (P,).

    Returns:
        Index of the first image of each image's merged set (N,).
    """
    separate = first[a] != first[b]
    if not separate.any():
        return first
    link = first[a[separate]], first[b[separate]]
    graph = csr_array((np.ones(link[0].size, bool), link), shape=(first.size, first.size))
    part = connected_components(graph, directed=False)[1]
    return np.unique(part, return_index=True)[1][part][first]


def first_occurrences(values: Sequence[str]) -> Int[np.ndarray, "N"]:
    """Index of the first occurrence of each value."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(value, i) for i, value in enumerate(values)], int)
