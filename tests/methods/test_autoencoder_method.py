"""The autoencoder's loss, noise and scores against NumPy and slow references, and a little training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references import image_operations
from scipy.ndimage import median_filter, minimum_filter

from pulmo_jax.core.ssim import ssim_map
from pulmo_jax.methods import losses
from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.base import Method
from pulmo_jax.methods.patch_gaussian import PatchGaussian
from pulmo_jax.methods.reconstruction import RESIDUALS, coarse_noise
from pulmo_jax.methods.score_maps import Extent, eroded, median_filtered, smooth_within
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.models.identity import Identity
from pulmo_jax.training.state import init_state, make_step


class Halve(nnx.Module):
    """A "network" whose reconstruction is the patch times its one parameter."""

    def __init__(self) -> None:
        self.factor = nnx.Param(jnp.float32(0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.factor[...] * x


def halving(**options) -> Autoencoder:
    return Autoencoder(Halve(), **options)


def noisy_patches(shape: tuple[int, ...] = (3, 8, 8, 2), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def test_is_a_method():
    assert isinstance(halving(), Method)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("l2", lambda a, b: (a - b) ** 2),
        ("l1", lambda a, b: np.abs(a - b)),
        ("local_mean", lambda a, b: a - b),
        ("ssim", lambda a, b: 1 - ssim_map(jnp.asarray(a), jnp.asarray(b))),
    ],
)
def test_the_difference_of_each_kind(kind, expected):
    a, b = jnp.asarray(noisy_patches()), jnp.asarray(noisy_patches(seed=1))
    residual = RESIDUALS[kind]
    found = residual(a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(np.asarray(a), np.asarray(b)), atol=1e-6)
    np.testing.assert_allclose(residual(a, a), 0, atol=1e-6)


@pytest.mark.parametrize(("size", "cell_px"), [((24, 16), 8), ((20, 9), 8), ((8, 8), 16), ((6, 5), 1)])
def test_the_noise_is_interpolated_unit_noise(size, cell_px):
    """Its variance is the sum of the squared bilinear weights: 1 at the nodes of the grid, 1/4 between four."""
    height, width = size
    noise = np.asarray(coarse_noise(jax.random.key(0), (4000, height, width, 1), cell_px))[..., 0]
    weights = [image_operations.bilinear_weights(-(-n // cell_px), n) for n in size]
    expected = np.outer(*[(w**2).sum(axis=1) for w in weights])
    np.testing.assert_allclose(noise.var(axis=0), expected, rtol=0.15)
    np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.08)
    middle, along = height // 2, weights[1] @ weights[1].T
    covariance = along * (weights[0][middle] ** 2).sum()
    np.testing.assert_allclose(np.cov(noise[:, middle].T), covariance, atol=0.1)


def test_noise_differs_by_patch_band_and_key():
    shape = (50, 16, 16, 3)
    one, other = (np.asarray(coarse_noise(jax.random.key(k), shape, 4)) for k in (0, 1))
    np.testing.assert_array_equal(one, coarse_noise(jax.random.key(0), shape, 4))
    for a, b in ((one, other), (one[1:], one[:-1]), (one[..., 0], one[..., 1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1


def in_buffer(image: np.ndarray, top: int, left: int = 0, shape: tuple[int, int] = (80, 16), fill: float = np.nan):
    """(buffer with the image in it, extent): arrays of one shape, for which all is compiled once."""
    buffer = np.full((*shape, *image.shape[2:]), fill, image.dtype)
    buffer[top : top + len(image), left : left + image.shape[1]] = image
    return jnp.asarray(buffer), Extent(top, top + len(image), left, left + image.shape[1])


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: hnp.arrays(bool, shape)),
    st.sampled_from([0.5, 1.0, 2.5]),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_smoothing_is_the_weighted_mean_of_the_foreground(foreground, sigma, seed):
    """Of an image anywhere in its arrays, and smaller than the kernel too."""
    maps = np.random.default_rng(seed).normal(0, 1, (*foreground.shape, 2)).astype(np.float32)
    height, width = foreground.shape
    (inside, extent), (values, _) = (
        in_buffer(foreground, seed % 60, seed % 5, fill=True),
        in_buffer(maps, seed % 60, seed % 5),
    )
    found = np.asarray(smooth_within(values, inside, sigma, extent))[extent.top :, extent.left :][:height, :width]
    assert found.dtype == np.float32
    for band in range(2):
        expected = image_operations.smooth_within(maps[..., band], foreground, sigma)
        np.testing.assert_allclose(found[foreground][:, band], expected[foreground], atol=1e-4)


@given(hnp.arrays(bool, (40, 50)), st.sampled_from([0.0, 0.1, 0.3, 2.0, 8.0]), st.floats(0.125, 1e4, width=32))
@settings(deadline=None, max_examples=30)
def test_a_constant_stays_constant_in_any_foreground(foreground, sigma, value):
    maps = jnp.where(foreground, value, 1e6)[..., None].astype(jnp.float32)
    smooth = np.asarray(smooth_within(maps, jnp.asarray(foreground), sigma))
    np.testing.assert_allclose(smooth[foreground], value, rtol=2e-5)


def test_the_background_does_not_leak_in():
    maps, foreground = noisy_patches((30, 30, 1)), noisy_patches((30, 30), seed=1) > 0
    elsewhere = np.where(foreground[..., None], maps, np.float32(np.nan))
    one, other = (np.asarray(smooth_within(jnp.asarray(m), jnp.asarray(foreground), 4.0)) for m in (maps, elsewhere))
    np.testing.assert_array_equal(other[foreground], one[foreground])


def test_without_smoothing_the_map_is_left_alone():
    maps = noisy_patches((5, 6, 2))
    np.testing.assert_array_equal(smooth_within(jnp.asarray(maps), jnp.ones((5, 6), bool), 0.0), maps)


@given(
    st.tuples(st.integers(1, 30), st.integers(1, 12)).flatmap(lambda shape: hnp.arrays(bool, shape)),
    st.integers(1, 7),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=40)
def test_erosion_is_scipys_minimum_filter(foreground, reach, left):
    """Whatever lies beyond the image in the arrays."""
    height, width = foreground.shape
    for beyond in (True, False):
        buffer, extent = in_buffer(foreground, 3 * left, left % 4, fill=beyond)
        found = np.asarray(eroded(buffer, reach, extent))[extent.top :, extent.left :][:height, :width]
        np.testing.assert_array_equal(found, minimum_filter(foreground, reach, mode="nearest"))


@pytest.mark.parametrize("side", [1, 3, 5])
def test_the_median_filter_is_scipys(side):
    for height, width, left in ((30, 12, 0), (7, 5, 3), (1, 4, 2)):
        image = noisy_patches((height, width))
        buffer, extent = in_buffer(image, 3 * left, left, fill=7.0)
        found = np.asarray(median_filtered(buffer, side, extent))[extent.top :, extent.left :][:height, :width]
        np.testing.assert_array_equal(found, median_filter(image, side, mode="reflect"))


def test_the_score_of_kascenas_is_the_filtered_difference_in_the_eroded_foreground():
    residual, foreground = noisy_patches((20, 24, 1)) ** 2, np.ones((20, 24), bool)
    foreground[:, :5] = foreground[3] = False
    method = halving(score="l1", smooth_px=0.0, erode_px=3, median_px=5)
    found = np.asarray(method.score_map(jnp.asarray(residual), jnp.asarray(foreground)))
    kept = minimum_filter(foreground, 3, mode="reflect")
    expected = median_filter(np.where(kept, residual[..., 0], 0), 5, mode="reflect")
    np.testing.assert_array_equal(found, np.where(foreground, expected, np.nan).astype(np.float32))
    assert method.halo_px == 3


@pytest.mark.parametrize("score", ["l2", "local_mean"])
def test_the_score_map_is_not_a_number_outside_of_the_foreground(score):
    residual, foreground = noisy_patches((20, 24, 3)), noisy_patches((20, 24), seed=1) > -0.5
    found = np.asarray(halving(score=score, smooth_px=1.5).score_map(jnp.asarray(residual), jnp.asarray(foreground)))
    assert found.dtype == np.float32
    assert found.shape == (20, 24)
    np.testing.assert_array_equal(np.isnan(found), ~foreground)
    bands = [image_operations.smooth_within(residual[..., c], foreground, 1.5) for c in range(3)]
    expected = np.mean([b**2 if score == "local_mean" else b for b in bands], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 12)).flatmap(lambda shape: hnp.arrays(bool, shape)),
    st.sampled_from(["autoencoder", "median", "mahalanobis", "matched"]),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_a_strip_with_its_halo_has_the_scores_of_the_whole_image(foreground, kind, data):
    """To the last bit; also where a part of the image has no background."""
    method, score_map = SCORES[kind]
    height, width = foreground.shape
    foreground[: data.draw(st.integers(0, height))] = True
    residual = noisy_patches((*foreground.shape, 2))
    top = data.draw(st.integers(0, height - 1))
    bottom = data.draw(st.integers(top + 1, height))
    above, below = max(top - method.halo_px, 0), min(bottom + method.halo_px, height)
    at, left = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 4))
    inside, extent = in_buffer(foreground, at, left, fill=False)
    whole = score_map(in_buffer(residual, at, left)[0], inside, extent)[at : at + height, left : left + width]
    inside, _ = in_buffer(foreground[above:below], 0, left, fill=False)
    extent = Extent(-above, height - above, left, left + width)
    strip = score_map(in_buffer(residual[above:below], 0, left)[0], inside, extent)
    np.testing.assert_array_equal(strip[top - above : bottom - above, left : left + width], whole[top:bottom])


SCORES = {
    name: (method, jax.jit(method.score_map))
    for name, method in {
        "autoencoder": halving(smooth_px=2.5),
        "median": halving(smooth_px=1.0, erode_px=4, median_px=5),
        "mahalanobis": PatchGaussian(Identity(patch_size=16, channels=2, rngs=nnx.Rngs(0)), window_px=4, stride_px=2),
        "matched": PatchGaussian(Identity(patch_size=16, channels=2, rngs=nnx.Rngs(0)), window_px=5, score="matched",
                                 blob_sigmas_px=(1.0, 1.5), smooth_px=1.0),
    }.items()
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCORES)
def test_programs_of_other_shapes_give_the_same_score(kind):
    """Strips of an image are higher or lower than the image: each shape is a program of its own."""
    method, score_map = SCORES[kind]
    residual, foreground = jnp.asarray(noisy_patches((90, 37, 2))), jnp.asarray(noisy_patches((90, 37), seed=1) > -1)
    whole = score_map(residual, foreground, Extent(0, 90, 0, 37))
    for top, bottom in ((0, 41), (30, 90), (13, 77)):
        strip = score_map(residual[top:bottom], foreground[top:bottom], Extent(-top, 90 - top, 0, 37))
        first, last = (
            (0 if top == 0 else method.halo_px),
            (bottom - top if bottom == 90 else bottom - top - method.halo_px),
        )
        # equal bits with jax 0.9; jax 0.12 contracts multiplications and additions differently in other shapes
        np.testing.assert_allclose(strip[first:last], whole[top + first : top + last], rtol=3e-7)


def test_the_halo_is_as_far_as_the_score_looks():
    """No less, or strips would be wrong; no more, or they would cost more than they must."""
    method = halving(score="local_mean", smooth_px=1.5)
    residual, everywhere = jnp.zeros((31, 1, 1)).at[15].set(1e3), jnp.ones((31, 1), bool)
    reached = np.flatnonzero(method.score_map(residual, everywhere)[:, 0])
    assert (reached[0], reached[-1]) == (15 - method.halo_px, 15 + method.halo_px)
    assert halving(smooth_px=0.0).halo_px == 0


def test_the_local_mean_sees_a_shift_that_hides_in_the_noise():
    """What it is for: the mean of many residuals is known better than any one of them."""
    residual = noisy_patches((64, 64, 1))
    residual[24:40, 24:40] += 0.5
    everywhere = jnp.ones((64, 64), bool)
    blob = np.zeros((64, 64), bool)
    blob[28:36, 28:36] = True
    contrast = {}
    for score, values in (("local_mean", residual), ("l2", residual**2)):
        scores = np.asarray(halving(score=score, smooth_px=4.0).score_map(jnp.asarray(values), everywhere))
        contrast[score] = (scores[blob].mean() - np.median(scores)) / scores[~blob].std()
    assert contrast["local_mean"] > 3 > contrast["l2"]


@pytest.mark.parametrize("loss", [losses.l2, losses.l1, losses.ssim])
def test_the_loss_without_noise_is_the_mean_difference(loss):
    method, batch = halving(loss=loss, noise_sigma=0.0), jnp.asarray(noisy_patches())
    one, other = (float(method.train_loss(method.init(), batch, jax.random.key(k))) for k in (0, 1))
    assert one == other == pytest.approx(float(loss(batch, batch / 2).mean()), rel=1e-6)


def test_the_noise_must_be_removed():
    """The input is noisy, the target is not: a network that halves leaves half of patch and noise."""
    method, batch = halving(noise_sigma=0.3, noise_cell_px=4), jnp.asarray(noisy_patches((500, 8, 8, 1)))
    loss = float(method.train_loss(method.init(), batch, jax.random.key(0)))
    noise = 0.3 * np.asarray(coarse_noise(jax.random.key(0), batch.shape, 4))
    assert loss == pytest.approx(float(((batch - (batch + noise) / 2) ** 2).mean()), rel=1e-5)
    assert loss != float(method.train_loss(method.init(), batch, jax.random.key(1)))


def test_parameters_are_the_callers_and_the_network_keeps_its_own():
    method, patches = halving(score="local_mean"), jnp.asarray(noisy_patches())
    params = jax.tree.map(lambda p: p + 0.5, method.init())
    np.testing.assert_allclose(method.reconstruct(params, patches), patches)
    np.testing.assert_allclose(method.residual(params, patches), 0)
    donated = method.init()
    jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), donate_argnums=0)(donated)
    np.testing.assert_allclose(method.reconstruct(method.init(), patches), patches / 2)


def test_a_few_steps_on_tiny_data_lower_the_loss():
    """Patches that lie on a plane: two latent numbers tell all."""
    rng = np.random.default_rng(0)
    directions = rng.normal(0, 1, (2, 8 * 8))
    data = jnp.asarray((rng.normal(0, 1, (64, 2)) @ directions).reshape(64, 8, 8, 1), jnp.float32)
    network = ConvAutoencoder(patch_size=8, channels=1, rngs=nnx.Rngs(0), latent=4, width=16)
    method, optimizer = Autoencoder(network, noise_sigma=0.1, noise_cell_px=4), optax.adam(5e-3)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, key):
        loss, gradient = jax.value_and_grad(method.train_loss)(params, data, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = method.init()
    opt_state, losses = optimizer.init(params), []
    for key in jax.random.split(jax.random.key(0), 150):
        params, opt_state, loss = step(params, opt_state, key)
        losses.append(float(loss))
    assert losses[0] > 0.8 * float((data**2).mean())
    assert np.mean(losses[-10:]) < 0.1 * losses[0]
    for kept, initial in zip(jax.tree.leaves(method.init()), jax.tree.leaves(params), strict=True):
        assert (np.asarray(kept) != initial).any()


@pytest.mark.slow
def test_rematerialised_training_step_is_the_plain_one():
    """Through the very step that training jits: transforms of Flax's own fail there."""
    batch = jnp.asarray(np.random.default_rng(0).random((4, 16, 16, 1), np.float32))
    losses = []
    for remat in (False, True):
        network = ConvAutoencoder(patch_size=16, channels=1, rngs=nnx.Rngs(0), latent=4, width=4, remat=remat)
        method, optimizer = Autoencoder(network), optax.sgd(0.1)
        step = make_step(method, optimizer, ema_decay=0.9, seed=0)
        state, _ = step(init_state(method, optimizer), batch)
        losses.append(float(step(state, batch)[1]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
