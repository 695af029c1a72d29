"""Anomalies planted into normal images: a measure of detection that needs no label.

Anomalies of several kinds are planted into normal images that were not used for training. The average precision (AP)
of their pixels ranks settings of a model, such as its latent size, where no abnormal image may be used. It is no
estimate of the accuracy on real lesions, whose appearance differs.

References: pasted patches: Li, Sohn, Yoon, Pfister 2021, "CutPaste", CVPR. Coarse noise: Kascenas, Pugeault, O'Neil
2022, MIDL.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.ndimage import map_coordinates, zoom
from sklearn.metrics import average_precision_score

from pulmo_jax.data.transforms import finite
from pulmo_jax.types import Window

Kind = Literal["bright", "dark", "noise", "foreign", "warp"]
KINDS: tuple[Kind, ...] = ("bright", "dark", "noise", "foreign", "warp")
RADII = (1 / 8, 1 / 4)  # of an anomaly, as fractions of the side of a patch
STRENGTHS = (0.2, 1.5)  # change of intensity, as fractions of the range of the foreground
RANGE_PERCENTILES = (1, 99)
EDGE_PX = 1.0  # width over which an anomaly fades out
NOISE_CELL_PX = 3
REACH_RADII = 2  # distance from the centre of the pixels that an anomaly changes or, if it displaces pixels, takes
SAMPLE_PIXELS = 2**18  # of the foreground, from which its range is estimated, at most


class Image(NamedTuple):
    """An image, or a window of one.

    Attributes:
        pixels: Pixels in the units of the file.
        foreground: Pixels to score, all of them finite.
    """

    pixels: Shaped[np.ndarray, "H W C"]
    foreground: Bool[np.ndarray, "H W"]


class Place(NamedTuple):
    """Place and shape of an anomaly.

    Attributes:
        centre: Pixel (y, x).
        radius: Longest half axis, px.
        weight: 1 inside, 0 outside, in between at the edge.
    """

    centre: tuple[int, int]
    radius: float
    weight: Float[np.ndarray, "H W"]


@dataclass(frozen=True)
class Planted:
    """A window of an image with an anomaly.

    Attributes:
        image: The window.
        mask: Foreground pixels of the anomaly.
        kind: Kind of the anomaly.
    """

    image: Image
    mask: Bool[np.ndarray, "H W"]
    kind: Kind


@dataclass(frozen=True)
class PlantedPrecision:
    """Average precision of planted anomalies.

    Attributes:
        value: Mean over anomalies; None if there are none.
        standard_error: Standard error of the mean; None with fewer than two groups.
        count: Number of anomalies.
        by_kind: Mean of each kind.
    """

    value: float | None
    standard_error: float | None
    count: int
    by_kind: dict[str, float]


def plant(
    normal: Image,
    donor: Shaped[np.ndarray, "h w C"],
    kind: Kind,
    size_px: int,
    window_px: int | None,
    rng: np.random.Generator,
) -> Planted:
    """Plant an anomaly at a random place of the foreground, and cut a window around it.

    Args:
        normal: Normal image.
        donor: Pixels of an image of the same channels, from which a foreign patch is taken.
        kind: Kind of the anomaly.
        size_px: Side of the patches of the model; the size of the anomaly is a fraction of it.
        window_px: Side of the window; None: the whole image.
        rng: Random numbers.

    Returns:
        Window with the anomaly.

    Raises:
        ValueError: If the image has no foreground, or the donor no finite pixel.
    """
    (y, x), radius = random_pixel(normal.foreground, rng), max(2.0, size_px * rng.uniform(*RADII))
    low, high = np.percentile(foreground_sample(normal), RANGE_PERCENTILES, axis=0)
    window = around((y, x), window_px or max(normal.foreground.shape), normal.foreground.shape)
    pixels, foreground = cut(normal.pixels, window).copy(), cut(normal.foreground, window)
    y, x = y - window.y, x - window.x
    near = around((y, x), 2 * math.ceil(REACH_RADII * radius + EDGE_PX) + 1, foreground.shape)
    centre = (y - near.y, x - near.x)
    place = Place(centre, radius, blob((near.height, near.width), centre, radius, rng))
    foreign = turned_onto(donor, random_pixel(finite(donor), rng), place.weight.shape, place.centre)
    inside = cut(pixels, near)
    inside[:] = as_dtype(change(kind, inside.astype(np.float64), place, high - low, foreign, rng), pixels.dtype)
    mask = np.zeros_like(foreground)
    cut(mask, near)[:] = (place.weight > 0.5) & cut(foreground, near)
    return Planted(Image(pixels, foreground), mask, kind)


def random_pixel(foreground: Bool[np.ndarray, "H W"], rng: np.random.Generator) -> tuple[int, int]:
    """Draw a pixel (y, x) of the foreground. Raises ValueError if there is none."""
    count = np.count_nonzero(foreground)
    if not count:
        raise ValueError("the foreground is empty; an anomaly needs a pixel of it as its centre")
    rows, columns = pixels_of_rank(foreground, rng.integers(count, size=1))
    return int(rows[0]), int(columns[0])


def foreground_sample(image: Image) -> Shaped[np.ndarray, "N C"]:
    """Foreground pixels in reading order; of more than `SAMPLE_PIXELS`, as many evenly spaced ones."""
    count = np.count_nonzero(image.foreground)
    ranks = np.linspace(0, count - 1, min(count, SAMPLE_PIXELS)).round().astype(np.int64)
    return image.pixels[pixels_of_rank(image.foreground, ranks)]


def pixels_of_rank(
    foreground: Bool[np.ndarray, "H W"], ranks: Int[np.ndarray, "N"]
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Find foreground pixels by their rank in reading order, without a list of all of them.

    Args:
        foreground: Foreground.
        ranks: Ranks from 0, ascending; at least one.

    Returns:
        Row and column of each.
    """
    counts = np.count_nonzero(foreground, axis=1)
    ends = counts.cumsum()
    rows = np.searchsorted(ends, ranks, side="right")
    in_row = np.split(ranks - (ends - counts)[rows], np.flatnonzero(np.diff(rows)) + 1)
    columns = [np.flatnonzero(foreground[row])[part] for row, part in zip(np.unique(rows), in_row, strict=True)]
    return rows, np.concatenate(columns)


