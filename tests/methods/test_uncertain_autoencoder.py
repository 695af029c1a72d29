"""AE-U: likelihood, stability, score and predicted deviation, against NumPy and known noise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from references import image_operations
from scipy.stats import norm

from pulmo_jax.methods.base import Detailed, HasFeatureMaps, Method, ShapesNetwork
from pulmo_jax.methods.reconstruction import coarse_noise
from pulmo_jax.methods.uncertain_autoencoder import UncertainAutoencoder
from pulmo_jax.models.autoencoder import ConvAutoencoder


class Constant(nnx.Module):
    """A "network" whose mean is the patch times a factor, and whose log variance is the same everywhere."""

    def __init__(self, factor: float = 0.5, s: float = -1.0) -> None:
        self.factor, self.s = nnx.Param(jnp.float32(factor)), nnx.Param(jnp.float32(s))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.factor[...] * x, jnp.full_like(x, self.s[...])], axis=-1)


def constant(factor: float = 0.5, s: float = -1.0, **options) -> UncertainAutoencoder:
    return UncertainAutoencoder(Constant(factor, s), **options)


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


def network(**options) -> ConvAutoencoder:
    given = {"patch_size": 16, "channels": 2, "latent": 4, "width": 8, "outputs": 2} | options
    return ConvAutoencoder(rngs=nnx.Rngs(0), **given)


def test_is_a_method_that_asks_for_two_outputs():
    assert isinstance(constant(), Method)
    assert isinstance(constant(), Detailed)
    assert isinstance(constant(), HasFeatureMaps)
    assert isinstance(UncertainAutoencoder, ShapesNetwork)
    assert dict(UncertainAutoencoder.NETWORK) == {"outputs": 2}


def test_the_loss_is_the_negative_log_likelihood_of_a_gaussian():
    """Twice it, without log(2 pi)."""
    method, batch = constant(noise_sigma=0.0, least_sd=0.1), normal((3, 8, 8, 2))
    variance = np.exp(-1) + 0.1**2
    expected = -2 * norm.logpdf(batch, 0.5 * np.asarray(batch), np.sqrt(variance)).mean() - np.log(2 * np.pi)
    assert float(method.train_loss(method.init(), batch, jax.random.key(0))) == pytest.approx(expected, rel=1e-5)


def test_the_noise_must_be_removed():
    method, batch = constant(noise_sigma=0.3, noise_cell_px=4, least_sd=1e-3), normal((50, 8, 8, 1))
    noise = 0.3 * np.asarray(coarse_noise(jax.random.key(0), batch.shape, 4))
    r = np.asarray(batch) - 0.5 * (batch + noise)
    s = np.log(np.exp(-1) + 1e-6)
    found = float(method.train_loss(method.init(), batch, jax.random.key(0)))
    assert found == pytest.approx(float((np.exp(-s) * r**2 + s).mean()), rel=1e-5)


@pytest.mark.parametrize("s", [-1e4, -200.0, -20.0, 0.0, 60.0])
def test_loss_and_gradient_are_finite_for_every_log_variance(s):
    """Also for a perfect reconstruction, whose likelihood has no bound without `least_sd`."""
    for factor in (0.5, 1.0):
        method, batch = constant(factor, s, noise_sigma=0.0), normal((2, 8, 8, 1))
        loss, gradient = jax.value_and_grad(method.train_loss)(method.init(), batch, jax.random.key(0))
        assert np.isfinite(float(loss))
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(gradient))
        assert float(loss) >= 2 * np.log(0.01) - 1e-3


@pytest.mark.parametrize("score", ["local_mean", "l2"])
@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_the_score_divides_by_a_power_of_the_deviation(score, whitening):
    method = constant(score=score, whitening=whitening, smooth_px=1.5)
    r, variance = np.asarray(normal((20, 24, 3))), 0.1 + np.asarray(normal((20, 24, 3), 1)) ** 2
    foreground = np.asarray(normal((20, 24), 2)) > -0.5
    whitened = r / np.sqrt(variance) ** whitening
    kept = whitened if score == "local_mean" else whitened**2
    bands = [image_operations.smooth_within(kept[..., c], foreground, 1.5) for c in range(3)]
    expected = np.mean([b**2 if score == "local_mean" else b for b in bands], axis=0)
    residual = jnp.asarray(np.concatenate([r, variance], -1), jnp.float32)
    found = np.asarray(method.score_map(residual, jnp.asarray(foreground)))
    np.testing.assert_array_equal(np.isnan(found), ~foreground)
    np.testing.assert_allclose(found[foreground], expected[foreground], rtol=1e-4, atol=1e-5)


def test_the_residual_holds_differences_then_variances():
    method, patches = constant(s=-3.0, least_sd=0.2), normal((2, 8, 8, 2))
    residual = method.residual(method.init(), patches)
    np.testing.assert_allclose(residual[..., :2], patches / 2, atol=1e-6)
    np.testing.assert_allclose(residual[..., 2:], np.exp(-3) + 0.04, rtol=1e-5)
    sd = method.detail_maps(residual[0], jnp.ones((8, 8), bool))
    assert method.detail_names == ("predicted_sd",)
    np.testing.assert_allclose(sd, np.sqrt(np.exp(-3) + 0.04), rtol=1e-5)


def test_no_value_outside_the_image_makes_the_score_infinite():
    method = constant()
    residual = jnp.zeros((8, 8, 2)).at[:4, :, 1].set(0.01)  # as beyond the last row: no variance
    assert np.isfinite(method.score_map(residual, jnp.ones((8, 8), bool))).all()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "remat"), [("float32", False), ("bfloat16", True)])
def test_the_predicted_deviation_is_that_of_the_noise(dtype, remat):
    """Left half: noise of 0.05, right half: of 0.4; no network can predict the noise of pixels."""
    rng, sd = np.random.default_rng(0), np.where(np.arange(16) < 8, 0.05, 0.4)[:, None]
    data = jnp.asarray(rng.normal(0, 1, (256, 1, 1, 1)) * 0.5 + rng.normal(0, sd, (256, 16, 16, 1)), jnp.float32)
    method = UncertainAutoencoder(network(channels=1, latent=1, dtype=dtype, remat=remat), noise_sigma=0.0)
    optimizer = optax.adam(1e-2)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, key):
        loss, gradient = jax.value_and_grad(method.train_loss)(params, data, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = method.init()
    opt_state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), 200):
        params, opt_state, loss = step(params, opt_state, key)
    assert np.isfinite(float(loss))
    predicted = np.sqrt(method.residual(params, data)[..., 1]).mean((0, 1))
    assert np.median(predicted[:8]) == pytest.approx(0.05, rel=0.3)
    assert np.median(predicted[8:]) == pytest.approx(0.4, rel=0.2)


def test_feature_maps_are_those_of_the_network():
    method, patches = UncertainAutoencoder(network()), normal((2, 16, 16, 2))
    params = jax.tree.map(lambda p: 2 * p, method.init())
    found, kept = method.feature_maps(params, patches), method.feature_maps(method.init(), patches)
    for one, other, expected in zip(found, kept, method.network.feature_maps(patches), strict=True):
        np.testing.assert_array_equal(other, expected)
        assert (np.asarray(one) != expected).any()
