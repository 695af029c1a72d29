"""Predictions of labelled images by the networks that were not trained on them, with trivial baselines."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Num

from pulmo_jax.data.codes import UNLABELLED, Classes
from pulmo_jax.data.folds import Fold
from pulmo_jax.evaluation.segmentation_baselines import Baseline, fit_baselines
from pulmo_jax.evaluation.segmentation_metrics import ImageScores, image_figures, row_names, score_image
from pulmo_jax.inference.class_maps import class_masks
from pulmo_jax.tasks.segmentation.config import SegmentationEvaluationConfig
from pulmo_jax.tasks.segmentation.data import Labelled
from pulmo_jax.tasks.segmentation.figures import Example
from pulmo_jax.tasks.segmentation.run import SegmentationRun
from pulmo_jax.types import InputError

BASELINE_NAMES = {"mean_mask": "mean mask", "threshold": "intensity range", "ridge": "ridge on pixels"}
Track = Callable[[Iterable[int], int], Iterable[int]]


@dataclass(frozen=True)
class Tested:
    """Scores of labelled images.

    Attributes:
        labelled: The images, N of them.
        weights: Weight of each network in the prediction of each image.
        scores: Scores of the images by method, the run first, then baselines.
        folds: Fold in which each image was tested.
    """

    labelled: Labelled
    weights: Float[np.ndarray, "N M"]
    scores: Mapping[str, Sequence[ImageScores]]
    folds: Int[np.ndarray, "N"]

    @property
    def own(self) -> Sequence[ImageScores]:
        """Scores of the run."""
        return next(iter(self.scores.values()))

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows of the scores."""
        return row_names(self.labelled.classes)

    @property
    def dice(self) -> Float[np.ndarray, "N L"]:
        """Dice of the run for each image and row; NaN where undefined."""
        return image_figures(self.own)["dice"]

    @property
    def mean_dice(self) -> Float[np.ndarray, "N"]:
        """Dice of the run for each image, mean over the classes in which it is defined; NaN where it is in none."""
        return mean_of_defined(self.dice[:, : len(self.labelled.classes)])


