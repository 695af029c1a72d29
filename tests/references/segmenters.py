"""Small methods of segmentation for tests of what surrounds them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Convolutional:
    """One 5 x 5 convolution and a softmax, or a sigmoid for overlapping classes.

    calls: how often `probabilities` was traced, that is, compiled.
    """

    channels: int = 1
    n_outputs: int = 3
    overlapping: bool = False
    size: int = 5
    calls: Counter = field(default_factory=Counter, compare=False)

    @property
    def mirrored(self) -> bool:
        return False

    def init(self, key) -> Any:
        kernel = jax.random.normal(key, (self.size, self.size, self.channels, self.n_outputs)) / self.size
        return {"kernel": kernel, "bias": jnp.linspace(-0.5, 0.5, self.n_outputs)}

    def train_loss(self, params, batch, key) -> jax.Array:
        return jnp.mean(self.validation_loss(params, batch))

    def validation_loss(self, params, batch) -> jax.Array:
        patches, codes = batch
        p = self.probabilities(params, patches)
        return -jnp.log(jnp.take_along_axis(p, codes[..., None].astype(int), axis=-1)).mean((1, 2, 3))

    def probabilities(self, params, patches) -> jax.Array:
        self.calls["probabilities"] += 1
        z = lax.conv_general_dilated(
            patches, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        z = z + params["bias"]
        return jax.nn.sigmoid(z) if self.overlapping else jax.nn.softmax(z)


def networks(method: Convolutional, count: int) -> Any:
    """Parameters of several networks, with a leading axis."""
    return jax.vmap(method.init)(jax.random.split(jax.random.key(0), count))
