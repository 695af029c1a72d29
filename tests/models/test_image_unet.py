"""U-Net from images to images: shapes, time, attention, and options that must not change its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.residuals import kept_mib

from pulmo_jax.models.image_unet import ImageUNet, SelfAttention, sinusoids


def make(patch_size=16, channels=2, **options):
    return ImageUNet(patch_size=patch_size, channels=channels, rngs=nnx.Rngs(0), width=8, **options)


def awake(network: ImageUNet, seed: int = 1) -> ImageUNet:
    """The network with random numbers for all parameters, so that no path is silenced by initial zeros."""
    graph, params = nnx.split(network)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    scale = [(0.3 if p.ndim > 1 else 0.1) * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, scale))


def output(network: ImageUNet, *arguments: jax.Array) -> jax.Array:
    """Output of the network by one compiled program."""
    graph, state = nnx.split(network)
    return jax.jit(lambda state, *arguments: nnx.merge(graph, state)(*arguments))(state, *arguments)


def gradient(network: ImageUNet, *arguments: jax.Array) -> list[jax.Array]:
    """Gradient of the mean square of the output."""
    graph, params = nnx.split(network)
    loss = jax.jit(jax.grad(lambda p: (nnx.merge(graph, p)(*arguments) ** 2).mean()))
    return jax.tree.leaves(loss(params))


TIME = jnp.array([0.1, 0.5, 1.0])


def image(seed=0, shape=(3, 16, 16, 2)):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("stem", [1, 2, 4])
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_output_has_the_size_of_the_input(stem, outputs):
    network = make(stem=stem, outputs=outputs, depth=2)
    maps = jax.eval_shape(network.feature_maps, image())
    assert jax.eval_shape(network, image()).shape == (3, 16, 16, 2 * outputs)
    assert [f.shape for f in maps] == [
        (3, 16 // stem, 16 // stem, 8),
        (3, 8 // stem, 8 // stem, 16),
    ]


@pytest.mark.slow
def test_it_starts_as_zero_and_all_parameters_can_learn():
    network = make(timed=True, depth=2, attention_px=(4,))
    np.testing.assert_array_equal(output(network, image(), TIME), 0)
    assert all(float(jnp.abs(g).max()) > 0 for g in gradient(awake(network), image(), TIME))


def test_time_changes_the_output_of_its_own_image_only():
    network = awake(make(timed=True))
    one, other = output(network, image(), TIME), output(network, image(), TIME.at[1].set(0.3))
    assert float(jnp.abs(one[1] - other[1]).max()) > 1e-3
    np.testing.assert_allclose(one[::2], other[::2], atol=1e-6)


@pytest.mark.parametrize(("timed", "time"), [(True, None), (False, jnp.zeros(3))])
def test_a_time_that_does_not_fit_is_refused(timed, time):
    with pytest.raises(ValueError, match="timed"):
        make(timed=timed)(image(), time)


def test_sinusoids_are_those_of_a_position():
    found = np.asarray(sinusoids(jnp.array([0.0, 0.25, 1.0]), 6))
    for row, position in zip(found, (0, 250, 1000), strict=True):
        phases = [position / 10_000 ** (k / 3) for k in range(3)]
        np.testing.assert_allclose(row, [*np.cos(phases), *np.sin(phases)], atol=1e-4)


def test_attention_is_a_weighted_mean_over_all_cells():
    """Head by head and cell by cell, in NumPy."""
    layer = SelfAttention(16, 2, rngs=nnx.Rngs(0))
    layer.output.kernel = nnx.Param(jax.random.normal(jax.random.key(5), (16, 16)))
    x = image(shape=(2, 3, 4, 16))
    cells = np.asarray(layer.norm(x)).reshape(2, 12, 16) @ np.asarray(layer.inputs.kernel) + np.asarray(
        layer.inputs.bias
    )
    expected = np.zeros((2, 12, 16))
    for b in range(2):
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            q, k, v = (cells[b, :, 16 * i : 16 * i + 16][:, part] for i in range(3))
            weights = np.exp(q @ k.T / np.sqrt(8))
            expected[b, :, part] = weights / weights.sum(1, keepdims=True) @ v
    expected = expected @ np.asarray(layer.output.kernel) + np.asarray(layer.output.bias)
    np.testing.assert_allclose(layer(x), x + expected.reshape(x.shape), atol=1e-4)


def test_attention_is_at_the_scales_of_the_chosen_sides():
    network = make(patch_size=64, depth=3, attention_px=(16,))
    assert [len(scale.attention) for scale in network.encoder] == [0, 1, 0]
    assert [len(scale.attention) for scale in network.decoder] == [0, 1]


@pytest.mark.parametrize(
    ("patch_size", "options", "attended"),
    [
        (64, {}, [0, 0, 1]),
        (96, {}, [0, 0, 0, 1]),
        (48, {}, [0, 0, 1]),
        (100, {}, [0, 0]),
        (64, {"attention_px": ()}, 3 * [0]),
    ],
)
def test_attention_is_at_the_coarsest_scale_unless_it_has_many_cells(patch_size, options, attended):
    found = nnx.eval_shape(lambda: make(patch_size=patch_size, **options))
    assert [len(scale.attention) for scale in found.encoder] == attended


def test_a_side_of_no_feature_map_is_refused_with_those_that_exist():
    words = r"^model.attention_px=\[8, 7\]: no feature map has 7 cells per side; .* are \[32, 16, 8\]$"
    with pytest.raises(ValueError, match=words):
        make(patch_size=64, attention_px=(8, 7))


@pytest.mark.slow
def test_rematerialisation_keeps_the_inputs_of_the_scales_only():
    """Features of the finest scale, once per scale and for the head; not those between the convolutions."""
    plain, remat = (
        kept_mib(make(patch_size=64, timed=True, layers=layers, remat=remat), image(shape=(3, 64, 64, 2)), TIME)
        for layers, remat in ((2, False), (2, True))
    )
    deeper = kept_mib(make(patch_size=64, timed=True, layers=6, remat=True), image(shape=(3, 64, 64, 2)), TIME)
    assert remat < 0.3 * plain
    assert deeper < 1.5 * remat


def test_rematerialisation_does_not_change_gradients():
    found = [gradient(awake(make(timed=True, remat=remat)), image(), TIME) for remat in (False, True)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_near_float32():
    exact, coarse = (output(awake(make(dtype=dtype)), image()) for dtype in ("float32", "bfloat16"))
    assert coarse.dtype == jnp.float32
    assert float(jnp.abs(exact - coarse).mean()) < 0.03 * float(jnp.abs(exact).mean())


def test_networks_can_be_stacked():
    """As the members of an ensemble."""
    networks = [awake(make(timed=True), seed) for seed in (1, 2)]
    graph = nnx.split(networks[0])[0]
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *(nnx.split(n)[1] for n in networks))
    found = jax.jit(jax.vmap(lambda p: nnx.merge(graph, p)(image(), TIME)))(stacked)
    for one, network in zip(found, networks, strict=True):
        np.testing.assert_allclose(one, output(network, image(), TIME), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 20, "depth": 3}, "data.patch_size=20: must be a multiple of 8 px"),
        ({"heads": 3, "attention_px": (8,)}, "model.heads=3 does not divide the 8 features"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
