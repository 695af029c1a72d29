"""Many images through the one scorer: thresholds from normal ones, figures of merit from labelled ones.

Images pass one by one; what is kept of each is bounded.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pulmo_jax.core.histogram import ScoreHistogram
from pulmo_jax.data.images import ImageRef, Reader, find_masks
from pulmo_jax.evaluation.calibration import Calibration, Calibrator
from pulmo_jax.evaluation.metrics import PixelMetrics
from pulmo_jax.inference.baselines import BASELINES, baseline_image_score
from pulmo_jax.inference.score import Scorer
from pulmo_jax.types import InputError

METHOD = "method"

Track = Callable[[Iterable, int], Iterable]


@dataclass(frozen=True)
class Truth:
    """What is known of a test image: is it abnormal, and the mask of its findings where there are masks."""

    abnormal: bool
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Assessment:
    """What `assess` learnt, by score name (METHOD and the baselines).

    pixels: None where nothing is known of any. image_scores, abnormal, groups: one entry for each scored image.
    peak_in_lesion: (images whose highest pixel lies in a lesion, images with lesions).
    """

    pixels: dict[str, PixelMetrics] | None
    image_scores: dict[str, list[float]]
    abnormal: list[bool]
    groups: list[str]
    peak_in_lesion: tuple[int, int]
    refs: list[ImageRef]
    unscored: list[str] = field(default_factory=list)


def calibrate(
    scorer: Scorer,
    refs: Sequence[ImageRef],
    reader: Reader,
    pixel_rate: float,
    image_rate: float,
    seed: int,
    track: Track,
) -> dict[str, Calibration]:
    """Thresholds of the method and of every baseline, from normal images alone."""
    start = Calibrator(pixels=ScoreHistogram.empty(seed=seed))
    calibrators = dict.fromkeys((METHOD, *BASELINES), start)
    for ref in track(refs, len(refs)):
        pixels, foreground = reader.image(ref), reader.foreground(ref)
        for name, (scores, image_score) in all_scores(scorer, pixels, foreground).items():
            calibrators[name] = calibrators[name].add(scores, None, image_score, ref.group)
    return {name: calibrator.finish(pixel_rate, image_rate) for name, calibrator in calibrators.items()}


def assess(
    scorer: Scorer,
    calibrations: Mapping[str, Calibration],
    refs: Sequence[ImageRef],
    truth_of: Callable[[ImageRef], Truth],
    reader: Reader,
    *,
    lesion_sizes_px: Sequence[int],
    replicates: int,
    seed: int,
    track: Track,
) -> Assessment:
    """Score labelled images and gather what the metrics need."""
    pixels_of: dict[str, PixelMetrics] = {
        name: PixelMetrics.empty(c.pixel_threshold.value, lesion_sizes_px, replicates=replicates, seed=seed)
        for name, c in calibrations.items()
    }
    image_scores: dict[str, list[float]] = {name: [] for name in calibrations}
    abnormal, scored, unscored = [], [], []
    with_masks, hits, lesions = False, 0, 0
    for ref in track(refs, len(refs)):
        pixels, foreground, truth = reader.image(ref), reader.foreground(ref), truth_of(ref)
        scores_of = all_scores(scorer, pixels, foreground)
        scores, _ = scores_of[METHOD]
        if not np.isfinite(scores).any():
            unscored.append(ref.title)
            continue
        for name, (score_map, score) in scores_of.items():
            image_scores[name].append(score)
            if truth.mask is not None:
                pixels_of[name] = pixels_of[name].add(score_map, truth.mask, None, ref.group)
        abnormal.append(truth.abnormal)
        scored.append(ref)
        if truth.mask is not None:
            with_masks = True
            if truth.mask.any():
                lesions += 1
                hits += bool(truth.mask[np.unravel_index(np.nanargmax(scores), scores.shape)])
    groups = [ref.group for ref in scored]
    return Assessment(
        pixels_of if with_masks else None, image_scores, abnormal, groups, (hits, lesions), scored, unscored
    )


def choose_examples(assessment: Assessment, count: int) -> dict[str, list[ImageRef]]:
    """At most `count` images of each kind: best found, worst missed, worst false alarms."""
    order = np.argsort(assessment.image_scores[METHOD])
    abnormal = [assessment.refs[i] for i in order if assessment.abnormal[i]]
    normal = [assessment.refs[i] for i in order if not assessment.abnormal[i]]
    return {"hits": abnormal[::-1][:count], "misses": abnormal[:count], "false_alarms": normal[::-1][:count]}


def all_scores(
    scorer: Scorer, pixels: np.ndarray, foreground: np.ndarray | None
) -> dict[str, tuple[np.ndarray, float]]:
    """(map, image score) of the method and of every baseline."""
    scores = scorer(pixels, foreground)
    result = {METHOD: (scores, scorer.method.image_score(scores))}
    for name, baseline in BASELINES.items():
        scores = baseline(pixels, foreground, scorer.how)
        result[name] = (scores, baseline_image_score(scores))
    return result


def truth_by_masks(
    refs: Sequence[ImageRef], folder: Path, normal_name: str, reader: Reader
) -> Callable[[ImageRef], Truth]:
    """Truth from same-named masks: anything but 0 is a finding. Raises InputError where one is missing.

    Images in the subfolder `normal_name` need no mask.
    """
    mask_of = find_masks(folder, sorted({ref.name for ref in refs}))
    masked = {ref.title: replace(ref, mask=mask_of[ref.name]) for ref in refs}
    for ref in masked.values():
        if ref.mask is None and not _is_normal(ref, normal_name):
            raise InputError(
                f"{folder}/{ref.name}: no such mask, nor with another image suffix; add it (all zero if normal), "
                f"or put the image into a subfolder {normal_name}"
            )

    def truth_of(ref: ImageRef) -> Truth:
        mask = reader.foreground(masked[ref.title])
        mask = np.zeros(ref.shape[:2], bool) if mask is None else mask
        return Truth(bool(mask.any()), mask)

    return truth_of


def truth_by_folder(refs: Sequence[ImageRef], folder: Path, normal_name: str) -> Callable[[ImageRef], Truth]:
    """Truth from the first folder in the image's name. Raises InputError unless one is the normal class.

    A folder that is itself called so holds normal images alone: their false-alarm rate can be measured.
    """
    classes = {ref.name.split("/")[0] if "/" in ref.name else "images outside of any" for ref in refs}
    if folder.name == normal_name and classes == {"images outside of any"}:
        return whole_normal
    if "images outside of any" in classes or normal_name not in classes:
        raise InputError(
            f"{folder}: without data.test_masks, images must lie in subfolders by class, one of them "
            f"{normal_name} (data.normal_name); found {', '.join(sorted(classes))}"
        )
    return lambda ref: whole_normal(ref) if _is_normal(ref, normal_name) else Truth(abnormal=True)


def whole_normal(ref: ImageRef) -> Truth:
    """Of a normal image every pixel is known to be normal."""
    return Truth(False, np.zeros(ref.shape[:2], bool))


def _is_normal(ref: ImageRef, normal_name: str) -> bool:
    return ref.name.split("/")[0] == normal_name and "/" in ref.name