def around(centre: tuple[int, int], side: int, shape: tuple[int, ...]) -> Window:
    """Window of this side that contains a pixel, as central as the image allows; at most the image."""
    height, width = min(side, shape[0]), min(side, shape[1])
    y, x = (
        int(np.clip(c - n // 2, 0, total - n)) for c, n, total in zip(centre, (height, width), shape[:2], strict=True)
    )
    return Window(y, x, height, width)


def cut(image: Shaped[np.ndarray, "H W *C"], window: Window) -> Shaped[np.ndarray, "h w *C"]:
    """Cut a window out of an image, without copying."""
    return image[window.y : window.y + window.height, window.x : window.x + window.width]


def blob(
    shape: tuple[int, int], centre: tuple[int, int], radius: float, rng: np.random.Generator
) -> Float[np.ndarray, "H W"]:
    """Draw an ellipse with soft edges.

    Args:
        shape: Height and width of the image.
        centre: Its centre (y, x).
        radius: Its longer half axis, px.
        rng: Random numbers for its direction and its shorter half axis, at least 0.6 of the longer.

    Returns:
        Weight of the anomaly in each pixel, 0 to 1.
    """
    angle, shorter = rng.uniform(0, np.pi), radius * rng.uniform(0.6, 1)
    y, x = np.ogrid[: shape[0], : shape[1]]
    y, x = y - centre[0], x - centre[1]
    along, across = np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y
    distance = np.hypot(along / radius, across / shorter)
    return np.clip((1 - distance) * shorter / EDGE_PX + 0.5, 0, 1)


def turned_onto(
    donor: Shaped[np.ndarray, "h w C"], source: tuple[int, int], shape: tuple[int, ...], target: tuple[int, int]
) -> Shaped[np.ndarray, "H W C"]:
    """Turn an image by 180 degrees and shift it so that one of its pixels lies on a target; borders are repeated.

    Args:
        donor: Image.
        source: Pixel (y, x) of the donor.
        shape: Height and width of the result.
        target: Pixel (y, x) of the result.

    Returns:
        The turned and shifted image.
    """
    rows, columns = (
        np.clip(s + t - np.arange(n), 0, total - 1)
        for s, t, n, total in zip(source, target, shape, donor.shape[:2], strict=True)
    )
    return donor[rows[:, None], columns]


def change(
    kind: Kind,
    pixels: Float[np.ndarray, "H W C"],
    place: Place,
    contrast: Float[np.ndarray, "C"],
    foreign: Shaped[np.ndarray, "H W C"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "H W C"]:
    """Change the pixels of an anomaly.

    Args:
        kind: bright, dark: adds or subtracts a constant; noise: adds noise; foreign: blends a patch of another image;
            warp: displaces the pixels.
        pixels: Pixels of the normal image.
        place: Place of the anomaly.
        contrast: Range of intensities in the normal foreground, by which constant and noise are scaled.
        foreign: Pixels of another image.
        rng: Random numbers.

    Returns:
        The changed pixels.
    """
    weight, strength = place.weight[..., None], contrast * np.exp(rng.uniform(*np.log(STRENGTHS)))
    match kind:
        case "bright":
            return pixels + weight * strength
        case "dark":
            return pixels - weight * strength
        case "noise":
            return pixels + weight * strength * smooth_noise(pixels.shape, rng)
        case "foreign":
            return pixels + weight * np.where(np.isfinite(foreign), foreign - pixels, 0)
        case "warp":
            return warped(pixels, place, rng)


def smooth_noise(shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "H W C"]:
    """Draw Gaussian noise on a grid of `NOISE_CELL_PX`, interpolated bilinearly."""
    height, width, channels = shape
    grid = rng.standard_normal((height // NOISE_CELL_PX + 2, width // NOISE_CELL_PX + 2, channels))
    return np.asarray(zoom(grid, (NOISE_CELL_PX, NOISE_CELL_PX, 1), order=1))[:height, :width]


def warped(pixels: Float[np.ndarray, "H W C"], place: Place, rng: np.random.Generator) -> Float[np.ndarray, "H W C"]:
    """Displace the inside of an anomaly by 0.5 to 1 radius in a random direction, less towards its edge.

    Args:
        pixels: Pixels.
        place: Place of the anomaly.
        rng: Random numbers.

    Returns:
        The displaced pixels.
    """
    angle, length = rng.uniform(0, 2 * np.pi), place.radius * rng.uniform(0.5, 1)
    y, x = np.indices(place.weight.shape)
    fade = place.weight * np.maximum(0, 1 - np.hypot(y - place.centre[0], x - place.centre[1]) / (1.5 * place.radius))
    places = (y + length * fade * np.sin(angle), x + length * fade * np.cos(angle))
    bands = [map_coordinates(pixels[..., c], places, order=1, mode="nearest") for c in range(pixels.shape[2])]
    return np.stack(bands, axis=-1)


def as_dtype(values: Float[np.ndarray, "H W C"], dtype: np.dtype) -> Shaped[np.ndarray, "H W C"]:
    """Convert to the dtype of an image, with rounding and clipping to the range of an integer type."""
    if not np.issubdtype(dtype, np.integer):
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)


def average_precision(scores: Float[np.ndarray, "H W"], mask: Bool[np.ndarray, "H W"]) -> float:
    """Compute the average precision of the pixels of an anomaly.

    Args:
        scores: Score map, NaN where not scored.
        mask: Pixels of the anomaly.

    Returns:
        Average precision over the scored pixels; NaN if none of them belongs to the anomaly.
    """
    scored = np.isfinite(scores)
    if not (scored & mask).any():
        return float("nan")
    return float(average_precision_score(mask[scored], scores[scored]))


def summarise(precisions: Sequence[float], kinds: Sequence[Kind], groups: Sequence[str]) -> PlantedPrecision:
    """Average the precision over anomalies.

    The standard error is that of a sample stratified by kind, whose anomalies are independent between groups only.

    Args:
        precisions: Average precision of each anomaly; NaN is left out.
        kinds: Kind of each anomaly.
        groups: Group, such as the patient, of the image of each anomaly.

    Returns:
        Mean, its standard error, and the mean of each kind.
    """
    table = [row for row in zip(precisions, kinds, groups, strict=True) if np.isfinite(row[0])]
    values, kinds_of = np.array([row[0] for row in table]), [row[1] for row in table]
    by_kind = {kind: float(values[[k == kind for k in kinds_of]].mean()) for kind in dict.fromkeys(kinds_of)}
    if not table:
        return PlantedPrecision(None, None, 0, {})
    deviations = values - [by_kind[kind] for kind in kinds_of]
    names = sorted({row[2] for row in table})
    sums = np.array([deviations[[row[2] == name for row in table]].sum() for name in names])
    n = len(names)
    error = float(np.sqrt(n / (n - 1) * (sums**2).sum()) / len(table)) if n > 1 else None
    return PlantedPrecision(float(values.mean()), error, len(table), by_kind)
