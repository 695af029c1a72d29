"""Georeference of an image from its GeoTIFF tags, and whether those of an image and its mask agree.

Reference:
    OGC GeoTIFF 1.1 (19-008r4), sec. 7.1.1 to 7.1.3 (ModelTiepointTag, ModelPixelScaleTag, ModelTransformationTag).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pulmo_jax.types import ImageTags, InputError

PIXEL_SCALE, TIE_POINTS, TRANSFORMATION, GEO_KEYS = 33550, 33922, 34264, 34735
RASTER_TYPE, GEOGRAPHIC, PROJECTED = 1025, 2048, 3072  # GeoKeys
PIXEL_IS_POINT, USER_DEFINED = 2, 32767
MOST_PX = 0.5  # largest distance of corners that agree


def map_transform(tags: ImageTags) -> Float[np.ndarray, "2 3"] | None:
    """Affine transformation from pixels to map coordinates.

    Args:
        tags: Tags of the image.

    Returns:
        Matrix A with (X, Y) = A (x, y, 1), where x and y are 0 at the upper left corner of the upper left pixel; None
        if the tags state none.
    """
    values = {code: np.ravel(np.asarray(value, float)) for code, _, _, value in tags.geo if code != GEO_KEYS
              and code in (PIXEL_SCALE, TIE_POINTS, TRANSFORMATION)}  # fmt: skip
    if len(values.get(TRANSFORMATION, ())) == 16:
        matrix = values[TRANSFORMATION].reshape(4, 4)[:2, [0, 1, 3]]
    elif len(values.get(PIXEL_SCALE, ())) >= 2 and len(values.get(TIE_POINTS, ())) >= 6:
        (across, down), (x, y, _, east, north, _) = values[PIXEL_SCALE][:2], values[TIE_POINTS][:6]
        matrix = np.array([[across, 0.0, east - x * across], [0.0, -down, north + y * down]])
    else:
        return None
    if geo_key(tags, RASTER_TYPE) == PIXEL_IS_POINT:  # the tags refer to the centres of pixels
        matrix = matrix.copy()
        matrix[:, 2] -= matrix[:, :2].sum(axis=1) / 2
    return matrix if np.isfinite(matrix).all() and abs(np.linalg.det(matrix[:, :2])) > 0 else None


def geo_key(tags: ImageTags, key: int) -> int | None:
    """Value of a GeoKey that is a number, such as the EPSG code of the projection; None if it is not stated."""
    for code, _, _, value in tags.geo:
        if code == GEO_KEYS and isinstance(value, Sequence):
            entries = np.asarray(value).ravel()
            entries = entries[4 : 4 + (len(entries) - 4) // 4 * 4].reshape(-1, 4)
            found = entries[(entries[:, 0] == key) & (entries[:, 1] == 0)]
            return int(found[0, 3]) if len(found) else None
    return None


def epsg_code(tags: ImageTags) -> int | None:
    """EPSG code of the coordinate system; None if it is not stated or user-defined."""
    codes = (geo_key(tags, PROJECTED), geo_key(tags, GEOGRAPHIC))
    return next((code for code in codes if code not in (None, 0, USER_DEFINED)), None)


def check_georeferences(
    image: Path,
    image_tags: ImageTags,
    image_shape: Sequence[int],
    mask: Path,
    mask_tags: ImageTags,
    mask_shape: Sequence[int],
) -> None:
    """Check that the georeferences of an image and its mask agree, if both have one.

    Args:
        image: The image.
        image_tags: Its tags.
        image_shape: Its height and width in px.
        mask: The mask.
        mask_tags: Its tags.
        mask_shape: Its height and width in px.

    Raises:
        InputError: The coordinate systems differ, or corners are more than half a pixel apart.
    """
    systems = epsg_code(image_tags), epsg_code(mask_tags)
    if None not in systems and systems[0] != systems[1]:
        raise InputError(
            f"{mask}: has the coordinate system EPSG:{systems[1]}, its image {image} has EPSG:{systems[0]}; warp the "
            "mask to the grid of the image, for example with gdalwarp -r near"
        )
    transform, other = map_transform(image_tags), map_transform(mask_tags)
    if transform is None or other is None:
        return
    corners = _corners(transform, image_shape), _corners(other, mask_shape)
    apart = np.linalg.solve(transform[:, :2], (corners[1] - corners[0]).T).T
    if (distance := float(np.abs(apart).max())) > MOST_PX:
        (x, y), (other_x, other_y) = (corner[0].tolist() for corner in corners)
        raise InputError(
            f"{mask}: lies elsewhere on the map than its image {image}: their corners are up to {distance:.3g} px "
            f"apart (upper left corner at {other_x:.10g}, {other_y:.10g}; of the image at {x:.10g}, {y:.10g}); give the mask "
            "of this image, warp it to the grid of the image (gdalwarp -r near), or remove the tags that are wrong"
        )


def _corners(transform: Float[np.ndarray, "2 3"], shape: Sequence[int]) -> Float[np.ndarray, "4 2"]:
    """Map coordinates of the corners: upper left, upper right, lower left, lower right."""
    height, width = shape[:2]
    pixels = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], float)
    return pixels @ transform.T
