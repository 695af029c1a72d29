"""Random changes: the points must go where the image goes, and each option must do what its name says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

from pulmo_jax.core.contrast import zscore
from pulmo_jax.core.jitter import (
    CUT,
    Affine,
    mirror_points,
    mirrored_where,
    random_affine,
    random_intensity,
    warp_images,
    warp_points,
)

SIDE = 48
STILL = {"rotation_deg": 0.0, "scale": 0.0, "aspect": 0.0, "shear": 0.0, "shift": 0.0}
USUAL = {"rotation_deg": 10.0, "scale": 0.1, "aspect": 0.1, "shear": 0.1, "shift": 0.03}


def affines(count: int = 4, seed: int = 0, **options: float) -> Affine:
    return random_affine(jax.random.key(seed), count, SIDE, **(STILL | options))


def smooth_images(count: int = 4, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(count, SIDE, SIDE))
    return gaussian_filter(noise, (0, 2, 2)).astype(np.float32)


def spots(points: np.ndarray, sigma: float = 1.5) -> np.ndarray:
    """One image of a Gaussian spot for every point (N, 2)."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.exp(-((y - points[:, 0, None, None]) ** 2 + (x - points[:, 1, None, None]) ** 2) / (2 * sigma**2))


def centroids(images: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    total = images.sum((1, 2))
    return np.stack([(images * y).sum((1, 2)) / total, (images * x).sum((1, 2)) / total], -1)


def test_images_are_sampled_as_scipy_does_it():
    images, affine = smooth_images(), affines(**USUAL)
    centre = (SIDE - 1) / 2
    grid = np.mgrid[:SIDE, :SIDE].reshape(2, -1) - centre
    for image, matrix, shift, found in zip(images, *affine, warp_images(jnp.asarray(images), affine), strict=True):
        where = np.asarray(matrix, np.float64) @ grid + np.asarray(shift)[:, None] + centre
        expected = map_coordinates(image, where, order=1, mode="nearest").reshape(SIDE, SIDE)
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_no_jitter_leaves_everything_where_it_is():
    images, points = smooth_images(), np.random.default_rng(1).uniform(0, SIDE - 1, (4, 3, 2)).astype(np.float32)
    np.testing.assert_allclose(warp_images(jnp.asarray(images), affines()), images, atol=1e-5)
    np.testing.assert_allclose(warp_points(jnp.asarray(points), affines(), SIDE), points, atol=1e-4)


@pytest.mark.parametrize("changed", [*USUAL, "all"])
def test_points_go_where_the_image_goes(changed):
    options = USUAL if changed == "all" else {changed: USUAL[changed]}
    affine = affines(8, seed=3, **options)
    points = np.random.default_rng(2).uniform(17, 30, (8, 2))
    found = centroids(np.asarray(warp_images(jnp.asarray(spots(points), jnp.float32), affine)))
    expected = warp_points(jnp.asarray(points[:, None], jnp.float32), affine, SIDE)[:, 0]
    np.testing.assert_allclose(found, expected, atol=0.03)
    assert np.abs(found - points).max() > 0.3


def test_points_mapped_back_are_the_old_points():
    affine = affines(**USUAL)
    points = np.random.default_rng(4).uniform(-5, SIDE + 5, (4, 6, 2)).astype(np.float32)
    new = np.asarray(warp_points(jnp.asarray(points), affine, SIDE)) - (SIDE - 1) / 2
    back = np.einsum("bij,bkj->bki", affine.matrix, new) + np.asarray(affine.shift)[:, None] + (SIDE - 1) / 2
    np.testing.assert_allclose(back, points, atol=1e-3)


def test_rotations_scales_and_stretches_are_of_the_size_asked_for():
    count, cut_sd = 4000, 0.9527  # sd of a normal deviate cut at 2.5
    rotated = np.asarray(affines(count, rotation_deg=9.0).matrix)
    np.testing.assert_allclose(
        rotated @ rotated.transpose(0, 2, 1), np.broadcast_to(np.eye(2), rotated.shape), atol=1e-5
    )
    angles = np.rad2deg(np.arctan2(rotated[:, 1, 0], rotated[:, 0, 0]))
    assert np.std(angles) == pytest.approx(9 * cut_sd, rel=0.05)
    assert np.abs(angles).max() <= 9 * CUT + 1e-3

    scaled = np.asarray(affines(count, scale=0.2).matrix)
    assert np.std(np.log(np.linalg.det(scaled)) / 2) == pytest.approx(0.2 * cut_sd, rel=0.05)
    np.testing.assert_array_equal(scaled[:, 0, 1], 0)

    stretched = np.asarray(affines(count, aspect=0.2).matrix)
    np.testing.assert_allclose(np.linalg.det(stretched), 1, rtol=1e-5)
    assert np.std(np.log(stretched[:, 0, 0] / stretched[:, 1, 1])) == pytest.approx(0.2 * cut_sd, rel=0.05)

    assert np.std(np.asarray(affines(count, shear=0.3).matrix)[:, 0, 1]) == pytest.approx(0.3 * cut_sd, rel=0.05)
    assert np.std(np.asarray(affines(count, shift=0.1).shift), axis=0) == pytest.approx(0.1 * SIDE * cut_sd, rel=0.05)


def test_every_image_has_a_map_of_its_own_and_the_key_decides():
    one, again, other = affines(5, **USUAL), affines(5, **USUAL), affines(5, seed=1, **USUAL)
    np.testing.assert_array_equal(one.matrix, again.matrix)
    assert len(np.unique(np.asarray(one.matrix)[:, 0, 0])) == 5
    assert not np.allclose(one.matrix, other.matrix)
    assert not np.allclose(one.shift, other.shift)


def test_reflected_points_are_those_of_the_reflected_image():
    pair = np.array([[10.0, 8.0], [12.0, 30.0]])
    mirror = jnp.array([1, 0])
    found = np.asarray(mirror_points(jnp.asarray(pair[None], jnp.float32), SIDE, mirror))[0]
    reflected = centroids(spots(pair)[..., ::-1])  # of the points, before they swap
    np.testing.assert_allclose(found, reflected[::-1], atol=1e-3)
    twice = mirror_points(jnp.asarray(found[None]), SIDE, mirror)[0]
    np.testing.assert_allclose(twice, pair, atol=1e-5)


def test_only_the_chosen_are_reflected():
    images = smooth_images(3)
    points = np.random.default_rng(5).uniform(0, SIDE, (3, 2, 2)).astype(np.float32)
    flip, mirror = jnp.array([True, False, True]), jnp.array([1, 0])
    new_images, new_points = mirrored_where(flip, jnp.asarray(images), jnp.asarray(points), mirror)
    np.testing.assert_array_equal(new_images[1], images[1])
    np.testing.assert_array_equal(new_points[1], points[1])
    for i in (0, 2):
        np.testing.assert_array_equal(new_images[i], np.fliplr(images[i]))
        np.testing.assert_allclose(new_points[i], [[y, SIDE - 1 - x] for y, x in points[i][::-1]], atol=1e-5)


def intensities(images: np.ndarray, seed: int = 0, **options: float) -> np.ndarray:
    options = {"gamma": 0.0, "field": 0.0, "noise": 0.0} | options
    return np.asarray(random_intensity(jax.random.key(seed), jnp.asarray(images), **options))


def test_the_units_of_the_file_do_not_matter():
    images = smooth_images()
    changed = intensities(images, gamma=0.3, field=0.1, noise=0.1)
    np.testing.assert_allclose(intensities(images * 20000 + 30000, gamma=0.3, field=0.1, noise=0.1), changed, atol=2e-3)
    still = intensities(images)
    np.testing.assert_allclose(still.min((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(still.max((1, 2)), 1, atol=1e-6)


def test_gamma_is_a_power_of_each_image():
    images = smooth_images(200)
    unit, changed = intensities(images), intensities(images, gamma=0.4)
    middle = (unit > 0.2) & (unit < 0.8)
    powers = [np.log(c[m]) / np.log(u[m]) for u, c, m in zip(unit, changed, middle, strict=True)]
    np.testing.assert_allclose([np.ptp(p) for p in powers], 0, atol=1e-3)
    assert np.std([np.log(p[0]) for p in powers]) == pytest.approx(0.4, rel=0.2)


def test_the_field_is_smooth_and_noise_is_not():
    images = smooth_images(100)
    unit = intensities(images)
    field, noise = intensities(images, field=0.2) - unit, intensities(images, noise=0.2) - unit
    assert np.std(noise) == pytest.approx(0.2, rel=0.02)
    assert np.std(np.diff(noise, axis=1)) == pytest.approx(0.2 * 2**0.5, rel=0.02)
    assert np.std(field[:, 0, 0]) == pytest.approx(0.2, rel=0.25)  # a corner of the field is a node
    assert np.abs(np.diff(field, axis=1)).max() < 0.1


def test_a_constant_image_stays_finite():
    assert np.isfinite(intensities(np.full((2, SIDE, SIDE), 7, np.float32), gamma=0.3, field=0.1, noise=0.1)).all()


def test_a_compiled_step_normalises_an_image_before_and_after():
    """XLA may compute an image and its least value in two roundings, and a number below 0 has no power."""
    images = np.random.default_rng(0).normal(size=(8, 32, 32)).astype(np.float32)
    changed = jax.jit(lambda x: zscore(random_intensity(jax.random.key(3), zscore(x), gamma=0.3, field=0.0, noise=0.0)))
    np.testing.assert_allclose(changed(jnp.asarray(images)).std((1, 2)), 1, atol=1e-5)


def test_intensities_near_the_end_of_float32_are_changed_as_others_are():
    images = smooth_images()
    images = images / np.abs(images).max()
    changed = intensities(images, gamma=0.3, field=0.1, noise=0.1)
    for unit in (1e-30, 3e38):
        np.testing.assert_allclose(intensities(images * unit, gamma=0.3, field=0.1, noise=0.1), changed, atol=2e-3)
