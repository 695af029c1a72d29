"""Sections of the report of an anomaly-detection run: figures and tables."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.pipeline import ReadPatches
from pulmo_jax.data.reader import Reader
from pulmo_jax.data.transforms import preprocess
from pulmo_jax.evaluation.calibration import OWN, Threshold
from pulmo_jax.evaluation.detection import find_detections
from pulmo_jax.evaluation.distance_law import chi_squared_p_value, hotelling_p_value
from pulmo_jax.evaluation.image_score import WEIGHTS
from pulmo_jax.evaluation.metrics import Estimate, PixelMetrics, image_metrics
from pulmo_jax.inference.assess import METHOD, Assessment, Truth, choose_examples
from pulmo_jax.inference.image_rating import image_statistic_of, rate_image
from pulmo_jax.methods.patch_gaussian import PatchGaussian
from pulmo_jax.models.identity import Identity
from pulmo_jax.reporting import figures
from pulmo_jax.reporting.report import Section, captioned
from pulmo_jax.reporting.tables import Table, metrics_tables
from pulmo_jax.reporting.training import descends, training_sections
from pulmo_jax.tasks.anomalies.captions import CAPTIONS
from pulmo_jax.tasks.anomalies.figures import Example, View, reconstructions, score_maps, view
from pulmo_jax.tasks.anomalies.run import Run, thresholds
from pulmo_jax.tasks.anomalies.units import intensity_of

LAW_IMAGES, TILES_AT_ONCE = 32, 16  # for the figure of distances


def named(run: Run, name: str) -> str:
    """Display name of a score: the class name of the method in lower case, or the name of the baseline.

    A single statistic is named after a comma, as in "autoencoder, mean".
    """
    score, *statistic = name.split(", ")
    method = run.config.method["_target_"].rpartition(".")[2].lower()
    return ", ".join([method, *statistic]) if score == METHOD else name


def loss_sections(run: Run, out_dir: Path, training: Mapping[str, Any]) -> list[Section]:
    """Sections with the training curves and the selected step."""
    text = (
        f"Parameters of step {run.step}, which has the lowest validation loss." if descends(run.path) else "One pass."
    )
    return training_sections(run.path, out_dir, training, text)


def calibration_sections(run: Run, out_dir: Path) -> list[Section]:
    """Section with the histogram of the normal image scores and the thresholds."""
    calibration = run.calibrations[METHOD]
    scores = np.array(calibration.normal_image_scores)
    threshold = calibration.image_threshold
    figure = figures.score_histogram(scores, None, threshold.value, interval(threshold), "image")
    text = (
        f"Set on {len(scores)} normal validation images in {threshold.n_groups} groups. Pixel threshold "
        f"{shown(calibration.pixel_threshold)}, image threshold {shown(threshold)}. {image_score_of(run)} The model is "
        "two-dimensional: each slice is scored by itself."
    )
    saved = figures.save(figure, out_dir / "figures", "calibration")
    return [
        Section("Calibration", text, [captioned(saved, CAPTIONS, images=len(scores), groups=threshold.n_groups)], [])
    ]


def image_score_of(run: Run) -> str:
    """Sentence that names the statistic of the score map that is the image score."""
    statistic = image_statistic_of(run.scorer.method, run.calibrations[METHOD])
    if statistic == OWN:
        return "The image score is computed by the method."
    if statistic != "combined":
        return f"The image score is the statistic {statistic} of the score map."
    return (
        f"The image score combines {', '.join(WEIGHTS)} of the score map: -log10 of the harmonic mean of the p-values."
    )


def validation_sections(run: Run, refs: Sequence[ImageRef], count: int, reader: Reader, out_dir: Path) -> list[Section]:
    """Examples of normal validation images, evenly spaced.

    Args:
        run: Calibrated run.
        refs: Normal validation images.
        count: Maximum number of examples.
        reader: Reader of the images.
        out_dir: Output folder.

    Returns:
        At most one section.
    """
    if not refs:
        return []
    picked = [refs[i] for i in np.unique(np.linspace(0, len(refs) - 1, min(count, len(refs))).astype(int))]
    views = [view(example(run, ref, Truth(abnormal=False), reader)) for ref in picked]
    drawn = {"validation_score_maps": score_maps(views, "Normal validation images")}
    if reconstructs(run):
        drawn["validation_reconstructions"] = reconstructions(views)
    paths = [figures.save(figure, out_dir / "figures", name) for name, figure in drawn.items()]
    counts = {"shown": len(views), "images": len(refs)}
    return [
        Section(
            "Validation images",
            "Normal images that were not used for training.",
            [captioned(p, CAPTIONS, **counts) for p in paths],
        )
    ]


def reconstructs(run: Run) -> bool:
    """Whether the model has a reconstruction, other than the identity."""
    return run.config.model["_target_"] != f"{Identity.__module__}.{Identity.__qualname__}"


def distance_sections(run: Run, refs: Sequence[ImageRef], reader: Reader, out_dir: Path) -> list[Section]:
    """Mahalanobis distances of the windows of held-out normal images, compared with their theoretical distribution.

    Args:
        run: Calibrated run.
        refs: Normal validation images.
        reader: Reader of the images.
        out_dir: Output folder.

    Returns:
        One section for patch Gaussians, otherwise none.
    """
    method = run.scorer.method
    if not refs or not isinstance(method, PatchGaussian):
        return []
    picked = [refs[i] for i in np.unique(np.linspace(0, len(refs) - 1, min(LAW_IMAGES, len(refs))).astype(int))]
    distance, n = window_distances(method, run, picked, reader), float(run.scorer.params["gaussian"].n.min())
    nominal, d = np.geomspace(1e-4, 0.5, 24), method.dimensions
    laws = {"chi-squared": chi_squared_p_value(distance, d)}
    if n > d:
        laws["Hotelling"] = hotelling_p_value(distance, d, n)
    observed = {name: (p <= nominal[:, None]).mean(1) for name, p in laws.items()}
    figure = figures.distance_law(np.sort(distance), d, nominal, observed)
    text = (
        f"{distance.size} windows of {len(picked)} held-out normal images, compared with the distribution for Gaussian "
        f"data: {d} dimensions, fitted to {n:.0f} windows{'' if method.locations == 'pooled' else ' per location'}. "
        "Above the diagonal, theoretical p-values underestimate the false-alarm rate; the thresholds come from the "
        "calibration, which assumes no distribution."
    )
    saved = figures.save(figure, out_dir / "figures", "distances")
    counts = {"windows": distance.size, "images": len(picked)}
    return [Section("Distances of normal windows", text, [captioned(saved, CAPTIONS, **counts)], [])]


def window_distances(method: PatchGaussian, run: Run, refs: Sequence[ImageRef], reader: Reader) -> np.ndarray:
    """Squared Mahalanobis distances of all windows in the foreground, from non-overlapping tiles.

    Args:
        method: Patch Gaussian.
        run: Calibrated run.
        refs: Images.
        reader: Reader of the images.

    Returns:
        Distances, (N,).
    """
    read, size = ReadPatches(list(refs), run.scorer.how, reader), run.scorer.how.patch_size
    measure = jax.jit(lambda params, batch, inside: (method.distances(params, batch), method.whole(inside)))
    found = []
    for i, ref in enumerate(refs):
        height, width = (size, size) if run.scorer.how.resize else ref.shape[:2]
        ys, xs = range(0, max(height - size, 0) + 1, size), range(0, max(width - size, 0) + 1, size)
        cells = np.array([(i, y, x) for y in ys for x in xs])
        for first in range(0, len(cells), TILES_AT_ONCE):
            some = np.resize(
                cells[first : first + TILES_AT_ONCE], (TILES_AT_ONCE, 3)
            )  # padded by repetition to one compiled shape
            distance, whole = map(np.asarray, measure(run.scorer.params, *read.with_inside(some)))
            count = min(TILES_AT_ONCE, len(cells) - first)
            found.append(distance[:count][whole[:count]])
    return np.concatenate(found)


def shown(threshold: Threshold) -> str:
    """Format a threshold with its interval and false-alarm rate."""
    known = "" if threshold.low is None else f" [{threshold.low:.3g}, {threshold.high:.3g}]"
    return f"{threshold.value:.4g}{known} for a false-alarm rate of {threshold.attainable_rate:.2g}"


def interval(threshold: Threshold) -> tuple[float, float] | None:
    """Confidence interval of a threshold; None if unknown."""
    return None if threshold.low is None or threshold.high is None else (threshold.low, threshold.high)


def assessment_sections(
    run: Run, assessment: Assessment, scores: dict[str, Any], views: dict[str, list[View]], out_dir: Path
) -> list[Section]:
    """Tables, curves, histograms and galleries of the test images.

    Args:
        run: Calibrated run.
        assessment: Scores of the test images.
        scores: Figures of merit.
        views: Examples by gallery: hits, misses, false_alarms.
        out_dir: Output folder.

    Returns:
        Sections of the report.
    """
    folder = out_dir / "figures"
    tables: list[Table] = metrics_tables(scores)
    n = scores["test"]
    counts = {"abnormal": n["abnormal_images"], "normal": n["normal_images"]}
    paths = [figures.save(f, folder, name) for name, f in curve_figures(run, assessment).items()]
    curves = [captioned(path, CAPTIONS, **counts) for path in paths]
    limit = f"{thresholds(run)[1].value:.3g}"
    galleries = {
        "hits": "Abnormal images with the highest scores",
        "misses": f"Lowest-scoring abnormal images (missed up to {limit})",
        "false_alarms": f"Highest-scoring normal images (false alarms above {limit})",
    }
    maps = [
        captioned(
            figures.save(score_maps(views[kind], title), folder, f"score_maps_{kind}"),
            CAPTIONS,
            shown=len(views[kind]),
            **counts,
        )
        for kind, title in galleries.items()
        if views[kind]
    ]
    selected = (views["hits"] or views["misses"])[:2] + views["false_alarms"][:2] if reconstructs(run) else []
    paths = [figures.save(reconstructions(selected), folder, "reconstructions")] if selected else []
    pairs = [captioned(path, CAPTIONS, shown=len(selected), **counts) for path in paths]
    text = f"{n['abnormal_images']} abnormal and {n['normal_images']} normal images in {n['groups']} groups."
    text = f"{text} Intervals are 95 % bootstrap intervals by group. {image_score_of(run)}"
    if assessment.statistics and run.calibrations[METHOD].normal_statistics is not None:
        text += (
            f" Rows such as {named(run, f'{METHOD}, mean')} have the image score of one statistic, each with its own "
            "threshold, for comparison; a statistic chosen by these figures is chosen on the test images."
        )
    return [
        Section("Test", text, [], tables),
        Section("Curves and scores", "", curves, []),
        Section("Score maps", "", maps, []),
        Section("Reconstructions", "", pairs, []),
    ]


def curve_figures(run: Run, assessment: Assessment) -> dict[str, Any]:
    """ROC, precision-recall, calibration and histogram figures by file name."""
    labels = np.array(assessment.abnormal)
    result: dict[str, Any] = {}
    if labels.any() and not labels.all():
        curves = [
            curve(named(run, name), np.array(scores), labels, np.ones(labels.size), cut(run, name, "image"))
            for name, scores in assessment.image_scores.items()
        ]
        result["roc_pr_images"] = figures.roc_and_pr(curves, "Images", float(labels.mean()))
    scores, threshold = np.array(assessment.image_scores[METHOD]), thresholds(run)[1]
    abnormal = scores[labels] if labels.any() else None
    if not labels.all():
        result["scores_images"] = figures.score_histogram(
            scores[~labels], abnormal, threshold.value, interval(threshold), "image"
        )
    if assessment.pixels is None:
        return result
    states = {k: s for k, s in assessment.pixels.items() if s.positives.n and s.negatives.n}
    method = assessment.pixels[METHOD]
    if method.negatives.n:
        result["false_alarms_pixels"] = false_alarm_figure(run, method)
    if states:
        pixel_curves = [pixel_curve(run, name, state) for name, state in states.items()]
        prevalence = method.positives.n / (method.positives.n + method.negatives.n)
        result["roc_pr_pixels"] = figures.roc_and_pr(pixel_curves, "Pixels", prevalence)
        threshold = thresholds(run)[0]
        result["scores_pixels"] = figures.score_histogram(
            binned(method.negatives), binned(method.positives), threshold.value, interval(threshold), "pixel"
        )
    return result


def false_alarm_figure(run: Run, state: PixelMetrics) -> Any:
    """Observed against nominal false-alarm rate of normal test pixels."""
    score, at_least = np.array(run.calibrations[METHOD].normal_pixel_scores).T
    p_value = (1 + at_least) / (1 + run.calibrations[METHOD].pixel_threshold.n_scores)
    nominal = np.geomspace(max(p_value.min(), 1e-5), 0.5, 16)
    cuts = np.interp(-nominal, -p_value, score).astype(np.float32)
    negatives = state.negatives
    replicates = np.stack([negatives.survival(cuts, count) for count in negatives.replicate_counts() if count.any()])
    low, high = np.percentile(replicates, [2.5, 97.5], axis=0) if len(negatives.groups) > 1 else (nominal * np.nan,) * 2
    return figures.p_value_calibration(nominal, negatives.survival(cuts), low, high)


def cut(run: Run, name: str, unit: str) -> float | None:
    """Calibrated threshold of the method, for 'pixel' or 'image'; None for baselines."""
    return getattr(run.calibrations[name], f"{unit}_threshold").value if name == METHOD else None


def binned(histogram: Any) -> tuple[np.ndarray, np.ndarray]:
    """Upper bin limits and counts of a histogram."""
    return histogram.high.astype(np.float64), histogram.count


def pixel_curve(run: Run, name: str, state: PixelMetrics) -> figures.Curve:
    """ROC and precision-recall curve of the pixel scores."""
    parts = [binned(state.negatives), binned(state.positives)]
    scores, weights = (np.concatenate(values) for values in zip(*parts, strict=True))
    labels = np.repeat([False, True], [len(parts[0][0]), len(parts[1][0])])
    return curve(named(run, name), scores, labels, weights, cut(run, name, "pixel"), state.estimates())


def curve(
    name: str,
    scores: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    threshold: float | None,
    estimates: dict[str, Estimate] | None = None,
) -> figures.Curve:
    """Compute the ROC and precision-recall curve of a score.

    Args:
        name: Name in the legend.
        scores: Scores, (N,).
        labels: True if abnormal, (N,).
        weights: Number of pixels or images of each score, (N,).
        threshold: Threshold marked on the curve, if any.
        estimates: Figures of merit; None: computed from the scores.

    Returns:
        The curve.
    """
    fpr, tpr, _ = roc_curve(labels, scores, sample_weight=weights)
    precision, recall, _ = precision_recall_curve(labels, scores, sample_weight=weights)
    if estimates is None:
        estimates = image_metrics(scores, labels, [""] * len(scores), np.inf, replicates=1)
    point = None
    if threshold is not None:
        above = scores > threshold
        tp, fp = weights[above & labels].sum(), weights[above & ~labels].sum()
        point = (fp / weights[~labels].sum(), tp / weights[labels].sum(), tp / max(tp + fp, 1e-300))
    return figures.Curve(name, fpr, tpr, precision, recall, estimates["auroc"].value, estimates["ap"].value, point)


def example_views(
    run: Run, assessment: Assessment, count: int, truth_of: Callable[[ImageRef], Truth], reader: Reader
) -> dict[str, list[View]]:
    """Score the images of each gallery again and reduce them to figure size.

    Args:
        run: Calibrated run.
        assessment: Scores of the test images.
        count: Images per gallery.
        truth_of: Ground truth of an image.
        reader: Reader of the images.

    Returns:
        Examples by gallery.
    """
    chosen = choose_examples(assessment, count)
    return {kind: [view(example(run, ref, truth_of(ref), reader)) for ref in refs] for kind, refs in chosen.items()}


def example(run: Run, ref: ImageRef, truth: Truth, reader: Reader) -> Example:
    """Score an image again and collect the arrays of its figure."""
    pixels, foreground = reader.image(ref), reader.foreground(ref)
    scores, calibration = run.scorer(pixels, foreground, ref.scale), run.calibrations[METHOD]
    _, detected = find_detections(scores, calibration, min_area_px=run.config.calibration.min_area_px)
    return Example(
        title=ref.title,
        image=preprocess(pixels, None, run.scorer.how),
        reconstruction=run.scorer.reconstruction(pixels, foreground, ref.scale),
        score=scores,
        truth=truth.mask,
        detected=detected,
        image_score=rate_image(run.scorer.method, calibration, scores).score,
        threshold=calibration.pixel_threshold.value,
        label=truth.abnormal,
        pixel_mm=reader.tags(ref).pixel_mm,
        intensity=intensity_of(ref, run.scorer.how, reader),
    )
