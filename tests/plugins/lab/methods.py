"""A method: the autoencoder, started at random by a seed of its own."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax
from pydantic import Field

from pulmo_jax.methods.autoencoder import Autoencoder


@dataclass(frozen=True)
class Reseeded(Autoencoder):
    seed: Annotated[int, Field(ge=0, description="random seed of the initial parameters")] = 0

    def init(self) -> Any:
        leaves, structure = jax.tree.flatten(super().init())
        keys = jax.random.split(jax.random.key(self.seed), len(leaves))
        return structure.unflatten(
            [leaf + 0.01 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
        )
