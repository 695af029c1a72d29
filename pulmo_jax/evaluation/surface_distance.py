"""Distances between the contours of two masks.

The contour runs through the corners between pixels whose 2 x 2 neighbourhood is mixed; each such corner carries the
length of the contour in its neighbourhood. These are the definitions, and to the last digit the numbers, of DeepMind's
surface-distance. Its releases call names that SciPy deprecates and cannot leave out unlabelled pixels, so it serves the
tests only; the distance transform, which is the computation, is SciPy's.

Reference: Nikolov et al., "Clinically applicable segmentation of head and neck anatomy", J. Med. Internet Res. 23,
e26151 (2021).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from scipy.ndimage import distance_transform_edt

PERCENTILE = 95


class SurfaceFigures(NamedTuple):
    """Agreement of two contours.

    Attributes:
        mean: Symmetric mean distance: mean over the length of both contours.
        percentile: The larger of the two directed 95th percentiles of the distance.
        dice: Surface Dice, the fraction of both contours that lies within the tolerance of the other.
    """

    mean: float
    percentile: float
    dice: float


def surface_figures(
    truth: Bool[np.ndarray, "H W"],
    predicted: Bool[np.ndarray, "H W"],
    labelled: Bool[np.ndarray, "H W"],
    spacing: tuple[float, float] = (1.0, 1.0),
    tolerance: float = 2.0,
) -> SurfaceFigures:
    """Compare the contours of two masks inside the labelled area.

    A corner next to an unlabelled pixel belongs to no contour. The edge of the image bounds a mask that reaches it. If
    exactly one mask has a contour, both distances are the diagonal of the image, the longest possible distance, and the
    surface Dice is 0.

    Args:
        truth: True mask.
        predicted: Predicted mask.
        labelled: Labelled pixels.
        spacing: Size of a pixel in y and x.
        tolerance: Largest distance that the surface Dice tolerates, in the unit of the spacing.

    Returns:
        Distances in the unit of the spacing; all NaN if neither mask has a contour.
    """
    box = _bounding_box(labelled & (truth | predicted))
    if box is None:
        return SurfaceFigures(np.nan, np.nan, np.nan)
    known = np.pad(labelled, 1, constant_values=True)[box]
    corners = known[:-1, :-1] & known[:-1, 1:] & known[1:, :-1] & known[1:, 1:]
    lengths = [_contour_lengths(np.pad(mask & labelled, 1)[box], spacing) for mask in (truth, predicted)]
    contours = [(length > 0) & corners for length in lengths]
    if not any(contour.any() for contour in contours):
        return SurfaceFigures(np.nan, np.nan, np.nan)
    if not all(contour.any() for contour in contours):
        diagonal = float(np.hypot(*np.multiply(truth.shape, spacing)))
        return SurfaceFigures(diagonal, diagonal, 0.0)
    nearest = [np.asarray(distance_transform_edt(~other, sampling=spacing)) for other in contours[::-1]]
    distances = [distance[own] for distance, own in zip(nearest, contours, strict=True)]
    weights = [length[contour] for length, contour in zip(lengths, contours, strict=True)]
    distance, weight = np.concatenate(distances), np.concatenate(weights)
    return SurfaceFigures(
        float(np.average(distance, weights=weight)),
        max(_percentile(*pair) for pair in zip(distances, weights, strict=True)),
        float(weight[distance <= tolerance].sum() / weight.sum()),
    )


def _bounding_box(mask: Bool[np.ndarray, "H W"]) -> tuple[slice, slice] | None:
    """Box of the mask with a margin of 1 px, in an image padded by 1 px; None for an empty mask."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if rows.size == 0:
        return None
    return slice(rows[0], rows[-1] + 3), slice(columns[0], columns[-1] + 3)


def _contour_lengths(mask: Bool[np.ndarray, "H W"], spacing: tuple[float, float]) -> Float64[np.ndarray, "H-1 W-1"]:
    """Length of the contour in each 2 x 2 neighbourhood; 0 where all four pixels are alike."""
    height, width = spacing
    diagonal = 0.5 * np.hypot(height, width)
    table = np.full(16, diagonal)  # one pixel, or three: the contour cuts a corner off
    table[[0, 15]] = 0
    table[[0b0011, 0b1100]], table[[0b0101, 0b1010]] = width, height
    table[[0b0110, 0b1001]] = 2 * diagonal
    m = mask.astype(np.uint8)
    return table[8 * m[:-1, :-1] + 4 * m[:-1, 1:] + 2 * m[1:, :-1] + m[1:, 1:]]


def _percentile(distance: Float64[np.ndarray, "n"], weight: Float64[np.ndarray, "n"]) -> float:
    """Smallest distance that at least 95 % of the contour's length does not exceed."""
    order = np.lexsort((weight, distance))
    share = np.cumsum(weight[order]) / weight.sum()
    return float(distance[order][min(np.searchsorted(share, PERCENTILE / 100), distance.size - 1)])
