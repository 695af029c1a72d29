"""Shifted products against XLA's depthwise convolution, values and gradients."""

from functools import partial

import jax
import numpy as np
import pytest

from pulmo_jax.models.depthwise import depthwise, shifted_products


def xla(stride, x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=x.shape[-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 2), (8, 7, 7), (19, 5, 8)])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_values_and_gradients_are_those_of_the_convolution(batch, height, width, size, stride):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (batch, height, width, 8)), jax.random.normal(keys[1], (size, size, 8))
    (one, pull), (two, other) = (jax.vjp(partial(f, stride), x, kernel) for f in (shifted_products, xla))
    np.testing.assert_allclose(one, two, atol=1e-5)
    g = jax.random.normal(keys[2], one.shape)
    for a, b in zip(pull(g), other(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_several_networks_at_once():
    x, kernels = jax.random.normal(jax.random.key(0), (2, 6, 6, 8)), jax.random.normal(jax.random.key(1), (3, 3, 3, 8))
    together = jax.vmap(lambda kernel: depthwise(2, x, kernel))(kernels)
    for one, kernel in zip(together, kernels, strict=True):
        np.testing.assert_allclose(one, xla(2, x, kernel), atol=1e-5)
