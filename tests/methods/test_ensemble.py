"""Ensembles: each network is trained and scored as it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pulmo_jax.methods.autoencoder import Autoencoder
from pulmo_jax.methods.content_key import content_keys
from pulmo_jax.methods.ensemble import Ensemble, calls_per_tile, networks, stacked
from pulmo_jax.models.autoencoder import ConvAutoencoder
from pulmo_jax.training.state import init_state, make_step, make_update


def member(seed: int, **options) -> Autoencoder:
    network = ConvAutoencoder(patch_size=16, channels=1, latent=4, width=4, rngs=nnx.Rngs(seed))
    return Autoencoder(network, **{"smooth_px": 1.0} | options)


ENSEMBLE = Ensemble(tuple(member(seed) for seed in (3, 5, 9)))


def patches(count: int = 4, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random((count, 16, 16, 1), np.float32))


def test_each_network_is_trained_as_if_it_were_alone():
    """Own initial parameters, noise, gradient clipping and moving average; the same batches."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.adamw(1e-2))
    step, state = make_step(ENSEMBLE, optimizer, 0.9, seed=4), init_state(ENSEMBLE, optimizer)
    for i in range(3):
        state, metrics = step(state, patches(seed=i))
    keys, losses = jax.random.split(jax.random.key(4), 3), []
    for k, one in enumerate(ENSEMBLE.members):
        update, alone = jax.jit(make_update(one, optimizer, 0.9)), init_state(one, optimizer)
        for i in range(3):
            alone, info = update(alone, patches(seed=i), keys[k])
        losses.append(info["loss"])
        for part in ("params", "ema"):
            _, own = networks(ENSEMBLE, getattr(state, part))[k]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), own, getattr(alone, part))
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-4)
    assert len({float(loss) for loss in losses}) == 3


def test_score_and_spread_are_mean_and_standard_deviation_of_the_networks():
    params, x, inside = ENSEMBLE.init(), patches(2), jnp.ones((16, 16), bool).at[:4].set(False)
    alone = [one.score_map(one.residual(one.init(), x)[0], inside) for one in ENSEMBLE.members]
    residual = ENSEMBLE.residual(params, x)[0]
    np.testing.assert_allclose(ENSEMBLE.score_map(residual, inside), np.mean(alone, 0), rtol=1e-5)
    assert ENSEMBLE.detail_names == ("spread",)
    np.testing.assert_allclose(ENSEMBLE.detail_maps(residual, inside)[..., 0], np.std(alone, 0), rtol=1e-4, atol=1e-7)
    reconstruction = np.mean([one.reconstruct(one.init(), x) for one in ENSEMBLE.members], 0)
    np.testing.assert_allclose(ENSEMBLE.reconstruct(params, x), reconstruction, rtol=1e-5, atol=1e-6)
    assert ENSEMBLE.halo_px == ENSEMBLE.member.halo_px
    assert calls_per_tile(ENSEMBLE) is None


def test_networks_of_a_single_method():
    one = member(0)
    assert networks(one, 7) == [(one, 7)]
    assert stacked([{"a": jnp.zeros(2)}, {"a": jnp.ones(2)}])["a"].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("rows", [[0], [2, 0], [3, 2, 1, 0]])
def test_the_key_of_a_patch_depends_on_nothing_but_its_content(rows):
    x = patches()
    keys = jax.random.key_data(content_keys(x, seed=1))
    np.testing.assert_array_equal(jax.random.key_data(content_keys(x[np.array(rows)], seed=1)), keys[np.array(rows)])
    assert len(np.unique(keys, axis=0)) == len(x)
    assert (np.asarray(jax.random.key_data(content_keys(x, seed=2))) != keys).any(axis=1).all()


def test_patches_that_differ_in_one_pixel_or_in_their_order_have_other_keys():
    x = patches(1)
    others = [x.at[0, 3, 5, 0].add(1e-6), x[:, ::-1], jnp.swapaxes(x, 1, 2)]
    keys = [tuple(np.asarray(jax.random.key_data(content_keys(one, seed=0)))[0]) for one in [x, *others]]
    assert len(set(keys)) == 4
