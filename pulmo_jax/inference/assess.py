"""Calibration on normal images and assessment on labelled images, with the same scorer as prediction.

Images are processed one at a time; the data stored per image are bounded.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Shaped

from pulmo_jax.core.histogram import ScoreHistogram
from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.mask_files import find_masks
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.sources import image_suffixes
from pulmo_jax.evaluation.calibration import OWN, Calibration, Calibrator
from pulmo_jax.evaluation.metrics import PixelMetrics
from pulmo_jax.inference.baselines import BASELINES, baseline_image_score
from pulmo_jax.inference.image_rating import image_statistic_of, own_score, rate_image
from pulmo_jax.inference.score import Scorer
from pulmo_jax.types import ImageStatistic, InputError, ProgressTracker

METHOD = "method"


@dataclass(frozen=True)
class Truth:
    """Ground truth of a test image.

    Attributes:
        abnormal: Whether the image is abnormal.
        mask: Mask of the lesions, where available.
    """

    abnormal: bool
    mask: Bool[np.ndarray, "H W"] | None = None


@dataclass(frozen=True)
class Assessment:
    """Scores and ground truth of labelled images, by score name (`METHOD` and the baselines).

    Attributes:
        pixels: Pixel metrics of each score; None if no image has pixel-level ground truth.
        image_scores: Image scores of each score, one entry per scored image.
        abnormal: Whether each scored image is abnormal.
        groups: Group of each scored image.
        peak_in_lesion: Number of images whose highest pixel lies in a lesion, and number of images with lesions.
        refs: Scored images.
        unscored: Titles of images without any score.
        truths: SHA-256 of the mask of each scored image; "" without findings or without a mask.
        statistics: Image score of each scored image by every statistic of the method's score map and by their
            combination.
    """

    pixels: dict[str, PixelMetrics] | None
    image_scores: dict[str, list[float]]
    abnormal: list[bool]
    groups: list[str]
    peak_in_lesion: tuple[int, int]
    refs: list[ImageRef]
    unscored: list[str] = field(default_factory=list)
    truths: list[str] = field(default_factory=list)
    statistics: dict[ImageStatistic, list[float]] = field(default_factory=dict)


def calibrate(
    scorer: Scorer,
    refs: Sequence[ImageRef],
    reader: Reader,
    pixel_rate: float,
    image_rate: float,
    seed: int,
    track: ProgressTracker,
) -> dict[str, Calibration]:
    """Calibrate the method and all baselines on normal images.

    Args:
        scorer: Scorer of the run.
        refs: Normal validation images.
        reader: Image reader.
        pixel_rate: False-alarm rate per pixel.
        image_rate: False-alarm rate per image.
        seed: Seed of the bootstrap weights.
        track: Progress display.

    Returns:
        Calibration by score name.
    """
    start = Calibrator(pixels=ScoreHistogram.empty(seed=seed))
    calibrators = dict.fromkeys((METHOD, *BASELINES), start)
    for ref in track(refs, len(refs)):
        pixels, foreground = reader.image(ref), reader.foreground(ref)
        method, baselines = all_scores(scorer, pixels, foreground, ref.scale)
        image_score = own_score(scorer.method, method)
        calibrators[METHOD] = calibrators[METHOD].add(method, None, image_score, ref.group, statistics=True)
        for name, scores in baselines.items():
            calibrators[name] = calibrators[name].add(scores, None, baseline_image_score(scores), ref.group)
    statistic = image_statistic_of(scorer.method)
    return {
        name: calibrator.finish(pixel_rate, image_rate, statistic if name == METHOD else OWN)
        for name, calibrator in calibrators.items()
    }


def assess(
    scorer: Scorer,
    calibrations: Mapping[str, Calibration],
    refs: Sequence[ImageRef],
    get_truth: Callable[[ImageRef], Truth],
    reader: Reader,
    *,
    lesion_sizes_px: Sequence[int],
    replicates: int,
    seed: int,
    track: ProgressTracker,
) -> Assessment:
    """Score labelled images and collect the data for the figures of merit.

    Args:
        scorer: Scorer of the run.
        calibrations: Calibration by score name.
        refs: Test images.
        get_truth: Function that returns the ground truth of an image.
        reader: Image reader.
        lesion_sizes_px: Areas that separate the size classes of lesions, in pixels.
        replicates: Number of bootstrap replicates.
        seed: Seed of the bootstrap weights.
        track: Progress display.

    Returns:
        Scores and ground truth.
    """
    pixel_metrics: dict[str, PixelMetrics] = {
        name: PixelMetrics.empty(c.pixel_threshold.value, lesion_sizes_px, replicates=replicates, seed=seed)
        for name, c in calibrations.items()
    }
    image_scores: dict[str, list[float]] = {name: [] for name in calibrations}
    statistics: dict[ImageStatistic, list[float]] = {}
    abnormal, scored, unscored, truths = [], [], [], []
    with_masks, hits, lesions = False, 0, 0
    for ref in track(refs, len(refs)):
        pixels, foreground, truth = reader.image(ref), reader.foreground(ref), get_truth(ref)
        scores, baselines = all_scores(scorer, pixels, foreground, ref.scale)
        if not np.isfinite(scores).any():
            unscored.append(ref.title)
            continue
        rating = rate_image(scorer.method, calibrations[METHOD], scores)
        image_scores[METHOD].append(rating.score)
        for statistic, value in rating.scores.items():
            statistics.setdefault(statistic, []).append(value)
        for name, score_map in baselines.items():
            image_scores[name].append(baseline_image_score(score_map))
        if truth.mask is not None:
            for name, score_map in {METHOD: scores, **baselines}.items():
                pixel_metrics[name] = pixel_metrics[name].add(score_map, truth.mask, None, ref.group)
        abnormal.append(truth.abnormal)
        scored.append(ref)
        truths.append(digest_of(truth.mask))
        if truth.mask is not None:
            with_masks = True
            if truth.mask.any():
                lesions += 1
                hits += bool(truth.mask[np.unravel_index(np.nanargmax(scores), scores.shape)])
    groups = [ref.group for ref in scored]
    return Assessment(
        pixel_metrics if with_masks else None,
        image_scores,
        abnormal,
        groups,
        (hits, lesions),
        scored,
        unscored,
        truths,
        statistics,
    )


def digest_of(mask: Bool[np.ndarray, "H W"] | None) -> str:
    """SHA-256 of a mask with findings; "" for none."""
    return "" if mask is None or not mask.any() else hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def choose_examples(assessment: Assessment, count: int) -> dict[str, list[ImageRef]]:
    """Select example images.

    Args:
        assessment: Assessment of the test images.
        count: Maximum number of images of each kind.

    Returns:
        Images under "hits" (abnormal, highest scores), "misses" (abnormal, lowest scores) and "false_alarms" (normal,
        highest scores).
    """
    order = np.argsort(assessment.image_scores[METHOD])
    abnormal = [assessment.refs[i] for i in order if assessment.abnormal[i]]
    normal = [assessment.refs[i] for i in order if not assessment.abnormal[i]]
    return {"hits": abnormal[::-1][:count], "misses": abnormal[:count], "false_alarms": normal[::-1][:count]}


def all_scores(
    scorer: Scorer, pixels: Shaped[np.ndarray, "H W C"], foreground: Bool[np.ndarray, "H W"] | None, scale: str = ""
) -> tuple[Float[np.ndarray, "H W"], dict[str, Float[np.ndarray, "H W"]]]:
    """Compute the score maps of the method and of all baselines.

    Args:
        scorer: Scorer of the run.
        pixels: Image (H, W, C).
        foreground: Foreground (H, W); None: all pixels.
        scale: The dtype whose range the intensities have; "" for that of `pixels`.

    Returns:
        Score map of the method, and those of the baselines by name.
    """
    maps = {name: baseline(pixels, foreground, scorer.how) for name, baseline in BASELINES.items()}
    return scorer(pixels, foreground, scale), maps


def truth_by_masks(
    refs: Sequence[ImageRef], folder: Path, normal_name: str, reader: Reader
) -> Callable[[ImageRef], Truth]:
    """Ground truth from masks of the same name; non-zero pixels are lesions.

    Args:
        refs: Test images.
        folder: Folder of the masks.
        normal_name: Subfolder of normal images, which need no mask.
        reader: Image reader.

    Returns:
        Function from an image to its ground truth.

    Raises:
        InputError: If a mask is missing.
    """
    mask_files = find_masks(folder, sorted({ref.name for ref in refs}), image_suffixes(reader.formats), refs[0].folder)
    masked = {ref.title: replace(ref, mask=mask_files[ref.name]) for ref in refs}
    for ref in masked.values():
        if ref.mask is None and not _is_normal(ref, normal_name):
            raise InputError(
                f"{folder}/{ref.name}: mask not found, with this or any other image suffix; add it (all zero for a "
                f"normal image), or move the image to a subfolder {normal_name}"
            )

    def get_truth(ref: ImageRef) -> Truth:
        mask = reader.foreground(masked[ref.title])
        mask = np.zeros(ref.shape[:2], bool) if mask is None else mask
        return Truth(bool(mask.any()), mask)

    return get_truth


def truth_by_folder(refs: Sequence[ImageRef], folder: Path, normal_name: str) -> Callable[[ImageRef], Truth]:
    """Ground truth from the top-level folder of each image.

    Args:
        refs: Test images.
        folder: Folder of the test images. If the folder itself has the name of the normal class, all its images are
            normal and only false-alarm rates are measured.
        normal_name: Name of the normal class.

    Returns:
        Function from an image to its ground truth.

    Raises:
        InputError: If no subfolder is the normal class, or an image is outside all subfolders.
    """
    classes = {ref.name.split("/")[0] if "/" in ref.name else "no subfolder" for ref in refs}
    if folder.name == normal_name and classes == {"no subfolder"}:
        return entirely_normal
    if "no subfolder" in classes or normal_name not in classes:
        raise InputError(
            f"{folder}: without data.test_masks, images must be in one subfolder per class, including "
            f"{normal_name} (data.normal_name); found {', '.join(sorted(classes))}"
        )
    return lambda ref: entirely_normal(ref) if _is_normal(ref, normal_name) else Truth(abnormal=True)


def entirely_normal(ref: ImageRef) -> Truth:
    """Ground truth of a normal image: every pixel is normal.

    Args:
        ref: Normal image.

    Returns:
        Ground truth with an empty mask.
    """
    return Truth(False, np.zeros(ref.shape[:2], bool))


def _is_normal(ref: ImageRef, normal_name: str) -> bool:
    """Whether an image is in the subfolder of the normal class."""
    return ref.name.split("/")[0] == normal_name and "/" in ref.name
