"""What several networks make of images: each of rows of its own, or all of the same ones."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pulmo_jax.methods.classes import Params

AT_ONCE = 8  # images

Stack = Callable[[Int[np.ndarray, "*b"]], np.ndarray]  # rows to what is in them


def at_rows(
    function: Callable[..., Any], chunk: Params, rows: Sequence[Int[np.ndarray, "_"]], *stacks: Stack
) -> list[np.ndarray]:
    """What `function` (params, *arrays (B, ...)) -> (B, ...) gives, for each network of a chunk at rows of its own.

    function: compiled, and under `vmap` over the networks. Calls are of one shape: the shorter lists are filled up.
    """
    longest = max((len(own) for own in rows), default=0)
    if not longest:
        return [np.zeros(0, np.float32) for _ in rows]
    filled = np.stack([np.resize(own, longest) if len(own) else np.zeros(longest, int) for own in rows])
    parts = []
    for start in range(0, longest, AT_ONCE):
        some = np.take(filled, range(start, start + AT_ONCE), axis=1, mode="clip")
        parts.append(np.asarray(function(chunk, *(jnp.asarray(stack(some)) for stack in stacks))))
    found = np.concatenate(parts, axis=1)
    return [found[m, : len(own)] for m, own in enumerate(rows)]


def of_all(
    function: Callable[..., Any], chunks: Sequence[Params], images: Float[np.ndarray, "N S S"], *others: np.ndarray
) -> Float[np.ndarray, "M N ..."]:
    """What every network gives for all images, (M, N, ...)."""
    count = len(images)
    parts = []
    for start in range(0, count, AT_ONCE):
        some = [np.take(array, range(start, start + AT_ONCE), axis=0, mode="clip") for array in (images, *others)]
        arrays = [jnp.asarray(array) for array in some]
        parts.append(np.concatenate([np.asarray(function(chunk, *arrays)) for chunk in chunks]))
    return np.concatenate(parts, axis=1)[:, :count]


def each_its_own(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """For `at_rows`: networks and arrays side by side."""
    return jax.jit(jax.vmap(function))


def all_the_same(function: Callable[..., jax.Array], arrays: int = 1) -> Callable[..., jax.Array]:
    """For `of_all`: networks side by side, arrays shared."""
    return jax.jit(jax.vmap(function, in_axes=(0, *(None,) * arrays)))
