"""Features of all images of a training, computed once, and the heads that are fitted to them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pulmo_jax.data.weights.initial import with_weights
from pulmo_jax.host.console import tracker
from pulmo_jax.inference.members import at_once
from pulmo_jax.inference.memory import within_memory
from pulmo_jax.inference.transfers import read_behind
from pulmo_jax.methods.base import Params
from pulmo_jax.methods.classes import OfFeatures
from pulmo_jax.methods.networks import SHARED
from pulmo_jax.runs.place import Place
from pulmo_jax.tasks.classification.data import ClassSet

MEMORY = "computing features", "use smaller method.sizes"


@dataclass(frozen=True)
class Described:
    """Features of images.

    Attributes:
        head: The method on features (see `OfFeatures.head`).
        shared: Parameters that all networks have in common.
        features: Features of each image.
    """

    head: Any
    shared: Params
    features: Float[np.ndarray, "N D"]


def describe(method: OfFeatures, found: ClassSet, cache: Path | None, place: Place) -> Described:
    """Compute the features of all images.

    Args:
        method: Method.
        found: Images.
        cache: Cache folder of pretrained weights.
        place: For messages.

    Returns:
        The features.

    Raises:
        InputError: If the weights cannot be used.
    """
    network = with_weights(method.random(), method.extractor(), cache, place.console)
    compute, size, count = within_memory(method.describe, *MEMORY), at_once(), len(found.refs)
    places = [np.arange(start, start + size) for start in range(0, count, size)]

    def results() -> Iterator[Any]:
        for some in places:
            images = found.squares.stack(np.minimum(some, count - 1))
            yield compute(network, jnp.asarray(images), jnp.asarray(some < count, np.float32))

    features, sums = [], None
    for part, more in tracker(place.console, "computing features")(read_behind(results()), len(places)):
        features.append(part)
        sums = more if sums is None else jax.tree.map(np.add, sums, more)
    means = jax.tree.map(lambda total: jnp.asarray(total / count), sums)
    return Described(method.head(), method.shared(network, means), np.concatenate(features)[:count])


def fit_head(
    method: OfFeatures, found: ClassSet, described: Described, rows: Int[np.ndarray, "_"], seed: int
) -> Params:
    """Fit the head of one network to the features of its training images."""
    groups = np.unique(np.array(found.groups)[rows], return_inverse=True)[1]
    return method.fit(described.features[rows], found.labels[rows], groups, seed) | {SHARED: described.shared}
