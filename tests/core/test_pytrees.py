"""Dataclasses as pytrees: traced fields, static fields, and placeholders that JAX puts in their place."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pulmo_jax.core.pytrees import register_pytree


@dataclass(frozen=True, eq=False)
class Image:
    pixels: np.ndarray
    unit: float
    name: str

    def __post_init__(self):
        if not isinstance(self.unit, float | jax.Array):
            raise TypeError("a placeholder was validated")


register_pytree(Image, ("pixels", "unit"), ("name",))


def test_arrays_are_traced_and_the_rest_is_static():
    image = Image(np.arange(3.0), 2.0, "m31")
    assert len(jax.tree.leaves(image)) == 2
    traced = []

    @jax.jit
    def total(image):
        traced.append(image.name)
        return image.pixels.sum() * image.unit

    assert total(image) == 6
    assert total(Image(np.ones(3), 3.0, "m31")) == 9
    assert traced == ["m31"]
    assert total(Image(np.ones(3), 3.0, "m33")) == 9
    assert traced == ["m31", "m33"]


def test_it_comes_back_whole_from_transformations():
    image = Image(jnp.arange(3.0), 2.0, "m31")
    gradient = jax.grad(lambda image: (image.pixels**2).sum() * image.unit)(image)
    assert isinstance(gradient, Image)
    assert gradient.name == "m31"
    np.testing.assert_allclose(gradient.pixels, [0, 4, 8])
    assert gradient.unit == 5
    together = jax.vmap(lambda image, k: image.pixels.sum() * k, (None, 0))(image, jnp.arange(2.0))
    np.testing.assert_allclose(together, [0, 3])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(image)]
    assert paths == [".pixels", ".unit"]


def test_validation_remains_where_a_person_constructs_one():
    with pytest.raises(TypeError, match="placeholder"):
        Image(np.ones(3), None, "m31")  # pyright: ignore[reportArgumentType]
