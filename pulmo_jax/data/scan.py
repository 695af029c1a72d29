"""A single pass over the training images before training.

It verifies that every file can be read, finds the positions of patches and fits the normalisation. Memory use is a few
numbers per patch, plus the pixels of one image per thread.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int, Shaped

from pulmo_jax.core.histogram import ScoreHistogram
from pulmo_jax.core.tiling import tile_starts
from pulmo_jax.data.images import ImageRef, Skipped
from pulmo_jax.data.transforms import Preprocessing, brightness, finite
from pulmo_jax.types import InputError

PIXELS_PER_IMAGE = 65_536  # pixels of a regular grid, at most about this many, enter the statistics
SCAN_THREADS = 4


@runtime_checkable
class ScannedReader(Protocol):
    """Reads images and their masks, such as `reader.Reader`."""

    def image(self, ref: ImageRef) -> np.ndarray:
        """Pixels (H, W, C) in the unit of the file."""
        ...

    def foreground(self, ref: ImageRef) -> np.ndarray | None:
        """Foreground mask (H, W) as bool; None if the whole image is foreground."""
        ...

    def close(self) -> None:
        """Close all files."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How patches are placed.

    Attributes:
        patch_size: Side of a patch in px.
        stride: Spacing of the grid of patches in px.
        min_foreground: Smallest fraction of foreground pixels in a patch.
        foreground_range: Intensity range of the foreground in the unit of the files; None for no limit.
        resize: Whether to resize whole images to the patch size, instead of cutting patches.
    """

    patch_size: int
    stride: int
    min_foreground: float
    foreground_range: tuple[float, float] | None
    resize: bool


@dataclass(frozen=True)
class Scan:
    """Result of a scan.

    Attributes:
        images: Readable images.
        skipped: Unreadable images, with the reason.
        cells: (image, y, x) of every patch, in px (N, 3).
        mean: Mean of the sampled foreground pixels, per band.
        std: Standard deviation of the sampled foreground pixels, per band.
        histograms: Histogram of the sampled foreground pixels, per band.
    """

    images: list[ImageRef]
    skipped: list[Skipped]
    cells: Int[np.ndarray, "N 3"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    histograms: list[ScoreHistogram]


def scan_images(
    refs: list[ImageRef],
    sampling: Sampling,
    reader: ScannedReader,
    track: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Scan:
    """Decode every image once, in threads, and collect patch positions and statistics.

    Args:
        refs: The images.
        sampling: How patches are placed.
        reader: Reads the images; its files are closed at the end.
        track: Wraps an iterable of known length to show progress.

    Returns:
        Patch positions and statistics. Unreadable images are listed in `skipped`; the caller decides whether they are
        an error.

    Raises:
        InputError: No image can be read, or no patch has enough foreground.
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
        raise InputError(_no_patches(refs, skipped, sampling))
    cell_array, std = np.concatenate(cells).astype(np.int32), np.sqrt(moments.variance)
    return Scan(images, skipped, cell_array, tuple(moments.mean), tuple(std), histograms)


def map_ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> Iterator:
    """Map a function over items in threads like `pool.map`, but with a bounded number of pending results.

    Args:
        pool: Thread pool.
        function: Function of one item.
        items: The items.

    Yields:
        Results in the order of the items.
    """
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > 2 * SCAN_THREADS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@dataclass(frozen=True)
class Moments:
    """Running mean and population variance of pixels, per band.

    Attributes:
        count: Number of pixels.
        mean: Mean of each band (C,).
        variance: Population variance of each band (C,).
    """

    count: int
    mean: Float64[np.ndarray, "C"]
    variance: Float64[np.ndarray, "C"]

    def add(self, sample: Float64[np.ndarray, "N C"]) -> "Moments":
        """Include a sample of pixels. Unlike a sum of squares, this loses no precision if the mean is large.

        Args:
            sample: N pixels of C channels.

        Returns:
            Updated moments.

        Reference:
            Chan, Golub & LeVeque 1979, eq. 2.1.
        """
        if not len(sample):
            return self
        count = self.count + len(sample)
        fraction, shift = len(sample) / count, sample.mean(axis=0) - self.mean
        within = (1 - fraction) * self.variance + fraction * sample.var(axis=0)
        return Moments(count, self.mean + fraction * shift, within + fraction * (1 - fraction) * shift**2)


