"""Figures of merit of the runs of a part: means over seeds, with intervals over patients (or seeds, on the CT)."""

import csv
import json
from dataclasses import dataclass, field, replace
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from scipy import stats
from sklearn.metrics import roc_auc_score

from pulmo_jax.core.histogram import group_weights

REPLICATES, RATE = 1000, 0.05
COMBINED = "combined"
STATISTICS = ("max", "top1", "mean", "area", "cell16", "cell4")
PIXEL = ("ap", "aupro", "dice", "best_dice")  # dice: at the stored threshold
BASELINES = ("intensity", "local intensity", "z-score")
DARKNESS = "darkness (−intensity)"  # the sign is that which the labels of the X-rays favour
NAMES = ("patient number", "follow-up number", "image size")  # from the file alone
TRIVIAL = (*BASELINES, DARKNESS, *NAMES)


@dataclass(frozen=True)
class Tested:
    """Test images of one seed by one score.

    Attributes:
        scores: Image scores, (images,).
        abnormal: Whether each image is abnormal.
        files: File names.
        groups: Patients or groups of duplicates.
        share: Weight of each image: 1, or one over the number of its copies.
        threshold: Stored threshold, if any.
        n_normal: Number of normal images on which the threshold rests.
        statistics: Image scores by single statistics.
        pixels: Pixel figures of merit, on the CT.
    """

    scores: np.ndarray
    abnormal: np.ndarray
    files: tuple[str, ...]
    groups: tuple[str, ...]
    share: np.ndarray
    threshold: float | None = None
    n_normal: int = 0
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    pixels: dict[str, float] = field(default_factory=dict)


def read_run(folder: Path, part: str) -> dict[str, Tested]:
    """Scores of the test images by the method ("") and by the trivial scores."""
    with (folder / "image_scores.csv").open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    metrics = json.loads((folder / "metrics.json").read_text())
    thresholds = json.loads((folder / "baselines.json").read_text())
    own = [*rows[0]][4]  # after filename, page, group and abnormal

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    def tested(name: str, calibration: dict[str, Any]) -> Tested:
        limit = calibration["image_threshold"]
        pixels = {figure: metrics["pixel"][name][figure]["value"] for figure in PIXEL} if part == "ct" else {}
        return Tested(column(name), abnormal, files, groups, share, limit["value"], limit["n_scores"], pixels=pixels)

    files, groups = (tuple(row[key] for row in rows) for key in ("filename", "group"))
    abnormal = column("abnormal") > 0
    share = 1 / np.array([groups.count(group) for group in groups]) if part == "brain" else np.ones(len(rows))
    method = tested(own, metrics["calibration"])
    if part == "ct":
        lesions = metrics["lesions"]
        found = lesions["images_with_highest_pixel_in_lesion"] / lesions["images_with_lesions"]
        method.pixels["nodule first"] = found
    found = {"": replace(method, statistics={name: column(name) for name in STATISTICS})}
    found |= {name: tested(name, thresholds[name]) for name in BASELINES}
    return found | trivial(found["intensity"], part, folder)


def trivial(intensity: Tested, part: str, run: Path) -> dict[str, Tested]:
    """Scores that the product does not print: darkness, and what a file's name or header contains."""
    bare = replace(intensity, threshold=None, n_normal=0, pixels={})
    scores = {DARKNESS: -intensity.scores}
    if part.startswith("chest"):
        numbers = np.array([[int(x) for x in name.rpartition("/")[2].split(".")[0].split("_")] for name in bare.files])
        scores |= {"patient number": numbers[:, 0].astype(float), "follow-up number": numbers[:, 1].astype(float)}
    if part == "brain":
        test = run.parent.parent / "splits" / run.name.rpartition("_")[2] / "test"
        shapes = [tifffile.TiffFile(test / name).pages[0].shape for name in bare.files]
        scores["image size"] = np.array([float(np.prod(shape)) for shape in shapes])
    return {name: replace(bare, scores=values) for name, values in scores.items()}


