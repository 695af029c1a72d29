"""Sample radiographs: rays, constructed landmarks, and pixels that move with their points; on a synthetic chest."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pulmo_jax.data import projection, radiographs
from pulmo_jax.types import InputError

RNG = np.random.default_rng(0)
SPACING = (7.0, 8.0, 6.0)  # Z, H, W in mm
SHAPE = Z, H, W = 40, 30, 56
PAIRS = [(11, 12), (2, 3), (4, 5), (6, 7), (13, 14)]


def chest():
    """(hu, labels), slices from the feet up: two ellipsoids of lung in a cylinder of water, a table behind it."""
    z, y, x = np.indices(SHAPE)
    hu = np.full(SHAPE, -1000, np.float32)
    hu[np.hypot((y - 14) / 12, (x - 27.5) / 26) < 1] = 0
    hu[:, 28:29, 4:52] = 200
    labels = np.zeros(SHAPE, np.uint8)
    for label, column in ((13, 16), (11, 39)):
        labels[((z - 20) / 13) ** 2 + ((y - 14) / 8) ** 2 + ((x - column) / 8) ** 2 < 1] = label
    hu[labels > 0] = -850
    return hu, labels


@pytest.fixture(scope="module")
def anatomy():
    return projection.anatomy(*chest(), SPACING)


def cosines(points):
    axis = points[1] - points[0]
    across = np.array([points[right] - points[left] for left, right in PAIRS])
    return np.abs(across @ axis) / np.linalg.norm(across, axis=1) / np.linalg.norm(axis)


def test_shifted_sum_is_scipys_shift_of_every_layer():
    layers, shift = RNG.random((2, 5, 9, 11), np.float32), RNG.uniform(-3, 3, (5, 2))
    expected = sum(
        np.stack([ndimage.shift(layer, -by, order=1, mode="nearest") for layer in layers[:, i]])
        for i, by in enumerate(shift)
    )
    np.testing.assert_allclose(projection.shifted_sum(layers, shift), expected, rtol=1e-5)


def test_straight_rays_follow_beer_and_lambert_through_the_body_alone(anatomy):
    hu, labels = chest()
    hu[:, 28] = -1000  # without the table
    expected = projection.WATER_PER_MM * (1 + hu / 1000).clip(0).sum(1)[::-1] * SPACING[1]
    integral, right, left = projection.project(anatomy, np.zeros(2))
    np.testing.assert_allclose(integral, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(right, (labels == 13).sum(1)[::-1] * SPACING[1], atol=1e-4)
    np.testing.assert_allclose(left, (labels == 11).sum(1)[::-1] * SPACING[1], atol=1e-4)


def test_inclined_rays_show_what_lies_in_front_displaced(anatomy):
    """A voxel in front of mid-depth moves by the ray's slope times its distance."""
    layers = np.zeros_like(anatomy.layers)
    layers[:, 3, 20, 28] = 1
    slope = np.array([0.2, -0.1])
    image = projection.project(anatomy._replace(layers=layers), slope)[0]
    place = ndimage.center_of_mass(image) * np.array([SPACING[0], SPACING[2]])
    depth_mm = (3 - (H - 1) / 2) * SPACING[1]
    np.testing.assert_allclose(place, np.array([20 * SPACING[0], 28 * SPACING[2]]) - slope * depth_mm, atol=1e-3)


def test_fine_volumes_are_averaged(monkeypatch):
    hu, labels = chest()
    monkeypatch.setattr(projection, "MAX_SHAPE", (15, 20, 28))
    coarse = projection.anatomy(hu, labels, SPACING)
    assert coarse.layers.shape == (3, 15, 20, 28)
    assert coarse.spacing == (16.0, 14.0, 12.0)
    fine = projection.anatomy(hu, labels, SPACING)
    np.testing.assert_allclose(coarse.layers[1].sum(), (labels == 13).sum() * SPACING[1] / 4, rtol=1e-5)
    assert fine.layers.dtype == np.float32


