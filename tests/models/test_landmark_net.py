"""The landmark network: its convolution against a slow loop, alone and under vmap, and its layers against Flax's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pulmo_jax.models.blocks import Block, Norm, convolve
from pulmo_jax.models.landmark_net import LandmarkNet, cell_centres, upsample_2x

SMALL = {"n_landmarks": 4, "channels": 2, "stem_stride": 2, "widths": (8, 8, 16), "blocks": 1}


def slow_convolution(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Zeros around: in all what the last window needs, the odd one after (as XLA's SAME)."""
    size, side = len(kernel), -(-x.shape[1] // stride)
    need = max((side - 1) * stride + size - x.shape[1], 0)
    before = need // 2
    x = np.pad(x.astype(np.float64), ((0, 0), (before, need - before), (before, need - before), (0, 0)))
    out = np.zeros((len(x), side, side, kernel.shape[-1]))
    for i in range(side):
        for j in range(side):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weighted(stride: int, x: jax.Array, kernel: jax.Array, weights: jax.Array) -> jax.Array:
    return (convolve(stride, x, kernel) * weights).sum()


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_the_convolution_is_the_slow_loop(stride, size):
    x, kernel = random(2, 8, 8, 3), random(size, size, 3, 4, seed=1)
    expected = slow_convolution(x, kernel, stride)
    np.testing.assert_allclose(convolve(stride, jnp.asarray(x), jnp.asarray(kernel)), expected, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_its_gradient_is_what_the_sum_changes_by(stride):
    x, kernel, weights = random(1, 6, 6, 2), random(3, 3, 2, 3, seed=1), random(1, 6 // stride, 6 // stride, 3, seed=2)
    arrays = tuple(map(jnp.asarray, (x, kernel, weights)))
    for_x, for_kernel = jax.grad(weighted, argnums=(1, 2))(stride, *arrays)
    in_x, in_kernel = random(*x.shape, seed=3), random(*kernel.shape, seed=4)  # the sum is linear in either
    along_x = (slow_convolution(in_x, kernel, stride) * weights).sum()
    along_kernel = (slow_convolution(x, in_kernel, stride) * weights).sum()
    assert float((for_x * in_x).sum()) == pytest.approx(along_x, rel=1e-4, abs=1e-3)
    assert float((for_kernel * in_kernel).sum()) == pytest.approx(along_kernel, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_vmap_gives_what_one_at_a_time_gives(stride, axes):
    stacks = [random(3, 2, 6, 6, 2), random(3, 3, 3, 2, 4, seed=1)]
    given = [jnp.asarray(s if axis == 0 else s[0]) for s, axis in zip(stacks, axes, strict=True)]
    weights = jnp.asarray(random(2, 6 // stride, 6 // stride, 4, seed=2))
    gradient = jax.grad(weighted, argnums=(1, 2))
    together = jax.vmap(lambda x, k: (convolve(stride, x, k), *gradient(stride, x, k, weights)), in_axes=axes)(*given)
    for i in range(3):
        x, kernel = (g[i] if axis == 0 else g for g, axis in zip(given, axes, strict=True))
        alone = (convolve(stride, x, kernel), *gradient(stride, x, kernel, weights))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-4)


def test_the_gradient_of_a_sum_over_members_is_that_of_each():
    x, kernels = jnp.asarray(random(2, 6, 6, 2)), jnp.asarray(random(3, 3, 3, 2, 4, seed=1))
    weights = jnp.asarray(random(2, 6, 6, 4, seed=2))
    found = jax.grad(lambda k: jax.vmap(lambda one: weighted(1, x, one, weights))(k).sum())(kernels)
    expected = [jax.grad(weighted, argnums=2)(1, x, kernel, weights) for kernel in kernels]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_members_do_not_become_a_grouped_convolution():
    def members(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.vmap(lambda kernel: convolve(1, x, kernel))(kernels)

    def loss(x: jax.Array, kernels: jax.Array) -> jax.Array:
        return (members(x, kernels) ** 2).sum()

    for function in (members, jax.grad(loss, argnums=1)):
        text = jax.jit(function).lower(jnp.zeros((2, 6, 6, 2)), jnp.zeros((3, 3, 3, 2, 4))).as_text()
        assert text.count("stablehlo.convolution(") >= 3
        groups = re.findall(r"group_count = (\d+)", text)
        assert len(groups) == 2 * text.count("stablehlo.convolution(")
        assert set(groups) == {"1"}


def test_the_norm_is_flaxs_group_normalisation():
    x = jnp.asarray(random(3, 5, 5, 16)) * 3 + 2
    norm = Norm(16)
    norm.scale[...], norm.bias[...] = jnp.asarray(random(16, seed=1)), jnp.asarray(random(16, seed=2))
    flax = nnx.GroupNorm(16, group_size=8, num_groups=None, epsilon=1e-5, rngs=nnx.Rngs(0))
    flax.scale[...], flax.bias[...] = norm.scale[...], norm.bias[...]
    np.testing.assert_allclose(norm(x), flax(x), atol=1e-4)


def test_a_block_adds_to_its_input():
    block, x = Block(8, rngs=nnx.Rngs(0)), jnp.asarray(random(2, 6, 6, 8))
    assert float(jnp.abs(block(x) - x).max()) > 0.1
    block.convs[1].kernel[...] = jnp.zeros((3, 3, 8, 8))
    np.testing.assert_array_equal(block(x), x)


def test_doubling_repeats_pixels():
    x = random(2, 3, 3, 4)
    np.testing.assert_array_equal(upsample_2x(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize(("count", "side"), [(24, 96), (8, 32), (5, 5)])
def test_the_cells_cover_the_image(count, side):
    pixels = np.arange(side).reshape(count, -1)
    np.testing.assert_allclose(cell_centres(count, side), pixels.mean(1), atol=1e-5)


@pytest.mark.parametrize(("side", "stride", "widths"), [(32, 2, (8, 8, 16)), (96, 2, 5 * (8,)), (192, 4, 5 * (8,))])
def test_heat_maps_have_twice_the_stride_of_the_first_layer(side, stride, widths):
    def maps() -> jax.Array:
        options = {"n_landmarks": 4, "channels": 1, "stem_stride": stride, "widths": widths, "blocks": 2}
        return LandmarkNet(**options, rngs=nnx.Rngs(0))(jnp.zeros((2, side, side, 1)))

    cells = side // (2 * stride)
    assert jax.eval_shape(maps).shape == (2, cells, cells, 4)


def test_an_image_does_not_see_the_others_of_its_batch():
    net = nnx.jit(LandmarkNet(**SMALL, rngs=nnx.Rngs(0)))
    images = jnp.asarray(random(3, 32, 32, 2))
    np.testing.assert_allclose(net(images)[1:2], net(images[1:2]), atol=1e-5)


def test_every_pixel_and_every_parameter_counts():
    net = LandmarkNet(**SMALL, rngs=nnx.Rngs(0))
    graph, state = nnx.split(net)
    weights = jnp.asarray(random(1, 8, 8, 4, seed=3))

    def total(state: nnx.State, images: jax.Array) -> jax.Array:
        return (nnx.merge(graph, state)(images) * weights).sum()

    by_parameter, by_pixel = jax.jit(jax.grad(total, argnums=(0, 1)))(state, jnp.asarray(random(1, 32, 32, 2)))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(by_parameter))
    assert float(jnp.abs(by_pixel).min()) > 0


def test_more_blocks_are_more_parameters():
    def size(**options) -> int:
        return sum(p.size for p in jax.tree.leaves(nnx.state(LandmarkNet(**(SMALL | options), rngs=nnx.Rngs(0)))))

    block = 2 * (3 * 3 * 8 * 8 + 2 * 8), 2 * (3 * 3 * 16 * 16 + 2 * 16)
    assert size(blocks=2) - size() == sum(block)
    assert size(n_landmarks=5) - size() == 8 + 1
