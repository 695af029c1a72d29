"""The network: its depth, its arithmetic, and the options that must not change what it computes."""

import re
from collections.abc import Callable
from functools import cache
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.residuals import kept_mib

from pulmo_jax.models.autoencoder import (
    COARSEST_PX,
    ConvAutoencoder,
    affine,
    strides_for,
    to_block_order,
    to_pixel_order,
)


def network(patch_size: int = 32, channels: int = 2, seed: int = 0, **options) -> ConvAutoencoder:
    options = {"latent": 5, "width": 3} | options
    return ConvAutoencoder(patch_size=patch_size, channels=channels, rngs=nnx.Rngs(seed), **options)


def patches(patch_size: int = 32, channels: int = 2, count: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (count, patch_size, patch_size, channels))


def test_the_depth_follows_the_patch_size():
    sizes = {8: 2, 16: 4, 32: 4, 64: 4, 128: 4, 256: 4, 24: 6, 40: 5, 48: 6, 60: 15, 96: 6}
    for patch_size, coarse in sizes.items():
        strides = strides_for(patch_size)
        assert strides[0] == 4
        assert set(strides[1:]) <= {2}
        assert patch_size // prod(strides) == coarse
    assert [len(strides_for(8 * 2**k)) for k in range(6)] == [1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("patch_size", range(8, 257, 4))
def test_every_multiple_of_4_is_halved_as_far_as_it_goes(patch_size):
    side = patch_size / prod(strides_for(patch_size))
    assert side == int(side)
    assert side % 2 == 1 or side < 2 * COARSEST_PX


@pytest.mark.parametrize("patch_size", [-8, 0, 4, 7, 10, 63, 66])
def test_other_patch_sizes_are_refused(patch_size):
    with pytest.raises(ValueError, match=f"data.patch_size={patch_size}: must be a multiple of 4 and at least 8"):
        network(patch_size)


@pytest.mark.slow
def test_large_patches_are_rearranged_by_transpositions_of_few_axes():
    """XLA made gigabytes of code of one over all strides: 24 GB were not enough to compile 128 px."""
    graph, state = nnx.split(network(256, 3))
    batch = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, batch).as_text()
    ranks = [len(axes.split(",")) for axes in re.findall(r"stablehlo.transpose .*dims = \[(.*?)\]", lowered)]
    assert len(ranks) >= 2 * len(strides_for(256))
    assert max(ranks) <= 6


@pytest.mark.parametrize(("patch_size", "channels"), [(8, 13), (12, 1), (256, 3)])
def test_the_reconstruction_has_the_shape_of_the_patches(patch_size, channels):
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = network(patch_size, channels)
        return model.encode(x), model(x)

    batch = jax.ShapeDtypeStruct((2, patch_size, patch_size, channels), jnp.float32)
    latent, reconstruction = jax.eval_shape(run, batch)
    assert latent.shape == (2, 5)
    assert reconstruction.shape == (2, patch_size, patch_size, channels)
    assert reconstruction.dtype == jnp.float32


