"""Findings across slices, against scipy on the whole volume at once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references.volumes import oblique_affine
from scipy import ndimage

from pulmo_jax.data.images import ImageRef
from pulmo_jax.data.volumes import Volume
from pulmo_jax.evaluation.calibration import Calibrator
from pulmo_jax.inference.volume_findings import COLUMNS, Connected, volume_findings


def volume_of(shape, affine=None, origins=None) -> Volume:
    """Slices (n, H, W) of a file."""
    n, height, width = shape
    affine = np.diag([0.8, 0.5, 3.0, 1.0]) if affine is None else affine
    refs = tuple(ImageRef(Path(), "a.nii", k, n, (height, width, 1), "float32", "a") for k in range(n))
    origins = affine[:3, 3] + np.arange(n)[:, None] * affine[:3, 2] if origins is None else origins
    return Volume("a.nii", refs, "RAS", origins, affine[:3, :2].T)


@pytest.fixture(scope="module")
def calibration():
    calibrator = Calibrator()
    for i in range(19):
        normal = np.random.default_rng(i).random((40, 50), np.float32)
        calibrator = calibrator.add(normal, None, float(normal.max()), str(i))
    return calibrator.finish(0.01, 0.1)


def connect(volume, score, mask, order=None):
    found = Connected(volume.adjacent)
    for k in order if order is not None else range(len(mask)):
        found = found.add(int(k), score[k], mask[k])
    return found


def blobs(seed, shape=(9, 21, 17), share=0.08):
    rng = np.random.default_rng(seed)
    mask = ndimage.binary_dilation(rng.random(shape) < share / 8, iterations=1)
    return rng.random(shape).astype(np.float32), mask


@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.01, 0.08, 0.3]), shuffled=st.booleans())
def test_components_are_those_of_the_whole_volume(calibration, seed, share, shuffled):
    score, mask = blobs(seed, share=share)
    affine = oblique_affine((-0.7, 0.9, 2.5))
    volume = volume_of(mask.shape, affine)
    order = np.random.default_rng(seed).permutation(len(mask)) if shuffled else None
    rows = volume_findings(connect(volume, score, mask, order), volume, calibration)
    labels, n = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    assert len(rows) == n
    assert [row["label"] for row in rows] == list(range(1, n + 1))
    assert [row["peak_score"] for row in rows] == sorted((row["peak_score"] for row in rows), reverse=True)
    for row in rows:
        label = labels[row["peak_slice"], row["peak_y"], row["peak_x"]]
        part = labels == label
        assert row["peak_score"] == score[part].max() == score[row["peak_slice"], row["peak_y"], row["peak_x"]]
        assert row["mean_score"] == pytest.approx(score[part].mean(dtype=float))
        assert row["voxels"] == part.sum()
        k = np.nonzero(part)[0]
        assert (row["first_slice"], row["last_slice"], row["slices"]) == (k.min(), k.max(), len(np.unique(k)))
        assert row["volume_mm3"] == pytest.approx(part.sum() * abs(np.linalg.det(affine[:3, :3])))
        z, v, u = ndimage.center_of_mass(part)
        place = affine @ [u, v, z, 1]
        np.testing.assert_allclose([row["x_mm"], row["y_mm"], row["z_mm"]], place[:3], atol=1e-9)


def test_box_of_known_place_and_size(calibration):
    """4 slices of 6 rows and 10 columns, of 0.8 x 0.5 x 3 mm."""
    mask = np.zeros((12, 30, 40), bool)
    mask[3:7, 10:16, 20:30] = True
    score = np.where(mask, 2, 0).astype(np.float32)
    volume = volume_of(mask.shape)
    (row,) = volume_findings(connect(volume, score, mask), volume, calibration)
    assert row["volume_mm3"] == pytest.approx(4 * 6 * 10 * 0.8 * 0.5 * 3)
    assert (row["x_mm"], row["y_mm"], row["z_mm"]) == pytest.approx((24.5 * 0.8, 12.5 * 0.5, 4.5 * 3))
    assert row["space"] == "RAS"
    assert set(row) == set(COLUMNS)


def test_p_value_of_a_volume_is_the_bound_over_its_slices(calibration):
    """19 normal images: no image has a p-value below 1/20, and no volume of 12 scored slices one below 12/20."""
    mask = np.zeros((14, 8, 8), bool)
    mask[3, 4, 4] = True
    score = np.where(mask, 2, 0).astype(np.float32)
    score[:2] = np.nan  # slices without foreground are not searched
    volume = volume_of(mask.shape)
    (row,) = volume_findings(connect(volume, score, mask), volume, calibration)
    assert row["p_value_image"] == 1 / 20
    assert row["p_value_volume"] == pytest.approx(12 / 20)
    assert row["p_value"] == pytest.approx(1 / (1 + 19 * 40 * 50))


@pytest.mark.slow
@pytest.mark.parametrize("alike", [False, True])
def test_bound_holds_for_volumes_of_normal_slices(calibration, alike):
    """At most a fifth of normal volumes has p_value_volume <= 0.2, whether slices are independent or all the same."""
    rng, hits, volume = np.random.default_rng(0), 0, volume_of((10, 1, 1))
    for _ in range(400):
        normal = tuple(sorted(rng.normal(size=99)))
        peaks = np.full(10, rng.normal()) if alike else rng.normal(size=10)
        score = peaks.astype(np.float32)[:, None, None]
        found = connect(volume, score, np.ones((10, 1, 1), bool))
        (row,) = volume_findings(found, volume, dataclasses.replace(calibration, normal_image_peaks=normal))
        hits += row["p_value_volume"] <= 0.2
    assert 4 <= hits <= 400 * 0.2 + 2 * (400 * 0.2 * 0.8) ** 0.5


def test_findings_do_not_cross_a_gap(calibration):
    origins = np.array([[0, 0, z] for z in (0, 2, 4, 10, 12, 14)], float)
    volume = volume_of((6, 8, 8), origins=origins)
    mask = np.zeros((6, 8, 8), bool)
    mask[:, 3:5, 3:5] = True
    rows = volume_findings(connect(volume, mask.astype(np.float32), mask), volume, calibration)
    assert [(row["first_slice"], row["last_slice"]) for row in rows] == [(0, 2), (3, 5)]
    np.testing.assert_allclose([row["z_mm"] for row in rows], [2, 12])
    np.testing.assert_allclose([row["volume_mm3"] for row in rows], 3 * 4 * 0.8 * 0.5 * 2)


def test_irregular_slices_weigh_as_much_as_their_volume(calibration):
    volume = volume_of((5, 4, 4), origins=np.array([[0, 0, z] for z in (0, 2, 4, 9, 14)], float))
    mask = np.zeros((5, 4, 4), bool)
    mask[1:5, 1, 2] = True
    (row,) = volume_findings(connect(volume, mask.astype(np.float32), mask), volume, calibration)
    thickness = np.array([2, 3.5, 5, 5])
    assert row["volume_mm3"] == pytest.approx(0.4 * thickness.sum())
    assert row["z_mm"] == pytest.approx(thickness @ [2, 4, 9, 14] / thickness.sum())


def test_only_neighbouring_slices_are_held(calibration):
    score, mask = blobs(0, (50, 30, 30))
    found = Connected(np.ones(49, bool))
    for k in range(50):
        found = found.add(k, score[k], mask[k])
        assert list(found.waiting) == ([k] if k < 49 else [])


def test_volume_without_geometry_or_findings(calibration):
    score, mask = blobs(1)
    volume = volume_of(mask.shape, origins=np.full((9, 3), np.nan))
    rows = volume_findings(connect(volume, score, mask), volume, calibration)
    assert len(rows) == ndimage.label(mask, structure=np.ones((3, 3, 3)))[1]
    assert {rows[0][name] for name in ("space", "x_mm", "y_mm", "z_mm", "volume_mm3")} == {None}
    assert volume_findings(connect(volume, score, np.zeros_like(mask)), volume, calibration) == []
