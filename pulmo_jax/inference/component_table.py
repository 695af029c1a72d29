"""Components of the classes of an image as rows of a table and as features of a GeoJSON file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pulmo_jax.data.georeference import epsg_code, geo_key, map_transform
from pulmo_jax.inference.components import Component
from pulmo_jax.inference.polygons import geometry, polygons_of, write_geojson
from pulmo_jax.types import ImageTags

COLUMNS = (
    "filename", "page", "class", "label", "y", "x", "box_y", "box_x", "box_height", "box_width", "area_px", "area_mm2",
    "area_m2", "mean_probability", "max_probability",
)  # fmt: skip
LINEAR_UNITS = 3076  # GeoKey
METRES = {9001: 1.0, 9002: 0.3048, 9003: 1200 / 3937}  # EPSG codes of the metre and the feet


@dataclass(frozen=True)
class PixelArea:
    """Area of a pixel, as far as it is known.

    Attributes:
        mm2: From the pixel spacing, in mm^2.
        m2: From the georeference in a projection, in m^2.
    """

    mm2: float | None = None
    m2: float | None = None

    @classmethod
    def of(cls, tags: ImageTags) -> "PixelArea":
        """Area of the pixels of an image, from its tags."""
        spacing, transform = tags.pixel_mm, map_transform(tags)
        unit = METRES.get(geo_key(tags, LINEAR_UNITS) or 0)
        return cls(
            None if spacing is None else spacing[0] * spacing[1],
            None if transform is None or unit is None else abs(float(np.linalg.det(transform[:, :2]))) * unit**2,
        )


def component_rows(
    filename: str, page: int, classes: Sequence[str], found: Sequence[Sequence[Component]], area: PixelArea
) -> list[dict[str, Any]]:
    """Describe the components of an image.

    Args:
        filename: Name of the image file.
        page: Page of the file.
        classes: Names of the classes.
        found: Components of each class.
        area: Area of a pixel.

    Returns:
        Values by column (see `COLUMNS`); labels are numbers from 1 through all classes.
    """
    rows = []
    for name, components in zip(classes, found, strict=True):
        for one in components:
            box = dict(zip(("box_y", "box_x", "box_height", "box_width"), one.box, strict=True))
            rows.append(
                {"filename": filename, "page": page, "class": name, "label": len(rows) + 1, "y": one.y, "x": one.x}
                | box
                | {
                    "area_px": one.area_px,
                    "area_mm2": None if area.mm2 is None else one.area_px * area.mm2,
                    "area_m2": None if area.m2 is None else one.area_px * area.m2,
                    "mean_probability": one.mean_probability,
                    "max_probability": one.max_probability,
                }
            )
    return rows


def write_polygons(
    path: Path, rows: Sequence[Mapping[str, Any]], found: Sequence[Sequence[Component]], tags: ImageTags
) -> None:
    """Write the outlines of the components of an image as GeoJSON.

    Args:
        path: Output file.
        rows: Result of `component_rows`.
        found: Components of each class, with corners.
        tags: Tags of the image; with a georeference the coordinates are those of the map, otherwise pixels.
    """
    transform, epsg = map_transform(tags), epsg_code(tags)
    system = {} if transform is None or epsg is None else {"epsg": epsg}

    def features() -> Iterator[dict[str, Any]]:
        every = (component for components in found for component in components)
        for row, one in zip(rows, every, strict=True):
            known = {name: value for name, value in row.items() if value is not None}
            outline = geometry(polygons_of(one.corners), transform)
            yield {"type": "Feature", "properties": known | system, "geometry": outline}

    write_geojson(path, features(), epsg, in_pixels=transform is None)
