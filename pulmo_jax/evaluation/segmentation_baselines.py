"""Trivial baselines of segmentation, which a trained network must outperform: mean mask, intensity range, and ridge
regression on pixels.

They are fitted in one pass over the training images, to a random sample of the labelled pixels in which every class
that an image has is represented; weights restore the true frequencies and give every image the same total. Images are
reduced to at most 256 px per side. C channels, K classes, n sampled pixels, F features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64, Num, UInt8
from scipy.ndimage import gaussian_filter, map_coordinates
from sklearn.model_selection import GroupKFold

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.data.transforms import resize_bands
from pulmo_jax.evaluation.segmentation_calibration import middle_of_highest
from pulmo_jax.evaluation.segmentation_metrics import BINS, ratio

SIDE = 256  # px; larger images are reduced
GRID = 64  # cells per side of the mean mask
PIXELS, PIXELS_PER_IMAGE = 400_000, 2000  # most sampled pixels in total, and of an image
LEVELS = 64  # quantiles of the intensity among which the limits of a range are chosen
SMOOTHING = (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16)  # sd of the Gaussians, as a fraction of the longer side
ROUGHNESS = (1 / 128, 1 / 32)  # the same for the local standard deviation
WAVES = 6  # cosines of the position in y and in x
MOST_CHANNELS = 4  # images of more channels are represented by mean and sd over their channels
BLOCK = 10_000  # pixels whose terms are in memory at once
STRENGTHS = tuple(10.0**power for power in range(-6, 2))  # of the ridge, relative to a weight of 1 per image
Example = tuple[Num[np.ndarray, "_ _ C"], UInt8[np.ndarray, "_ _"]]


@dataclass(frozen=True)
class MeanMask:
    """The mean of the training masks, stretched to the image.

    Attributes:
        grid: Frequency of each class on a grid of relative positions.
        thresholds: Thresholds of the highest mean Dice on the training images.
    """

    grid: Float32[np.ndarray, "G G K"]
    thresholds: Float64[np.ndarray, "K"]

    def probabilities(self, pixels: Num[np.ndarray, "H W C"]) -> Float32[np.ndarray, "H W K"]:
        """Compute the probability of each class, whatever the values of the pixels."""
        return resize_bands(self.grid, *pixels.shape[:2])


@dataclass(frozen=True)
class IntensityRange:
    """For each class, the range of intensities in one channel with the highest mean Dice on the training images.

    Attributes:
        channel: Channel of each class.
        low: Lowest intensity, inclusive.
        high: Highest intensity, exclusive.
        thresholds: 0.5, since the probabilities are 0 and 1.
    """

    channel: Int64[np.ndarray, "K"]
    low: Float64[np.ndarray, "K"]
    high: Float64[np.ndarray, "K"]
    thresholds: Float64[np.ndarray, "K"]

    def probabilities(self, pixels: Num[np.ndarray, "H W C"]) -> Float32[np.ndarray, "H W K"]:
        """Return 1 for pixels within the range of a class, otherwise 0."""
        values = pixels[..., self.channel]
        return ((values >= self.low) & (values < self.high)).astype(np.float32)


@dataclass(frozen=True)
class PixelRidge:
    """Ridge regression of the memberships on features of the pixels, their products, and the position.

    Attributes:
        mean: Mean of each feature.
        scale: Standard deviation of each feature.
        coefficients: Coefficients of the `terms`.
        strength: Penalty, chosen by cross-validation over groups.
        thresholds: Thresholds of the highest mean Dice on the training images.
    """

    mean: Float64[np.ndarray, "F"]
    scale: Float64[np.ndarray, "F"]
    coefficients: Float64[np.ndarray, "Q K"]
    strength: float
    thresholds: Float64[np.ndarray, "K"]

    def probabilities(self, pixels: Num[np.ndarray, "H W C"]) -> Float32[np.ndarray, "H W K"]:
        """Compute the regression at every pixel of the reduced image, limited to 0 and 1."""
        maps = feature_maps(reduced(pixels))
        rows = [regress(row, self.mean, self.scale, self.coefficients) for row in maps]  # bounds the memory
        return resize_bands(np.stack(rows).astype(np.float32), *pixels.shape[:2])


@dataclass(frozen=True)
class Sample:
    """Labelled pixels of the training images.

    Attributes:
        place: Relative y and x of each pixel, 0 to 1.
        values: Intensities.
        features: Features of the ridge regression.
        truth: Memberships in the classes.
        weights: Weights; those of an image sum to 1.
        image: Index of the image.
    """

    place: Float64[np.ndarray, "n 2"]
    values: Float64[np.ndarray, "n C"]
    features: Float64[np.ndarray, "n F"]
    truth: Float64[np.ndarray, "n K"]
    weights: Float64[np.ndarray, "n"]
    image: Int64[np.ndarray, "n"]


Baseline = MeanMask | IntensityRange | PixelRidge


def fit_baselines(
    examples: Iterable[Example], groups: Sequence[str], classes: Classes, seed: int
) -> dict[str, Baseline]:
    """Fit all baselines to training images.

    Args:
        examples: Images and the codes of their pixels (see `data.codes`), in the order of the groups; read once.
        groups: Group of each image.
        classes: The classes.
        seed: Seed of the sampled pixels.

    Returns:
        The baselines `mean_mask`, `threshold` and `ridge`.

    Raises:
        ValueError: If no pixel of the training images is labelled.
    """
    count = int(np.clip(PIXELS // max(1, len(groups)), 50, PIXELS_PER_IMAGE))
    total, known = np.zeros((GRID, GRID, len(classes))), np.zeros((GRID, GRID, 1))
    samples = []
    for image, (pixels, codes) in enumerate(examples):
        labelled = (codes != UNLABELLED) & np.isfinite(pixels).all(-1)
        if not labelled.any():
            continue
        truth = classes.memberships[np.where(labelled, codes, UNLABELLED)]
        total += resize_bands(truth, GRID, GRID)
        known += resize_bands(labelled[..., None].astype(np.float32), GRID, GRID)
        samples.append(_sample(pixels, codes, labelled, classes, image, count, seed))
    if not samples:
        raise ValueError("no pixel of the training images is labelled")
    names = list(Sample.__dataclass_fields__)
    sample = Sample(*(np.concatenate([getattr(s, name) for s in samples]) for name in names))
    return {
        "mean_mask": fit_mean_mask(total, known, sample),
        "threshold": fit_range(sample),
        "ridge": fit_ridge(sample, groups),
    }


def fit_mean_mask(total: Float64[np.ndarray, "G G K"], known: Float64[np.ndarray, "G G 1"], sample: Sample) -> MeanMask:
    """Fit the mean mask.

    Args:
        total: Sum of the training masks on the grid.
        known: Sum of the labelled areas on the grid.
        sample: Labelled pixels.

    Returns:
        The mean mask; 0 in cells without a labelled pixel.
    """
    grid = np.divide(total, known, out=np.zeros_like(total), where=known > 1e-6).clip(0, 1).astype(np.float32)
    at = (sample.place * GRID - 0.5).T
    fitted = np.stack([map_coordinates(band, at, order=1, mode="nearest") for band in np.moveaxis(grid, -1, 0)], 1)
    return MeanMask(grid, highest_dice(fitted, sample))


def fit_range(sample: Sample) -> IntensityRange:
    """Choose the channel and the range of intensities with the highest mean Dice for each class.

    Args:
        sample: Labelled pixels.

    Returns:
        The ranges.
    """
    best = [max(_ranges(sample, k), key=lambda found: found[0])[1:] for k in range(sample.truth.shape[1])]
    channel, low, high = zip(*best, strict=True)
    return IntensityRange(np.array(channel), np.array(low), np.array(high), np.full(len(best), 0.5))


def fit_ridge(sample: Sample, groups: Sequence[str]) -> PixelRidge:
    """Fit the ridge regression, with the strength that predicts held-out groups best.

    Args:
        sample: Labelled pixels.
        groups: Group of each image.

    Returns:
        The regression. With a single group the strength is the lowest.
    """
    weights = sample.weights
    mean = np.average(sample.features, axis=0, weights=weights)
    deviation = np.sqrt(np.average((sample.features - mean) ** 2, axis=0, weights=weights))
    scale = np.where(deviation > 0, deviation, 1)
    moments = [_moments(sample, rows, mean, scale) for rows in _folds(sample, groups)]
    gram, cross, _ = _sum(moments)
    strength = STRENGTHS[0]
    if len(moments) > 1:
        strength = min(STRENGTHS, key=lambda s: sum(_held_out_error(gram, cross, m, s) for m in moments))
    coefficients = _solve(gram, cross, strength)
    blocks = np.array_split(sample.features, 1 + len(weights) // BLOCK)
    fitted = np.concatenate([regress(block, mean, scale, coefficients) for block in blocks])
    return PixelRidge(mean, scale, coefficients, strength, highest_dice(fitted, sample))


def highest_dice(fitted: Num[np.ndarray, "n K"], sample: Sample) -> Float64[np.ndarray, "K"]:
    """Threshold of the highest mean Dice over the training images, for each class.

    Args:
        fitted: Fitted probabilities of the sampled pixels.
        sample: Labelled pixels.

    Returns:
        Thresholds; 1 for a class without pixels.
    """
    bins = np.clip((fitted * BINS).astype(np.intp), 0, BINS - 1)
    curves = [_mean_dice(*_histograms(bins[:, k], sample, k, BINS)) for k in range(fitted.shape[1])]
    found = middle_of_highest(np.stack(curves)[:, 1:])
    return np.where(sample.truth.any(0) & np.isfinite(found), found, 1.0)


def feature_maps(pixels: Float32[np.ndarray, "H W C"]) -> Float32[np.ndarray, "H W F"]:
    """Features of the ridge regression at every pixel.

    Args:
        pixels: Image without missing values.

    Returns:
        For each channel the intensity, its Gaussian means and local standard deviations; then relative y and x.
    """
    if pixels.shape[2] > MOST_CHANNELS:
        pixels = np.stack([pixels.mean(-1), pixels.std(-1)], axis=-1)
    height, width = pixels.shape[:2]
    side = max(height, width)
    y, x = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in (height, width))
    maps = []
    for band in np.moveaxis(pixels, -1, 0):
        centred = band - band.mean()  # keeps the variance from cancelling
        maps += [band, *(gaussian_filter(band, s * side, mode="nearest") for s in SMOOTHING)]
        for s in ROUGHNESS:
            first, second = (gaussian_filter(v, s * side, mode="nearest") for v in (centred, centred**2))
            maps.append(np.sqrt(np.maximum(second - first**2, 0)))
    return np.stack([*maps, *np.meshgrid(y, x, indexing="ij")], axis=-1)


def reduced(pixels: Num[np.ndarray, "H W C"]) -> Float32[np.ndarray, "h w C"]:
    """The image with at most 256 px per side; missing values become the median of their channel."""
    image = pixels.astype(np.float32)
    missing = ~np.isfinite(image)
    if missing.any():
        bands = np.where(missing, np.nan, image).reshape(-1, image.shape[2])
        medians = [np.median(b[np.isfinite(b)]) if np.isfinite(b).any() else 0.0 for b in bands.T]
        image = np.where(missing, np.array(medians, np.float32), image)
    return resize_bands(image, *_reduced_shape(pixels.shape[:2]))


def terms(
    features: Num[np.ndarray, "n F"], mean: Float64[np.ndarray, "F"], scale: Float64[np.ndarray, "F"]
) -> Float64[np.ndarray, "n Q"]:
    """Terms of the ridge regression.

    Args:
        features: Features of n pixels, the last two being relative y and x.
        mean: Mean of each feature.
        scale: Standard deviation of each feature.

    Returns:
        A constant, the standardised features, the products of each two, and cosines cos(pi i y) cos(pi j x) of the
        position, which describe the mean mask coarsely.
    """
    standard = (features - mean) / scale
    first, second = np.triu_indices(features.shape[1])
    y, x = (np.cos(np.pi * np.arange(WAVES) * place[:, None]) for place in features[:, -2:].T.astype(np.float64))
    waves = (y[:, :, None] * x[:, None, :]).reshape(len(features), -1)  # the first is the constant
    return np.concatenate([waves[:, :1], standard, standard[:, first] * standard[:, second], waves[:, 1:]], axis=1)


def regress(
    features: Num[np.ndarray, "n F"],
    mean: Float64[np.ndarray, "F"],
    scale: Float64[np.ndarray, "F"],
    coefficients: Float64[np.ndarray, "Q K"],
) -> Float64[np.ndarray, "n K"]:
    """Evaluate the ridge regression, limited to 0 and 1."""
    return np.clip(terms(features, mean, scale) @ coefficients, 0, 1)


def _reduced_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = (max(1, round(n * min(1, SIDE / max(shape)))) for n in shape)
    return height, width


def _sample(
    pixels: np.ndarray, codes: np.ndarray, labelled: np.ndarray, classes: Classes, image: int, count: int, seed: int
) -> Sample:
    """Random labelled pixels of one image, equally many of each code as far as they go."""
    full, small = np.array(codes.shape), np.array(_reduced_shape(codes.shape))
    rng = np.random.default_rng([seed, image])
    flat = np.where(labelled, codes, UNLABELLED).ravel()
    present = np.flatnonzero(np.bincount(flat, minlength=256)[:UNLABELLED])
    chosen, weights = [], []
    for code in present:
        of_code = np.flatnonzero(flat == code)
        drawn = rng.choice(of_code, min(of_code.size, max(1, count // len(present))), replace=False)
        chosen.append(drawn)
        weights.append(np.full(drawn.size, of_code.size / drawn.size / np.count_nonzero(labelled)))
    index = np.concatenate(chosen)
    place = np.stack(np.unravel_index(index, codes.shape), axis=1)
    y, x = (place * small // full).T
    return Sample(
        place=(place + 0.5) / full,
        values=pixels.reshape(-1, pixels.shape[2])[index].astype(np.float64),
        features=feature_maps(reduced(pixels))[y, x].astype(np.float64),
        truth=classes.memberships[flat[index]].astype(np.float64),
        weights=np.concatenate(weights),
        image=np.full(index.size, image),
    )


def _histograms(
    bins: Int64[np.ndarray, "n"], sample: Sample, k: int, n_bins: int
) -> tuple[Float64[np.ndarray, "N bins"], Float64[np.ndarray, "N bins"]]:
    """Weight of the pixels of each image outside and inside class k, by bin."""
    images, image = np.unique(sample.image, return_inverse=True)
    cell, size = image * n_bins + bins, images.size * n_bins
    inside, total = (np.bincount(cell, w, size) for w in (sample.weights * sample.truth[:, k], sample.weights))
    return (total - inside).reshape(-1, n_bins), inside.reshape(-1, n_bins)


def _mean_dice(outside: Float64[np.ndarray, "N bins"], inside: Float64[np.ndarray, "N bins"]) -> np.ndarray:
    """Mean Dice over images of the pixels in bin j or higher, for every j."""
    fp, tp = (np.cumsum(h[:, ::-1], axis=1)[:, ::-1] for h in (outside, inside))
    return _mean_of_defined(2 * tp, tp + fp + tp[:, :1])


def _mean_of_defined(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Mean over the first axis of a ratio, of the images in which it is defined."""
    values = ratio(numerator, np.where(denominator > 1e-12, denominator, 0))
    return ratio(np.nansum(values, 0), np.isfinite(values).sum(0).astype(np.float64))