def _no_patches(refs: list[ImageRef], skipped: list[Skipped], sampling: Sampling) -> str:
    if len(skipped) == len(refs):
        return f"none of the {len(refs)} images can be read; the first error: {skipped[0].reason}"
    return (
        f"{refs[0].path.parent}: no patch of {sampling.patch_size} px has {sampling.min_foreground:.0%} foreground; "
        "lower data.min_foreground or data.patch_size, or change data.foreground or data.foreground_range"
    )


def foreground_pixels(
    pixels: Shaped[np.ndarray, "H W C"], mask: Bool[np.ndarray, "H W"] | None, value_range: tuple[float, float] | None
) -> Bool[np.ndarray, "H W"]:
    """Find the foreground of an image.

    Args:
        pixels: Image (H, W, C) in the unit of the file.
        mask: Foreground mask (H, W); None for no mask.
        value_range: Range of the mean over the bands, in the unit of the file; None for no limit.

    Returns:
        True for finite pixels inside the mask and the range (H, W).
    """
    inside = finite(pixels)
    if mask is not None:
        inside = inside & mask
    if value_range is not None:
        mean = brightness(pixels)
        inside = inside & (mean >= value_range[0]) & (mean <= value_range[1])
    return inside


def sample_pixels(pixels: Shaped[np.ndarray, "H W C"], inside: Bool[np.ndarray, "H W"]) -> Float64[np.ndarray, "N C"]:
    """Sample foreground pixels on a regular grid, or the first ones if the grid misses a small foreground.

    Args:
        pixels: Image (H, W, C) in the unit of the file.
        inside: True for foreground (H, W).

    Returns:
        At most about PIXELS_PER_IMAGE pixels (N, C) in float64.
    """
    step = int(np.ceil(np.sqrt(inside.size / PIXELS_PER_IMAGE)))
    sample = pixels[::step, ::step][inside[::step, ::step]]
    return (sample if len(sample) else pixels[inside][:PIXELS_PER_IMAGE]).astype(np.float64)


def cells_with_foreground(inside: Bool[np.ndarray, "H W"], sampling: Sampling) -> Int[np.ndarray, "N 2"]:
    """Find the grid cells with enough foreground, and at least one pixel of it.

    Args:
        inside: True for foreground (H, W).
        sampling: How patches are placed.

    Returns:
        Upper left corners (y, x) of the cells in px (N, 2).
    """
    if sampling.resize:
        return np.zeros((int(inside.any() and inside.mean() >= sampling.min_foreground), 2), np.int32)
    (height, width), size = inside.shape, sampling.patch_size
    ys, xs = tile_starts(height, size, sampling.stride), tile_starts(width, size, sampling.stride)
    right = np.minimum(xs + size, width)
    column_counts = np.stack([inside[y : y + size].sum(axis=0, dtype=np.int32) for y in ys])
    cumulative = np.pad(column_counts.cumsum(axis=1, dtype=np.int64), ((0, 0), (1, 0)))
    count = cumulative[:, right] - cumulative[:, xs]
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
    """Fit the normalisation to the training foreground.

    Args:
        scan: Statistics of the training images.
        sampling: How patches are placed.
        kind: "percentile" maps `percentiles` to 0 and 1, "zscore" uses mean and standard deviation, and "fixed" maps
            `value_range` to 0 and 1.
        value_range: Lower and upper value in the unit of the files, for "fixed".
        percentiles: Lower and upper percentile in percent, for "percentile".
        clip: Limits of normalised values.

    Returns:
        The preprocessing. The scale of a band that is constant to float32 precision is 1.
    """
    bands = scan.images[0].shape[2]
    if kind == "fixed":
        assert value_range is not None  # the config requires it
        low, high = np.full(bands, value_range[0]), np.full(bands, value_range[1])
    elif kind == "percentile":
        low, high = (np.array([h.quantile(p / 100) for h in scan.histograms]) for p in percentiles)
    else:
        low, high = np.array(scan.mean), np.array(scan.mean) + np.array(scan.std)
    smallest = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
    scale = np.where(high - low > smallest, high - low, 1.0)
    return Preprocessing(
        channels=bands,
        dtype=scan.images[0].scale,
        patch_size=sampling.patch_size,
        resize=sampling.resize,
        offset=tuple(low.tolist()),
        scale=tuple(scale.tolist()),
        fill=tuple(np.clip((np.array(scan.mean) - low) / scale, *clip).tolist()),
        mean=tuple(map(float, scan.mean)),
        std=tuple(map(float, scan.std)),
        clip=clip,
    )
