"""How many patches, sources and channels are vectorised over: as many as fit into one step's memory.

A step is small on a CPU, where it should stay in the cache, and large on a GPU, which is filled by many patches at a
time (`plan.step_bytes`).
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
    """Number of patches whose samples and covariances fit into one step."""
    n_frames, n_pixels = len(deviations), len(patch.offsets)
    copies = 2 if patch.weights_error is None else ROBUST_COPIES
    n_bytes = deviations.dtype.itemsize * n_pixels * (copies * n_frames + 4 * n_pixels)
    return max(1, patch.step_bytes // n_bytes)


def map_in_batches(function: Callable[[Any], Any], items: Any, batch_size: int) -> Any:
    """`jax.lax.map` in batches of equal size: XLA would compile a smaller last batch a second time.

    Args:
        function: Function of one item.
        items: Arrays with a leading axis of N items.
        batch_size: Number of items that are vectorised over.

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
    """Applies function(patch, *source) to N sources.

    Args:
        function: Function of the static settings and of one source.
        deviations: Frames that the sources are looked for in.
        patch: Static settings; the function is given those of its share of a step.
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
    """Applies function(stack, patch, *arguments) to every channel; channels of equal shapes are vectorised over.

    Shapes differ between channels by the frames that were dropped and by the footprint, a whole number of pixels in
    radius: a few groups cover the channels of a spectrograph, and each is compiled once.

    Args:
        function: Function of one channel.
        stacks: Arrays of each of L channels.
        patches: Static settings of each channel; the function is given those of its share of a step.
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
