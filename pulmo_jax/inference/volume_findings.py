"""Findings of a volume: the findings of its slices, connected across slices.

Voxels of adjacent slices are connected if they touch at a face, an edge or a corner (26-connectivity, which continues
the 8-connectivity of a slice). Slices arrive one by one, and only the labels of slices whose neighbours are still to
come are kept, so memory does not grow with the number of slices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pulmo_jax.data.volumes import Volume
from pulmo_jax.evaluation.calibration import Calibration
from pulmo_jax.evaluation.detection import label_regions

COLUMNS = (
    "volume", "label", "space", "x_mm", "y_mm", "z_mm", "volume_mm3", "voxels", "slices", "first_slice", "last_slice",
    "peak_filename", "peak_page", "peak_slice", "peak_y", "peak_x", "peak_score", "mean_score",
    "p_value", "p_value_image", "p_value_volume",
)  # fmt: skip
_SHIFTS = tuple(product((-1, 0, 1), repeat=2))


class Regions(NamedTuple):
    """Regions of the findings of one slice.

    Attributes:
        area_px: Number of pixels.
        sum_x: Sum of their columns.
        sum_y: Sum of their rows.
        sum_score: Sum of their scores.
        peak: Highest score.
        peak_x: Column of it.
        peak_y: Row of it.
    """

    area_px: Float[np.ndarray, "regions"]
    sum_x: Float[np.ndarray, "regions"]
    sum_y: Float[np.ndarray, "regions"]
    sum_score: Float[np.ndarray, "regions"]
    peak: Float[np.ndarray, "regions"]
    peak_x: Float[np.ndarray, "regions"]
    peak_y: Float[np.ndarray, "regions"]


@dataclass(frozen=True, eq=False)
class Connected:
    """Regions of the slices seen so far; `add` returns the next state.

    Attributes:
        touches: Whether each slice touches the next one (see `Volume.adjacent`).
        regions: Regions of each slice seen.
        links: Labels (below, above) of regions that touch, for each slice and the next one.
        waiting: Label images of slices of which a neighbour is still to come.
        scored: Number of slices with a score.
    """

    touches: Bool[np.ndarray, "n_minus_1"]
    regions: Mapping[int, Regions] = field(default_factory=dict)
    links: Mapping[int, Int[np.ndarray, "m 2"]] = field(default_factory=dict)
    waiting: Mapping[int, Int32[np.ndarray, "H W"]] = field(default_factory=dict)
    scored: int = 0

    def add(self, index: int, score: Float32[np.ndarray, "H W"], mask: Bool[np.ndarray, "H W"]) -> "Connected":
        """Add a slice, in any order.

        Args:
            index: Index of the slice in the volume.
            score: Its score map.
            mask: Pixels of its findings.

        Returns:
            The next state.
        """
        labels, _ = label_regions(mask)
        regions = {**self.regions, index: describe_regions(labels, score)}
        links, waiting = dict(self.links), {**self.waiting, index: labels}
        for below in (index - 1, index):
            if 0 <= below < len(self.touches) and self.touches[below] and below in waiting and below + 1 in waiting:
                links[below] = touching(waiting[below], waiting[below + 1])
        keep = {i: values for i, values in waiting.items() if self._is_needed(i, regions)}
        return Connected(self.touches, regions, links, keep, self.scored + bool(np.isfinite(score).any()))

    def _is_needed(self, index: int, seen: Mapping[int, Regions]) -> bool:
        pairs = ((index - 1, index - 1), (index, index + 1))  # (lower slice of the pair, neighbour)
        return any(
            0 <= lower < len(self.touches) and self.touches[lower] and neighbour not in seen
            for lower, neighbour in pairs
        )


def describe_regions(labels: Int32[np.ndarray, "H W"], score: Float32[np.ndarray, "H W"]) -> Regions:
    """Sums over the regions of a slice.

    Args:
        labels: Labels from 1; 0 is background.
        score: Score map.

    Returns:
        One row per label.
    """
    y, x = np.nonzero(labels)
    label, value = labels[y, x] - 1, score[y, x].astype(np.float64)
    n = int(label.max(initial=-1)) + 1
    if n == 0:
        none = np.zeros(0)
        return Regions(none, none, none, none, none, none, none)
    at = np.ravel(ndimage.maximum_position(value, label, np.arange(n))).astype(np.intp)
    area, sum_x, sum_y, sum_score = (np.bincount(label, weights, n) for weights in (np.ones(len(y)), x, y, value))
    return Regions(area, sum_x, sum_y, sum_score, value[at], x[at].astype(float), y[at].astype(float))


def touching(below: Int32[np.ndarray, "H W"], above: Int32[np.ndarray, "H W"]) -> Int[np.ndarray, "m 2"]:
    """Pairs of labels of two slices that touch, diagonally too.

    Args:
        below: Labels of a slice; 0 is background.
        above: Labels of the next slice.

    Returns:
        Pairs (label below, label above), each once.

    Example:
        >>> touching(np.array([[1, 0, 0]], np.int32), np.array([[0, 1, 2]], np.int32)).tolist()
        [[1, 1]]
    """
    y, x = np.nonzero(above)
    label, n = above[y, x].astype(np.int64), int(above.max(initial=0)) + 1
    padded = np.pad(below, 1).astype(np.int64)
    pairs = np.concatenate([padded[y + 1 + dy, x + 1 + dx] * n + label for dy, dx in _SHIFTS])
    return np.stack(np.divmod(np.unique(pairs[pairs >= n]), n), axis=-1)


def volume_findings(found: Connected, volume: Volume, calibration: Calibration) -> list[dict[str, Any]]:
    """Findings of a volume, sorted by descending peak score and labelled from 1.

    `p_value` and `p_value_image` are those of the peak in its slice. `p_value_volume` is the Bonferroni bound
    min(1, number of scored slices x p_value_image): it holds however the slices depend on each other, and is never
    below (number of scored slices) / (1 + number of normal images).

    Args:
        found: All slices.
        volume: Places of the slices.
        calibration: Calibration of the run.

    Returns:
        Rows of findings_3d.csv, see `COLUMNS`; places and volumes are None if the geometry is unknown.
    """
    if not any(len(regions.peak) for regions in found.regions.values()):
        return []
    slices, table, component = _components(found)
    p_values, thickness_mm = calibration.pixel_p_value(table.peak.astype(np.float32)), volume.thickness_mm
    rows = []
    for members in _members(component):
        part, at = Regions(*(column[members] for column in table)), slices[members]
        peak = int(np.argmax(part.peak))
        ref, score = volume.slices[at[peak]], float(part.peak[peak])
        p_value_image = calibration.peak_p_value(score)
        rows.append(
            {
                "volume": volume.name,
                **_place(part, at, volume, thickness_mm[at]),
                "voxels": int(part.area_px.sum()),
                "slices": int(np.ptp(at)) + 1,  # a finding has voxels in every slice between its first and last
                "first_slice": int(at.min()),
                "last_slice": int(at.max()),
                "peak_filename": ref.name,
                "peak_page": ref.page,
                "peak_slice": int(at[peak]),
                "peak_y": int(part.peak_y[peak]),
                "peak_x": int(part.peak_x[peak]),
                "peak_score": score,
                "mean_score": float(part.sum_score.sum() / part.area_px.sum()),
                "p_value": float(p_values[members[peak]]),
                "p_value_image": p_value_image,
                "p_value_volume": min(1.0, found.scored * p_value_image),
            }
        )
    rows.sort(key=lambda row: -row["peak_score"])
    return [row | {"label": label} for label, row in enumerate(rows, start=1)]


def _components(found: Connected) -> tuple[np.ndarray, Regions, np.ndarray]:
    """Slice of every region, table of all regions, and the component that each belongs to."""
    order = sorted(found.regions)
    counts = [len(found.regions[i].peak) for i in order]
    first = dict(zip(order, np.cumsum([0, *counts])[:-1], strict=True))
    table = Regions(*(np.concatenate(column) for column in zip(*(found.regions[i] for i in order), strict=True)))
    links = [pairs - 1 + [first[i], first[i + 1]] for i, pairs in found.links.items()]
    lower, upper = np.concatenate([np.zeros((0, 2), int), *links]).T
    n = sum(counts)
    graph = coo_array((np.ones(len(lower), bool), (lower, upper)), shape=(n, n))
    return np.repeat(order, counts), table, connected_components(graph, directed=False)[1]


def _members(component: np.ndarray) -> list[np.ndarray]:
    """Indices of the members of each component."""
    order = np.argsort(component, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(component[order])) + 1)


def _place(part: Regions, at: np.ndarray, volume: Volume, thickness_mm: np.ndarray) -> dict[str, Any]:
    """Centre of mass of a finding and its volume; every voxel weighs as much as its volume. `thickness_mm`: of `at`."""
    if not volume.placed:
        return {"space": None, "x_mm": None, "y_mm": None, "z_mm": None, "volume_mm3": None}
    pixel_mm2 = float(np.linalg.norm(np.cross(*volume.along_mm)))
    weight = pixel_mm2 * thickness_mm
    along = part.sum_x[:, None] * volume.along_mm[0] + part.sum_y[:, None] * volume.along_mm[1]
    moment = weight @ (part.area_px[:, None] * volume.origin_mm[at] + along)
    size = float(weight @ part.area_px)
    x, y, z = (float(value) for value in moment / size)
    return {"space": volume.space, "x_mm": x, "y_mm": y, "z_mm": z, "volume_mm3": size}
