"""The published search against a loop over anchors; with a prior, on scenes of known truth; both on real images."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from references import eigenpatch as reference
from references.selection import mostly_campaign

from pulmo_jax.core import pca
from pulmo_jax.methods import eigenpatch_stages, eigenpatch_training
from pulmo_jax.methods.eigenpatch import Eigenpatch, fit_template, residual_maps
from pulmo_jax.methods.eigenpatch_subspaces import patch_subspaces
from pulmo_jax.methods.eigenpatch_training import fold_of, softmax_weights
from pulmo_jax.methods.located import ClosedForm, Locator
from pulmo_jax.types import InputError

CHEST = Path(__file__).parents[2].parent / "shared" / "data" / "chest_landmarks"
MEAN = np.array([[10.0, 9.0], [11.0, 22.0], [22.0, 16.0]])


def scenes(count: int, seed: int = 0, kinds: tuple[int, ...] = (0, 1, 2)) -> tuple[np.ndarray, np.ndarray]:
    """32x32 px: a cross, a ring and a bar at the three points, in noise, and a second cross anywhere: a decoy."""
    rng = np.random.default_rng(seed)
    shift, tremble = 2.5 * rng.normal(size=(count, 1, 2)), 0.4 * rng.normal(size=(count, 3, 2))
    points = np.clip(MEAN + shift + tremble, 3, 28)
    extra = rng.uniform(6, 26, size=(count, 1, 2))
    y, x = np.mgrid[:32, :32]
    images = 0.25 * rng.normal(size=(count, 32, 32))
    for kind, places in [*((kind, points[:, kind]) for kind in kinds), (0, extra[:, 0])]:
        v, u = y - places[:, 0, None, None], x - places[:, 1, None, None]
        near = np.exp(-(v**2 + u**2) / 18)
        shape = [np.exp(-(v**2)) + np.exp(-(u**2)), np.exp(-((np.hypot(v, u) - 3) ** 2)), np.exp(-((v - u) ** 2) / 2)]
        images += near * shape[kind]
    return (100 + 50 * images).astype(np.float32), points.astype(np.float32)


SMALL = {"size": 32, "contrast": "none", "scales": (2, 1), "templates": (5, 9), "reaches": (3,), "iterations": 8}


@pytest.fixture(scope="module")
def with_prior():
    method = Eigenpatch(**SMALL)
    return method, method.fit(*scenes(160))


@pytest.fixture(scope="module")
def without():
    method = Eigenpatch(size=32, contrast="none", prior=False)
    return method, method.fit(*scenes(160))


def errors(method: Eigenpatch, params, images: np.ndarray, truth: np.ndarray) -> np.ndarray:
    found = jax.jit(method.locate)(params, jnp.asarray(images))
    return np.linalg.norm(np.asarray(found.points) - truth, axis=-1)


def test_the_published_search_is_that_of_a_loop_over_anchors():
    (images, points), (tests, _) = scenes(40), scenes(5, seed=1)
    method = Eigenpatch(size=32, prior=False)
    found = jax.jit(method.locate)(method.fit(images, points), jnp.asarray(tests))
    anchors = np.floor(points + 0.5).astype(int)
    ready = [np.asarray(method.prepare(jnp.asarray(part))).astype(np.float64) for part in (images, tests)]
    expected = reference.locate(ready[0], anchors, ready[1], 0.95)
    np.testing.assert_allclose(found.points, expected + (points - anchors).mean((0, 1)), atol=1e-4)


def test_template_is_the_largest_inside_and_maps_are_those_of_a_loop():
    images, points = scenes(40)
    anchors = np.floor(points + 0.5).astype(int)[:, 0]
    template = fit_template(images, anchors, 0.9)
    box = anchors.max(0) - anchors.min(0)
    assert template.mean.shape == tuple(32 - box)
    for at_once in (1, 3, 8):
        maps = np.asarray(residual_maps(template, jnp.asarray(images[:4]), at_once))
        assert maps.shape == (4, *(box + 1))
        for image, found in zip(images, maps, strict=False):
            mean, components = (np.asarray(a, np.float64) for a in (template.mean, template.components))
            np.testing.assert_allclose(
                found, reference.residual_map(image.astype(np.float64), mean, components), rtol=1e-3
            )


@pytest.mark.slow
def test_the_prior_tells_a_landmark_from_its_double(with_prior, without):
    method, params = with_prior
    tests, truth = scenes(60, seed=1)
    by_mean = np.linalg.norm(np.asarray(params.shape.mean) - truth, axis=-1)
    with_the_prior = errors(method, params, tests, truth)
    assert with_the_prior.mean() < 0.8
    assert with_the_prior.mean() < 0.4 * errors(*without, tests, truth).mean()
    assert with_the_prior.mean() < 0.4 * by_mean.mean()


@pytest.mark.slow
def test_the_finer_scale_is_the_more_precise(with_prior):
    method, params = with_prior
    coarse = Eigenpatch(**SMALL | {"scales": (2,), "templates": (5,), "reaches": ()})
    tests, truth = scenes(60, seed=1)
    first = errors(coarse, params._replace(stages=params.stages[:1]), tests, truth)
    assert errors(method, params, tests, truth).mean() < 0.9 * first.mean()


@pytest.mark.slow
def test_covariances_are_of_the_errors_size_and_larger_for_a_point_that_cannot_be_seen(with_prior):
    method, params = with_prior
    (tests, truth), (without_ring, _) = scenes(60, seed=1), scenes(60, seed=1, kinds=(0, 2))
    locate = jax.jit(method.locate)
    found, worse = locate(params, jnp.asarray(tests)), locate(params, jnp.asarray(without_ring))
    step = np.asarray(found.points) - truth
    squared = np.einsum("bki,bki->bk", step, np.linalg.solve(found.covariance, step[..., None])[..., 0])
    # of the size, not more: a run scales it by its validation images
    assert 0.1 < np.median(squared) / (2 * np.log(2)) < 3
    traces = [np.trace(np.asarray(at.covariance), axis1=-2, axis2=-1)[:, 1] for at in (found, worse)]
    assert np.median(traces[1]) > 1.5 * np.median(traces[0])
    assert (np.linalg.eigvalsh(worse.covariance) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("prior", [True, False])
def test_an_image_is_not_told_by_its_neighbours(with_prior, without, prior):
    method, params = with_prior if prior else without
    tests, others = scenes(6, seed=1)[0], scenes(6, seed=2)[0]
    others[4] = tests[2]
    locate = jax.jit(method.locate)
    here, there = locate(params, jnp.asarray(tests)), locate(params, jnp.asarray(others))
    np.testing.assert_allclose(here.points[2], there.points[4], atol=1e-3)
    np.testing.assert_allclose(here.covariance[2], there.covariance[4], atol=1e-3)


@pytest.mark.parametrize("prior", [True, False])
def test_it_is_a_fitted_locator_whose_skeleton_is_its_parameters(with_prior, without, prior):
    method, params = with_prior if prior else without
    assert isinstance(method, Locator)
    assert isinstance(method, ClosedForm)
    assert jax.tree.structure(method.skeleton(3)) == jax.tree.structure(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_points_at_the_edge_and_the_same_seed():
    """The square of anchors around a point at the corner reaches outside, where the edge goes on."""
    images, points = scenes(40)
    method = Eigenpatch(**SMALL | {"scales": (1,), "templates": (5,), "reaches": ()})
    points[:, 2] = 0
    params, again = method.fit(images, points), method.fit(images, points)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    found = jax.jit(method.locate)(params, jnp.asarray(images))
    assert np.isfinite(found.points).all()
    assert np.abs(np.asarray(found.points)[:, 2]).max() < 1


def test_search_cuts_the_windows_that_its_places_say(with_prior):
    """The energies at an anchor are those of the patch around it."""
    method, params = with_prior
    images, points = scenes(3, seed=2)
    stage, how = params.stages[1], method._scale(1)
    maps = eigenpatch_stages.search(stage, how, jnp.asarray(images), jnp.asarray(points))
    a = 7 * 4 + 2
    place = np.asarray(maps.places)[1, 2, a] - np.asarray(stage.offset)
    y, x = np.rint(place).astype(int)
    np.testing.assert_allclose(place, [y, x], atol=1e-4)
    patch = np.pad(images[1], 9, mode="edge")[y + 5 : y + 14, x + 5 : x + 14].ravel().astype(np.float64)
    mean, components, rest = (
        np.asarray(part, np.float64)[2]
        for part in (stage.landmark.mean, stage.landmark.components, stage.landmark.rest)
    )
    expected = reference.residual_map(patch.reshape(9, 9), mean.reshape(9, 9), components.reshape(-1, 9, 9))[0, 0]
    np.testing.assert_allclose(float(maps.energies[2, 1, a, 0]) * rest, expected, rtol=1e-3)


def test_subspaces_of_all_landmarks_and_folds_are_those_of_each_by_itself():
    """Against the singular value decomposition of the patches of every set; the last set has all images."""
    rng = np.random.default_rng(3)
    images = np.cumsum(rng.normal(size=(60, 14, 15)), axis=1).astype(np.float32)
    images[:, :, 8:] = 5 * rng.normal(size=(60, 14, 7))
    corners = rng.integers(0, 4, size=(60, 2, 3, 2))
    corners[:, :, 2, 1] += 7  # where it takes more components
    fold = np.arange(60) * 7 % 4
    found = patch_subspaces(jnp.asarray(images), corners, 5, fold, 0.9)
    assert found.mean.dtype == jnp.float32
    counts = []
    for held_out, k in np.ndindex(5, 3):
        seen = np.flatnonzero(fold != held_out)
        cut = [images[i, y : y + 5, x : x + 5].ravel() for i in seen for y, x in corners[i, :, k]]
        expected = pca.fit(np.array(cut), 0.9)
        n = len(expected.components)
        counts.append(n)
        np.testing.assert_allclose(found.mean[held_out, k], expected.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.variances[held_out, k, :n], expected.variances, rtol=1e-4)
        np.testing.assert_allclose(found.rest[held_out, k], expected.rest, rtol=1e-4)
        overlap = np.abs((np.asarray(found.components[held_out, k, :n]) * expected.components).sum(1))
        np.testing.assert_allclose(overlap, 1, atol=1e-3)
        np.testing.assert_array_equal(found.components[held_out, k, n:], 0)
        np.testing.assert_array_equal(found.variances[held_out, k, n:], 1)
    assert found.components.shape == (5, 3, max(counts), 25)
    assert min(counts) < max(counts)


def test_subspaces_of_fewer_patches_than_pixels():
    """There are no more components than samples, and each is of unit length."""
    rng = np.random.default_rng(4)
    images, corners = rng.normal(size=(8, 9, 9)).astype(np.float32), np.zeros((8, 1, 1, 2), int)
    found = patch_subspaces(jnp.asarray(images), corners, 9, np.arange(8) % 2, 1.0)
    assert found.components.shape[2] <= 8
    norms = np.linalg.norm(found.components, axis=-1)
    np.testing.assert_allclose(norms[-1, 0, :7], 1, rtol=1e-5)
    assert (np.asarray(found.variances) > 0).all()


def test_patches_without_variance_are_named():
    images, corners = jnp.ones((8, 9, 9)), np.zeros((8, 1, 1, 2), int)
    with pytest.raises(InputError, match="all samples are the same"):
        patch_subspaces(images, corners, 5, np.arange(8) % 2, 0.9)
    with pytest.raises(InputError, match=r"1 sample\(s\) given"):
        patch_subspaces(images[:2], corners[:2], 5, np.arange(2), 0.9)


def test_energies_of_unseen_images_are_those_of_their_fold_s_subspaces(with_prior):
    """Folds of different sizes; every image is scored without the subspaces that it is in."""
    method, params = with_prior
    images, points = scenes(7, seed=5)
    stage, how, fold = params.stages[1], method._scale(1), np.array([0, 1, 2, 0, 1, 0, 0])
    rng = np.random.default_rng(0)
    several = [
        jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + 0.1 * rng.random()) for _ in range(4)]), subspace)
        for subspace in (stage.landmark, stage.anywhere)
    ]
    rows = eigenpatch_training.fold_rows(fold)
    np.testing.assert_array_equal(rows, [[0, 3, 5, 6], [1, 4, -1, -1], [2, -1, -1, -1]])
    known, ready = jnp.asarray(points), jnp.asarray(images)
    found = eigenpatch_training.unseen_energies(stage, how, ready, known, *several, jnp.asarray(rows))
    for number, its_fold in enumerate(fold):
        landmark, anywhere = (jax.tree.map(lambda leaf, f=its_fold: leaf[f], subspace) for subspace in several)
        alone = stage._replace(landmark=landmark, anywhere=anywhere)
        one = slice(number, number + 1)
        expected = eigenpatch_stages.search(alone, how, ready[one], known[one])
        np.testing.assert_allclose(found.energies[:, one], expected.energies, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.places[one], expected.places, rtol=1e-6)


def test_softmax_weights_are_those_that_drew_the_anchors():
    rng = np.random.default_rng(0)
    energies, weights = rng.gamma(2.0, size=(4000, 12, 3)), np.array([1.5, 0.0, -0.5])
    logits = -energies @ weights + np.linspace(0, 1, 12)
    true = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    found = softmax_weights(energies, np.tile(np.linspace(0, 1, 12), (4000, 1)), true, 1e-6)
    np.testing.assert_allclose(found, weights, atol=0.1)


def test_nearest_anchors_of_a_coarse_scale():
    points = np.array([[[0.0, 1.4], [1.6, 31.0]]])
    anchors, offset = eigenpatch_stages.nearest_anchors(points, 2, 32)
    np.testing.assert_array_equal(anchors, [[[0, 0], [1, 15]]])
    np.testing.assert_allclose(offset, [(0 - 0.5 + 1.6 - 2.5) / 2, (1.4 - 0.5 + 31 - 30.5) / 2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scales": (2, 1), "templates": (9,), "reaches": (5,)}, "2 scales, 1 templates, 1 reaches"),
        ({"templates": (8, 15)}, "odd templates"),
        ({"size": 50, "scales": (4, 1)}, "divide the size"),
    ],
)
def test_settings_that_do_not_go_together_are_named(keys, message):
    with pytest.raises(InputError, match=message):
        Eigenpatch(**keys)


def test_images_of_another_size_are_named():
    with pytest.raises(InputError, match="32x32 px given; at least 8 of 64x64"):
        Eigenpatch().fit(*scenes(20))


def test_images_of_a_group_are_in_one_fold():
    np.testing.assert_array_equal(fold_of(["b", "a", "b", "c", "d", "a"], 3), [0, 1, 0, 2, 0, 1])
    images, points = scenes(20)
    with pytest.raises(InputError, match=r"2 groups of training images \(data.group_regex\) given; at least"):
        Eigenpatch(size=images.shape[1]).fit(images, points, ["a"] * 10 + ["b"] * 10)


def real(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images at 64 px, and points in px of the 299-px image."""
    with (CHEST / f"landmarks_{split}.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    points = np.array([[float(v) for v in row[1:]] for row in rows]).reshape(len(rows), -1, 2)[..., ::-1]
    images = []
    for row in rows:
        with Image.open(CHEST / "images" / row[0]) as image:
            images.append(np.asarray(image.convert("F").resize((64, 64), Image.Resampling.BOX)))
    return np.array(images), points.astype(np.float32)


@pytest.mark.slow
@pytest.mark.skipif(not CHEST.exists(), reason="needs the shared chest X-rays")
@pytest.mark.parametrize("prior", mostly_campaign([False, True], True))
def test_figures_on_chest_x_rays(prior):
    (images, points), (tests, truth) = real("train"), real("val")
    method, zoom = Eigenpatch(prior=prior), 299 / 64
    params = method.fit(images, (points + np.float32(0.5)) / np.float32(zoom) - np.float32(0.5))
    found = (np.asarray(jax.jit(method.locate)(params, jnp.asarray(tests)).points) + 0.5) * zoom - 0.5
    error = np.linalg.norm(found - truth, axis=-1)
    if prior:
        assert error.mean() < 11.0
    else:
        assert np.median(error) == pytest.approx(14.8, abs=1.5)  # as the algorithm's authors' figures have it
        assert error.mean() == pytest.approx(27.1, abs=2)
