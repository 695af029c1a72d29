"""Inference with several networks, either for different images or for the same images."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from pulmo_jax.inference.memory import within_memory
from pulmo_jax.inference.transfers import keep, kept_bytes, pick, read_behind
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.networks import network_axes

AT_ONCE, AT_ONCE_ACCELERATOR = 8, 32  # images of each network in one call; on a CPU more are no faster

Stack = Callable[[Int[np.ndarray, "*b"]], Shaped[np.ndarray, "..."] | Shaped[Array, "..."]]  # rows to their data


def at_once() -> int:
    """Number of images of each network in one call on the present backend."""
    return AT_ONCE if jax.default_backend() == "cpu" else AT_ONCE_ACCELERATOR


def at_rows(
    function: Callable[..., Any], chunk: Params, rows: Sequence[Int[np.ndarray, "_"]], *stacks: Stack
) -> list[np.ndarray]:
    """Evaluate each network of a chunk at its own rows.

    Args:
        function: Compiled (params, *arrays (M, B, ...)) -> (M, B, ...), vectorised over the networks. All calls have
            one shape; shorter lists of rows are padded.
        chunk: Parameters of M networks.
        rows: Rows of each network.
        stacks: Functions that return the arguments at given rows; see `kept`.

    Returns:
        For each network, one result per row.
    """
    longest, size = max((len(own) for own in rows), default=0), at_once()
    if not longest:
        return [np.zeros(0, np.float32) for _ in rows]
    filled = np.stack([np.resize(own, longest) if len(own) else np.zeros(longest, int) for own in rows])
    parts = (np.take(filled, range(start, start + size), axis=1, mode="clip") for start in range(0, longest, size))
    results = (function(chunk, *(stack(some) for stack in stacks)) for some in parts)
    found = np.concatenate(list(read_behind(results)), axis=1)
    return [found[m, : len(own)] for m, own in enumerate(rows)]


def kept(stack: Stack, rows: Sequence[Int[np.ndarray, "_"]]) -> Stack:
    """Cache the data of a stack at given rows on the device, for loops that use the same rows repeatedly (validation).

    Args:
        stack: Function that returns the data at given rows.
        rows: Rows of each network.

    Returns:
        Function for these rows only, which uploads their data at its first call; the stack itself if the data exceed
        `transfers.kept_bytes`.
    """
    known = np.unique(np.concatenate(rows))
    if not known.size or known.size * stack(known[:1]).nbytes > kept_bytes():
        return stack

    @cache
    def uploaded() -> Any:
        return keep(np.asarray(stack(known)))

    return lambda some: pick(uploaded(), np.searchsorted(known, some))


def of_all(
    function: Callable[..., Any], chunks: Sequence[Params], images: Float[np.ndarray, "N S S"], *others: np.ndarray
) -> Float[np.ndarray, "M N ..."]:
    """Evaluate all networks for the same images.

    Args:
        function: Compiled (params, images, *others) -> (M, B, ...), vectorised over the networks of a chunk.
        chunks: Parameters of the networks, in chunks.
        images: Images.
        others: Further arguments, one row per image.

    Returns:
        Results, (M, N, ...).
    """
    count, size = len(images), at_once()

    def results() -> Iterator[list[Array]]:
        for start in range(0, count, size):
            arrays = [
                jax.device_put(np.take(array, range(start, start + size), axis=0, mode="clip"))
                for array in (images, *others)
            ]
            yield [function(chunk, *arrays) for chunk in chunks]

    return np.concatenate([np.concatenate(part) for part in read_behind(results())], axis=1)[:, :count]


def each_its_own(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Vectorise a function over networks and arrays, for `at_rows`."""

    def each(chunk: Params, *arrays: jax.Array) -> jax.Array:
        return jax.vmap(function, in_axes=(network_axes(chunk), *(0 for _ in arrays)))(chunk, *arrays)

    return jax.jit(each)


def all_the_same(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Vectorise a function over networks with shared arrays, for `of_all`."""

    def each(chunk: Params, *shared: jax.Array) -> jax.Array:
        return jax.vmap(function, in_axes=(network_axes(chunk), *(None for _ in shared)))(chunk, *shared)

    return within_memory(each, f"evaluating the networks for {at_once()} images", "use a smaller method.size")