def mean_of_defined(values: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N"]:
    """Mean of each row over its values that are not NaN; NaN if there are none."""
    known = np.isfinite(values)
    count = known.sum(1)
    return np.divide(np.where(known, values, 0).sum(1), count, out=np.full(len(values), np.nan), where=count > 0)


def method_name(run: SegmentationRun) -> str:
    """Class name of the method."""
    return run.config.method["_target_"].rpartition(".")[2]


def allowed_networks(
    run: SegmentationRun, contents: Sequence[str]
) -> tuple[Bool[np.ndarray, "N M"], Bool[np.ndarray, "N"]]:
    """Determine which networks may predict which image: those not trained, selected or calibrated on its file.

    Args:
        run: Opened run.
        contents: SHA-256 of the files of N images.

    Returns:
        Whether each of M networks may predict each image, and whether the image belongs to the run.
    """
    count = len(run.mapper.networks)
    unseen: dict[str, set[int]] = {}
    for image in run.images:  # pages of a file share its content
        known = set(image["unseen_by"])
        unseen[image["content"]] = unseen.get(image["content"], known) & known
    allowed = np.array([np.isin(np.arange(count), list(unseen.get(c, range(count)))) for c in contents])
    return allowed.reshape(len(contents), count), np.array([c in unseen for c in contents], bool)


def thresholds_of(run: SegmentationRun, weights: Float[np.ndarray, "M"]) -> tuple[float, ...]:
    """Thresholds for the mean of some networks: those of their folds, averaged.

    Args:
        run: Calibrated run.
        weights: Weight of each network.

    Returns:
        Threshold of each class. No fold enters whose networks do not, so none was chosen on the image.
    """
    folds = dict.fromkeys(run.networks.fold_of(network) for network in np.flatnonzero(weights).tolist())
    return tuple(np.mean([run.calibration.of_fold(fold) for fold in folds], axis=0).tolist())


def test_images(
    run: SegmentationRun,
    labelled: Labelled,
    weights: Float[np.ndarray, "N M"],
    folds: Int[np.ndarray, "N"],
    baselines: Sequence[Mapping[str, Baseline]],
    options: SegmentationEvaluationConfig,
    track: Track,
) -> Tested:
    """Predict and score labelled images one after the other, by the run and by the baselines of a fold.

    Args:
        run: Calibrated run.
        labelled: N labelled images.
        weights: Weight of each network in the prediction of each image.
        folds: Fold whose baselines predict each image.
        baselines: Baselines of each fold; empty: none.
        options: Options of the evaluation.
        track: Shows the progress (see `console.tracker`).

    Returns:
        The scores.
    """
    own: list[ImageScores] = []
    others: dict[str, list[ImageScores]] = {name: [] for name in (baselines[0] if baselines else ())}
    for row in track(range(len(labelled.refs)), len(labelled.refs)):
        pixels, codes = labelled.reader.image(labelled.refs[row]), labelled.labels.codes(labelled.refs[row])

        def scored(p: np.ndarray, thresholds: Sequence[float], codes: np.ndarray = codes) -> ImageScores:
            predicted = class_masks(p, thresholds, labelled.classes)
            least = run.config.calibration.min_area_px
            spaced: dict[str, Any] = {"tolerance": options.tolerance_px, "min_area_px": least}
            return score_image(p, predicted, codes, labelled.classes, **spaced)

        own.append(scored(run.mapper.probabilities(pixels, weights[row].tolist()), thresholds_of(run, weights[row])))
        for name, of_baseline in others.items():
            baseline = baselines[folds[row]][name]
            of_baseline.append(scored(baseline.probabilities(pixels), baseline.thresholds.tolist()))
    named = {BASELINE_NAMES.get(name, name): of_baseline for name, of_baseline in others.items()}
    return Tested(labelled, weights, {method_name(run): own, **named}, folds)


def fold_baselines(labelled: Labelled, folds: Sequence[Fold], classes: Classes, seed: int) -> list[dict[str, Baseline]]:
    """Fit the baselines of each fold to its training and validation images.

    Args:
        labelled: Labelled images.
        folds: Their folds.
        classes: The classes.
        seed: Seed of the sampled pixels.

    Returns:
        Baselines of each fold.
    """
    return [baselines_of(labelled, np.concatenate(fold[:2]), classes, seed) for fold in folds]


def baselines_of(labelled: Labelled, rows: Int[np.ndarray, "n"], classes: Classes, seed: int) -> dict[str, Baseline]:
    """Fit the baselines to some images, which are read one after the other."""

    def examples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for row in rows.tolist():
            yield labelled.reader.image(labelled.refs[row]), labelled.labels.codes(labelled.refs[row])

    return fit_baselines(examples(), [labelled.groups[row] for row in rows.tolist()], classes, seed)


def example(run: SegmentationRun, tested: Tested, row: int) -> Example:
    """Predict an image again, for a figure.

    Args:
        run: Calibrated run.
        tested: Tested images.
        row: Index of the image.

    Returns:
        The image with truth and prediction.

    Raises:
        InputError: If the image cannot be read.
    """
    labelled, classes = tested.labelled, tested.labelled.classes
    ref = labelled.refs[row]
    pixels, codes = labelled.reader.image(ref), labelled.labels.codes(ref)
    p = run.mapper.probabilities(pixels, tested.weights[row].tolist())
    values = zip(classes.names, tested.dice[row], strict=False)
    dice = ", ".join(f"{name} {value:.3f}" for name, value in values if np.isfinite(value))
    return Example(
        title=f"{ref.title}: {dice}",
        image=shown(pixels),
        truth=classes.memberships[codes].astype(bool),
        predicted=class_masks(p, thresholds_of(run, tested.weights[row]), classes),
        labelled=(codes != UNLABELLED) & np.isfinite(p).all(-1),
    )


def shown(pixels: Num[np.ndarray, "H W C"]) -> Float32[np.ndarray, "H W _"]:
    """Grey or colour image with its percentiles 0.5 and 99.5 at 0 and 1; missing pixels are 0.

    Args:
        pixels: Image (H, W, C).

    Returns:
        Float32 (H, W, 3) for three bands, otherwise their mean (H, W, 1).
    """
    values = pixels.astype(np.float32)
    values = values if values.shape[2] == 3 else values.mean(2, keepdims=True)
    known = values[np.isfinite(values)]
    if not known.size:
        raise InputError("the image has no valid pixels")
    low, high = np.percentile(known[:: max(1, known.size // 10**6)], (0.5, 99.5)).astype(np.float32)
    return np.nan_to_num((values - low) / max(high - low, np.float32(1e-30)), nan=0, posinf=1, neginf=0)
