"""VAE: divergence and loss against PyTorch-independent references, the draws, and pPCA on Gaussian data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.integrate import quad
from scipy.stats import norm

from pulmo_jax.methods import losses
from pulmo_jax.methods.base import Generative, HasFeatureMaps, Method, ShapesNetwork
from pulmo_jax.methods.variational_autoencoder import LOG_VARIANCE_BOUND, VariationalAutoencoder, divergence
from pulmo_jax.models.autoencoder import ConvAutoencoder


class Linear(nnx.Module):
    """Encoder and decoder without activations, patches of 4 x 4 pixels, 3 latent numbers."""

    latent_shape = (3,)

    def __init__(self, seed: int = 0) -> None:
        keys = jax.random.split(jax.random.key(seed), 2)
        self.into = nnx.Param(0.1 * jax.random.normal(keys[0], (16, 3)))
        self.out = nnx.Param(0.1 * jax.random.normal(keys[1], (3, 16)))
        self.s = nnx.Param(jnp.zeros(3))

    def encode_moments(self, x: jax.Array) -> jax.Array:
        mean = x.reshape(len(x), 16) @ self.into[...]
        return jnp.stack([mean, jnp.broadcast_to(self.s[...], mean.shape)])

    def decode(self, z: jax.Array) -> jax.Array:
        return (z @ self.out[...]).reshape(-1, 4, 4, 1)


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


def convolutional(**options) -> VariationalAutoencoder:
    given = {"patch_size": 16, "channels": 2, "latent": 4, "width": 8, "moments": 2} | options
    return VariationalAutoencoder(ConvAutoencoder(rngs=nnx.Rngs(0), **given))


def test_is_a_method_that_draws_and_asks_for_two_moments():
    method = VariationalAutoencoder(Linear())
    for protocol in (Method, Generative, HasFeatureMaps):
        assert isinstance(method, protocol)
    assert isinstance(VariationalAutoencoder, ShapesNetwork)
    assert dict(VariationalAutoencoder.NETWORK) == {"moments": 2}


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (1.5, 0.3), (-0.2, 2.0)])
def test_the_divergence_is_the_integral_that_defines_it(mean, sd):
    def integrand(x: float) -> float:
        return norm.pdf(x, mean, sd) * (norm.logpdf(x, mean, sd) - norm.logpdf(x))

    expected, _ = quad(integrand, mean - 12 * sd, mean + 12 * sd)
    assert float(divergence(jnp.float32(mean), jnp.float32(2 * np.log(sd)))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", [losses.l2, losses.l1])
def test_the_loss_is_the_mean_loss_plus_the_weighted_mean_divergence(loss):
    method = VariationalAutoencoder(Linear(), loss=loss, kl_weight=0.7, noise_sigma=0.0)
    params, batch = method.init(), normal((5, 4, 4, 1))
    mean, s = method.posterior(params, batch)
    draw = jax.random.normal(jax.random.split(jax.random.key(3))[1], mean.shape)
    decoded = (np.asarray(mean + np.exp(s / 2) * draw) @ np.asarray(method.network.out[...])).reshape(batch.shape)
    expected = float(loss(image=batch, reconstruction=jnp.asarray(decoded)).mean()) + 0.7 * divergence(mean, s).mean()
    assert float(method.train_loss(params, batch, jax.random.key(3))) == pytest.approx(float(expected), rel=1e-5)


def test_scores_use_the_mean_without_a_draw():
    method, patches = convolutional(), normal((3, 16, 16, 2))
    params, network = method.init(), method.network
    expected = network.decode(network.encode_moments(patches)[0])
    np.testing.assert_allclose(method.reconstruct(params, patches), expected, atol=1e-6)
    np.testing.assert_allclose(method.residual(params, patches), patches - expected, atol=1e-6)


@pytest.mark.parametrize("s", [-1e5, -50.0, 50.0, 1e5])
def test_loss_and_gradient_are_finite_for_every_log_variance(s):
    method = VariationalAutoencoder(Linear())
    params = {**method.init(), "s": jax.tree.map(lambda p: p + s, method.init()["s"])}
    params = nnx.State(params)
    loss, gradient = jax.value_and_grad(method.train_loss)(params, normal((2, 4, 4, 1)), jax.random.key(0))
    assert np.isfinite(float(loss))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(method.posterior(params, normal((2, 4, 4, 1)))[1]).max() <= LOG_VARIANCE_BOUND


def trained(method: VariationalAutoencoder, data: jax.Array, steps: int, rate: float):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, key):
        loss, gradient = jax.value_and_grad(method.train_loss)(params, data, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = method.init()
    opt_state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(0), steps):
        params, opt_state, loss = step(params, opt_state, key)
    return params, float(loss)


def test_a_linear_network_learns_probabilistic_pca():
    """Directions whose variance is below that of the pixel noise, kl_weight N / (2 D), are not encoded; those above it
    are shrunk by (variance - noise) / variance (Tipping and Bishop 1999; Lucas et al. 2019, NeurIPS)."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(0, 1, (16, 16)))[0][:, :3]
    variances = np.array([4.0, 1.0, 0.25])
    scores = rng.normal(0, 1, (512, 3))
    scores = np.linalg.qr(scores - scores.mean(0))[0] * np.sqrt(512 * variances)
    data = jnp.asarray((scores @ axes.T).reshape(512, 4, 4, 1), jnp.float32)
    noise = 0.5
    method = VariationalAutoencoder(Linear(), kl_weight=2 * 3 * noise / 16, noise_sigma=0.0)
    params, _ = trained(method, data, 1500, 2e-2)
    reconstruction = np.asarray(method.reconstruct(params, data)).reshape(512, 16)
    kept = ((reconstruction @ axes) * scores).sum(0) / (scores**2).sum(0)
    np.testing.assert_allclose(kept, np.maximum(0, (variances - noise) / variances), atol=0.06)


def test_draws_have_the_distribution_of_the_decoder_and_follow_the_key():
    method = VariationalAutoencoder(Linear())
    params = method.init()
    draws = method.sample(params, jax.random.key(1), 20000)
    assert draws.shape == (20000, 4, 4, 1)
    out = np.asarray(method.network.out[...])
    np.testing.assert_allclose(np.cov(np.asarray(draws).reshape(-1, 16).T), out.T @ out, atol=0.003)
    np.testing.assert_array_equal(draws[:0], method.sample(params, jax.random.key(1), 0))
    assert (np.asarray(method.sample(params, jax.random.key(2), 4)) != draws[:4]).any()
    assert method.sampling_calls == 1


@pytest.mark.parametrize("bottleneck", ["dense", "spatial"])
def test_a_spatial_bottleneck_is_drawn_too(bottleneck):
    method = convolutional(bottleneck=bottleneck)
    assert method.sample(method.init(), jax.random.key(0), 3).shape == (3, 16, 16, 2)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"remat": True}])
def test_precision_and_rematerialisation(options):
    batch, key = normal((4, 16, 16, 2)), jax.random.key(0)
    plain, other = convolutional(), convolutional(**options)
    losses_and_gradients = [jax.jit(jax.value_and_grad(m.train_loss))(m.init(), batch, key) for m in (plain, other)]
    (one, g), (two, h) = losses_and_gradients
    assert float(two) == pytest.approx(float(one), rel=1e-2 if "dtype" in options else 1e-5)
    for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(h), strict=True):
        np.testing.assert_allclose(a, b, atol=0.1 * float(jnp.abs(a).max()) if "dtype" in options else 1e-6)
    assert ("remat" in str(jax.make_jaxpr(other.train_loss)(other.init(), batch, key))) == ("remat" in options)
