"""Detection of anomalies: connected regions of a score map above the calibrated threshold."""

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from scipy import ndimage

from pulmo_jax.evaluation.calibration import Calibration
from pulmo_jax.types import Detection, Window


def find_detections(
    score: Float32[np.ndarray, "H W"],
    calibration: Calibration,
    foreground: Bool[np.ndarray, "H W"] | None = None,
    min_area_px: int = 1,
) -> tuple[list[Detection], Bool[np.ndarray, "H W"]]:
    """Find connected regions above the pixel threshold.

    Args:
        score: Score map; NaN outside the evaluated area.
        calibration: Thresholds and p-values of the run.
        foreground: Pixels in which to search; None: all.
        min_area_px: Smallest area of a region in pixels.

    Returns:
        Detections sorted by descending peak score and labelled from 1, and the mask of their pixels.
    """
    mask = (score > calibration.pixel_threshold.value) & np.isfinite(score)
    if foreground is not None:
        mask &= foreground
    labels, area = label_regions(mask)
    pixel = np.flatnonzero(mask)  # indices of the few selected pixels; avoids copies of the whole map
    selected = (area >= min_area_px)[labels.ravel()[pixel]]
    mask.flat[pixel[~selected]] = False
    return _describe(score, labels, pixel[selected], calibration), mask


def label_regions(
    mask: Bool[np.ndarray, "H W"],
) -> tuple[Int32[np.ndarray, "H W"], Int64[np.ndarray, "labels"]]:
    """Label 8-connected regions.

    Args:
        mask: Binary mask.

    Returns:
        Labels from 1 (0: background), and the area of each label in pixels.

    Example:
        >>> labels, area = label_regions(np.eye(3, dtype=bool))  # pixels that touch at their corners
        >>> labels.tolist(), area.tolist()
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], [6, 3])
    """
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    area = np.bincount(labels[mask], minlength=1)  # bincount of the whole map would copy it to int64
    area[0] = mask.size - area.sum()
    return labels, area


def _describe(score: np.ndarray, labels: np.ndarray, pixel: np.ndarray, calibration: Calibration) -> list[Detection]:
    if pixel.size == 0:
        return []
    label, value = labels.ravel()[pixel], score.ravel()[pixel]
    region, area = np.unique(label, return_counts=True)
    mean = ndimage.mean(value, label, region)
    peak_index = np.ravel(ndimage.maximum_position(value, label, region)).astype(np.intp)
    peak, (y, x) = value[peak_index], np.unravel_index(pixel[peak_index], score.shape)
    p_value, boxes = calibration.pixel_p_value(peak), ndimage.find_objects(labels)
    return [
        Detection(
            label=rank,
            y=int(y[i]),
            x=int(x[i]),
            box=_window(boxes[region[i] - 1]),
            area_px=int(area[i]),
            peak_score=float(peak[i]),
            mean_score=float(mean[i]),
            p_value=float(p_value[i]),
            p_value_image=calibration.peak_p_value(float(peak[i])),
        )
        for rank, i in enumerate(np.argsort(-peak, kind="stable"), start=1)
    ]


def _window(box: tuple[slice, slice]) -> Window:
    y, x = box
    return Window(y.start, x.start, y.stop - y.start, x.stop - x.start)
