"""Asynchronous transfers between host and device, and data that stay on the device."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, Shaped

AHEAD = 2  # results that may be under way while the host reads one
KEPT_BYTES, KEPT_BYTES_CPU = 2**28, 2**25  # on a CPU the device's memory is the host's


def read_behind(results: Iterable[PyTree], ahead: int = AHEAD) -> Iterator[Any]:
    """Read results back to the host while later results are computed.

    Args:
        results: Trees of device arrays; advancing the iterator only dispatches a computation.
        ahead: Number of computations dispatched before the host waits for the first result; it bounds the memory of
            the results.

    Yields:
        Results as NumPy arrays, in order.
    """
    under_way: deque[PyTree] = deque()
    for result in results:
        for leaf in jax.tree.leaves(result):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        under_way.append(result)
        if len(under_way) > ahead:
            yield jax.tree.map(np.asarray, under_way.popleft())
    for result in under_way:
        yield jax.tree.map(np.asarray, result)


def kept_bytes() -> int:
    """Maximum size of data that stay on the device because a loop uses them repeatedly, bytes."""
    return KEPT_BYTES_CPU if jax.default_backend() == "cpu" else KEPT_BYTES


def keep(array: Shaped[np.ndarray, "N ..."]) -> Shaped[np.ndarray, "N ..."] | Shaped[Array, "N ..."]:
    """Move an array to the device if it has at most `kept_bytes`; otherwise return it unchanged."""
    return jnp.asarray(array) if array.nbytes <= kept_bytes() else array


def pick(
    array: Shaped[np.ndarray, "N ..."] | Shaped[Array, "N ..."], rows: Int[np.ndarray, "*b"]
) -> Shaped[np.ndarray, "..."] | Shaped[Array, "..."]:
    """Select rows of an array on the host or the device; one compiled program serves all selections of one shape."""
    return array[rows] if isinstance(array, np.ndarray) else _taken(array, rows)


@jax.jit
def _taken(array: Shaped[Array, "N ..."], rows: Int[Array, "*b"]) -> Shaped[Array, "..."]:
    """Rows of a device array."""
    return array[rows]