@pytest.mark.parametrize(("damage", "message"), [("labels", "both are required"), ("hu", "shows no body")])
def test_scan_without_lungs_or_body_is_refused(damage, message):
    hu, labels = chest()
    hu, labels = (hu, np.where(labels == 11, 0, labels)) if damage == "labels" else (hu * 0 - 1000, labels)
    with pytest.raises(InputError, match=message):
        projection.anatomy(hu, labels, SPACING)


def test_landmarks_of_boxes_are_known():
    """Lungs as trapezia with straight borders, tilted by a known angle about a known axis."""
    pixel_mm, tilt = (2.0, 1.5), 0.06
    y, x = np.indices((170, 230)) * np.array(pixel_mm)[:, None, None]
    down, across = np.array([np.cos(tilt), np.sin(tilt)]), np.array([-np.sin(tilt), np.cos(tilt)])
    along, beside = (((y - 170) * v[0] + (x - 170) * v[1]) for v in (down, across))
    inside = (np.abs(along) < 100) & (np.abs(beside) > 20) & (np.abs(beside) < 110)
    lungs = np.stack([inside & (beside < 0), inside & (beside > 0)]).astype(np.float32) * 100
    points, axis = projection.construct(lungs, pixel_mm)
    share = np.array([-0.5, 0.5, -0.25, -0.25, 0, 0, 0.25, 0.25, -0.25, 0, 0.25, -0.5, -0.5, 0.5, 0.5])
    offset = np.array([0, 0, *3 * (-110, 110), 0, 0, 0, -65, 65, -110, 110])
    expected = np.array([170, 170]) + np.outer(share * 200, down) + np.outer(offset, across)
    np.testing.assert_allclose(points[:11], expected[:11], atol=2)
    np.testing.assert_allclose(points[13:], expected[13:], atol=2)
    # Of a flat top, tilted by less than a pixel's height, any place may be the highest.
    assert (np.abs((points[11:13] - expected[11:13]) @ down) < 2).all()
    np.testing.assert_allclose(np.arctan2(*axis.down[::-1]), tilt, atol=0.01)
    assert axis.length == pytest.approx(200, abs=3)
    np.testing.assert_allclose(cosines(points), 0, atol=1e-9)


def test_constructed_points_obey_the_rules_and_lie_on_the_borders(anatomy):
    _, *lungs = projection.project(anatomy, np.zeros(2))
    pixel_mm = anatomy.spacing[1:]
    points, _ = projection.construct(np.stack(lungs), pixel_mm)
    for k, share in zip((8, 9, 10), (0.25, 0.5, 0.75), strict=True):
        np.testing.assert_allclose(points[k], points[0] + share * (points[1] - points[0]), atol=1e-9)
    np.testing.assert_allclose(cosines(points), 0, atol=1e-9)
    thick = ndimage.map_coordinates(np.sum(lungs, axis=0), (points[2:8] / pixel_mm).T, order=1)
    np.testing.assert_allclose(thick, projection.LUNG_MM, atol=12)  # its slope there is up to 10 mm per mm
    assert (points[[2, 4, 6, 11, 13], 1] < points[[3, 5, 7, 12, 14], 1]).all()


def test_construction_without_lungs_in_sight_is_refused():
    with pytest.raises(InputError, match="Check the labels"):
        projection.construct(np.zeros((2, 20, 20), np.float32), (1.0, 1.0))


@pytest.mark.parametrize("seed", range(5))
def test_image_position_inverts_film_position(seed):
    rng = np.random.default_rng(seed)
    view, film = radiographs.draw_view(rng), rng.uniform(-150, 150, (50, 2))
    image = radiographs.image_position(film, view, 190.0, 256)
    np.testing.assert_allclose(radiographs.film_position(image, view, 190.0, 256), film, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_pixels_move_with_their_points(seed):
    """A bright spot on the film is seen where its point is said to be."""
    rng = np.random.default_rng(seed)
    view, pixel_mm, film = radiographs.draw_view(rng), (2.5, 1.4), np.array([[30.0, -45.0]])
    axis = projection.Axis(np.array([160.0, 180.0]), np.array([np.cos(0.1), np.sin(0.1)]), 190.0)
    y, x = np.indices((133, 256)) * np.array(pixel_mm)[:, None, None]
    centre = axis.middle + (film @ np.stack([axis.down, axis.across]))[0]
    spot = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 2 / 6**2)
    seen = radiographs._sample(spot, pixel_mm, axis, view, 256)
    expected = radiographs.image_position(film, view, axis.length, 256)[0]
    np.testing.assert_allclose(ndimage.center_of_mass(np.where(seen > 0.3, seen, 0)), expected, atol=0.25)


