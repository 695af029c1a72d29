"""Landmarks of many working images, in batches of one shape."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.inference.transfers import pick, read_behind
from pulmo_jax.methods.located import Locator, Params

AT_ONCE = 16  # images

Images = Float[np.ndarray, "N S S"] | Float[Array, "N S S"]  # on the host, or kept on the device (`transfers.keep`)


class Positions(NamedTuple):
    """`Located`, of many images, on the host."""

    points: Float[np.ndarray, "N K 2"]
    covariance: Float[np.ndarray, "N K 2 2"]


Locate = Callable[[Images], Positions]


def locating(method: Locator) -> Callable[[Params, Images], Positions]:
    """A function of parameters and images (N, S, S) to their landmarks, compiled once for all parameters."""
    compiled = jax.jit(method.locate)
    return lambda params, images: Positions(*in_batches(partial(compiled, params), images))


def locator(method: Locator, params: Params) -> Locate:
    """A function of (N, S, S) images to their landmarks, compiled once."""
    return partial(locating(method), params)


def in_batches(function: Callable[[Array], Any], images: Images) -> Any:
    """The arrays that a function gives for all images, as NumPy's.

    Args:
        function: of AT_ONCE images to an array, or a tree of arrays, of as many rows; dispatched for a batch before the
            results of earlier ones are read.
        images: on the host or on the device. The last batch is filled up with the last image.
    """
    rows = np.arange(-(-len(images) // AT_ONCE) * AT_ONCE).reshape(-1, AT_ONCE)
    batches = (jax.device_put(pick(images, np.minimum(some, len(images) - 1))) for some in rows)
    parts = read_behind(map(function, batches))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(images)], *parts)
