"""Components found strip by strip are those of the whole mask, and their outlines enclose exactly their pixels."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from scipy import ndimage
from skimage.measure import label, regionprops

from pulmo_jax.inference.components import OpenComponents, find_components
from pulmo_jax.inference.polygons import PIXEL_NOTE, geometry, polygons_of, twice_area, write_geojson

SHAPES = {
    "ring": ["XXXX", "X..X", "X..X", "XXXX"],
    "holes that touch": ["XXXXX", "X.XXX", "XX.XX", "XXXXX"],
    "hole open at a corner": ["XXXX", "X.XX", "XX.X", "XXX."],
    "hole that touches the outside": ["XXX.", "X.XX", "XX.X", "XXXX"],
    "diagonal": ["X...", ".X..", "..X.", "...X"],
    "island in a hole": ["XXXXX", "X...X", "X.X.X", "X...X", "XXXXX"],
    "island that touches its ring": ["XXXXX", "X...X", "X.X.X", "X..XX", "XXXXX"],
    "U": ["X.X", "X.X", "XXX"],
    "comb": ["X.X.X", "X.X.X", "XXXXX", "X.X.X"],
    "spiral": ["XXXXX", "....X", "XXX.X", "X...X", "XXXXX"],
}


def parse(rows: list[str]) -> np.ndarray:
    return np.array([[c == "X" for c in row] for row in rows])


def in_strips(mask: np.ndarray, probability: np.ndarray, heights: list[int], min_area_px: int = 1):
    found, y = OpenComponents(min_area_px), 0
    while y < len(mask):
        height = heights[y % len(heights)]
        found = found.add(mask[y : y + height], probability[y : y + height])
        y += height
    return found


def expected(mask: np.ndarray, probability: np.ndarray) -> list[tuple]:
    """Of scikit-image, on the whole mask."""
    return sorted(
        (
            region.bbox,
            int(region.area),
            round(region.centroid[0], 9),
            round(region.centroid[1], 9),
            round(float(region.image_intensity[region.image].astype(float).mean()), 6),
            round(float(region.image_intensity[region.image].max()), 6),
        )
        for region in regionprops(label(mask, connectivity=2), probability)
    )


def described(components) -> list[tuple]:
    return sorted(
        (
            (c.box.y, c.box.x, c.box.y + c.box.height, c.box.x + c.box.width),
            c.area_px,
            round(c.y, 9),
            round(c.x, 9),
            round(c.mean_probability, 6),
            round(c.max_probability, 6),
        )
        for c in components
    )


def rasterised(polygons, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre is in an exterior ring and in no hole of it, by matplotlib."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    centres, inside = np.stack([x.ravel() + 0.5, y.ravel() + 0.5], axis=1), np.zeros(shape[0] * shape[1], int)
    for exterior, *holes in polygons:
        own = Outline(exterior[:, ::-1]).contains_points(centres).astype(int)
        inside += own - sum((Outline(hole[:, ::-1]).contains_points(centres).astype(int) for hole in holes), 0 * own)
    assert inside.min() >= 0
    assert inside.max() <= 1
    return inside.reshape(shape).astype(bool)


def check_rings(polygons, area_px: int) -> None:
    assert sum(twice_area(ring) for polygon in polygons for ring in polygon) == 2 * area_px
    for exterior, *holes in polygons:
        assert twice_area(exterior) > 0
        assert all(twice_area(hole) < 0 for hole in holes)
        for ring in (exterior, *holes):
            assert len(np.unique(ring, axis=0)) == len(ring)  # simple
            steps = np.roll(ring, -1, axis=0) - ring
            assert ((steps == 0).sum(axis=1) == 1).all()  # along rows and columns in turn
            assert ((steps[:, 0] == 0) != (np.roll(steps, 1, axis=0)[:, 0] == 0)).all()


@given(st.integers(0, 10**6), st.floats(0.2, 0.8), st.lists(st.integers(1, 7), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_components_of_strips_are_those_of_the_whole_mask(seed, density, heights):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 24, 2))
    mask, probability = rng.random(shape) < density, rng.random(shape, np.float32)
    found = in_strips(mask, probability, heights).finish()
    assert described(found) == expected(mask, probability)
    assert [c.area_px for c in found] == sorted((c.area_px for c in found), reverse=True)
    whole = np.zeros(shape, int)
    for component in found:
        polygons = polygons_of(component.corners)
        check_rings(polygons, component.area_px)
        whole += rasterised(polygons, shape)
    np.testing.assert_array_equal(whole, mask)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("height", [1, 2, 9])
def test_outlines_of_awkward_shapes(name, height):
    mask = parse(SHAPES[name])
    for turned in (mask, mask[::-1], mask[:, ::-1], mask.T):
        found = in_strips(turned, turned.astype(np.float32), [height]).finish()
        polygons = [polygon for component in found for polygon in polygons_of(component.corners)]
        check_rings(polygons, turned.sum())
        np.testing.assert_array_equal(rasterised(polygons, turned.shape), turned)
        assert len(found) == ndimage.label(turned, np.ones((3, 3)))[1]
        assert len(polygons) == ndimage.label(turned)[1]  # each connected by its sides
        background = ndimage.label(np.pad(~turned, 1, constant_values=True))[1] - 1
        assert sum(len(polygon) - 1 for polygon in polygons) <= background


def test_smooth_shapes_of_some_size():
    rng = np.random.default_rng(0)
    mask = ndimage.gaussian_filter(rng.normal(size=(300, 400)), 4) > 0.01
    probability = rng.random(mask.shape, np.float32)
    found = in_strips(mask, probability, [37]).finish()
    assert described(found) == expected(mask, probability)
    polygons = [polygon for component in found for polygon in polygons_of(component.corners)]
    np.testing.assert_array_equal(rasterised(polygons, mask.shape), mask)


def test_small_components_are_not_listed():
    mask = parse(["XX..X", "XX...", "....X", ".X..X", "....X"])
    found = find_components(mask, mask.astype(np.float32), 3)
    assert [(c.area_px, c.box) for c in found] == [(4, (0, 0, 2, 2)), (3, (2, 4, 3, 1))]


def test_components_below_the_probability_threshold_are_not_listed():
    mask, probability = parse(["XX..X", "X...."]), np.array([[0.5, 0.9, 0, 0, 0.6], [0.5, 0, 0, 0, 0]], np.float32)
    for threshold, count in ((0.6, 2), (0.61, 1), (0.9, 1), (float("inf"), 0)):
        state = OpenComponents(min_probability=float(np.float32(threshold)))
        assert len(state.add(mask, probability).finish()) == count


def test_finished_components_do_not_stay_open():
    """Memory is that of the last row, not of the image."""
    mask = np.zeros((2000, 50), bool)
    mask[::2, ::2] = True
    state = in_strips(mask, mask.astype(np.float32), [10], min_area_px=2)
    assert len(state.sums.area) <= 25
    assert len(state.corners.kind) <= 100
    assert state.done == ()


def test_empty_mask_has_no_components():
    assert find_components(np.zeros((5, 7), bool), np.zeros((5, 7), np.float32)) == ()
    assert OpenComponents().finish() == ()


def test_outlines_can_be_left_out():
    mask = parse(SHAPES["ring"])
    state = OpenComponents(outlined=False).add(mask, mask.astype(np.float32))
    (found,) = state.finish()
    assert found.area_px == 12
    assert len(found.corners.kind) == 0


# --- GeoJSON


def feature(name: str, transform=None) -> dict:
    (component,) = find_components(parse(SHAPES[name]), np.ones(parse(SHAPES[name]).shape, np.float32))
    return {"type": "Feature", "properties": {}, "geometry": geometry(polygons_of(component.corners), transform)}


def signed_area(ring: list[list[float]]) -> float:
    x, y = np.array(ring)[:-1].T
    return 0.5 * float(x @ np.roll(y, -1) - np.roll(x, -1) @ y)


def test_geometry_follows_rfc_7946():
    polygon, several = feature("ring")["geometry"], feature("diagonal")["geometry"]
    assert polygon["type"] == "Polygon"
    exterior, hole = polygon["coordinates"]
    assert (signed_area(exterior), signed_area(hole)) == (16, -4)
    assert exterior[0] == exterior[-1]
    assert several["type"] == "MultiPolygon"
    assert [signed_area(exterior) for (exterior,) in several["coordinates"]] == [1, 1, 1, 1]


def test_map_coordinates_have_the_same_orientation():
    """A map has north at the top: y runs against the rows."""
    transform = np.array([[10.0, 0.0, 399960.3], [0.0, -10.0, 5700000.0]])
    exterior, hole = feature("ring", transform)["geometry"]["coordinates"]
    assert signed_area(exterior) == pytest.approx(1600)
    assert signed_area(hole) == pytest.approx(-400)
    assert sorted(map(tuple, exterior))[0] == (399960.3, 5699960.0)
    assert sorted(map(tuple, exterior))[-1] == (400000.3, 5700000.0)


def test_degrees_keep_a_thousandth_of_a_pixel():
    transform = np.array([[1e-5, 0.0, 7.123456789], [0.0, -1e-5, 50.0]])
    exterior, _ = feature("ring", transform)["geometry"]["coordinates"]
    assert min(exterior)[0] == pytest.approx(7.123456789, abs=1e-8)


def test_file_is_a_feature_collection(tmp_path):
    path = tmp_path / "a.geojson"
    write_geojson(path, [feature("ring"), feature("U")])
    content = json.loads(path.read_text())
    assert content["type"] == "FeatureCollection"
    assert content["note"] == PIXEL_NOTE
    assert [one["geometry"]["type"] for one in content["features"]] == ["Polygon", "Polygon"]
    write_geojson(path, [], 32633, in_pixels=False)
    assert json.loads(path.read_text()) == {
        "type": "FeatureCollection",
        "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}},
        "features": [],
    }
    write_geojson(path, [], 4326, in_pixels=False)
    assert "crs" not in json.loads(path.read_text())