def test_radiographs_hold_all_their_landmarks_and_depend_on_seed_and_number_alone(anatomy):
    first = list(radiographs.render_all(anatomy, {"train": 5, "val": 1}, seed=3))
    second = list(radiographs.render_all(anatomy, {"train": 4, "test": 2}, seed=3))
    assert [name for name, *_ in first] == ["train"] * 5 + ["val"]
    assert first[2][1] == "Opacity-0003.png"
    for (*_, a), (*_, b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.points, b.points)
        assert ((a.points > 0) & (a.points < radiographs.SIDE_PX - 1)).all()
        assert a.image.std() > 20
    assert not np.array_equal(first[0][2].image, next(radiographs.render_all(anatomy, {"train": 1}, seed=4))[2].image)


def test_pairs_stay_as_perpendicular_as_in_published_labels(anatomy):
    drawn = [radiograph.points for *_, radiograph in radiographs.render_all(anatomy, {"train": 12})]
    assert 0.0005 < np.mean([cosines(points) for points in drawn]) < 0.0125


def test_opacities_are_in_the_lungs_and_only_add(anatomy):
    _, *lungs = projection.project(anatomy, np.zeros(2))
    thick = np.sum(lungs, axis=0)
    added = radiographs._opacity(thick, anatomy.spacing[1:], np.random.default_rng(0))
    assert (added >= 0).all()
    assert (added[thick == 0] == 0).all()
    densest = projection.WATER_PER_MM * radiographs.OPACITY_HU[1] / 1000 * thick.max()
    assert 0.2 * densest < added.max() <= densest


def test_scan_that_never_fits_is_refused(anatomy, monkeypatch):
    monkeypatch.setattr(radiographs, "CENTRE", (3.0, 0.5))
    monkeypatch.setattr(radiographs, "MAX_TRIES", 3)
    with pytest.raises(InputError, match="none of 3 random views"):
        radiographs.render(anatomy, np.random.default_rng(0), "Normal")


def test_prepared_folder_is_laid_out_as_a_users_own(tmp_path, monkeypatch):
    hu, labels = chest()
    for name, volume in (("cxr", hu.astype(np.int16)), ("mask", labels)):
        voxels = np.ascontiguousarray(volume[:, ::-1].transpose(2, 1, 0))
        nib.save(
            nib.Nifti1Image(voxels, np.diag([-SPACING[2], SPACING[1], SPACING[0], 1])), tmp_path / f"{name}.nii.gz"
        )
    monkeypatch.setattr(radiographs, "COUNTS", {"train": 3, "val": 1, "test": 1})
    folder = tmp_path / "radiographs"
    radiographs.prepare(tmp_path, folder, {"tiny==1.0": {"cxr.nii.gz": "0"}})
    facts = json.loads((folder / "sample.json").read_text())
    assert "a single patient" in facts["licence"]
    assert facts["counts"] == {"train": 3, "val": 1, "test": 1}
    assert len(facts["files"]) == 5 + 3
    rows = list(csv.reader((folder / "landmarks_train.csv").read_text().splitlines()))
    assert rows[0][:3] == ["filename", "x1", "y1"]
    assert [len(row) for row in rows] == [31] * 4
    expected = list(radiographs.render_all(projection.anatomy(hu, labels, SPACING), {"train": 3}))
    for row, (_, filename, radiograph) in zip(rows[1:], expected, strict=True):
        assert row[0] == filename
        np.testing.assert_allclose(np.array(row[1:], float).reshape(15, 2)[:, ::-1], radiograph.points, atol=6e-4)
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "images" / filename)), radiograph.image)
