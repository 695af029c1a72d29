"""Batch sizes of patches, sources and channels: as many as fit into the memory of one step.

A step is small on a CPU, where it should fit into the cache, and large on a GPU, which needs many patches at a time for
full utilisation (`plan.step_bytes`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from pulmo_jax.methods.paco.plan import ROBUST_COPIES
from pulmo_jax.methods.paco.stack import Patch, Stack


def patches_at_once(deviations: Float[Array, "T pixels"], patch: Patch) -> int:
    """Compute the number of patches whose samples and covariances fit into one step.

    Args:
        deviations: Frames minus their temporal mean.
        patch: Static settings, with the memory of a step.

    Returns:
        The number of patches, at least 1.
    """
    n_frames, n_pixels = len(deviations), len(patch.offsets)
    copies = 2 if patch.weights_error is None else ROBUST_COPIES
    n_bytes = deviations.dtype.itemsize * n_pixels * (copies * n_frames + 4 * n_pixels)
    return max(1, patch.step_bytes // n_bytes)


def map_in_batches(function: Callable[[Any], Any], items: Any, batch_size: int) -> Any:
    """Run `jax.lax.map` in batches of equal size, because XLA would compile a smaller last batch separately.

    Args:
        function: Function of one item.
        items: Arrays with a leading axis of N items.
        batch_size: Number of items per vectorised batch.

    Returns:
        The results, with a leading axis of N items.
    """
    n = len(jax.tree.leaves(items)[0])
    index = np.minimum(np.arange(n + -n % batch_size), n - 1)
    found = jax.lax.map(function, jax.tree.map(lambda values: values[index], items), batch_size=batch_size)
    return jax.tree.map(lambda values: values[:n], found)


def map_sources(
    function: Callable[..., Any], deviations: Float[Array, "T pixels"], patch: Patch, *sources: Shaped[Array, "N ..."]
) -> Any:
    """Apply function(patch, *source) to N sources.

    Args:
        function: Function of the static settings and of one source.
        deviations: Frames minus their temporal mean.
        patch: Static settings; the function receives a copy whose step memory is divided among concurrent sources.
        *sources: Arrays with a leading axis of N sources.

    Returns:
        The results, with a leading axis of N sources.
    """
    at_once = min(len(sources[0]), max(1, patches_at_once(deviations, patch) // len(deviations)))
    share = patch._replace(step_bytes=patch.step_bytes // at_once)
    return map_in_batches(lambda source: function(share, *source), sources, at_once)


def map_channels(
    function: Callable[..., Any], stacks: Sequence[Stack], patches: Sequence[Patch], *arguments: Shaped[Array, "L ..."]
) -> list[Any]:
    """Apply function(stack, patch, *arguments) to every channel; channels of equal shape are vectorised.

    Shapes differ between channels only by the dropped frames and by the footprint, whose radius is a whole number of
    pixels. A few groups therefore cover the channels of a spectrograph, and each group is compiled once.

    Args:
        function: Function of one channel.
        stacks: Arrays of each of L channels.
        patches: Static settings of each channel; the function receives copies whose step memory is divided among
            concurrent channels.
        *arguments: Arrays with a leading axis of L channels.

    Returns:
        The result for each channel.
    """
    groups: dict[Any, list[int]] = {}
    for number, (stack, patch) in enumerate(zip(stacks, patches, strict=True)):
        groups.setdefault((patch, stack.deviations.shape, stack.stamp.shape), []).append(number)
    results: list[Any] = [None] * len(stacks)
    for (patch, (n_frames, _), _), members in groups.items():
        at_once = min(len(members), max(1, patches_at_once(stacks[members[0]].deviations, patch) // n_frames))
        share = patch._replace(step_bytes=patch.step_bytes // at_once)
        padded = members + members[-1:] * (-len(members) % at_once)
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(stacks[number] for number in padded))
        items = (together, *(values[np.array(padded)] for values in arguments))
        found = jax.lax.map(lambda item, p=share: function(item[0], p, *item[1:]), items, batch_size=at_once)
        for place, number in enumerate(members):
            results[number] = jax.tree.map(lambda leaf, i=place: leaf[i], found)
    return results
