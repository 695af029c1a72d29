"""Landmark localisation in many resized images, in batches of one shape."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from pulmo_jax.inference.memory import WithinMemory, within_memory
from pulmo_jax.inference.transfers import pick, read_behind
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.located import Locator

AT_ONCE = 16  # images

Images = Float[np.ndarray, "N S S"] | Float[Array, "N S S"]  # on the host, or kept on the device (`transfers.keep`)


class Positions(NamedTuple):
    """Landmarks of many images, on the host; see `Located`.

    Attributes:
        points: Landmarks (y, x), px of the resized images.
        covariance: Covariance of each landmark, px^2.
    """

    points: Float[np.ndarray, "N K 2"]
    covariance: Float[np.ndarray, "N K 2 2"]


Locate = Callable[[Images], Positions]


def locating(method: Locator) -> Callable[[Params, Images], Positions]:
    """Compile the localisation of a method; one program serves all parameters.

    Args:
        method: Landmark method.

    Returns:
        Function (params, images) -> landmarks.
    """
    return partial(located, compiled_locate(method))


def compiled_locate(method: Locator) -> WithinMemory:
    """Compile the localisation in a batch of images."""
    return within_memory(method.locate, f"localising the landmarks of {AT_ONCE} images", "use a smaller method.size")


def located(compiled: Callable[[Params, Array], Any], params: Params, images: Images) -> Positions:
    """Localise the landmarks of all images with a compiled function of a batch."""
    return Positions(*in_batches(partial(compiled, params), images))


def locator(method: Locator, params: Params, *, trace: bool = False) -> Locate:
    """Compile the localisation of a method with fixed parameters.

    Args:
        method: Landmark method.
        params: Its parameters.
        trace: Trace the program at once, which fails if the shapes of the parameters do not fit the method.

    Returns:
        Function images -> landmarks.
    """
    compiled = compiled_locate(method)
    if trace:
        size: int = method.size  # pyright: ignore[reportAttributeAccessIssue]
        jax.eval_shape(compiled.jitted, params, jax.ShapeDtypeStruct((AT_ONCE, size, size), np.float32))
    return partial(located, compiled, params)


def in_batches(function: Callable[[Array], Any], images: Images) -> Any:
    """Apply a function to all images in batches; a batch is dispatched before the results of earlier ones are read.

    Args:
        function: Function of AT_ONCE images to a tree of arrays with as many rows.
        images: Images on the host or the device; the last batch is padded with the last image.

    Returns:
        Tree of NumPy arrays with one row per image.
    """
    rows = np.arange(-(-len(images) // AT_ONCE) * AT_ONCE).reshape(-1, AT_ONCE)
    batches = (jax.device_put(pick(images, np.minimum(some, len(images) - 1))) for some in rows)
    parts = read_behind(map(function, batches))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(images)], *parts)
