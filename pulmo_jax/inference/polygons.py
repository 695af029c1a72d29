"""Outlines of components along the edges of pixels, as GeoJSON.

A component is a Polygon, or a MultiPolygon if some of its parts touch at corners only. Rings are simple: one that
touches itself at a corner is split there. Exterior rings have a positive area in the written coordinates (x, y), holes
a negative one, as RFC 7946 asks for.

Coordinates are pixels, with x to the right and y down from the upper left corner of the image, or map coordinates if
the image has a georeference. RFC 7946 knows only longitude and latitude on WGS 84 (EPSG:4326); for other systems the
file has the member `crs` of GeoJSON 2008, which GIS software reads.

Reference:
    RFC 7946, The GeoJSON Format (2016); Butler et al., The GeoJSON Format Specification (2008), sec. 3, for `crs`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32

from pulmo_jax.host.files import replacing
from pulmo_jax.inference.components import COLUMN_EDGE_DOWN, LEAVES_ALONG_ROW, ROW_EDGE_RIGHT, Corners

WGS84 = 4326
PIXEL_NOTE = "coordinates in pixels: x to the right and y down from the upper left corner of the image"

Ring = Int32[np.ndarray, "_ 2"]  # rows and columns of corners, not closed
Polygon = list[Ring]  # exterior ring, then holes


def polygons_of(corners: Corners) -> list[Polygon]:
    """Chain the corners of a component to polygons.

    Args:
        corners: Corners of its outlines.

    Returns:
        One polygon for each part that is connected by the sides of pixels.
    """
    exteriors: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = {}
    for part, ring in rings_of(corners):
        if twice_area(ring) > 0:
            exteriors[part] = ring
        else:
            holes.setdefault(part, []).append(ring)
    return [[ring, *holes.get(part, [])] for part, ring in exteriors.items()]


def rings_of(corners: Corners) -> Iterator[tuple[int, Ring]]:
    """Chain corners to simple rings.

    Args:
        corners: Corners of outlines.

    Yields:
        Part and ring.
    """
    following = successors(corners).tolist()
    seen = bytearray(len(following))
    for first in range(len(following)):
        if seen[first]:
            continue
        ring, at = [], first
        while not seen[at]:
            seen[at] = 1
            ring.append(at)
            at = following[at]
        places = corners.place[ring]
        yield from ((int(corners.part[first]), simple) for simple in split(places))


def successors(corners: Corners) -> Int[np.ndarray, "c"]:
    """Index of the next corner along the outline of each corner.

    Corners of a part in a row bound the horizontal edges of its outline in pairs, from left to right; those in a column
    bound the vertical ones.
    """
    (y, x), part = corners.place.T, corners.part
    along_row = partners(np.lexsort((corners.kind & ROW_EDGE_RIGHT, x, y, part)))
    along_column = partners(np.lexsort((corners.kind & COLUMN_EDGE_DOWN, y, x, part)))
    return np.where(corners.kind & LEAVES_ALONG_ROW, along_row, along_column)


def partners(order: Int[np.ndarray, "c"]) -> Int[np.ndarray, "c"]:
    """The other one of each pair of consecutive items."""
    other = np.empty_like(order)
    other[order[0::2]], other[order[1::2]] = order[1::2], order[0::2]
    return other


def split(ring: Ring) -> Iterator[Ring]:
    """Split a ring where it touches itself.

    Args:
        ring: Corners in order.

    Yields:
        Rings in which every corner is there once.
    """
    if len(np.unique(ring, axis=0)) == len(ring):
        yield ring
        return
    path: list[tuple[int, int]] = []
    at: dict[tuple[int, int], int] = {}
    for place in map(tuple, ring.tolist()):
        if place in at:
            first = at[place]
            yield np.array(path[first:], np.int32)
            for gone in path[first:]:
                del at[gone]
            del path[first:]
        at[place] = len(path)
        path.append(place)
    yield np.array(path, np.int32)


def twice_area(ring: Ring) -> int:
    """Twice the signed area of a ring in the coordinates (x, y) of pixels."""
    y, x = ring.astype(np.int64).T
    return int(x @ np.roll(y, -1) - np.roll(x, -1) @ y)


# --- GeoJSON


def geometry(polygons: Iterable[Polygon], transform: Float[np.ndarray, "2 3"] | None = None) -> dict[str, Any]:
    """Geometry of a component.

    Args:
        polygons: Its polygons.
        transform: Affine transformation (X, Y) = A (x, y, 1) to map coordinates; None: pixel coordinates.

    Returns:
        GeoJSON Polygon or MultiPolygon.
    """
    coordinates = [[closed(ring, transform) for ring in polygon] for polygon in polygons]
    if len(coordinates) == 1:
        return {"type": "Polygon", "coordinates": coordinates[0]}
    return {"type": "MultiPolygon", "coordinates": coordinates}


def closed(ring: Ring, transform: Float[np.ndarray, "2 3"] | None) -> list[list[float]]:
    """Coordinates of a closed ring, with its inside on the left in a frame with x to the right and y up."""
    points = np.concatenate([ring, ring[:1]])[:, ::-1]
    if transform is None:
        return points.tolist()
    linear = transform[:, :2]
    if np.linalg.det(linear) < 0:  # y runs up
        points = points[::-1]
    pixel = np.sqrt(np.abs(np.linalg.det(linear)))
    digits = 3 - int(np.floor(np.log10(pixel)))  # a thousandth of a pixel
    return np.round(points @ linear.T + transform[:, 2], digits).tolist()


def write_geojson(
    path: Path, features: Iterable[Mapping[str, Any]], epsg: int | None = None, in_pixels: bool = True
) -> None:
    """Write a FeatureCollection, feature by feature.

    Args:
        path: Output file.
        features: GeoJSON features.
        epsg: EPSG code of the coordinate system; None: not stated.
        in_pixels: Whether the coordinates are pixels.
    """
    head: dict[str, Any] = {"type": "FeatureCollection"}
    if in_pixels:
        head["note"] = PIXEL_NOTE
    elif epsg is not None and epsg != WGS84:
        head["crs"] = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{epsg}"}}
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + ', "features": [')
        for number, feature in enumerate(features):
            file.write(",\n" if number else "\n")
            json.dump(feature, file, allow_nan=False)
        file.write("\n]}\n")
