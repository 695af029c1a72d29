"""One pass over the training images before any training: it proves that every file can be read, finds the cells in
which patches lie, and fits the normalisation. Memory holds a few numbers per cell, never pixels of more than one image
for each thread.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Shaped

from pulmo_jax.core.histogram import ScoreHistogram
from pulmo_jax.core.tiling import tile_starts
from pulmo_jax.data.images import ImageRef, Reader, Skipped
from pulmo_jax.data.transforms import Preprocessing, brightness, finite
from pulmo_jax.types import InputError

PIXELS_PER_IMAGE = 65_536  # at most about so many, on a regular grid, enter the fitted statistics
SCAN_THREADS = 4


@dataclass(frozen=True)
class Sampling:
    """Where patches lie: on a grid of `stride`, with at least `min_foreground` of their pixels in the foreground."""

    patch_size: int
    stride: int
    min_foreground: float
    foreground_range: tuple[float, float] | None
    resize: bool


@dataclass(frozen=True)
class Scan:
    """cells: (image, y, x) of every patch; statistics: per band, over the sampled foreground pixels."""

    images: list[ImageRef]
    skipped: list[Skipped]
    cells: Int[np.ndarray, "N 3"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    histograms: list[ScoreHistogram]


def scan_images(
    refs: list[ImageRef],
    sampling: Sampling,
    reader: Reader,
    track: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Scan:
    """Decode every image once, in threads. Unreadable ones come back in `skipped`: the caller decides.

    Closes the reader's files at the end.
    """
    images, skipped, cells = [], [], []
    bands = refs[0].shape[2]
    histograms = [ScoreHistogram.empty(replicates=0) for _ in range(bands)]
    moments = Moments(0, np.zeros(bands), np.zeros(bands))

    def examine(ref: ImageRef) -> tuple[np.ndarray, np.ndarray] | Skipped:
        try:
            pixels, mask = reader.image(ref), reader.foreground(ref)
        except (InputError, OSError) as error:
            return Skipped(ref.name, str(error))
        inside = foreground_pixels(pixels, mask, sampling.foreground_range)
        return cells_with_foreground(inside, sampling), sample_pixels(pixels, inside)

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for ref, result in track(zip(refs, map_ahead(pool, examine, refs), strict=True), len(refs)):
            if isinstance(result, Skipped):
                skipped.append(result)
                continue
            positions, sample = result
            cells.append(np.insert(positions, 0, len(images), axis=1))
            images.append(ref)
            histograms = [h.add(v.astype(np.float32), ref.group) for h, v in zip(histograms, sample.T, strict=True)]
            moments = moments.add(sample)
    reader.close()
    if not sum(map(len, cells)):
        raise InputError(_nothing_to_train_on(refs, skipped, sampling))
    cell_array, std = np.concatenate(cells).astype(np.int32), np.sqrt(moments.variance)
    return Scan(images, skipped, cell_array, tuple(moments.mean), tuple(std), histograms)


def map_ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> Iterator:
    """pool.map with a bounded number of results waiting, whoever takes them being slower than the threads."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * SCAN_THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclass(frozen=True)
class Moments:
    """Mean and population variance of `count` pixels, by band."""

    count: int
    mean: Float64[np.ndarray, "C"]
    variance: Float64[np.ndarray, "C"]

    def add(self, sample: Float64[np.ndarray, "N C"]) -> "Moments":
        """Chan, Golub & LeVeque 1979, eq. 2.1: unlike a sum of squares it loses no digits to a large mean."""
        if not len(sample):
            return self
        count = self.count + len(sample)
        share, shift = len(sample) / count, sample.mean(axis=0) - self.mean
        spread = (1 - share) * self.variance + share * sample.var(axis=0)
        return Moments(count, self.mean + share * shift, spread + share * (1 - share) * shift**2)


