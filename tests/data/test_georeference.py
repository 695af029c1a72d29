"""Georeferences of images and masks, by their tags."""

from pathlib import Path

import numpy as np
import pytest

from pulmo_jax.data.georeference import check_georeferences, epsg_code, geo_key, map_transform
from pulmo_jax.types import ImageTags, InputError


def tags(scale=(10.0, 20.0), tie=(0.0, 0.0, 500.0, 9000.0), keys=(), matrix=None) -> ImageTags:
    x, y, east, north = tie
    geo = [(33550, 12, 3, (*scale, 0.0)), (33922, 12, 6, (x, y, 0.0, east, north, 0.0))]
    if matrix is not None:
        geo = [(34264, 12, 16, tuple(np.ravel(matrix)))]
    if keys:
        entries = [value for key, code in keys for value in (key, 0, 1, code)]
        geo.append((34735, 3, 4 + len(entries), (1, 1, 0, len(keys), *entries)))
    return ImageTags(geo=tuple(geo))


def test_transform_of_scale_and_tie_point():
    matrix = map_transform(tags(tie=(3.0, 2.0, 500.0, 9000.0)))
    assert matrix is not None
    np.testing.assert_allclose(matrix @ [3, 2, 1], [500, 9000])
    np.testing.assert_allclose(matrix @ [4, 3, 1], [510, 8980])


def test_transform_of_a_matrix():
    rotated = [[6.0, 8.0, 0, 100], [8.0, -6.0, 0, 200], [0, 0, 0, 0], [0, 0, 0, 1]]
    matrix = map_transform(tags(matrix=rotated))
    assert matrix is not None
    np.testing.assert_allclose(matrix @ [2, 1, 1], [120, 210])


def test_points_and_areas_differ_by_half_a_pixel():
    area, point = map_transform(tags(keys=[(1025, 1)])), map_transform(tags(keys=[(1025, 2)]))
    assert area is not None
    assert point is not None
    np.testing.assert_allclose(area @ [0, 0, 1], [500, 9000])
    np.testing.assert_allclose(point @ [0.5, 0.5, 1], [500, 9000])


def test_coordinate_systems():
    assert epsg_code(tags(keys=[(1024, 1), (3072, 32633)])) == 32633
    assert epsg_code(tags(keys=[(1024, 2), (2048, 4326)])) == 4326
    assert epsg_code(tags(keys=[(3072, 32767)])) is None
    assert epsg_code(tags()) is None
    assert geo_key(tags(keys=[(1024, 1)]), 1024) == 1


@pytest.mark.parametrize(
    "geo",
    [
        (),
        ((33550, 12, 3, (10.0, 10.0, 0.0)),),
        ((33922, 12, 6, (0.0,) * 6),),
        ((33550, 12, 3, (0.0, 0.0, 0.0)), (33922, 12, 6, (0.0,) * 6)),
        ((34264, 12, 16, (float("nan"),) * 16),),
        ((33550, 12, 1, 10.0), (33922, 12, 6, (0.0,) * 6)),
    ],
)
def test_images_that_are_nowhere(geo):
    assert map_transform(ImageTags(geo=geo)) is None


def agree(image: ImageTags, mask: ImageTags, shape=(100, 200), mask_shape=(100, 200)) -> bool:
    try:
        check_georeferences(Path("i.tif"), image, shape, Path("m.tif"), mask, mask_shape)
    except InputError as error:
        assert "m.tif" in str(error)
        assert "i.tif" in str(error)
        return False
    return True


def test_agreement():
    plain = tags()
    assert agree(plain, plain)
    assert agree(plain, ImageTags())
    assert agree(plain, tags(tie=(0.0, 0.0, 504.9, 9000.0)))
    assert not agree(plain, tags(tie=(0.0, 0.0, 505.1, 9000.0)))
    assert agree(plain, tags(tie=(0.0, 0.0, 500.0, 9009.9)))
    assert not agree(plain, tags(tie=(0.0, 0.0, 500.0, 9010.1)))
    assert agree(plain, tags(tie=(50.0, 10.0, 1000.0, 8800.0)))  # another point of the same grid
    assert agree(plain, tags(scale=(10.02, 20.0)))
    assert not agree(plain, tags(scale=(10.03, 20.0)))  # 0.6 px at the right border
    assert not agree(plain, tags(scale=(10.0, -20.0)))  # south up
    assert agree(plain, tags(scale=(20.0, 40.0)), mask_shape=(50, 100))
    assert not agree(plain, tags(scale=(20.0, 40.0)))
    assert agree(plain, tags(matrix=[[10, 0, 0, 500], [0, -20, 0, 9000], [0, 0, 0, 0], [0, 0, 0, 1]]))
    assert agree(tags(keys=[(3072, 32633)]), plain)
    assert not agree(tags(keys=[(3072, 32633)]), tags(keys=[(3072, 32632)]))