@pytest.mark.parametrize("bottleneck", ["dense", "spatial"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_and_outputs_are_further_values_of_each_number(bottleneck, dtype):
    """In float32; `encode` returns the first, and decoding it gives the output of the network."""
    model = network(24, 3, outputs=2, moments=2, bottleneck=bottleneck, dtype=dtype)
    x = patches(24, 3)
    moments, latent, output = jax.jit(lambda x: (model.encode_moments(x), model.encode(x), model(x)))(x)
    assert model.latent_shape == {"dense": (5,), "spatial": (6, 6, 5)}[bottleneck]
    assert moments.shape == (2, 2, *model.latent_shape)
    np.testing.assert_array_equal(moments[0], latent)
    assert (np.asarray(moments[0]) != moments[1]).any()
    assert output.shape == (2, 24, 24, 6)
    assert moments.dtype == output.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(model.decode)(latent), output, atol=1e-5)


def test_outputs_of_a_pixel_are_apart_from_those_of_others():
    """Channels of the first output come first: a network whose last layer knows only these changes only these."""
    model = network(8, 2, outputs=2)
    x, layer = patches(8, 2), model.up[0]
    before = model(x)
    last = layer.kernel[...].reshape(-1, 4, 4, 4)
    layer.kernel[...] = last.at[..., 2:].add(1.0).reshape(layer.kernel.shape)
    changed = np.asarray(model(x) != before).any((0, 1, 2))
    np.testing.assert_array_equal(changed, [False, False, True, True])


def test_a_cell_of_a_spatial_bottleneck_is_decoded_alone():
    model = network(32, 1, bottleneck="spatial")
    z = jax.random.normal(jax.random.key(0), (1, *model.latent_shape))
    changed = np.asarray(model.decode(z) != model.decode(z.at[0, 1, 2].add(1.0)))[0, ..., 0]
    assert changed[8:16, 16:24].all()
    assert changed.sum() == 64


def test_a_cell_of_a_spatial_bottleneck_sees_its_own_pixels():
    model, x = network(32, 1, bottleneck="spatial"), patches(32, 1)
    changed = np.asarray(model.encode(x) != model.encode(x.at[:, 9, 20].add(1.0))).any((0, 3))
    np.testing.assert_array_equal(np.argwhere(changed), [[1, 2]])


def gathered(x: np.ndarray, factor: int) -> np.ndarray:
    """(B, h, w, factor^2 C): blocks of pixels, cut out one by one."""
    batch, height, width, _ = x.shape
    deep = [
        [x[:, y : y + factor, column : column + factor].reshape(batch, -1) for column in range(0, width, factor)]
        for y in range(0, height, factor)
    ]
    return np.stack([np.stack(row, axis=1) for row in deep], axis=1)


@pytest.mark.parametrize(
    ("side", "strides", "channels"), [(1, (4,), 3), (3, (2,), 1), (2, (4, 2), 2), (1, (4, 2, 2), 1)]
)
def test_blocks_are_consecutive_for_every_layer_and_are_undone(side, strides, channels):
    size = side * prod(strides)
    x = np.arange(2 * size * size * channels, dtype=np.float32).reshape(2, size, size, channels)
    deep, found = x, to_block_order(jnp.asarray(x), strides)
    for stride in strides:
        deep = gathered(deep, stride)
    np.testing.assert_array_equal(np.asarray(found).reshape(2, side * side, -1), deep.reshape(2, side * side, -1))
    np.testing.assert_array_equal(to_pixel_order(found, strides, side), x)


def test_layers_are_the_convolutions_whose_strides_are_their_kernels():
    """And their mirrors in the decoder the transposed convolutions; two of each, in the network's own arithmetic."""
    two, x, layout = network(32, 3, width=6), patches(32, 3), ("NHWC", "HWIO", "NHWC")
    assert two.strides == (4, 2)

    @jax.jit
    def both_ways(x: jax.Array) -> list[jax.Array]:
        down, kernels = x, []
        for stride, layer in zip(two.strides, two.down, strict=True):
            kernels.append(layer.kernel[...].reshape(stride, stride, -1, layer.out_features))
            strides = (stride, stride)
            down = jax.lax.conv_general_dilated(down, kernels[-1], strides, "VALID", dimension_numbers=layout)
            down = nnx.silu(down + layer.bias[...])
        latent = two.to_latent(down.reshape(len(x), -1))
        up = nnx.silu(two.from_latent(latent)).reshape(-1, *two.coarse)
        for i in (1, 0):
            stride, layer = two.strides[i], two.up[i]
            channels = layer.out_features // stride**2
            kernel = layer.kernel[...].reshape(-1, stride, stride, channels).transpose(1, 2, 3, 0)
            strides = (stride, stride)
            up = jax.lax.conv_transpose(up, kernel, strides, "VALID", dimension_numbers=layout, transpose_kernel=True)
            bias = layer.bias[...].reshape(stride, stride, channels)
            up = up + jnp.tile(bias, (up.shape[1] // stride, up.shape[2] // stride, 1))
            up = nnx.silu(up) if i else up
        return [two.encode(x), latent, two(x), up]

    found_latent, latent, found, expected = both_ways(x)
    np.testing.assert_allclose(found_latent, latent, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradient_of_the_affine_map_is_that_of_its_definition():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((7, 3), (3, 5), (5,), (7, 5))
    x, kernel, bias, weight = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))

    def gradients(function: Callable) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *a: (weight * jnp.sin(function(*a))).sum(), argnums=(0, 1, 2))(x, kernel, bias)

    for found, expected in zip(gradients(affine), gradients(lambda x, k, b: x @ k + b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_patches_pass_one_by_one_through_the_latent_vector():
    graph, state = nnx.split(network())
    x = patches(count=3)

    @jax.jit
    def run(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        latent = model.encode(x)
        return latent, model.decode(latent), model(x)

    latent, decoded, reconstruction = run(state, x)
    assert latent.shape == (3, 5)
    np.testing.assert_array_equal(decoded, reconstruction)
    _, _, others_changed = run(state, x.at[1:].add(1.0))
    np.testing.assert_array_equal(others_changed[0], reconstruction[0])
    assert (np.asarray(others_changed[1:]) != reconstruction[1:]).any(axis=(1, 2, 3)).all()


def test_the_seed_decides_the_parameters():
    first, same, other = (jax.tree.leaves(nnx.state(network(seed=seed), nnx.Param)) for seed in (0, 0, 1))
    for a, b in zip(first, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((np.asarray(a) != b).any() for a, b in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def trained_on() -> Callable[..., tuple[nnx.State, jax.Array, nnx.State]]:
    """(parameters, reconstruction, gradient of the squared error) of a network with these options."""

    @cache
    def run(**options) -> tuple[nnx.State, jax.Array, nnx.State]:
        graph, params = nnx.split(network(**options))
        x = patches()

        def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            reconstruction = nnx.merge(graph, params)(x)
            return ((reconstruction - x) ** 2).mean(), reconstruction

        jaxpr = str(jax.make_jaxpr(loss)(params))
        assert ("remat" in jaxpr) == options.get("remat", False)
        gradient, reconstruction = jax.jit(jax.grad(loss, has_aux=True))(params)
        return params, reconstruction, gradient

    return run


@pytest.mark.parametrize("bottleneck", ["dense", "spatial"])
def test_every_parameter_learns(trained_on, bottleneck):
    _, _, gradient = trained_on(bottleneck=bottleneck)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, path


def test_bfloat16_computes_nearly_the_same_with_float32_parameters(trained_on):
    (_, exact, _), (params, coarse, gradient) = trained_on(), trained_on(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient))} == {np.dtype("float32")}
    assert coarse.dtype == jnp.float32
    error = np.abs(coarse - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.03


def test_rematerialisation_does_not_change_the_gradients(trained_on):
    for plain, remat in zip(
        jax.tree.leaves(trained_on()[1:]), jax.tree.leaves(trained_on(remat=True)[1:]), strict=True
    ):
        np.testing.assert_allclose(plain, remat, rtol=1e-5, atol=1e-7)


def test_rematerialisation_keeps_the_inputs_of_the_layers_only():
    x = patches(64, 1, 32)
    plain, remat = (kept_mib(network(64, 1, width=32, remat=remat), x) for remat in (False, True))
    assert remat < 0.5 * plain