def aurocs(scores: np.ndarray, t: Tested, weights: np.ndarray) -> np.ndarray:
    """AUROC with the images weighted by each row of `weights` (replicates, images)."""
    above, below = scores[t.abnormal][:, None], scores[~t.abnormal]
    wins = (above > below) + 0.5 * (above == below)
    ill, normal = weights[:, t.abnormal], weights[:, ~t.abnormal]
    return np.einsum("rp,pn,rn->r", ill, wins, normal, optimize=True) / ill.sum(axis=1) / normal.sum(axis=1)


def draws_of(seeds: list[Tested]) -> list[np.ndarray]:
    """Bootstrap weights of the images of each seed; a group has the same weight in every seed and score."""
    names = sorted({group for t in seeds for group in t.groups})
    weight = {name: group_weights(name, REPLICATES, 0) for name in names}
    return [np.stack([weight[group] for group in t.groups], axis=1) * t.share for t in seeds]


def image_auroc(seeds: list[Tested], statistic: str, resample: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """AUROC of each seed, and bootstrap replicates of their mean, or None.

    Args:
        seeds: Test images of each seed.
        statistic: Statistic of the map that is the image score; COMBINED: the score of the run.
        resample: Whether to resample groups.
    """
    chosen = [t.scores if statistic == COMBINED else t.statistics[statistic] for t in seeds]
    values = [roc_auc_score(t.abnormal, s, sample_weight=t.share) for s, t in zip(chosen, seeds, strict=True)]
    if not resample:
        return np.array(values), None
    draws = [aurocs(s, t, w) for s, t, w in zip(chosen, seeds, draws_of(seeds), strict=True)]
    return np.array(values), np.mean(draws, axis=0)


def summary(values: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Any]:
    """Mean and standard deviation over seeds, with the 95 % interval of the replicates, or of Student's t."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    found: dict[str, Any] = {"mean": mean, "seeds": values.tolist(), "low": None, "high": None}
    if len(values) > 1:
        found["sd"] = float(values.std(ddof=1))
    if draws is not None:
        found["low"], found["high"] = np.percentile(draws, [2.5, 97.5]).tolist()
    elif len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1)) * found["sd"] / len(values) ** 0.5
        found["low"], found["high"] = mean - half, mean + half
    return found


def false_alarms(seeds: list[Tested], pooled: bool) -> dict[str, Any]:
    """Alarms at the stored threshold on held-out normal images.

    `low` and `high` are the 95 % range of the rate if images are exchangeable: a threshold at rank r of n normal images
    is exceeded with a probability that is Beta(r, n + 1 - r), so alarms among m images are beta-binomial.

    Args:
        seeds: Test images of each seed.
        pooled: Whether each seed tests other normal images, so that counts add up; else they are those of one seed.
    """
    counts = [int((t.scores[~t.abnormal] > t.threshold).sum()) for t in seeds]
    sizes = [int((~t.abnormal).sum()) for t in seeds]
    rng, drawn = np.random.default_rng(0), np.zeros(100_000)
    ranks = [max(1, floor((t.n_normal + 1) * RATE + 1e-9)) for t in seeds]
    for t, m, rank in list(zip(seeds, sizes, ranks, strict=True))[: None if pooled else 1]:
        drawn += stats.betabinom.rvs(m, rank, t.n_normal + 1 - rank, size=drawn.size, random_state=rng)
    low, high = np.percentile(drawn / (sum(sizes) if pooled else sizes[0]), [2.5, 97.5]).tolist()
    return {
        "rate": sum(counts) / sum(sizes),
        "by_seed": [f"{k}/{m}" for k, m in zip(counts, sizes, strict=True)],
        "nominal": float(np.mean([rank / (t.n_normal + 1) for rank, t in zip(ranks, seeds, strict=True)])),
        "low": low,
        "high": high,
        "sensitivity": float(np.mean([(t.scores[t.abnormal] > t.threshold).mean() for t in seeds])),
    }
