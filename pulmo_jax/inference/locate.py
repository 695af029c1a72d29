"""Landmarks of many working images, in batches of one shape."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pulmo_jax.methods.located import Locator, Params

AT_ONCE = 16  # images


class Positions(NamedTuple):
    """`Located`, of many images, on the host."""

    points: Float[np.ndarray, "N K 2"]
    covariance: Float[np.ndarray, "N K 2 2"]


Locate = Callable[[Float[np.ndarray, "N S S"]], Positions]


def locator(method: Locator, params: Params) -> Locate:
    """A function of (N, S, S) images to their landmarks, compiled once."""
    compiled = jax.jit(method.locate)
    return lambda images: Positions(*in_batches(lambda batch: compiled(params, batch), images))


def in_batches(function: Callable[[jax.Array], Any], images: Float[np.ndarray, "N S S"]) -> Any:
    """The arrays that a function gives of all images, as NumPy's; each call gets AT_ONCE, the last one filled up."""
    parts = []
    for first in range(0, len(images), AT_ONCE):
        batch = np.asarray(images[first : first + AT_ONCE])
        filled = np.concatenate([batch, np.repeat(batch[-1:], AT_ONCE - len(batch), axis=0)])
        parts.append(jax.tree.map(np.asarray, function(jnp.asarray(filled))))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(images)], *parts)