def _ranges(sample: Sample, k: int) -> list[tuple[float, int, float, float]]:
    """For each channel: the highest mean Dice of a range for class k, the channel, and the limits of the range."""
    found = []
    for channel, values in enumerate(sample.values.T):
        inner = np.unique(np.quantile(values, np.linspace(0, 1, LEVELS + 1)[1:-1]))
        edges = np.concatenate([[-np.inf], inner, [np.inf]])
        bins = np.searchsorted(inner, values, side="right")
        outside, inside = (
            np.pad(np.cumsum(h, 1), ((0, 0), (1, 0))) for h in _histograms(bins, sample, k, inner.size + 1)
        )
        start, stop = np.triu_indices(edges.size, 1)
        tp, fp = inside[:, stop] - inside[:, start], outside[:, stop] - outside[:, start]
        dice = np.nan_to_num(_mean_of_defined(2 * tp, tp + fp + inside[:, -1:]))
        best = int(dice.argmax())
        found.append((float(dice[best]), channel, float(edges[start[best]]), float(edges[stop[best]])))
    return found


Moments = tuple[Float64[np.ndarray, "Q Q"], Float64[np.ndarray, "Q K"], float]


def _folds(sample: Sample, groups: Sequence[str]) -> list[Int64[np.ndarray, "_"]]:
    """Pixels of each of up to five folds of groups; all pixels at once if there is a single group."""
    member, rows = np.array(groups, str)[sample.image], np.arange(sample.image.size)
    n_folds = min(5, np.unique(member).size)
    return [rows] if n_folds < 2 else [test for _, test in GroupKFold(n_folds).split(rows, groups=member)]


