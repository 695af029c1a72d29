"""Patch Gaussians against slow float64 loops, and what must hold for any data: order, division, scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import patch_gaussian as reference

from pulmo_jax.methods.base import Accumulated, Method
from pulmo_jax.methods.patch_gaussian import PatchGaussian, blobs, merged
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.models.identity import Identity
from pulmo_jax.types import InputError


def pixels(patch_size: int = 16, channels: int = 2, **options) -> PatchGaussian:
    network = Identity(patch_size=patch_size, channels=channels, rngs=nnx.Rngs(0))
    return PatchGaussian(network=network, **{"window_px": 4, "stride_px": 3, "smooth_px": 0.0} | options)


def of_network(**options) -> PatchGaussian:
    network = ConvAutoencoder(patch_size=16, channels=1, latent=4, width=3, rngs=nnx.Rngs(1))
    return PatchGaussian(network=network, **{"window_px": 1, "stride_px": 1, "smooth_px": 0.0} | options)


def texture(count: int, size: int = 16, channels: int = 2, seed: int = 0) -> np.ndarray:
    """Smooth, correlated patches (B, P, P, C)."""
    white = np.random.default_rng(seed).normal(size=(count, size + 2, size + 2, channels))
    smooth = sum(white[:, i : i + size, j : j + size] for i in range(3) for j in range(3)) / 9
    return (0.5 + 0.2 * smooth).astype(np.float32)


def learn(method: PatchGaussian, batches: list[np.ndarray], insides: list[np.ndarray] | None = None):
    params, update = method.init(), jax.jit(method.update)
    for i, batch in enumerate(batches):
        inside = np.ones(batch.shape[:3], bool) if insides is None else insides[i]
        params = update(params, batch, inside)
    return params


def floor_variance(method: PatchGaussian, params) -> float:
    moments = params["moments"]
    variance = np.diagonal(np.asarray(moments.comoment), axis1=-2, axis2=-1) / np.asarray(moments.n)[..., None]
    return float(method.floor**2 * variance.mean())


def test_it_is_a_method_of_one_pass():
    assert isinstance(pixels(), Method)
    assert isinstance(pixels(), Accumulated)


def test_pooled_distances_are_those_of_slow_loops():
    method, batches = pixels(), [texture(6, seed=s) for s in range(3)]
    counted = learn(method, batches)
    samples = np.array([v for patch in np.concatenate(batches) for _, _, v in reference.windows(patch, 4, 3)])
    assert float(counted["moments"].n) == len(samples)
    mean, c = reference.fit(samples, floor_variance(method, counted))
    test = texture(2, seed=9)
    found = np.asarray(method.distances(method.finish(counted), jnp.asarray(test)))
    for i, patch in enumerate(test):
        expected = [reference.distance(v, mean, c) for _, _, v in reference.windows(patch, 4, 3)]
        np.testing.assert_allclose(found[i].ravel(), expected, rtol=2e-3)


def test_every_place_has_its_own_gaussian():
    method, batches = pixels(locations="each", patch_size=8), [texture(20, size=8, seed=s) for s in range(2)]
    counted, test = learn(method, batches), texture(2, size=8, seed=9)
    found = np.asarray(method.distances(method.finish(counted), jnp.asarray(test)))
    seen = [reference.windows(patch, 4, 3) for patch in np.concatenate(batches)]
    floor = floor_variance(method, counted)
    for place in range(method.rows**2):
        mean, c = reference.fit(np.array([patch[place][2] for patch in seen]), floor)
        for i, patch in enumerate(test):
            expected = reference.distance(reference.windows(patch, 4, 3)[place][2], mean, c)
            np.testing.assert_allclose(found[i].ravel()[place], expected, rtol=5e-3)


@pytest.mark.slow
def test_how_many_places_are_worked_on_at_a_time_changes_nothing():
    batches = [texture(7, seed=s) for s in range(2)]
    method = pixels(locations="each", window_px=8, stride_px=1, memory_mb=1)
    whole = learn(pixels(locations="each", window_px=8, stride_px=1, memory_mb=10_000), batches)
    found = learn(method, batches)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("locations", ["pooled", "each"])
def test_runs_of_several_machines_are_merged(locations):
    method, batches = pixels(locations=locations), [texture(9, seed=s) for s in range(4)]
    together = learn(method, batches)
    apart = merged(learn(method, batches[:1]), learn(method, batches[1:]))
    for a, b in zip(jax.tree.leaves(apart), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_windows_that_touch_the_background_are_not_counted():
    method, patch = pixels(), texture(5)
    inside = np.zeros(patch.shape[:3], bool)
    inside[:, 3:11, 2:16] = True
    counted = learn(method, [patch], [inside])
    samples = [v for one in patch for y, x, v in reference.windows(one, 4, 3) if inside[0, y : y + 4, x : x + 4].all()]
    assert float(counted["moments"].n) == len(samples)
    np.testing.assert_allclose(counted["moments"].mean, np.mean(samples, axis=0), rtol=1e-5)
    empty = learn(method, [patch], [np.zeros_like(inside)])
    with pytest.raises(InputError, match="no window of 4 px lies completely in the foreground"):
        method.caveats(empty)


def test_matched_filters_give_the_snr_and_amplitude_of_slow_loops():
    method = pixels(score="matched", blob_sigmas_px=(0.8, 1.2), stride_px=1)
    counted, test = learn(method, [texture(20, seed=s) for s in range(2)]), texture(1, seed=5)
    params = method.finish(counted)
    samples = np.array(
        [v for s in range(2) for patch in texture(20, seed=s) for _, _, v in reference.windows(patch, 4, 1)]
    )
    mean, c = reference.fit(samples, floor_variance(method, counted))
    snr, amplitude = map(np.asarray, method.blob_terms(params, jnp.asarray(test)))
    for j, sigma in enumerate((0.8, 1.2)):
        template = reference.blob(4, sigma, 2)
        np.testing.assert_allclose(blobs(4, (sigma,), 2)[0], template, rtol=1e-12)
        for k, (_, _, v) in enumerate(reference.windows(test[0], 4, 1)):
            expected = reference.matched(v, mean, c, template)
            found = snr[0, ..., j].ravel()[k], amplitude[0, ..., j].ravel()[k]
            np.testing.assert_allclose(found, expected, rtol=5e-3, atol=2e-3)


def test_the_snr_of_normal_windows_is_standard_normal_and_an_injected_blob_gives_its_amplitude_back():
    method = pixels(channels=1, window_px=8, score="matched", blob_sigmas_px=(1.5,), stride_px=1)
    params = method.finish(learn(method, [texture(200, channels=1, seed=s) for s in range(3)]))
    held_out = texture(300, channels=1, seed=50)
    snr, amplitude = map(np.asarray, method.blob_terms(params, jnp.asarray(held_out)))
    assert abs(snr.mean()) < 0.06
    assert abs(snr.std() - 1) < 0.03
    held_out[:, 4:12, 4:12] += 0.5 * blobs(8, (1.5,), 1).reshape(8, 8, 1).astype(np.float32)
    _, with_blob = map(np.asarray, method.blob_terms(params, jnp.asarray(held_out)))
    np.testing.assert_allclose(with_blob[:, 4, 4, 0] - amplitude[:, 4, 4, 0], 0.5, atol=2e-3)


def test_distances_do_not_depend_on_unit_and_offset():
    batches, test = [texture(30, seed=s) for s in range(2)], texture(2, seed=7)
    method = pixels()
    plain = method.distances(method.finish(learn(method, batches)), jnp.asarray(test))
    scaled = method.distances(method.finish(learn(method, [3 * b - 1 for b in batches])), jnp.asarray(3 * test - 1))
    np.testing.assert_allclose(scaled, plain, rtol=1e-3)


def test_normal_patches_score_about_one_and_a_strange_one_more():
    method, params = pixels(), None
    params = method.finish(learn(method, [texture(100, seed=s) for s in range(3)]))
    normal, strange = texture(50, seed=20), texture(1, seed=21)
    strange[:, 6:10, 6:10] = 1.5
    assert abs(float(method.residual(params, jnp.asarray(normal)).mean()) - 1) < 0.05
    found = np.asarray(method.residual(params, jnp.asarray(strange)))[0, ..., 0]
    assert np.unravel_index(found.argmax(), found.shape)[0] in range(4, 12)
    assert found.max() > 5


@pytest.mark.slow
def test_a_region_that_never_varies_is_neither_singular_nor_blind():
    batches = [texture(30, seed=s) for s in range(2)]
    for batch in batches:
        batch[:, :8] = 0.25
    method = pixels(locations="each")
    params = method.finish(learn(method, batches))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    same, changed = texture(1, seed=9), texture(1, seed=9)
    same[:, :8] = changed[:, :8] = 0.25
    changed[:, 2:4, 2:4] = 0.3
    a, b = (np.asarray(method.distances(params, jnp.asarray(x)))[0, 0, 0] for x in (same, changed))
    assert a < 1
    assert b > 100
    with pytest.raises(InputError, match="are constant"):
        method.caveats(learn(method, [np.full((3, 16, 16, 2), 0.5, np.float32)]))


def test_fewer_images_than_dimensions_are_said():
    method = pixels(locations="each")
    counted = learn(method, [texture(10)])
    (caveat,) = method.caveats(counted)
    assert "10 windows at some locations for a covariance of 32 dimensions" in caveat
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(method.finish(counted)))
    assert pixels().caveats(learn(pixels(), [texture(60)])) == ()


def test_features_and_residual_are_the_networks():
    method, batch = of_network(n_features=None), jnp.asarray(texture(3, channels=1))
    params = method.init()
    network = method.network
    layers = network.feature_maps(batch)
    assert [layer.shape for layer in layers] == [(3, 4, 4, 3)]
    vectors = method.vectors(params, batch)
    np.testing.assert_allclose(vectors[..., :3], layers[0], rtol=1e-5, atol=1e-6)
    assert vectors.shape == (3, 4, 4, method.dimensions)
    few = of_network(n_features=2)
    np.testing.assert_allclose(few.vectors(params, batch), vectors[..., few.chosen], rtol=1e-5, atol=1e-6)
    left = of_network(input="residual", window_px=16)
    expected = (batch - np.asarray(network(batch))).reshape(3, 1, 1, -1)
    np.testing.assert_allclose(left.vectors(params, batch), expected, rtol=1e-4, atol=1e-5)


def test_feature_maps_lie_where_their_pixels_do():
    network = ConvAutoencoder(patch_size=32, channels=1, latent=4, width=3, rngs=nnx.Rngs(1))
    batch = jnp.asarray(texture(1, size=32, channels=1))
    moved = jnp.roll(batch, (8, 16), axis=(1, 2))
    for layer, shifted in zip(network.feature_maps(batch), network.feature_maps(moved), strict=True):
        cells = 32 // layer.shape[1]
        expected = np.roll(layer, (8 // cells, 16 // cells), axis=(1, 2))
        np.testing.assert_allclose(shifted, expected, rtol=1e-5, atol=1e-5)


def test_scores_near_the_background_are_those_of_windows_inside():
    method = pixels(smooth_px=1.0)
    rng = np.random.default_rng(0)
    residual = rng.random((40, 40, 1)).astype(np.float32)
    foreground = np.zeros((40, 40), bool)
    foreground[5:35, 5:35] = True
    residual[~foreground] = residual[5:8, 5:35] = 1e4  # what a window half in the background may give
    scores = np.asarray(method.score_map(jnp.asarray(residual), jnp.asarray(foreground)))
    assert np.isnan(scores[~foreground]).all()
    assert np.nanmax(scores[12:, 12:]) < 1.1
    assert np.isfinite(scores[foreground]).all()


@pytest.mark.parametrize("options", [{}, {"stride_px": 4}, {"score": "matched", "blob_sigmas_px": (1.0, 1.3)}])
@pytest.mark.parametrize("shape", [(30, 23), (5, 40), (1, 1)])
def test_score_maps_are_those_of_scipy_in_float64(options, shape):
    """Windows of even and odd sides, foreground at the borders of the image, images below the kernel."""
    method, rng = pixels(smooth_px=1.5, **options), np.random.default_rng(0)
    residual = rng.normal(size=(*shape, 2 if options.get("score") else 1)).astype(np.float32)
    foreground = np.indices(shape).sum(0) % 23 > 3
    residual[~foreground] = np.nan
    expected = reference.score_map(method, residual, foreground)
    found = method.score_map(jnp.asarray(residual), jnp.asarray(foreground))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("polarity", "best"), [("bright", 3.0), ("dark", 5.0), ("both", 5.0)])
def test_blobs_of_the_wanted_sign_count(polarity, best):
    method = pixels(score="matched", blob_sigmas_px=(1.0, 1.3), polarity=polarity)
    residual = jnp.broadcast_to(jnp.array([3.0, -5.0]), (20, 20, 2))
    np.testing.assert_allclose(method.score_map(residual, jnp.ones((20, 20), bool)), best, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (pixels, {"window_px": 17}, "method.window_px=17: the maps of patches of 16 px have 16 px"),
        (pixels, {"rho": 0.2}, "fixed needs a rho"),
        (pixels, {"shrinkage": "fixed"}, "fixed needs a rho"),
        (pixels, {"score": "matched", "blob_sigmas_px": (2.0,)}, "a blob must fit into its window of 4 px"),
        (of_network, {"score": "matched"}, "needs pixels or a residual, not features"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_a_network_without_feature_maps_is_refused():
    with pytest.raises(InputError, match="the model Linear has no feature_maps"):
        PatchGaussian(network=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_the_loss_is_the_gaussian_negative_log_likelihood():
    method, batches = pixels(), [texture(40, seed=s) for s in range(2)]
    counted, test = learn(method, batches), texture(3, seed=8)
    samples = np.array([v for patch in np.concatenate(batches) for _, _, v in reference.windows(patch, 4, 3)])
    mean, c = reference.fit(samples, floor_variance(method, counted))
    _, log_determinant = np.linalg.slogdet(c)
    windows = [v for patch in test for _, _, v in reference.windows(patch, 4, 3)]
    mean_distance = np.mean([reference.distance(v, mean, c) for v in windows])
    expected = 0.5 * (mean_distance + log_determinant + len(mean) * np.log(2 * np.pi)) / len(mean)
    found = method.train_loss(method.finish(counted), jnp.asarray(test), jax.random.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_matched_filter_stands_at_every_pixel_and_is_not_smoothed():
    """At the border, where no window has its middle, the nearest one's answer stands."""
    method = pixels(channels=1, score="matched", blob_sigmas_px=(1.0,), stride_px=None, smooth_px=None)
    assert (method.stride, method.smoothing, method.rows) == (1, 0, 13)
    at_windows = np.random.default_rng(0).normal(size=(1, 13, 13, 1))
    found = np.asarray(method.to_pixels(jnp.asarray(at_windows)))[0, ..., 0]
    middle = np.clip(np.arange(16) - 2, 0, 12)
    np.testing.assert_allclose(found, at_windows[0, ..., 0][np.ix_(middle, middle)], rtol=1e-6)


