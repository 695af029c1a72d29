"""Vector quantisation: nearest codes, straight-through gradient, moving averages of the codebook, restarts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.cluster import KMeans

from pulmo_jax.methods.base import Method
from pulmo_jax.methods.losses import l2
from pulmo_jax.methods.vq_autoencoder import (
    DEAD,
    VqAutoencoder,
    codebook,
    least_use,
    nearest,
    perplexity,
    statistics,
)
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.models.unet import blocks_to_features, features_to_blocks
from pulmo_jax.models.vq_autoencoder import VqNetwork
from pulmo_jax.training.optimizers import adamw
from pulmo_jax.training.state import init_state, make_step
from pulmo_jax.types import InputError

KEY = jax.random.key(0)


class Blocks(nnx.Module):
    """Blocks of 2 x 2 pixels are the latent vectors, times a gain on the way in and on the way out."""

    def __init__(self, side: int):
        self.code_side, self.code_features = side // 2, 4
        self.into, self.out = nnx.Param(jnp.ones(())), nnx.Param(jnp.ones(()))

    def encode(self, x):
        return self.into[...] * blocks_to_features(x, 2)

    def decode(self, z):
        return features_to_blocks(self.out[...] * z, 2)


def blocks_method(n_codes=3, **options):
    return VqAutoencoder(Blocks(4), loss=l2, n_codes=n_codes, **options)


def small_method(**options):
    network = VqNetwork(patch_size=16, channels=1, rngs=nnx.Rngs(0), width=8, blocks=1, code_features=6)
    return VqAutoencoder(network, n_codes=8, **options)


def patches(count=4, side=4, channels=1, seed=0):
    return jax.random.normal(jax.random.key(seed), (count, side, side, channels))


def started(method, batch):
    """Parameters after the first batch, which initialises the codebook."""
    params = method.init()
    return method.update_statistics(params, method.loss_and_statistics(params, batch, KEY)[1])


# --- codes


def test_nearest_code_is_that_of_a_search_in_float64():
    rng = np.random.default_rng(0)
    z, vectors = rng.normal(size=(5, 7, 3)), rng.normal(size=(11, 3))
    slow = ((z[..., None, :] - vectors) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(nearest(jnp.asarray(z, jnp.float32), jnp.asarray(vectors, jnp.float32)), slow)


def test_of_equal_codes_the_first_is_taken():
    assert nearest(jnp.ones((2, 3)), jnp.ones((4, 3))).tolist() == [0, 0]


@pytest.mark.slow
def test_codes_encode_and_decode():
    method, x = small_method(), patches(side=16)
    params = started(method, x)
    codes = method.encode_codes(params, x)
    assert codes.shape == (4, method.code_side, method.code_side) == (4, 4, 4)
    assert 0 <= codes.min() <= codes.max() < method.n_codes
    np.testing.assert_array_equal(method.decode_codes(params, codes), method.reconstruct(params, x))


def test_blocks_are_reconstructed_by_their_nearest_code():
    method, x = blocks_method(n_codes=5), patches(8)
    params = started(method, x)
    vectors = np.asarray(codebook(params["codes"]))
    rebuilt = np.asarray(blocks_to_features(method.reconstruct(params, x), 2)).reshape(-1, 4)
    originals = np.asarray(blocks_to_features(x, 2)).reshape(-1, 4)
    for block, found in zip(originals, rebuilt, strict=True):
        closest = vectors[((vectors - block) ** 2).sum(1).argmin()]
        np.testing.assert_allclose(found, closest, atol=1e-6)


# --- loss and gradient


def test_gradient_is_straight_through_and_that_of_the_commitment():
    """d loss / d z = d |x - out q|^2 / d q + commitment * d |z - q|^2 / d z, at the quantised q."""
    method, x = blocks_method(commitment=0.3), patches()
    params = started(method, x)
    gradient = jax.grad(method.train_loss)(params, x, KEY)["network"]
    z = np.asarray(blocks_to_features(x, 2), np.float64)
    q = np.asarray(codebook(params["codes"]), np.float64)[np.asarray(method.encode_codes(params, x))]
    through = 2 * (q - z) / z.size + 0.3 * 2 * (z - q) / z.size  # gains are 1
    assert float(gradient["into"][...]) == pytest.approx((through * z).sum(), rel=1e-4)
    assert float(gradient["out"][...]) == pytest.approx((2 * (q - z) / z.size * q).sum(), rel=1e-4)


def test_loss_is_reconstruction_plus_commitment():
    method, x = blocks_method(commitment=0.3), patches()
    params = started(method, x)
    error = np.mean((np.asarray(x) - np.asarray(method.reconstruct(params, x))) ** 2)
    assert float(method.train_loss(params, x, KEY)) == pytest.approx(1.3 * error, rel=1e-5)


def test_no_gradient_reaches_the_codebook_from_an_update():
    method, x = small_method(), patches(side=16)
    params = started(method, x)

    def absorbed(network):
        seen = method.loss_and_statistics({**params, "network": network}, x, KEY)[1]
        return method.update_statistics(params, seen)["codes"]["sums"].sum()

    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.grad(absorbed)(params["network"])))


def test_noise_is_added_to_the_input_only():
    """Without noise, each block is reconstructed by its nearest code, which is the best of all codes."""
    method, x = blocks_method(noise_sigma=1.0, noise_cell_px=2, commitment=0.0), patches()
    params = started(method, x)
    losses = {float(method.train_loss(params, x, jax.random.key(i))) for i in range(3)}
    assert len(losses) == 3
    assert float(blocks_method(commitment=0.0).train_loss(params, x, KEY)) < min(losses)


# --- codebook


def test_one_step_without_memory_is_a_step_of_k_means():
    batch = patches(64)
    method = blocks_method(n_codes=3, code_decay=0.0)
    params = started(method, batch)
    before = np.asarray(codebook(params["codes"]))
    after = codebook(method.update_statistics(params, method.loss_and_statistics(params, batch, KEY)[1])["codes"])
    rows = np.asarray(blocks_to_features(batch, 2)).reshape(-1, 4)
    kmeans: Any = KMeans  # the stubs of scikit-learn know only text for init
    expected = kmeans(3, init=before, n_init=1, max_iter=1).fit(rows)
    # scikit-learn's centres are the means of the assignment to the initial centres
    labels = ((rows[:, None] - before) ** 2).sum(-1).argmin(1)
    np.testing.assert_allclose(after, [rows[labels == k].mean(0) for k in range(3)], atol=1e-4)
    np.testing.assert_allclose(after, expected.cluster_centers_, atol=1e-4)


def test_codebook_follows_moving_averages():
    method = blocks_method(n_codes=3, code_decay=0.9)
    params = started(method, patches(64))
    counts = np.asarray(params["codes"]["counts"], np.float64)
    sums = np.asarray(params["codes"]["sums"], np.float64)
    for step in range(1, 4):
        batch = patches(64, seed=step)
        vectors = np.asarray(codebook(params["codes"]), np.float64)
        params = method.update_statistics(params, method.loss_and_statistics(params, batch, jax.random.key(step))[1])
        rows = np.asarray(blocks_to_features(batch, 2), np.float64).reshape(-1, 4)
        labels = ((rows[:, None] - vectors) ** 2).sum(-1).argmin(1)
        for k in range(3):
            counts[k] = 0.9 * counts[k] + 0.1 * (labels == k).sum()
            sums[k] = 0.9 * sums[k] + 0.1 * rows[labels == k].sum(0)
        assert counts.min() > DEAD  # no restart is part of this test
        np.testing.assert_allclose(params["codes"]["counts"], counts, rtol=1e-5)
        np.testing.assert_allclose(params["codes"]["sums"], sums, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(codebook(params["codes"]), sums / counts[:, None], rtol=1e-3, atol=1e-4)


def test_first_batch_makes_codes_of_its_latent_vectors_and_one_of_their_mean():
    method, batch = blocks_method(n_codes=6), patches(8)
    vectors = np.asarray(codebook(started(method, batch)["codes"]))
    rows = np.asarray(blocks_to_features(batch, 2)).reshape(-1, 4)
    np.testing.assert_allclose(
        vectors[0], rows.mean(0), atol=1e-4
    )  # all vectors are nearest to the first of equal codes
    assert np.abs(vectors[1:, None] - rows).max(-1).min(1).max() < 1e-4


def test_only_dead_codes_are_restarted():
    method, batch = blocks_method(n_codes=4, code_decay=0.5), patches(16)
    centres = np.array([[0.0] * 4, [50.0] * 4, [60.0] * 4, [70.0] * 4])  # only the first is near any block
    counts = np.array([40.0, 40.0, 1.9, 0.5])
    codes = {"counts": jnp.asarray(counts), "sums": jnp.asarray(centres * counts[:, None])}
    params = {**method.init(), "codes": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), codes)}
    new = method.update_statistics(params, method.loss_and_statistics(params, batch, KEY)[1])["codes"]
    np.testing.assert_allclose(new["counts"], [20 + 0.5 * 64, 20, DEAD, DEAD])
    vectors = np.asarray(codebook(new))
    np.testing.assert_allclose(vectors[1], 50, rtol=1e-4)
    rows = np.asarray(blocks_to_features(batch, 2)).reshape(-1, 4)
    for restarted in vectors[2:]:
        assert np.abs(rows - restarted).max(-1).min() < 1e-4


def test_a_codebook_with_more_codes_than_latent_vectors_keeps_the_codes_in_use():
    """Each batch uses only some of 512 codes; those that were used in the last ones are not restarted."""
    method, batch = blocks_method(n_codes=512, code_decay=0.95), patches(16)  # 64 latent vectors
    least = 0.1 * 64 / 512
    assert float(least_use(jnp.full(512, 64 / 512))) == pytest.approx(least)
    assert float(least_use(jnp.full(4, 16.0))) == DEAD
    counts = jnp.full(512, 0.05).at[0].set(0.5 * least)
    codes = {"counts": counts, "sums": 50 * jnp.ones((512, 4)) * counts[:, None]}
    seen = method.loss_and_statistics({**method.init(), "codes": codes}, batch, KEY)[1]
    new = method.update_statistics(
        {**method.init(), "codes": codes}, seen | {"counts": jnp.zeros(512).at[1].set(64.0)}
    )["codes"]
    np.testing.assert_allclose(new["counts"][2:], 0.95 * 0.05, rtol=1e-6)
    assert float(new["counts"][0]) == pytest.approx(least)
    np.testing.assert_allclose(new["sums"][0], least * seen["drawn"][0], rtol=1e-6)


def test_accumulated_gradients_update_the_network_once_and_the_codebook_after_every_batch():
    method, batches = small_method(), [patches(side=16, seed=i) for i in range(2)]
    optimizer = adamw(steps=8, accumulate=2, warmup_fraction=0)
    state, step = init_state(method, optimizer), make_step(method, optimizer, 0.9, 0)
    expected = method.init()
    for number, batch in enumerate(batches):
        before = jax.tree.map(np.asarray, state.params["network"])
        key = jax.random.fold_in(jax.random.key(0), number)
        expected = method.update_statistics(
            expected, method.loss_and_statistics(expected, batch, key)[1]
        )  # network unchanged
        state, _ = step(state, batch)
        for name in ("counts", "sums"):
            np.testing.assert_allclose(state.params["codes"][name], expected["codes"][name], rtol=1e-4, atol=1e-5)
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(state.params["network"]), strict=True)
        assert any((a != b).any() for a, b in pairs) == (number == 1)


def test_restarts_are_functions_of_the_key():
    z, codes = patches(16, side=2).reshape(16, 4), jnp.zeros(16, jnp.int32)
    drawn = [np.asarray(statistics(z, 0 * z, codes, 5, jax.random.key(i))["drawn"]) for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_vectors_for_restarts_are_drawn_by_their_squared_distance_from_the_codes():
    z = jnp.array([[0.0], [1.0], [2.0], [5.0]])
    distances = jnp.array([0.0, 1.0, 2.0, 1.0])[:, None]
    drawn = statistics(z, z - distances, jnp.zeros(4, jnp.int32), 6000, KEY)["drawn"][:, 0]
    shares = [float((drawn == value).mean()) for value in (0, 1, 2, 5)]
    np.testing.assert_allclose(shares, [0, 1 / 6, 4 / 6, 1 / 6], atol=0.03)  # five standard errors
    exact = statistics(z, z, jnp.zeros(4, jnp.int32), 3, KEY)["drawn"]
    assert np.isfinite(exact).all()  # vectors that all equal their codes


def test_absorbing_changes_the_codebook_only():
    method, x = small_method(), patches(side=16)
    params = started(method, x)
    new = method.update_statistics(params, method.loss_and_statistics(params, x, KEY)[1])
    assert method.frozen == ("codes",)
    assert new.keys() == params.keys() == {"network", "codes"}
    assert new["network"] is params["network"]
    assert (np.asarray(new["codes"]["sums"]) != np.asarray(params["codes"]["sums"])).any()


def test_perplexity_counts_the_codes_in_use():
    assert float(perplexity(jnp.ones(8))) == pytest.approx(8, rel=1e-5)
    assert float(perplexity(jnp.array([5.0, 0, 0]))) == pytest.approx(1)
    assert float(perplexity(jnp.array([1.0, 1, 0]))) == pytest.approx(2)
    metrics = blocks_method(n_codes=6).loss_and_statistics(started(blocks_method(n_codes=6), patches()), patches(), KEY)
    assert 1 <= float(metrics[1]["metrics"]["perplexity"]) <= int(metrics[1]["metrics"]["used_codes"]) <= 6


# --- the method as a whole


def train(method, batches, rate=0.02):
    """Gradient descent on the network, moving averages of the codes; returns the parameters and the losses."""

    @jax.jit
    def step(params, batch, key):
        def loss_of(network):
            return method.loss_and_statistics({**params, "network": network}, batch, key)

        (loss, seen), gradient = jax.value_and_grad(loss_of, has_aux=True)(params["network"])
        network = jax.tree.map(lambda p, g: p - rate * g, params["network"], gradient)
        return method.update_statistics({**params, "network": network}, seen), loss

    params, losses = method.init(), []
    for i, batch in enumerate(batches):
        params, loss = step(params, batch, jax.random.key(i))
        losses.append(float(loss))
    return params, losses


def test_it_learns_a_texture_and_uses_its_codes():
    tile = jnp.tile(jnp.linspace(0, 1, 4), 4)
    texture = jnp.broadcast_to(tile[:, None] * tile[None], (8, 16, 16))[..., None]
    batches = [texture * jax.random.uniform(jax.random.key(i), (8, 1, 1, 1)) for i in range(150)]
    params, losses = train(small_method(), batches)
    assert np.mean(losses[-10:]) < 0.3 * losses[1]
    assert len(np.unique(small_method().encode_codes(params, batches[0]))) >= 4


@pytest.mark.slow
def test_networks_are_vectorised_over_their_parameters():
    method, x = small_method(), patches(side=16)
    each = [started(method, patches(side=16, seed=i)) for i in range(2)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    together = jax.vmap(method.residual, in_axes=(0, None))(both, x)
    apart = jnp.stack([method.residual(params, x) for params in each])
    np.testing.assert_allclose(together, apart, atol=1e-5)
    seen = jax.vmap(lambda params: method.loss_and_statistics(params, x, KEY)[1])(both)
    assert jax.vmap(method.update_statistics)(both, seen)["codes"]["counts"].shape == (2, 8)


def test_residual_and_score_map():
    method, x = small_method(smooth_px=0.0), patches(side=16)
    params = started(method, x)
    assert isinstance(method, Method)
    residual = method.residual(params, x)
    np.testing.assert_allclose(residual, x - method.reconstruct(params, x), atol=1e-6)
    inside = jnp.ones((16, 16), bool).at[0].set(False)
    score = method.score_map(residual[0], inside)
    assert np.isnan(score[0]).all()
    np.testing.assert_allclose(score[1:], residual[0, 1:, :, 0] ** 2, rtol=1e-5)


def test_model_without_a_grid_of_latent_vectors_is_refused():
    network = ConvAutoencoder(patch_size=16, channels=1, rngs=nnx.Rngs(0), latent=4, width=4)
    with pytest.raises(InputError, match="^model: ConvAutoencoder has no grid of latent vectors to quantise; give mo"):
        VqAutoencoder(network)