def _nothing_to_train_on(refs: list[ImageRef], skipped: list[Skipped], sampling: Sampling) -> str:
    if len(skipped) == len(refs):
        return f"none of the {len(refs)} images could be read; the first: {skipped[0].reason}"
    return (
        f"{refs[0].path.parent}: no patch of {sampling.patch_size} px has {sampling.min_foreground:.0%} foreground; "
        "lower data.min_foreground or data.patch_size, or change data.foreground or data.foreground_range"
    )


def foreground_pixels(
    pixels: np.ndarray, mask: Bool[np.ndarray, "H W"] | None, value_range: tuple[float, float] | None
) -> Bool[np.ndarray, "H W"]:
    """Finite pixels inside the mask whose mean over the bands lies in the range, where these are given."""
    inside = finite(pixels)
    if mask is not None:
        inside = inside & mask
    if value_range is not None:
        mean = brightness(pixels)
        inside = inside & (mean >= value_range[0]) & (mean <= value_range[1])
    return inside


def sample_pixels(pixels: Shaped[np.ndarray, "H W C"], inside: Bool[np.ndarray, "H W"]) -> Float64[np.ndarray, "N C"]:
    """Foreground pixels on a regular grid, or the first ones where the grid misses a small foreground."""
    step = int(np.ceil(np.sqrt(inside.size / PIXELS_PER_IMAGE)))
    sample = pixels[::step, ::step][inside[::step, ::step]]
    return (sample if len(sample) else pixels[inside][:PIXELS_PER_IMAGE]).astype(np.float64)


def cells_with_foreground(inside: Bool[np.ndarray, "H W"], sampling: Sampling) -> Int[np.ndarray, "N 2"]:
    """(y, x) of the grid cells with enough foreground, at least one pixel of it."""
    if sampling.resize:
        return np.zeros((int(inside.any() and inside.mean() >= sampling.min_foreground), 2), np.int32)
    (height, width), size = inside.shape, sampling.patch_size
    ys, xs = tile_starts(height, size, sampling.stride), tile_starts(width, size, sampling.stride)
    right = np.minimum(xs + size, width)
    in_strips = np.stack([inside[y : y + size].sum(axis=0, dtype=np.int32) for y in ys])
    up_to = np.pad(in_strips.cumsum(axis=1, dtype=np.int64), ((0, 0), (1, 0)))
    count = up_to[:, right] - up_to[:, xs]
    area = np.outer(np.minimum(ys + size, height) - ys, right - xs)
    rows, columns = np.nonzero(count >= np.maximum(sampling.min_foreground * area, 1))
    return np.stack([ys[rows], xs[columns]], axis=1).astype(np.int32)


def fit_preprocessing(
    scan: Scan,
    sampling: Sampling,
    kind: str,
    value_range: tuple[float, float] | None,
    percentiles: tuple[float, float],
    clip: tuple[float, float],
) -> Preprocessing:
    """The normalisation: `percentile` or `zscore`, fitted to the training foreground, or `fixed` to a range.

    A constant band (to float32's precision) has no contrast to normalise: its scale is 1.
    """
    bands = scan.images[0].shape[2]
    if kind == "fixed":
        assert value_range is not None  # the config asks for it
        low, high = np.full(bands, value_range[0]), np.full(bands, value_range[1])
    elif kind == "percentile":
        low, high = (np.array([h.quantile(p / 100) for h in scan.histograms]) for p in percentiles)
    else:
        low, high = np.array(scan.mean), np.array(scan.mean) + np.array(scan.std)
    smallest = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    scale = np.where(high - low > smallest, high - low, 1.0)
    return Preprocessing(
        channels=bands,
        dtype=scan.images[0].dtype,
        patch_size=sampling.patch_size,
        resize=sampling.resize,
        offset=tuple(low.tolist()),
        scale=tuple(scale.tolist()),
        fill=tuple(np.clip((np.array(scan.mean) - low) / scale, *clip).tolist()),
        mean=tuple(map(float, scan.mean)),
        std=tuple(map(float, scan.std)),
        clip=clip,
    )