def test_an_injected_blob_is_found_on_its_pixel_with_its_height_and_size():
    method = pixels(channels=1, window_px=9, score="matched", blob_sigmas_px=(1.0, 2.0), stride_px=None, smooth_px=None)
    params = method.finish(learn(method, [texture(200, channels=1, seed=s) for s in range(3)]))
    patch = texture(1, channels=1, seed=9)
    y, x = np.indices((16, 16))
    patch[0, ..., 0] += 5 * np.exp(-((y - 7) ** 2 + (x - 8) ** 2) / (2 * 2.0**2))
    score = np.asarray(method.score_map(method.residual(params, jnp.asarray(patch))[0], jnp.ones((16, 16), bool)))
    peak = tuple(map(int, np.unravel_index(score.argmax(), score.shape)))
    assert peak == (7, 8)
    residual, inside = method.residual(params, jnp.asarray(patch))[0], jnp.ones((16, 16), bool)
    height, sigma = np.asarray(method.detail_maps(residual, inside))[peak]
    assert sigma == 2
    assert abs(height - 5) < 1.5


def test_the_map_between_windows_is_interpolated():
    method = pixels(patch_size=16, channels=1, window_px=4, stride_px=4)
    at_windows = jnp.asarray(np.arange(4.0)[None, :, None, None] + np.zeros((1, 4, 4, 1)))
    found = np.asarray(method.to_pixels(at_windows))[0, :, 0, 0]
    expected = np.interp(np.arange(16), [1.5, 5.5, 9.5, 13.5], np.arange(4.0))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