def _moments(
    sample: Sample, rows: Int64[np.ndarray, "m"], mean: Float64[np.ndarray, "F"], scale: Float64[np.ndarray, "F"]
) -> Moments:
    """Weighted second moments of some pixels: X'WX, X'WY and the trace of Y'WY."""
    parts = []
    for block in np.array_split(rows, 1 + rows.size // BLOCK):
        X, Y = terms(sample.features[block], mean, scale), sample.truth[block]
        weighted = X * sample.weights[block, None]
        parts.append((weighted.T @ X, weighted.T @ Y, float(sample.weights[block] @ (Y**2).sum(1))))
    return _sum(parts)


def _sum(parts: Sequence[Moments]) -> Moments:
    """Moments of all pixels from those of disjoint parts."""
    gram, cross, square = zip(*parts, strict=True)
    return np.sum(gram, axis=0), np.sum(cross, axis=0), float(np.sum(square))


def _solve(gram: np.ndarray, cross: np.ndarray, strength: float) -> Float64[np.ndarray, "Q K"]:
    """Ridge coefficients; the constant is not penalised. The penalty is relative to the total weight of the pixels."""
    penalty = np.full(len(gram), strength * gram[0, 0])
    penalty[0] = 0
    return np.linalg.solve(gram + np.diag(penalty), cross)


def _held_out_error(gram: np.ndarray, cross: np.ndarray, held_out: Moments, strength: float) -> float:
    """Squared error on the held-out pixels of the regression fitted to all others."""
    own_gram, own_cross, own_square = held_out
    B = _solve(gram - own_gram, cross - own_cross, strength)
    return float(np.sum(B * (own_gram @ B)) - 2 * np.sum(B * own_cross) + own_square)
