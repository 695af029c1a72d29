"""Frontal projection of a chest CT, and the 15 landmarks that the projected lungs define.

Lengths are in mm unless named px. Axes: D from front to back, H downwards, W to the right of the image, which is the
patient's left.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Shaped
from nibabel.nifti1 import Nifti1Image
from scipy import ndimage

from pulmo_jax.data import lung_ct
from pulmo_jax.types import InputError

WATER_PER_MM = 0.018  # attenuation of water near 80 keV
BODY_HU = -400.0  # the largest connected region above this value is the patient, without table and blanket
LOBES = (12, 13, 14), (10, 11)  # labels of the right and of the left lung
MAX_SHAPE = (64, 1024, 256)  # (D, H, W) of the projected volume; larger ones are averaged over blocks
LUNG_MM = 30.0  # thickness from which the lung is visible in a radiograph
STEP_MM = 1.0  # spacing of the grid on which lung borders are located
QUARTERS = (0.25, 0.5, 0.75)


class Anatomy(NamedTuple):
    """Contribution of each voxel to a ray from front to back.

    Attributes:
        layers: Line integral of the attenuation (dimensionless), thickness of the right lung and of the left lung in
            mm, (3, D, H, W).
        spacing: Voxel size in mm along D, H, W.
    """

    layers: Float32[np.ndarray, "3 D H W"]
    spacing: tuple[float, float, float]


class Axis(NamedTuple):
    """The axis of the landmarks in a projection.

    Attributes:
        middle: Midpoint (y, x) in mm from pixel (0, 0).
        down: Unit vector (y, x) along the axis, downwards.
        length: Length in mm.
    """

    middle: Float[np.ndarray, "2"]
    down: Float[np.ndarray, "2"]
    length: float

    @property
    def across(self) -> Float[np.ndarray, "2"]:
        """Unit vector (y, x) perpendicular to the axis, to the right of the image."""
        return np.array([-self.down[1], self.down[0]])


def read_anatomy(scan: Path, labels: Path) -> Anatomy:
    """Read a CT scan and its lobe labels.

    Args:
        scan: NIfTI file with the scan in HU, oriented like the sample.
        labels: NIfTI file with the lobe labels (see LOBES), oriented like the sample.

    Returns:
        The contributions of the voxels to a projection.

    Raises:
        InputError: A lung or the body is missing.
    """
    volume, mask = Nifti1Image.from_filename(scan), Nifti1Image.from_filename(labels)
    width, depth, height = map(float, volume.header.get_zooms())
    hu = lung_ct.dicom_orientation(np.asarray(volume.dataobj, np.float32))
    return anatomy(hu, lung_ct.dicom_orientation(np.asarray(mask.dataobj)), (height, depth, width))


def anatomy(
    hu: Float32[np.ndarray, "Z H W"], labels: Shaped[np.ndarray, "Z H W"], spacing: tuple[float, float, float]
) -> Anatomy:
    """Convert a CT scan to the contributions of its voxels to a projection.

    Args:
        hu: Scan in HU; slices from feet to head, rows from front to back (Z, H, W).
        labels: Lobe labels of the voxels (see LOBES), (Z, H, W).
        spacing: Voxel size in mm along Z, H, W.

    Returns:
        The contributions, averaged over blocks to at most MAX_SHAPE.

    Raises:
        InputError: A lung or the body is missing.
    """
    depth, height, width = hu.shape[1], hu.shape[0], hu.shape[2]
    factors = tuple(-(-n // most) for n, most in zip((depth, height, width), MAX_SHAPE, strict=True))
    thinned = partial(_block_mean, factors=factors)
    coarse_hu = thinned(hu)
    relative = _body(coarse_hu) * np.maximum(1 + coarse_hu / 1000, 0)
    lungs = [thinned(np.isin(labels, lobes)) for lobes in LOBES]
    if not all(lung.any() for lung in lungs):
        raise InputError(
            f"the labels lack the right lung {LOBES[0]} or the left lung {LOBES[1]}; both are required: check the "
            "label file"
        )
    size = tuple(mm * factor for mm, factor in zip((spacing[1], spacing[0], spacing[2]), factors, strict=True))
    layers = np.stack([WATER_PER_MM * relative, *lungs]).astype(np.float32) * np.float32(size[0])
    return Anatomy(layers, size)


def _block_mean(volume: np.ndarray, factors: tuple[int, int, int]) -> np.ndarray:
    """Reorder (Z, H, W), from feet to head, to (D, H, W), from head to feet, and average over blocks."""
    turned = volume.transpose(1, 0, 2)[:, ::-1]
    a, b, c = factors
    d, h, w = (n // f for n, f in zip(turned.shape, factors, strict=True))
    return turned[: d * a, : h * b, : w * c].reshape(d, a, h, b, w, c).mean((1, 3, 5), dtype=np.float32)


def _body(hu: Float32[np.ndarray, "D H W"]) -> np.ndarray:
    """The largest connected region of tissue, including enclosed regions of each axial slice, such as the lungs."""
    dense = hu > BODY_HU
    for y in range(hu.shape[1]):
        dense[:, y] = ndimage.binary_fill_holes(dense[:, y])
    pieces, count = ndimage.label(ndimage.binary_opening(dense, np.ones((3, 1, 3))))
    if count == 0:
        raise InputError(
            f"the scan shows no body: no connected region is denser than {BODY_HU:g} HU; check that it is in HU"
        )
    return pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])


def shifted_sum(
    layers: Float32[np.ndarray, "C D H W"], shift: Float[np.ndarray, "D 2"]
) -> Float32[np.ndarray, "C H W"]:
    """Sum layers over the depth, each shifted within its plane by bilinear interpolation.

    Args:
        layers: Volumes to sum (C, D, H, W).
        shift: Shift (y, x) of each layer in px: the output at p takes the layer at p + shift (D, 2).

    Returns:
        The sums (C, H, W); layers are extended by their border values.
    """
    c, _, h, w = layers.shape
    whole = np.floor(shift).astype(int)
    part = (shift - whole).astype(np.float32)
    total = np.zeros((c, h, w), np.float32)
    for layer, (y, x), (fy, fx) in zip(layers.swapaxes(0, 1), whole, part, strict=True):
        rows, columns = np.clip(np.arange(h + 1) + y, 0, h - 1), np.clip(np.arange(w + 1) + x, 0, w - 1)
        taken = layer.take(rows, axis=1)
        lines = (1 - fy) * taken[:, :-1] + fy * taken[:, 1:]
        lines = lines.take(columns, axis=2)
        total += (1 - fx) * lines[..., :-1] + fx * lines[..., 1:]
    return total


def project(anatomy: Anatomy, slope: Float[np.ndarray, "2"]) -> Float32[np.ndarray, "3 H W"]:
    """Project the anatomy along parallel rays onto the frontal plane at mid-depth.

    Args:
        anatomy: Contributions of the voxels.
        slope: Slope (y, x) of the rays per unit of depth. Up to a stretch below 1 %, this is the frontal projection
            of the body rotated by atan(slope) about the left-right and the head-foot axis.

    Returns:
        Line integral (dimensionless), thickness of the right lung and of the left lung in mm, (3, H, W).
    """
    depth_mm, *pixel_mm = anatomy.spacing
    n = anatomy.layers.shape[1]
    shift = np.outer((np.arange(n) - (n - 1) / 2) * depth_mm, slope / np.array(pixel_mm))
    return shifted_sum(anatomy.layers, shift)


def construct(
    lungs: Float32[np.ndarray, "2 H W"], pixel_mm: tuple[float, float]
) -> tuple[Float[np.ndarray, "15 2"], Axis]:
    """Construct the 15 landmarks of projected lungs.

    Points 1 and 2 are the ends of the axis, which runs midway between the outer lung borders from the level of the
    apices to that of the costophrenic angles. Points 9, 10 and 11 divide it into quarters. Perpendicular to the axis
    are the outer borders at these quarters (3 to 8), the apices (12, 13) and the costophrenic angles (14, 15), the
    left of the image first.

    Args:
        lungs: Thickness of the right and of the left lung in mm (2, H, W).
        pixel_mm: Pixel size (y, x) in mm.

    Returns:
        The landmarks (y, x) in mm from pixel (0, 0), (15, 2), and their axis.

    Raises:
        InputError: The lungs are too thin to be visible.
    """
    middle, down = _midline(lungs, pixel_mm)
    line = Axis(middle, down, 0.0)
    sides = [_outline(lung, pixel_mm, line, side) for lung, side in zip(lungs, (-1, 1), strict=True)]
    first, last = (float(np.mean([getattr(side, end)[0] for side in sides])) for end in ("apex", "corner"))
    axis = Axis(middle + down * (first + last) / 2, down, last - first)
    levels = np.array(QUARTERS)
    borders = [np.interp(first + levels * axis.length, side.t, side.border) for side in sides]
    share = np.array([0, 1, *levels.repeat(2), *levels, 0, 0, 1, 1])
    offset = [0, 0, *np.ravel(borders, "F"), 0, 0, 0, *(s.apex[1] for s in sides), *(s.corner[1] for s in sides)]
    start = axis.middle - down * axis.length / 2
    return start + np.outer(share * axis.length, down) + np.outer(offset, axis.across), axis


class _Outline(NamedTuple):
    """Outer border of one lung in mm along (t) and across the axis, its apex and its costophrenic angle (t, across)."""

    t: np.ndarray
    border: np.ndarray
    apex: tuple[float, float]
    corner: tuple[float, float]


def _outline(lung: np.ndarray, pixel_mm: tuple[float, float], axis: Axis, side: int) -> _Outline:
    half = 0.6 * np.array(lung.shape) * pixel_mm
    t, s = np.arange(-half[0], half[0], STEP_MM), np.arange(0, half[1], STEP_MM)
    grid = axis.middle + t[:, None, None] * axis.down + side * s[:, None] * axis.across
    indices = np.moveaxis(grid / pixel_mm, -1, 0)
    thick = ndimage.map_coordinates(lung, indices, order=1, mode="constant")
    rows = np.flatnonzero((thick >= LUNG_MM).any(1))
    border = _last_crossing(thick[rows])
    low = int(np.argmax(rows + border))  # the farthest downwards and outwards
    apex = float(np.flatnonzero((thick[rows[:4]] >= LUNG_MM).any(0)).mean())
    t_of, s_of = t[rows], side * STEP_MM
    return _Outline(t_of, s_of * border, (float(t_of[0]), s_of * apex), (float(t_of[low]), float(s_of * border[low])))


def _last_crossing(rows: np.ndarray) -> np.ndarray:
    """Position, in steps, at which each row falls below LUNG_MM for the last time."""
    n, size = rows.shape
    last = np.minimum(size - 1 - np.argmax(rows[:, ::-1] >= LUNG_MM, axis=1), size - 2)
    inside, outside = rows[np.arange(n), last], rows[np.arange(n), last + 1]
    return last + np.clip((inside - LUNG_MM) / np.maximum(inside - outside, 1e-6), 0, 1)


def _midline(lungs: np.ndarray, pixel_mm: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """A point on the least-squares line midway between the outer borders, and its direction."""
    right, left = lungs >= LUNG_MM
    rows = np.flatnonzero(right.any(1) & left.any(1))
    if rows.size < 2:
        raise InputError(f"both lungs must be at least {LUNG_MM:g} mm thick in at least 2 rows of the projection, but "
                         f"are in {rows.size}. Check the labels and the spacing.")  # fmt: skip
    trimmed = rows.size // 6  # the end rows of a tilted chest show only one side
    rows = rows[trimmed : rows.size - trimmed]
    first = np.argmax(right[rows], axis=1)
    last = right.shape[1] - 1 - np.argmax(left[rows, ::-1], axis=1)
    y, x = rows * pixel_mm[0], (first + last) / 2 * pixel_mm[1]
    slope, start = np.polyfit(y, x, 1)
    down = np.array([1, slope]) / np.hypot(1, slope)
    return np.array([y.mean(), start + slope * y.mean()]), down
